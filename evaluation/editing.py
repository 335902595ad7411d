"""Edits of real images, counted: how often the new attribute arrives, and how often every other one stays.

The images are rendered ones of combinations that training never showed. The prompt names shape, texture and colour;
place, size and background are only in the image, so whatever forgets the image loses them.

Shapes: N images, F factors of the rendered world, M methods, E = 3 edits (of `EDITED`), R pixels a side.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

from evaluation.images import load, to_bytes
from evaluation.jobs import Result, run_jobs
from evaluation.judges import load_judge
from evaluation.statistics import mean_interval, share, table
from evaluation.world.attributes import COLUMNS, FACTORS, random_attributes, words_of
from evaluation.world.rendered import render
from ldm.editing.invert import AUTOENCODER, PSNR, edit_image, invert_image
from ldm.editing.request import Edit, InversionOptions
from ldm.embeddings import Concept
from ldm.files.images import to_pil, to_tensor
from ldm.generate import main

EDITED = ("shape", "texture", "colour")
CHANGED = slice(None), range(len(EDITED)), [COLUMNS[factor] for factor in EDITED]  # of attributes (N, E, F)
STRENGTHS = (0.4, 0.6, 0.8)
ADVICE = {"tau_v": 0.5, "tau_c": 0.6, "tau_s": 0.6, "tau_u": 0.0}  # of StyleDiffusion's README
LOOSE = {"tau_v": 0.2, "tau_c": 0.4, "tau_s": 0.2, "tau_u": 0.0}


@dataclass(frozen=True)
class EditStudy:
    """A study of edits: the images, and the settings of every method."""

    config: str = "configs/demo/finetune.yaml"
    ckpt: str = "models/demo/model.safetensors"
    classifier: str = "models/demo/classifier.safetensors"
    count: int = 24  # N
    seed: int = 1717  # of the images
    steps: int = 20
    scale: float = 2.5
    inner_steps: int = 20
    null_steps: int = 5
    # of StyleDiffusion, by name; the other methods have the last ones
    taus: Mapping[str, Mapping[str, float]] | None = None

    @property
    def settings(self) -> Mapping[str, Mapping[str, float]]:
        return self.taus or {"advice": ADVICE, "loose": LOOSE}

    @property
    def attributes(self) -> Tensor:
        return random_attributes(self.count, self.seed, held_out=True)

    def measure(self, folder: Path, workers: int | None) -> list[Result]:
        """Return what `measure_image` found of each image; finished ones are kept in `folder`."""
        jobs = {i: {"study": self, "number": i} for i in range(self.count)}
        return list(run_jobs(measure_image, jobs, folder / "measured", workers, "editing").values())


def targets_of(attributes: Tensor, seed: int) -> Tensor:
    """Return the attributes (E, F) of an image's edits: in each, one attribute is another, drawn at random."""
    rng = np.random.default_rng(seed)
    rows = attributes.repeat(len(EDITED), 1)
    for row, name in zip(rows, EDITED, strict=True):
        words = len(FACTORS[name])
        row[COLUMNS[name]] = (row[COLUMNS[name]] + int(rng.integers(1, words))) % words
    return rows


def prompt_of(attributes: Tensor) -> str:
    """Return what the prompt says of an image."""
    words = words_of(attributes)
    return f"a {words['texture']} {words['colour']} {words['shape']}"


def background_of(attributes: Tensor, seed: int) -> Tensor:
    """Return where only background is, bool (R, R): what changes everywhere with the background's colour."""
    other = attributes.clone()
    column = COLUMNS["background"]
    other[column] = (other[column] + 1) % len(FACTORS["background"])
    one, two = render(torch.stack([attributes, other]), [seed, seed])
    change = (one - two).abs().amax(dim=0)
    return change > 0.99 * change.max()


