"""What one browser tab has open; it lasts over a reload, and no other tab sees it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ldm.page.engine import Engine, ImageJob
from ldm.page.form import Form
from ldm.page.learning import METHODS, LearnForm
from ldm.request import FAST

FIRST_PROMPT = "a large * heart on a black background"  # for the small model, whose world has hearts
FIRST_CONCEPT, FIRST_PRESET = "dotted-star", "material"
FIRST_METHOD = "ProSpect, fast"  # which is as good there (docs/evidence.md)
OTHER_PROMPT = "a photo of a cat"
State = TypeVar("State")


@dataclass
class Session:
    """What a browser tab holds.

    Args:
        job: whose image Generate shows.
        uploaded: concept files that were handed in.
        history: images that were made, the latest first.
        tab: the one that is shown.
    """

    engine: Engine
    form: Form
    job: ImageJob | None = None
    uploaded: list[str] = field(default_factory=list)
    history: list[Path] = field(default_factory=list)
    tab: str = "Generate"
    dark: bool | None = None
    states: dict[type, Any] = field(default_factory=dict)

    @classmethod
    def start(cls, engine: Engine) -> Session:
        form = Form(engine.facts.num_stages, settings=dict(FAST))
        first = next((file for file in engine.concepts() if Path(file).stem == FIRST_CONCEPT), None)
        form.prompt = OTHER_PROMPT if first is None else FIRST_PROMPT
        if first is not None:
            form.set_preset(form.add_concept(first), FIRST_PRESET, engine.windows)
        method = FIRST_METHOD if first is not None and FIRST_METHOD in engine.methods else next(iter(METHODS))
        return cls(engine, form, states={LearnForm: LearnForm(method=method, steps=engine.methods.get(method))})

    def of(self, kind: type[State]) -> State:
        """What one of the page's tabs keeps: the only object of its class."""
        found: State = self.states.setdefault(kind, kind())
        return found

    def concepts(self) -> dict[str, str]:
        """File -> what it is called, of the concepts that can be chosen."""
        return self.engine.concepts(self.uploaded)
