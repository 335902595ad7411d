"""Figures of the measurements."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from evaluation.concepts import TRANSFERS
from evaluation.judges import Judge
from evaluation.spectrum import Experiment, Spectrum, all_windows, matrix
from evaluation.statistics import mean_interval, share_interval

plt.switch_backend("Agg")  # no window, no display

COLUMNS = 12  # conditions in a strip of images
TITLES = {
    "withhold": "follows the prompt, which is withheld in these stages",
    "switch": "follows prompt A, which is replaced by B below this stage",
    "add": "follows a word that is there in these stages only",
}
Summaries = Mapping[str, Mapping[str, np.ndarray]]
Interval = Callable[[np.ndarray], tuple[float, float]]


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def plot_transfers(summaries: Summaries, path: Path) -> None:
    """Draw the transfer of each row, by preset."""
    figure, axes = plt.subplots(figsize=(8, 3.4))
    groups = [*TRANSFERS, "all"]
    width = 0.8 / len(summaries)
    for i, (name, summary) in enumerate(summaries.items()):
        means, errors = _bars([summary[f"transferred/{group}"] for group in groups])
        left = np.arange(len(groups)) + (i - (len(summaries) - 1) / 2) * width
        axes.bar(left, means, width, yerr=errors, label=name)
    axes.set_xticks(range(len(groups)), [*TRANSFERS, "mean"])
    axes.set(ylabel="wanted attribute only", ylim=(0, 1))
    axes.legend(fontsize=8, ncol=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    _save(figure, path)


def plot_variants(summaries: Summaries, gains: Mapping[str, np.ndarray], path: Path) -> None:
    """Draw transfer and regenerated attributes of every variant; beside them the `gains` over the default's."""
    figure, (axes, right) = plt.subplots(
        1, 2, figsize=(9, 0.8 + 0.28 * len(summaries)), width_ratios=(3, 2), sharey=True, layout="constrained"
    )
    places = dict(zip(summaries, reversed(range(len(summaries))), strict=True))
    labels = {"reconstruction": ("attributes regenerated", "o"), "transferred/all": ("transfer, mean of presets", "s")}
    for key, (label, marker) in labels.items():
        means, errors = _bars([summary[key] for summary in summaries.values()])
        axes.errorbar(means, list(places.values()), xerr=errors, capsize=2, fmt=marker, label=label)
    axes.set_yticks(list(places.values()), list(places))
    axes.legend(fontsize=8, ncol=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    if gains:
        means, errors = _bars(gains.values(), lambda v: mean_interval(v, -1.0, 1.0))
        right.errorbar(means, [places[name] for name in gains], xerr=errors, capsize=2, fmt="s", color="C1")
    right.axvline(0, color="k", linewidth=0.8)
    right.set_title("transfer, minus the default's\non the same images", fontsize=8)
    for panel in (axes, right):
        panel.grid(axis="x", alpha=0.3)
    _save(figure, path)


def _bars(values: Iterable[np.ndarray], interval: Interval = share_interval) -> tuple[np.ndarray, np.ndarray]:
    """Return the means and the lengths (2, …) of the error bars."""
    means = np.array([v.mean() for v in values])
    return means, np.abs(np.array([interval(v) for v in values]).T - means)


def plot_spectrum(found: Spectrum, experiments: Mapping[str, Experiment], judge: Judge, folder: Path) -> list[str]:
    """Draw a heat map of each kind of experiment, and a strip of images of each; returns the names of the files."""
    kinds: dict[str, list[str]] = {}
    for name in found.scores:
        kinds.setdefault("add" if name.startswith("add") else name, []).append(name)
    for kind, names in kinds.items():
        columns = list(found.scores[names[0]])
        if len(columns) == len(all_windows()):  # too many for a figure: those at one end
            columns = [window for window in columns if window.startswith("0") or window.endswith("9")]
        rows = [judged for name in names for judged in experiments[name].judged or judge.names]
        scores = [{column: found.scores[name][column] for column in columns} for name in names]
        judged = [experiments[name].judged for name in names]
        values = np.concatenate([matrix(x, judge, some) for x, some in zip(scores, judged, strict=True)])
        what = "comes from the learned image" if experiments[names[0]].truth else "follows `*` in all stages"
        title = TITLES.get(kind, f"{kind}: {what}, `*` in these stages only")
        heat_map(values, rows, columns, title, folder / f"{kind}.png")
    for name, examples in found.examples.items():
        strip(examples, name, folder / f"strip-{name}.png")
    return [f"{name}.png" for name in [*kinds, *(f"strip-{name}" for name in found.examples)]]


def heat_map(values: np.ndarray, rows: Sequence[str], columns: Sequence[str], title: str, path: Path) -> None:
    """Draw shares (rows, stages) in 0..1, numbers written into the cells."""
    figure, axes = plt.subplots(figsize=(1.5 + 0.62 * len(columns), 1.1 + 0.42 * len(rows)))
    axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel("stages")
    axes.set_title(title, fontsize=10)
    for (y, x), value in np.ndenumerate(values):
        axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=8, color="w" if value < 0.6 else "k")
    _save(figure, path)


def strip(examples: Mapping[str, np.ndarray], name: str, path: Path) -> None:
    """Draw the images of conditions side by side, each condition's stages above."""
    shown = dict(list(examples.items())[:COLUMNS])
    rows = len(next(iter(shown.values())))
    size = (0.9 * len(shown), 0.95 * rows)
    figure, axes = plt.subplots(rows, len(shown), figsize=size, squeeze=False, layout="constrained")
    for x, (condition, images) in enumerate(shown.items()):
        axes[0, x].set_title(condition, fontsize=8)
        for y, image in enumerate(images):
            axes[y, x].imshow(image)
            axes[y, x].axis("off")
    figure.suptitle(f"{name}: stages", fontsize=9)
    _save(figure, path)


def plot_steps(families: Mapping[str, Summaries], default: Mapping[str, np.ndarray], path: Path) -> None:
    """Draw what images cost against what comes out, a line for each sampler; the default's interval shaded."""
    shown = {"all attributes": "all six attributes right", "transferred/all": "transfer, mean of presets"}
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    full = np.median(default["seconds"])
    for number, (name, settings) in enumerate(families.items()):
        cost = [np.median(x["seconds"]) / full for x in settings.values()]
        style: dict[str, Any] = {"label": name, "fmt": f"{'os^Dv<>'[number % 7]}-", "capsize": 2, "markersize": 4}
        for axes, key in zip(panels, shown, strict=False):
            means, errors = _bars([x[key] for x in settings.values()])
            axes.errorbar(cost, means, yerr=errors, **style)
        panels[2].plot(cost, [np.median(x["distance"]) for x in settings.values()], style["fmt"], markersize=4)
    for axes, (key, title) in zip(panels, shown.items(), strict=False):
        axes.axhspan(*share_interval(default[key]), color="k", alpha=0.08)
        axes.set_title(title, fontsize=9)
    panels[2].set_yscale("log")
    panels[2].set_title("distance of latents to the reference, median", fontsize=9)
    for axes in panels:
        axes.set(xlabel="time of an image, the default's = 1", xscale="log")
        axes.set_xticks([0.1, 0.2, 0.4, 0.6, 1], [".1", ".2", ".4", ".6", "1"])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, ncol=4, loc="outside lower center")
    _save(figure, path)
