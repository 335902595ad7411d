"""Ways of learning concepts, compared on the same pictures: which bring the picture back, which bring its parts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import OmegaConf

from evaluation.concepts import (
    MAX_STEPS,
    TRANSFERS,
    bring,
    concept_attributes,
    configured,
    learn_concept,
    noises,
)
from evaluation.jobs import Result, run_jobs
from evaluation.pictures import check
from evaluation.world.rendered import FACTORS
from ldm.conditioning.presets import PRESET_STAGES
from ldm.config import check_parameters, get_class, instantiate_from_config, read_yaml

KEYS = {"config", "ckpt", "classifier", "seed", "pictures", "steps", "scale"}
KEYS |= {"default", "elsewhere", "settings", "variants"}
EXAMPLE = "configs/evidence/ablation.yaml is one"
SECTIONS = ("model.params.", "data.params.")
REPLACED = {"model.params.ckpt_path", "data.params.train.params.data_root"}  # by the ablation's own
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
        """Raises ValueError for keys that are missing or unknown, for unknown variants and for values out of range."""
        try:
            content = yaml.safe_load(read_yaml(path, "the command", "file of variants", EXAMPLE))
        except yaml.YAMLError as error:
            raise ValueError(f"'{path}' is not a readable YAML file; {EXAMPLE}.") from error
        if not isinstance(content, dict) or set(content) != KEYS:
            raise ValueError(f"'{path}' must have the keys {', '.join(sorted(KEYS))}, and no others.")
        for key, lowest in (("seed", 0), ("pictures", 1)):
            if type(content[key]) is not int or content[key] < lowest:
                raise ValueError(f"'{key}' in '{path}' must be a whole number from {lowest} on, not {content[key]!r}.")
        for key in ("steps", "scale"):
            if not _is_number(content[key]):
                raise ValueError(f"'{key}' in '{path}' must be a number, not {content[key]!r}.")
        variants = content["variants"]
        if not isinstance(variants, dict) or not variants or not isinstance(content["settings"], dict):
            raise ValueError(
                f"'variants' and 'settings' in '{path}' must be sections with keys of their own; {EXAMPLE}."
            )
        named = [*(only or ()), content["default"], *(content["elsewhere"] or ())]
        if unknown := [str(name) for name in named if not isinstance(name, str) or name not in variants]:
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

    def check(self) -> None:
        """Find what learning and counting could not do with a variant, before the first begins; raises ValueError."""
        check(self.config, self.ckpt, self.steps, self.scale)
        for variant in self.variants:
            values = self.overrides(variant, 0)
            values.pop("learning_rate", None)
            settings = configured(self.config, values)
            try:
                settings.model.params.ckpt_path = None
                OmegaConf.update(settings, INITIAL_WORDS, None)
                with torch.device("meta"):  # without weights
                    instantiate_from_config(settings.model)
                for section, given in ((settings.data, {}), (settings.data.params.train, {"data_root": ""})):
                    check_parameters(get_class(section.target), dict(section.params) | given)
            except ValueError as error:
                raise ValueError(f"The variant '{variant}': {error}") from error

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
    if not isinstance(values, dict) or type(count) is not int or count < 1:
        raise ValueError(f"{what} must be a section that says how many `concepts` it learns, 1 or more.")
    both = settings | values
    word = both.get("word", "shape")
    if not isinstance(word, str) or word not in FACTORS:
        raise ValueError(f"{what} starts from the word of '{word}'; choose from {', '.join(FACTORS)}.")
    rate = both.get("learning_rate", 1.0)
    if not _is_number(rate) or rate <= 0:
        raise ValueError(f"{what} has the learning_rate {rate!r}; it must be a number above 0, such as 4.8e-4.")
    steps = both.get(MAX_STEPS, 1)
    if type(steps) is not int or steps < 1:
        raise ValueError(f"{what} has {MAX_STEPS} {steps!r}; it must be a whole number from 1 on.")
    for key in map(str, both):
        if key in REPLACED or not (key in {"concepts", "word", "learning_rate", MAX_STEPS} or key.startswith(SECTIONS)):
            known = ["learning_rate", "word", MAX_STEPS, *(f"{section}…" for section in SECTIONS)]
            raise ValueError(f"{what} sets '{key}', which does not count here; what does: {', '.join(known)}.")


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
