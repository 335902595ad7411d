"""Edit an image by exchanging attention: one that was inverted, or one that is generated (Prompt-to-Prompt, P2Plus).

Two rows are denoised side by side, the source and its edit. Shapes: C H W latents, N steps, L tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ldm.conditioning.context import Conditioning
from ldm.conditioning.encoding import encode_together
from ldm.conditioning.prompts import PLACEHOLDER, PromptReader, Words, check_prompt, check_words
from ldm.conditioning.rows import Modulated, Rows
from ldm.conditioning.stages import stage_of
from ldm.editing import alignment
from ldm.editing.alignment import PromptTokens, Span, check_words_in
from ldm.editing.blend import LocalBlend
from ldm.editing.control import AttentionControl, MapStore, Rules, refine, replace, reweight
from ldm.editing.inversion import inversion_timesteps, layers_of, levels
from ldm.files.images import to_pil
from ldm.generate import facts_of
from ldm.methods.base import StepChange
from ldm.models.diffusion.ddim import ddim
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.finite import FirstBad, refuse_bad_latents
from ldm.models.diffusion.sampling import draw_noise, guided, seeded_generators
from ldm.request import shown

Pair = tuple[tuple[str, ...], tuple[str, ...]]  # words of the source prompt, words of the target
KINDS = ("replace", "refine")
TAUS = ("tau_v", "tau_c", "tau_s", "tau_u")
AREA = 4  # self-attention is exchanged up to a quarter of the latents' positions: 32² of 64²


@dataclass(frozen=True)
class Edit:
    """What is changed in an image.

    A tau is the share of steps, from the first one on, that something lasts, in 0..1; or the two ends of a part.

    Args:
        target: prompt of the edited image; `*` in it is replaced by `prospect_words`, or is a learned token
        kind: replace (words are exchanged one for one) or refine (words are added)
        tau_v: how long the edit reads the learned values
        tau_c: how long the edit has the source's attention to words
        tau_s: how long the edit has the source's self-attention
        tau_u: the same of the unconditional branch; more lets the structure change more
        word_taus: tau_c of single target words
        blend: words of both prompts; the image changes only where they are
        subtract: words of both prompts; where they are nothing changes
        weights: factors of target words' attention while tau_c lasts, also negative ones
        threshold: of a map's largest value, for blend
        prospect_words: one entry for each stage, as for generating
        compat: do as the reference's code where it misaligns words of different token numbers
    """

    target: str
    kind: str = "replace"
    tau_v: Span = 0.5
    tau_c: Span = 0.6
    tau_s: Span = 0.6
    tau_u: Span = 0.0
    word_taus: Mapping[str, Span] | None = None
    blend: Pair | None = None
    subtract: Pair | None = None
    weights: Mapping[str, float] | None = None
    threshold: float = 0.3
    prospect_words: Words | None = None
    compat: bool = False

    def __post_init__(self) -> None:
        check_prompt(self.target, "The target")
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {shown(self.kind)}.")
        for name in TAUS:
            self._set(name, read_span(name, getattr(self, name)))
        self._set("word_taus", {w: read_span(f"tau_c of '{w}'", s) for w, s in (self.word_taus or {}).items()})
        for name in ("blend", "subtract"):
            self._set(name, _pair(name, getattr(self, name)))
        self._set("weights", dict(self.weights or {}))
        for word, weight in (self.weights or {}).items():
            if not isinstance(weight, Real) or not np.isfinite(float(weight)):
                raise ValueError(f"The weight of '{word}' must be a number, not {shown(weight)}.")

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def texts(self, num_stages: int) -> list[str]:
        """Return the target in each stage; one text where all are alike."""
        if self.prospect_words is None:
            return [self.target]
        entries = check_words(self.prospect_words, num_stages)
        return [self.target.replace(PLACEHOLDER, e) if isinstance(e, str) else self.target for e in entries]

    def check(self, source: str, num_stages: int = 10) -> None:
        """Raise `ValueError` unless all words are those of the prompts, and as many of them as `kind` needs."""
        texts = self.texts(num_stages)
        for name, pair in (("blend", self.blend), ("subtract", self.subtract)):
            if pair is not None:
                check_words_in(pair[0], [source], f"{name}, of the source")
                check_words_in(pair[1], texts, f"{name}, of the target")
        check_words_in(self.weights or {}, texts, "weight")
        check_words_in(self.word_taus or {}, texts, "tau_c")
        for text in texts if self.kind == "replace" else ():
            if len(source.split(" ")) != len(text.split(" ")):
                raise ValueError(
                    f"kind replace needs as many words in both prompts, but '{source}' has {len(source.split(' '))} "
                    f"and '{text}' has {len(text.split(' '))}; use kind refine."
                )


def read_span(name: str, value: object) -> Span:
    """Return a tau: a number in 0..1, or the start and the end of a part of the steps.

    Raises:
        ValueError: something else.
    """
    ends: list[Any] = list(value) if isinstance(value, (tuple, list)) else [0, value]
    ends = [0, *ends] if len(ends) == 1 else ends
    if len(ends) != 2 or not all(isinstance(end, Real) and not isinstance(end, bool) for end in ends):
        raise ValueError(f"{name} must be a number in 0..1, or a pair of them, not {shown(value)}.")
    start, end = map(float, ends)
    if not 0 <= start <= end <= 1:
        raise ValueError(f"{name} must be in 0..1, the start before the end, not {', '.join(map(str, ends))}.")
    return (start, end) if start else end


def _pair(name: str, value: object) -> Pair | None:
    if value is None:
        return None
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"{name} must be words of the source and words of the target, not {shown(value)}.")
    source, target = ((words,) if isinstance(words, str) else tuple(words) for words in value)
    return source, target


def grid_of(target: str, **given: Any) -> list[Edit]:
    """Return an edit for every combination of the taus, of which each may be a list of several."""
    taus = [[(name, tau) for tau in _several(given.pop(name))] for name in TAUS if name in given]
    return [Edit(target, **given, **dict(combination)) for combination in product(*taus)]


def _several(tau: object) -> list[Any]:
    return list(tau) if isinstance(tau, list) else [tau]


# --- what an edit does to attention ----------------------------------------------------------------------------


class Prompts(NamedTuple):
    """Reads both prompts of an edit as tokens.

    Args:
        reader: with everything that is loaded.
        source, words: the source's prompt and its prospect_words.
    """

    reader: PromptReader
    source: str
    words: Words | None
    edit: Edit

    def tokens(self, stage: int) -> tuple[PromptTokens, PromptTokens]:
        """Return the tokens of source and target in a stage."""
        target = self._read(self.edit.target, self.edit.prospect_words, stage)
        return self._read(self.source, self.words, stage), target

    def _read(self, text: str, words: Words | None, stage: int) -> PromptTokens:
        reader, tokenizer = self.reader, self.reader.tokenizer
        found = reader.words_in(text, words, stage)
        marks = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        tokens = PromptTokens.of(found, marks, reader.max_length)
        if not self.edit.compat or any(i < 0 for i in tokens.ids):
            return tokens
        return PromptTokens.by_length(
            " ".join(word for word, _ in found),
            tokens.ids,
            lambda i: str(tokenizer.decode([i])).strip(),
            reader.max_length,
        )


def rules_for(edit: Edit, source: PromptTokens, target: PromptTokens, steps: int, positions: int) -> Rules:
    """Return what an edit of two prompts does to attention, for latents of `positions` (H · W)."""
    if edit.kind == "refine":
        cross = refine(*alignment.refinement_mapper(source, target))
    else:
        cross = replace(alignment.replacement_mapper(source, target, edit.compat))
    if edit.weights:
        cross = reweight(cross, alignment.equalizer(target, edit.weights))
    return Rules(
        cross,
        alignment.cross_schedule(target, steps, edit.tau_c, edit.word_taus),
        alignment.self_steps(steps, edit.tau_s),
        alignment.self_steps(steps, edit.tau_u),
        positions // AREA,
    )


class Plan(NamedTuple):
    """What an edit does, step by step."""

    control: AttentionControl
    blend: LocalBlend | None


def plan_edit(model: LatentDiffusion, prompts: Prompts, timesteps: Sequence[int], z: Tensor) -> Plan:
    """Return what an edit does at timesteps (N,), decreasing, for latents like z (…, H, W).

    Raises:
        ValueError: words that are in no prompt, or cannot be exchanged.
    """
    edit, steps = prompts.edit, len(timesteps)
    edit.check(prompts.source, model.num_stages)
    stages = [stage_of(int(t), model.num_stages, model.num_timesteps) for t in timesteps]
    tokens = {stage: prompts.tokens(stage) for stage in set(stages)}
    rules = {s: rules_for(edit, *pair, steps, z.shape[-2] * z.shape[-1]) for s, pair in tokens.items()}
    blend = store = None
    if edit.blend is not None:
        places = {name: _places(pair, tokens) for name, pair in (("b", edit.blend), ("s", edit.subtract)) if pair}
        chosen = {name: [of_stage[stage] for stage in stages] for name, of_stage in places.items()}
        blend = LocalBlend(chosen["b"], chosen.get("s"), int(0.2 * steps), edit.threshold, edit.threshold)
        store = MapStore(layers_of(model, z), rows=2)
    return Plan(AttentionControl([rules[stage] for stage in stages], timesteps, store), blend)


def _places(words: Pair, tokens: Mapping[int, tuple[PromptTokens, PromptTokens]]) -> dict[int, Tensor]:
    """Return where the words' tokens stand in each stage, (2, L)."""
    return {
        stage: torch.stack([prompt.mask(own) for prompt, own in zip(pair, words, strict=True)])
        for stage, pair in tokens.items()
    }


