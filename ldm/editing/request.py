"""Requests to invert and to edit an image: dataclasses that check themselves.

Neither PyTorch nor a model is needed here, so that mistakes answer at once.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from numbers import Real
from typing import Any

from ldm.request import Words, check_prompt, check_words, read_number, shown, texts_of

Span = float | tuple[float, float]  # a share of all steps from the first on, or from the first to the second
Pair = tuple[tuple[str, ...], tuple[str, ...]]  # words of the source prompt, words of the target
KINDS = ("replace", "refine")
TAUS = ("tau_v", "tau_c", "tau_s", "tau_u")

MOST_EDITS = 1000  # of a grid of taus
# Least and greatest value of each number; the learning rate ends after 100 steps.
_RANGES = {"steps": (1, 100), "guidance_scale": (1, 1000), "inner_steps": (1, 100_000), "epochs": (1, 1000)}
_RANGES |= {"epsilon": (0, 1000)}


@dataclass(frozen=True)
class InversionOptions:
    """Settings of an inversion.

    Args:
        steps: denoising steps, N
        guidance_scale: of denoising; the path to the noise has none
        inner_steps: optimiser steps for the first denoising step; stylediffusion makes fewer and fewer
        epochs: sweeps over all steps
        attention_loss: also compare attention maps (stylediffusion)
        epsilon: a step ends once its loss is below this, plus 2e-5 for each step before it
        half_maps: keep recorded attention maps in half precision
    """

    steps: int = 30
    guidance_scale: float = 7.5
    inner_steps: int = 100
    epochs: int = 1
    attention_loss: bool = True
    epsilon: float = 1e-5
    half_maps: bool = False

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            whole = isinstance(getattr(InversionOptions, name), int)
            object.__setattr__(self, name, read_number(name, getattr(self, name), low, high, whole))
        _check_switches(self, "attention_loss", "half_maps")


@dataclass(frozen=True)
class Edit:
    """Settings of an edit.

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
        for name in ("word_taus", "weights"):
            if not isinstance(given := getattr(self, name) or {}, Mapping):
                raise ValueError(f"{name} must be {{word: number}}, not {shown(given)}.")
            self._set(name, dict(given))
        self._set("word_taus", {w: read_span(f"tau_c of '{w}'", s) for w, s in (self.word_taus or {}).items()})
        for word, weight in (self.weights or {}).items():
            read_number(f"The weight of {shown(word)}", weight, -1e6, 1e6)
        for name in ("blend", "subtract"):
            self._set(name, _pair(name, getattr(self, name)))
        self._set("threshold", read_number("threshold", self.threshold, 0, 1))
        _check_switches(self, "compat")

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def texts(self, num_stages: int) -> list[str]:
        """Return the target in each stage; one text where all are alike."""
        words = None if self.prospect_words is None else check_words(self.prospect_words, num_stages)
        return texts_of(self.target, words)

    def check(self, source: str, num_stages: int = 10) -> None:
        """Raise `ValueError` unless all words are those of the prompts, and as many of them as `kind` needs."""
        texts = self.texts(num_stages)
        for name, pair in (("blend", self.blend), ("subtract", self.subtract)):
            of_source, of_target = pair or ((), ())
            check_words_in(of_source, [source], f"{name}, of the source")
            check_words_in(of_target, texts, f"{name}, of the target")
        check_words_in(self.weights or {}, texts, "weight")
        check_words_in(self.word_taus or {}, texts, "tau_c")
        for text in texts if self.kind == "replace" else ():
            if len(source.split(" ")) != len(text.split(" ")):
                raise ValueError(f"kind replace needs as many words in '{source}' as in '{text}'; use kind refine.")


def _check_switches(options: object, *names: str) -> None:
    for name in names:
        if not isinstance(value := getattr(options, name), bool):
            raise ValueError(f"{name} must be true or false, not {shown(value)}.")


def read_span(name: str, value: object) -> Span:
    """Return a tau: a number in 0..1, or the start and the end of a part of the steps.

    Raises:
        ValueError: something else.
    """
    given: list[Any] = list(value) if isinstance(value, (tuple, list)) else [value]
    ends = [0, *given] if len(given) == 1 else given
    are_numbers = len(ends) == 2 and all(isinstance(end, Real) and not isinstance(end, bool) for end in ends)
    if not are_numbers or not 0 <= ends[0] <= ends[1] <= 1:
        found = ", ".join(map(shown, given[:3]))
        raise ValueError(f"{name} must be in 0..1, or two such numbers, the start before the end, not {found}.")
    start, end = map(float, ends)
    return (start, end) if start else end


def _pair(name: str, value: Any) -> Pair | None:
    if value is None:
        return None
    lists = [(w,) if isinstance(w, str) else w for w in value] if isinstance(value, (tuple, list)) else []
    are_words = [isinstance(words, (tuple, list)) and all(isinstance(w, str) for w in words) for words in lists]
    if are_words != [True, True]:
        given = ", ".join(map(shown, lists[:3])) or shown(value)
        raise ValueError(f"{name} must be words of the source and words of the target, not {given}.")
    return tuple(lists[0]), tuple(lists[1])


def grid_of(target: str, **given: Any) -> list[Edit]:
    """Return an edit for every combination of the taus, of which each may be a list of several."""
    lists = {name: tau if isinstance(tau := given.pop(name), list) else [tau] for name in TAUS if name in given}
    taus = [[(name, tau) for tau in several] for name, several in lists.items()]
    if not 1 <= (count := math.prod(map(len, taus))) <= MOST_EDITS:
        raise ValueError(f"The taus make a grid of {count} edits; give 1 to {MOST_EDITS}.")
    return [Edit(target, **given, **dict(combination)) for combination in product(*taus)]


def check_words_in(words: Collection[str], texts: Sequence[str], flag: str) -> None:
    """Raise `ValueError` for words that none of some prompts has, with those that they have."""
    there = dict.fromkeys(word for text in texts for word in text.split(" "))
    if lacking := [word for word in words if word not in there]:
        unknown, known = (", ".join(map(repr, filter(None, listed))) for listed in (lacking, there))
        raise ValueError(f"{flag}: {unknown} is no word of the prompt '{texts[0]}'; its words are {known}.")
