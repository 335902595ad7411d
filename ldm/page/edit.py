"""The tab Edit: an image is inverted on the left, and edited by exchanging words of its prompt."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nicegui import ui
from nicegui.elements.mixins.value_element import ValueElement
from PIL import Image

from ldm.cli.edit import PNG_KEY, edit_inverted, pair, span, tau_name
from ldm.cli.flags import arguments_of
from ldm.cli.images import new_file
from ldm.editing.inversion import Progress
from ldm.editing.invert import AUTOENCODER, METHODS, PROMPT, PSNR, check_belongs, invert_image, rebuilt, word_masks
from ldm.editing.request import KINDS, TAUS, Edit, InversionOptions, grid_of
from ldm.embeddings import Concept, load_concept, save_new_concept
from ldm.files.images import image_info
from ldm.files.texts import slug
from ldm.page import parts, uploads
from ldm.page.engine import Engine, Job
from ldm.page.session import Session

POLL = 0.3
TITLES = {
    "tau_v": "Learned values (tau_v)",
    "tau_c": "Word attention (tau_c)",
    "tau_s": "Self-attention (tau_s)",
    "tau_u": "Unconditional (tau_u)",
}
MEANINGS = {
    name: " ".join(text.split()) for kind in (InversionOptions, Edit) for name, text in arguments_of(kind).items()
}


@dataclass(eq=False)
class InversionJob(Job):
    """Inverts an image; its concept is kept as a file."""

    image: Path = Path()
    prompt: str = ""
    method: str = ""
    options: InversionOptions = field(default_factory=InversionOptions)
    concept: Concept | None = None
    rebuilt: Image.Image | None = None

    @property
    def quality(self) -> str:
        """PSNR of the reconstruction, beside the autoencoder's own."""
        if self.concept is None:
            return ""
        own, best = (self.concept.metadata.get(key, "?")[:10] for key in (PSNR, AUTOENCODER))
        return f"reconstruction {own} dB, the autoencoder's own {best} dB"

    def do(self, engine: Engine) -> None:
        def after(state: Progress) -> None:
            self.count_step("Inverting: step")

        self.steps = self.options.steps * self.options.epochs
        found = invert_image(engine.model, self.image, self.prompt, self.method, self.options, progress=after)
        self.rebuilt, self.concept = rebuilt(engine.model, found), found
        self.files = [new_file(engine.outdir / f"{self.image.stem}-{self.method}", ".safetensors")]
        save_new_concept(found, self.files[0], force=True)


@dataclass(eq=False)
class EditJob(Job):
    """Edits an inverted image; several taus are a grid, the first of the files.

    Args:
        masks: word -> where it is in the image; of the words to blend.
    """

    inversion: InversionJob = field(default_factory=InversionJob)
    edits: list[Edit] = field(default_factory=list)
    masks: dict[str, Image.Image] = field(default_factory=dict)

    def do(self, engine: Engine) -> None:
        concept = self.inversion.concept
        assert concept is not None
        self.steps = len(concept.metadata["inversion.timesteps"].split(",")) * len(self.edits)
        if self.edits[0].blend is not None:
            found = word_masks(engine.model, concept, self.edits[0].blend[0])
            self.masks = {word: foreground for word, (foreground, _) in found.items()}
        image = self.inversion.image if self.inversion.image.is_file() else None

        def after(step: int, latents: object) -> None:
            self.count_step("Editing: step")

        stem = engine.outdir / slug(self.edits[0].target)
        *files, grid = edit_inverted(engine.model, concept, self.edits, stem, image, after)
        self.files = [grid, *files]


