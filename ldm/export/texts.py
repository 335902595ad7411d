"""Prompts as other programs read them: the learned token of stage k of a concept called `name` is `name-k` there."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from ldm.conditioning.prompts import split_pattern, stage_pieces
from ldm.request import Words, check_words

MAX_TOKENS = 75  # that a prompt has room for here; the web UI and ComfyUI read on in further chunks of as many
# also a file's name on Windows, where those of devices are taken; the web UI cuts prompts at AND and BREAK
_NAME = re.compile(r"(?!(?i:con|prn|aux|nul|com\d|lpt\d)$|.*\b(?:AND|BREAK)\b)[A-Za-z0-9]+([_-][A-Za-z0-9]+)*")
# What CLIP's tokenizer cuts a text into before it splits words (openai/CLIP, simple_tokenizer.py).
_PIECE = re.compile(r"'(?:s|t|re|ve|m|ll|d)|[^\W\d_]+|\d|(?:[^\w\s]|_)+")

Escape = Callable[[str], str]


class Learned(str):
    """The name of a learned token, as opposed to a word that looks like one."""


def check_name(name: str) -> str:
    """Return a name that is a file name everywhere, and one word in a prompt.

    Raises:
        ValueError: it is not.
    """
    if _NAME.fullmatch(name) is None or len(name) > 100:
        raise ValueError(
            f"The name '{name}' cannot be used; use letters, digits and single - or _ between them, such as 'my-teddy'."
        )
    return name


def name_like(text: str) -> str:
    """Return a name that `check_name` takes, made of any text."""
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-") or "concept"


def stage_words(
    prompt: str, words: Words | None, num_stages: int, names: Mapping[str, str], rows: Mapping[str, Sequence[int]]
) -> list[list[str]]:
    """The words of each of the S stages, learned tokens as `Learned`; entry 0 is the end of sampling.

    The tokenizer of Stable Diffusion v1 does not tell one space from several, so words can be joined by single ones.

    Args:
        names: placeholder -> name of the exported concept.
        rows: placeholder -> the concept's row for each stage (`Concept.rows_for`).

    Raises:
        ValueError: see `check_words`.
    """
    entries: Words = [None] * num_stages if words is None else check_words(words, num_stages)
    pattern = split_pattern(names)

    def piece_words(piece: str | tuple[str, int]) -> list[str]:
        if isinstance(piece, str):
            return piece.split()
        placeholder, stage = piece
        return [Learned(f"{names[placeholder]}-{rows[placeholder][stage]}")]

    lines = (stage_pieces(prompt, entry, stage, pattern, names) for stage, entry in enumerate(entries))
    return [[word for piece in pieces for word in piece_words(piece)] for pieces in lines]


def written(words: Iterable[str], escape: Escape = str, spell: Escape = str) -> str:
    """Words as one text: learned tokens by `spell`, others by `escape`."""
    return " ".join(spell(word) if isinstance(word, Learned) else escape(word) for word in words)


def misread(words: Sequence[str], tokens: Iterable[str]) -> str | None:
    """Return the part of a text that another program takes for a learned token though it is none; None for no such.

    diffusers looks for the name in the text and the web UI for its pieces, both without regard to case and for the
    longest name first. So `star - 0` and `Star-05` are read as star-0, and the token star-1 before a 0 as star-10.

    Args:
        tokens: all names of learned tokens that the other program knows then.
    """
    longest_first = sorted(tokens, key=len, reverse=True)
    pattern = re.compile("|".join(r"\s*".join(map(re.escape, _PIECE.findall(name))) for name in longest_first), re.I)
    meant = (word for word in words if isinstance(word, Learned))
    for match in pattern.finditer(written(words)):
        if match[0] != next(meant, None):
            return match[0]
    return None


def may_be_cut(words: Sequence[str], num_vectors: int) -> bool:
    """Whether a text may have more than 75 tokens, guessed without the tokenizer from the lengths of its words.

    Args:
        num_vectors: consecutive vectors of a learned word.
    """

    def tokens(word: str) -> int:
        if isinstance(word, Learned):
            return num_vectors
        return sum(-(-len(piece) // 5) if piece.isascii() else len(piece.encode()) for piece in _PIECE.findall(word))

    return sum(map(tokens, words)) > MAX_TOKENS
