"""The prompt spectrum of a model, measured: what is decided in which stage of denoising.

Four experiments with windows of stages (the paper's section 3, and its presets), each between two poles:

* withhold: the prompt is omitted in a window; poles: the prompt throughout, and no prompt.
* add: a word is there in a window only; poles: with the word throughout, and without it.
* switch: prompt A from the start down to stage k, prompt B below; poles: A, and B.
* concept: a learned `*` stands in the prompt in a window only; poles: with `*` throughout, and without it.

On the rendered world known attributes stand for the first pole: those of the prompt (A), or of the learned image,
whatever the model makes of them.
Stages here are tenths of time, 0 = end of sampling (low noise), whatever the number of stages of model or concept.

Shapes: N images of a condition, A names of the judge, R pixels a side.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evaluation.concepts import TRANSFERS, Subject, learn_concept, transferred
from evaluation.images import Sampling, decode, from_bytes, load, load_concepts, sample, to_bytes
from evaluation.jobs import Result, Workers, run_jobs
from evaluation.judges import Judge
from evaluation.statistics import mean_interval, share_interval, wilson
from evaluation.world import attributes as words
from ldm.conditioning.presets import preset
from ldm.embeddings import Concept

STAGES = 10
SETTINGS = {"model.params.frozen_dtype": "bfloat16"}  # of learning, as in configs/evidence/ablation.yaml
SEED = 61  # of captions and of the concepts that windows are chosen on; the ablation's concepts have another
EXAMPLES = 4  # images of each condition that are kept for figures
Texts = list[list[str]]  # STAGES lists of N texts
Window = tuple[int, int]  # first and last stage
Concepts = Mapping[str, "str | np.ndarray"]  # placeholder -> file, or vectors (S, D)
Scores = Mapping[str, np.ndarray]  # condition -> (N, A)


@dataclass
class Experiment:
    """Conditions on the same N scenes (prompts and seeds), and the two poles that they lie between."""

    conditions: dict[str, Texts]  # by label, in the order of the figures
    seeds: list[int]  # N
    toward: Texts
    away: Texts
    truth: tuple[Tensor, Tensor] | None = None  # attributes of the poles, (N, F) each, which are not drawn then
    judged: Sequence[str] | None = None  # names that count here; None for all that the judge has
    concepts: Concepts = field(default_factory=dict)  # of the texts
    together: int = 1  # consecutive images that belong to one concept, and are not independent

    def to_draw(self) -> dict[str, Texts]:
        return self.conditions if self.truth else self.conditions | {"toward": self.toward, "away": self.away}


def throughout(texts: Sequence[str]) -> Texts:
    return [list(texts)] * STAGES


def inside(window: Window, within: Sequence[str], without: Sequence[str]) -> Texts:
    """Return `within` in the stages first..last, `without` in the others; N texts each."""
    return [list(within if window[0] <= stage <= window[1] else without) for stage in range(STAGES)]


def sliding(width: int) -> list[Window]:
    """Return all windows of `width` stages, from the end of sampling to its start."""
    return [(first, first + width - 1) for first in range(STAGES - width + 1)]


def all_windows() -> list[Window]:
    return [(first, last) for first in range(STAGES) for last in range(first, STAGES)]


def label(window: Window) -> str:
    return str(window[0]) if window[0] == window[1] else f"{window[0]}-{window[1]}"


def add(prompts: Sequence[str], longer: Sequence[str], seeds: list[int], windows: Sequence[Window]) -> Experiment:
    conditions = {label(w): inside(w, longer, prompts) for w in windows}
    return Experiment(conditions, seeds, throughout(longer), throughout(prompts))


def withhold(prompts: Sequence[str], seeds: list[int], windows: Sequence[Window]) -> Experiment:
    made = add(prompts, [""] * len(prompts), seeds, windows)
    return replace(made, toward=made.away, away=made.toward)


def switch(first: Sequence[str], then: Sequence[str], seeds: list[int]) -> Experiment:
    """Return conditions k = 0 … 10 with `first` from the start down to stage k and `then` below; 0 is all `first`."""
    conditions = {str(k): inside((k, STAGES - 1), first, then) for k in range(STAGES + 1)}
    return Experiment(conditions, seeds, throughout(first), throughout(then))


def place(prompts: Sequence[str], seeds: list[int], windows: Sequence[Window], concepts: Concepts) -> Experiment:
    """Return prompts with the placeholder of a concept in a window only."""
    named = [(prompt, next(name for name in concepts if name in prompt)) for prompt in prompts]
    plain, with_it = (
        [preset("content", prompt, stages=stages, placeholder=name)[0] for prompt, name in named]
        for stages in ([], [0])
    )
    return replace(add(plain, with_it, seeds, windows), concepts=concepts)


def draw(
    config: str, ckpt: str, texts: Texts, seeds: Sequence[int], concepts: Concepts, options: Mapping[str, Any]
) -> Result:
    """Return the images of one condition, uint8 (N, R, R, 3); options: steps, scale, size, batch_size."""
    model = load(config, ckpt, STAGES if concepts else None)
    if concepts:
        found = {k: x if isinstance(x, str) else Concept(torch.from_numpy(x)) for k, x in concepts.items()}
        load_concepts(model, found)
    sampling, batch_size = Sampling(options["steps"], options["scale"]), options["batch_size"]
    latents = sample(model, texts, seeds, sampling, options["size"], batch_size)
    return {"images": to_bytes(decode(model, latents, batch_size))}


@dataclass
class Spectrum:
    """Results of `run`, for each experiment: scores toward its first pole, and the first images of each condition."""

    scores: dict[str, Scores]
    examples: dict[str, Mapping[str, np.ndarray]]  # condition -> uint8 (up to EXAMPLES, R, R, 3)


def run(
    experiments: Mapping[str, Experiment],
    judge: Judge,
    config: str,
    ckpt: str,
    folder: Path,
    options: Mapping[str, Any],
    workers: Workers = None,
) -> Spectrum:
    """Draw and judge all conditions; an interrupted run resumes in `folder`, where it leaves spectrum.csv."""
    shared = {"config": config, "ckpt": ckpt, "options": dict(options)}
    jobs = {
        (name, condition): shared | {"texts": texts, "seeds": x.seeds, "concepts": x.concepts}
        for name, x in experiments.items()
        for condition, texts in x.to_draw().items()
    }
    drawn = run_jobs(draw, jobs, folder / "drawn", workers, "drawing")
    found = Spectrum({}, {})
    for name, x in experiments.items():
        images = {condition: drawn[name, condition]["images"] for condition in x.to_draw()}
        toward, away = x.truth or (from_bytes(images["toward"]), from_bytes(images["away"]))
        found.scores[name] = {k: judge.follows(from_bytes(images[k]), toward, away).numpy() for k in x.conditions}
        found.examples[name] = {k: images[k][:EXAMPLES] for k in x.conditions}
    _write(found.scores, experiments, judge, folder / "spectrum.csv")
    return found


def interval(values: np.ndarray, together: int, counts: bool) -> tuple[float, float]:
    """Return the 95 % interval of the mean of values (N,) in 0..1; see `Experiment.together` and `Judge.counts`."""
    if counts and together == 1:
        return wilson(values.sum(), len(values))
    means = values.reshape(-1, together).mean(axis=1)
    return share_interval(means) if counts else mean_interval(means, 0.0, 1.0)


def half_way(scores: Scores, judge: Judge) -> dict[str, float]:
    """Return for each name of the judge the stage of the experiment `switch` at which half of the images follow A.

    Interpolated, 0..10, where the share first falls below a half; NaN where it never does.
    """
    places = {}
    for name, shares in zip(judge.names, matrix(scores, judge), strict=True):
        below = np.flatnonzero(shares < 0.5)
        places[name] = float("nan")
        if len(below) and below[0] > 0:
            k = below[0]
            places[name] = float(k - 1 + (shares[k - 1] - 0.5) / (shares[k - 1] - shares[k]))
    return places


def matrix(scores: Scores, judge: Judge, judged: Sequence[str] | None = None) -> np.ndarray:
    """Return the means (names, conditions) of one experiment."""
    columns = [judge.names.index(name) for name in judged or judge.names]
    return np.stack([values[:, columns].mean(axis=0) for values in scores.values()], axis=1)


def _write(found: Mapping[str, Scores], experiments: Mapping[str, Experiment], judge: Judge, path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["experiment", "stages", "judged", "images", "sum", "mean", "low", "high"])
        for name, conditions in found.items():
            for condition, values in conditions.items():
                for judged in experiments[name].judged or judge.names:
                    column = values[:, judge.names.index(judged)]
                    low, high = interval(column, experiments[name].together, judge.counts)
                    numbers = [round(float(x), 4) for x in (column.sum(), column.mean(), low, high)]
                    writer.writerow([name, condition, judged, len(column), *numbers])


# On the rendered world, where prompts are captions and every attribute is known


def caption_experiments(count: int, windows: Sequence[Window]) -> dict[str, Experiment]:
    """withhold, add-FACTOR and switch on `count` captions of held-out combinations; A and B differ in every factor."""
    rows = words.random_attributes(count, SEED, held_out=True)
    others = words.other_attributes(rows, np.random.default_rng(SEED))
    prompts, seeds = [words.caption(row) for row in rows], list(range(count))
    experiments = {"withhold": withhold(prompts, seeds, windows)}
    for name in words.FACTORS:
        without = [words.sentence(words.words_of(row) | {name: ""}) for row in rows]
        experiment = experiments[f"add-{name}"] = add(without, prompts, seeds, windows)
        experiment.conditions["none"] = throughout(without)  # what chance gives
        experiment.judged = [name]
    experiments["switch"] = switch(prompts, [words.caption(row) for row in others], seeds)
    for experiment in experiments.values():
        experiment.truth = rows, others
    return experiments


def learn_concepts(config: str, ckpt: str, count: int, folder: Path, workers: Workers = None) -> dict[str, np.ndarray]:
    """Learn `count` held-out images as configured, but with frozen parts in bfloat16: {placeholder: vectors (S, D)}."""
    shared = {"config": config, "ckpt": ckpt, "overrides": SETTINGS}
    jobs = {f"<{i}>": shared | {"subject": Subject(i, SEED)} for i in range(count)}
    learned = run_jobs(learn_concept, jobs, folder / "learned", workers, "learning")
    return {name: result["vectors"] for name, result in learned.items()}


def concept_experiments(concepts: Concepts, seeds: int = 4) -> dict[str, Experiment]:
    """Return for every preset its prompt with the concepts in each window of stages there is."""
    subjects = [Subject(number, SEED) for number in range(len(concepts))]
    numbers = [number for subject in subjects for number in subject.seeds(seeds)]
    image, text = (
        torch.stack(rows).repeat_interleave(seeds, dim=0)
        for rows in ([x.attributes for x in subjects], [x.text for x in subjects])
    )
    experiments = {}
    for name, transfer in TRANSFERS.items():
        prompts = []
        for placeholder, subject in zip(concepts, subjects, strict=True):
            prompt = transfer.fill(subject.text)
            prompt = prompt if "*" in prompt else f"{prompt} *"
            prompts += [prompt.replace("*", placeholder)] * seeds
        made = place(prompts, numbers, all_windows(), concepts)
        experiments[f"concept-{name}"] = replace(made, truth=(image, text), together=seeds)
    return experiments


def best_windows(found: Mapping[str, Scores], together: int = 4) -> dict[str, list[int]]:
    """Return for every preset the stages of a window that transfers the wanted attribute well, and no unwanted one.

    Of the windows that transfer as well as the best, to within one standard error (Breiman et al. 1984), and that let
    no unwanted attribute through more often than chance would, it is the one with the wanted attribute most often; of
    equals the shortest. The best of 55 windows itself would often be the luckiest.

    Args:
        found: scores of `concept_experiments`, with `together` images of each concept.
    """
    windows = {}
    for name, transfer in TRANSFERS.items():
        scores = found[f"concept-{name}"]
        counts = {window: transferred(x, np.ones(len(words.COLUMNS)), transfer) for window, x in scores.items()}
        shares = {window: float(count["transferred"].mean()) for window, count in counts.items()}
        best = max(shares, key=lambda window: shares[window])
        concepts = counts[best]["transferred"].reshape(-1, together).mean(axis=1)
        error = concepts.std(ddof=1) / np.sqrt(len(concepts)) if len(concepts) > 1 else 0.0
        good = {window: counts[window] for window, share in shares.items() if share >= shares[best] - error}
        chance = {f"leaked/{factor}": 1 / len(words.FACTORS[factor]) for factor in transfer.unwanted}
        clean = {w: x for w, x in good.items() if all(x[key].mean() <= share for key, share in chance.items())}
        chosen = max((x["wanted"].mean(), -len(stages_of(w)), w) for w, x in (clean or good).items())
        windows[name] = stages_of(chosen[-1])
    return windows


def stages_of(window: str) -> list[int]:
    """Return the stages that a window's label names: 2-4 or 7."""
    first, _, last = window.partition("-")
    return list(range(int(first), int(last or first) + 1))
