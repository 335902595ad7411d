"""Pictures in, pictures out: load a model, generate and edit with stage-wise prompts."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from ldm.cli.sampling_checks import SAMPLERS, check_arguments
from ldm.conditioning.presets import presets_beside
from ldm.conditioning.prompts import check_negative_prompt, warn_of_unused
from ldm.config import as_config, check_generates, instantiate_from_config, load_config
from ldm.files.images import WHITE, fit, make_grid, open_image, to_pil, to_rgb, to_tensor
from ldm.files.records import PNG_KEY, read_parameters, save_picture
from ldm.models.diffusion.finite import FirstBad, refuse_bad_latents
from ldm.models.diffusion.sampling import Callback, draw_noise, seeded_generators
from ldm.native import native
from ldm.util import pick_device

if TYPE_CHECKING:
    from ldm.conditioning.prompts import Words
    from ldm.embeddings import Concept
    from ldm.models.diffusion.ddpm import LatentDiffusion

__all__ = [
    "PNG_KEY",
    "SAMPLERS",
    "Interrupted",
    "check_arguments",
    "load_model_from_config",
    "main",
    "open_content",
    "read_parameters",
    "save_picture",
]

logger = logging.getLogger(__name__)

_LOADING = threading.Lock()  # one thread at a time changes which concepts a model holds


class Interrupted(KeyboardInterrupt):
    """Ctrl-C when some batches are finished; `picture` is what `main` gives for these alone."""

    def __init__(self, picture: Image.Image) -> None:
        super().__init__()
        self.picture = picture


def load_model_from_config(
    config: DictConfig | str | Path,
    ckpt: str | Path,
    verbose: bool = False,
    device: str | torch.device | None = None,
    dtype: str = "float32",
) -> LatentDiffusion:
    """A frozen model for generating, on `device` (by default CUDA, else MPS, else the CPU).

    A configuration for learning can be given as well; nothing is learned then, concepts are loaded.

    Args:
        config: path of a YAML file, or what OmegaConf read from one.
        ckpt: base model: .ckpt, .safetensors or a diffusers folder.
        dtype: float32, float16 or bfloat16; the precision of the weights.

    Raises:
        ConfigError, CheckpointError, ValueError: with one sentence that says what to mend.
    """
    config = load_config(config, flag="config=") if isinstance(config, (str, Path)) else as_config(config)
    check_generates(config)
    for part in ("first_stage_ckpt", "cond_stage_ckpt"):  # all weights are those of `ckpt`
        config.model.params.pop(part, None)
    OmegaConf.update(config, "model.params.ckpt_path", str(ckpt))
    OmegaConf.update(config, "model.params.frozen_dtype", dtype)
    personalization = config.model.params.get("personalization_config")
    if personalization is not None:
        OmegaConf.update(personalization, "params.initializer_words", None)
    model = instantiate_from_config(config.model)
    if verbose:
        parameters = sum(p.numel() for p in model.parameters())
        logger.info("%s: %.1f M parameters", ckpt, parameters / 1e6)
    # convolutions in float32 are no less exact than products of matrices are asked to be; cuDNN's default is TF32
    torch.backends.cudnn.allow_tf32 = torch.get_float32_matmul_precision() != "highest"
    model.presets, model.native = presets_beside(ckpt), native(config)
    return model.to(pick_device(device)).eval().requires_grad_(False)


@torch.no_grad()
def main(
    prompt: str = "",
    content_dir: str | Path | Image.Image | None = None,
    ddim_steps: int = 50,
    strength: float = 0.5,
    ddim_eta: float = 0.0,
    n_iter: int = 1,
    C: int = 4,
    f: int = 8,
    n_rows: int = 0,
    scale: float | None = None,
    model: LatentDiffusion | None = None,
    seed: int = 42,
    prospect_words: Words | None = None,
    n_samples: int = 1,
    height: int | None = None,
    width: int | None = None,
    *,
    sampler: str = "ddim",
    resize: str = "crop",
    concepts: Mapping[str, str | Path | Concept] | None = None,
    any_base: bool = False,
    legacy_word_tokens: bool = False,
    callback: Callback | None = None,
    progress: bool = True,
    negative_prompt: str = "",
) -> Image.Image:
    """Generate a picture, or edit one. Several pictures come as a grid.

    Picture i of n_iter · n_samples has the seed `seed + i`; it is the same picture when it is made alone.

    Args:
        prompt: text; a `*` in it stands for the learned concept, or for the entries of `prospect_words`.
        content_dir: picture (a file, or one that is open) to edit; None generates from noise.
        ddim_steps: sampling steps, 1..1000.
        strength: how much of the content picture is given up, 0 (nothing) to 1 (all); editing only.
        ddim_eta: 0 is deterministic DDIM, 1 is as random as DDPM.
        n_iter, n_samples: batches, and pictures in a batch.
        C, f: accepted because the reference's calls give them; the model knows its own.
        n_rows: pictures in a row of the grid; 0 for as square as possible.
        scale: guidance scale; 1 is no guidance. None is the model's own: 10 for Stable Diffusion.
        model: from `load_model_from_config`.
        prospect_words: one entry for each stage, entry 0 = end of generation; see `ldm.conditioning.prompts`.
        height, width: pixels; multiples of 64 for Stable Diffusion. None is the model's own: 512 for that.
        sampler: ddim or plms.
        resize: how the content picture is brought to width x height: crop, pad or squash.
        concepts: {placeholder: embedding file}, loaded before generating.
        any_base: load concepts that were learned for another base model, too.
        callback: called after each step with (step, timestep, latents, predicted latents).
        progress: show a bar over the steps.
        negative_prompt: plain text that guidance leads away from, in all stages; it takes the empty text's place.

    Returns:
        RGB picture; `info['prospect']` holds what is needed to make it again (see `save_picture`).

    Raises:
        ValueError: an argument out of range, with the nearest usable value.
        NotFiniteError: the latents became infinite or NaN.
        Interrupted: Ctrl-C after the first batch.
    """
    if model is None:
        raise ValueError("main() needs model=…; make one with load_model_from_config(config, checkpoint).")
    model.eval()  # a model that was just trained would sample with dropout
    height, width, scale = model.native.filled(height=height, width=width, scale=scale).values()
    settings = {
        "ddim_steps": ddim_steps,
        "strength": strength,
        "ddim_eta": ddim_eta,
        "scale": scale,
        "seed": seed,
        "n_iter": n_iter,
        "n_samples": n_samples,
        "n_rows": n_rows,
        "height": height,
        "width": width,
        "sampler": sampler,
        "resize": resize,
    }
    check_arguments(model, **settings)
    with _LOADING:  # what is read here stays as it is, whatever another thread loads meanwhile
        if concepts:
            if model.embedding_manager is None:
                raise ValueError("This model has no personalization_config, so concepts cannot be loaded into it.")
            model.embedding_manager.load(concepts, any_base)
        cond = model.get_learned_conditioning([prompt] * n_samples, prospect_words, legacy_word_tokens)
        check_negative_prompt(negative_prompt, model.embedding_manager.rows() if model.embedding_manager else ())
        uncond = None if scale == 1.0 else model.get_learned_conditioning([negative_prompt] * n_samples)
        warn_of_unused(concepts or (), prompt, prospect_words, learned_as(model))
        used_concepts = concepts_of(model)
    if negative_prompt and scale == 1.0:
        logger.warning("negative_prompt has no effect with guidance scale 1; use a larger one.")
    door = SAMPLERS[sampler](model)
    door.make_schedule(ddim_num_steps=ddim_steps, ddim_eta=ddim_eta, verbose=False)
    posterior = content = None
    if content_dir is not None:
        content = open_content(content_dir)
        image = to_tensor(fit(content, width, height, resize)).unsqueeze(0)
        posterior = model.encode_first_stage(image)
    # as in the reference: the picture is noised to this entry of the schedule and denoised from the one below
    steps = ddim_steps if posterior is None else int(strength * ddim_steps)
    if strength and not steps:
        logger.warning(
            "strength %g of %d steps is less than one, so the content picture stays as it is; %g makes one.",
            *(strength, ddim_steps, math.ceil(1e4 / ddim_steps) / 1e4),
        )

    record = {
        "prompt": prompt,
        "prospect_words": None if prospect_words is None else list(prospect_words),
        "negative_prompt": negative_prompt,
        "content_dir": content_source(content_dir),
        "content_hash": None if content is None else content_hash(content),
        **settings,
        "legacy_word_tokens": legacy_word_tokens,
        **used_concepts,
        "any_base": any_base,
        "base_model": model.base_model.get("base_model"),
        "dtype": str(model.model.diffusion_model.dtype).removeprefix("torch."),
        "num_stages": model.num_stages,
    }
    pictures: list[Image.Image] = []
    try:
        with tqdm(total=n_iter * steps, desc="sampling", disable=not progress, leave=False) as bar:
            watch = FirstBad()

            def report(step: int, t: int, x: Tensor, x_0: Tensor) -> None:
                bar.update()
                watch.add(t, x)
                if callback is not None:
                    callback(step, t, x, x_0)

            for iteration in range(n_iter):
                generators = seeded_generators([int(seed) + iteration * n_samples + i for i in range(n_samples)])
                factor = model.first_stage_model.downsampling
                shape = (n_samples, model.channels, height // factor, width // factor)
                if posterior is None:
                    x = draw_noise(generators, shape, model.device)
                else:
                    posterior_noise = draw_noise(generators, shape, model.device)
                    x = model.get_first_stage_encoding(posterior, posterior_noise).expand(shape)
                    if steps:
                        level = torch.full((n_samples,), steps, device=model.device)
                        x = door.stochastic_encode(x, level, noise=draw_noise(generators, shape, model.device))
                latents = door.decode(x, cond, steps, scale, uncond, generators, report)
                refuse_bad_latents(watch, model.num_stages, model.num_timesteps)
                pictures += [to_pil(picture) for picture in model.decode_first_stage(latents)]
    except KeyboardInterrupt as stop:
        if not pictures:
            raise
        raise Interrupted(_result(pictures, record)) from stop
    return _result(pictures, record)


def _result(pictures: list[Image.Image], record: dict[str, Any]) -> Image.Image:
    """The picture or the grid of finished batches, with the record that repeats it."""
    result = pictures[0] if len(pictures) == 1 else make_grid(pictures, record["n_rows"] or None)
    record = record | {"n_iter": len(pictures) // record["n_samples"]}
    result.info[PNG_KEY] = json.dumps(record, default=lambda number: number.item())  # NumPy's
    return result


def open_content(content: str | Path | Image.Image) -> Image.Image:
    """The content picture as RGB: the same from a file and from a picture that Pillow has opened."""
    if isinstance(content, Image.Image):
        return to_rgb(ImageOps.exif_transpose(content), WHITE)
    return open_image(content)


def content_hash(content: Image.Image) -> str:
    """The first digits of the SHA-256 of a picture's pixels, as RGB."""
    return hashlib.sha256(content.tobytes()).hexdigest()[:10]


def content_source(content: str | Path | Image.Image | None) -> str | None:
    """Where the content picture came from, for the record; '' for one that is no file."""
    if isinstance(content, Image.Image):
        return str(getattr(content, "filename", ""))
    return None if content is None else str(content)


def concepts_of(model: LatentDiffusion) -> dict[str, dict[str, str]]:
    """For the record: placeholder -> name of the file it was loaded from, and -> the file's hash."""
    manager = model.embedding_manager
    sources = {} if manager is None else dict(manager.sources)
    return {"concepts": sources, "concept_hashes": {p: manager.hashes[p] for p in sources if p in manager.hashes}}


def learned_as(model: LatentDiffusion) -> dict[str, str]:
    """Placeholder of each loaded concept -> the placeholder that its file names."""
    loaded = {} if model.embedding_manager is None else model.embedding_manager.loaded
    return {name: concept.metadata.get("placeholder", name) for name, concept in loaded.items()}
