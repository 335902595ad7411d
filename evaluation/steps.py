"""Quality for time: samplers and guidance scales compared on the same captions, concepts and seeds.

Shapes: N images, F factors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.ablation import (
    PRESETS,
    Ablation,
    Results,
    Summary,
    of_variant,
    read_settings,
    summary,
    write,
)
from evaluation.captions import follow_captions
from evaluation.concepts import TRANSFERS, measure_transfer
from evaluation.images import Sampling, check
from evaluation.jobs import Workers, run_jobs
from evaluation.plots import plot_steps
from evaluation.statistics import difference, share, table
from ldm.conditioning.presets import presets_beside
from ldm.request import read_scale

EXAMPLE = "configs/evidence/steps.yaml is an example"
CHUNK = 50  # captions in a job
REFERENCE = "reference"


@dataclass
class Steps:
    """The YAML of a comparison; it raises `ValueError` for what cannot be sampled."""

    ablation: str  # YAML of the ablation whose concepts are used
    variant: str  # of that ablation
    images: int  # for each prompt and concept
    captions: int
    caption_seed: int
    compared: int  # of these captions, and of the concepts: images whose latents are compared with the reference's
    compared_concepts: int
    reference: int  # steps of DDIM
    default: str  # FAMILY, STEPS
    families: dict[str, dict[str, Any]]  # {name: {steps: [numbers], sampler, spacing, scale}}

    def __post_init__(self) -> None:
        for sampling in self.settings.values():
            sampling.request()
        if self.default not in self.settings:
            raise ValueError(f"the default '{self.default}' is none of {', '.join(self.settings)}")

    @classmethod
    def read(cls, path: Path) -> Steps:
        return read_settings(cls, path, EXAMPLE)

    @property
    def settings(self) -> dict[str, Sampling]:
        """`FAMILY, STEPS` -> how its images are sampled."""
        found: dict[str, Sampling] = {}
        for name, family in self.families.items():
            scale = read_scale(str(family.get("scale", 2.5)), 10, 2.5)
            own = {key: value for key, value in family.items() if key not in ("steps", "scale")}
            found |= {f"{name}, {steps}": Sampling(steps, scale, **own) for steps in family["steps"]}
        return found

    def measure(self, folder: Path, workers: Workers = None) -> tuple[Results, Results]:
        """Return what captions and concepts give: {(setting, chunk or concept): result}; the reference's are few."""
        ablation = Ablation.read(Path(self.ablation), [self.variant])
        windows = presets_beside(ablation.ckpt)
        model = {"config": ablation.config, "ckpt": ablation.ckpt, "classifier": ablation.classifier}
        settings = {**self.settings, REFERENCE: Sampling(self.reference)}
        for sampling in settings.values():
            check(ablation.config, ablation.ckpt, sampling)
        learned = ablation.learn(folder, workers)
        captions, concepts = {}, {}
        for name, sampling in settings.items():
            few = name == REFERENCE
            for start in range(0, self.compared if few else self.captions, CHUNK):
                own = {"seed": self.caption_seed + start, "count": min(CHUNK, self.captions - start)}
                captions[name, start] = model | own | {"held_out": True, "sampling": sampling}
            for x in ablation.subjects[: self.compared_concepts if few else None]:
                concepts[name, x.number] = {
                    "model": tuple(model.values()),
                    "vectors": learned[self.variant, x.number]["vectors"],
                    "subject": x,
                    "placements": {PRESETS: windows},
                    "count": self.images,
                    "sampling": sampling,
                }
        followed = run_jobs(follow_captions, captions, folder / "captions", workers, "drawing captions")
        return followed, run_jobs(measure_transfer, concepts, folder / "measured", workers, "measuring transfer")

    def compare(self, followed: Results, measured: Results, folder: Path) -> str:
        """Return the comparison as Markdown; also write it, its numbers and the figure into `folder`."""
        rows = {name: self._row(name, followed, measured) for name in self.settings}
        text = self._table(rows) + "\n"
        write(folder, "steps", text, rows)
        families = {
            family: {name: row for name, row in rows.items() if name.rpartition(", ")[0] == family}
            for family in self.families
        }
        plot_steps(families, rows[self.default], folder / "steps.png")
        return text

    def _row(self, name: str, followed: Results, measured: Results) -> Summary:
        """Return one value for each caption (attributes), concept (transferred) or compared image (distance)."""
        chunks, sampling = of_variant(followed, name), self.settings[name]
        correct = np.concatenate([result["correct"] for result in chunks.values()])
        apart = [
            distance(results[name, key]["latents"], best["latents"])
            for results in (followed, measured)
            for key, best in of_variant(results, REFERENCE).items()
        ]
        row = {
            "attributes": correct.mean(axis=1),
            "all attributes": correct.all(axis=1).astype(float),
            "distance": np.concatenate(apart),
            "seconds": np.array([float(x["seconds"]) / len(x["correct"]) for x in chunks.values()]),
            "calls": np.array([sampling.steps + (sampling.sampler == "plms")]),
        }
        return row | {key: x for key, x in summary(measured, name).items() if key != "distance"}

    def _table(self, rows: Mapping[str, Summary]) -> str:
        default, lines = rows[self.default], []
        for name, x in rows.items():
            seconds = np.median(x["seconds"])
            lines.append(
                [
                    name, int(x["calls"][0]),
                    share(x["attributes"]), difference(x["attributes"] - default["attributes"]),
                    share(x["all attributes"]), share(x["transferred/all"]),
                    *(f"{x[f'transferred/{preset}'].mean():.2f}" for preset in TRANSFERS),
                    difference(x["transferred/all"] - default["transferred/all"]),
                    f"{np.median(x['distance']):.3f} / {x['distance'].mean():.3f}",
                    f"{seconds:.2f}", f"{seconds / np.median(default['seconds']):.2f}",
                ]
            )  # fmt: skip
        head = ["sampler, steps", "calls", "attributes right", f"− {self.default}'s", "all six right", "transfer"]
        head += [*TRANSFERS, f"− {self.default}'s", f"distance to DDIM {self.reference}, median / mean"]
        return table([*head, "seconds an image", "of the default's"], lines)


def distance(latents: np.ndarray, best: np.ndarray) -> Sequence[float] | np.ndarray:
    """Return the root mean square of latents (N, C, H, W) minus the best ones, as a share of the best ones': (N,)."""
    axes = (1, 2, 3)
    return np.sqrt(np.square(latents - best).mean(axes) / np.square(best).mean(axes))
