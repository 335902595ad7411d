"""The tab Edit: an image is inverted on the left, and edited by exchanging words of its prompt."""

from __future__ import annotations

from pathlib import Path

from nicegui import ui
from nicegui.elements.mixins.value_element import ValueElement

from ldm.cli.edit import tau_name
from ldm.cli.flags import arguments_of
from ldm.editing.invert import METHODS
from ldm.editing.request import KINDS, TAUS, Edit, InversionOptions
from ldm.page import parts, uploads
from ldm.page.editing import EditJob, InversionJob, start_edit, start_inversion
from ldm.page.engine import Job
from ldm.page.view import View

POLL = 0.3
TITLES = {
    "tau_v": "Learned values (tau_v)",
    "tau_c": "Word attention (tau_c)",
    "tau_s": "Self-attention (tau_s)",
    "tau_u": "Unconditional (tau_u)",
}


class EditTab:
    """Builds itself into the open slot."""

    def __init__(self, view: View) -> None:
        self.view, self.engine, self.form = view, view.session.engine, view.session.edit
        self._seen: object = None
        with ui.element("div").classes("split even"):
            with ui.element("div").classes("stack"):
                self._build_inversion()
                self._build_edit()
            with ui.element("div").classes("stack"), parts.section("Result"):
                self._status = ui.label().classes("status").props("role=status")
                self._bar = parts.progress_bar()
                stop = parts.button("Stop", self.stop).mark("edit-stop")
                self._switch = parts.Switch(stop, self._invert, self._edit)
                self._save = ui.link("Save the grid", "#").classes("button quiet")
                self._messages = ui.element("div").classes("messages").props("aria-live=polite")
                self._results = ui.element("div").classes("samples large")
        self._show_image()
        ui.timer(POLL, self._poll)
        self._poll()

    def _field(self, made: ValueElement, name: str, meaning: str = "") -> None:
        made.bind_value(self.form, name).props(parts.LOOK).mark(f"edit-{name}")
        if meaning:
            made.tooltip(" ".join(meaning.split()))

    def _build_inversion(self) -> None:
        meanings = arguments_of(InversionOptions)
        with parts.section("1. Invert an image", "learn what reconstructs it"):
            self._image = ui.element("div").classes("line")
            upload = uploads.upload(self.engine.uploads, self.take).mark("edit-upload")
            with ui.element("div").classes("line"):
                parts.file_button("Choose an image", upload, "Choose an image to edit")
                parts.button("Take the one of Generate", self._take_generated)
            self._field(ui.input("What the image shows"), "prompt")
            with ui.element("div").classes("fields"):
                self._field(ui.select(list(METHODS), label="Method"), "method")
                self._field(ui.number("Steps"), "steps", meanings["steps"])
                self._field(ui.number("Optimiser steps"), "inner_steps", meanings["inner_steps"])
                scale = ui.number("Guidance scale", placeholder=f"{min(7.5, self.engine.facts.scale):g}")
                self._field(scale, "guidance_scale", meanings["guidance_scale"])
            with ui.element("div").classes("line"):
                self._invert = parts.button("Invert", self.invert, "primary alone").mark("invert")
                self._quality = ui.label().classes("soft")
            self._unfit = ui.label().classes("problem").props("role=alert")

    def _build_edit(self) -> None:
        meanings = arguments_of(Edit)
        with parts.section("2. Edit it", "words are exchanged, the rest stays"):
            self._field(ui.input("Target: what the edited image shows"), "target", meanings["target"])
            with ui.element("div").classes("fields"):
                self._field(ui.select(list(KINDS), label="Kind"), "kind", meanings["kind"])
                for name in TAUS:
                    made = ui.input(TITLES[name]).props(parts.LOOK).mark(f"edit-{name}")
                    made.bind_value(self.form.taus, name)
                    made.tooltip(f"{' '.join(meanings[name].split())}; several values make a grid")
                self._field(ui.input("Blend", placeholder="dog:tiger"), "blend", meanings["blend"])
                self._field(ui.input("Weights", placeholder="tiger=2"), "weights", meanings["weights"])
            with ui.element("div").classes("line"):
                self._edit = parts.button("Edit", self.edit, "primary alone").mark("edit")
            self._problem = ui.label().classes("problem").props("role=alert")

    def _take_generated(self) -> None:
        job = self.view.session.job
        if job is None or not job.files:
            parts.say("Generate has no image yet.", "info")
            return
        self.form.prompt = "" if job.request.concepts else job.request.prompt
        self.take(job.files[-1:])

    def take(self, paths: list[Path]) -> None:
        """Edit another image.

        Raises:
            ValueError: the file is no image.
        """
        uploads.check_image(paths[0])
        self.form.image, self.form.inversion = paths[0], None
        self._show_image()

    def _show_image(self) -> None:
        self._image.clear()
        with self._image:
            if self.form.image is not None and self.form.image.is_file():
                parts.shown(parts.url_of(self.form.image), "The image to edit", "thumb large")
                ui.label(self.form.image.name)

    @property
    def job(self) -> Job | None:
        """The one that is shown: the edit, or the inversion where there is none yet, or a newer one."""
        inversion, edit = self.form.inversion, self.form.job
        return edit if edit is not None and edit.inversion is inversion else inversion

    def invert(self) -> None:
        with parts.problems(self._unfit):
            self.form.inversion = start_inversion(self.form, self.engine)

    def edit(self) -> None:
        with parts.problems(self._problem):
            self.form.job = start_edit(self.form, self.engine)

    def stop(self) -> None:
        if self.job is not None:
            self.job.stop()

    def _poll(self) -> None:
        job = self.job
        seen = (job, -1 if job is None else job.version)
        if seen == self._seen:
            return
        self._seen = seen
        running = job is not None and not job.is_over
        self._switch.set(running)
        self._bar.set_visibility(running)
        self._save.set_visibility(isinstance(job, EditJob) and bool(job.files))
        self._quality.set_text(self.form.inversion.quality if self.form.inversion else "")
        self._status.set_text("Nothing is inverted yet." if job is None else status_of(job))
        if job is not None:
            self._show(job)

    def _show(self, job: Job) -> None:
        self._bar.value = job.step / max(1, job.steps)
        if job.error:
            (self._unfit if isinstance(job, InversionJob) else self._problem).set_text(job.error)
        parts.show_messages(self._messages, job.messages)
        if job.is_over:
            self._show_results(job)

    def _show_results(self, job: Job) -> None:
        self._results.clear()
        with self._results:
            inversion = self.form.inversion
            if inversion is not None and inversion.rebuilt is not None:
                parts.figure(inversion.rebuilt, "the image, reconstructed by the autoencoder")
            if isinstance(job, EditJob):
                for word, mask in job.masks.items():
                    parts.figure(mask, f"where '{word}' is")
                for edit, file in zip(job.edits, job.files[:-1], strict=False):
                    parts.figure(parts.url_of(file), tau_name(edit).replace("-", " "))
                if job.files:
                    parts.offer(self._save, job.files[-1])


def status_of(job: Job) -> str:
    """Where a job is, in a line."""
    what = "Inverting" if isinstance(job, InversionJob) else "Editing"
    return job.status(f"{what}: step {job.step} of {job.steps}", "Done", job.files[-1:])
