"""Scaling of cost: training steps, images and text passes over stages, steps, batch, pixels and concepts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from evaluation.benchmark import ours
from evaluation.benchmark.measure import Contender, Row
from evaluation.benchmark.models import build_model
from evaluation.benchmark.switches import Work, with_stages
from ldm.embeddings import Concept

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion

STEPS = 5  # of sampling, where something else grows


def axes(
    size: str, device: torch.device, switches: frozenset[str], resolution: int, overrides: list[str]
) -> list[list[Contender]]:
    """Return for everything that grows the work with more and more of it; `details` has its `axis` and amount `n`."""
    build = partial(build_model, size, device)
    base, drawing = build(overrides), Work("sample", 1, resolution, STEPS)

    def draw(**work: Any) -> Contender:
        return ours.contender(base, drawing._replace(**work), switches)

    def learn(of: LatentDiffusion, batch: int = 1) -> Contender:
        return ours.contender(of, Work("train", batch, resolution), switches)

    grows: dict[str, tuple[tuple[int, ...], Callable[[int], Contender]]] = {
        "stages, training step": ((1, 2, 5, 10, 20, 50), lambda n: learn(build(with_stages(overrides, n)))),
        "samples, training step": ((1, 2, 4, 8, 16), lambda n: learn(base, n)),
        "steps, image": ((5, 10, 20, 40), lambda n: draw(steps=n)),
        "images in a batch": ((1, 2, 4, 8, 16), lambda n: draw(batch=n)),
        "pixels, image": ((1, 4, 9, 16), lambda n: draw(resolution=resolution // 2 * math.isqrt(n))),
        "concepts, text passes": ((1, 2, 4, 8), lambda n: read_concepts(build(overrides), n)),
    }
    return [
        [replace(make(n), name=f"{axis}: {n}", details={"axis": axis, "n": n}, result=None) for n in amounts]
        for axis, (amounts, make) in grows.items()
    ]


def read_concepts(model: LatentDiffusion, count: int) -> Contender:
    """Encode a prompt that names `count` concepts."""
    manager: Any = model.eval().embedding_manager
    names = [f"<{i}>" for i in range(count)]
    vectors = torch.zeros(model.num_stages, model.cond_stage_model.width)
    manager.load({name: Concept(vectors) for name in names})

    @torch.no_grad()
    def run() -> torch.Tensor:
        return model.get_learned_conditioning([" ".join(names)]).at(0).k

    return Contender("", run)


def plot(rows: list[Row], path: Path) -> None:
    """Draw time over amount, both as multiples of the least, with the exponent of the upper half."""
    import matplotlib.pyplot as plt

    plt.switch_backend("Agg")
    figure, panel = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    for name in dict.fromkeys(row["details"]["axis"] for row in rows):
        own = [row for row in rows if row["details"]["axis"] == name]
        amounts, times = np.array([(row["details"]["n"], row["ms"]) for row in own]).T
        x, y = amounts / amounts[0], times / times[0]
        panel.plot(x, y, "o-", markersize=4, label=f"{name}: {times[0]:.0f} ms, exponent {exponent(x, y):.2f}")
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
