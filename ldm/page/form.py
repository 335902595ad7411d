"""What a user has filled in: a prompt, a lane for each concept, the text of each stage and the other settings.

The form knows no browser. It becomes a `Request`, and it is restored from the record in a PNG.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import chain, count, groupby, product
from pathlib import Path
from typing import Any

from ldm.conditioning.presets import Windows, preset_stages, with_only
from ldm.files.hub import refuse_unfetched
from ldm.request import PLACEHOLDER, PRESETS, ModelFacts, Request, Words

# Fields that the prompt, the lanes and the timeline decide; all others are settings.
DERIVED = ("prompt", "prospect_words", "preset", "concepts")
MOST_LANES = 6
MOST_NAME = 30  # characters of a placeholder
Entry = str | int  # a text, or the stage whose learned token stands for `*`


@dataclass
class Lane:
    """A concept and the stages that read it.

    Args:
        preset: the attribute whose window the stages are; None where they were chosen one by one.
    """

    placeholder: str
    file: str
    stages: set[int]
    preset: str | None = None


@dataclass
class Form:
    """What is asked for.

    Args:
        num_stages: S of the model.
        own: stage -> what it reads in place of the prompt.
        settings: fields of `Request` that differ from their defaults.
    """

    num_stages: int = 10
    prompt: str = ""
    lanes: list[Lane] = field(default_factory=list)
    own: dict[int, Entry] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def every_stage(self) -> set[int]:
        return set(range(self.num_stages))

    @property
    def scales(self) -> list[float] | None:
        """The guidance scale of each stage; None where one holds for all."""
        found = self.settings.get("scale")
        return list(found) if isinstance(found, Sequence) else None

    def set_scales(self, scales: Sequence[float] | None) -> None:
        """Give each stage a guidance scale of its own, or (None) all the model's."""
        self.settings.pop("scale", None)
        if scales is not None:
            self.settings["scale"] = tuple(scales)

    def add_concept(self, file: str) -> Lane:
        """Add a lane, called `*` or, where that is taken, like the file; all stages read it."""
        name = re.sub(r"\W+", "-", Path(file).stem).strip("-")[:MOST_NAME] or "concept"
        names = chain([PLACEHOLDER, f"<{name}>"], (f"<{name}-{number}>" for number in count(2)))
        taken = {lane.placeholder for lane in self.lanes}
        self.lanes.append(Lane(next(name for name in names if name not in taken), file, self.every_stage))
        return self.lanes[-1]

    def set_stage(self, lane: Lane, stage: int, carries: bool) -> None:
        """Let a stage read the concept of a lane, or not."""
        lane.preset = None
        (lane.stages.add if carries else lane.stages.discard)(stage)
        self.own.pop(stage, None)

    def set_preset(self, lane: Lane, attribute: str | None, windows: Windows) -> None:
        """Let the window of an attribute read the concept of a lane; None: every stage."""
        lane.preset = attribute
        lane.stages = set(preset_stages(attribute, self.num_stages, windows)) if attribute else self.every_stage
        self.own.clear()

    def text(self, stage: int) -> str:
        """The text that a stage reads."""
        own = self.own.get(stage)
        if isinstance(own, str):
            return own
        if own is not None or self._is_plain():
            return self.prompt
        return with_only(self.prompt, {lane.placeholder: stage in lane.stages for lane in self.lanes})

    def groups(self) -> list[list[int]]:
        """Runs of stages that read the same, the start of generation first."""
        stages = sorted(range(self.num_stages), reverse=True)
        keyed = groupby(stages, key=lambda stage: (self.text(stage), isinstance(self.own.get(stage), int)))
        return [list(run) for _, run in keyed]

    def _is_plain(self) -> bool:
        """Whether every stage reads the prompt as it stands."""
        return all(lane.stages == self.every_stage for lane in self.lanes)

    def request(self) -> Request:
        """Return what is asked for.

        Raises:
            ValueError: see `Request`.
        """
        concepts = {lane.placeholder: lane.file for lane in self.lanes}
        if len(concepts) < len(self.lanes):
            raise ValueError("Two concepts have the same name; give every concept a name of its own in the prompt.")
        given = self.settings | {"concepts": concepts or None}
        if len(self.lanes) == 1 and self.lanes[0].preset and not self.own:
            return Request(prompt=self.prompt, preset=self.lanes[0].preset, **given)
        if self._is_plain() and not self.own:
            return Request(prompt=self.prompt, **given)
        if any(isinstance(entry, int) for entry in self.own.values()):
            return Request(prompt=self.prompt, prospect_words=self._entries(), **given)
        texts = [self.text(stage) for stage in range(self.num_stages)]
        return Request(prompt=PLACEHOLDER, prospect_words=texts, **given)

    def _entries(self) -> list[str | int | None]:
        """Entries that stand at the `*` of the prompt, as they must where one of them is another stage's token."""
        before, _, behind = self.prompt.partition(PLACEHOLDER)

        def entry(stage: int) -> str | int | None:
            own, text = self.own.get(stage), self.text(stage)
            if isinstance(own, int) or text == self.prompt:
                return own if isinstance(own, int) else None
            if " ".join(text.split()) == " ".join((before + behind).split()):
                return ""
            if text.startswith(before) and text.endswith(behind) and len(text) >= len(before + behind):
                return text[len(before) : len(text) - len(behind)]
            raise ValueError(
                f"Stage {stage} reads another text than the prompt, while another stage reads the token of a certain "
                "stage; make the prompt '*', or reset one of them."
            )

        return [entry(stage) for stage in range(self.num_stages)]

    def assign(self, other: Form) -> None:
        """Take over everything of another form."""
        for spec in fields(self):
            setattr(self, spec.name, copy.deepcopy(getattr(other, spec.name)))

    def restore(self, record: Mapping[str, Any], facts: ModelFacts) -> None:
        """Take over the record of an image, of this program or of its command line; or nothing of it.

        Raises:
            ValueError: a value cannot be used, by this model or at all.
        """
        known = {name.name for name in fields(Request)}
        given = {name: value for name, value in record.items() if name in known - {"preset"}}
        request = Request(**given)
        request.for_model(facts)
        refuse_unfetched(request.concepts)
        concepts = {name: str(file) for name, file in (request.concepts or {}).items()}
        self.lanes = [Lane(name, file, self.every_stage) for name, file in concepts.items()]
        self.settings = {
            spec.name: getattr(request, spec.name)
            for spec in fields(Request)
            if spec.name not in DERIVED and getattr(request, spec.name) != spec.default
        }
        self.own, self.prompt = {}, request.prompt
        if request.prospect_words is not None:
            self._restore_words(request.prompt, request.prospect_words, record.get("preset_prompt"))
        preset = record.get("preset")
        if preset in PRESETS and len(self.lanes) == 1 and not self.own:
            self.lanes[0].preset = preset

    def _restore_words(self, prompt: str, words: Words, preset_prompt: object) -> None:
        """Find the prompt and the lanes' stages that give these words, as far as there are such."""
        if any(word is None or isinstance(word, int) for word in words):
            self.own = {stage: word for stage, word in enumerate(words) if isinstance(word, int)}
            self.own |= {s: prompt.replace(PLACEHOLDER, word) for s, word in enumerate(words) if isinstance(word, str)}
            return
        texts = [prompt.replace(PLACEHOLDER, str(word)) for word in words]
        candidates = [preset_prompt] if isinstance(preset_prompt, str) else list(dict.fromkeys(texts))
        found = [(self._explained(base, texts), base) for base in candidates]
        self.own, self.prompt = min(found, key=lambda pair: len(pair[0]))  # the first of equals
        self._set_stages(self.prompt, texts)

    def _explained(self, base: str, texts: Sequence[str]) -> dict[int, Entry]:
        """The stages whose text is not `base` with some of the concepts."""
        variants = {_reading(base, inside) for inside in self._choices()}
        return {stage: text for stage, text in enumerate(texts) if text not in variants}

    def _set_stages(self, base: str, texts: Sequence[str]) -> None:
        for stage, text in enumerate(texts):
            matching = [inside for inside in self._choices() if _reading(base, inside) == text]
            for lane in self.lanes:
                if not matching or not matching[0][lane.placeholder]:
                    lane.stages.discard(stage)

    def _choices(self) -> Iterable[dict[str, bool]]:
        names = [lane.placeholder for lane in self.lanes]
        if len(names) > MOST_LANES:  # a stranger's image may name a hundred
            return [dict.fromkeys(names, True)]
        return (dict(zip(names, chosen, strict=True)) for chosen in product((True, False), repeat=len(names)))


def _reading(base: str, inside: Mapping[str, bool]) -> str:
    return with_only(base, inside) if inside else base
