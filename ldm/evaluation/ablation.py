"""Ways of learning concepts, compared on the same pictures: which bring the picture back, which bring its parts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ldm.config import read_yaml
from ldm.data.world import FACTORS
from ldm.evaluation.concepts import MAX_STEPS, TRANSFERS, bring, brought, concept_attributes, learn_concept, noises
from ldm.evaluation.jobs import Result, run_jobs
from ldm.evaluation.plots import plot_transfers, plot_variants
from ldm.evaluation.statistics import bootstrap
from ldm.files import replace_text
from ldm.presets import PRESET_STAGES

KEYS = {"config", "ckpt", "classifier", "seed", "pictures", "steps", "scale"}
KEYS |= {"default", "elsewhere", "settings", "variants"}
EXAMPLE = "configs/evidence/ablation.yaml is one"
INITIAL_WORDS = "model.params.personalization_config.params.initializer_words"


PRESETS = "presets"  # where a concept's `*` stands: in the windows of the presets
ELSEWHERE = {"all stages": dict.fromkeys(TRANSFERS, range(10)), "the paper's stages": PRESET_STAGES}


@dataclass(frozen=True)
class Ablation:
    """An ablation's YAML.

    Args:
        default: the variant that the others are compared with.
        elsewhere: the variants that are also counted with the concept in other stages than its presets'.
        settings: {dotted key: value} of the configuration, for all variants.
        variants: {name: {dotted key: value}}, and `concepts`, how many pictures are learned so.
    """

    config: str
    ckpt: str
    classifier: str
    seed: int
    pictures: int
    steps: int
    scale: float
    default: str
    elsewhere: list[str]
    settings: dict[str, Any]
    variants: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, path: Path, only: Sequence[str] | None = None, limit: int | None = None) -> Ablation:
        """Raises ValueError for keys that are missing or unknown, and for unknown variants."""
        try:
            content = yaml.safe_load(read_yaml(path, "the command", "file of variants", EXAMPLE))
        except yaml.YAMLError as error:
            raise ValueError(f"'{path}' is not a readable YAML file; {EXAMPLE}.") from error
        if not isinstance(content, dict) or set(content) != KEYS:
            raise ValueError(f"'{path}' must have the keys {', '.join(sorted(KEYS))}, and no others.")
        variants = content["variants"]
        if not isinstance(variants, dict) or not variants or not isinstance(content["settings"], dict):
            raise ValueError(
                f"'variants' and 'settings' in '{path}' must be sections with keys of their own; {EXAMPLE}."
            )
        named = [*(only or ()), content["default"], *(content["elsewhere"] or ())]
        if unknown := [str(name) for name in named if name not in variants]:
            raise ValueError(f"'{path}' has no variants {', '.join(unknown)}; there are {', '.join(variants)}.")
        for name, values in variants.items():
            _check_variant(values, content["settings"], f"The variant '{name}' in '{path}'")
        kept = {name: values for name, values in variants.items() if only is None or name in only}
        for values in kept.values():
            values["concepts"] = min(values["concepts"], limit or values["concepts"])
        return cls(**(content | {"elsewhere": list(content["elsewhere"] or ()), "variants": kept}))

    def jobs(self) -> dict[str, tuple[str, int]]:
        """Name of a job -> (variant, number of the concept)."""
        return {
            f"{variant}-{number:02d}": (variant, number)
            for variant, values in self.variants.items()
            for number in range(values["concepts"])
        }

    def overrides(self, variant: str, number: int) -> dict[str, Any]:
        """What the variant changes in the configuration; `word: FACTOR` starts from the picture's word of it."""
        values = self.settings | {key: value for key, value in self.variants[variant].items() if key != "concepts"}
        factor = values.pop("word", None)
        if factor is not None:
            picture, _ = concept_attributes(number, self.seed)
            values[INITIAL_WORDS] = [FACTORS[factor][picture[list(FACTORS).index(factor)]]]
        return values

    def learn(self, folder: Path, workers: int | None = None) -> dict[str, Result]:
        shared = {"config": self.config, "ckpt": self.ckpt, "seed": self.seed}
        jobs = {
            name: shared | {"number": number, "overrides": self.overrides(variant, number)}
            for name, (variant, number) in self.jobs().items()
        }
        return run_jobs(learn_concept, jobs, folder / "learned", workers, "learning concepts")

    def measure(
        self,
        folder: Path,
        learned: Mapping[str, Result],
        windows: Mapping[str, Sequence[int]],
        workers: int | None = None,
    ) -> dict[str, Result]:
        shared = {"config": self.config, "ckpt": self.ckpt, "classifier": self.classifier, "seed": self.seed}
        shared |= {"steps": self.steps, "scale": self.scale}
        jobs = {}
        for name, (variant, number) in self.jobs().items():
            places = {PRESETS: windows} | (ELSEWHERE if variant in self.elsewhere else {})
            jobs[name] = shared | {
                "number": number,
                "vectors": learned[name]["vectors"].tolist(),
                "placements": {place: {key: list(window) for key, window in w.items()} for place, w in places.items()},
                "seeds": noises(number, self.seed, self.pictures),
            }
        return run_jobs(bring, jobs, folder / "measured", workers, "counting")


