"""A grid of images: what its rows and columns vary, the requests of its cells, and the labelled sheet of them."""

from __future__ import annotations

import asyncio
import copy
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from ldm.cli.images import new_file
from ldm.conditioning.presets import Windows
from ldm.files.images import label_grid
from ldm.files.records import PNG_KEY, save_png
from ldm.page.engine import Engine, ImageJob
from ldm.page.form import Form, Lane
from ldm.request import PRESETS, SAMPLERS, ModelFacts

GRID_KEY = "prospect_grid"  # name of the PNG text chunk that holds a grid's record
WAIT = 0.05  # seconds between two looks at a job
MOST_CELLS = 400
ALL, NONE = "all stages", "none"
Vary = Callable[[Form, str, "Known"], None]


@dataclass(frozen=True)
class Known:
    """What values may name: the model's windows, and concepts by what they are called."""

    facts: ModelFacts
    windows: Windows
    concepts: Mapping[str, str]

    @classmethod
    def to(cls, engine: Engine, uploaded: Sequence[str] = ()) -> Known:
        """What an engine knows, and a tab that has `uploaded` concepts."""
        concepts = {name: file for file, name in engine.concept_names(uploaded).items()}
        return cls(engine.facts, engine.windows, concepts)


@dataclass(frozen=True)
class Axis:
    """What the rows or the columns vary, and its values as a user writes them, one a line."""

    kind: str
    values: tuple[str, ...]

    @classmethod
    def read(cls, kind: str, text: str) -> Axis:
        """Read one value a line; `42-45` is a range of seeds.

        Raises:
            ValueError: there is no value, or an unknown kind.
        """
        if kind not in KINDS:
            raise ValueError(f"A grid varies {', '.join(KINDS)}, not '{kind}'.")
        lines = (line.strip() for line in text.splitlines() if line.strip())
        values = (value for line in lines for value in (_seeds(line) if kind == "Seed" else [line]))
        found = tuple(islice(values, MOST_CELLS + 1))
        if not found:
            raise ValueError(f"{kind} needs at least one value, one a line.")
        if len(found) > MOST_CELLS:
            raise ValueError(f"{kind} has more than {MOST_CELLS} values; a grid has at most {MOST_CELLS} images.")
        return cls(kind, found)


def _seeds(line: str) -> Iterable[str]:
    match = re.fullmatch(r"(\d{1,19})\s*[-–]\s*(\d{1,19})", line)
    return [line] if match is None else map(str, range(int(match[1]), int(match[2]) + 1))


def cells(form: Form, rows: Axis, columns: Axis, known: Known) -> list[list[Form]]:
    """Return the form of each cell, row by row.

    Raises:
        ValueError: rows and columns vary the same, there are too many cells, or a value cannot be used.
    """
    if rows.kind == columns.kind:
        raise ValueError(f"Rows and columns both vary {rows.kind}; choose two things.")
    count = len(rows.values) * len(columns.values)
    if count > MOST_CELLS:
        raise ValueError(f"The grid has {count} images; a grid has at most {MOST_CELLS}.")
    grid = [[varied(form, {rows: row, columns: column}, known) for column in columns.values] for row in rows.values]
    for cell in (cell for line in grid for cell in line):
        cell.request().for_model(known.facts)
    return grid


def varied(form: Form, chosen: Mapping[Axis, str], known: Known) -> Form:
    """A copy of the form with one value of each axis; the prompt and the concept come before their stages."""
    made = copy.deepcopy(form)
    for axis, value in sorted(chosen.items(), key=lambda item: list(KINDS).index(item[0].kind)):
        KINDS[axis.kind](made, value, known)
    return made


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
    if name not in (*PRESETS, ALL, "all"):
        raise ValueError(f"Unknown preset '{text}'; there are {ALL}, {', '.join(PRESETS)}.")
    form.set_preset(_first(form, "Presets"), name if name in PRESETS else None, known.windows)


def _stages(form: Form, text: str, known: Known) -> None:
    lane = _first(form, "Stages")
    lane.preset, lane.stages = None, read_stages(text, form.num_stages)
    form.own.clear()


