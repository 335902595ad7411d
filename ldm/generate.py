"""Load a model, generate images and edit them with stage-wise prompts."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from omegaconf import DictConfig
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm.auto import tqdm

from ldm.conditioning.context import Conditioning
from ldm.conditioning.learned import truncates
from ldm.conditioning.presets import Windows, preset_words, presets_beside
from ldm.conditioning.prompts import warn_of_class, warn_of_unknown, warn_of_unused
from ldm.config import as_config, check_generates, instantiate_from_config, load_config, resolved
from ldm.embeddings import Concept
from ldm.files.images import WHITE, ImageError, fit, make_grid, open_image, to_pil, to_rgb, to_tensor
from ldm.files.records import PNG_KEY, read_parameters, save_picture
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.finite import FirstBad, refuse_bad_latents
from ldm.models.diffusion.plms import PLMSSampler
from ldm.models.diffusion.sampling import Callback, Sampler, draw_noise, seeded_generators
from ldm.models.first_stage import DiagonalGaussianDistribution
from ldm.request import FAST, PLACEHOLDER, ModelFacts, Request, Words, check_negative_prompt, model_facts
from ldm.util import pick_device, usual_torch

if TYPE_CHECKING:
    from ldm.models.diffusion.latent_diffusion import DiffusionModel

__all__ = [
    "FAST",
    "PNG_KEY",
    "SAMPLERS",
    "Interrupted",
    "generate_image",
    "load_model_from_config",
    "main",
    "open_content",
    "read_parameters",
    "save_picture",
]

logger = logging.getLogger(__name__)

SAMPLERS: dict[str, type[Sampler]] = {"ddim": DDIMSampler, "plms": PLMSSampler, "dpmpp_2m": DPMSolverSampler}
Content = str | Path | Image.Image | BinaryIO
WITHOUT_LIGHTNING = {
    "ldm.models.diffusion.ddpm.LatentDiffusion": "ldm.models.diffusion.latent_diffusion.DiffusionModel",
    "ldm.models.autoencoder.AutoencoderKL": "ldm.models.first_stage.KLFirstStage",
    "ldm.models.autoencoder.VQModelInterface": "ldm.models.first_stage.VQFirstStage",
}

_LOADING = threading.Lock()  # one thread at a time changes which concepts a model holds


class Interrupted(KeyboardInterrupt):
    """Ctrl-C when some batches are finished; `image` is what `main` returns for these alone."""

    def __init__(self, image: Image.Image) -> None:
        super().__init__()
        self.image = image


@usual_torch()
def load_model_from_config(
    config: DictConfig | Mapping[str, Any] | str | Path,
    ckpt: str | Path,
    verbose: bool = False,
    device: str | torch.device | None = None,
    dtype: str = "float32",
    lightning: bool = True,
) -> DiffusionModel:
    """Build a frozen model for generating, on `device` (by default CUDA, else MPS, else the CPU).

    A configuration for learning can be given as well; nothing is learned then, concepts are loaded.

    Args:
        config: path of a YAML file, or what OmegaConf read from one; it is left as it is.
        ckpt: base model: .ckpt, .safetensors or a diffusers folder.
        dtype: float32, float16 or bfloat16; the precision of the weights.
        lightning: the class that the configuration names, a `LightningModule`; False for the same model without
            Lightning, which takes longer to import than all the rest.

    Raises:
        ConfigError, CheckpointError, ValueError: with one sentence that says what to mend.
    """
    config = load_config(config, flag="config=") if isinstance(config, (str, Path)) else as_config(config)
    ckpt, place = Path(ckpt).expanduser(), pick_device(device)
    check_generates(config)
    model: DiffusionModel = instantiate_from_config(_for_generating(config, ckpt, dtype, lightning))
    if verbose:
        parameters = sum(p.numel() for p in model.parameters())
        logger.info("%s: %.1f M parameters", ckpt, parameters / 1e6)
    # convolutions in float32 are no less exact than products of matrices are asked to be; cuDNN's default is TF32
    torch.backends.cudnn.allow_tf32 = torch.get_float32_matmul_precision() != "highest"
    model.presets, model.facts = presets_beside(ckpt), model_facts(config)
    return model.to(place).eval().requires_grad_(False)


def _for_generating(config: DictConfig, ckpt: Path, dtype: str, lightning: bool) -> dict[str, Any]:
    """Return the section `model:` as plain values, with the checkpoint and nothing to learn.

    Plain values, because a `${` in a path would be read as an interpolation.
    """
    section = resolved(config.model, "The section 'model:'")
    params = section["params"]
    for part in ("first_stage_ckpt", "cond_stage_ckpt"):  # all weights are those of `ckpt`
        params.pop(part, None)
    params |= {"ckpt_path": str(ckpt), "frozen_dtype": dtype}
    for named in (section, params["first_stage_config"]):
        if not lightning and isinstance(named, dict) and "target" in named:
            named["target"] = WITHOUT_LIGHTNING.get(named["target"], named["target"])
    if isinstance(params.get("personalization_config"), dict):
        personalization = params["personalization_config"]
        personalization["params"] = {**(personalization.get("params") or {}), "initializer_words": None}
    return section


@torch.no_grad()
def main(
    prompt: str = "",
    content_dir: Content | None = None,
    ddim_steps: int = 50,
    strength: float = 0.5,
    ddim_eta: float = 0.0,
    n_iter: int = 1,
    C: int = 4,
    f: int = 8,
    n_rows: int = 0,
    scale: float | Sequence[float] | None = None,
    model: DiffusionModel | None = None,
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
    preset: str | None = None,
    truncation: int | None = None,
    layer_words: Words | None = None,
    rescale: float = 0.0,
    spacing: str | None = None,
) -> Image.Image:
    """Generate an image, or edit one. Several images come as a grid. `**FAST` takes two fifths of the U-Net calls.

    Args:
        model: from `load_model_from_config`.
        C, f: accepted because the reference's calls give them; the model knows its own.
        callback, progress: see `generate_image`.
        All others: see `ldm.request.Request`.

    Returns:
        RGB image; `info['prospect']` holds what is needed to make it again (see `save_picture`).

    Raises:
        ValueError: an argument that cannot be used, with the nearest usable value; see also `generate_image`.
    """
    given = {name: value for name, value in locals().items() if name in _REQUESTED}
    if model is None:
        raise ValueError("main() needs model=…; make one with load_model_from_config(config, checkpoint).")
    return generate_image(Request(**given).for_model(facts_of(model)), model, callback, progress)


_REQUESTED = {field.name for field in fields(Request)}
# What `help(main)` and `main?` show: the request's own words, where the source refers to them.
_MEANINGS = (Request.__doc__ or "").partition("    Args:\n")[2].partition("\n\n")[0]
main.__doc__ = (main.__doc__ or "").replace("        All others: see `ldm.request.Request`.", _MEANINGS)


def facts_of(model: DiffusionModel) -> ModelFacts:
    """Return what a request is checked against; size and guidance are those that `load_model_from_config` found."""
    manager = model.embedding_manager
    return replace(
        model.facts,
        num_stages=model.num_stages,
        num_timesteps=model.num_timesteps,
        size_unit=model.size_unit,
        factor=model.first_stage_model.downsampling,
        placeholder=None if manager is None else manager.placeholder_strings[0],
        token_width=model.cond_stage_model.width,
        num_layers=model.model.diffusion_model.num_attention_layers,
    )


@torch.no_grad()
def generate_image(
    request: Request, model: DiffusionModel, callback: Callback | None = None, progress: bool = True
) -> Image.Image:
    """Generate what a request asks for: prepare, denoise and decode each batch, record.

    Args:
        request: checked for this model (`Request.for_model`).
        callback: called after each step with (step, timestep, latents, predicted latents); a tensor that it returns
            takes the latents' place.
        progress: show a bar over the steps.

    Raises:
        ValueError: a concept, a content image or a text that cannot be used, or too little memory.
        NotFiniteError: the latents became infinite or NaN.
        Interrupted: Ctrl-C after the first batch.
    """
    model.eval()  # a model that was just trained would sample with dropout
    images: list[Image.Image] = []
    with _naming_switches(request, model):
        prepared = prepare(request, model)
        with tqdm(total=request.n_iter * prepared.steps, desc="sampling", disable=not progress, leave=False) as bar:

            def report(step: int, t: int, x: Tensor, x_0: Tensor) -> Tensor | None:
                bar.update()
                return None if callback is None else callback(step, t, x, x_0)

            try:
                for iteration in range(request.n_iter):
                    latents = denoise(request, model, prepared, iteration, report)
                    images += [to_pil(image) for image in model.decode_first_stage(latents)]
            except KeyboardInterrupt as stop:
                if not images:
                    raise
                raise Interrupted(_with_record(images, request, prepared.record)) from stop
    return _with_record(images, request, prepared.record)


@dataclass(frozen=True)
class Prepared:
    """State that all batches of a request share.

    Args:
        cond, uncond: the prompt, and what guidance leads away from (None: no guidance).
        sampler: with its schedule made.
        posterior: of the content image's latents; None: from noise.
        steps: denoising steps of a batch.
        record: for the PNG.
    """

    cond: Conditioning
    uncond: Conditioning | None
    sampler: Sampler
    posterior: DiagonalGaussianDistribution | Tensor | None
    steps: int
    record: dict[str, Any]


def prepare(request: Request, model: DiffusionModel) -> Prepared:
    """Read the concepts, the prompt and the content image of a request.

    Raises:
        ValueError: one of them cannot be used.
    """
    made_of: dict[str, Any] = {}
    with _LOADING, _concepts_of(request, model):
        prompt, words = request.prompt, request.prospect_words
        if request.preset is not None:
            windows = model.presets if isinstance(model.presets, Windows) else Windows(model.presets, "model.presets")
            words = preset_words(request.preset, prompt, _placeholders(request, model), model.num_stages, windows)
            made_of = {"preset": request.preset, "preset_prompt": prompt, "preset_windows": windows.source}
            prompt = PLACEHOLDER
        cond, uncond = _conditionings(request, model, prompt, words)
        record = _record(request, model, prompt, words) | _words_read(request, model, prompt, words) | made_of
    sampler = SAMPLERS[request.sampler](model)
    sampler.make_schedule(request.ddim_steps, request.spacing, request.ddim_eta, verbose=False)
    posterior = None
    if request.content_dir is not None:
        content = open_content(request.content_dir)
        record |= {"content_dir": content_source(request.content_dir), "content_hash": content_hash(content)}
        height, width = request.size
        posterior = model.encode_first_stage(to_tensor(fit(content, width, height, request.resize)).unsqueeze(0))
    if request.strength and not request.denoising_steps:
        logger.warning(
            "strength %g of %d steps is less than one, so the content image stays as it is; %g makes one.",
            *(request.strength, request.ddim_steps, math.ceil(1e4 / request.ddim_steps) / 1e4),
        )
    return Prepared(cond, uncond, sampler, posterior, request.denoising_steps, record)


def _placeholders(request: Request, model: DiffusionModel) -> tuple[str, ...]:
    """Return the request's concepts that a preset can place in stages.

    Raises:
        ValueError: there are concepts, and none has a placeholder.
    """
    manager, names = model.embedding_manager, tuple(request.concepts or ())
    if manager is None or not names:
        return names
    placed = tuple(name for name in names if name in manager.rows())
    if not placed:
        raise ValueError(
            f"A preset says in which stages a concept's token stands, and '{names[0]}' "
            f"({manager.loaded[names[0]].method}) has none: it changes every prompt; omit the preset."
        )
    return placed


@contextmanager
def _concepts_of(request: Request, model: DiffusionModel) -> Iterator[None]:
    """Load the request's concepts, for as long as its prompts are read."""
    manager = model.embedding_manager
    if manager is None:
        yield
        return
    with manager.keeping():
        if request.concepts:
            manager.load(request.concepts, request.any_base)
        yield


