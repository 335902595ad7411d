"""Prompts as other programs read them: the learned token of stage k of a concept called `name` is `name-k` there."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from ldm.conditioning.prompts import Words, check_words, split_pattern, stage_pieces

_NAME = re.compile(r"[A-Za-z0-9]+([_-][A-Za-z0-9]+)*")


def check_name(name: str) -> str:
    """A name that is a file name everywhere, and one word in a prompt.

    Raises:
        ValueError: it is not.
    """
    if _NAME.fullmatch(name) is None or len(name) > 100:
        raise ValueError(
            f"The name '{name}' cannot be used; use letters, digits and single - or _ between them, such as 'my-teddy'."
        )
    return name


def escaped(text: str, escape: Callable[[str], str]) -> str:
    """Text without learned tokens as `stage_texts` writes it."""
    return " ".join(escape(word) for word in text.split())


def stage_texts(
    prompt: str,
    words: Words | None,
    num_stages: int,
    names: Mapping[str, str],
    rows: Mapping[str, Sequence[int]] | None = None,
    spell: Callable[[str], str] = str,
    escape: Callable[[str], str] = str,
) -> list[str]:
    """What stands in each of the S stages; entry 0 is the END of generation.

    Words are separated by single spaces, which the tokenizer of Stable Diffusion v1 does not tell from others.

    Args:
        names: placeholder -> name of the exported concept.
        rows: placeholder -> the concept's row for each stage, where that is not the stage (`Concept.rows_for`).
        spell: how `name-k` is written.
        escape: how other text is written.

    Raises:
        ValueError: see `check_words`.
    """
    words = [None] * num_stages if words is None else check_words(words, num_stages)
    pattern = split_pattern(names)

    def text(stage: int) -> str:
        parts = []
        for piece in stage_pieces(prompt, words[stage], stage, pattern, names):
            if isinstance(piece, tuple):
                placeholder, row = piece
                row = row if rows is None else rows[placeholder][row]
                parts.append(spell(f"{names[placeholder]}-{row}"))
            else:
                parts.append(escaped(piece, escape))
        return " ".join(filter(None, parts))

    return [text(stage) for stage in range(num_stages)]
