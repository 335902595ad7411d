"""Training variants compared on the same images: which regenerate the image, which transfer its attributes."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from evaluation.concepts import MAX_STEPS, TRANSFERS, Subject, build, learn_concept, measure_transfer, transferred
from evaluation.images import Sampling, check
from evaluation.jobs import Result, Workers, run_jobs
from evaluation.plots import plot_transfers, plot_variants
from evaluation.statistics import difference, share, table
from evaluation.world.attributes import FACTORS, words_of
from ldm.conditioning.presets import PRESET_STAGES
from ldm.files.writing import replace_text
from ldm.yaml_files import read_yaml

EXAMPLE = "configs/evidence/ablation.yaml is an example"
INITIAL_WORDS = "model.params.personalization_config.params.initializer_words"
PRESETS = "presets"  # where a concept's `*` stands: in the windows of the presets
Windows = Mapping[str, Sequence[int]]  # preset -> stages
ELSEWHERE: dict[str, Windows] = {"all stages": dict.fromkeys(TRANSFERS, range(10)), "the paper's stages": PRESET_STAGES}
Results = dict[tuple[str, int], Result]  # (variant, number of the subject) -> result
Summary = Mapping[str, np.ndarray]  # name -> one value for each concept
Settings = TypeVar("Settings")


def read_settings(kind: type[Settings], path: Path, example: str) -> Settings:
    """Return a dataclass that a YAML file fills; raises `ValueError` for what is missing, unknown or out of range."""
    text = read_yaml(path, "the command", "file of settings", example).text
    try:
        content = OmegaConf.merge(OmegaConf.structured(kind), OmegaConf.create(text))
        values: Any = OmegaConf.to_container(content, throw_on_missing=True)
        return kind(**values)
    except (OmegaConfBaseException, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"'{path}': {str(error).partition(chr(10))[0].rstrip('.')}; {example}.") from error


@dataclass
class Ablation:
    """An ablation's YAML; it raises `ValueError` for numbers out of range, unknown variants and keys without effect."""

    config: str
    ckpt: str
    classifier: str
    seed: int  # of the subjects
    concepts: int  # subjects that are learned with each variant
    images: int  # for each prompt
    steps: int  # of sampling
    scale: float  # guidance
    default: str  # the variant that the others are compared with
    elsewhere: list[str]  # variants that are also counted with the concept in other stages than its presets'
    settings: dict[str, Any]  # {dotted key: value} of the configuration, for all variants
    variants: dict[str, dict[str, Any]]  # the same; `word: FACTOR` starts from the image's word of that factor
    sampler: str = "ddim"

    def __post_init__(self) -> None:
        if self.seed < 0 or min(self.concepts, self.images) < 1:
            raise ValueError("'concepts' and 'images' must be at least 1, and 'seed' at least 0")
        self._check_names([self.default, *self.elsewhere])
        for name, values in self.variants.items():
            for key in self.settings | values:
                if key not in ("word", MAX_STEPS) and not key.startswith(("model.", "data.")):
                    known = f"model.…, data.…, {MAX_STEPS} and word"
                    raise ValueError(f"the variant '{name}' sets '{key}', which has no effect here; there are {known}")
            if (word := (self.settings | values).get("word", "shape")) not in FACTORS:
                raise ValueError(f"the variant '{name}' starts from the word of '{word}'; choose from {list(FACTORS)}")

    def _check_names(self, names: Sequence[str]) -> None:
        if unknown := [name for name in names if name not in self.variants]:
            raise ValueError(f"There are no variants {', '.join(unknown)}; there are {', '.join(self.variants)}.")

    @classmethod
    def read(cls, path: Path, only: Sequence[str] | None = None, limit: int | None = None) -> Ablation:
        """Read a YAML file, `only` these variants and at most `limit` concepts; raises `ValueError`."""
        ablation = read_settings(cls, path, EXAMPLE)
        ablation._check_names(only or ())
        ablation.concepts = min(ablation.concepts, limit or ablation.concepts)
        ablation.variants = {name: x for name, x in ablation.variants.items() if only is None or name in only}
        return ablation

    @property
    def subjects(self) -> list[Subject]:
        return [Subject(number, self.seed) for number in range(self.concepts)]

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.steps, self.scale, self.sampler)

    def overrides(self, variant: str, subject: Subject) -> dict[str, Any]:
        """Return what the variant changes in the configuration."""
        values = self.settings | self.variants[variant]
        if factor := values.pop("word", None):
            values[INITIAL_WORDS] = [words_of(subject.attributes)[factor]]
        return values

    def check(self) -> None:
        """Build every variant, so that a mistake is found before the first is learned; raises `ValueError`."""
        check(self.config, self.ckpt, self.sampling)
        subject = self.subjects[0]
        with tempfile.TemporaryDirectory() as folder:
            subject.save(folder)
            for variant in self.variants:
                try:
                    build(self.config, self.ckpt, folder, self.overrides(variant, subject))
                except ValueError as error:
                    raise ValueError(f"The variant '{variant}': {error}") from error

    def learn(self, folder: Path, workers: Workers = None) -> Results:
        """Learn every subject with every variant, see `learn_concept`."""
        shared = {"config": self.config, "ckpt": self.ckpt}
        jobs = {
            (variant, x.number): shared | {"subject": x, "overrides": self.overrides(variant, x)}
            for variant in self.variants
            for x in self.subjects
        }
        return run_jobs(learn_concept, jobs, folder / "learned", workers, "learning concepts")

    def measure(self, folder: Path, learned: Results, windows: Windows, workers: Workers = None) -> Results:
        """Count what the learned concepts transfer, see `measure_transfer`."""
        model = (self.config, self.ckpt, self.classifier)
        shared = {"model": model, "count": self.images, "sampling": self.sampling}
        jobs = {}
        for variant in self.variants:
            places = {PRESETS: windows} | (ELSEWHERE if variant in self.elsewhere else {})
            for x in self.subjects:
                own = {"subject": x, "vectors": learned[variant, x.number]["vectors"], "placements": places}
                jobs[variant, x.number] = shared | own
        return run_jobs(measure_transfer, jobs, folder / "measured", workers, "measuring transfer")

    def compare(self, measured: Results, learned: Results, windows: Windows, folder: Path) -> str:
        """Return the comparison as Markdown; also write it, its numbers and figures into `folder`."""
        summaries = {variant: summary(measured, variant) for variant in self.variants}
        named = [variant for variant in self.elsewhere if variant in summaries]
        elsewhere = {f"{v}, `*` in {place}": summary(measured, v, place) for v in named for place in ELSEWHERE}
        rows, default = summaries | elsewhere, summaries.get(self.default)
        gains = {name: gain(x, default) for name, x in rows.items() if default and name != self.default}
        seconds = {v: np.median([x["seconds"] for x in of_variant(learned, v).values()]) for v in summaries}
        parts = [
            f"{self.images} images for each prompt, {self.sampler} {self.steps}, guidance {self.scale}; "
            "windows: " + ", ".join(f"{preset} {list(windows[preset])}" for preset in TRANSFERS),
            main_table(self.default, rows, gains, seconds),
            leak_table(rows),
        ]
        if named:  # the first of them beside the others, and beside itself with `*` elsewhere
            keys = ["reconstruction", *(f"transferred/{group}" for group in ("all", *TRANSFERS))]
            head = [f"{named[0]} minus", "attributes regenerated", "transfer", *TRANSFERS]
            others = {name: rows[name] for name in [*named[1:], *elsewhere]}
            first = rows[named[0]]
            lines = [[name, *(difference(gain(first, x, key)) for key in keys)] for name, x in others.items()]
            parts.append(table(head, lines))
        text = "\n\n".join(parts) + "\n"
        write(folder, "ablation", text, rows)
        plot_transfers({name: rows[name] for name in [*named, *elsewhere]} or rows, folder / "transfer.png")
        plot_variants(summaries, {name: x for name, x in gains.items() if name in summaries}, folder / "variants.png")
        return text


