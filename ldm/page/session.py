"""What one browser tab has open; it lasts over a reload, and no other tab sees it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ldm.page.compare import Comparison
from ldm.page.editing import EditForm
from ldm.page.engine import Engine, ImageJob
from ldm.page.exporting import ExportForm
from ldm.page.form import Form
from ldm.page.learning import METHODS, LearnForm
from ldm.request import FAST

FIRST_PROMPT = "a large * heart on a black background"  # for the small model, whose world has hearts
FIRST_CONCEPT, FIRST_PRESET = "dotted-star", "material"
FIRST_METHOD = "ProSpect, fast"  # which is as good there (docs/evidence.md)
OTHER_PROMPT = "a photo of a cat"


@dataclass
class CompareForm:
    """What is filled in on the tab Compare (the kind that varies, and its values), and the grid that is made."""

    rows: tuple[str, str] = ("Preset", "")
    columns: tuple[str, str] = ("Seed", "")
    run: Comparison | None = None


@dataclass
class Session:
    """What a tab holds.

    Args:
        uploaded: concept files that were handed in.
        history: images that were made, the latest first.
    """

    engine: Engine
    form: Form
    job: ImageJob | None = None
    uploaded: list[str] = field(default_factory=list)
    history: list[Path] = field(default_factory=list)
    learn: LearnForm = field(default_factory=LearnForm)
    compare: CompareForm = field(default_factory=CompareForm)
    export: ExportForm = field(default_factory=ExportForm)
    edit: EditForm = field(default_factory=EditForm)
    tab: str = "Generate"
    dark: bool | None = None

    @classmethod
    def start(cls, engine: Engine) -> Session:
        form = Form(engine.facts.num_stages, settings=dict(FAST))
        first = next((file for file in engine.concepts() if Path(file).stem == FIRST_CONCEPT), None)
        form.prompt = OTHER_PROMPT if first is None else FIRST_PROMPT
        if first is not None:
            form.set_preset(form.add_concept(first), FIRST_PRESET, engine.windows)
        method = FIRST_METHOD if first is not None and FIRST_METHOD in engine.methods else next(iter(METHODS))
        return cls(engine, form, learn=LearnForm(method=method, steps=engine.methods.get(method)))
