"""Windows of stages that were measured for a model."""

from pathlib import Path

import pytest

from ldm.conditioning.presets import PRESET_STAGES, joint, load_presets, preset, presets_beside


def test_measured_windows_take_the_place_of_the_papers(tmp_path: Path) -> None:
    (tmp_path / "presets.yaml").write_text("layout: [7, 8]\nmaterial: [2]\n")
    windows = presets_beside(tmp_path / "model.safetensors")
    assert windows == PRESET_STAGES | {"layout": (7, 8), "material": (2,)}
    assert presets_beside(tmp_path) == windows  # a diffusers folder
    assert preset("layout", "a star", windows=windows) == ["a star"] * 7 + ["a star *"] * 2 + ["a star"]
    both = joint({"layout": "<a>", "material": "<b>"}, "star", windows=windows)
    assert [stage for stage, text in enumerate(both) if "<a>" in text] == [7, 8]
    assert [stage for stage, text in enumerate(both) if "<b>" in text] == [2]


def test_an_attribute_without_a_stage_is_no_secret():
    four = {"content": "<a>", "material": "<b>", "style": "<c>", "layout": "<d>"}
    measured = {"content": (2, 3), "material": (3, 4), "style": (1, 2, 3), "layout": (9,)}
    with pytest.raises(ValueError, match=r"No stage is left for content.*give stages=\{'content'"):
        joint(four, "a thing", windows=measured)
    words = joint(four, "a thing", {"content": [2]}, windows=measured)
    assert "<a>" in words[2]
    with pytest.raises(ValueError, match="'layout' is stages 9 of ten, and none of this concept's 4"):
        preset("layout", "a star", num_stages=4)
    assert preset("layout", "a star", stages=[], num_stages=4) == ["a star"] * 4


def test_without_a_file_the_papers_hold(tmp_path: Path) -> None:
    assert presets_beside(tmp_path / "model.safetensors") == load_presets(None) == PRESET_STAGES


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("[1, 2]", "content, layout"),
        ("colour: [1]", "content, layout"),
        ("layout: 9", "'layout'"),
        ("layout: []", "'layout'"),
        ("layout: [10]", "0..9"),
        ("layout: [true]", "'layout'"),
        ("layout: [", "cannot be read"),
        ("\x00", "cannot be read"),
    ],
)
def test_other_files_get_one_sentence(text: str, names: str, tmp_path: Path) -> None:
    (tmp_path / "presets.yaml").write_text(text)
    with pytest.raises(ValueError, match="presets.yaml") as error:
        presets_beside(tmp_path)
    assert names in str(error.value) and "\n" not in str(error.value)
