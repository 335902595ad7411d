"""What a user has filled in: a prompt, a lane for each concept, the text of each stage and the other settings.

The form knows no browser. It becomes a `Request`, and it is restored from the record in a PNG.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from itertools import chain, count, groupby, product
from pathlib import Path
from typing import Any

from ldm.conditioning.presets import Windows, preset_stages, with_only
from ldm.files.hub import refuse_unfetched
from ldm.files.texts import slug
from ldm.request import PLACEHOLDER, PRESETS, ModelFacts, Request, Words

# Fields that the prompt, the lanes and the timeline decide; all others are settings.
DERIVED = ("prompt", "prospect_words", "preset", "concepts")
MOST_LANES = 6
MOST_NAME = 30  # characters of a placeholder


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
        own: stage -> what it reads in place of the prompt: a text, or the stage whose learned token stands for `*`.
        settings: fields of `Request` that differ from their defaults.
    """

    num_stages: int = 10
    prompt: str = ""
    lanes: list[Lane] = field(default_factory=list)
    own: dict[int, str | int] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def every_stage(self) -> set[int]:
        return set(range(self.num_stages))

    @property
    def scales(self) -> Sequence[float] | None:
        """The guidance scale of each stage; None where one holds for all."""
        found = self.settings.get("scale")
        return found if isinstance(found, Sequence) else None

    def add_concept(self, file: str) -> Lane:
        """Add a lane, called `*` or, where that is taken, like the file; all stages read it."""
        name = slug(Path(file).stem)[:MOST_NAME]
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

    def groups(self, selected: Collection[int] = ()) -> list[list[int]]:
        """Runs of stages that read the same and are all selected or all not, the start of generation first."""
        stages = reversed(range(self.num_stages))
        keyed = groupby(stages, key=lambda s: (self.text(s), isinstance(self.own.get(s), int), s in selected))
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
        if any(isinstance(own, int) for own in self.own.values()):
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
            what = f"Stage {stage} reads another text than the prompt, while another reads the token of a certain stage"
            raise ValueError(f"{what}; make the prompt '*', or reset one of them.")

        return [entry(stage) for stage in range(self.num_stages)]

    @classmethod
    def restored(cls, record: Mapping[str, Any], facts: ModelFacts) -> Form:
        """Return the form of an image by its record, of this program or of its command line.

        Raises:
            ValueError: a value cannot be used, by this model or at all.
        """
        known = {spec.name for spec in fields(Request)} - {"preset"}
        request = Request(**{name: value for name, value in record.items() if name in known})
        request.for_model(facts)
        refuse_unfetched(request.concepts)
        form = cls(facts.num_stages, request.prompt)
        form.lanes = [Lane(name, str(file), form.every_stage) for name, file in (request.concepts or {}).items()]
        form.settings = {
            spec.name: getattr(request, spec.name)
            for spec in fields(Request)
            if spec.name not in DERIVED and getattr(request, spec.name) != spec.default
        }
        if request.prospect_words is not None:
            form._restore_words(request.prospect_words, record.get("preset_prompt"))
        preset = record.get("preset")
        if preset in PRESETS and len(form.lanes) == 1 and not form.own:
            form.lanes[0].preset = preset
        return form

    def _restore_words(self, words: Words, preset_prompt: object) -> None:
        """Find the prompt and the lanes' stages that give these words, as far as there are such."""
        texts = {s: self.prompt.replace(PLACEHOLDER, word) for s, word in enumerate(words) if isinstance(word, str)}
        if len(texts) < len(words):
            self.own = texts | {stage: word for stage, word in enumerate(words) if isinstance(word, int)}
            return
        count = len(self.lanes)
        # a stranger's image may name a hundred
        choices = product((True, False), repeat=count) if count <= MOST_LANES else [(True,) * count]
        inside = [
            {lane.placeholder: is_in for lane, is_in in zip(self.lanes, choice, strict=True)} for choice in choices
        ]

        def readings(base: str) -> dict[str, dict[str, bool]]:
            """Text -> the concepts in it, of all texts that are `base` with some of the concepts."""
            return {with_only(base, chosen) if chosen else base: chosen for chosen in reversed(inside)}

        bases = [preset_prompt] if isinstance(preset_prompt, str) else dict.fromkeys(texts.values())
        found = [(base, readings(base)) for base in bases]
        self.prompt, known = min(found, key=lambda pair: sum(text not in pair[1] for text in texts.values()))
        self.own = {stage: text for stage, text in texts.items() if text not in known}
        for lane in self.lanes:
            lane.stages = {stage for stage, text in texts.items() if known.get(text, {}).get(lane.placeholder)}


def as_number(text: str) -> int | float | str:
    """A text as the number that it is; where it is none, the request says so."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text