@dataclass
class EditForm:
    """What is filled in: texts, as the command line takes them, and the two jobs.

    Args:
        taus: several values, with spaces between them, make a grid.
        blend: OLD:NEW; several words with commas.
        weights: WORD=X; several with spaces between them.
    """

    image: Path | None = None
    prompt: str = ""
    method: str = next(iter(METHODS))
    steps: int = 30
    inner_steps: int = 30
    guidance_scale: float | None = None
    target: str = ""
    kind: str = KINDS[0]
    taus: dict[str, str] = field(default_factory=lambda: {name: f"{getattr(Edit, name):g}" for name in TAUS})
    blend: str = ""
    weights: str = ""
    inversion: InversionJob | None = None
    job: EditJob | None = None

    @property
    def shown(self) -> InversionJob | EditJob | None:
        """The edit, or the inversion where there is none yet, or a newer one."""
        return self.job if self.job is not None and self.job.inversion is self.inversion else self.inversion

    def restore(self, text: str) -> None:
        """Take over the record of an edited image.

        Raises:
            ValueError: a value cannot be used.
        """
        names = ("target", "kind", *TAUS, "blend", "weights")
        try:
            record = json.loads(text)
            edit = Edit(**{name: record[name] for name in names if name in record})
        except (TypeError, RecursionError, ValueError) as error:
            raise ValueError("The edit's record cannot be read; use another copy of the image.") from error
        self.target, self.kind, self.blend = edit.target, edit.kind, ":".join(map(",".join, edit.blend or ()))
        self.weights = " ".join(f"{word}={weight:g}" for word, weight in (edit.weights or {}).items())
        for name in TAUS:
            tau = getattr(edit, name)
            self.taus[name] = ":".join(f"{end:g}" for end in (tau if isinstance(tau, tuple) else (tau,)))

    def to_invert(self, engine: Engine) -> InversionJob:
        """Return the inversion of the image.

        Raises:
            ValueError: something is missing or cannot be used.
        """
        if self.image is None or not self.prompt.strip():
            raise ValueError("Choose the image to edit, and say what it shows: an edit exchanges words of this prompt.")
        scale = usual_scale(engine) if self.guidance_scale is None else self.guidance_scale
        options = InversionOptions(int(self.steps or 0), scale, inner_steps=int(self.inner_steps or 0))
        return InversionJob(image=self.image, prompt=self.prompt, method=self.method, options=options)

    def to_edit(self, engine: Engine) -> EditJob:
        """Return an edit of the inversion for each combination of taus.

        Raises:
            ValueError: there is no inversion, a text cannot be read, or words are not in the prompts.
        """
        if self.inversion is None or self.inversion.concept is None or not self.target.strip():
            raise ValueError("Invert the image first, and give the prompt of the edited one.")
        try:
            given: dict[str, Any] = {name: [span(tau) for tau in text.split()] for name, text in self.taus.items()}
            given["blend"] = pair(self.blend.strip()) if self.blend.strip() else None
        except argparse.ArgumentTypeError as error:
            raise ValueError(str(error)) from None
        given["weights"] = dict(weight(text) for text in self.weights.split())
        edits = grid_of(self.target, kind=self.kind, **{name: value for name, value in given.items() if value})
        for edit in edits:
            edit.check(self.inversion.concept.metadata[PROMPT], engine.facts.num_stages)
        return EditJob(inversion=self.inversion, edits=edits)


def usual_scale(engine: Engine) -> float:
    return min(InversionOptions.guidance_scale, engine.facts.scale)


def weight(text: str) -> tuple[str, float]:
    """The factor of a word: tiger=2."""
    word, sign, value = text.rpartition("=")
    try:
        return word, float(value if sign and word else "")
    except ValueError:
        raise ValueError(f"A weight is written WORD=X, as in blue=2, not '{text}'.") from None


