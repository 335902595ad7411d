"""diffusers' and transformers' networks of a model's shape, without its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldm.models.diffusion.latent_diffusion import DiffusionModel


def build_networks(model: DiffusionModel, unet_sizes: Mapping[str, Any], resolution: int) -> dict[str, Any]:
    """Return the modules `unet`, `vae` and `text_encoder`, with the weights that the libraries begin with.

    Args:
        unet_sizes: `params` of the configuration's `unet_config`.
        resolution: default height and width of the pipeline's images, in pixels.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    first_stage, text = model.first_stage_model, model.cond_stage_model
    attends = [2**level in unet_sizes["attention_resolutions"] for level in range(len(unet_sizes["channel_mult"]))]
    unet = UNet2DConditionModel(
        sample_size=resolution // first_stage.downsampling,
        in_channels=unet_sizes["in_channels"],
        out_channels=unet_sizes["out_channels"],
        block_out_channels=[unet_sizes["model_channels"] * m for m in unet_sizes["channel_mult"]],
        layers_per_block=unet_sizes["num_res_blocks"],
        transformer_layers_per_block=unet_sizes.get("transformer_depth", 1),
        cross_attention_dim=unet_sizes["context_dim"],
        attention_head_dim=unet_sizes["num_heads"],  # its name notwithstanding, the number of heads
        norm_num_groups=unet_sizes.get("norm_num_groups", 32),
        down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
    )
    encoder: Any = first_stage.encoder
    widths = [level.block[-1].conv2.out_channels for level in encoder.down]
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * len(widths),
        up_block_types=["UpDecoderBlock2D"] * len(widths),
        block_out_channels=widths,
        layers_per_block=len(encoder.down[0].block),
        latent_channels=model.channels,
        norm_num_groups=encoder.norm_out.num_groups,
        sample_size=resolution,
        scaling_factor=model.scale_factor,
    )
    config, tokenizer = text.transformer.config, text.tokenizer
    sizes = {name: getattr(config, name) for name in config.__dataclass_fields__}
    ends = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    return {"unet": unet, "vae": vae, "text_encoder": CLIPTextModel(CLIPTextConfig(**sizes, **ends))}
