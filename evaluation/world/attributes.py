"""The words of the rendered world: attributes and the captions that name them.

One object (position, size, shape, texture, colour) on a plain background.

Shapes: N images, F = 6 factors in the order of `FACTORS`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from evaluation.world.shapes import BACKGROUNDS, CENTRES, COLOURS, OUTLINES, RADII, TEXTURES

RESOLUTION = 128  # default height and width of images, in pixels

FACTORS: dict[str, tuple[str, ...]] = {
    "position": tuple(CENTRES),
    "size": tuple(RADII),
    "shape": tuple(OUTLINES),
    "texture": tuple(TEXTURES),
    "colour": tuple(COLOURS),
    "background": tuple(BACKGROUNDS),
}
COLUMNS = {name: column for column, name in enumerate(FACTORS)}
PREPOSITIONS = {"left": "on the", "right": "on the", "top": "at the", "bottom": "at the", "centre": "in the"}
EXTRA_WORDS = (
    "a an the this that one other same and or not no of on in at with like , . thing object shape colour "
    "texture size background center middle gray picture photo painting drawing image style"
)


def is_held_out(attributes: Tensor) -> Tensor:
    """Return, bool (N,), whether the (shape, texture, colour) triples of attributes (N, F) are kept out of training.

    18 of the 216 triples are, each word of the three factors in three of them.
    """
    shape, texture, colour = (attributes[:, COLUMNS[name]] for name in ("shape", "texture", "colour"))
    return (2 * shape + 5 * texture + colour) % 12 == 4


def random_attributes(n: int, seed: int, held_out: bool | None = False) -> Tensor:
    """Return independent uniform attributes, long (n, F), of training triples, held-out ones (True), or all (None).

    A larger n continues the rows of a smaller one.
    """
    generator = torch.Generator().manual_seed(seed)
    choices = torch.tensor([len(words) for words in FACTORS.values()])
    kept = torch.empty(0, len(FACTORS), dtype=torch.long)
    while len(kept) < n:
        drawn = torch.randint(1 << 40, (4096, len(FACTORS)), generator=generator) % choices
        kept = torch.cat([kept, drawn if held_out is None else drawn[is_held_out(drawn) == held_out]])
    return kept[:n]


def other_attributes(attributes: Tensor, rng: np.random.Generator) -> Tensor:
    """Return random attributes that differ from `attributes`, long (F,) or (N, F), in every factor."""
    choices = np.array([len(words) for words in FACTORS.values()])
    return torch.from_numpy((attributes.numpy() + rng.integers(1, choices, attributes.shape)) % choices)


def attributes_from_words(words: Iterable[str]) -> Tensor:
    """Return attributes, long (F,), from one word of every factor in any order, e.g. large striped red star ..."""
    words = list(words)
    known = {word: name for name, values in FACTORS.items() for word in values}
    chosen = {known.get(word): word for word in words}
    if chosen.keys() != FACTORS.keys() or len(words) != len(FACTORS):
        raise ValueError(f"need one word of every factor, got {words}; choose from {FACTORS}")
    return torch.tensor([values.index(chosen[name]) for name, values in FACTORS.items()])


def words_of(attributes_row: Tensor) -> dict[str, str]:
    """Return the word of every factor for one row of attributes, long (F,)."""
    return {name: values[i] for (name, values), i in zip(FACTORS.items(), attributes_row.tolist(), strict=True)}


def caption(
    attributes_row: Tensor, rng: np.random.Generator | None = None, drop: float = 0.0, wrong: float = 0.0
) -> str:
    """Describe one row of attributes, e.g. "a large striped red star on the left on a navy background".

    Args:
        rng: source of the omissions and errors; None gives the full true caption.
        drop: probability that a part is left out (the shape becomes "thing"), for each part independently.
        wrong: probability that a word is replaced by another one of its factor, for each word independently.
    """
    if rng is None:
        return sentence(words_of(attributes_row))
    words = {}
    for (name, values), index in zip(FACTORS.items(), attributes_row.tolist(), strict=True):
        if rng.random() < wrong:
            index = (index + rng.integers(1, len(values))) % len(values)
        words[name] = values[index] if rng.random() >= drop else ""
    return sentence(words)


def sentence(words: Mapping[str, str]) -> str:
    """Return a caption from one word of every factor; a part whose word is "" is left out."""
    parts = ["a", *filter(None, (words["size"], words["texture"], words["colour"])), words["shape"] or "thing"]
    if words["position"]:
        parts += [PREPOSITIONS[words["position"]], words["position"]]
    if words["background"]:
        parts += ["on a", words["background"], "background"]
    return " ".join(parts)


def world_vocabulary() -> list[str]:
    """Return every word a caption can contain, and a few more that prompts for this world may use; sorted."""
    words = {word for values in FACTORS.values() for word in values}
    return sorted(words.union(*map(str.split, (*PREPOSITIONS.values(), EXTRA_WORDS))))
