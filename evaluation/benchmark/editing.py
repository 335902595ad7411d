"""Inversion and editing against StyleDiffusion's own order of work, on the same modules: same numbers, less work.

The reference makes E(x) and M(E(x)) inside every cross-attention, keeps gradients of all weights, makes every attention
map, predicts the unconditional branch again behind each step, and the two branches in two calls.

    python -m evaluation.benchmark.editing        # the rows of docs/benchmarks.md, about two minutes on one core
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from evaluation.benchmark.measure import Contender, measure, table
from evaluation.benchmark.models import build_model
from ldm.conditioning.context import Context
from ldm.editing.control import MapStore
from ldm.editing.edit import Branches, Plan, denoise_pair, plan_edit
from ldm.editing.inversion import Step, Sweep, move, predict, record, step_of
from ldm.editing.request import Edit, InversionOptions
from ldm.methods.stylediffusion import FEATURE_TOKENS, LearnedValues, StyleDiffusion, inner_iterations
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.attention import AttentionHook, BasicTransformerBlock

PROMPT, TARGET, STEPS, SCALE = "a dotted red star", "a dotted blue star", 6, 2.5
INNER = 4


def everywhere(inner: AttentionHook | None = None) -> AttentionHook:
    """Return a hook that is called in every attention, as the reference's controllers are."""
    return lambda probabilities, site: probabilities if inner is None else inner(probabilities, site)


