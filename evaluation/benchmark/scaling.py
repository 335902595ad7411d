"""Scaling of cost: training steps, images and text passes over stages, steps, batch, pixels and concepts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from evaluation.benchmark.measure import Contender, alternate
from evaluation.benchmark.models import build_model
from evaluation.benchmark.report import Row, make_row
from evaluation.benchmark.sample import sampling_contender
from evaluation.benchmark.train import contender
from ldm.embeddings import Concept

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion

STEPS = 5  # of sampling, where something else grows
Axis = Mapping[int, Contender]


def axes(
    size: str, device: torch.device, switches: frozenset[str], resolution: int, overrides: list[str]
) -> dict[str, Axis]:
    """Return {what grows: {how much there is: the work}}."""
    base = build_model(size, device, overrides)
    build = partial(build_model, size, device, overrides)

    def draw(batch: int = 1, side: int = resolution, steps: int = STEPS) -> Contender:
        return sampling_contender(base, "", switches, batch, side, steps)

    def learn(of: LatentDiffusion, batch: int = 1) -> Contender:
        return contender(of, "", switches, batch, resolution)

    grows: dict[str, tuple[tuple[int, ...], Callable[[int], Contender]]] = {
        "stages, training step": ((1, 2, 5, 10, 20, 50), lambda n: learn(build(n))),
        "samples, training step": ((1, 2, 4, 8, 16), lambda n: learn(base, n)),
        "steps, image": ((5, 10, 20, 40), lambda n: draw(steps=n)),
        "images in a batch": ((1, 2, 4, 8, 16), lambda n: draw(n)),
        "pixels, image": ((1, 4, 9, 16), lambda n: draw(side=resolution // 2 * math.isqrt(n))),
        "concepts, text passes": ((1, 2, 4, 8), lambda n: read_concepts(build(), n)),
    }
    return {
        name: {value: replace(make(value), name=f"{value}") for value in values}
        for name, (values, make) in grows.items()
    }


def read_concepts(model: LatentDiffusion, count: int) -> Contender:
    """Encode a prompt that names `count` concepts."""
    manager: Any = model.eval().embedding_manager
    names = [f"<{i}>" for i in range(count)]
    vectors = torch.zeros(model.num_stages, model.cond_stage_model.width)
    manager.load({name: Concept(vectors) for name in names})

    @torch.no_grad()
    def run() -> torch.Tensor:
        return model.get_learned_conditioning([" ".join(names)]).at(0).k

    return Contender("", run, run)


def measure(found: Mapping[str, Axis], device: torch.device, repeats: int, clock: str) -> list[Row]:
    """Time each axis in turns; the last column is how many times as fast as the axis' first value a row is."""
    rows = []
    for name, axis in found.items():
        times = alternate([*axis.values()], device, repeats)
        first = times[next(iter(axis.values())).name]
        for value, c in axis.items():
            rows.append(make_row(f"{name}: {value}", times[c.name], first, clock, details={"axis": name, "n": value}))
    return rows


def plot(rows: list[Row], path: Path) -> None:
    """Draw time over amount, both as multiples of the least, with the exponent of the upper half."""
    import matplotlib.pyplot as plt

    plt.switch_backend("Agg")
    figure, panel = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    for name in dict.fromkeys(row["details"]["axis"] for row in rows):
        own = [row for row in rows if row["details"]["axis"] == name]
        x, y = (np.array([value / values[0] for value in values]) for values in (
            [row["details"]["n"] for row in own], [row["ms"] for row in own]
        ))  # fmt: skip
        panel.plot(x, y, "o-", markersize=4, label=f"{name}: {own[0]['ms']:.0f} ms, exponent {exponent(x, y):.2f}")
    ends = [1, max(row["details"]["n"] for row in rows)]
    panel.plot(ends, ends, "k:", linewidth=0.8, label="proportional")
    panel.set(xscale="log", yscale="log", xlabel="amount, the least = 1", ylabel="time, the least's = 1")
    panel.grid(alpha=0.3, which="both")
    panel.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def exponent(x: np.ndarray, y: np.ndarray) -> float:
    """Return the slope of log y over log x, of the larger half of the amounts."""
    half = len(x) // 2
    return float(np.polyfit(np.log(x[half - 1 :]), np.log(y[half - 1 :]), 1)[0])