def _conditionings(
    request: Request, model: DiffusionModel, prompt: str, words: Words | None
) -> tuple[Conditioning, Conditioning | None]:
    """Return the prompt and what guidance leads away from, with the learned vectors of this moment."""
    manager = model.embedding_manager
    check_negative_prompt(request.negative_prompt, manager.rows() if manager is not None else ())
    prompts = [prompt] * request.n_samples
    cond: Conditioning
    if request.layer_words is not None:
        cond = model.get_layered_conditioning(prompts, request.layer_words, request.truncation)
    else:
        cond = model.get_learned_conditioning(prompts, words, request.legacy_word_tokens, request.truncation)
    if request.truncation is not None and not any(map(truncates, model.learned_now().tokens)):
        logger.warning("truncation has no effect: no concept of NeTI is loaded that was learned with nested dropout.")
    uncond = None
    if request.is_guided:
        uncond = model.get_unconditional(request.negative_prompt, request.n_samples)
    elif request.negative_prompt:
        logger.warning("negative_prompt has no effect with guidance scale 1; use a larger one.")
    _warn_of_names(request, model, prompt, words if request.layer_words is None else request.layer_words)
    return cond, uncond


def _warn_of_names(request: Request, model: DiffusionModel, prompt: str, words: Words | None) -> None:
    """Warn of concepts that no text names, by placeholder or else class word, and of words that a small model lacks."""
    manager = model.embedding_manager
    loaded, rows = ({}, {}) if manager is None else (manager.loaded, manager.rows())
    learned_as = {name: concept.metadata.get("placeholder", name) for name, concept in loaded.items() if name in rows}
    asked_for = [name for name in request.concepts or () if name in rows or name not in loaded]
    warn_of_unused(asked_for, prompt, words, learned_as)
    texts = [prompt, request.negative_prompt, *(word for word in words or () if isinstance(word, str))]
    warn_of_unknown(model.cond_stage_model.known_words, texts, loaded)
    for name, concept in loaded.items():
        if name not in rows:
            warn_of_class(name, concept.metadata.get("captions", "").splitlines(), prompt, words)


