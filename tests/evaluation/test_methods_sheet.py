"""The sheets of all methods and of captions: their rows and columns, and what each is learned with."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from ldm.embeddings import Concept, save_concept
from scripts import methods

DEMO = Path("models/demo")


@pytest.mark.parametrize("rows", [methods.METHODS, methods.CAPTIONS])
def test_rows_are_what_is_learned_and_columns_prompts(
    rows: list[methods.Row], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without learning: every concept is what a prefix of zeros or the shipped one makes."""
    described = {"catversion.text_layers": "1,2", "catversion.logit_bias": "1.0"}
    prefix, other = tmp_path / "c.safetensors", DEMO / "concepts/dotted-star.safetensors"
    save_concept(Concept({"prefix": torch.zeros(2, 2, 1, 4, 32)}, described, "catversion"), prefix)
    monkeypatch.setattr(methods, "learn", lambda row, _: prefix if row.config == "catversion" else other)
    flags = ["--captions"] if rows is methods.CAPTIONS else []
    monkeypatch.setattr("sys.argv", ["methods.py", *flags, "--steps", "1", "--out", str(tmp_path / "sheet.png")])
    methods.main()
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 4 * 128 and len(rows) * 128 < sheet.height < (len(rows) + 1) * 128


def test_a_sheet_replaces_nothing_unasked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(methods, "learn", lambda *_: pytest.fail("it has started"))
    for flags, sentence in {
        ("--out", "docs/images/methods.png"): "is there already; use --force",
        ("--out", "models/demo/references/x.png", "--force"): "is, or is part of, what is read",
    }.items():
        monkeypatch.setattr("sys.argv", ["methods.py", *flags])
        with pytest.raises(SystemExit):
            methods.main()
        assert sentence in capsys.readouterr().err


def test_every_method_has_its_configuration() -> None:
    assert all(Path(f"configs/demo/{row.config}.yaml").is_file() for row in methods.METHODS if row.config)
