"""The spectrum's experiments on the rendered world, where prompts are captions and every attribute is known."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from ldm.data.world import FACTORS, caption, random_attributes, sentence
from ldm.embeddings import Concept, save_concept
from ldm.evaluation.concepts import COLUMNS, TRANSFERS, brought, concept_attributes, fill, learn_concept, noises
from ldm.evaluation.jobs import run_jobs
from ldm.evaluation.spectrum import Experiment, add, all_windows, place, switch, throughout, withhold

SETTINGS = {"model.params.frozen_dtype": "bfloat16"}  # as in configs/evidence/ablation.yaml
SEED = 61  # of captions and of the concepts that windows are chosen on; the ablation's concepts have another


def words_of(row: torch.Tensor, without: str) -> str:
    """The caption of attributes (F,) with the words of one factor left away."""
    words = {name: values[i] for (name, values), i in zip(FACTORS.items(), row.tolist(), strict=True)}
    return sentence(words | {without: ""})


def caption_experiments(count: int, width: int) -> dict[str, Experiment]:
    """withhold, add-FACTOR and switch on `count` captions of held-out combinations; A and B differ in every factor."""
    rows = random_attributes(count, SEED, held_out=True)
    rng = np.random.default_rng(SEED)
    choices = np.array([len(values) for values in FACTORS.values()])
    others = torch.from_numpy((rows.numpy() + rng.integers(1, choices, rows.shape)) % choices)
    prompts, seeds = [caption(row) for row in rows], list(range(count))
    experiments = {"withhold": withhold(prompts, seeds, width)}
    for name in FACTORS:
        without = [words_of(row, name) for row in rows]
        experiments[f"add-{name}"] = add(without, prompts, seeds, width)
        experiments[f"add-{name}"].conditions["none"] = throughout(without)  # what chance gives
        experiments[f"add-{name}"].judged = [name]
    experiments["switch"] = switch(prompts, [caption(row) for row in others], seeds)
    for experiment in experiments.values():
        experiment.toward, experiment.away = rows, others
    return experiments


def learn_concepts(config: str, ckpt: str, count: int, folder: Path, workers: int | None = None) -> dict[str, str]:
    """Learn `count` held-out pictures with the configuration, but frozen parts in bfloat16: {placeholder: file}.

    The files in `folder`/learned are written anew each time: they are of this model and this configuration.
    """
    shared = {"config": config, "ckpt": ckpt, "seed": SEED, "overrides": SETTINGS}
    jobs = {f"concept-{i:02d}": shared | {"number": i} for i in range(count)}
    files = {}
    for i, result in enumerate(run_jobs(learn_concept, jobs, folder / "learned", workers, "learning").values()):
        path = folder / "learned" / f"concept-{i:02d}.safetensors"
        save_concept(Concept(torch.from_numpy(result["vectors"])), path)
        files[f"<{i}>"] = str(path)
    return files


def concept_experiments(concepts: Mapping[str, str], seeds: int = 4) -> dict[str, Experiment]:
    """For every preset, its prompt with the concept in each window of stages there is."""
    experiments = {}
    for name, transfer in TRANSFERS.items():
        prompts, rows, others, numbers = [], [], [], []
        for number, placeholder in enumerate(concepts):
            picture, text = concept_attributes(number, SEED)
            prompt = fill(transfer, text)
            prompt = prompt if "*" in prompt else f"{prompt} *"
            prompts += [prompt.replace("*", placeholder)] * seeds
            rows += [picture] * seeds
            others += [text] * seeds
            numbers += noises(number, SEED, seeds)
        experiments[f"concept-{name}"] = place(prompts, numbers, all_windows(), dict(concepts))
        experiments[f"concept-{name}"].toward = torch.stack(rows)
        experiments[f"concept-{name}"].away = torch.stack(others)
        experiments[f"concept-{name}"].together = seeds
    return experiments


def best_windows(found: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, list[int]]:
    """For every preset the window that most often brings the wanted attribute alone; of equals the shortest."""
    presets = {}
    for name, transfer in TRANSFERS.items():
        scores = {}
        for window, same in found[f"concept-{name}"].items():
            first, _, last = window.partition("-")
            stages = list(range(int(first), int(last or first) + 1))
            share = brought(same, np.ones(len(COLUMNS)), transfer)["transferred"].mean()
            scores[tuple(stages)] = share, -len(stages)
        presets[name] = list(max(scores, key=scores.get))
    return presets