# --- denoising -------------------------------------------------------------------------------------------------


class Told(NamedTuple):
    """What the rows are told: source and edit, and what guidance leads both away from."""

    source: Conditioning
    target: Conditioning
    uncond: Conditioning

    def changed(self, change: StepChange | None, value_steps: range = range(0)) -> Told:
        """Return the same with what was learned of an image.

        Args:
            value_steps: in which the edit reads learned values, too.
        """
        if change is None:
            return self
        if change.branch == "unconditional":
            return self._replace(uncond=Modulated(self.uncond, change))
        source, target = Modulated(self.source, change), self.target
        if change.branch == "values":
            target = Modulated(target, change, change.timesteps[value_steps.start : value_steps.stop])
        return Told(source, target, self.uncond)


@torch.no_grad()
def denoise_pair(
    model: LatentDiffusion,
    x_T: Tensor,
    told: Told,
    plan: Plan,
    timesteps: Sequence[int],
    guidance_scale: float,
    progress: bool = True,
    report: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Return the latents (2, C, H, W) of source and edit, from one start x_T (1, C, H, W).

    Args:
        timesteps: decreasing.
        report: called after each step with its number and the latents.
    """
    encode_together(told.source, told.target, told.uncond)
    cond, uncond = Rows([told.source, told.target]), Rows([told.uncond, told.uncond])
    denoise = guided(model, cond, uncond, guidance_scale, plan.control)
    watch, store = FirstBad(), plan.control.store
    increasing = np.asarray(timesteps)[::-1]
    alphas, below = levels(increasing, model.host_alphas_cumprod)
    with tqdm(total=len(timesteps), desc="editing", disable=not progress, leave=False) as bar:

        def after(step: int, t: int, x: Tensor, x_0: Tensor) -> Tensor:
            bar.update()
            watch.add(t, x)
            if plan.blend is not None and store is not None:
                x = plan.blend(x, store.at(), step)
                store.maps.clear()
            if report is not None:
                report(step, x)
            return x

        x = ddim(denoise, x_T.repeat(2, 1, 1, 1), increasing, alphas, below, np.zeros(len(alphas)), callback=after)
    refuse_bad_latents(watch, model.num_stages, model.num_timesteps)
    return x


class Edited(NamedTuple):
    """The image of the edit beside that of the source, and their latents (2, C, H, W)."""

    image: Image.Image
    source: Image.Image
    latents: Tensor


def decoded(model: LatentDiffusion, latents: Tensor) -> Edited:
    source, image = map(to_pil, model.decode_first_stage(latents))
    return Edited(image, source, latents)


def reader_of(model: LatentDiffusion) -> PromptReader:
    """Return the reader of a model's prompts, with what is loaded now."""
    manager, encoder = model.embedding_manager, model.cond_stage_model
    rows = {} if manager is None else manager.rows()
    return PromptReader(encoder.tokenizer, rows, model.num_stages, encoder.max_length)


def edit_generated(
    model: LatentDiffusion,
    prompt: str,
    edit: Edit,
    seed: int = 42,
    steps: int = 50,
    guidance_scale: float | None = None,
    words: Words | None = None,
    progress: bool = True,
) -> Edited:
    """Generate an image, and its edit beside it.

    Args:
        prompt, words: the source's, as for `ldm.generate.main`.
        guidance_scale: None: the model's own.

    Raises:
        ValueError: the edit does not fit the prompt.
    """
    facts = facts_of(model)
    shape = (1, model.channels, facts.height // facts.factor, facts.width // facts.factor)
    x_T = draw_noise(seeded_generators([seed]), shape, model.device)
    timesteps = inversion_timesteps(steps, model.num_timesteps)[::-1].tolist()
    plan = plan_edit(model, Prompts(reader_of(model), prompt, words, edit), timesteps, x_T)
    told = Told(
        model.get_learned_conditioning([prompt], words),
        model.get_learned_conditioning([edit.target], edit.prospect_words),
        model.get_unconditional(),
    )
    scale = facts.scale if guidance_scale is None else guidance_scale
    return decoded(model, denoise_pair(model, x_T, told, plan, timesteps, scale, progress))