class EditTab:
    """Builds itself into the open slot."""

    def __init__(self, session: Session) -> None:
        self.session, self.engine, self.form = session, session.engine, session.of(EditForm)
        self._watch: parts.Watch[InversionJob | EditJob] = parts.Watch(
            lambda: self.form.shown, self._show, POLL, "Nothing is inverted yet."
        )
        left, right = parts.columns()
        with left:
            self._build_inversion()
            self._build_edit()
        with right, parts.section("Result"):
            self._watch.status_label()
            self._watch.bar()
            self._watch.stop_button(self._invert, self._edit).mark("edit-stop")
            self._save = ui.link("Save the grid", "#").classes("button quiet")
            self._messages = parts.message_box()
            self._results = ui.element("div").classes("samples large")
        self._show_image()

    def _field(self, made: ValueElement, name: str, remark: str = "") -> None:
        made.bind_value(self.form.taus if name in TAUS else self.form, name).props(parts.LOOK).mark(f"edit-{name}")
        if name in MEANINGS:
            made.tooltip(MEANINGS[name] + remark)

    def _build_inversion(self) -> None:
        with parts.section("1. Invert an image", "learn what reconstructs it"):
            self._image = ui.element("div").classes("line")
            place = (self.engine.uploads, self.take, "edit-upload")
            with ui.element("div").classes("line"):
                uploads.button("Choose an image", *place, multiple=False, label="Choose an image to edit")
                parts.button("Take the one of Generate", self._take_generated)
            self._field(ui.input("What the image shows"), "prompt")
            with ui.element("div").classes("fields"):
                self._field(ui.select(list(METHODS), label="Method"), "method")
                self._field(ui.number("Steps"), "steps")
                self._field(ui.number("Optimiser steps"), "inner_steps")
                self._field(ui.number("Guidance scale", placeholder=f"{usual_scale(self.engine):g}"), "guidance_scale")
            with ui.element("div").classes("line"):
                self._invert = parts.button("Invert", self.invert, "primary alone").mark("invert")
                self._quality = ui.label().classes("soft")
            self._unfit = parts.problem_label()

    def _build_edit(self) -> None:
        with parts.section("2. Edit it", "words are exchanged, the rest stays"):
            self._field(ui.input("Target: what the edited image shows"), "target")
            with ui.element("div").classes("fields"):
                self._field(ui.select(list(KINDS), label="Kind"), "kind")
                for name in TAUS:
                    self._field(ui.input(TITLES[name]), name, "; several values make a grid")
                self._field(ui.input("Blend", placeholder="dog:tiger"), "blend")
                self._field(ui.input("Weights", placeholder="tiger=2"), "weights")
            with ui.element("div").classes("line"):
                self._edit = parts.button("Edit", self.edit, "primary alone").mark("edit")
            self._problem = parts.problem_label()

    def _take_generated(self) -> None:
        job = self.session.job
        if job is None or not job.files:
            parts.say("Generate has no image yet.", "info")
            return
        self.form.prompt = "" if job.request.concepts else job.request.prompt
        self.take(job.files[-1:])

    def take(self, paths: list[Path]) -> None:
        """Edit another image."""
        uploads.check_image(paths[0])
        self.form.image, self.form.inversion = paths[0], None
        self._show_image()

    def open(self, file: Path) -> None:
        """Restore the form of an edited image."""
        self.form.restore(str(image_info(file)[PNG_KEY]))
        self.session.tab = "Edit"

    def open_concept(self, file: Path) -> bool:
        """Take over an inversion; returns whether the concept is one."""
        with uploads.as_the_user_calls_it(file):
            concept = load_concept(file)
            if concept.method not in METHODS.values():
                return False
            check_belongs(concept, self.engine.model)
        image = rebuilt(self.engine.model, concept)
        self.form.inversion = InversionJob(state="done", files=[file], concept=concept, rebuilt=image)
        self.form.prompt, self.session.tab = concept.metadata[PROMPT], "Edit"
        return True

    def _show_image(self) -> None:
        self._image.clear()
        with self._image:
            if self.form.image is not None and self.form.image.is_file():
                parts.shown(parts.url_of(self.form.image), "The image to edit", "thumb large")
                ui.label(self.form.image.name)

    def invert(self) -> None:
        with parts.problems(self._unfit):
            self.form.inversion = self.engine.queue(self.form.to_invert(self.engine))
        self._watch.poll()

    def edit(self) -> None:
        with parts.problems(self._problem):
            self.form.job = self.engine.queue(self.form.to_edit(self.engine))
        self._watch.poll()

    def _show(self, job: InversionJob | EditJob | None) -> None:
        inversion = self.form.inversion
        self._quality.set_text(inversion.quality if inversion else "")
        parts.offer(self._save, job.files if isinstance(job, EditJob) else [])
        if job is None:
            return
        if job.error:
            (self._unfit if isinstance(job, InversionJob) else self._problem).set_text(job.error)
        parts.show_messages(self._messages, job.messages)
        if not job.is_running:
            self._show_results(job)

    def _show_results(self, job: InversionJob | EditJob) -> None:
        self._results.clear()
        with self._results:
            inversion = self.form.inversion
            if inversion is not None and inversion.rebuilt is not None:
                parts.figure(inversion.rebuilt, "the image, reconstructed by the autoencoder")
            if isinstance(job, EditJob):
                for word, mask in job.masks.items():
                    parts.figure(mask, f"where '{word}' is")
                for edit, file in zip(job.edits, job.files[1:], strict=False):
                    parts.figure(parts.url_of(file), tau_name(edit).replace("-", " "))
