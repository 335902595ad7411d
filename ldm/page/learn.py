"""The tab Learn: images and a word on the left, the run and what it has come to on the right."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from nicegui import ui
from nicegui.elements.mixins.value_element import ValueElement

from ldm.page import chart, learning, parts, uploads
from ldm.page.generate import GenerateTab
from ldm.page.learning import LearnForm, Learning
from ldm.page.session import Session

POLL = 1.0
MOST_UNFINISHED = 5


class LearnTab:
    """Builds itself into the open slot."""

    def __init__(self, session: Session, generate: GenerateTab) -> None:
        self.session, self.engine, self.generate, self.form = session, session.engine, generate, session.of(LearnForm)
        self._listed_for: object = self  # the state that the list of unfinished runs was made for
        self._watch = parts.Watch(lambda: self.form.run, self._show, POLL, "Nothing is being learned.")
        left, right = parts.columns()
        with left:
            self._build_images()
            self._build_concept()
        with right, parts.section("Run"):
            self._watch.status_label()
            self._bar = self._watch.bar()
            self._use = parts.button("Use in Generate", self.use, "primary").mark("use")
            self._curve = ui.html("", sanitize=False)
            self._bars = ui.html("", sanitize=False)
            self._samples = ui.element("div").classes("samples")
            self._unfinished = ui.element("div").classes("line").props('role=group aria-label="Unfinished runs"')
        self._show_images()

    def _build_images(self) -> None:
        with parts.section("Images", "one, or a few of the same thing"):
            self._images = ui.element("div").classes("tiles")
            with ui.element("div").classes("line"):
                self._choose = uploads.button("Choose images", self.engine.uploads, self.take, "learn-upload")
                ui.label("or drop them here").classes("soft")

    def _build_concept(self) -> None:
        methods = self.engine.methods
        with parts.section("Concept"):
            with ui.element("div").classes("fields roomy"):
                self._field(ui.input("Name"), "name")
                word = self._field(ui.input("Initial word", placeholder="thing"), "init_word")
                word.tooltip("A word for what the images show; learning starts from its embedding.")
                method = self._field(ui.select(list(methods or learning.METHODS), label="Method"), "method")
                steps = self._field(ui.number("Steps", step=10), "steps")
                method.on_value_change(lambda event: steps.set_value(methods.get(event.value)))
                caption = self._field(ui.input("Caption", placeholder="*").classes("wide"), "caption")
                caption.tooltip("What the images show, with * for the concept; what is named here is not learned.")
            with ui.element("div").classes("line"):
                go = parts.button("Learn", self.learn, "primary").mark("learn")
                self._watch.stop_button(go).mark("learn-stop")
                self._resume = parts.button("Resume", self.resume).mark("learn-resume")
            self._problem = parts.problem_label()

    def _field(self, made: ValueElement, name: str) -> ValueElement:
        return made.bind_value(self.form, name).props(parts.LOOK).mark(f"learn-{name}")

    def take(self, paths: list[Path]) -> None:
        """Add images to learn from; of those that are none the library's sentence is shown."""
        for path in paths:
            with parts.problems():
                uploads.check_image(path)
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
            self._follow(self.form.start(self.engine.setup, self.engine.trust))

    def resume(self) -> None:
        run = self.form.run
        if run is not None and not run.is_running:
            self._follow(run.resumed(int(self.form.steps or run.steps), self.engine.trust))

    def _follow(self, run: Learning) -> None:
        """Show a run, to be stopped or resumed."""
        self.form.run, self.form.steps = run, run.steps
        self.engine.runs[run.folder] = run
        self._watch.poll()

    def use(self) -> None:
        """Read the learned concept in every stage of the prompt that Generate has."""
        if self.form.run is not None and self.form.run.concept is not None:
            form = self.session.form
            form.lanes, form.own = [], {}
            form.add_concept(str(self.form.run.concept))
            self.generate.show_form(form)

    def _show(self, run: Learning | None) -> None:
        is_over = run is not None and not run.is_running
        self._resume.set_visibility(run is not None and is_over and (run.folder / "checkpoints").is_dir())
        self._use.set_visibility(run is not None and run.concept is not None)
        self._bar.set_visibility(run is not None)
        if self._listed_for != (run, is_over):
            self._listed_for = (run, is_over)
            self._show_unfinished(run)
        if run is None:
            return
        self._problem.set_text(run.error)
        self._curve.set_content(chart.curve(run.losses(), run.steps))
        self._bars.set_content(chart.bars(run.stage_losses(), self.engine.facts.num_stages))
        self._samples.clear()
        with self._samples:
            for path in run.samples()[-4:]:
                [step] = re.findall(r"gs-0*(\d+)", path.name)
                parts.figure(parts.url_of(path), f"after {step} steps")

    def _show_unfinished(self, shown: Learning | None) -> None:
        """Runs of other tabs, and of pages that have ended."""
        runs = [self.engine.runs.get(run.folder, run) for run in learning.unfinished()]
        others = [run for run in runs if shown is None or run.folder != shown.folder]
        self._unfinished.clear()
        with self._unfinished:
            if others:
                ui.label("Unfinished runs").classes("soft")
            for run in others[:MOST_UNFINISHED]:
                state = "running" if run.is_running else f"step {run.step} of {run.steps}"
                made = parts.button(f"{run.folder.name} · {state}", partial(self._follow, run), "quiet small")
                made.mark("unfinished")
