"""The size and the guidance scale that a model makes pictures with where nobody asks for others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from omegaconf import DictConfig


class Native(NamedTuple):
    """A model's own arguments of `ldm.generate.main`; by default Stable Diffusion v1's."""

    height: int = 512
    width: int = 512
    scale: float = 10.0

    def filled(self, **given: Any) -> dict[str, Any]:
        """Those of `height`, `width` and `scale` that are given, with the model's own for None."""
        return {name: getattr(self, name) if value is None else value for name, value in given.items()}


def native(config: DictConfig) -> Native:
    """What a configuration says: the latents' `image_size`, else the first stage's `resolution`, and the guidance
    scale that the image logger draws with; Stable Diffusion's where it says nothing."""
    from omegaconf import OmegaConf

    latents = OmegaConf.select(config, "model.params.image_size")
    first_stage = OmegaConf.select(config, "model.params.first_stage_config.params.ddconfig") or {}
    size = first_stage.get("resolution")
    if isinstance(latents, int) and first_stage.get("ch_mult"):
        size = latents * 2 ** (len(first_stage["ch_mult"]) - 1)
    scale = OmegaConf.select(config, "lightning.callbacks.image_logger.params.log_images_kwargs.scale")
    return Native(**Native().filled(height=size, width=size, scale=scale))
