"""Prompts to token slots: `prospect_words`, placeholders, and the paper's presets.

A slot (S, B, L) is a token id, or -(r + 1) for row r of the table of learned vectors. Stage axis everywhere:
entry 0 is the END of generation (timesteps 0 … T/S), the last entry its START.
"""

from __future__ import annotations

import logging
import numbers
import re
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import yaml
from torch import Tensor

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

logger = logging.getLogger(__name__)

PLACEHOLDER = "*"
Words = Sequence["str | int | None"]

# Stages (of ten) in which the paper lets `*` carry an attribute of the picture; the other stages follow the class
# prompt. Zhang et al. 2023, section 5 and the authors' README; for `style` they name no stages and count it with
# material, at the high-frequency end. `layout` adds `*` to the class prompt instead of putting it inside.
PRESET_STAGES: dict[str, tuple[int, ...]] = {
    "content": (0, 1, 2, 3, 4, 5, 6, 7),
    "layout": (9,),
    "material": (0, 1, 2, 3, 4),
    "style": (0, 1, 2, 3, 4),
}


def preset(
    attribute: str, prompt: str, stages: Sequence[int] | None = None, num_stages: int = 10, placeholder: str = "*"
) -> list[str]:
    """The `prospect_words` that take one attribute from the picture and the rest from the text.

    `preset('material', 'a * dog on the table')` has `*` in stages 0–4, and `a dog on the table` in 5–9. A prompt
    without the placeholder gets it appended in those stages.

    Args:
        attribute: content, layout, material or style.
        stages: stages that carry the placeholder, instead of the paper's.
        num_stages: S; the paper's windows, which are tenths, are scaled to it.

    Raises:
        ValueError: unknown attribute, or a stage outside 0..S-1.
    """
    if attribute not in PRESET_STAGES:
        raise ValueError(f"Unknown preset '{attribute}'; there are {', '.join(PRESET_STAGES)}.")
    if stages is None:
        # a stage is inside the window when its middle is
        tenths = PRESET_STAGES[attribute]
        stages = [s for s in range(num_stages) if int((s + 0.5) * 10 / num_stages) in tenths]
    outside = [s for s in stages if not 0 <= s < num_stages]
    if outside:
        raise ValueError(f"Stages {outside} are outside 0..{num_stages - 1}.")
    with_concept = prompt if placeholder in prompt else f"{prompt} {placeholder}".strip()
    plain = " ".join(prompt.replace(placeholder, " ").split())
    return [with_concept if stage in stages else plain for stage in range(num_stages)]


def load_presets(path: str | Path | None) -> dict[str, tuple[int, ...]]:
    """The windows of a YAML file {attribute: [stages of ten]}, for attributes it leaves out the paper's; None: those.

    Raises:
        ValueError: no such file, an unknown attribute, or something else than a list of stages 0..9.
    """
    if path is None:
        return dict(PRESET_STAGES)
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"The presets '{path}' cannot be read; scripts/spectrum.py writes such files.") from error
    if not isinstance(content, dict) or not set(content) <= set(PRESET_STAGES):
        raise ValueError(f"The presets '{path}' must give lists of stages for {', '.join(PRESET_STAGES)}.")
    for attribute, stages in content.items():
        if not isinstance(stages, list) or not stages or not all(type(s) is int and 0 <= s <= 9 for s in stages):
            raise ValueError(f"The preset '{attribute}' in '{path}' must be a list of stages 0..9, not {stages}.")
    return PRESET_STAGES | {attribute: tuple(stages) for attribute, stages in content.items()}


def check_words(words: Words, num_stages: int) -> list[str | int | None]:
    """`words` as a checked list.

    Raises:
        ValueError: not a list of S entries, or an entry that is neither a string, a stage number, nor None.
    """
    if isinstance(words, (str, bytes)) or not isinstance(words, Sequence):
        raise ValueError(f"prospect_words must be a list of {num_stages} entries, not a {type(words).__name__}.")
    if len(words) != num_stages:
        raise ValueError(
            f"prospect_words has {len(words)} entries, but this model has {num_stages} stages; entry 0 is the end "
            "of generation, the last one its start."
        )
    checked: list[str | int | None] = []
    for i, word in enumerate(words):
        if word is None or isinstance(word, str):
            checked.append(word)
        elif isinstance(word, numbers.Integral) and not isinstance(word, bool):
            if not 0 <= word < num_stages:
                raise ValueError(f"prospect_words[{i}] = {word}: a stage number must be in 0..{num_stages - 1}.")
            checked.append(int(word))
        else:
            raise ValueError(
                f"prospect_words[{i}] is a {type(word).__name__}; an entry is a text, a stage number, or None."
            )
    return checked


