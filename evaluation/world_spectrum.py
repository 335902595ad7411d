"""The spectrum's experiments on the rendered world, where prompts are captions and every attribute is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from evaluation import spectrum
from evaluation.concepts import TRANSFERS, Subject, learn_concept, transferred
from evaluation.jobs import Workers, run_jobs
from evaluation.world import attributes as words

SETTINGS = {"model.params.frozen_dtype": "bfloat16"}  # as in configs/evidence/ablation.yaml
SEED = 61  # of captions and of the concepts that windows are chosen on; the ablation's concepts have another


def caption_experiments(count: int, windows: Sequence[spectrum.Window]) -> dict[str, spectrum.Experiment]:
    """withhold, add-FACTOR and switch on `count` captions of held-out combinations; A and B differ in every factor."""
    rows = words.random_attributes(count, SEED, held_out=True)
    others = words.other_attributes(rows, np.random.default_rng(SEED))
    prompts, seeds = [words.caption(row) for row in rows], list(range(count))
    experiments = {"withhold": spectrum.withhold(prompts, seeds, windows)}
    for name in words.FACTORS:
        without = [words.sentence(words.words_of(row) | {name: ""}) for row in rows]
        experiment = experiments[f"add-{name}"] = spectrum.add(without, prompts, seeds, windows)
        experiment.conditions["none"] = spectrum.throughout(without)  # what chance gives
        experiment.judged = [name]
    experiments["switch"] = spectrum.switch(prompts, [words.caption(row) for row in others], seeds)
    for experiment in experiments.values():
        experiment.truth = rows, others
    return experiments


def learn_concepts(config: str, ckpt: str, count: int, folder: Path, workers: Workers = None) -> dict[str, np.ndarray]:
    """Learn `count` held-out images as configured, but with frozen parts in bfloat16: {placeholder: vectors (S, D)}."""
    shared = {"config": config, "ckpt": ckpt, "overrides": SETTINGS}
    jobs = {f"<{i}>": shared | {"subject": Subject(i, SEED)} for i in range(count)}
    learned = run_jobs(learn_concept, jobs, folder / "learned", workers, "learning")
    return {name: result["vectors"] for name, result in learned.items()}


def concept_experiments(concepts: spectrum.Concepts, seeds: int = 4) -> dict[str, spectrum.Experiment]:
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
        made = spectrum.place(prompts, numbers, spectrum.all_windows(), concepts)
        experiments[f"concept-{name}"] = replace(made, truth=(image, text), together=seeds)
    return experiments


def best_windows(found: Mapping[str, spectrum.Scores], together: int = 4) -> dict[str, list[int]]:
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
