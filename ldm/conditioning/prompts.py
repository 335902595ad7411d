"""Prompts to token slots: `prospect_words` and placeholders. (The paper's presets are in `ldm.conditioning.presets`.)

A slot (S, B, L) is a token id, or -(r + 1) for row r of the table of learned vectors. Stage axis everywhere:
entry 0 is the END of generation (timesteps 0 … T/S), the last entry its START.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from itertools import accumulate, chain
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from ldm.request import (
    PLACEHOLDER,
    Words,
    check_prompt,
    check_words,
    mentions,
    placeholder_pattern,
    shown,
    texts_of,
)

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

logger = logging.getLogger(__name__)

# What other programs read as weights and extra networks: (word:1.4), <lora:name:1>.
_FOREIGN = re.compile(
    r"\((?=[^()]{0,200}[^\W\d_])[^()]{1,200}:\s*\d+(?:\.\d+)?\s*\)|<(?:lora|lyco|hypernet):[^<>]{0,200}>", re.IGNORECASE
)


def foreign_syntax(text: str) -> str | None:
    """Return the first part of a text that other programs read as a weight or an extra network; None for no such."""
    match = _FOREIGN.search(text)
    return match[0] if match else None


def warn_of_unused(concepts: Collection[str], prompt: str, words: Words | None, learned_as: Mapping[str, str]) -> None:
    """Warn of concepts that no text names, if they were asked for, or if a text calls them what their file does.

    Args:
        concepts: placeholders that were asked for.
        words: as `check_words` takes them.
        learned_as: for everything that is loaded: placeholder -> the one in its file.
    """
    names = dict.fromkeys((*concepts, *learned_as))
    pattern = placeholder_pattern([*names, *learned_as.values()])
    named = set(pattern.findall(" ".join(texts_of(prompt, words)))) if names else set()
    for name in (name for name in names if name not in named):
        own = learned_as.get(name, name)
        if own in named and own not in learned_as:
            logger.warning(
                "The concept '%s' has no effect: the text says %s, as it was learned; write %s, or load it by that "
                "name (--concept '%s=FILE', load({'%s': FILE})).",
                *(name, own, name, own, own),
            )
        elif name in concepts:
            logger.warning("The concept '%s' has no effect: write %s into the prompt where it belongs.", name, name)


def class_words(captions: Sequence[str]) -> list[str]:
    """Return what captions such as 'teddybear' or 'a teddybear' name, the shortest first, without the article."""
    return sorted((re.sub(r"^(an?|the) ", "", caption, flags=re.IGNORECASE) for caption in captions), key=len)


def warn_of_class(name: str, captions: Sequence[str], prompt: str, words: Words | None) -> None:
    """Warn where no text names what a concept without a placeholder (CatVersion) was learned as, in these captions."""
    classes, texts = class_words(captions), texts_of(prompt, words)
    if classes and not any(mentions(text.lower(), word.lower()) for text in texts for word in classes):
        logger.warning(
            "The concept '%s' changes what '%s' means, which the prompt does not name; write that word into it.",
            *(name, classes[0]),
        )


_IN_BRACKETS = re.compile(r"<[^<>\s]*>")  # a placeholder, of which others warn where nothing is loaded for it


def warn_of_unknown(
    known: tuple[Sequence[str], Sequence[str]], texts: Iterable[str], placeholders: Iterable[str]
) -> None:
    """Warn of words that a model of a small world never read.

    Args:
        known: words that its captions differ in, which are listed, and others; both empty where it knows any word.
        placeholders: learned tokens, which are known.
    """
    if not known[0]:
        return
    pattern = split_pattern(placeholders)
    plain = (_IN_BRACKETS.sub(" ", pattern.sub(" ", text)) for text in texts)
    words = dict.fromkeys(word for text in plain for word in re.findall(r"\w+", text.lower()))
    if unknown := [word for word in words if word not in known[0] and word not in known[1]]:
        logger.warning(
            "This model does not know %s; it knows %s.",
            *(", ".join(f"'{word[:30]}'" for word in unknown[:8]), ", ".join(known[0])),
        )


def split_pattern(placeholders: Iterable[str]) -> re.Pattern[str]:
    """Return what `stage_pieces` cuts prompts with: a pattern of the placeholders and `*`."""
    return placeholder_pattern((PLACEHOLDER, *placeholders))


def stage_pieces(
    prompt: str, entry: str | int | None, stage: int, pattern: re.Pattern[str], placeholders: Container[str]
) -> list[str | tuple[str, int]]:
    """Return a prompt in one stage, cut into texts and (placeholder, stage whose learned token stands there).

    Args:
        entry: the stage's entry of `prospect_words`.
        pattern: from `split_pattern`.
        placeholders: those that something is learned for; others stay text.
    """
    if isinstance(entry, str):
        prompt = prompt.replace(PLACEHOLDER, entry)
    pieces: list[str | tuple[str, int]] = []
    for i, piece in enumerate(pattern.split(prompt)):
        if i % 2 and piece in placeholders:  # every second piece is what the pattern matched
            pieces.append((piece, entry if piece == PLACEHOLDER and isinstance(entry, int) else stage))
        elif piece:
            pieces.append(piece)
    return pieces


class PromptReader:
    """Reads prompts for one tokenizer and one set of learned placeholders.

    Args:
        tokenizer: CLIP's BPE.
        placeholders: placeholder -> for each of the S stages, its rows in the table of learned vectors.
        num_stages: S.
        max_length: L.
    """

    def __init__(
        self,
        tokenizer: CLIPTokenizer,
        placeholders: Mapping[str, Sequence[Sequence[int]]],
        num_stages: int,
        max_length: int = 77,
    ) -> None:
        self.tokenizer = tokenizer
        self.placeholders = dict(placeholders)
        self.num_stages = num_stages
        self.max_length = max_length
        self._pattern = split_pattern(self.placeholders)
        self._warnings: dict[str, None] = {}  # of the text that is being read, each once and in order

    def read(self, prompts: Sequence[str], words: Words | None = None, legacy_word_tokens: bool = False) -> Tensor:
        """Return slots (S, B, L) for B prompts, each with the same `words`.

        Raises:
            ValueError: see `check_words` and `check_prompt`.
        """
        for prompt in prompts:
            check_prompt(prompt)
        self._warnings.clear()
        if words is not None:
            words = check_words(words, self.num_stages)
            for prompt in prompts:
                if PLACEHOLDER not in prompt:
                    self._warn(f"prospect_words has no effect: the prompt '{prompt}' has no '*' for it to replace.")
        texts = [*prompts, *(word for word in words or () if isinstance(word, str))]
        for found in filter(None, map(foreign_syntax, texts)):
            self._warn(f"'{found}' is read as letters: weights and extra networks of other programs mean nothing here.")
        if legacy_word_tokens:
            rows = [self._legacy_slots(prompt, words) for prompt in prompts]
        else:
            rows = [[self._slots(prompt, words, stage) for stage in range(self.num_stages)] for prompt in prompts]
        for warning in self._warnings:
            logger.warning(warning)
        return torch.tensor(rows, dtype=torch.long, device="cpu").transpose(0, 1).contiguous()

    def words_in(self, prompt: str, words: Words | None = None, stage: int = 0) -> list[tuple[str, list[int]]]:
        """Return the words of a prompt in a stage, split at single spaces, each with its slots; nothing is cut off."""
        entry = None if words is None else check_words(words, self.num_stages)[stage]
        (text,) = texts_of(prompt, [entry])
        own = None if isinstance(entry, str) else entry
        return [(word, self._body(word, own, stage)) for word in text.split(" ")]

    def _body(self, text: str, entry: str | int | None, stage: int) -> list[int]:
        pieces = stage_pieces(text, entry, stage, self._pattern, self.placeholders)
        if PLACEHOLDER in pieces:  # as a text
            self._warn_unlearned()
        slots = (self._learned(*piece) if isinstance(piece, tuple) else self._ids(piece) for piece in pieces)
        return list(chain.from_iterable(slots))

    def words_read(self, prompt: str, words: Words | None = None) -> list[int | None]:
        """Return for each stage how many words there is room for; None: for all of them."""
        entries = [None] * self.num_stages if words is None else check_words(words, self.num_stages)
        return [self._words_read(prompt, entry, stage) for stage, entry in enumerate(entries)]

    def _words_read(self, prompt: str, entry: str | int | None, stage: int) -> int | None:
        pieces = stage_pieces(prompt, entry, stage, self._pattern, self.placeholders)
        words = ([self._learned(*p)] if isinstance(p, tuple) else map(self._ids, p.split()) for p in pieces)
        ends = accumulate(len(tokens) for tokens in chain.from_iterable(words))
        return next((count for count, end in enumerate(ends) if end > self.max_length - 2), None)

    def _slots(self, prompt: str, words: list[str | int | None] | None, stage: int) -> list[int]:
        """Return the L slots of one prompt in one stage, the whole text tokenised by BPE."""
        body = self._body(prompt, None if words is None else words[stage], stage)
        room = self.max_length - 2
        if len(body) > room:
            rest = self._spell(body[room:][:240])  # of which a message has 60 letters
            self._warn(f"The prompt is longer than {room} tokens; cut off: {shown(rest)}")
        start, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id  # which also is padding
        return [start, *body[:room], *[end] * (self.max_length - 1 - len(body[:room]))]

    def _learned(self, placeholder: str, stage: int) -> list[int]:
        """Return the slots of a placeholder in a stage, one for each consecutive learned token."""
        return [-(row + 1) for row in self.placeholders[placeholder][stage]]

    def _ids(self, text: str) -> list[int]:
        # not verbose: the tokenizer would warn of long text too
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _spell(self, slots: Sequence[int]) -> str:
        names = {row: name for name, stages in self.placeholders.items() for rows in stages for row in rows}
        tokens = ([slot] if slot >= 0 else self._ids(names[-slot - 1]) for slot in slots)
        return str(self.tokenizer.decode(list(chain.from_iterable(tokens))))

    def _warn(self, message: str) -> None:
        self._warnings[message] = None

    def _warn_unlearned(self) -> None:
        self._warn("Nothing is learned or loaded for '*', so it is read as an ordinary character.")

    def _legacy_slots(self, prompt: str, words: list[str | int | None] | None) -> list[list[int]]:
        """Return slots of all stages by the reference's rule, to repeat results made with it.

        The prompt is tokenised whole and only a `*` that is a token of its own counts. Entries are split at single
        spaces and only the first BPE piece of each word is kept; an empty piece is the end mark. An int reads
        the list while it is being edited. Beyond L slots everything is cut, the end mark too.
        """
        ids = self.tokenizer(prompt, truncation=True, max_length=self.max_length)["input_ids"]
        ids = ids + [self.tokenizer.eos_token_id] * (self.max_length - len(ids))
        star = cast(int, self.tokenizer.convert_tokens_to_ids(PLACEHOLDER + "</w>"))
        is_learned = PLACEHOLDER in self.placeholders
        if star in ids and not is_learned:
            self._warn_unlearned()

        def learned(stage: int) -> list[int]:
            return self._learned(PLACEHOLDER, stage) if is_learned else [star]

        resolved: list[list[int]] = []
        end = [self.tokenizer.eos_token_id]
        for stage, entry in enumerate([None] * self.num_stages if words is None else words):
            if isinstance(entry, int):
                resolved.append(resolved[entry] if entry < stage else learned(entry))
                continue
            pieces = (PLACEHOLDER if entry is None else entry).split(" ")
            slots = (learned(stage) if p == PLACEHOLDER else (self._ids(p) or end)[:1] for p in pieces)
            resolved.append(list(chain.from_iterable(slots)))
        stages = ([own if token == star else [token] for token in ids] for own in resolved)
        return [list(chain.from_iterable(slots))[: self.max_length] for slots in stages]