class PromptReader:
    """Reads prompts for one tokenizer and one set of learned placeholders.

    Args:
        tokenizer: CLIP's BPE.
        placeholders: placeholder -> its row in the table of learned vectors for each of the S stages.
        num_stages: S.
        max_length: L.
    """

    def __init__(
        self,
        tokenizer: CLIPTokenizer,
        placeholders: Mapping[str, Sequence[int]],
        num_stages: int,
        max_length: int = 77,
    ) -> None:
        self.tokenizer = tokenizer
        self.placeholders = dict(placeholders)
        self.num_stages = num_stages
        self.max_length = max_length
        known = sorted({PLACEHOLDER, *self.placeholders}, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, known)) + ")")
        self._warnings: dict[str, None] = {}  # of the text that is being read, each once and in order

    def read(self, prompts: Sequence[str], words: Words | None = None, legacy_word_tokens: bool = False) -> Tensor:
        """Slots (S, B, L) for B prompts, each with the same `words`.

        Raises:
            ValueError: see `check_words`; or a prompt is not a string.
        """
        for prompt in prompts:
            if not isinstance(prompt, str):
                raise ValueError(f"A prompt must be a text, not a {type(prompt).__name__}.")
        self._warnings.clear()
        if words is not None:
            words = check_words(words, self.num_stages)
            self._warn_without_placeholder(prompts)
        if legacy_word_tokens:
            rows = [self._legacy_slots(prompt, words) for prompt in prompts]
        else:
            rows = [[self._slots(prompt, words, stage) for stage in range(self.num_stages)] for prompt in prompts]
        for warning in self._warnings:
            logger.warning(warning)
        return torch.tensor(rows).transpose(0, 1).contiguous()

    def _warn_without_placeholder(self, prompts: Sequence[str]) -> None:
        for prompt in prompts:
            if PLACEHOLDER not in prompt:
                self._warn(f"prospect_words has no effect: the prompt '{prompt}' has no '*' for it to replace.")

    def _slots(self, prompt: str, words: list[str | int | None] | None, stage: int) -> list[int]:
        """The L slots of one prompt in one stage, the whole text tokenised by BPE."""
        entry = None if words is None else words[stage]
        if isinstance(entry, str):
            prompt = prompt.replace(PLACEHOLDER, entry)
        body: list[int] = []
        for piece in self._split.split(prompt):
            if piece in self.placeholders:
                chosen = piece == PLACEHOLDER and isinstance(entry, int)
                body.append(self._learned(piece, entry if chosen else stage))
            elif piece:
                if piece == PLACEHOLDER:
                    self._warn_unlearned()
                body.extend(self._ids(piece))
        room = self.max_length - 2
        if len(body) > room:
            self._warn(f"The prompt is longer than {room} tokens; cut off: '{self._spell(body[room:])}'")
        return self._close(body[:room])

    def _learned(self, placeholder: str, stage: int) -> int:
        return -(self.placeholders[placeholder][stage] + 1)

    def _ids(self, text: str) -> list[int]:
        # not verbose: the tokenizer would warn of long text too
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _spell(self, slots: Sequence[int]) -> str:
        names = {row: name for name, rows in self.placeholders.items() for row in rows}
        tokens = ([slot] if slot >= 0 else self._ids(names[-slot - 1]) for slot in slots)
        return self.tokenizer.decode(list(chain.from_iterable(tokens)))

    def _warn(self, message: str) -> None:
        self._warnings[message] = None

    def _warn_unlearned(self) -> None:
        self._warn("Nothing is learned or loaded for '*', so it is read as an ordinary character.")

    def _close(self, body: list[int]) -> list[int]:
        """Add the start mark, the end mark, and padding (which is the end mark in Stable Diffusion v1)."""
        end = self.tokenizer.eos_token_id
        tokens = [self.tokenizer.bos_token_id, *body, end]
        return tokens + [end] * (self.max_length - len(tokens))

    def _legacy_slots(self, prompt: str, words: list[str | int | None] | None) -> list[list[int]]:
        """Slots of all stages by the reference's rule, to repeat results made with it.

        The prompt is tokenised whole and only a `*` that is a token of its own counts. Entries are split at single
        spaces and only the first BPE piece of each word is kept; an empty piece is the end mark. An int reads
        the list while it is being edited. Beyond L slots everything is cut, the end mark too.
        """
        ids = self.tokenizer(prompt, truncation=True, max_length=self.max_length)["input_ids"]
        ids = ids + [self.tokenizer.eos_token_id] * (self.max_length - len(ids))
        star = self.tokenizer.convert_tokens_to_ids(PLACEHOLDER + "</w>")
        is_learned = PLACEHOLDER in self.placeholders
        if star in ids and not is_learned:
            self._warn_unlearned()

        def learned(stage: int) -> int:
            return self._learned(PLACEHOLDER, stage) if is_learned else star

        resolved: list[list[int]] = []
        for stage in range(self.num_stages):
            entry = None if words is None else words[stage]
            if entry is None:
                resolved.append([learned(stage)])
            elif isinstance(entry, str):
                pieces = entry.split(" ")
                resolved.append([learned(stage) if p == PLACEHOLDER else self._first_piece(p) for p in pieces])
            else:
                resolved.append(resolved[entry] if entry < stage else [learned(entry)])
        stages = []
        for replacement in resolved:
            slots: list[int] = []
            for token in ids:
                slots.extend(replacement if token == star else [token])
            stages.append(slots[: self.max_length])
        return stages

    def _first_piece(self, word: str) -> int:
        ids = self._ids(word)
        return ids[0] if ids else self.tokenizer.eos_token_id