def _check_variant(values: object, settings: Mapping[str, Any], what: str) -> None:
    """Raise ValueError for what would be learned otherwise than it says, or not at all."""
    count = values.get("concepts") if isinstance(values, dict) else None
    if not isinstance(values, dict) or not isinstance(count, int) or count < 1:
        raise ValueError(f"{what} must be a section that says how many `concepts` it learns, 1 or more.")
    if values.get("word", "shape") not in FACTORS:
        raise ValueError(f"{what} starts from the word of '{values['word']}'; choose from {', '.join(FACTORS)}.")
    for key in settings | values:
        if key.startswith("lightning.") and key != MAX_STEPS:
            raise ValueError(f"{what} sets '{key}'; of the trainer only {MAX_STEPS} counts here.")


def summary(
    ablation: Ablation, measured: Mapping[str, Result], variant: str, placement: str = PRESETS
) -> dict[str, np.ndarray]:
    """One value for each concept of a variant: (concepts,) under each name.

    Names: reconstruction (share of attributes), distance (of latents), wanted/…, leaked/…, transferred/… of each
    preset, and transferred/all, their mean.
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


def tables(ablation: Ablation, measured: Mapping[str, Result], learned: Mapping[str, Result], folder: Path) -> str:
    """The comparison as Markdown; also written, with plots, into `folder`."""
    summaries = {variant: summary(ablation, measured, variant) for variant in ablation.variants}
    elsewhere = {
        f"{variant}, `*` in {placement}": summary(ablation, measured, variant, placement)
        for variant in ablation.elsewhere
        for placement in ELSEWHERE
        if variant in ablation.variants
    }
    gains = {
        name: gain(values, summaries[ablation.default])
        for name, values in (summaries | elsewhere).items()
        if ablation.default in summaries and name != ablation.default
    }
    presets = list(TRANSFERS)
    lines = ["| variant | concepts | attributes regenerated | latent distance | transfer, mean of presets | "]
    lines[0] += " | ".join(presets) + f" | transfer − {ablation.default}'s, same pictures | seconds to learn |"
    lines.append("|" + "---|" * (7 + len(presets)))
    for name, values in (summaries | elsewhere).items():
        seconds = [float(learned[job]["seconds"]) for job, (v, _) in ablation.jobs().items() if v == name]
        cells = [name, str(len(values["distance"])), share(values["reconstruction"])]
        cells += [f"{values['distance'].mean():.3f}", share(values["transferred/all"])]
        cells += [f"{values[f'transferred/{preset}'].mean():.2f}" for preset in presets]
        cells.append(share(gains[name], "+") if name in gains else "")
        cells.append(f"{np.median(seconds):.0f}" if seconds else "")
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| variant | " + " | ".join(f"{p}: wanted / leaked" for p in presets) + " |"]
    lines.append("|" + "---|" * (1 + len(presets)))
    for name, values in (summaries | elsewhere).items():
        cells = [f"{share(values[f'wanted/{p}'])} / {values[f'leaked/{p}'].mean():.2f}" for p in presets]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join(lines) + "\n"
    replace_text(folder / "ablation.md", text)
    everything = summaries | elsewhere
    numbers = {name: {key: x.tolist() for key, x in values.items()} for name, values in everything.items()}
    replace_text(folder / "ablation.json", json.dumps(numbers, indent=1) + "\n")
    plot_transfers(everything, presets, folder / "transfer.png")
    plot_variants(summaries, {name: x for name, x in gains.items() if name in summaries}, folder / "variants.png")
    return text


def gain(values: Mapping[str, np.ndarray], default: Mapping[str, np.ndarray]) -> np.ndarray:
    """Transfer minus the default's on the same concepts, one value for each."""
    count = min(len(values["transferred/all"]), len(default["transferred/all"]))
    return values["transferred/all"][:count] - default["transferred/all"][:count]


def share(values: np.ndarray, sign: str = "") -> str:
    """Mean of one value for each concept, with the 95 % interval over concepts; `+` writes a sign before each."""
    low, high = bootstrap(values)
    to = " to " if sign else "–"
    return f"{values.mean():{sign}.2f} ({low:{sign}.2f}{to}{high:{sign}.2f})"
