"""The tables and figures of an ablation: every variant beside the others, on the same images."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from evaluation.ablation import ELSEWHERE, PRESETS, Ablation, Results, Windows
from evaluation.concepts import TRANSFERS, transferred
from evaluation.jobs import Result
from evaluation.plots import plot_transfers, plot_variants
from evaluation.statistics import mean_interval, share_interval
from ldm.files.writing import replace_text

Summary = Mapping[str, np.ndarray]  # name -> one value for each concept


def summary(measured: Results, variant: str, placement: str = PRESETS) -> Summary:
    """Return one value for each concept of a variant: (concepts,) under each name.

    Names: reconstruction (share of attributes), distance (of latents); of each preset wanted/PRESET,
    leaked/FACTOR/PRESET and transferred/PRESET (shares of images); and transferred/all, the presets' mean.
    """
    rows = [_of_concept(result, placement) for (owner, _), result in measured.items() if owner == variant]
    return {key: np.array([row[key] for row in rows]) for key in rows[0]}


def _of_concept(result: Result, placement: str) -> dict[str, float]:
    same = result["read/reconstruction"] == result["image"]
    row = {"reconstruction": same.mean(), "distance": result["latent_distance"].mean()}
    for preset, transfer in TRANSFERS.items():
        found = transferred(result[f"read/{placement}/{preset}"], result["image"], transfer)
        row |= {f"{kind}/{preset}": values.mean() for kind, values in found.items()}
    row["transferred/all"] = np.mean([row[f"transferred/{preset}"] for preset in TRANSFERS])
    return row


def compare(ablation: Ablation, measured: Results, learned: Results, windows: Windows, folder: Path) -> str:
    """Return the comparison as Markdown; also write it, its numbers and figures into `folder`."""
    summaries = {variant: summary(measured, variant) for variant in ablation.variants}
    named = [variant for variant in ablation.elsewhere if variant in summaries]
    elsewhere = {f"{v}, `*` in {place}": summary(measured, v, place) for v in named for place in ELSEWHERE}
    rows = summaries | elsewhere
    default = summaries.get(ablation.default)
    gains = {name: gain(x, default) for name, x in rows.items() if default and name != ablation.default}
    times = {v: [result["seconds"] for (owner, _), result in learned.items() if owner == v] for v in summaries}
    seconds = {variant: float(np.median(values)) for variant, values in times.items()}
    parts = [
        f"{ablation.images} images for each prompt, {ablation.sampler} {ablation.steps}, guidance {ablation.scale}; "
        "windows: " + ", ".join(f"{preset} {list(windows[preset])}" for preset in TRANSFERS),
        main_table(ablation.default, rows, gains, seconds),
        leak_table(rows),
    ]
    if named:  # the first of them beside the others, and beside itself with `*` elsewhere
        parts.append(gain_table(named[0], [*named[1:], *elsewhere], rows))
    text = "\n\n".join(parts) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / "ablation.md", text)
    numbers = {name: {key: x.tolist() for key, x in values.items()} for name, values in rows.items()}
    replace_text(folder / "ablation.json", json.dumps(numbers, indent=1) + "\n")
    shown = {name: rows[name] for name in [*named, *elsewhere]} or rows
    plot_transfers(shown, list(TRANSFERS), folder / "transfer.png")
    plot_variants(summaries, {name: x for name, x in gains.items() if name in summaries}, folder / "variants.png")
    return text


def main_table(
    default: str, rows: Mapping[str, Summary], gains: Mapping[str, np.ndarray], seconds: Mapping[str, float]
) -> str:
    head = ["variant", "concepts", "attributes regenerated", "latent distance", "transfer, mean of presets"]
    head += [*TRANSFERS, f"transfer − {default}'s, same images", "seconds to learn"]
    lines = []
    for name, x in rows.items():
        values = [f"{x[f'transferred/{preset}'].mean():.2f}" for preset in TRANSFERS]
        regenerated = [share(x["reconstruction"]), f"{x['distance'].mean():.3f}"]
        gained = difference(gains[name]) if name in gains else ""
        time = f"{seconds[name]:.0f}" if name in seconds else ""
        lines.append([name, len(x["distance"]), *regenerated, share(x["transferred/all"]), *values, gained, time])
    return table(head, lines)


def leak_table(rows: Mapping[str, Summary]) -> str:
    """Return how often the wanted attribute is transferred, and the unwanted one that is transferred most often."""
    lines = []
    for name, x in rows.items():
        cells = []
        for preset, transfer in TRANSFERS.items():
            leaks = {factor: x[f"leaked/{factor}/{preset}"].mean() for factor in transfer.unwanted}
            worst = max(leaks, key=lambda factor: leaks[factor])
            cells.append(f"{share(x[f'wanted/{preset}'])} / {leaks[worst]:.2f} {worst}")
        lines.append([name, *cells])
    return table(["variant", *(f"{preset}: wanted / most often unwanted" for preset in TRANSFERS)], lines)


def gain_table(first: str, others: Sequence[str], rows: Mapping[str, Summary]) -> str:
    """Return what one row has more than others, on the same concepts."""
    keys = ["reconstruction", *(f"transferred/{group}" for group in ("all", *TRANSFERS))]
    lines = [[name, *(difference(gain(rows[first], rows[name], key)) for key in keys)] for name in others]
    return table([f"{first} minus", "attributes regenerated", "transfer", *TRANSFERS], lines)


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def gain(values: Summary, default: Summary, key: str = "transferred/all") -> np.ndarray:
    """Return values minus the default's on the same concepts, one for each."""
    return values[key] - default[key]


def share(values: np.ndarray) -> str:
    """Return the mean of shares, one for each concept, with its 95 % interval."""
    low, high = share_interval(values)
    return f"{values.mean():.2f} ({low:.2f}–{high:.2f})"


def difference(values: np.ndarray) -> str:
    """Return the mean of differences of shares, one for each concept, with its 95 % interval."""
    low, high = mean_interval(values, -1.0, 1.0)
    return f"{values.mean():+.2f} ({low:+.2f} to {high:+.2f})"
