"""The tables and figures of an ablation: every variant beside the others, on the same pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from evaluation.ablation import ELSEWHERE, PRESETS, Ablation
from evaluation.concepts import TRANSFERS, brought
from evaluation.jobs import Result
from evaluation.plots import plot_transfers, plot_variants
from evaluation.statistics import mean_interval, share_interval
from ldm.files.writing import replace_text


def summary(
    ablation: Ablation, measured: Mapping[str, Result], variant: str, placement: str = PRESETS
) -> dict[str, np.ndarray]:
    """One value for each concept of a variant: (concepts,) under each name.

    Names: reconstruction (share of attributes), distance (of latents); of each preset wanted/PRESET,
    leaked/FACTOR/PRESET and transferred/PRESET (shares of pictures); and transferred/all, the presets' mean.
    """
    rows = []
    for name, (owner, _) in ablation.jobs().items():
        if owner != variant:
            continue
        result = measured[name]
        row = {
            "reconstruction": (result["read/reconstruction"] == result["picture"]).mean(),
            "distance": result["latent_distance"].mean(),
        }
        for preset, transfer in TRANSFERS.items():
            found = brought(result[f"read/{placement}/{preset}"], result["picture"], transfer)
            row |= {f"{kind}/{preset}": values.mean() for kind, values in found.items()}
        row["transferred/all"] = np.mean([row[f"transferred/{preset}"] for preset in TRANSFERS])
        rows.append(row)
    return {key: np.array([row[key] for row in rows]) for key in rows[0]}


def tables(
    ablation: Ablation,
    measured: Mapping[str, Result],
    learned: Mapping[str, Result],
    windows: Mapping[str, Sequence[int]],
    folder: Path,
) -> str:
    """The comparison as Markdown; also written, with plots, into `folder`."""
    summaries = {variant: summary(ablation, measured, variant) for variant in ablation.variants}
    named = [variant for variant in ablation.elsewhere if variant in summaries]
    elsewhere = {
        f"{variant}, `*` in {placement}": summary(ablation, measured, variant, placement)
        for variant in named
        for placement in ELSEWHERE
    }
    rows = summaries | elsewhere
    default = summaries.get(ablation.default)
    gains = {name: gain(x, default) for name, x in rows.items() if default and name != ablation.default}
    seconds = {
        variant: np.median([learned[job]["seconds"] for job, (owner, _) in ablation.jobs().items() if owner == variant])
        for variant in summaries
    }
    parts = [
        f"{ablation.pictures} pictures for each prompt, DDIM {ablation.steps}, guidance {ablation.scale}; windows: "
        + ", ".join(f"{preset} {list(windows[preset])}" for preset in TRANSFERS),
        _table(
            ["variant", "concepts", "attributes regenerated", "latent distance", "transfer, mean of presets",
             *TRANSFERS, f"transfer − {ablation.default}'s, same pictures", "seconds to learn"],
            [
                [name, len(x["distance"]), share(x["reconstruction"]), f"{x['distance'].mean():.3f}",
                 share(x["transferred/all"]), *(f"{x[f'transferred/{preset}'].mean():.2f}" for preset in TRANSFERS),
                 difference(gains[name]) if name in gains else "", f"{seconds[name]:.0f}" if name in seconds else ""]
                for name, x in rows.items()
            ],
        ),
        _table(
            ["variant", *(f"{preset}: wanted / most often unwanted" for preset in TRANSFERS)],
            [
                [name, *(f"{share(x[f'wanted/{preset}'])} / {_worst(x, preset)}" for preset in TRANSFERS)]
                for name, x in rows.items()
            ],
        ),
    ]  # fmt: skip
    if named:  # the first of them beside the others, and beside itself with `*` elsewhere
        first, others = named[0], [*named[1:], *elsewhere]
        parts.append(
            _table(
                [f"{first} minus", "attributes regenerated", "transfer", *TRANSFERS],
                [
                    [name, *(difference(gain(rows[first], rows[name], key)) for key in
                             ("reconstruction", *(f"transferred/{group}" for group in ("all", *TRANSFERS))))]
                    for name in others
                ],
            )
        )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join(parts) + "\n"
    replace_text(folder / "ablation.md", text)
    numbers = {name: {key: x.tolist() for key, x in values.items()} for name, values in rows.items()}
    replace_text(folder / "ablation.json", json.dumps(numbers, indent=1) + "\n")
    shown = {name: rows[name] for name in [*named, *elsewhere]} or rows
    plot_transfers(shown, list(TRANSFERS), folder / "transfer.png")
    plot_variants(summaries, {name: x for name, x in gains.items() if name in summaries}, folder / "variants.png")
    return text


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _worst(values: Mapping[str, np.ndarray], preset: str) -> str:
    """The unwanted factor that comes from the picture most often, and how often."""
    factor = max(TRANSFERS[preset].unwanted, key=lambda name: values[f"leaked/{name}/{preset}"].mean())
    return f"{values[f'leaked/{factor}/{preset}'].mean():.2f} {factor}"


def gain(
    values: Mapping[str, np.ndarray], default: Mapping[str, np.ndarray], key: str = "transferred/all"
) -> np.ndarray:
    """Values minus the default's on the same concepts, one for each."""
    count = min(len(values[key]), len(default[key]))
    return values[key][:count] - default[key][:count]


def share(values: np.ndarray) -> str:
    """Mean of one share for each concept, with its 95 % interval."""
    low, high = share_interval(values)
    return f"{values.mean():.2f} ({low:.2f}–{high:.2f})"


def difference(values: np.ndarray) -> str:
    """Mean of one difference of shares for each concept, with its 95 % interval."""
    low, high = mean_interval(values, -1.0, 1.0)
    return f"{values.mean():+.2f} ({low:+.2f} to {high:+.2f})"
