"""The stage timeline: the start of generation on the left, a cell for each stage, a lane for each concept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from nicegui import ui
from nicegui.events import ValueChangeEventArguments
from PIL import Image

from ldm.page import parts
from ldm.page.engine import Engine
from ldm.page.form import Form, Lane
from ldm.request import PLACEHOLDER, PRESETS

HUES = (285, 30)  # of the first and the last stage in time, degrees in OKLCH
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
    """Stages that read the same, and the inputs for their text."""

    run: list[int]
    box: ui.element
    entry: ui.input
    token: ui.label
    count: ui.label
    reset: ui.element


class Timeline:
    """Shows and changes which concept each stage reads, and what text.

    Args:
        changed: is called after each change of the form.
    """

    def __init__(self, form: Form, engine: Engine, changed: Callable[[], None]) -> None:
        self.form, self.engine, self._changed = form, engine, changed
        self.selected: set[int] = set()
        self._paint = True
        self._lane = 0  # that presets go to
        self._cells: dict[tuple[int, int], ui.element] = {}
        self._heads: dict[int, ui.element] = {}
        self._frames: dict[int, ui.image] = {}
        self._shown: dict[int, Image.Image] = {}
        self._presets: dict[str | None, ui.element] = {}
        self._texts: list[_Row] = []

    @property
    def stages(self) -> list[int]:
        """The start of generation first."""
        return list(reversed(range(self.form.num_stages)))

    def build(self) -> None:
        """Add the places of what `rebuild` shows."""
        self._box = ui.element("div").classes("timeline").style(f"--stages: {self.form.num_stages}")
        self._text_box = ui.element("div").classes("stage-texts")

    def rebuild(self) -> None:
        """Show the form anew; the lanes may be others."""
        self.selected &= self.form.every_stage
        self._lane = min(self._lane, max(0, len(self.form.lanes) - 1))
        self._cells.clear()
        self._box.clear()
        with self._box:
            self._build_presets()
            with ui.element("div").classes("axis"):
                ui.label("start · layout")
                ui.label("fine detail · end")
            self._build_heads()
            for number, lane in enumerate(self.form.lanes):
                self._build_lane(number, lane)
            self._build_scales()
            self._build_frames()
        self.refresh()

    def refresh(self) -> None:
        """Show the stages and their texts anew."""
        self._mark()
        self._show_texts()

    def _mark(self) -> None:
        """Show what each stage reads."""
        for (number, stage), cell in self._cells.items():
            parts.press(cell, stage in self.form.lanes[number].stages and self._reads(number, stage))
        for stage, head in self._heads.items():
            parts.press(head, stage in self.selected, "selected")
            parts.look(head, "own", stage in self.form.own)
        lane = self.form.lanes[self._lane] if self.form.lanes else None
        every = lane is not None and lane.preset is None and lane.stages == self.form.every_stage
        for attribute, chip in self._presets.items():
            parts.press(chip, lane is not None and lane.preset == attribute if attribute else every)

    def _reads(self, number: int, stage: int) -> bool:
        """Whether a stage with a text of its own has the placeholder in it."""
        own = self.form.own.get(stage)
        return not isinstance(own, str) or self.form.lanes[number].placeholder in own

    def show_frames(self, previews: dict[int, Image.Image]) -> None:
        """Show what was predicted in each stage."""
        self._strip.set_visibility(bool(previews))
        for stage, frame in self._frames.items():
            image = previews.get(stage)
            frame.set_visibility(image is not None)
            if image is not None and image is not self._shown.get(stage):
                frame.set_source(parts.inline(image))
        self._shown = dict(previews)

    def _build_presets(self) -> None:
        self._presets.clear()
        if not self.form.lanes:
            return
        with ui.element("div").classes("presets").props('role=group aria-label="Presets"'):
            if len(self.form.lanes) > 1:
                ui.label(f"of {self.form.lanes[self._lane].placeholder}").classes("soft")
            for attribute in (None, *PRESETS):
                chip = parts.button((attribute or "all stages").capitalize(), partial(self._preset, attribute), "chip")
                chip.mark(f"preset-{attribute or 'all'}")
                self._presets[attribute] = chip

    def _build_heads(self) -> None:
        self._heads.clear()
        with ui.element("div").classes("stages heads").on("keydown", js_handler=_ARROWS):
            for stage in self.stages:
                head = self._cell(f"Select stage {stage}", stage, "head").mark(f"stage-{stage}")
                with head:
                    ui.label(str(stage))
                self._drawn(head, partial(self._select, stage))
                self._heads[stage] = head

    def _build_lane(self, number: int, lane: Lane) -> None:
        row = ui.element("div").classes("stages lane").on("keydown", js_handler=_ARROWS)
        row.props(f'role=group aria-label="Stages that read concept {number + 1}"')
        with row:
            for stage in self.stages:
                cell = self._cell(f"Concept {number + 1} in stage {stage}", stage, "cell")
                with cell:
                    ui.label(lane.placeholder.strip("<>")[:2])
                if lane.placeholder != PLACEHOLDER:
                    cell.classes("named")
                self._drawn(cell, partial(self._toggle, number, stage))
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

    def _build_frames(self) -> None:
        self._frames.clear()
        self._shown.clear()
        self._strip = ui.element("div").classes("stages frames").props("aria-hidden=true")
        self._strip.set_visibility(False)
        with self._strip:
            for stage in self.stages:
                with ui.element("div").classes("frame"):
                    frame = ui.image().props("fit=cover no-spinner no-transition")
                frame.set_visibility(False)
                self._frames[stage] = frame

    def _cell(self, label: str, stage: int, look: str) -> ui.element:
        first, last = HUES
        hue = first + (last - first) * (1 - stage / max(1, self.form.num_stages - 1))
        made = ui.element("button").classes(look).style(f"--hue: {hue:.0f}")
        return made.props(f'type=button aria-label="{label}" title="{label}"')

    def _drawn(self, cell: ui.element, act: Callable[..., None]) -> None:
        cell.on("pointerdown", lambda: act(first=True), js_handler=_PRESS)
        cell.on("pointerenter", lambda: act(first=False), js_handler=_DRAW)
        cell.on("click", lambda: act(first=True), js_handler=_KEY)

    def _show_texts(self) -> None:
        """A row for each run of stages that read the same; the selected ones have a row of their own."""
        runs = self._runs()
        if [row.run for row in self._texts] != runs:  # otherwise the one that is being written in keeps the focus
            self._text_box.clear()
            with self._text_box:
                self._texts = [self._build_text(run) for run in runs]
        for row in self._texts:
            own = self.form.own.get(row.run[0])
            row.entry.value = self.form.text(row.run[0])
            parts.look(row.box, "selected", set(row.run) <= self.selected)
            row.token.set_text(f"token of stage {own}" if isinstance(own, int) else "")
            row.reset.set_visibility(own is not None)
            self._count(row)

    def _runs(self) -> list[list[int]]:
        runs: list[list[int]] = []
        for group in self.form.groups():
            for stage in group:
                joins = runs and runs[-1][-1] in group and (runs[-1][-1] in self.selected) == (stage in self.selected)
                runs[-1].append(stage) if joins else runs.append([stage])
        return runs

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
        entry.on_value_change(lambda event: self._write(row, event.value))
        entry.on("blur", self.refresh)
        return row

    def _count(self, row: _Row) -> None:
        most = self.engine.most_tokens
        count = self.engine.tokens(row.entry.value or "", [lane.placeholder for lane in self.form.lanes])
        row.count.set_text(f"{count} of {most} tokens" if count > most else f"{count} token{'s' * (count != 1)}")
        parts.look(row.count, "problem", count > most)

    def _toggle(self, number: int, stage: int, first: bool) -> None:
        lane = self.form.lanes[number]
        is_other = self._lane != number
        self._lane = number
        if first:
            self._paint = not (stage in lane.stages and self._reads(number, stage))
        self.form.set_stage(lane, stage, self._paint)
        self.rebuild() if is_other else self.refresh()
        self._changed()

    def _select(self, stage: int, first: bool) -> None:
        if first:
            self._paint = stage not in self.selected
        (self.selected.add if self._paint else self.selected.discard)(stage)
        self.refresh()

    def _set_scale(self, stage: int, event: ValueChangeEventArguments) -> None:
        scales = self.form.scales
        if scales is not None:
            self.form.set_scales([*scales[:stage], event.value, *scales[stage + 1 :]])
            self._changed()

    def _preset(self, attribute: str | None) -> None:
        self.form.set_preset(self.form.lanes[self._lane], attribute, self.engine.windows)
        self.refresh()
        self._changed()

    def _write(self, row: _Row, text: Any) -> None:
        if (text or "") == self.form.text(row.run[0]):
            return  # it is what `refresh` has written
        for stage in row.run:
            self.form.own[stage] = str(text or "")
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
