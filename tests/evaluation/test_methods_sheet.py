"""The sheet of all methods: its rows and columns, and what each is learned with."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from ldm.embeddings import Concept, save_concept
from scripts import methods

DEMO = Path("models/demo")


def test_rows_are_methods_and_columns_prompts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without learning: every method is what a prefix of zeros or the shipped concept makes."""
    described = {"catversion.text_layers": "1,2", "catversion.logit_bias": "1.0"}
    prefix, other = tmp_path / "c.safetensors", DEMO / "concepts/dotted-star.safetensors"
    save_concept(Concept({"prefix": torch.zeros(2, 2, 1, 4, 32)}, described, "catversion"), prefix)
    monkeypatch.setattr(methods, "learn", lambda name, _: prefix if name == "CatVersion" else other)
    monkeypatch.setattr("sys.argv", ["methods.py", "--steps", "1", "--out", str(tmp_path / "sheet.png")])
    methods.main()
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 4 * 128 and sheet.height > len(methods.METHODS) * 128


def test_every_method_has_its_configuration() -> None:
    assert all(Path(f"configs/demo/{name}.yaml").is_file() for name in methods.METHODS.values() if name)