def _words_read(request: Request, model: DiffusionModel, prompt: str, words: Words | None) -> dict[str, Any]:
    """Return for the record how many words of too long prompts were read, those of `prompt` in each stage."""
    reader = model.prompt_reader()
    prompt_read, negative_read = reader.words_read(prompt, words), reader.words_read(request.negative_prompt)[0]
    cut = negative_read is not None or any(count is not None for count in prompt_read)
    return {"words_read": {"prompt": prompt_read, "negative_prompt": negative_read}} if cut else {}


def denoise(request: Request, model: DiffusionModel, prepared: Prepared, iteration: int, callback: Callback) -> Tensor:
    """Return the latents (n_samples, C, H, W) of a batch, after all steps.

    A content image is noised to the level that `Request.noised_entry` says.
    """
    first = request.seed + iteration * request.n_samples
    generators = seeded_generators(range(first, first + request.n_samples))
    factor = model.first_stage_model.downsampling
    shape = (request.n_samples, model.channels, *(side // factor for side in request.size))
    x = draw_noise(generators, shape, model.device)
    if prepared.posterior is not None:
        x = model.get_first_stage_encoding(prepared.posterior, x).expand(shape)
        if prepared.steps:
            level = torch.full((request.n_samples,), request.noised_entry, device=model.device)
            noise = draw_noise(generators, shape, model.device)
            x = prepared.sampler.stochastic_encode(x, level, noise=noise)
    watch = FirstBad()

    def watched(step: int, t: int, x: Tensor, x_0: Tensor) -> Tensor | None:
        changed = callback(step, t, x, x_0)
        watch.add(t, x if changed is None else changed)
        return changed

    x = prepared.sampler.decode(
        x, prepared.cond, prepared.steps, request.guidance_scale, prepared.uncond, generators, watched, request.rescale
    )
    refuse_bad_latents(watch, model.num_stages, model.num_timesteps)
    return x


@contextmanager
def _naming_switches(request: Request, model: DiffusionModel) -> Iterator[None]:
    """Turn an out-of-memory error into one sentence that names the switches."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        texts = ("out of memory", "can't allocate memory", "Storage size calculation overflowed")
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not any(t in str(error) for t in texts):
            raise
        height, width = request.size
        raise ValueError(
            f"The memory of '{model.device}' does not hold {request.n_samples} x {width}x{height} pixels; these help: "
            "fewer n_samples, a smaller height and width, dtype float16, and model.params.decode_batch of 1."
        ) from error


def _record(request: Request, model: DiffusionModel, prompt: str, words: Words | None) -> dict[str, Any]:
    """Return what repeats the image: the request as it was carried out, and what it was made with."""
    written = {field.name: getattr(request, field.name) for field in fields(Request)}
    del written["preset"]
    loaded = {} if model.embedding_manager is None else model.embedding_manager.loaded
    stages = {name: concept.num_stages for name, concept in loaded.items() if concept.has_table}
    if set(stages.values()) - {model.num_stages}:
        written["concept_stages"] = stages
    return written | {
        "prompt": prompt,
        "prospect_words": None if words is None else list(words),
        "content_hash": None,
        "concepts": {name: concept.source for name, concept in loaded.items()},
        "concept_hashes": {name: concept.identity for name, concept in loaded.items()},
        "base_model": model.base_model.get("base_model"),
        "dtype": str(model.model.diffusion_model.dtype).removeprefix("torch."),
        "num_stages": model.num_stages,
    }


def _with_record(images: Sequence[Image.Image], request: Request, record: Mapping[str, Any]) -> Image.Image:
    """Return the image or the grid of finished batches, with the record that repeats it."""
    result = images[0] if len(images) == 1 else make_grid(images, request.n_rows or None)
    result.info[PNG_KEY] = json.dumps({**record, "n_iter": len(images) // request.n_samples})
    return result


def open_content(content: Content) -> Image.Image:
    """Return the content image as RGB: the same from a file and from an image that Pillow has opened.

    Raises:
        ValueError: it is no usable image.
    """
    if isinstance(content, (str, Path)):
        return open_image(content)
    try:
        opened = content if isinstance(content, Image.Image) else Image.open(content)
        return to_rgb(ImageOps.exif_transpose(opened), WHITE)
    except Exception as error:  # as `open_image`
        reason = "Pillow does not know it" if isinstance(error, UnidentifiedImageError) else str(error)
        raise ImageError(f"The content image cannot be read ({reason}); give a PNG or JPEG.") from error


def content_hash(content: Image.Image) -> str:
    """Return the first digits of the SHA-256 of an image's pixels, as RGB."""
    return hashlib.sha256(content.tobytes()).hexdigest()[:10]


def content_source(content: Content) -> str:
    """Return where the content image came from, for the record; '' where it was not a file with a name."""
    is_path = isinstance(content, (str, Path))
    source = content if is_path else getattr(content, "filename", None) or getattr(content, "name", None)
    return os.fsdecode(source) if isinstance(source, (str, bytes, os.PathLike)) else ""
