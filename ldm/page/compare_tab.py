"""The tab Compare: what rows and columns vary, and the grid as it comes."""

from __future__ import annotations

from functools import partial

from nicegui import background_tasks, ui
from nicegui.events import ValueChangeEventArguments

from ldm.page import parts
from ldm.page.compare import KINDS, Axis, Comparison, Known, cells, usual_values
from ldm.page.view import View

POLL = 0.25


class CompareTab:
    """Builds itself into the open slot."""

    def __init__(self, view: View) -> None:
        self.view, self.engine, self.form = view, view.session.engine, view.session.compare
        self._seen: object = None
        self._inputs: dict[str, tuple[ui.select, ui.textarea]] = {}
        self._built: Comparison | None = None
        self._empty: dict[tuple[int, int], ui.element] = {}  # cells that have no image yet
        with parts.section("Compare", "the form of Generate, with two things varied"):
            with ui.element("div").classes("axes"):
                self._build_axis("rows", "Rows")
                self._build_axis("columns", "Columns")
            with ui.element("div").classes("line"):
                go = parts.button("Compare", self.compare, "primary alone").mark("compare")
                self._switch = parts.Switch(parts.button("Stop", self.stop).mark("compare-stop"), go)
                self._status = ui.label().classes("status").props("role=status")
                self._save = ui.link("Save as one PNG", "#").classes("button quiet")
            self._problem = ui.label().classes("problem").props("role=alert")
            self._messages = ui.element("div").classes("messages").props("aria-live=polite")
        self._grid = ui.element("div").classes("panel grid-panel").props('aria-label="Grid"')
        view.follow_form(self._refresh)
        ui.timer(POLL, self._poll)
        self._poll()

    def _build_axis(self, name: str, title: str) -> None:
        kind, text = getattr(self.form, name)
        with ui.element("div").classes("axis-form"):
            choice = ui.select(list(KINDS), label=f"{title} vary", value=kind).props(parts.LOOK)
            values = ui.textarea(f"{title}: one value a line", value=text or self._usual(kind))
            values.props(f"{parts.LOOK} autogrow").mark(f"{name}-values").on_value_change(partial(self._write, name))
        choice.mark(f"{name}-kind").on_value_change(partial(self._chosen, name))
        self._inputs[name] = choice, values

    @property
    def _known(self) -> Known:
        return Known.to(self.engine, self.view.session.uploaded)

    def _usual(self, kind: str) -> str:
        return usual_values(kind, self.view.session.form, self._known)

    def _chosen(self, name: str, event: ValueChangeEventArguments) -> None:
        self._inputs[name][1].value = self._usual(event.value)

    def _write(self, name: str) -> None:
        choice, values = self._inputs[name]
        setattr(self.form, name, (choice.value, values.value or ""))

    def _refresh(self) -> None:
        """Show axes that a dropped grid has brought."""
        for name, (choice, values) in self._inputs.items():
            kind, text = getattr(self.form, name)
            if text and (choice.value, values.value) != (kind, text):
                choice.value = kind
                values.value = text

    def compare(self) -> None:
        if self.form.run is not None and self.form.run.is_running:
            return
        for name in self._inputs:
            self._write(name)
        with parts.problems(self._problem):
            rows, columns = Axis.read(*self.form.rows), Axis.read(*self.form.columns)
            forms = cells(self.view.session.form, rows, columns, self._known)
            self.form.run = Comparison(rows, columns, forms)
            background_tasks.create(self.form.run.work(self.engine), name="compare")
        self._poll()

    def stop(self) -> None:
        if self.form.run is not None:
            self.form.run.stop()

    def load(self, row: int, column: int) -> None:
        """Fill in the form of a cell, and show its image on Generate."""
        run, session = self.form.run, self.view.session
        if run is None:
            return
        session.form.assign(run.forms[row][column])
        session.job = run.jobs.get((row, column), session.job)
        self.view.form_changed()
        self.view.show("Generate")

    def _poll(self) -> None:
        run = self.form.run
        seen = None if run is None else (run, run.is_running, run.done)
        if seen == self._seen and run is not None:
            return
        self._seen = seen
        running = run is not None and run.is_running
        self._switch.set(running)
        self._save.set_visibility(run is not None and run.file is not None)
        self._grid.set_visibility(run is not None)
        if run is not None:
            self._show(run)

    def _show(self, run: Comparison) -> None:
        count = len(run.rows.values) * len(run.columns.values)
        self._status.set_text(f"{run.done} of {count} images" + (f" · kept as {run.file}" if run.file else ""))
        if run.error:
            self._problem.set_text(run.error)
        if run.file is not None:
            parts.offer(self._save, run.file)
        parts.show_messages(self._messages, run.warnings)
        if run is not self._built:
            self._build_grid(run)
        for place, job in run.jobs.items():
            if job.image is not None and (cell := self._empty.pop(place, None)) is not None:
                with cell:
                    parts.shown(job.image, cell.props["title"])

    def _build_grid(self, run: Comparison) -> None:
        self._built = run
        self._grid.clear()
        with self._grid, ui.element("div").classes("compare-grid").style(f"--columns: {len(run.columns.values)}"):
            ui.label("")
            for label in run.columns.values:
                ui.label(label).classes("grid-label")
            for i, row in enumerate(run.rows.values):
                ui.label(row).classes("grid-label")
                for j, column in enumerate(run.columns.values):
                    label = f"Load into Generate: {row}, {column}"
                    cell = parts.button("", partial(self.load, i, j), "grid-cell", label)
                    self._empty[i, j] = cell.mark(f"grid-{i}-{j}")
