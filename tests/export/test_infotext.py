"""The PNG chunk `parameters`: read the way other tools read it."""

import json
import re
from pathlib import Path

from PIL import Image

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


def read(**changed: object) -> tuple[str, str, dict[str, str]]:
    """Prompt, negative prompt and settings, by the regular expression that the format is known by."""
    prompt, negative, last = infotext(RECORD | changed).strip().split("\n")
    found = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last)
    assert len(found) >= 3  # fewer are taken for a part of the prompt
    values = {key: json.loads(value) if value.startswith('"') else value for key, value in found}
    return prompt, negative.removeprefix("Negative prompt:").strip(), values


def test_the_settings_that_other_tools_read() -> None:
    prompt, negative, settings = read()
    assert prompt == r"a * \(dog\), \[x\]\: y" and negative == ""
    assert settings == {
        "Steps": "20",
        "Sampler": "DDIM",
        "CFG scale": "7.5",
        "Seed": "42",
        "Size": "128x64",
        "Model": "sd-v1-4",
        "ProSpect prompt": "a * (dog), [x]: y",
    }
    for sampler, name in {"dpmpp_2m": "DPM++ 2M", "ddim": "Euler"}.items():
        settings = read(sampler=sampler, spacing="trailing")[2]
        assert (settings["Sampler"], settings["Schedule type"]) == (name, "SGM Uniform")
    settings = read(scale=[1.0, 7.5])[2]
    assert (settings["CFG scale"], settings["ProSpect scale"]) == ("7.5", "[1.0, 7.5]")
    _, negative, settings = read(negative_prompt="blurry,\n(dark)")
    assert negative == r"blurry, \(dark\)" and settings["Steps"] == "20"


def test_stages_become_prompt_editing_and_stay_readable() -> None:
    words = ["a *", 'a "dog"\n: b']
    concepts = {"concepts": {"*": "my_run/checkpoints/embeddings.safetensors"}, "concept_stages": {"*": 2}}
    texts = {"prompt": "*", "prospect_words": words, "concept_hashes": {"*": "0123456789ab"}}
    prompt, _, settings = read(**texts, **concepts, sampler="plms", ddim_eta=0.5)
    assert prompt == r'a ["dog" \: b:my-run-0:10]'
    assert json.loads(settings["ProSpect words"]) == words
    assert settings["Eta DDIM"] == "0.5" and settings["Sampler"] == "PLMS"
    assert settings["ProSpect concepts"] == "my-run: 0123456789ab"


def test_words_that_were_cut_off_are_left_out() -> None:
    read_here = {"words_read": {"prompt": [2, 3], "negative_prompt": 1}}
    prompt, negative, settings = read(
        prompt="a (b) c d", prospect_words=[None, None], negative_prompt="e: f", **read_here
    )
    assert (prompt, negative) == (r"a \(b\) [c::9]", r"e\:") and settings["ProSpect prompt"] == "a (b) c d"


def test_an_edited_image_counts_the_steps_that_the_web_ui_makes() -> None:
    """The last of them, and it counts from 0: of 20 steps of DDIM the 10 of stages 0 to 4, for 0.5; at most 19."""
    words = ["fine"] * 5 + ["coarse"] * 5
    for strength, expected in {0.5: "fine", 0.75: "[coarse:fine:4]", 1.0: "[coarse:fine:8]"}.items():
        for source in ("x.png", ""):  # "" of an image without a file
            prompt, _, settings = read(prompt="*", prospect_words=words, content_dir=source, strength=strength)
            assert prompt == expected and settings["Denoising strength"] == f"{strength:g}"


def test_stages_are_the_models() -> None:
    """Also where the first concept has fewer of its own; ten where nothing is known of a concept."""
    concepts = {"concepts": {"*": "one.safetensors", "<b>": "two.safetensors"}, "concept_stages": {"*": 1, "<b>": 2}}
    assert read(prompt="<b> by *", num_stages=2, **concepts)[0] == "[two-b-1:two-b-0:9] by one-0"
    assert read(prompt="<b> by *", num_stages=5, **concepts)[0] == "[two-b-1:two-b-0:11] by one-0"
    prompt, _, settings = read(prompt="*", concepts={"*": "gone/teddy.safetensors"})
    assert prompt.startswith("[[[[[[[[[teddy-9:teddy-8:1]:teddy-7:3]") and prompt.endswith(":teddy-0:17]")
    assert settings["ProSpect concepts"] == "teddy: unknown"


def test_a_saved_image_has_both(tmp_path: Path) -> None:
    record = RECORD | {"prompt": "größer — 日本 😀"}
    image = Image.new("RGB", (8, 8))
    image.info[PNG_KEY] = json.dumps(record)
    save_picture(image, tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as saved:
        assert saved.info["parameters"] == infotext(record)
    assert read_parameters(tmp_path / "p.png") == record
    image.info[PNG_KEY] = '{"prompt": "a"}'  # too little for the other chunk
    save_picture(image, tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as saved:
        assert PNG_KEY in saved.info and "parameters" not in saved.info