def measure_image(study: EditStudy, number: int) -> Result:
    """Edit one image by every method.

    Returns:
        image, targets: attributes (F,), (E, F). original uint8 (R, R, 3); per method images/… uint8 (E, R, R, 3),
        read/… (E, F), background/… PSNR in dB (E,), seconds/… of an edit, and of the inversions.
    """
    model = load(study.config, study.ckpt)
    attributes, seed = study.attributes[number], (study.seed << 32) + number
    targets, prompt = targets_of(attributes, study.seed + number), prompt_of(attributes)
    original = to_pil(render(attributes[None], [seed])[0])
    found: Result = {"image": attributes.numpy(), "targets": targets.numpy(), "original": np.asarray(original)}
    shared: dict[str, Any] = {"model": model, "ddim_steps": study.steps, "scale": study.scale, "seed": number}
    edits: dict[str, Callable[[str], Any]] = {
        f"img2img {strength}": partial(main, content_dir=original, strength=strength, progress=False, **shared)
        for strength in STRENGTHS
    }

    def edit(concept: Concept, taus: Mapping[str, Any], learned: bool) -> Callable[[str], Any]:
        return lambda text: edit_image(model, concept, Edit(text, **taus), learned, False).image

    for method, inner in (("null-text", study.null_steps), ("stylediffusion", study.inner_steps)):
        options = InversionOptions(study.steps, study.scale, inner)
        start = time.perf_counter()
        concept = invert_image(model, original, prompt, method, options, progress=False)
        found[f"inversion/{method}"] = np.float64(time.perf_counter() - start)
        found[f"psnr/{method}"] = np.float64(concept.metadata[PSNR])
        found["psnr/autoencoder"] = np.float64(concept.metadata[AUTOENCODER])
        if method == "stylediffusion":
            edits |= {f"StyleDiffusion, {name}": edit(concept, x, True) for name, x in study.settings.items()}
        else:
            last = list(study.settings.values())[-1]
            edits["DDIM inversion + P2P"] = edit(concept, last, False)
            edits["null-text + P2P"] = edit(concept, last, True)
    empty = torch.stack([background_of(attributes, seed) & background_of(row, seed) for row in targets])
    for name, make in edits.items():
        start = time.perf_counter()
        images = torch.stack([to_tensor(make(prompt_of(row))) for row in targets])
        found[f"seconds/{name}"] = np.float64((time.perf_counter() - start) / len(targets))
        found[f"images/{name}"] = to_bytes(images)
        found[f"read/{name}"] = load_judge(study.classifier).read(images).numpy()
        error = ((images - to_tensor(original)).square().mean(dim=1) * empty).sum(dim=(1, 2)) / empty.sum(dim=(1, 2))
        found[f"background/{name}"] = (10 * torch.log10(4 / error)).numpy()
    return found


def summary(results: Sequence[Result]) -> str:
    """Return the tables as Markdown."""
    names = [key.partition("/")[2] for key in results[0] if key.startswith("images/")]
    own, targets = np.array([x["image"] for x in results])[:, None], np.array([x["targets"] for x in results])
    rows, kept = [], []
    for name in names:
        read = np.array([result[f"read/{name}"] for result in results])  # (N, E, F)
        arrival = (read == targets)[CHANGED]  # (N, E)
        stays = (read == own).astype(float)  # NaN for the attribute that was edited
        stays[CHANGED] = np.nan
        background = np.array([result[f"background/{name}"].mean() for result in results])
        low, high = mean_interval(background, 0, 99)
        rows.append([
            name,
            share(arrival.mean(axis=1)),
            *(f"{column:.2f}" for column in arrival.mean(axis=0)),
            share(np.nanmean(stays, axis=(1, 2))),
            f"{background.mean():.1f} ({low:.1f}–{high:.1f})",
            f"{np.median([result[f'seconds/{name}'] for result in results]):.1f}",
        ])  # fmt: skip
        kept.append([name, *(f"{column:.2f}" for column in np.nanmean(stays, axis=(0, 1)))])
    head = ["method", "arrives", *EDITED, "others stay", "background, dB", "seconds"]
    inverted = ("null-text", "stylediffusion")
    quality = [f"{key}: {np.mean([r[f'psnr/{key}'] for r in results]):.1f} dB" for key in ("autoencoder", *inverted)]
    times = [f"{key} {np.median([r[f'inversion/{key}'] for r in results]):.0f} s" for key in inverted]
    notes = f"Reconstructions: {', '.join(quality)}. Inversions: {', '.join(times)}."
    return "\n\n".join([table(head, rows), table(["stays", *FACTORS], kept), notes]) + "\n"


def plot_sheet(results: Sequence[Result], path: Path, images: int = 2) -> None:
    """Draw some images with their edits: a row for each edit, a column for each method."""
    names = [key.partition("/")[2] for key in results[0] if key.startswith("images/")]
    rows = [(result, e) for result in results[:images] for e in range(len(EDITED))]
    size = 1.5 * (len(names) + 1), 1.65 * len(rows)
    figure, axes = plt.subplots(len(rows), len(names) + 1, figsize=size, layout="constrained")
    for line, (result, e) in zip(axes, rows, strict=True):
        target = words_of(torch.from_numpy(result["targets"][e]))[EDITED[e]]
        own = words_of(torch.from_numpy(result["image"]))[EDITED[e]]
        shown = [result["original"], *(result[f"images/{name}"][e] for name in names)]
        for cell, image in zip(line, shown, strict=True):
            cell.imshow(image)
            cell.set(xticks=[], yticks=[])
        line[0].set_ylabel(f"{own} → {target}", fontsize=9)
    for cell, name in zip(axes[0], ["image", *names], strict=True):
        cell.set_title(name.replace(", ", ",\n").replace(" + ", "\n+ "), fontsize=9)
    figure.savefig(path, dpi=80, bbox_inches="tight")
    plt.close(figure)
