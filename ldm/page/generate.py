"""The tab Generate: prompt, concepts, timeline and settings on the left, the image on the right."""

from __future__ import annotations

import random
from contextlib import suppress
from functools import partial
from pathlib import Path

from nicegui import ui
from nicegui.events import ValueChangeEventArguments

from ldm.files.records import read_parameters
from ldm.page import parts, uploads
from ldm.page.engine import ImageJob
from ldm.page.fields import SPECS, Fields
from ldm.page.form import Form, Lane
from ldm.page.session import Session
from ldm.page.timeline import Timeline

POLL = 0.15  # seconds between two looks at a running job
MAIN = ("seed", "ddim_steps", "scale", "sampler", "width", "height")
EDITING = ("strength", "resize")
ELSEWHERE = ("prompt", "prospect_words", "preset", "concepts", "content_dir", "negative_prompt", "layer_words")
MOST_HISTORY = 24


class GenerateTab:
    """Builds itself into the open slot."""

    def __init__(self, session: Session) -> None:
        self.session, self.engine = session, session.engine
        self._fields = Fields(session, self._changed)
        self._watch = parts.Watch(lambda: session.job, self._show, POLL)
        with ui.element("div").classes("split").on("keydown.ctrl.enter", self.generate) as split:
            split.on("keydown.meta.enter", self.generate)
            with ui.element("div").classes("stack"):
                self._build_prompt()
                self._build_stages()
                self._build_settings()
            with ui.element("div").classes("stack result"):
                self._build_result()
        self.refresh()

    def _build_prompt(self) -> None:
        with parts.section("Prompt").classes("prompt-panel"):
            self._prompt = ui.textarea(on_change=self._write_prompt).mark("prompt").classes("prompt")
            self._prompt.props('outlined autogrow aria-label="Prompt" placeholder="What is shown; * is the concept"')
            self._fields.add("negative_prompt")

    def _build_stages(self) -> None:
        with parts.section("Stages", "which stages read the concept, and what text"):
            with ui.element("div").classes("line concepts-line"):
                self._concepts = ui.element("div").classes("concepts")
                self._add = parts.button("Add a concept", self._add_concept).mark("add-concept")
                place = (self.engine.uploads, self.take_concepts, "concept-upload")
                uploads.button("Upload…", *place, label="Upload a concept file")
            self.timeline = Timeline(self.session, self._changed)

    def _build_settings(self) -> None:
        with parts.section("Settings"):
            with ui.element("div").classes("fields"):
                for name in MAIN:
                    self._fields.add(name)
                with self._fields.inputs["seed"].add_slot("append"):
                    dice = ui.button(icon="casino", on_click=self._new_seed).mark("new-seed")
                    dice.props('flat dense round size=sm aria-label="New seed"')
            self._by_stage = parts.button("Guidance by stage", self._switch_scales, "chip").mark("scales")
            with ui.expansion("Start from an image").classes("more"):
                self._content = ui.element("div").classes("line")
                uploads.button(
                    "Choose an image", self.engine.uploads, self.take_content, "content-upload", multiple=False
                )
                with ui.element("div").classes("fields"):
                    for name in EDITING:
                        self._fields.add(name)
            with ui.expansion("More").classes("more"), ui.element("div").classes("fields"):
                for name in SPECS:
                    if name not in (*MAIN, *EDITING, *ELSEWHERE):
                        self._fields.add(name)

    def _build_result(self) -> None:
        with ui.element("section").classes("panel canvas").props('aria-label="Image"'):
            with ui.element("div").classes("picture"):
                self._image = ui.image().props('alt="The generated image" fit=contain no-spinner no-transition')
                empty = ui.label("The image appears here.").classes("soft empty")
                empty.bind_visibility_from(self._image, "source", value="")
            self._watch.bar()
            self._watch.status_label()
            with ui.element("div").classes("actions"):
                go = parts.button("Generate", self.generate, "primary").mark("generate")
                self._watch.stop_button(go).mark("stop")
                self._save = ui.link("Save", "#").classes("button quiet").mark("save")
            self._problem = parts.problem_label()
            self._messages = parts.message_box()
        with ui.element("section").classes("panel").props('aria-label="Made in this tab"'):
            self._history = ui.element("div").classes("history")
        self._show_history()

    def refresh(self) -> None:
        """Show the form, which something else has changed."""
        self._prompt.value = self.session.form.prompt
        self._fields.refresh()
        parts.press(self._by_stage, self.session.form.scales is not None)
        self._show_concepts()
        self._show_content()
        self.timeline.rebuild()
        self._changed()

    def _changed(self) -> None:
        """Say at once what cannot be done."""
        with parts.problems(self._problem):
            self.session.form.request().for_model(self.engine.facts)

    def _write_prompt(self, event: ValueChangeEventArguments) -> None:
        if (text := event.value or "") == self.session.form.prompt:
            return  # it is what `refresh` has written
        self.session.form.prompt = text
        self.timeline.refresh()
        self._changed()

    def _switch_scales(self) -> None:
        """One guidance scale for all stages, or one for each."""
        form = self.session.form
        if form.scales is None:
            form.settings["scale"] = (form.settings.get("scale", self.engine.facts.scale),) * form.num_stages
        else:
            del form.settings["scale"]
        self.refresh()

    def _new_seed(self) -> None:
        self.session.form.settings["seed"] = random.randrange(2**31)
        self._fields.refresh()
        self._changed()

    # --- concepts and the image to start from ---------------------------------------------------------------------

    def _show_concepts(self) -> None:
        self._concepts.clear()
        known = self.session.concepts()
        with self._concepts:
            for number, lane in enumerate(self.session.form.lanes, start=1):
                self._build_concept(number, lane, {lane.file: Path(lane.file).stem} | known)
            if not self.session.form.lanes:
                ui.label("No concept: the prompt alone says what the image shows.").classes("soft")

    def _build_concept(self, number: int, lane: Lane, known: dict[str, str]) -> None:
        with ui.element("div").classes("concept"):
            thumb = ui.element("div").classes("thumb")
            self._show_reference(thumb, lane)
            name = ui.input("Name", value=lane.placeholder).props(parts.LOOK)
            name.on("change", lambda: self._rename(lane, name.value))
            choice = ui.select(known, label="Concept", value=lane.file).props(parts.LOOK).mark("concept")
            choice.on_value_change(lambda event: self._choose(lane, event.value, thumb))
            parts.button("×", partial(self._remove, lane), "quiet small", f"Remove concept {number}")

    def _choose(self, lane: Lane, file: str, thumb: ui.element) -> None:
        lane.file = file
        self._show_reference(thumb, lane)
        self._changed()

    def _show_reference(self, thumb: ui.element, lane: Lane) -> None:
        thumb.clear()
        if (picture := self.engine.reference_of(lane.file)) is not None:
            with thumb:
                parts.shown(parts.url_of(picture), f"The image that {Path(lane.file).stem} was learned from")

    def _rename(self, lane: Lane, placeholder: str) -> None:
        lane.placeholder = placeholder.strip()
        self.timeline.rebuild()
        self._changed()

    def _remove(self, lane: Lane) -> None:
        self.session.form.lanes.remove(lane)
        ui.run_javascript(parts.TAKE_FOCUS % self._add.id)  # before the button goes, and this handler's place with it
        self.refresh()

    def _add_concept(self) -> None:
        known = list(self.session.concepts())
        if not known:
            parts.say("There is no concept yet; upload one, or learn one.", "info")
            return
        used = {lane.file for lane in self.session.form.lanes}
        self.session.form.add_concept(next((file for file in known if file not in used), known[0]))
        self.refresh()

    def take_concepts(self, paths: list[Path]) -> None:
        """Add uploaded concepts to the form."""
        files = uploads.concept_files(paths)
        self.session.uploaded += files
        for file in files:
            self.session.form.add_concept(file)
        self.show_form(self.session.form)

    def _show_content(self) -> None:
        self._content.clear()
        content = self.session.form.settings.get("content_dir")
        with self._content:
            if content is None:
                ui.label("None: images are made from noise.").classes("soft")
                return
            with suppress(ValueError, OSError):  # it is another file than it was: said when it is to be read
                uploads.check_image(Path(content))
                parts.shown(parts.url_of(Path(content)), "The image to start from", "thumb large")
            ui.label(Path(content).name)
            parts.button("Remove", partial(self.take_content, []), "quiet small")

    def take_content(self, paths: list[Path]) -> None:
        """Start from an image, or (no path) from noise."""
        if paths:
            uploads.check_image(paths[0])
            self.session.form.settings["content_dir"], self.session.tab = str(paths[0]), "Generate"
        else:
            self.session.form.settings.pop("content_dir", None)
        self._show_content()
        self._changed()

    # --- the image ------------------------------------------------------------------------------------------------

    def generate(self) -> None:
        if self._watch.is_running:
            return
        with parts.problems(self._problem):
            self.session.job = self.engine.submit(self.session.form.request())
        self._watch.poll()

    def _show(self, job: ImageJob | None) -> None:
        files = [file for file in job.files[:1] if file.is_file()] if job else []
        parts.offer(self._save, files)
        if job is None:
            return
        if job.error:
            self._problem.set_text(job.error)
        self._image.set_source(parts.url_of(files[0]) if files else job.preview or self._image.source)
        if files and job.state != "opened" and files[0] not in self.session.history:
            self.session.history = [*job.files, *self.session.history][:MOST_HISTORY]
            self._show_history()
        self.timeline.show_frames(job.previews)
        parts.show_messages(self._messages, job.messages)

    def open(self, file: Path) -> None:
        """Restore the form of an image, and show it."""
        form = Form.restored(read_parameters(file), self.engine.facts)
        if not self._watch.is_running:
            self.session.job = ImageJob(state="opened", outcome=str(file), files=[file], request=form.request())
        self.show_form(form)

    def show_form(self, form: Form) -> None:
        """Show another form in place of this one."""
        self.session.form, self.session.tab = form, "Generate"
        self.refresh()
        self._watch.poll()

    def _open_again(self, file: Path) -> None:
        with parts.problems():
            self.open(file)

    def _show_history(self) -> None:
        self._history.clear()
        files = [file for file in self.session.history if file.is_file()]
        with self._history:
            ui.label("Made in this tab" if files else "Images that you make are kept here.").classes("soft")
            with ui.element("div").classes("thumbs"):
                for file in files:
                    act, label = partial(self._open_again, file), f"Restore the form of {file.name}"
                    with parts.button("", act, "thumb-button", label):
                        parts.shown(parts.url_of(file), file.name)
