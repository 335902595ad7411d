"""The tab Compare: what rows and columns vary, the requests of a grid's cells, and the labelled sheet of them."""

from __future__ import annotations

import asyncio
import copy
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from nicegui import background_tasks, ui
from PIL import Image

from ldm.cli.images import new_file
from ldm.files.images import image_info, label_grid
from ldm.files.records import PNG_KEY, save_png
from ldm.page import parts
from ldm.page.engine import Engine, ImageJob, Job
from ldm.page.form import Form, Lane, as_number
from ldm.page.generate import GenerateTab
from ldm.page.session import Session
from ldm.request import PRESETS, SAMPLERS

GRID_KEY = "prospect_grid"  # name of the PNG text chunk that holds a grid's record
POLL = 0.25
MOST_CELLS = 400
ALL, NONE = "all stages", "none"
Vary = Callable[[Form, str, "Known"], None]


class Known(NamedTuple):
    """What values may name: the model's windows, and concepts by what they are called."""

    engine: Engine
    concepts: Mapping[str, str]


@dataclass
class Axis:
    """What the rows or the columns vary, and its values as a user writes them, one a line."""

    kind: str
    text: str = ""

    @property
    def values(self) -> list[str]:
        """The values, of which `42-45` is a range of seeds; one more than a grid can have, if there are so many.

        Raises:
            ValueError: there is none.
        """
        lines = (line.strip() for line in self.text.splitlines() if line.strip())
        values = (value for line in lines for value in (_seeds(line) if self.kind == "Seed" else [line]))
        found = list(islice(values, MOST_CELLS + 1))
        if not found:
            raise ValueError(f"{self.kind} needs at least one value, one a line.")
        return found


def _seeds(line: str) -> Iterable[str]:
    match = re.fullmatch(r"(\d{1,19})\s*[-–]\s*(\d{1,19})", line)
    return [line] if match is None else map(str, range(int(match[1]), int(match[2]) + 1))


def cells(session: Session, rows: Axis, columns: Axis) -> list[list[Form]]:
    """Return the form of each cell, the session's with two things varied, row by row.

    Raises:
        ValueError: rows and columns vary the same, there are too many cells, or a value cannot be used.
    """
    if rows.kind == columns.kind:
        raise ValueError(f"Rows and columns both vary {rows.kind}; choose two things.")
    if len(rows.values) * len(columns.values) > MOST_CELLS:
        raise ValueError(f"A grid has at most {MOST_CELLS} images; give fewer values.")

    known = Known(session.engine, {name: file for file, name in session.concepts().items()})

    def varied(row: str, column: str) -> Form:
        made, chosen = copy.deepcopy(session.form), {rows.kind: row, columns.kind: column}
        for kind, vary in KINDS.items():
            if kind in chosen:
                vary(made, chosen[kind], known)
        made.request().for_model(known.engine.facts)
        return made

    return [[varied(row, column) for column in columns.values] for row in rows.values]


def _prompt(form: Form, text: str, known: Known) -> None:
    form.prompt = text
    form.own.clear()


def _first(form: Form, what: str) -> Lane:
    if not form.lanes:
        raise ValueError(f"{what} of a concept are to vary, and there is none; add one on Generate.")
    return form.lanes[0]


def _concept(form: Form, text: str, known: Known) -> None:
    if text not in known.concepts:
        raise ValueError(f"There is no concept '{text}'; there are {', '.join(known.concepts) or 'none'}.")
    if form.lanes:
        form.lanes[0].file = known.concepts[text]
    else:
        form.add_concept(known.concepts[text])


def _preset(form: Form, text: str, known: Known) -> None:
    name = text.lower()
    form.set_preset(_first(form, "Presets"), None if name in (ALL, "all") else name, known.engine.windows)


def _stages(form: Form, text: str, known: Known) -> None:
    lane = _first(form, "Stages")
    lane.preset, lane.stages = None, read_stages(text, form.num_stages)
    form.own.clear()


