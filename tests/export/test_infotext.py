"""The PNG chunk `parameters`: read the way other tools read it."""

import json
import re

import pytest
import torch
from PIL import Image

from ldm.embeddings import Concept, save_concept
from ldm.export.infotext import infotext
from ldm.generate import PNG_KEY, read_parameters, save_picture

RECORD = {
    "prompt": "a * (dog), [x]: y",
    "prospect_words": None,
    "content_dir": None,
    "ddim_steps": 20,
    "strength": 0.5,
    "ddim_eta": 0.0,
    "scale": 7.5,
    "seed": 42,
    "height": 64,
    "width": 128,
    "sampler": "ddim",
    "concepts": {},
    "base_model": "sd-v1-4.ckpt",
}


def read(text: str) -> tuple[str, dict[str, str]]:
    """Prompt and settings, by the regular expression that the format is known by."""
    *lines, last = text.strip().split("\n")
    found = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last)
    assert len(found) >= 3  # fewer are taken for a part of the prompt
    assert lines[1].startswith("Negative prompt: ")
    return lines[0], {key: json.loads(value) if value.startswith('"') else value for key, value in found}


def test_the_settings_that_other_tools_read() -> None:
    prompt, settings = read(infotext(RECORD))
    assert prompt == r"a * \(dog\), \[x\]\: y"
    assert settings == {
        "Steps": "20",
        "Sampler": "DDIM",
        "CFG scale": "7.5",
        "Seed": "42",
        "Size": "128x64",
        "Model": "sd-v1-4",
        "ProSpect prompt": "a * (dog), [x]: y",
    }


def test_the_negative_prompt_has_its_place() -> None:
    assert infotext(RECORD).splitlines()[1] == "Negative prompt: "
    text = infotext(RECORD | {"negative_prompt": "blurry,\n(dark)"})
    assert text.splitlines()[1] == r"Negative prompt: blurry, \(dark\)" and read(text)[1]["Steps"] == "20"


def test_stages_become_prompt_editing_and_stay_readable(tmp_path) -> None:
    (tmp_path / "my_run" / "checkpoints").mkdir(parents=True)
    file = tmp_path / "my_run" / "checkpoints" / "embeddings.safetensors"
    save_concept(Concept(torch.zeros(2, 4)), file)
    words = ["a *", 'a "dog"\n: b']
    changed = {"prompt": "*", "prospect_words": words, "concepts": {"*": str(file)}}
    prompt, settings = read(infotext(RECORD | changed | {"sampler": "plms", "ddim_eta": 0.5}))
    assert prompt == r'a ["dog" \: b:my-run-0:10]'
    assert json.loads(settings["ProSpect words"]) == words
    assert settings["Eta DDIM"] == "0.5" and settings["Sampler"] == "PLMS"
    assert re.fullmatch("my-run: [0-9a-f]{12}", settings["ProSpect concepts"])


@pytest.mark.parametrize(("strength", "expected"), [(0.5, "fine"), (0.75, "[coarse:fine:4]"), (1.0, "[coarse:fine:9]")])
def test_an_edited_picture_counts_the_steps_that_are_made(strength: float, expected: str) -> None:
    """The web UI makes the last of them, and counts from 0: of 20 steps of DDIM the 10 of stages 0 to 4, for 0.5."""
    words = {"prompt": "*", "prospect_words": ["fine"] * 5 + ["coarse"] * 5}
    prompt, settings = read(infotext(RECORD | words | {"content_dir": "x.png", "strength": strength}))
    assert prompt == expected and settings["Denoising strength"] == f"{strength:g}"


def test_stages_are_the_models(tmp_path) -> None:
    """Also where the first concept has fewer of its own."""
    files = {"*": tmp_path / "one.safetensors", "<b>": tmp_path / "two.safetensors"}
    for file, stages in zip(files.values(), (1, 2), strict=True):
        save_concept(Concept(torch.zeros(stages, 4)), file)
    concepts = {"prompt": "<b> by *", "concepts": {name: str(file) for name, file in files.items()}}
    assert read(infotext(RECORD | concepts))[0] == "[two-b-1:two-b-0:9] by one-0"
    prompt = read(infotext(RECORD | {"num_stages": 5} | concepts))[0]
    assert prompt == "[two-b-1:two-b-0:11] by one-0", prompt


def test_a_concept_that_is_gone_has_ten_stages() -> None:
    prompt, settings = read(infotext(RECORD | {"prompt": "*", "concepts": {"*": "gone/teddy.safetensors"}}))
    assert prompt.startswith("[[[[[[[[[teddy-9:teddy-8:1]:teddy-7:3]") and prompt.endswith(":teddy-0:17]")
    assert settings["ProSpect concepts"] == "teddy: unknown"


@pytest.mark.parametrize("text", ["a dog", "größer — 日本 😀"])
def test_a_saved_picture_has_both(tmp_path, text: str) -> None:
    picture = Image.new("RGB", (8, 8))
    picture.info[PNG_KEY] = json.dumps(RECORD | {"prompt": text})
    save_picture(picture, tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as saved:
        assert read(saved.info["parameters"])[0] == text
    assert read_parameters(tmp_path / "p.png")["prompt"] == text


def test_a_record_of_too_little_is_kept_alone(tmp_path) -> None:
    picture = Image.new("RGB", (8, 8))
    picture.info[PNG_KEY] = '{"prompt": "a"}'
    save_picture(picture, tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as saved:
        assert PNG_KEY in saved.info and "parameters" not in saved.info
