"""The stage timeline: the start of generation on the left, a cell for each stage, a lane for each concept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from nicegui import ui
from nicegui.events import ValueChangeEventArguments

from ldm.page import parts
from ldm.page.chart import stage_hue
from ldm.page.form import Form, Lane
from ldm.page.session import Session
from ldm.request import PLACEHOLDER, PRESETS

# With the mouse: press, then draw over further cells. A key makes a click without a press.
_PRESS = "(e) => { e.target.releasePointerCapture?.(e.pointerId); emit({}) }"
_DRAW = "(e) => { if (e.buttons === 1) emit({}) }"
_KEY = "(e) => { if (e.detail === 0) emit({}) }"
_ARROWS = """(e) => {
  const step = {ArrowRight: 1, ArrowLeft: -1}[e.key];
  if (!step) return;
  const row = [...e.target.parentElement.querySelectorAll('button')];
  row[row.indexOf(e.target) + step]?.focus();
  e.preventDefault();
}"""


@dataclass(frozen=True)
class _Row:
    """Stages that read the same, and the elements of their text."""

    run: list[int]
    box: ui.element
    entry: ui.input
    token: ui.label
    count: ui.label
    reset: ui.element


class Timeline:
    """Shows and changes which concept each stage of the session's form reads, and what text; built into the open slot.

    Args:
        changed: is called after each change of the form.
    """

    def __init__(self, session: Session, changed: Callable[[], None]) -> None:
        self.session, self.engine, self._changed = session, session.engine, changed
        self.selected: set[int] = set()
        self._paint = True  # what drawing gives to the cells
        self._lane = 0  # that presets go to
        self._cells: dict[tuple[int, int], ui.element] = {}
        self._heads: dict[int, ui.element] = {}
        self._frames: dict[int, ui.image] = {}
        self._presets: dict[str | None, ui.element] = {}
        self._texts: list[_Row] = []
        self._box = ui.element("div").classes("timeline").style(f"--stages: {self.form.num_stages}")
        self._text_box = ui.element("div").classes("stage-texts")

    @property
    def form(self) -> Form:
        return self.session.form

    @property
    def stages(self) -> range:
        """The start of generation first."""
        return range(self.form.num_stages - 1, -1, -1)

    def rebuild(self) -> None:
        """Show the form anew; the lanes may be others."""
        self._lane = min(self._lane, max(0, len(self.form.lanes) - 1))
        for known in (self._cells, self._heads, self._frames, self._presets):
            known.clear()
        self._box.clear()
        with self._box:
            if self.form.lanes:
                self._build_presets()
            with ui.element("div").classes("axis"):
                ui.label("start · layout")
                ui.label("fine detail · end")
            with ui.element("div").classes("stages heads").on("keydown", js_handler=_ARROWS):
                for stage in self.stages:
                    head = self._cell(f"Select stage {stage}", stage, "head", str(stage), partial(self._select, stage))
                    self._heads[stage] = head.mark(f"stage-{stage}")
            for number, lane in enumerate(self.form.lanes):
                self._build_lane(number, lane)
            self._build_scales()
            self._strip = ui.element("div").classes("stages frames").props("aria-hidden=true")
            with self._strip:
                for stage in self.stages:
                    with ui.element("div").classes("frame"):
                        self._frames[stage] = ui.image().props("fit=cover no-spinner no-transition")
        self.show_frames(self.session.job.previews if self.session.job else {})
        self.refresh()

    def refresh(self) -> None:
        """Show the stages and their texts anew."""
        self._mark()
        self._show_texts()

    def _mark(self) -> None:
        """Show what each stage reads."""
        for (number, stage), cell in self._cells.items():
            parts.press(cell, self._reads(number, stage))
        for stage, head in self._heads.items():
            parts.press(head, stage in self.selected, "selected")
            parts.look(head, "own", stage in self.form.own)
        for attribute, chip in self._presets.items():
            lane = self.form.lanes[self._lane]
            fits = attribute is not None or lane.stages == self.form.every_stage
            parts.press(chip, lane.preset == attribute and fits)

    def _reads(self, number: int, stage: int) -> bool:
        """Whether a stage reads a concept, which must be in the text of its own if it has one."""
        lane, own = self.form.lanes[number], self.form.own.get(stage)
        return stage in lane.stages and (not isinstance(own, str) or lane.placeholder in own)

    def show_frames(self, previews: Mapping[int, str]) -> None:
        """Show what was predicted in each stage."""
        self._strip.set_visibility(bool(previews))
        for stage, frame in self._frames.items():
            frame.set_visibility(stage in previews)
            if stage in previews:
                frame.set_source(previews[stage])

    def _build_presets(self) -> None:
        with ui.element("div").classes("presets").props('role=group aria-label="Presets"'):
            if len(self.form.lanes) > 1:
                ui.label(f"of {self.form.lanes[self._lane].placeholder}").classes("soft")
            for attribute in (None, *PRESETS):
                chip = parts.button((attribute or "all stages").capitalize(), partial(self._preset, attribute), "chip")
                self._presets[attribute] = chip.mark(f"preset-{attribute or 'all'}")

    def _build_lane(self, number: int, lane: Lane) -> None:
        row = ui.element("div").classes("stages lane").on("keydown", js_handler=_ARROWS)
        look = "cell" if lane.placeholder == PLACEHOLDER else "cell named"
        with row.props(f'role=group aria-label="Stages that read concept {number + 1}"'):
            for stage in self.stages:
                name, act = f"Concept {number + 1} in stage {stage}", partial(self._toggle, number, stage)
                cell = self._cell(name, stage, look, lane.placeholder.strip("<>")[:2], act)
                self._cells[number, stage] = cell.mark(f"cell-{number}-{stage}")

    def _build_scales(self) -> None:
        """The guidance scale of each stage, where each has its own."""
        scales = self.form.scales
        if scales is None:
            return
        ui.label("guidance scale").classes("soft axis")
        with ui.element("div").classes("stages scales"):
            for stage in self.stages:
                entry = ui.number(value=scales[stage], on_change=partial(self._set_scale, stage))
                entry.props(f'outlined dense hide-bottom-space aria-label="Guidance scale of stage {stage}"')
                entry.mark(f"scale-{stage}")

    def _cell(self, name: str, stage: int, look: str, text: str, act: Callable[..., None]) -> ui.element:
        """A button that is drawn on."""
        hue = stage_hue(stage, self.form.num_stages)
        cell = ui.element("button").classes(look).style(f"--hue: {hue:.0f}")
        cell.props(f'type=button aria-label="{name}" title="{name}"')
        cell.on("pointerdown", lambda: act(first=True), js_handler=_PRESS)
        cell.on("pointerenter", lambda: act(first=False), js_handler=_DRAW)
        cell.on("click", lambda: act(first=True), js_handler=_KEY)
        with cell:
            ui.label(text)
        return cell

    def _show_texts(self) -> None:
        """A row for each run of stages that read the same; the selected ones have a row of their own."""
        runs = self.form.groups(self.selected)
        if [row.run for row in self._texts] != runs:  # otherwise the one that is being written in keeps the focus
            self._text_box.clear()
            with self._text_box:
                self._texts = [self._build_text(run) for run in runs]
        for row in self._texts:
            own = self.form.own.get(row.run[0])
            row.entry.value = self.form.text(row.run[0])
            parts.look(row.box, "selected", row.run[0] in self.selected)
            row.token.set_text(f"token of stage {own}" if isinstance(own, int) else "")
            row.reset.set_visibility(own is not None)
            self._count(row)

    def _build_text(self, run: list[int]) -> _Row:
        name = str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}"
        with ui.element("div").classes("stage-text") as box:
            ui.label(name).classes("stage-name")
            entry = ui.input(value=self.form.text(run[0])).mark(f"text-{run[0]}")
            entry.props(f'outlined dense aria-label="Text of stages {name}"')
            token = ui.label().classes("soft token")
            count = ui.label().classes("count")
            label = f"Let stages {name} follow the prompt again"
            reset = parts.button("Reset", partial(self._reset, run), "quiet small", label).mark(f"reset-{run[0]}")
        row = _Row(run, box, entry, token, count, reset)
        entry.on_value_change(lambda event: self._write(row, event.value or ""))
        entry.on("blur", self.refresh)
        return row

    def _count(self, row: _Row) -> None:
        most = self.engine.most_tokens
        count = self.engine.tokens(row.entry.value or "", [lane.placeholder for lane in self.form.lanes])
        row.count.set_text(f"{count} of {most} tokens" if count > most else f"{count} token{'s' * (count != 1)}")
        parts.look(row.count, "problem", count > most)

    def _toggle(self, number: int, stage: int, first: bool) -> None:
        is_other, self._lane = self._lane != number, number
        if first:
            self._paint = not self._reads(number, stage)
        self.form.set_stage(self.form.lanes[number], stage, self._paint)
        self.rebuild() if is_other else self.refresh()
        self._changed()

    def _select(self, stage: int, first: bool) -> None:
        if first:
            self._paint = stage not in self.selected
        (self.selected.add if self._paint else self.selected.discard)(stage)
        self.refresh()

    def _set_scale(self, stage: int, event: ValueChangeEventArguments) -> None:
        if self.form.scales is not None:
            scales = list(self.form.scales)
            scales[stage] = event.value
            self.form.settings["scale"] = tuple(scales)
            self._changed()

    def _preset(self, attribute: str | None) -> None:
        self.form.set_preset(self.form.lanes[self._lane], attribute, self.engine.windows)
        self.refresh()
        self._changed()

    def _write(self, row: _Row, text: str) -> None:
        if text == self.form.text(row.run[0]):
            return  # it is what `refresh` has written
        self.form.own |= dict.fromkeys(row.run, text)
        row.reset.set_visibility(True)
        self._mark()
        self._count(row)
        self._changed()

    def _reset(self, run: list[int]) -> None:
        ui.run_javascript(parts.TAKE_FOCUS % self._heads[run[0]].id)
        for stage in run:
            self.form.own.pop(stage, None)
        self.refresh()
        self._changed()
