"""The prompt spectrum of a model, measured: what is decided in which stage of denoising.

Four experiments of windows of stages (the paper's section 3, and its presets), each between two poles:

* withhold: the prompt is left away in a window; poles: the prompt throughout, and no prompt.
* add: a word is there in a window only; poles: with the word throughout, and without it.
* switch: prompt A from the start down to stage k, prompt B below; poles: A, and B.
* concept: a learned `*` stands in the prompt in a window only; poles: with `*` throughout, and without it.

On the rendered world known attributes stand for the first pole: those of the prompt (A), or of the picture that was
learned, whatever the model makes of them.
Stages here are tenths of time, 0 = end of generation, whatever the number of stages of model or concept.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evaluation.captions import load, to_bytes
from evaluation.jobs import run_jobs
from evaluation.judges import Judge
from evaluation.pictures import generate
from evaluation.statistics import mean_interval, share_interval, wilson
from ldm.conditioning.presets import preset

STAGES = 10
Texts = list[list[str]]  # STAGES lists of N texts
Window = tuple[int, int]  # first and last stage


@dataclass
class Experiment:
    """Conditions on the same N scenes (prompts and seeds).

    Args:
        conditions: {label: texts}, in the order of the figures.
        seeds: N.
        toward, away: the poles: texts to be drawn, or known attributes long (N, F).
        judged: names that count here; None for all that the judge has.
        concepts: {placeholder: file}, what is loaded for the texts.
        together: how many consecutive pictures belong to one concept, and are not independent.
    """

    conditions: dict[str, Texts]
    seeds: list[int]
    toward: Texts | Tensor
    away: Texts | Tensor
    judged: Sequence[str] | None = None
    concepts: dict[str, str] = field(default_factory=dict)
    together: int = 1


def throughout(texts: Sequence[str]) -> Texts:
    return [list(texts)] * STAGES


def inside(window: Window, within: Sequence[str], without: Sequence[str]) -> Texts:
    """`within` in the stages first..last, `without` in the others; N texts each."""
    return [list(within if window[0] <= stage <= window[1] else without) for stage in range(STAGES)]


def sliding(width: int) -> list[Window]:
    """All windows of `width` stages, from the end of generation to its start."""
    return [(first, first + width - 1) for first in range(STAGES - width + 1)]


def all_windows() -> list[Window]:
    return [(first, last) for first in range(STAGES) for last in range(first, STAGES)]


def label(window: Window) -> str:
    return str(window[0]) if window[0] == window[1] else f"{window[0]}-{window[1]}"


def withhold(prompts: Sequence[str], seeds: list[int], width: int) -> Experiment:
    nothing = [""] * len(prompts)
    conditions = {label(w): inside(w, nothing, prompts) for w in sliding(width)}
    return Experiment(conditions, seeds, throughout(prompts), throughout(nothing))


def add(prompts: Sequence[str], longer: Sequence[str], seeds: list[int], width: int) -> Experiment:
    conditions = {label(w): inside(w, longer, prompts) for w in sliding(width)}
    return Experiment(conditions, seeds, throughout(longer), throughout(prompts))


def switch(first: Sequence[str], then: Sequence[str], seeds: list[int]) -> Experiment:
    """Condition k: `first` from the start down to stage k, `then` below; k = 0 is all `first`, 10 all `then`."""
    conditions = {str(k): inside((k, STAGES - 1), first, then) for k in range(STAGES + 1)}
    return Experiment(conditions, seeds, throughout(first), throughout(then))


def place(prompts: Sequence[str], seeds: list[int], windows: Sequence[Window], concepts: dict[str, str]) -> Experiment:
    """Prompts with the placeholder of a concept, which stands there in a window only."""
    names = [next(name for name in concepts if name in prompt) for prompt in prompts]
    plain = [preset("content", p, stages=[], placeholder=name)[0] for p, name in zip(prompts, names, strict=True)]
    with_it = [preset("content", p, stages=[0], placeholder=name)[0] for p, name in zip(prompts, names, strict=True)]
    conditions = {label(w): inside(w, with_it, plain) for w in windows}
    return Experiment(conditions, seeds, throughout(with_it), throughout(plain), concepts=concepts)


def draw(
    config: str, ckpt: str, texts: Texts, seeds: Sequence[int], concepts: Mapping[str, str], options: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """The pictures of one condition: uint8 (N, R, R, 3)."""
    model = load(config, ckpt, STAGES if concepts else None)
    if concepts:
        model.embedding_manager.load(dict(concepts))
    return {"pictures": to_bytes(generate(model, texts, seeds, **options))}


def run(
    experiments: Mapping[str, Experiment],
    judge: Judge,
    config: str,
    ckpt: str,
    folder: Path,
    options: Mapping[str, Any],
    workers: int | None = None,
) -> dict[str, dict[str, np.ndarray]]:
    """Draw and judge: {experiment: {condition: (N, A)}}, how far each picture goes along with `toward`.

    Writes spectrum.csv into `folder`, where pictures stay and an interrupted run goes on.
    """
    jobs = {}
    for name, experiment in experiments.items():
        poles = {"toward": experiment.toward, "away": experiment.away}
        drawn = {key: texts for key, texts in poles.items() if not isinstance(texts, Tensor)}
        for condition, texts in (experiment.conditions | drawn).items():
            jobs[f"{name}-{condition}"] = {
                "config": config, "ckpt": ckpt, "texts": texts, "seeds": experiment.seeds,
                "concepts": experiment.concepts, "options": dict(options),
            }  # fmt: skip
    drawn = run_jobs(draw, jobs, folder / "pictures", workers, "drawing")
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, experiment in experiments.items():
        toward, away = (
            pole if isinstance(pole, Tensor) else from_bytes(drawn[f"{name}-{key}"]["pictures"])
            for key, pole in (("toward", experiment.toward), ("away", experiment.away))
        )
        found[name] = {
            condition: judge.follows(from_bytes(drawn[f"{name}-{condition}"]["pictures"]), toward, away).numpy()
            for condition in experiment.conditions
        }
    _write(found, experiments, judge, folder / "spectrum.csv")
    return found


def from_bytes(pictures: np.ndarray) -> Tensor:
    """uint8 (N, R, R, 3) to (N, 3, R, R) in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def interval(values: np.ndarray, together: int, counts: bool) -> tuple[float, float]:
    """95 % interval of the mean of values (N,) in 0..1.

    Args:
        together: `Experiment.together`; N is a multiple of it.
        counts: `Judge.counts`; shares of pictures are counted, all else are distances.
    """
    if counts and together == 1:
        return wilson(values.sum(), len(values))
    means = values.reshape(-1, together).mean(axis=1)
    return share_interval(means) if counts else mean_interval(means, 0.0, 1.0)


