"""The comparison of samplers: the command in small, and what its YAML refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from evaluation.images import Sampling
from evaluation.steps import Steps, distance
from scripts import steps as script

ROOT = Path(__file__).parents[2]
YAML = ROOT / "configs/evidence/steps.yaml"


LEARNING = """
{config: configs/demo/finetune.yaml, ckpt: models/demo/model.safetensors, concepts: 1, images: 1, steps: 2, scale: 2.5,
 classifier: models/demo/classifier.safetensors, seed: 50, settings: {lightning.trainer.max_steps: 1},
 default: fast, elsewhere: [], variants: {fast: {model.base_learning_rate: 6.0e-5}}}
"""
SMALL = """
{ablation: FOLDER/learning.yaml, variant: fast, images: 1, captions: 3, caption_seed: 9, compared: 3,
 compared_concepts: 1, reference: 4, default: "DDIM, 3", families: {DDIM: {steps: [3]},
 PLMS: {sampler: plms, steps: [2]}, DPM: {sampler: dpmpp_2m, scale: "2,0-4:1", steps: [2]}}}
"""


def test_the_file_that_ships() -> None:
    settings = Steps.read(YAML).settings
    assert settings["DDIM leading, 50"] == Sampling() and settings["PLMS, 19"] == Sampling(19, sampler="plms")
    by_stage = settings["DPM++ 2M, scale 1 in stages 0–1, 20"]
    assert by_stage == Sampling(20, [1.0, 1.0, *[2.5] * 8], "dpmpp_2m")


def test_the_command_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "learning.yaml").write_text(LEARNING)
    (tmp_path / "steps.yaml").write_text(SMALL.replace("FOLDER", str(tmp_path)))
    flags = [str(tmp_path / "steps.yaml"), "--outdir", str(tmp_path / "out"), "--workers", "1"]
    monkeypatch.setattr(sys, "argv", ["steps.py", *flags])
    script.main()
    table = (tmp_path / "out/steps.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert [row[:2] for row in rows[2:]] == [["DDIM, 3", "3"], ["PLMS, 2", "3"], ["DPM, 2", "2"]]
    found = json.loads((tmp_path / "out/steps.json").read_text())
    assert len(found["DPM, 2"]["attributes"]) == 3 and len(found["DPM, 2"]["transferred/all"]) == 1
    assert len(found["DPM, 2"]["distance"]) == 3 + 5  # captions; the concept's reconstruction and four presets
    assert min(found["DDIM, 3"]["distance"]) > 0 and (tmp_path / "out/steps.png").stat().st_size > 10_000
    best = np.full((2, 4, 3, 3), 2.0)
    assert distance(np.stack([best[0], best[0] * 1.5]), best).tolist() == [0.0, 0.5]


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ('"DDIM, 3"', '"DDIM, 4"', "DDIM, 4"),
        ("sampler: plms", "sampler: euler", "Unknown sampler 'euler'"),
        ("captions: 3", "captions: few", "few"),
        ('scale: "2,0-4:1"', 'scale: "2,10:1"', "scale has no stages 10"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, old: str, new: str, sentence: str) -> None:
    (tmp_path / "steps.yaml").write_text(SMALL.replace(old, new))
    with pytest.raises(ValueError, match=sentence):
        Steps.read(tmp_path / "steps.yaml")
