"""Invert an image into a concept that it can be edited with; what is finished of it is kept on the way.

Shapes: C H W latents, N denoising steps, T tokens of features, L tokens and D width of the text transformer.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image, ImageOps
from torch import Tensor

from ldm.checkpoint import save_state_dict
from ldm.conditioning.context import Context
from ldm.conditioning.encoding import encode_together
from ldm.editing.alignment import value_steps
from ldm.editing.edit import Branches, Edited, denoise_pair, plan_edit, read_tokens
from ldm.editing.image import clip_features, image_latents, patch_features, psnr
from ldm.editing.inversion import Progress, Sweep, Trajectory, follow, inversion_timesteps, learn_path, record
from ldm.editing.masks import average_maps, mask_of
from ldm.editing.request import Edit, InversionOptions
from ldm.embeddings import Concept
from ldm.files.base_model import refuse_other_base
from ldm.files.embedding_formats import read_modules
from ldm.files.images import fit, to_pil, to_tensor
from ldm.files.tensors import naming, read_file
from ldm.generate import Content, content_hash, facts_of, open_content
from ldm.methods import find_method
from ldm.methods.base import FIRST, START, TIMESTEPS, Learner, StepChange
from ldm.methods.null_text import NullText, TextInversion
from ldm.methods.stylediffusion import StyleDiffusion, networks_from
from ldm.models.diffusion.latent_diffusion import DiffusionModel
from ldm.models.diffusion.sampling import seeded_generators
from ldm.request import Request, shown
from ldm.util import usual_torch

logger = logging.getLogger(__name__)

METHODS = {"stylediffusion": "stylediffusion", "null-text": "null-text", "text": "text-inversion"}
PROMPT, IMAGE, SCALE, SIZE = (f"inversion.{key}" for key in ("prompt", "image_hash", "guidance_scale", "size"))
METHOD, MODE, SEED = (f"inversion.{key}" for key in ("method", "value_mode", "seed"))
FEATURES, OPTIONS, PSNR, AUTOENCODER = (
    f"inversion.{key}" for key in ("features", "options", "psnr", "autoencoder_psnr")
)
_SAID = ((PROMPT, ".+"), (SCALE, r"\d{1,4}(\.\d{1,20})?"), (SIZE, r"[1-9]\d{0,4}x[1-9]\d{0,4}"))  # what an edit needs
POOR = 3.0  # dB below the autoencoder's own reconstruction


class Subject:
    """An image that is inverted, with its prompt.

    Args:
        content: the image: a path, or one that Pillow has opened.
        height, width: in pixels; None: the model's own. The image is cropped to them, then scaled.

    Raises:
        ValueError: the image or the size cannot be used.
    """

    def __init__(
        self, model: DiffusionModel, content: Content, prompt: str, height: int | None = None, width: int | None = None
    ) -> None:
        asked = Request(prompt=prompt, height=height, width=width, ddim_steps=1)
        self.model, self.prompt, self.size = model, prompt, asked.for_model(facts_of(model)).size
        whole = open_content(content)
        self.hash = content_hash(whole)
        self.image: Image.Image = fit(whole, self.size[1], self.size[0], "crop")
        self.z_0 = image_latents(model, self.image)
        # plain text, whatever is loaded
        self.cond, self.uncond = model.get_unconditional(prompt), model.get_unconditional()

    def contexts(self) -> tuple[Context, Context]:
        """Return those of the prompt and of ""."""
        with torch.no_grad():
            encode_together(self.cond, self.uncond)
            return self.cond.at(0), self.uncond.at(0)


def features_of(image: Image.Image, width: int, clip: str | Path | Tensor | None) -> tuple[Tensor, str]:
    """Return E(x) (1, T, D) of an image, and what made it.

    Args:
        clip: folder of transformers' ViT-B/16, or the features; None: the patches of the image, which need no weights.

    Raises:
        ValueError: features of another width than the text transformer's.
    """
    if isinstance(clip, Tensor):
        found, name = clip, "given"
    elif clip is not None:
        found, name = clip_features(image, clip), "CLIP ViT-B/16"
    else:
        found, name = patch_features(image, width), "patches"
    if found.ndim != 3 or found.shape[0] != 1 or found.shape[2] != width:
        raise ValueError(f"Features must be (1, T, {width}) for this model's text transformer, not {(*found.shape,)}.")
    return found, name


def make_learner(
    subject: Subject,
    method: str,
    options: InversionOptions,
    clip: str | Path | Tensor | None = None,
    value_mode: str = "affine",
    seed: int = 0,
) -> tuple[Learner, dict[str, str]]:
    """Return what is learned of an image, at its start, and what its concept says of it.

    Args:
        method: stylediffusion, null-text or text.
        clip, value_mode, seed: of StyleDiffusion: see `features_of` and `StyleDiffusion`; the seed draws M_0.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, not '{method}'.")
    if method == "null-text" and options.guidance_scale == 1:
        raise ValueError("null-text learns what guidance leads away from; give a guidance_scale other than 1.")
    model, described = subject.model, {}
    if method == "stylediffusion":
        encoder = model.cond_stage_model
        features, name = features_of(subject.image, encoder.width, clip)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeded_generators([seed])[0].initial_seed())
            learner: Learner = StyleDiffusion(options.steps, features, encoder.max_length, value_mode)
        described = {FEATURES: name, MODE: value_mode, SEED: str(seed)}
    else:
        cond, uncond = subject.contexts()
        is_null = method == "null-text"
        learner = (NullText if is_null else TextInversion)(options.steps, (uncond if is_null else cond).k)
    return learner.to(model.device), describe(subject, learner, options) | described