def half_way(found: Mapping[str, np.ndarray], judge: Judge) -> dict[str, float]:
    """For each name of the judge the stage of the switch at which half of the pictures go along with prompt A.

    Args:
        found: {k: (N, A)} of the experiment `switch`.

    Returns:
        A number of stages 0..10, interpolated where the share first falls below a half; NaN where it never does.
    """
    places = {}
    for name, shares in zip(judge.names, matrix(found, judge), strict=True):
        below = np.flatnonzero(shares < 0.5)
        places[name] = float("nan")
        if len(below) and below[0] > 0:
            k = below[0]
            places[name] = float(k - 1 + (shares[k - 1] - 0.5) / (shares[k - 1] - shares[k]))
    return places


def _write(
    found: Mapping[str, Mapping[str, np.ndarray]], experiments: Mapping[str, Experiment], judge: Judge, path: Path
) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["experiment", "stages", "judged", "pictures", "sum", "mean", "low", "high"])
        for name, conditions in found.items():
            for condition, values in conditions.items():
                for judged in experiments[name].judged or judge.names:
                    column = values[:, judge.names.index(judged)]
                    low, high = interval(column, experiments[name].together, judge.counts)
                    numbers = [round(float(x), 4) for x in (column.sum(), column.mean(), low, high)]
                    writer.writerow([name, condition, judged, len(column), *numbers])


def matrix(found: Mapping[str, np.ndarray], judge: Judge, judged: Sequence[str] | None = None) -> np.ndarray:
    """Means (names, conditions) of one experiment."""
    columns = [judge.names.index(name) for name in judged or judge.names]
    return np.stack([values[:, columns].mean(axis=0) for values in found.values()], axis=1)