def summary(measured: Results, variant: str, placement: str = PRESETS) -> Summary:
    """Return one value for each concept of a variant: (concepts,) under each name.

    Names: reconstruction (share of attributes), distance (of latents); of each preset wanted/PRESET,
    leaked/FACTOR/PRESET and transferred/PRESET (shares of images); and transferred/all, the presets' mean.
    """
    rows = []
    for result in of_variant(measured, variant).values():
        same = result["read/reconstruction"] == result["image"]
        row = {"reconstruction": same.mean(), "distance": result["latent_distance"].mean()}
        for preset, transfer in TRANSFERS.items():
            found = transferred(result[f"read/{placement}/{preset}"], result["image"], transfer)
            row |= {f"{kind}/{preset}": values.mean() for kind, values in found.items()}
        row["transferred/all"] = np.mean([row[f"transferred/{preset}"] for preset in TRANSFERS])
        rows.append(row)
    return {key: np.array([row[key] for row in rows]) for key in rows[0]}


def of_variant(results: Results, variant: str) -> dict[int, Result]:
    return {key: result for (owner, key), result in results.items() if owner == variant}


def write(folder: Path, name: str, text: str, rows: Mapping[str, Summary]) -> None:
    """Write tables and their numbers as NAME.md and NAME.json."""
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / f"{name}.md", text)
    numbers = {row: {key: x.tolist() for key, x in values.items()} for row, values in rows.items()}
    replace_text(folder / f"{name}.json", json.dumps(numbers, indent=1) + "\n")


def gain(values: Summary, default: Summary, key: str = "transferred/all") -> np.ndarray:
    """Return values minus the default's on the same concepts, one for each."""
    return values[key] - default[key]


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
