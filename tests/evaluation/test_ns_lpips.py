"""NS-LPIPS against numbers recorded from the reference, with a stub distance, and its two modes."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from evaluation.metrics.ns_lpips import Scores, as_tensor, mask_tensor, masked_pair, ns_lpips, score_folders

FOLDER = Path(tiny.GOLDEN) / "stylediffusion"
META = json.loads((FOLDER / "meta.json").read_text(encoding="utf-8"))["masks"]
RECORDED = load_file(FOLDER / "masks.safetensors")


def distance(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().mean(dim=(1, 2, 3))


def picture(name: str) -> Image.Image:
    """A recorded image; masks have three equal channels, of which the record's first one is meant."""
    values = RECORDED[f"ns.{name}.small"]
    small = Image.fromarray((values[..., :1].expand(-1, -1, 3) if name.startswith("mask") else values).numpy())
    return small.resize(tuple(META[f"ns.{name}.size_wh"]), Image.Resampling.BICUBIC)


def noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 30, 3), dtype=np.uint8))


def test_recorded_scores() -> None:
    cases = {str(k): (picture(f"src{k}"), picture(f"edit{k}"), picture(f"mask{k}")) for k in range(2)}
    source, edit = masked_pair(*cases["0"])
    for found, name in ((source, "src"), (edit, "edit")):
        torch.testing.assert_close(found[..., ::8, ::8], RECORDED[f"ns.case0.{name}_bg.every8"], rtol=0, atol=1e-5)
    for k in range(2):
        mask = mask_tensor(cases[str(k)][2])
        torch.testing.assert_close(mask[..., ::8, ::8], RECORDED[f"ns.case{k}.mask.every8"], rtol=0, atol=1e-5)
    found = ns_lpips(cases, distance)
    assert found.scores == pytest.approx({"0": META["ns.score_0"], "1": META["ns.score_1"]}, rel=1e-4)
    assert found.mean == pytest.approx(META["ns.score_all"], rel=1e-4)


def test_white_and_grey_masks() -> None:
    white, grey = (mask_tensor(Image.new("RGB", (9, 9), (v, v, v))).max().item() for v in (255, 100))
    assert white == pytest.approx(META["ns.white_mask_value"]) and grey == pytest.approx(META["ns.grey100_mask_value"])


@pytest.mark.parametrize("mode", ["paper", "standard"])
def test_what_is_masked_does_not_count(mode: str) -> None:
    one, other = noise(0), noise(1)
    black, white = (Image.new("L", (30, 40), v) for v in (0, 255))
    half = white.copy()
    half.paste(0, (0, 0, 30, 20))
    changed = one.copy()
    changed.paste(other.crop((0, 0, 30, 15)), (0, 0))
    scores = {
        name: distance(*masked_pair(a, b, m, mode)).item()
        for name, (a, b, m) in {
            "empty": (one, other, black), "same": (one, one, white), "masked": (one, changed, half),
            "all": (one, other, white),
        }.items()
    }  # fmt: skip
    assert scores["empty"] == scores["same"] == 0 and scores["masked"] < 1e-3 * scores["all"]


def test_soft_masks() -> None:
    """Only `standard` makes a grey mask black and white."""
    grey = Image.new("L", (8, 8), 100)
    soft, _ = masked_pair(noise(0), noise(0), grey, "paper")
    hard, _ = masked_pair(noise(0), noise(0), grey, "standard")
    torch.testing.assert_close(soft[0], as_tensor(noise(0)) * 0.9999 * 100 / 255)
    assert not hard.any()
    with pytest.raises(ValueError, match="mode must be one of paper, standard"):
        masked_pair(noise(0), noise(0), grey, "hard")


def test_folders(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("sources", "edits", "masks")]
    for folder, image in zip(folders, (noise(0), noise(1), Image.new("L", (9, 9), 255)), strict=True):
        folder.mkdir()
        image.save(folder / "1 a [dog].png")
    noise(2).save(folders[0] / "2 a cat.png")
    found = score_folders(*folders, distance)
    assert list(found.scores) == ["1 a [dog]"] and found.missing == ("2 a cat",)
    assert "1 cases; 1 without files: 2 a cat" in str(found)
    Image.new("L", (9, 9), 0).save(folders[2] / "1 a [dog].png")
    with pytest.raises(ValueError, match=r"mask of '1 a \[dog\]' is empty"):
        score_folders(*folders, distance)
    with pytest.raises(ValueError, match="No case has a source, an edit and a mask"):
        score_folders(*folders, distance, names=["3"])
    assert Scores("paper", {"a": 1.0, "b": 3.0}).mean == 2.0
