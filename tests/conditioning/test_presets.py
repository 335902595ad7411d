"""Presets: the paper's windows and those measured for a model, of one concept and of several."""

from pathlib import Path

import pytest
import tiny

from ldm.conditioning.presets import PRESET_STAGES, Windows, joint, load_presets, preset, preset_words, presets_beside
from ldm.request import PRESETS

PROMPTS = tiny.META["prompts"]


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
    assert presets_beside(tmp_path / "model.safetensors") == load_presets(None) == Windows() == PRESET_STAGES
    assert tuple(PRESET_STAGES) == PRESETS


def laughs(levels: int = 30) -> str:
    """A few hundred bytes whose aliases stand for 2^30 entries."""
    lines = ["layout: &a0 [1]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, levels))]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("[1, 2]", "content, layout"),
        ("colour: [1]", "content, layout"),
        ("layout: 9", "'layout'"),
        ("layout: []", "'layout'"),
        ("layout: [10]", "0..9"),
        ("layout: [true]", "'layout'"),
        ("layout: [[1, 2, [3, 4]]]", "'layout'"),
        ("layout: [", "is not a readable YAML file"),
        ("layout: !!timestamp x", "is not a readable YAML file"),
        ("layout: !!bool x", "is not a readable YAML file"),
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


# The paper's presets


def test_presets_have_the_star_in_the_papers_stages() -> None:
    with_star = {
        name: [i for i, entry in enumerate(preset(name, "a * dog")) if "*" in entry]
        for name in ("content", "layout", "material", "style")
    }
    assert with_star == {
        "content": [0, 1, 2, 3, 4, 5, 6, 7],
        "layout": [9],
        "material": [0, 1, 2, 3, 4],
        "style": [0, 1, 2, 3, 4],
    }
    assert preset("material", "a * dog")[0] == "a * dog" and preset("material", "a * dog")[9] == "a dog"


@pytest.mark.parametrize(
    ("name", "prompt"), [("material", "a * dog on the table"), ("layout", "a corgi sits on the table")]
)
def test_presets_are_the_readmes_examples(name: str, prompt: str) -> None:
    example = {"material": "readme_dog", "layout": "readme_corgi"}[name]
    assert preset(name, prompt) == PROMPTS[example]["prospect_words"]


def test_presets_for_other_stages() -> None:
    assert [("*" in e) for e in preset("material", "*", num_stages=4)] == [True, True, False, False]
    assert ["*" in e for e in preset("style", "dog", stages=[1], num_stages=3)] == [False, True, False]
    with pytest.raises(ValueError, match="Unknown preset 'colour'; there are content, layout, material, style"):
        preset("colour", "*")
    with pytest.raises(ValueError, match=r"Stages \[-1, 10\] are outside 0..9"):
        preset("style", "*", stages=[-1, 3, 10])


# Attributes from several concepts

FOUR = {"content": "<a>", "material": "<b>", "style": "<c>", "layout": "<d>"}


def test_the_papers_joint_result_is_one_call() -> None:
    words = joint(FOUR, "a <b> <c> <a> teddy")
    assert words == ["a <b> <c> teddy"] * 5 + ["a <a> teddy"] * 3 + ["a teddy"] + ["a teddy <d>"]


def test_content_keeps_its_late_stages_where_nothing_else_wants_them() -> None:
    assert joint({"content": "<a>", "layout": "<d>"}, "a <a>") == ["a <a>"] * 8 + ["a", "a <d>"]
    assert joint({"content": "<a>", "material": "<a>"}, "a <a>") == ["a <a>"] * 8 + ["a"] * 2


def test_joint_of_one_attribute_is_its_preset() -> None:
    for attribute in PRESET_STAGES:
        for stages in (5, 10, 20):
            assert joint({attribute: "*"}, "a * dog", num_stages=stages) == preset(
                attribute, "a * dog", num_stages=stages
            )


def test_stages_of_a_joint_list_can_be_chosen() -> None:
    words = joint(FOUR, "x", stages={"layout": [8, 9], "content": range(10)})
    assert words == ["x <a> <b> <c>"] * 5 + ["x <a>"] * 3 + ["x <a> <d>"] * 2


def test_a_placeholder_may_stand_several_times() -> None:
    assert joint({"layout": "<a>"}, "a <a> on a <a><a>")[8:] == ["a on a", "a <a> on a <a><a>"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({},), "at least one attribute: content, layout, material, style"),
        (({"mood": "<a>"},), "Unknown preset 'mood'"),
        ((FOUR, "", {"mood": [1]}), "stages names 'mood'"),
        (({"content": "<a>"}, "", {"layout": [1]}), "for which there is no concept"),
        ((FOUR, "", {"layout": [10]}), r"Stages \[10\] are outside 0..9"),
    ],
)
def test_wrong_joint_arguments(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        joint(*arguments)