@usual_torch()
def invert_image(
    model: DiffusionModel,
    content: Content,
    prompt: str,
    method: str = "stylediffusion",
    options: InversionOptions | None = None,
    unfinished: str | Path | None = None,
    size: tuple[int | None, int | None] = (None, None),
    progress: bool | Callable[[Progress], object] = True,
    **start: Any,
) -> Concept:
    """Learn what reconstructs an image under guidance, as a concept.

    Args:
        method: stylediffusion, null-text or text.
        unfinished: file that keeps finished steps; one that is there is resumed. It is removed at the end.
        size: (height, width) in pixels.
        progress: show a bar; a function in its place is called after each step.
        start: `clip`, `value_mode` and `seed` of `make_learner`.

    Raises:
        ValueError: an argument that cannot be used, or a model in half precision.
    """
    options = options or InversionOptions()
    if model.model.diffusion_model.dtype != torch.float32:
        raise ValueError("An inversion does not converge in half precision; load the model with dtype float32.")
    subject = Subject(model, content, prompt, *size)
    learner, described = make_learner(subject, method, options, **start)
    resumed = None if unfinished is None else read_unfinished(Path(unfinished), learner, described, model.device)
    maps = learner.reads_maps and options.attention_loss
    way = record(model, subject.z_0, subject.cond, options.steps, maps, options.half_maps)
    sweep = Sweep(model, way, learner, *subject.contexts(), options)

    def keep(state: Progress) -> None:
        if callable(progress):
            progress(state)
        if unfinished is not None:
            Path(unfinished).parent.mkdir(parents=True, exist_ok=True)
            place = {"progress.epoch": str(state.epoch), "progress.step": str(state.step)}
            save_state_dict(learner.state_dict() | {"z": state.z}, unfinished, described | place)

    z = learn_path(sweep, resumed, finished=keep, progress=progress is True)
    concept = to_concept(subject, learner, way, described, z)
    if unfinished is not None:
        Path(unfinished).unlink(missing_ok=True)
    return concept


def describe(subject: Subject, learner: Learner, options: InversionOptions) -> dict[str, str]:
    """Return what tells an inversion from others, for its concept."""
    timesteps = inversion_timesteps(options.steps, subject.model.num_timesteps)[::-1]
    return {
        **subject.model.base_model,
        METHOD: learner.kind.method,
        PROMPT: subject.prompt,
        IMAGE: subject.hash,
        SIZE: f"{subject.size[1]}x{subject.size[0]}",
        SCALE: repr(float(options.guidance_scale)),
        TIMESTEPS: ",".join(map(str, timesteps.tolist())),
        OPTIONS: json.dumps(asdict(options)),
    }


def read_unfinished(path: Path, learner: Learner, described: dict[str, str], device: torch.device) -> Progress | None:
    """Take up what a file keeps of an inversion that was stopped; None where there is none.

    Raises:
        ValueError: it is of another image, prompt or setting.
    """
    if not path.exists():
        return None
    content: Any
    content, metadata, _ = read_file(path)
    other = [key for key, value in described.items() if metadata.get(key) != value]
    if other:
        names = ", ".join(key.removeprefix("inversion.") for key in other)
        raise ValueError(f"'{path}' keeps an unfinished inversion with another {names}; delete it to start anew.")
    try:
        tensors = {name: tensor.to(device) for name, tensor in content.items()}
        z = tensors.pop("z")
        learner.load_state_dict(tensors)
        return Progress(int(metadata["progress.epoch"]), int(metadata["progress.step"]), z)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"'{path}' keeps an unfinished inversion that is damaged; delete it to start anew.") from error