def read_stages(text: str, num_stages: int) -> set[int]:
    """Read `7-3`, `9`, `9-7, 2`, `all stages` or `none` as a set of stages.

    Raises:
        ValueError: it is something else, or names a stage that there is not.
    """
    if text.lower() in (ALL, "all"):
        return set(range(num_stages))
    found: set[int] = set()
    for part in [] if text.lower() == NONE else text.split(","):
        match = re.fullmatch(r"\s*(\d{1,4})\s*(?:[-–]\s*(\d{1,4})\s*)?", part)
        if match is None:
            raise ValueError(f"Stages are written as 7-3, 9, {ALL} or {NONE}, not '{text}'.")
        ends = sorted((int(match[1]), int(match[2] or match[1])))
        if ends[1] >= num_stages:
            raise ValueError(f"Stage {ends[1]} is outside 0..{num_stages - 1}.")
        found |= set(range(ends[0], ends[1] + 1))
    return found


def _setting(name: str, kind: type) -> Vary:
    def vary(form: Form, text: str, known: Known) -> None:
        try:
            form.settings[name] = kind(text)
        except ValueError:
            raise ValueError(f"{name} must be a number, not '{text}'.") from None

    return vary


# In the order in which they change a form.
KINDS: dict[str, Vary] = {
    "Prompt": _prompt,
    "Concept": _concept,
    "Preset": _preset,
    "Stages": _stages,
    "Seed": _setting("seed", int),
    "Guidance scale": _setting("scale", float),
    "Steps": _setting("ddim_steps", int),
    "Sampler": _setting("sampler", str),
}


def usual_values(kind: str, form: Form, known: Known) -> str:
    """What a user may start from, one value a line."""
    seed = int(form.settings.get("seed", 42))
    usual: dict[str, Sequence[object]] = {
        "Prompt": [form.prompt],
        "Concept": list(known.concepts)[:4],
        "Preset": [ALL, *PRESETS],
        "Stages": [NONE, "9-8", "7-5", "4-2", "1-0"],
        "Seed": [f"{seed}-{seed + 3}"],
        "Guidance scale": [1, known.facts.scale, 2 * known.facts.scale],
        "Steps": [10, 25, 50],
        "Sampler": list(SAMPLERS),
    }
    return "\n".join(map(str, usual[kind]))


class Comparison:
    """A grid that is being made, one image after the other, so that other tabs are not kept waiting."""

    def __init__(self, rows: Axis, columns: Axis, forms: list[list[Form]]) -> None:
        self.rows, self.columns, self.forms = rows, columns, forms
        self.jobs: dict[tuple[int, int], ImageJob] = {}
        self.is_running, self.error = True, ""
        self.file: Path | None = None

    @property
    def done(self) -> int:
        return sum(job.image is not None for job in self.jobs.values())

    @property
    def warnings(self) -> list[tuple[str, str]]:
        """What the library has warned of, each sentence once."""
        said = dict.fromkeys(message for job in self.jobs.values() for message in job.messages)
        return [(level, text) for level, text in said if level != "info"]

    def stop(self) -> None:
        self.is_running = False
        for job in self.jobs.values():
            job.stop()

    async def work(self, engine: Engine) -> None:
        """Make all cells, then the sheet."""
        for i, line in enumerate(self.forms):
            for j, form in enumerate(line):
                if not self.is_running:
                    return
                job = self.jobs[i, j] = engine.submit(form.request(), keep=False)
                while not job.is_over:
                    await asyncio.sleep(WAIT)
                self.error = self.error or job.error
        self.is_running = False
        images = [[self.jobs[i, j].image for j in range(len(line))] for i, line in enumerate(self.forms)]
        whole = [[image for image in line if image is not None] for line in images]
        if whole == images:
            self.file = new_file(engine.outdir / f"{self.rows.kind}-{self.columns.kind}".lower().replace(" ", "-"))
            save_sheet(whole, self.rows, self.columns, self.file)


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
        axes = [Axis.read(kind, "\n".join(values)) for kind, *values in (record["rows"], record["columns"])]
        return axes, dict(record["cells"][0][0])
    except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
        raise ValueError("The grid's record cannot be read; use another copy of the image.") from error
