"""Figures of the measurements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

try:
    import matplotlib
except ImportError as error:
    raise ImportError("Figures need matplotlib; install it with: pip install -e '.[metrics]'") from error

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from evaluation.judges import Judge  # noqa: E402
from evaluation.spectrum import Experiment, all_windows, matrix  # noqa: E402
from evaluation.statistics import mean_interval, share_interval  # noqa: E402


def _save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def heat_map(
    values: np.ndarray, rows: Sequence[str], columns: Sequence[str], title: str, path: Path, label: str = "stage"
) -> None:
    """Shares (rows, columns) in 0..1, numbers written into the cells."""
    figure, axes = plt.subplots(figsize=(1.5 + 0.62 * len(columns), 1.1 + 0.42 * len(rows)))
    axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel(label)
    axes.set_title(title, fontsize=10)
    for (y, x), value in np.ndenumerate(values):
        axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=8, color="w" if value < 0.6 else "k")
    _save(figure, path)


def plot_transfers(summaries: Mapping[str, Mapping[str, np.ndarray]], presets: Sequence[str], path: Path) -> None:
    """Transfer of each, by preset."""
    figure, axes = plt.subplots(figsize=(8, 3.4))
    groups = [*presets, "all"]
    for i, (name, summary) in enumerate(summaries.items()):
        values = [summary[f"transferred/{group}"] for group in groups]
        means = np.array([v.mean() for v in values])
        errors = np.abs(np.array([share_interval(v) for v in values]).T - means)
        width = 0.8 / len(summaries)
        axes.bar(np.arange(len(groups)) + (i - (len(summaries) - 1) / 2) * width, means, width, yerr=errors, label=name)
    axes.set_xticks(range(len(groups)), [*presets, "mean"])
    axes.set_ylabel("wanted attribute only")
    axes.set_ylim(0, 1)
    axes.legend(fontsize=8, ncol=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    _save(figure, path)


def plot_variants(
    summaries: Mapping[str, Mapping[str, np.ndarray]], gains: Mapping[str, np.ndarray], path: Path
) -> None:
    """Transfer, and attributes regenerated, of every variant; beside them what each gains over the default, where
    `gains` has that of every concept."""
    figure, (axes, right) = plt.subplots(
        1, 2, figsize=(9, 0.8 + 0.28 * len(summaries)), width_ratios=(3, 2), sharey=True, layout="constrained"
    )
    places = np.arange(len(summaries))[::-1]
    for key, label, marker in (
        ("reconstruction", "attributes regenerated", "o"),
        ("transferred/all", "transfer, mean of presets", "s"),
    ):
        values = [summary[key] for summary in summaries.values()]
        _dots(axes, values, [share_interval(v) for v in values], places, fmt=marker, label=label)
    axes.set_yticks(places, list(summaries))
    axes.legend(fontsize=8, ncol=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    if gains:
        shown = [place for place, name in zip(places, summaries, strict=True) if name in gains]
        intervals = [mean_interval(v, -1.0, 1.0) for v in gains.values()]
        _dots(right, list(gains.values()), intervals, shown, fmt="s", color="C1")
    right.axvline(0, color="k", linewidth=0.8)
    right.set_title("transfer, minus the default's\non the same pictures", fontsize=8)
    for panel in (axes, right):
        panel.grid(axis="x", alpha=0.3)
    _save(figure, path)


def _dots(
    axes: plt.Axes,
    values: Sequence[np.ndarray],
    intervals: Sequence[tuple[float, float]],
    places: Sequence[float],
    **style: str,
) -> None:
    """Means of values of one concept each, with their intervals, at heights `places`."""
    means = np.array([v.mean() for v in values])
    axes.errorbar(means, places, xerr=np.abs(np.array(intervals).T - means), capsize=2, **style)


def plot_spectrum(
    found: Mapping[str, Mapping[str, np.ndarray]], experiments: Mapping[str, Experiment], judge: Judge, folder: Path
) -> list[str]:
    """A heat map and a strip of pictures for each kind of experiment; the names of the files."""
    files = []
    titles = {
        "withhold": "goes along with the prompt, which is withheld in these stages",
        "switch": "goes along with prompt A, which is replaced by B below this stage",
        "add": "goes along with a word that is there in these stages only",
    }
    adds = [name for name in found if name.startswith("add")]
    for name in ("withhold", "switch"):
        if name in found:
            heat_map(matrix(found[name], judge), judge.names, list(found[name]), titles[name], folder / f"{name}.png")
            files.append(f"{name}.png")
    if adds:
        rows = [(name, judged) for name in adds for judged in experiments[name].judged or judge.names]
        values = np.concatenate([matrix(found[name], judge, experiments[name].judged) for name in adds])
        windows = list(found[adds[0]])
        heat_map(values, [judged for _, judged in rows], windows, titles["add"], folder / "add.png", "stages")
        files.append("add.png")
    for name in [name for name in found if name.startswith("concept")]:
        known = not isinstance(experiments[name].toward, list)  # attributes of the learned picture
        what = "comes from the learned picture" if known else "goes along with `*` in all stages"
        title, chosen = f"{name}: {what}, `*` in these stages only", found[name]
        if len(chosen) == len(all_windows()):  # too many for a figure: those at one end
            chosen = {w: x for w, x in chosen.items() if w.startswith("0") or w.endswith("9")}
        heat_map(matrix(chosen, judge), judge.names, list(chosen), title, folder / f"{name}.png", "stages")
        files.append(f"{name}.png")
    for name, experiment in experiments.items():
        strip(folder / "pictures", name, list(experiment.conditions), folder / f"strip-{name}.png")
        files.append(f"strip-{name}.png")
    return files


def strip(pictures: Path, experiment: str, conditions: Sequence[str], path: Path, rows: int = 4) -> None:
    """The first pictures of every condition side by side, its stages above."""
    conditions = conditions[:12]
    columns = [np.load(pictures / f"{experiment}-{condition}.npz")["pictures"][:rows] for condition in conditions]
    rows = len(columns[0])
    figure, axes = plt.subplots(
        rows, len(columns), figsize=(0.9 * len(columns), 0.95 * rows), squeeze=False, layout="constrained"
    )
    for x, (condition, column) in enumerate(zip(conditions, columns, strict=True)):
        axes[0, x].set_title(condition, fontsize=8)
        for y in range(rows):
            axes[y, x].imshow(column[y])
            axes[y, x].axis("off")
    figure.suptitle(f"{experiment}: stages", fontsize=9)
    _save(figure, path)