@torch.no_grad()
def to_concept(subject: Subject, learner: Learner, way: Trajectory, described: dict[str, str], z: Tensor) -> Concept:
    """Return what was learned as a concept, and log how well it reconstructs the image."""
    values = torch.stack([learner.values(i) for i in range(len(way.timesteps))])
    pixels, decode = to_tensor(subject.image)[None].to(z.device), subject.model.decode_first_stage
    rebuilt, own = psnr(decode(z), pixels), psnr(decode(subject.z_0), pixels)
    if rebuilt < own - POOR:
        logger.warning(
            "The reconstruction has %.1f dB, %.1f less than the autoencoder's own (%.1f); more inner_steps or steps, "
            "or a prompt that says more of what is seen, help.",
            *(rebuilt, own - rebuilt, own),
        )
    described = described | {PSNR: f"{rebuilt:.2f}", AUTOENCODER: f"{own:.2f}"}
    tensors = {learner.kind.tensor: values.cpu(), START: way.path[-1].cpu(), FIRST: subject.z_0.cpu()}
    return Concept(tensors, described, learner.kind.method)


def original(concept: Concept, content: Content) -> Image.Image:
    """Return the image of a concept, as it was inverted."""
    width, height = map(int, concept.metadata[SIZE].split("x"))
    return fit(open_content(content), width, height, "crop")


def rebuilt(model: DiffusionModel, concept: Concept) -> Image.Image:
    """Return the image of a concept as the autoencoder reconstructs it."""
    return to_pil(model.decode_first_stage(concept.tensors[FIRST].to(model.device))[0])


@usual_torch()
def word_masks(
    model: DiffusionModel, concept: Concept, words: Sequence[str], steps: int = 50
) -> dict[str, tuple[Image.Image, Image.Image]]:
    """Return where words of a concept's prompt are in its image: word -> foreground, background.

    Raises:
        ValueError: a word is not in the prompt, or its mask is empty.
    """
    prompt = concept.metadata[PROMPT]
    z_0 = concept.tensors[FIRST].to(model.device)
    average = average_maps(model, z_0, model.get_unconditional(prompt), steps)
    tokens = read_tokens(model.prompt_reader(), prompt)
    masks = {word: mask_of(average, tokens, word) for word in words}
    return {word: (mask, ImageOps.invert(mask)) for word, mask in masks.items()}


# --- with a concept --------------------------------------------------------------------------------------------


def change_of(concept: Concept) -> StepChange:
    """Return the change of the context that an inversion's concept is.

    Raises:
        ValueError: it is a concept of another kind, or does not say what editing needs.
    """
    if concept.method not in METHODS.values():
        raise ValueError(f"A concept of {concept.method} edits no image; make one: scripts/invert.py IMAGE --prompt …")
    for key, pattern in _SAID:
        if not re.fullmatch(pattern, concept.metadata.get(key, ""), re.DOTALL):
            raise ValueError(f"The concept does not say its {key.partition('.')[2]}; invert the image anew.")
    return cast(StepChange, find_method(concept.method).load(concept.tensors, concept.metadata))


@usual_torch()
def import_networks(
    model: DiffusionModel, content: Content, prompt: str, path: str | Path, clip: str | Path | Tensor, **options: Any
) -> Concept:
    """Make a concept of an image from the networks that StyleDiffusion's own code has learned of it.

    Args:
        path: its .pth file, which says neither image nor prompt nor steps.
        clip: folder of CLIP ViT-B/16, or the features, as for the file.
        options: of `InversionOptions`, apart from the steps.
    """
    states = read_modules(Path(path))
    with naming(Path(path)):
        networks = networks_from(states)
    given = InversionOptions(steps=len(networks), **options)
    subject = Subject(model, content, prompt)
    features, name = features_of(subject.image, model.cond_stage_model.width, clip)
    first, expected = networks[0].conv_start, (features.shape[1], 2 * model.cond_stage_model.max_length)
    if (first.in_channels, first.out_channels) != expected:
        raise ValueError(f"'{path}' is for another model: it has networks of {first}, not of {expected}.")
    learner = StyleDiffusion(len(networks), features, model.cond_stage_model.max_length)
    learner.networks = torch.nn.ModuleList(networks)
    learner.to(model.device)
    described = describe(subject, learner, given) | {FEATURES: name, MODE: "affine"}
    way = record(model, subject.z_0, subject.cond, given.steps)
    return to_concept(subject, learner, way, described, follow(Sweep(model, way, learner, *subject.contexts(), given)))


