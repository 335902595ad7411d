"""Edit an image by exchanging attention: one that was inverted, or one that is generated (Prompt-to-Prompt, P2Plus).

Two rows are denoised side by side, the source and its edit. Shapes: C H W latents, N steps, L tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ldm.conditioning.context import Conditioning
from ldm.conditioning.encoding import Modulated, Rows, encode_together
from ldm.conditioning.prompts import PromptReader
from ldm.conditioning.stages import stage_of
from ldm.editing import alignment
from ldm.editing.alignment import PromptTokens
from ldm.editing.blend import LocalBlend
from ldm.editing.control import AttentionControl, MapStore, Rules, layers_of, refine, replace, reweight
from ldm.editing.inversion import inversion_timesteps, levels
from ldm.editing.request import Edit, Pair
from ldm.files.images import to_pil
from ldm.generate import facts_of
from ldm.methods.base import StepChange
from ldm.models.diffusion.ddim import ddim
from ldm.models.diffusion.finite import FirstBad, refuse_bad_latents
from ldm.models.diffusion.latent_diffusion import DiffusionModel
from ldm.models.diffusion.sampling import GuidanceScale, draw_noise, guided, seeded_generators
from ldm.request import Request, Words
from ldm.util import usual_torch

AREA = 4  # self-attention is exchanged up to a quarter of the latents' positions: 32² of 64²


# --- what an edit does to attention ----------------------------------------------------------------------------


def read_tokens(
    reader: PromptReader, text: str, words: Words | None = None, stage: int = 0, compat: bool = False
) -> PromptTokens:
    """Return a prompt's words and tokens in a stage."""
    tokenizer, found = reader.tokenizer, reader.words_in(text, words, stage)
    tokens = PromptTokens.of(found, (tokenizer.bos_token_id, tokenizer.eos_token_id), reader.max_length)
    if not compat or any(i < 0 for i in tokens.ids):
        return tokens
    plain = " ".join(word for word, _ in found)
    return PromptTokens.by_length(plain, tokens.ids, lambda i: str(tokenizer.decode([i])).strip(), reader.max_length)


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
    """The hook and the local blend of an edit."""

    control: AttentionControl
    blend: LocalBlend | None


def plan_edit(
    model: DiffusionModel, source: str, edit: Edit, timesteps: Sequence[int], z: Tensor, words: Words | None = None
) -> Plan:
    """Return what an edit does at timesteps (N,), decreasing, for latents like z (…, H, W).

    Args:
        source, words: the source's prompt and its prospect_words.

    Raises:
        ValueError: words that are in no prompt, or cannot be exchanged.
    """
    edit.check(source, model.num_stages)
    steps, positions, reader = len(timesteps), z.shape[-2] * z.shape[-1], model.prompt_reader()
    stages = [stage_of(int(t), model.num_stages, model.num_timesteps) for t in timesteps]
    prompts = (source, words), (edit.target, edit.prospect_words)
    tokens = {s: [read_tokens(reader, *prompt, s, edit.compat) for prompt in prompts] for s in set(stages)}
    rules = {s: rules_for(edit, pair[0], pair[1], steps, positions) for s, pair in tokens.items()}

    def places_of(words: Pair) -> list[Tensor]:  # where they stand, for each step (2, L)
        masks = {s: [prompt.mask(own) for prompt, own in zip(pair, words, strict=True)] for s, pair in tokens.items()}
        return [torch.stack(masks[stage]) for stage in stages]

    blend = store = None
    if edit.blend is not None:
        subtract = None if edit.subtract is None else places_of(edit.subtract)
        blend = LocalBlend(places_of(edit.blend), subtract, int(0.2 * steps), edit.threshold, edit.threshold)
        store = MapStore(layers_of(model, z), rows=2)
    return Plan(AttentionControl([rules[stage] for stage in stages], timesteps, store), blend)


# --- denoising -------------------------------------------------------------------------------------------------


class Branches(NamedTuple):
    """The prompts of source and edit, and the unconditional one that guidance leads both away from."""

    source: Conditioning
    target: Conditioning
    uncond: Conditioning

    def changed(self, change: StepChange | None, value_steps: range = range(0)) -> Branches:
        """Return the same with what was learned of an image; the edit reads learned values in `value_steps`."""
        if change is None:
            return self
        if change.branch == "unconditional":
            return self._replace(uncond=Modulated(self.uncond, change, change.timesteps))
        changed = self._replace(source=Modulated(self.source, change, change.timesteps))
        if change.branch == "source":
            return changed
        learned = change.timesteps[value_steps.start : value_steps.stop]
        return changed._replace(target=Modulated(self.target, change, learned))


@torch.no_grad()
def denoise_pair(
    model: DiffusionModel,
    x_T: Tensor,
    branches: Branches,
    plan: Plan,
    timesteps: Sequence[int],
    guidance_scale: GuidanceScale,
    progress: bool = True,
    report: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Return the latents (2, C, H, W) of source and edit, from one start x_T (1, C, H, W).

    Args:
        timesteps: decreasing.
        report: called after each step with its number and the latents.
    """
    encode_together(branches.source, branches.target, branches.uncond)
    cond, uncond = Rows(branches.source, branches.target), Rows(branches.uncond, branches.uncond)
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
    if not x.is_meta:
        refuse_bad_latents(watch, model.num_stages, model.num_timesteps)
    return x


class Edited(NamedTuple):
    """The image of the edit beside that of the source, and their latents (2, C, H, W)."""

    image: Image.Image
    source: Image.Image
    latents: Tensor

    @classmethod
    def of(cls, model: DiffusionModel, latents: Tensor) -> Edited:
        source, image = map(to_pil, model.decode_first_stage(latents))
        return cls(image, source, latents)


@usual_torch()
def edit_generated(
    model: DiffusionModel,
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
        ValueError: the edit does not fit the prompt, or a number is out of range.
    """
    facts = facts_of(model)
    asked = Request(prompt=prompt, prospect_words=words, ddim_steps=steps, scale=guidance_scale, seed=seed)
    asked = asked.for_model(facts)
    shape = (1, model.channels, *(side // facts.factor for side in asked.size))
    x_T = draw_noise(seeded_generators([asked.seed]), shape, model.device)
    timesteps = inversion_timesteps(asked.ddim_steps, model.num_timesteps)[::-1].tolist()
    plan = plan_edit(model, prompt, edit, timesteps, x_T, words)
    branches = Branches(
        model.get_learned_conditioning([prompt], words),
        model.get_learned_conditioning([edit.target], edit.prospect_words),
        model.get_unconditional(),
    )
    return Edited.of(model, denoise_pair(model, x_T, branches, plan, timesteps, asked.guidance_scale, progress))