@contextlib.contextmanager
def values_made_in_each_layer(
    model: LatentDiffusion, tower: nn.Module, tokens: Tensor, learner: StyleDiffusion, step: int, rows: slice
) -> Iterator[None]:
    """Make E(x) and M_i of it inside each cross-attention, for the values of these rows."""

    def before(module: nn.Module, given: Any, named: Any) -> Any:
        x, k, v, *rest = given
        gamma, beta = learner.networks[step](tower(tokens))[0].chunk(2)
        changed = torch.cat([v[: rows.start], v[rows] * gamma + beta, v[rows.stop :]])
        return (x, k, changed, *rest), named

    blocks = [m for m in model.model.diffusion_model.modules() if isinstance(m, BasicTransformerBlock)]
    handles = [block.attn2.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Bench:
    """The small model with an image's path, and a learner whose features a small tower makes in place of CLIP's."""

    def __init__(self) -> None:
        self.model = build_model("demo", torch.device("cpu")).eval().requires_grad_(False)
        torch.manual_seed(0)
        width = self.model.cond_stage_model.width
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
        self.tower = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval().requires_grad_(False)
        self.tokens = torch.randn(1, FEATURE_TOKENS, width)  # that stand for the image
        with torch.no_grad():
            self.features = self.tower(self.tokens)
        z_0 = torch.randn(1, self.model.channels, 16, 16)
        self.prompts = {text: self.model.get_unconditional(text) for text in (PROMPT, TARGET, "")}
        self.way = record(self.model, z_0, self.prompts[PROMPT], STEPS, maps=True)

    def learner(self) -> StyleDiffusion:
        torch.manual_seed(1)
        return StyleDiffusion(STEPS, self.features, self.model.cond_stage_model.max_length)

    def sweep(self) -> Sweep:
        options = InversionOptions(STEPS, SCALE, INNER, epsilon=0.0)
        with torch.no_grad():
            cond, uncond = self.prompts[PROMPT].at(0), self.prompts[""].at(0)
        return Sweep(self.model, self.way, self.learner(), cond, uncond, options)

    def invert(self) -> Tensor:
        """Record the path again, and learn the first two steps."""
        record(self.model, self.way.path[0], self.prompts[PROMPT], STEPS, maps=True)
        sweep, z = self.sweep(), self.way.path[-1]
        for i in range(2):
            z = sweep.learn(step_of(self.model, self.way, i, z), True)
        return z

    def invert_as_reference(self) -> Tensor:
        path = self.way.path
        for j, t in enumerate(self.way.timesteps):  # all maps are made, those of 16² kept
            store = MapStore(range(99), keep=True)
            with torch.no_grad():
                predict(self.model, path[j], int(t), self.prompts[PROMPT].at(0), everywhere(store))
        sweep, z = self.sweep(), path[-1]
        self.model.model.requires_grad_(True)
        self.tower.requires_grad_(True)
        try:
            for i in range(2):
                z = self._learn(sweep, step_of(self.model, self.way, i, z))
        finally:
            for module in (self.model.model, self.tower):
                module.requires_grad_(False)
                module.zero_grad()
        return z

    def _learn(self, sweep: Sweep, step: Step) -> Tensor:
        learner = sweep.learner
        assert isinstance(learner, StyleDiffusion)
        adam = torch.optim.Adam(learner.begin(step.number, True), lr=0.01 * (1 - step.number / 100))

        def behind(hook: AttentionHook | None) -> Tensor:
            with values_made_in_each_layer(self.model, self.tower, self.tokens, learner, step.number, slice(0, 1)):
                return predict(self.model, step.z, step.t, sweep.cond, hook)

        with torch.no_grad():
            fixed = predict(self.model, step.z, step.t, sweep.uncond, everywhere())
        for _ in range(inner_iterations(step.number, INNER)):
            store = MapStore(sweep.layers)
            eps = fixed + SCALE * (behind(everywhere(store)) - fixed)
            loss = (move(step.z, eps, step.level, step.below) - step.target).square().mean()
            for own, other in zip(store.at(), step.maps, strict=True):
                loss = loss + (own - other).square().mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
            loss.item()
        with torch.no_grad():
            again = predict(self.model, step.z, step.t, sweep.uncond, everywhere())
            eps = again + SCALE * (behind(everywhere()) - again)
            return move(step.z, eps, step.level, step.below)

    def _plan(self) -> tuple[Plan, list[int]]:
        timesteps = self.way.timesteps[::-1].tolist()
        edit = Edit(TARGET, blend=(("star",), ("star",)), tau_v=1)
        return plan_edit(self.model, PROMPT, edit, timesteps, self.way.path[-1]), timesteps

    def edit(self) -> Tensor:
        learner, (plan, timesteps) = self.learner(), self._plan()
        with torch.no_grad():
            values = torch.stack([learner.values(i) for i in range(STEPS)])
        change = LearnedValues(values, tuple(timesteps))
        branches = Branches(*(self.prompts[text] for text in (PROMPT, TARGET, ""))).changed(change, range(STEPS))
        return denoise_pair(self.model, self.way.path[-1], branches, plan, timesteps, SCALE, progress=False)

    @torch.no_grad()
    def edit_as_reference(self) -> Tensor:
        """Edit with both branches in a call of their own, and everything made in each layer."""
        plan, timesteps = self._plan()
        assert plan.blend is not None and plan.control.store is not None
        learner, x = self.learner(), self.way.path[-1].repeat(2, 1, 1, 1)
        cond = Context.cat(*(self.prompts[text].at(0) for text in (PROMPT, TARGET)))
        uncond = Context.cat(*[self.prompts[""].at(0)] * 2)
        for i, t in enumerate(timesteps):
            eps_uncond = predict(self.model, x, t, uncond, everywhere())
            with values_made_in_each_layer(self.model, self.tower, self.tokens, learner, i, slice(0, 2)):
                eps_cond = predict(self.model, x, t, cond, everywhere(plan.control))
            step = step_of(self.model, self.way, i, x)
            x = move(x, eps_uncond + SCALE * (eps_cond - eps_uncond), step.level, step.below)
            x = plan.blend(x, plan.control.store.at(), i)
            plan.control.store.maps.clear()
        return x


def inversion_step(model: LatentDiffusion, resolution: int, steps: int = 4) -> Contender:
    """Return what learns the values of one inner iteration, behind a recorded path of an image (R, R) of noise."""
    model.eval().requires_grad_(False)
    side, encoder = resolution // model.first_stage_model.downsampling, model.cond_stage_model
    z_0 = torch.randn(1, model.channels, side, side, device=model.device)
    features = torch.randn(1, FEATURE_TOKENS, encoder.width, device=model.device)
    with torch.no_grad():
        prompts = model.get_unconditional(PROMPT), model.get_unconditional()
        way = record(model, z_0, prompts[0], steps, maps=True)
        cond, uncond = (prompt.at(0) for prompt in prompts)
    learner = StyleDiffusion(steps, features, encoder.max_length).to(model.device)
    sweep = Sweep(model, way, learner, cond, uncond, InversionOptions(steps=steps))
    step = step_of(model, way, 0, way.path[-1])
    adam, fixed = torch.optim.Adam(learner.begin(0, True)), sweep.fixed(step)

    def run() -> None:
        loss = sweep.loss(step, fixed).total
        adam.zero_grad()
        loss.backward()
        adam.step()

    return Contender("stylediffusion", run)


def tables(repeats: int = 5) -> str:
    """Return both comparisons as tables."""
    bench, texts = Bench(), []
    for name, ours, reference in (
        ("inversion", bench.invert, bench.invert_as_reference),
        ("edit", bench.edit, bench.edit_as_reference),
    ):
        ways = {f"{name}, the reference's order": reference, f"{name}, ours": ours}
        contenders = [Contender(way, run, run) for way, run in ways.items()]
        texts.append(table(measure(contenders, torch.device("cpu"), repeats, "cpu")))
    return "\n\n".join(texts)


if __name__ == "__main__":
    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    print(tables())  # noqa: T201