def check_belongs(
    concept: Concept,
    model: DiffusionModel,
    content: Content | None = None,
    prompt: str | None = None,
    steps: int | None = None,
    any_base: bool = False,
) -> None:
    """Raise `ValueError` where a concept is no inversion, for another model, or of another image, prompt or steps."""
    change, z, encoder, facts = change_of(concept), concept.tensors[START], model.cond_stage_model, facts_of(model)
    if not any_base:
        refuse_other_base(concept.metadata, model.base_model, "The concept")
    tokens, width = change.values.shape[1] // (2 if change.branch == "values" else 1), change.values.shape[2]
    fits = (tokens, width, z.shape[:2]) == (encoder.max_length, encoder.width, (1, model.channels))
    unit, z_0 = facts.size_unit // facts.factor, concept.tensors[FIRST]
    fits = fits and z.shape == z_0.shape and not any(side % unit for side in z.shape[2:])
    if not fits or change.timesteps[0] >= model.num_timesteps:
        found = f"{tokens} tokens of width {width}, latents {(*z.shape,)} and timesteps up to {change.timesteps[0]}"
        wanted = f"{encoder.max_length} of {encoder.width}, {model.channels} channels, {model.num_timesteps} timesteps"
        raise ValueError(f"The concept has {found}, which this model ({wanted}) cannot read; invert the image anew.")
    if other := changes(concept.metadata, content, prompt, {"steps": steps}):
        remedy = "omit it, or invert the image anew: scripts/invert.py IMAGE --prompt …"
        raise ValueError(f"The concept was inverted with another {other}; {remedy}")


def refuse_changed(file: Path, content: Content, prompt: str, given: Mapping[str, object]) -> None:
    """Raise `ValueError` where a concept's file differs from an inversion that is asked for; see `changes`."""
    if other := changes(read_file(file, wanted=lambda _: False).metadata, content, prompt, given):
        raise ValueError(f"'{file}' was inverted with another {other}; use another --outdir, or delete it.")


def changes(said: Mapping[str, str], content: Content | None, prompt: str | None, given: Mapping[str, object]) -> str:
    """Return how an inversion differs from one that is asked for: what it has, and what it should have.

    Args:
        said: metadata of the concept.
        given: flags of `scripts/invert.py` by their names. None, and flags that are not here, may be anything.
    """
    try:
        was = dict(json.loads(said[OPTIONS]))
    except (KeyError, TypeError, ValueError, RecursionError):
        was = {}
    was |= {"prompt": said.get(PROMPT), "image": said.get(IMAGE), "method": said.get(METHOD)}
    was |= {"value_mode": said.get(MODE), "start_seed": said.get(SEED)}
    now: dict[str, object] = {name: given.get(name) for name in asdict(InversionOptions())} | {"prompt": prompt}
    now["image"] = None if content is None else content_hash(open_content(content))
    if "method" in given:
        now["method"] = METHODS[str(given["method"])]
    if given.get("method") == "stylediffusion":
        now |= {"value_mode": given["value_mode"], "start_seed": str(given["start_seed"])}
    other = [name for name, value in now.items() if value is not None and was.get(name) != value]
    return ", ".join(f"{name} ({shown(was.get(name))}, not {shown(now[name])})" for name in other)


@usual_torch()
def edit_image(
    model: DiffusionModel,
    concept: Concept,
    edit: Edit,
    learned: bool = True,
    progress: bool = True,
    report: Callable[[int, Tensor], None] | None = None,
    any_base: bool = False,
) -> Edited:
    """Edit the image that a concept was made of.

    Args:
        learned: without it, Prompt-to-Prompt alone upon the path of the inversion.
        report: called after each step with its number and the latents.
        any_base: also a concept that was learned for another base model.

    Raises:
        ValueError: the concept is for another model, or the edit does not fit its prompt.
    """
    check_belongs(concept, model, any_base=any_base)
    change, prompt = change_of(concept).to(model.device), concept.metadata[PROMPT]
    x_T = concept.tensors[START].to(model.device)
    plan = plan_edit(model, prompt, edit, change.timesteps, x_T)
    branches = Branches(
        model.get_unconditional(prompt),
        model.get_learned_conditioning([edit.target], edit.prospect_words),
        model.get_unconditional(),
    )
    branches = branches.changed(change if learned else None, value_steps(len(change.timesteps), edit.tau_v))
    scale = float(concept.metadata[SCALE])
    return Edited.of(model, denoise_pair(model, x_T, branches, plan, change.timesteps, scale, progress, report))