def read_stages(text: str, num_stages: int) -> set[int]:
    """Read `7-3`, `9`, `9-7, 2`, `all stages` or `none` as a set of stages."""
    if text.lower() in (ALL, "all"):
        return set(range(num_stages))
    found: set[int] = set()
    for part in [] if text.lower() == NONE else text.split(","):
        match = re.fullmatch(r"\s*(\d{1,4})\s*(?:[-–]\s*(\d{1,4})\s*)?", part)
        low, high = sorted((int(match[1]), int(match[2] or match[1]))) if match else (0, num_stages)
        if high >= num_stages:
            most = num_stages - 1
            raise ValueError(f"Stages are written as 7-3, 9, {ALL} or {NONE}, and at most {most}, not '{text}'.")
        found |= set(range(low, high + 1))
    return found


def _setting(name: str) -> Vary:
    return lambda form, text, known: form.settings.update({name: as_number(text)})


# In the order in which they change a form: the prompt and the concept before their stages.
KINDS: dict[str, Vary] = {
    "Prompt": _prompt,
    "Concept": _concept,
    "Preset": _preset,
    "Stages": _stages,
    "Seed": _setting("seed"),
    "Guidance scale": _setting("scale"),
    "Steps": _setting("ddim_steps"),
    "Sampler": _setting("sampler"),
}


def usual_values(kind: str, session: Session) -> str:
    """What a user may start from, one value a line."""
    seed, scale = int(session.form.settings.get("seed", 42)), session.engine.facts.scale
    usual: dict[str, Sequence[object]] = {
        "Prompt": [session.form.prompt],
        "Concept": list(session.concepts().values())[:4],
        "Preset": [ALL, *PRESETS],
        "Stages": [NONE, "9-8", "7-5", "4-2", "1-0"],
        "Seed": [f"{seed}-{seed + 3}"],
        "Guidance scale": [1, scale, 2 * scale],
        "Steps": [10, 25, 50],
        "Sampler": list(SAMPLERS),
    }
    return "\n".join(map(str, usual[kind]))


class Comparison(Job):
    """A grid that is being made, one image after the other, so that other tabs are not kept waiting."""

    def __init__(self, rows: Axis, columns: Axis, forms: list[list[Form]]) -> None:
        super().__init__("running", steps=len(forms) * len(forms[0]))
        self.rows, self.columns, self.forms = rows, columns, forms
        self.jobs: dict[tuple[int, int], ImageJob] = {}

    @property
    def status(self) -> str:
        kept = f" · kept as {self.files[0]}" if self.files else ""
        return f"{self.step} of {self.steps} images{kept}"

    def stop(self) -> None:
        self.state = "stopped"
        for job in self.jobs.values():
            job.stop()

    async def work(self, engine: Engine) -> None:
        """Make all cells, then the sheet."""
        for i, line in enumerate(self.forms):
            for j, form in enumerate(line):
                if not self.is_running:
                    return
                job = self.jobs[i, j] = engine.submit(form.request(), keep=False)
                await asyncio.wrap_future(job.future)
                self.error = self.error or job.error
                self.messages += [said for said in job.messages if said[0] != "info" and said not in self.messages]
                self.step += job.image is not None
        images = [job.image for job in self.jobs.values() if job.image is not None]
        if len(images) == self.steps:
            width = len(self.forms[0])
            try:
                file = new_file(engine.outdir / f"{self.rows.kind}-{self.columns.kind}".lower().replace(" ", "-"))
                lines = [images[i : i + width] for i in range(0, self.steps, width)]
                save_sheet(lines, self.rows, self.columns, file)
                self.files = [file]
            except OSError as error:  # a full disk
                self.error = str(error)
        self.state = "done"


def save_sheet(images: Sequence[Sequence[Image.Image]], rows: Axis, columns: Axis, path: Path) -> None:
    """Save the labelled grid as PNG, with what repeats each of its images."""
    records = [[json.loads(image.info[PNG_KEY]) for image in line] for line in images]
    axes = {"rows": [rows.kind, *rows.values], "columns": [columns.kind, *columns.values]}
    save_png(label_grid(images, rows.values, columns.values), path, {GRID_KEY: json.dumps({**axes, "cells": records})})


