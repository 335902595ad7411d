"""Presets: the paper's windows and those measured for a model, of one concept and of several."""

from pathlib import Path

import pytest
import tiny

from ldm.conditioning.presets import PRESET_STAGES, Windows, joint, load_presets, preset, preset_words, presets_beside
from ldm.request import PRESETS

PROMPTS = tiny.META["prompts"]
FOUR = {"content": "<a>", "material": "<b>", "style": "<c>", "layout": "<d>"}


# Windows of a model


def test_measured_windows_take_the_place_of_the_papers(tmp_path: Path) -> None:
    (tmp_path / "presets.yaml").write_text("layout: [7, 8]\nmaterial: [2]\n")
    windows = presets_beside(tmp_path / "model.safetensors")
    assert windows == PRESET_STAGES | {"layout": (7, 8), "material": (2,)}
    assert presets_beside(tmp_path) == windows  # a diffusers folder
    assert preset("layout", "a star", windows=windows) == ["a star"] * 7 + ["a star *"] * 2 + ["a star"]
    both = joint({"layout": "<a>", "material": "<b>"}, "star", windows=windows)
    assert both == ["star"] * 2 + ["star <b>"] + ["star"] * 4 + ["star <a>"] * 2 + ["star"]


def test_without_a_file_the_papers_hold(tmp_path: Path) -> None:
    assert presets_beside(tmp_path / "model.safetensors") == load_presets(None) == Windows() == PRESET_STAGES
    assert tuple(PRESET_STAGES) == PRESETS


def laughs(levels: int = 30) -> str:
    """A few hundred bytes whose aliases stand for 2^30 entries."""
    return "\n".join(["layout: &a0 [1]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, levels))])


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("[1, 2]", "content, layout"),
        ("colour: [1]", "content, layout"),
        ("layout: 9", "0..9"),
        ("layout: []", "0..9"),
        ("layout: [10]", "0..9"),
        ("layout: [true]", "0..9"),
        ("layout: [[1, 2, [3, 4]]]", "0..9"),
        ("layout: [", "is not a readable YAML file"),
        ("layout: !!timestamp x", "is not a readable YAML file"),
        ("layout: &a [*a]", "aliases"),
        (laughs(), "aliases"),
        ("\x00", "is not a readable YAML file"),
    ],
)
def test_other_files_get_one_sentence_and_stop_no_model(
    text: str, names: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "presets.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"presets\.yaml") as error:
        load_presets(path)
    message = str(error.value)
    assert names in message and "\n" not in message and len(message) < 300 + len(str(path))
    assert presets_beside(tmp_path) == PRESET_STAGES
    assert caplog.messages == [f"{message} The paper's windows are used."]


# The paper's presets


def test_presets_have_the_star_in_the_papers_stages() -> None:
    windows = {name: [i for i, text in enumerate(preset(name, "a * dog")) if "*" in text] for name in PRESETS}
    half = [0, 1, 2, 3, 4]
    assert windows == {"content": [*half, 5, 6, 7], "layout": [9], "material": half, "style": half}
    assert preset("material", "a * dog on the table") == PROMPTS["readme_dog"]["prospect_words"]
    assert preset("layout", "a corgi sits on the table") == PROMPTS["readme_corgi"]["prospect_words"]


def test_presets_for_other_stages() -> None:
    assert preset("material", "*", num_stages=4) == ["*", "*", "", ""]
    assert preset("style", "dog", stages=[1], num_stages=3) == ["dog", "dog *", "dog"]
    assert preset("layout", "a star", stages=[], num_stages=4) == ["a star"] * 4


def test_a_preset_is_for_the_concept_that_the_prompt_names(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    words = preset_words("layout", "a starfish, a sks", ["star", "sks"])
    assert words == preset("layout", "a starfish, a sks", placeholder="sks")
    assert caplog.messages == [
        "--preset takes layout from 'sks' alone; ldm.prompts.joint, in Python, takes something from each concept.",
        "The preset 'layout' is stage 9 of 10, from the paper.",
    ]
    assert preset_words("layout", "a star", ["<a>"])[9] == "a star <a>"
    assert preset_words("layout", "a star")[9] == "a star *"
    assert preset("layout", "a starfish", placeholder="star")[8:] == ["a starfish", "a starfish star"]


# Attributes from several concepts


def test_the_papers_joint_result_is_one_call() -> None:
    words = joint(FOUR, "a <b> <c> <a> teddy")
    assert words == ["a <b> <c> teddy"] * 5 + ["a <a> teddy"] * 3 + ["a teddy"] + ["a teddy <d>"]


def test_content_keeps_its_late_stages_where_nothing_else_wants_them() -> None:
    assert joint({"content": "<a>", "layout": "<d>"}, "a <a>") == ["a <a>"] * 8 + ["a", "a <d>"]
    assert joint({"content": "<a>", "material": "<a>"}, "a <a>") == ["a <a>"] * 8 + ["a"] * 2


def test_stages_of_a_joint_list_can_be_chosen() -> None:
    words = joint(FOUR, "x", stages={"layout": [8, 9], "content": range(10)})
    assert words == ["x <a> <b> <c>"] * 5 + ["x <a>"] * 3 + ["x <a> <d>"] * 2


def test_a_placeholder_may_stand_several_times() -> None:
    assert joint({"layout": "<a>"}, "a <a> on a <a><a>")[8:] == ["a on a", "a <a> on a <a><a>"]


MEASURED = {"content": (2, 3), "material": (3, 4), "style": (1, 2, 3), "layout": (9,)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({},), "at least one attribute: content, layout, material, style"),
        (({"mood": "<a>"},), "Unknown preset 'mood'; there are content, layout, material, style"),
        ((FOUR, "", {"mood": [1]}), "stages names 'mood', for which there is no concept"),
        ((FOUR, "", {"layout": [-1, 3, 10]}), r"Stages \[-1, 10\] are outside 0..9"),
        ((FOUR, "", None, 10, MEASURED), r"None of 10 stages is left for content: .*\(stages=\{'content': "),
        (({"layout": "*"}, "a star", None, 4), "None of 4 stages is left for layout.*, or --stages"),
    ],
)
def test_wrong_arguments(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        joint(*arguments)
