"""The tab Learn: images and a word on the left, the run and what it has come to on the right."""

from __future__ import annotations

import re
import shutil
from datetime import datetime
from functools import partial
from pathlib import Path

from nicegui import ui
from nicegui.elements.mixins.value_element import ValueElement

from ldm.page import chart, learning, parts, uploads
from ldm.page.engine import Engine
from ldm.page.learning import LearnForm
from ldm.page.view import View

POLL = 1.0
LOGDIR = Path("logs") / "page"
MOST_UNFINISHED = 5


class LearnTab:
    """Builds itself into the open slot."""

    def __init__(self, view: View) -> None:
        self.view, self.engine = view, view.session.engine
        self.form = view.session.learn
        self._seen: object = None
        self._was_running: bool | None = None
        with ui.element("div").classes("split even"):
            with ui.element("div").classes("stack"):
                self._build_form()
            with ui.element("div").classes("stack"):
                self._build_run()
        self._show_images()
        ui.timer(POLL, self._poll)
        self._poll()

    def _build_form(self) -> None:
        with parts.section("Images", "one, or a few of the same thing"):
            self._images = ui.element("div").classes("tiles")
            upload = uploads.upload(self.engine.uploads, self.take, multiple=True).mark("learn-upload")
            with ui.element("div").classes("line"):
                self._choose = parts.file_button("Choose images", upload)
                ui.label("or drop them here").classes("soft")
        with parts.section("Concept"):
            with ui.element("div").classes("fields roomy"):
                self._field(ui.input("Name"), "name")
                word = self._field(ui.input("Initial word", placeholder="thing"), "init_word")
                word.tooltip("A word for what the images show; learning starts from its embedding.")
                names = list(self.engine.methods) or list(learning.METHODS)
                method = self._field(ui.select(names, label="Method"), "method")
                steps = self._field(ui.number("Steps", step=10), "steps")
                method.on_value_change(lambda event: steps.set_value(self.engine.methods.get(event.value)))
                caption = self._field(ui.input("Caption", placeholder="*").classes("wide"), "caption")
                caption.tooltip("What the images show, with * for the concept; what is named here is not learned.")
            with ui.element("div").classes("line"):
                go = parts.button("Learn", self.learn, "primary").mark("learn")
                self._switch = parts.Switch(parts.button("Stop", self.stop).mark("learn-stop"), go)
                self._resume = parts.button("Resume", self.resume).mark("learn-resume")
            self._problem = ui.label().classes("problem").props("role=alert")

    def _field(self, made: ValueElement, name: str) -> ValueElement:
        return made.bind_value(self.form, name).props(parts.LOOK).mark(f"learn-{name}")

    def _build_run(self) -> None:
        with parts.section("Run"):
            self._status = ui.label().classes("status").props("role=status")
            self._bar = parts.progress_bar()
            self._use = parts.button("Use in Generate", self.use, "primary").mark("use")
            self._curve = ui.html("", sanitize=False)
            self._bars = ui.html("", sanitize=False)
            self._samples = ui.element("div").classes("samples")
            self._unfinished = ui.element("div").classes("line").props('role=group aria-label="Unfinished runs"')

    def take(self, paths: list[Path]) -> None:
        """Add images to learn from; of those that are none the library's sentence is shown."""
        for path in paths:
            try:
                uploads.check_image(path)
            except ValueError as error:
                parts.say(error)
            else:
                self.form.images.append(path)
        if self.form.images and not self.form.name:
            self.form.name = self.form.images[0].stem
        self._show_images()

    def _remove(self, path: Path) -> None:
        ui.run_javascript(parts.TAKE_FOCUS % self._choose.id)
        self.form.images.remove(path)
        self._show_images()

    def _show_images(self) -> None:
        self._images.clear()
        with self._images:
            for path in self.form.images:
                with ui.element("div").classes("tile"):
                    parts.shown(parts.url_of(path), path.name)
                    parts.button("×", partial(self._remove, path), "quiet small corner", f"Remove {path.name}")

    def learn(self) -> None:
        with parts.problems(self._problem):
            self.form.run = start(self.form, self.engine)
        self._poll()

    def stop(self) -> None:
        if self.form.run is not None:
            self.form.run.stop()
            self._status.set_text("Stopping after this step…")

    def resume(self) -> None:
        run = self.form.run
        if run is not None and not run.is_running:
            self.form.run = learning.resume(run, int(self.form.steps or run.steps), self.engine.trust)
            self.engine.runs[run.folder] = self.form.run
            self._poll()

    def open(self, run: learning.Learning) -> None:
        """Show a run, to be stopped or resumed."""
        self.form.run, self.form.steps = run, run.steps
        self.engine.runs[run.folder] = run
        self._poll()

    def _show_unfinished(self) -> None:
        """Those of other tabs, and of pages that have ended."""
        shown = self.form.run.folder if self.form.run else None
        runs = [self.engine.runs.get(run.folder, run) for run in learning.unfinished(LOGDIR) if run.folder != shown]
        self._unfinished.clear()
        with self._unfinished:
            if runs:
                ui.label("Unfinished runs").classes("soft")
            for run in runs[:MOST_UNFINISHED]:
                state = "running" if run.is_running else f"step {run.step} of {run.steps}"
                parts.button(f"{run.folder.name} · {state}", partial(self.open, run), "quiet small").mark("unfinished")

    def use(self) -> None:
        """Read the learned concept in every stage of the prompt that Generate has."""
        run, form = self.form.run, self.view.session.form
        if run is None or run.concept is None:
            return
        del form.lanes[:]
        form.own.clear()
        form.add_concept(str(run.concept))
        self.view.form_changed()
        self.view.show("Generate")

    def _poll(self) -> None:
        run = self.form.run
        running = run is not None and run.is_running
        self._switch.set(running)
        self._resume.set_visibility(run is not None and not running and (run.folder / "checkpoints").is_dir())
        self._use.set_visibility(run is not None and run.concept is not None)
        if running is not self._was_running:
            self._was_running = running
            self._show_unfinished()
        if run is None:
            self._status.set_text("Nothing is being learned.")
            self._bar.set_visibility(False)
            return
        points, images = learning.losses(run.folder), learning.samples(run.folder)
        seen = (run, running, len(points), len(images))
        if seen == self._seen:
            return
        self._seen = seen
        self._show(run, running, points, images)

    def _show(self, run: learning.Learning, running: bool, points: list[tuple[int, float]], images: list[Path]) -> None:
        last = run.step
        state = "Failed" if run.error else "Complete" if last >= run.steps else "Stopped"
        if running:
            state = "Learning" if points else "Starting…"
        self._status.set_text(f"{state} · step {last} of {run.steps} · {run.folder}")
        self._problem.set_text(run.error)
        self._bar.set_visibility(True)
        self._bar.value = last / max(1, run.steps)
        self._curve.set_content(chart.curve(points, run.steps))
        self._bars.set_content(chart.bars(learning.stage_losses(run.folder), self.engine.facts.num_stages))
        self._samples.clear()
        with self._samples:
            for path in images[-4:]:
                [step] = re.findall(r"gs-0*(\d+)", path.name)
                parts.figure(parts.url_of(path), f"after {step} steps")


def start(form: LearnForm, engine: Engine) -> learning.Learning:
    """Start what the form says.

    Raises:
        ValueError: there is no image, or a number that cannot be used.
    """
    if not form.images:
        raise ValueError("Choose the images to learn from first.")
    if not form.steps or int(form.steps) < 1:
        raise ValueError("Steps must be a whole number of at least 1.")
    stem = re.sub(r"\W+", "-", form.name).strip("-")[:60] or "concept"
    folder = LOGDIR / f"{stem}-{datetime.now():%Y-%m-%dT%H-%M-%S}"
    images = learning.given(folder) / "images"
    images.mkdir(parents=True)
    for number, path in enumerate(form.images):
        shutil.copyfile(path, images / f"{number}-{path.name}")
    form.steps = int(form.steps)  # which a number's input has made a fraction
    words = learning.command(form, images, folder, engine.setup, engine.trust)
    run = learning.start(words, folder, form.steps)
    engine.runs[folder] = run
    return run
