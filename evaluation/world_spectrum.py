"""The spectrum's experiments on the rendered world, where prompts are captions and every attribute is known."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from evaluation.concepts import COLUMNS, TRANSFERS, brought, concept_attributes, fill, learn_concept, noises
from evaluation.jobs import run_jobs
from evaluation.spectrum import Experiment, add, all_windows, place, switch, throughout, withhold
from evaluation.world.rendered import FACTORS, caption, random_attributes, sentence
from ldm.embeddings import Concept, load_concept, save_concept

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

    The files are `folder`/learned/concept-NN.safetensors; one that holds the vectors already stays, byte for byte (the
    format writes metadata in any order), so that what was drawn with it counts as drawn.
    """
    shared = {"config": config, "ckpt": ckpt, "seed": SEED, "overrides": SETTINGS}
    jobs = {f"concept-{i:02d}": shared | {"number": i} for i in range(count)}
    files = {}
    for i, result in enumerate(run_jobs(learn_concept, jobs, folder / "learned", workers, "learning").values()):
        path = folder / "learned" / f"concept-{i:02d}.safetensors"
        vectors = torch.from_numpy(result["vectors"])
        if not _holds(path, vectors):
            save_concept(Concept(vectors), path)
        files[f"<{i}>"] = str(path)
    return files


def _holds(path: Path, vectors: torch.Tensor) -> bool:
    with suppress(ValueError, OSError):
        return torch.equal(load_concept(path).vectors, vectors)
    return False


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


def best_windows(found: Mapping[str, Mapping[str, np.ndarray]], together: int = 4) -> dict[str, list[int]]:
    """For every preset a window in which the wanted attribute comes from the picture, and no unwanted one.

    Of the windows that transfer as well as the best, to within one standard error (Breiman et al. 1984), and that bring
    no unwanted attribute more often than chance would, it is the one that brings the wanted one most often; of equals
    the shortest. The best of 55 windows itself would often be the luckiest.

    Args:
        found: {experiment: {window: (N, F)}}, of `concept_experiments`.
        together: pictures of one concept, as there.
    """
    presets = {}
    for name, transfer in TRANSFERS.items():
        counts = {w: brought(x, np.ones(len(COLUMNS)), transfer) for w, x in found[f"concept-{name}"].items()}
        shares = {window: count["transferred"].mean() for window, count in counts.items()}
        best = max(shares, key=shares.get)
        concepts = counts[best]["transferred"].reshape(-1, together).mean(axis=1)
        error = concepts.std(ddof=1) / np.sqrt(len(concepts)) if len(concepts) > 1 else 0.0
        good = [window for window, share in shares.items() if share >= shares[best] - error]
        chance = {factor: 1 / len(FACTORS[factor]) for factor in transfer.unwanted}
        alone = [w for w in good if all(counts[w][f"leaked/{factor}"].mean() <= p for factor, p in chance.items())]
        wanted = [(counts[window]["wanted"].mean(), -len(stages_of(window)), window) for window in alone or good]
        presets[name] = stages_of(max(wanted)[2])
    return presets


def stages_of(window: str) -> list[int]:
    """The stages that a window's label names: 2-4 or 7."""
    first, _, last = window.partition("-")
    return list(range(int(first), int(last or first) + 1))
