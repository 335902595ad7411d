"""The tab Learn: images and a word on the left, the run and what it has come to on the right."""

from __future__ import annotations

import re
import shutil
from datetime import datetime
from functools import partial
from pathlib import Path
from uuid import uuid4

from nicegui import ui
from nicegui.elements.mixins.value_element import ValueElement
from nicegui.events import MultiUploadEventArguments

from ldm.page import chart, learning, uploads
from ldm.page.engine import Engine
from ldm.page.learning import LearnForm
from ldm.page.view import LOOK, View, button, file_button, progress_bar, say, section, shown, url_of

POLL = 1.0
LOGDIR = Path("logs") / "page"


class LearnTab:
    """Builds itself into the open slot."""

    def __init__(self, view: View) -> None:
        self.view, self.engine = view, view.session.engine
        self.form = view.session.learn
        self._seen: object = None
        with ui.element("div").classes("split even"):
            with ui.element("div").classes("stack"):
                self._build_form()
            with ui.element("div").classes("stack"):
                self._build_run()
        self._show_images()
        ui.timer(POLL, self._poll)
        self._poll()

    def _build_form(self) -> None:
        with section("Images", "one, or a few of the same thing"):
            self._images = ui.element("div").classes("tiles")
            upload = ui.upload(multiple=True, auto_upload=True, max_file_size=uploads.MOST_BYTES).mark("learn-upload")
            upload.on_multi_upload(self._take)
            with ui.element("div").classes("line"):
                file_button("Choose images", upload)
                ui.label("or drop them here").classes("soft")
        with section("Concept"):
            with ui.element("div").classes("fields"):
                self._field(ui.input("Name"), "name")
                word = self._field(ui.input("Starts from the word"), "init_word")
                word.tooltip("A word for what the images show; learning starts from its embedding.")
                self._field(ui.select(list(learning.METHODS), label="Method"), "method")
                self._field(ui.number("Steps", step=10), "steps")
            with ui.element("div").classes("line"):
                self._go = button("Learn", self.learn, "primary").mark("learn")
                self._stop = button("Stop", self.stop).mark("learn-stop")
                self._resume = button("Resume", self.resume).mark("learn-resume")
            self._problem = ui.label().classes("problem").props("role=alert")

    def _field(self, made: ValueElement, name: str) -> ValueElement:
        return made.bind_value(self.form, name).props(LOOK).mark(f"learn-{name}")

    def _build_run(self) -> None:
        with section("Run"):
            self._status = ui.label().classes("status").props("role=status")
            self._bar = progress_bar()
            self._use = button("Use in Generate", self.use, "primary").mark("use")
            self._curve = ui.html("", sanitize=False)
            self._bars = ui.html("", sanitize=False)
            self._samples = ui.element("div").classes("samples")

    # --- images ----------------------------------------------------------------------------------------------------

    async def _take(self, event: MultiUploadEventArguments) -> None:
        event.sender.run_method("reset")
        self.take(await uploads.keep(event.files, self.engine.uploads))

    def take(self, paths: list[Path]) -> None:
        """Add images to learn from; of those that are none the library's sentence is shown."""
        for path in paths:
            try:
                uploads.check_image(path)
            except ValueError as error:
                say(error)
            else:
                self.form.images.append(path)
        if self.form.images and not self.form.name:
            self.form.name = self.form.images[0].stem
        self._show_images()

    def _remove(self, path: Path) -> None:
        self.form.images.remove(path)
        self._show_images()

    def _show_images(self) -> None:
        self._images.clear()
        with self._images:
            for path in self.form.images:
                with ui.element("div").classes("tile"):
                    shown(url_of(path), path.name)
                    button("×", partial(self._remove, path), "quiet small corner", f"Remove {path.name}")

    # --- the run ---------------------------------------------------------------------------------------------------

    def learn(self) -> None:
        try:
            self.form.run = start(self.form, self.engine)
        except (ValueError, OSError) as error:
            self._problem.set_text(str(error))
            return
        self._problem.set_text("")
        self._poll()

    def stop(self) -> None:
        if self.form.run is not None:
            self.form.run.stop()
            self._status.set_text("Stopping after this step…")

    def resume(self) -> None:
        run = self.form.run
        if run is not None and not run.is_running:
            self.form.run = learning.resume(run.folder, int(self.form.steps or run.steps), run.output)
            self.engine.runs.append(self.form.run)
            self._poll()

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
        self._go.set_visibility(not running)
        self._stop.set_visibility(running)
        self._resume.set_visibility(run is not None and not running and (run.folder / "checkpoints").is_dir())
        self._use.set_visibility(run is not None and run.concept is not None)
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
        step = points[-1][0] if points else 0
        state = "Learning" if running else "Failed" if run.error else "Complete" if step >= run.steps else "Stopped"
        self._status.set_text(f"{state} · step {step} of {run.steps} · {run.folder}")
        self._problem.set_text(run.error)
        self._bar.set_visibility(True)
        self._bar.value = step / max(1, run.steps)
        self._curve.set_content(chart.curve(points, run.steps))
        self._bars.set_content(chart.bars(learning.stage_losses(run.folder), self.engine.facts.num_stages))
        self._samples.clear()
        with self._samples:
            for path in images[-4:]:
                number = re.search(r"gs-0*(\d+)", path.name)
                with ui.element("figure"):
                    shown(url_of(path), f"Samples after {number[1] if number else '?'} steps")
                    ui.label(f"after {number[1] if number else '?'} steps").classes("soft")


def start(form: LearnForm, engine: Engine) -> learning.Learning:
    """Start what the form says.

    Raises:
        ValueError: there is no image, or a number that cannot be used.
    """
    if not form.images:
        raise ValueError("Choose the images to learn from first.")
    if not form.steps or int(form.steps) < 1:
        raise ValueError("Steps must be a whole number of at least 1.")
    images = engine.uploads / uuid4().hex / "images"
    images.mkdir(parents=True)
    for number, path in enumerate(form.images):
        shutil.copyfile(path, images / f"{number}-{path.name}")
    stem = re.sub(r"\W+", "-", form.name).strip("-")[:60] or "concept"
    folder = LOGDIR / f"{stem}-{datetime.now():%Y-%m-%dT%H-%M-%S}"
    lesson = learning.Lesson(images, folder, form.init_word.strip(), form.method, int(form.steps))
    run = learning.learn(lesson, engine.setup, engine.uploads / f"{folder.name}.txt")
    engine.runs.append(run)
    return run
