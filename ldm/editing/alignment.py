"""Alignment of the tokens of two prompts: host-side, exact (Hertz et al. 2022, with the reference's code checked).

Everything here is made of words and token numbers; no tokenizer is asked. Shapes: L tokens of a context (77), N steps.
`compat` repeats what StyleDiffusion's code, taken over from Prompt-to-Prompt, does where it differs from what is right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.editing.request import Span


@dataclass(frozen=True)
class PromptTokens:
    """A prompt as words and tokens.

    Args:
        words: split at single spaces, punctuation with them.
        places: for each word where its tokens stand in the sequence, the start mark at 0.
        ids: token ids with both end marks; learned tokens are negative.
        length: L; what lies behind is cut off.
    """

    words: tuple[str, ...]
    places: tuple[tuple[int, ...], ...]
    ids: tuple[int, ...]
    length: int = 77

    @classmethod
    def of(cls, words: Sequence[tuple[str, Sequence[int]]], marks: tuple[int, int], length: int = 77) -> PromptTokens:
        """Return the tokens of (word, its token ids); `marks` are those of start and end."""
        ids, places = [marks[0]], []
        for _, tokens in words:
            places.append(tuple(range(len(ids), min(len(ids) + len(tokens), length - 1))))
            ids += tokens
        return cls(tuple(word for word, _ in words), tuple(places), (*ids[: length - 1], marks[1]), length)

    @classmethod
    def by_length(cls, text: str, ids: Sequence[int], spell: Callable[[int], str], length: int = 77) -> PromptTokens:
        """Find words as the reference does (`compat`): by the lengths of decoded tokens; blanks in a row shift them.

        Args:
            ids: with both end marks.
            spell: token id -> its text.
        """
        words = text.split(" ")
        places: list[list[int]] = [[] for _ in words]
        word = count = 0
        for place, token in enumerate(ids[1:-1], start=1):
            if word < len(words):
                places[word].append(place)
                count += len(spell(token))
                if count >= len(words[word]):
                    word, count = word + 1, 0
        return cls(tuple(words), tuple(map(tuple, places)), tuple(ids), length)

    def places_of(self, word: str) -> list[int]:
        """Return where the tokens of all words that equal `word` stand; empty for an unknown one."""
        return [p for own, places in zip(self.words, self.places, strict=True) if own == word for p in places]

    def mask(self, words: Sequence[str]) -> Tensor:
        """Return ones (L,) at the tokens of these words, zeros elsewhere."""
        found = torch.zeros(self.length)
        found[[place for word in words for place in self.places_of(word)]] = 1
        return found


def replacement_mapper(source: PromptTokens, target: PromptTokens, compat: bool = False) -> Tensor:
    """Return P (L, L): column j says which source tokens' maps make that of target token j, word by word.

    A word of other token numbers shares its maps among all tokens of the new one. Behind the last exchanged word
    the reference (`compat`) pairs equal places instead of equal words.

    Raises:
        ValueError: a word without a token, or prompts of different numbers of words.
    """
    length = source.length
    exchanged = [k for k, (a, b) in enumerate(zip(source.words, target.words, strict=True)) if a != b]
    if lacking := [f"'{p.words[k]}'" for p in (source, target) for k in exchanged if not p.places[k]]:
        raise ValueError(f"--kind replace: the word {', '.join(lacking)} has no token; remove double blanks.")
    mapper = torch.zeros(length, length)
    i = j = 0
    for k in exchanged:
        old, new = list(source.places[k]), list(target.places[k])
        same = min(old[0] - i, length - j)
        mapper[torch.arange(same) + i, torch.arange(same) + j] = 1
        if len(old) == len(new):
            mapper[old, new] = 1
        else:
            mapper[torch.tensor(old)[:, None], torch.tensor(new)] = 1 / len(new)
        i, j = i + same + len(old), j + same + len(new)
    rest = torch.arange(length - max(i, j))
    mapper[rest + (j if compat else i), rest + j] = 1
    if not compat:  # more source tokens than target ones: padding, whose maps are alike, fills up
        mapper[length - 1, j + len(rest) :] = 1
    return mapper


def refinement_mapper(source: PromptTokens, target: PromptTokens) -> tuple[Tensor, Tensor]:
    """Return (L,) which source token each target token is aligned with (-1: none), and (L,) 1 where there is one.

    Global alignment of the token ids (Needleman and Wunsch 1970): gap 0, match 1, mismatch -1.
    """
    length, aligned = source.length, _align(source.ids, target.ids)
    index = torch.tensor([*aligned, *range(len(aligned), length)][:length])
    return index, (index >= 0).float()


def _align(a: Sequence[int], b: Sequence[int]) -> list[int]:
    """Return for each of b the place of its partner in a, or -1; on ties b's token stays alone, then a's."""
    score = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a, start=1):
        for j, y in enumerate(b, start=1):
            score[i][j] = max(score[i][j - 1], score[i - 1][j], score[i - 1][j - 1] + (1 if x == y else -1))
    i, j, partners = len(a), len(b), [-1] * len(b)
    while j > 0:
        if i == 0 or score[i][j] == score[i][j - 1]:
            j -= 1
        elif score[i][j] == score[i - 1][j]:
            i -= 1
        else:
            i, j = i - 1, j - 1
            partners[j] = i
    return partners


def equalizer(target: PromptTokens, weights: Mapping[str, float]) -> Tensor:
    """Return the factors (L,) of the target tokens' maps: a word's weight at its tokens, 1 elsewhere."""
    factors = torch.ones(target.length)
    for word, weight in weights.items():
        factors[target.places_of(word)] = float(weight)
    return factors


def cross_schedule(target: PromptTokens, steps: int, tau: Span, words: Mapping[str, Span] | None = None) -> Tensor:
    """Return 0 or 1 (N + 1, L): in which steps a target token's map is edited.

    As in Prompt-to-Prompt, shares are of N + 1 steps.

    Args:
        words: spans of single words; the others have `tau`.
    """
    schedule = torch.zeros(steps + 1, target.length)
    everywhere = list(range(target.length))
    for places, span in [(everywhere, tau), *((target.places_of(w), s) for w, s in (words or {}).items())]:
        edited = _steps(steps + 1, span)
        schedule[:, places] = 0
        schedule[edited.start : edited.stop, places] = 1
    return schedule


def self_steps(steps: int, tau: Span) -> range:
    """Return the steps in which self-attention is exchanged, of N."""
    return _steps(steps, tau)


def value_steps(steps: int, tau: Span) -> range:
    """Return the steps in which the edited prompt has the learned values, of N: those that begin within tau."""
    return _steps(steps, tau, math.ceil)


def _steps(count: int, span: Span, whole: Callable[[float], int] = int) -> range:
    start, end = span if isinstance(span, tuple) else (0.0, span)
    return range(whole(start * count), whole(end * count))
