"""Attention control: what an edit does to the attention probabilities of its two rows (Prompt-to-Prompt, P2Plus).

The rules are pure functions of (probabilities, site, step); `AttentionControl` is the hook that calls them.

Shapes: B rows of the U-Net's batch, heads, Q queries, L tokens (of self-attention: Q), N steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ldm.models.diffusion.latent_diffusion import DiffusionModel
from ldm.modules.attention import Site

CrossEdit = Callable[[Tensor, Tensor], Tensor]  # maps of source and target (heads, Q, L) -> the target's new ones


def replace(mapper: Tensor) -> CrossEdit:
    """Exchange words: the target's maps are the source's, carried over by `mapper` (L, L)."""
    return lambda source, target: source @ mapper.to(source)


def refine(index: Tensor, aligned: Tensor) -> CrossEdit:
    """Add words: tokens with a partner take its map (`index`, `aligned` (L,)), new ones keep theirs."""

    def edit(source: Tensor, target: Tensor) -> Tensor:
        kept = aligned.to(source)
        return source[..., index.to(source.device)] * kept + target * (1 - kept)

    return edit


def reweight(edit: CrossEdit, factors: Tensor) -> CrossEdit:
    """Multiply the edited maps of each token by its factor (L,); they are not normalised again."""
    return lambda source, target: edit(source, target) * factors.to(source)


@dataclass(frozen=True)
class Rules:
    """Rules that change the attention of the last row, the target, given the one before it, the source.

    Args:
        cross: of the conditional branch's cross-attention.
        schedule: 0 or 1 (N + 1, L), where in time `cross` is used for a token.
        self_steps, unconditional_self_steps: steps in which self-attention of each branch is the source's.
        max_queries: self-attention of more queries stays as it is.
    """

    cross: CrossEdit
    schedule: Tensor
    self_steps: range = range(0)
    unconditional_self_steps: range = range(0)
    max_queries: int = 32**2

    def edits(self, site: Site, step: int, queries: int) -> bool:
        """Return whether anything changes at a site in a step."""
        if site.is_cross:
            return bool(self.schedule[step].any())
        return queries <= self.max_queries and (step in self.self_steps or step in self.unconditional_self_steps)


def edit_attention(rules: Rules, probabilities: Tensor, site: Site, step: int) -> Tensor:
    """Return the probabilities (B, heads, Q, L) after an edit; rows are unconditional ones, if any, source, target.

    Rows are written in place, as they are nobody else's.
    """
    if not rules.edits(site, step, probabilities.shape[-2]):
        return probabilities
    source, target = probabilities[-2], probabilities[-1]
    if site.is_cross:
        used = rules.schedule[step].to(probabilities)
        target.copy_(used * rules.cross(source, target) + (1 - used) * target)
        return probabilities
    if step in rules.self_steps:
        target.copy_(source)
    if step in rules.unconditional_self_steps and len(probabilities) == 4:
        probabilities[1].copy_(probabilities[0])
    return probabilities


def layers_of(model: DiffusionModel, z: Tensor) -> tuple[int, ...]:
    """Return the attention layers, not in the middle, whose maps say where words are, for latents z (…, H, W).

    Maps are 4 times smaller than latents, or less where they would be under 8 a side. In Stable Diffusion v1 these are
    layers 4, 5, 7, 8 and 9: the 16² maps of a 64² latent.
    """
    places = model.model.diffusion_model.attention_places
    factors = sorted({own for place, own in places if place != "mid"}, reverse=True)
    factor = next((f for f in factors if f <= 4 and min(z.shape[-2:]) // f >= 8), factors[-1])
    return tuple(layer for layer, (place, own) in enumerate(places) if own == factor and place != "mid")


@dataclass
class MapStore:
    """A hook that collects cross-attention maps of the last `rows` rows, after all edits.

    Args:
        layers: that are collected.
        keep: hold the maps of every timestep; otherwise their sum over time.
    """

    layers: Sequence[int]
    rows: int = 1
    keep: bool = False
    dtype: object = None
    maps: dict[int, dict[int, Tensor]] = field(default_factory=dict)  # timestep (or 0) -> layer -> (rows, heads, Q, L)

    def wants(self, site: Site, queries: int) -> bool:
        return site.is_cross and site.layer in self.layers

    def __call__(self, probabilities: Tensor, site: Site) -> Tensor:
        if self.wants(site, probabilities.shape[-2]):
            own = self.maps.setdefault(site.t if self.keep else 0, {})
            found = probabilities[-self.rows :]
            found = found.to(self.dtype) if self.dtype else found  # type: ignore[call-overload]
            own[site.layer] = own[site.layer] + found if site.layer in own else found.clone()
        return probabilities

    def at(self, t: int = 0) -> list[Tensor]:
        """Return the maps of a timestep, or their sum, in the order of the layers."""
        return [self.maps[t][layer] for layer in self.layers]


class AttentionControl:
    """The hook of an edit: changes attention by the rules of each step, and collects maps for a local blend.

    Args:
        rules: for each of the N steps.
        timesteps: of the steps, in their order.
        store: of the maps; None collects none.
    """

    def __init__(self, rules: Sequence[Rules], timesteps: Sequence[int], store: MapStore | None = None) -> None:
        self.rules, self.store = rules, store
        self._step = {int(t): step for step, t in enumerate(timesteps)}

    def wants(self, site: Site, queries: int) -> bool:
        step, store = self._step[site.t], self.store
        return self.rules[step].edits(site, step, queries) or (store is not None and store.wants(site, queries))

    def __call__(self, probabilities: Tensor, site: Site) -> Tensor:
        step = self._step[site.t]
        probabilities = edit_attention(self.rules[step], probabilities, site, step)
        return probabilities if self.store is None else self.store(probabilities, site)