def read_sheet(text: str) -> tuple[list[Axis], dict[str, Any]]:
    """Return rows and columns, and the record of the first cell of a saved grid.

    Raises:
        ValueError: the record is damaged.
    """
    try:
        record = json.loads(text)
        found = (Axis(kind, "\n".join(texts)) for kind, *texts in (record["rows"], record["columns"]) if kind in KINDS)
        rows, columns = (replace(axis, text="\n".join(axis.values)) for axis in found)  # not more than a grid can have
        return [rows, columns], dict(record["cells"][0][0])
    except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
        raise ValueError("The grid's record cannot be read; use another copy of the image.") from error


@dataclass
class CompareForm:
    """What is filled in on the tab, and the grid that is made."""

    axes: dict[str, Axis] = field(default_factory=lambda: {"Rows": Axis("Preset"), "Columns": Axis("Seed")})
    run: Comparison | None = None


class CompareTab:
    """Builds itself into the open slot."""

    def __init__(self, session: Session, generate: GenerateTab) -> None:
        self.session, self.generate, self.form = session, generate, session.of(CompareForm)
        self._inputs: list[tuple[ui.select, ui.textarea]] = []
        self._built: Comparison | None = None
        self._empty: dict[tuple[int, int], ui.element] = {}  # cells that have no image yet
        self._watch = parts.Watch(lambda: self.form.run, self._show, POLL)
        with parts.section("Compare", "the form of Generate, with two things varied"):
            with ui.element("div").classes("axes"):
                for title, axis in self.form.axes.items():
                    self._build_axis(title, axis)
            with ui.element("div").classes("line"):
                go = parts.button("Compare", self.compare, "primary alone").mark("compare")
                self._watch.stop_button(go).mark("compare-stop")
                self._watch.status_label()
                self._save = ui.link("Save as one PNG", "#").classes("button quiet")
            self._problem = parts.problem_label()
            self._messages = parts.message_box()
        self._grid = ui.element("div").classes("panel grid-panel").props('aria-label="Grid"')

    def _build_axis(self, title: str, axis: Axis) -> None:
        with ui.element("div").classes("axis-form"):
            choice = ui.select(list(KINDS), label=f"{title} vary", value=axis.kind).props(parts.LOOK)
            text = axis.text or usual_values(axis.kind, self.session)
            values = ui.textarea(f"{title}: one value a line", value=text).props(f"{parts.LOOK} autogrow")
        choice.bind_value_to(axis, "kind").mark(f"{title.lower()}-kind")
        choice.on_value_change(lambda event: values.set_value(usual_values(event.value, self.session)))
        values.bind_value_to(axis, "text", lambda text: text or "").mark(f"{title.lower()}-values")
        self._inputs.append((choice, values))

    def open(self, file: Path) -> None:
        """Restore a saved grid: what it varies, and the form of its first cell."""
        axes, record = read_sheet(str(image_info(file)[GRID_KEY]))
        self.generate.show_form(Form.restored(record, self.session.engine.facts))
        for (choice, values), axis in zip(self._inputs, axes, strict=True):
            choice.value = axis.kind
            values.value = axis.text
        self.session.tab = "Compare"

    def compare(self) -> None:
        if self._watch.is_running:
            return
        with parts.problems(self._problem):
            rows, columns = (replace(axis) for axis in self.form.axes.values())
            self.form.run = Comparison(rows, columns, cells(self.session, rows, columns))
            background_tasks.create(self.form.run.work(self.session.engine), name="compare")
        self._watch.poll()

    def load(self, row: int, column: int) -> None:
        """Fill in the form of a cell, and show its image on Generate."""
        if (run := self.form.run) is not None:
            self.session.job = run.jobs.get((row, column), self.session.job)
            self.generate.show_form(copy.deepcopy(run.forms[row][column]))

    def _show(self, run: Comparison | None) -> None:
        self._grid.set_visibility(run is not None)
        parts.offer(self._save, run.files if run else [])
        if run is None:
            return
        if run.error:
            self._problem.set_text(run.error)
        parts.show_messages(self._messages, run.messages)
        if run is not self._built:
            self._build_grid(run)
        for place, job in run.jobs.items():
            if job.image and not job.is_running and (cell := self._empty.pop(place, None)) is not None:
                with cell:
                    parts.shown(job.preview, cell.props["title"])

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
