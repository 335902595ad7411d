"""Requests check themselves: wrong values get one sentence, and nothing heavy is imported for it."""

import subprocess
import sys
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from ldm.config import instantiate_from_config, load_config
from ldm.generate import SAMPLERS, facts_of
from ldm.request import (
    MAX_PROMPT,
    ModelFacts,
    Request,
    check_words,
    edit_steps,
    mentions,
    model_facts,
    placeholder_pattern,
    read_scale,
)
from ldm.request import SAMPLERS as SAMPLER_SPACINGS

ROOT = Path(__file__).parents[1]
TEN = ["a star"] * 10
FACTS = ModelFacts(size_unit=32, height=128, width=128, scale=2.5)
HUGE = 10**5000  # too long to be written in decimal

REFUSED: list[tuple[dict[str, object], str]] = [
    # texts
    ({"prompt": None}, "A prompt must be a text, not None."),
    ({"prompt": b"a star"}, "A prompt must be a text, not a bytes."),
    ({"prompt": 7}, "A prompt must be a text, not 7; in YAML, put it in quotes."),
    ({"prompt": True}, "A prompt must be a text, not True; in YAML, put it in quotes."),
    ({"prompt": ["a star"]}, "A prompt must be a text, not a list."),
    ({"prompt": "a \udce4 star"}, "has bytes that are no text"),
    ({"negative_prompt": 3}, "negative_prompt must be a text, not 3"),
    ({"negative_prompt": "a *"}, "negative_prompt has the placeholder '*'; it must be plain text"),
    ({"negative_prompt": "a <b>", "concepts": {"<b>": "b.pt"}}, "negative_prompt has the placeholder '<b>'"),
    # words
    ({"prospect_words": []}, "has 0 entries, but this model has 10 stages"),
    ({"prospect_words": TEN[1:]}, "has 9 entries, but this model has 10 stages"),
    ({"prospect_words": [*TEN, "x"]}, "has 11 entries, but this model has 10 stages"),
    ({"prospect_words": "a star"}, "must be a list of one entry for each stage, not a str"),
    ({"prospect_words": "0123456789"}, "must be a list of one entry for each stage, not a str"),
    ({"prospect_words": b"0123456789"}, "not a bytes"),
    ({"prospect_words": dict.fromkeys(range(10), "a")}, "not a dict"),
    ({"prospect_words": {"a", "b"}}, "not a set"),
    ({"prospect_words": 5}, "not a int"),
    ({"prospect_words": np.arange(10)}, "not a ndarray"),
    ({"prospect_words": (word for word in TEN)}, "not a generator"),
    ({"prospect_words": [10, *TEN[1:]]}, "prospect_words[0] = 10: a stage number must be in 0..9"),
    ({"prospect_words": [*TEN[1:], -1]}, "prospect_words[9] = -1: a stage number must be in 0..9"),
    ({"prospect_words": [*TEN[1:], np.int64(10)]}, "prospect_words[9] = 10"),
    ({"prospect_words": [HUGE, *TEN[1:]]}, "a number of more than 20 digits: a stage number must be in 0..9"),
    ({"prospect_words": [True, *TEN[1:]]}, "prospect_words[0] is a bool; an entry is a text, a stage number, or None"),
    ({"prospect_words": [0.0, *TEN[1:]]}, "prospect_words[0] is a float"),
    ({"prospect_words": [np.float32(1), *TEN[1:]]}, "prospect_words[0] is a float32"),
    ({"prospect_words": [np.bool_(True), *TEN[1:]]}, "prospect_words[0] is a bool"),
    ({"prospect_words": [b"a", *TEN[1:]]}, "prospect_words[0] is a bytes"),
    ({"prospect_words": [["a"], *TEN[1:]]}, "prospect_words[0] is a list"),
    ({"prospect_words": ["\ud800", *TEN[1:]]}, "prospect_words[0] has bytes that are no text"),
    ({"prospect_words": TEN, "preset": "style"}, "preset makes prospect_words itself"),
    # choices
    ({"preset": "mood"}, "Unknown preset 'mood'; there are content, layout, material, style."),
    ({"sampler": "euler"}, "Unknown sampler 'euler'; there are ddim, plms, dpmpp_2m."),
    ({"sampler": ["ddim"]}, "Unknown sampler a list; there are ddim, plms, dpmpp_2m."),
    ({"sampler": None}, "Unknown sampler None; there are ddim, plms, dpmpp_2m."),
    ({"spacing": "karras"}, "Unknown spacing 'karras'; there are leading, trailing."),
    ({"ddim_eta": 0.5, "sampler": "dpmpp_2m"}, "dpmpp_2m is deterministic: ddim_eta must be 0, not 0.5; use DDIM"),
    ({"resize": "stretch"}, "Unknown resize 'stretch'; there are crop, pad, squash."),
    ({"any_base": "yes"}, "Unknown any_base 'yes'; there are False, True."),
    ({"legacy_word_tokens": 1}, "Unknown legacy_word_tokens 1; there are False, True."),
    # numbers
    ({"ddim_steps": 0}, "ddim_steps must be in 1..1000, not 0."),
    ({"ddim_steps": 1001}, "ddim_steps must be in 1..1000, not 1001."),
    ({"ddim_steps": 20.0}, "ddim_steps must be a whole number, not 20.0."),
    ({"ddim_steps": "few"}, "ddim_steps must be a whole number, not 'few'."),
    ({"ddim_steps": True}, "ddim_steps must be a whole number, not True."),
    ({"ddim_steps": torch.tensor(3)}, "ddim_steps must be a whole number, not a Tensor."),
    ({"strength": 1.1}, "strength must be in 0..1, not 1.1"),
    ({"strength": float("nan")}, "strength must be in 0..1, not nan"),
    ({"strength": "much"}, "strength must be a number, not 'much'."),
    ({"strength": False}, "strength must be a number, not False."),
    ({"strength": np.float32(1.5)}, "strength must be in 0..1, not 1.5"),
    ({"strength": Decimal("0.5")}, "strength must be a number, not a Decimal."),
    ({"ddim_eta": -0.5}, "ddim_eta must be in 0..1, not -0.5: 0 is deterministic"),
    ({"ddim_eta": float("nan")}, "ddim_eta must be in 0..1, not nan"),
    ({"ddim_eta": 1.1}, "ddim_eta must be in 0..1, not 1.1"),
    ({"ddim_eta": 0.5, "sampler": "plms"}, "ddim_eta must be 0, not 0.5; use DDIM"),
    ({"scale": -1.0}, "scale must be in 0..1000, not -1.0"),
    ({"scale": float("nan")}, "scale must be in 0..1000, not nan"),
    ({"scale": float("inf")}, "scale must be in 0..1000, not inf"),
    ({"scale": HUGE}, "scale must be in 0..1000, not a number of more than 20 digits"),
    ({"scale": "7"}, "scale must be a number, not '7'."),
    ({"scale": [3.0] * 9}, "scale has 9 entries, but this model has 10 stages; entry 0 is the end of generation"),
    ({"scale": []}, "scale has 0 entries"),
    ({"scale": [2, -1, *[2] * 8]}, "scale[1] must be in 0..1000, not -1; 1 means no guidance"),
    ({"scale": [*[2] * 9, None]}, "scale[9] must be a number, not None."),
    ({"scale": (True, *[2] * 9)}, "scale[0] must be a number, not True."),
    ({"scale": ["7", *[2] * 9]}, "scale[0] must be a number, not '7'."),
    ({"scale": {0: 1}}, "scale must be a number, not a dict."),
    ({"rescale": 1.5}, "rescale must be in 0..1, not 1.5: 0 leaves guidance as it is"),
    ({"rescale": None}, "rescale must be a number, not None."),
    ({"seed": -1}, "seed must be in 0.."),
    ({"seed": 1.0}, "seed must be a whole number, not 1.0."),
    ({"seed": 2**63}, "seed must be in 0..9223372036854775807, not 9223372036854775808"),
    ({"seed": None}, "seed must be a whole number, not None."),
    ({"n_iter": 0}, "n_iter must be in 1..1000000, not 0."),
    ({"n_samples": -1}, "n_samples must be in 1..4096, not -1; n_iter makes more."),
    ({"n_samples": 10**8}, "n_samples must be in 1..4096, not 100000000"),
    ({"n_iter": 10**11}, "n_iter must be in 1..1000000, not 100000000000"),
    ({"n_rows": -1}, "n_rows must be in 0..1000000, not -1: 0 is as square as possible"),
    ({"height": 70}, "height must be a multiple of 32 for this model, not 70; nearest: 64."),
    ({"height": -64}, "height must be in 1..16384, not -64."),
    ({"width": 0}, "width must be in 1..16384, not 0."),
    ({"width": 160_000}, "width must be in 1..16384, not 160000."),
    ({"height": HUGE}, "height must be in 1..16384, not a number of more than 20 digits."),
    ({"height": "64"}, "height must be a whole number, not '64'."),
    ({"height": "9" * 5000}, "height must be a whole number, not '9999"),
    # files
    ({"content_dir": ""}, "content_dir is an empty path"),
    ({"content_dir": 5}, "content_dir must be a file's path or an image of Pillow, not 5."),
    ({"content_dir": b"a.png"}, "content_dir must be a file's path or an image of Pillow, not a bytes."),
    ({"content_dir": np.zeros((64, 64, 3))}, "content_dir must be a file's path or an image of Pillow, not a ndarray."),
    ({"concepts": ["x"]}, "concepts must be {name: file}, not a list; give them with --concept NAME=FILE."),
    ({"concepts": {"*": 3}}, "concepts must be {name: file}, but '*' has 3 and no file's path."),
    ({"concepts": {"*": ""}}, "The concept '*' has no file here; give it with --concept '*=FILE'."),
    ({"concepts": {"": "a.pt"}}, "A placeholder must be a visible text such as '*', not ''."),
    ({"concepts": {3: "a.pt"}}, "A placeholder must be a visible text such as '*', not 3."),
    ({"concepts": {"<*>": "a.pt"}}, "The placeholder '<*>' must not contain '*'"),
    ({"concepts": {f"<{i}>": "a.pt" for i in range(10_000)}}, "There are 10000 concepts; a request takes at most 100."),
]


@pytest.mark.parametrize(("arguments", "sentence"), REFUSED)
def test_wrong_values_get_one_short_sentence(arguments: dict, sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        Request(**arguments).for_model(FACTS)
    message = str(caught.value)
    assert sentence in message and "\n" not in message and len(message) < 220


def test_values_of_numpy_become_pythons() -> None:
    request = Request(
        ddim_steps=np.int64(20), n_samples=np.uint8(2), seed=np.int64(3), strength=np.float32(0.7),
        scale=np.float64(2.5), prospect_words=(np.int32(0), np.int64(1), None, "*"),
    )  # fmt: skip
    assert request == Request(
        ddim_steps=20, n_samples=2, seed=3, strength=0.7, scale=2.5, prospect_words=(0, 1, None, "*")
    )
    assert {type(word) for word in request.prospect_words[:2]} == {int} and type(request.seed) is int
    assert Request(strength=Fraction(1, 4)).strength == 0.25


@pytest.mark.parametrize(
    ("text", "scale"),
    [
        ("7.5", 7.5),
        ("7.5,0-1:1", [1, 1, *[7.5] * 8]),
        ("7.5, 9:3, 0-1:1,1:2", [1, 2, *[7.5] * 7, 3]),
        ("0:1", [1, *[2.5] * 9]),  # the model's own elsewhere
        ("0-4:1,5-9:3", [1] * 5 + [3] * 5),
    ],
)
def test_a_text_gives_the_scale_of_each_stage(text: str, scale: object) -> None:
    assert read_scale(text, 10, 2.5) == scale
    request = Request(scale=read_scale(text, 10, 2.5)).for_model(FACTS)
    assert request.guidance_scale == (tuple(scale) if isinstance(scale, list) else scale) and request.is_guided


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "x",
            "scale cannot be read from 'x'; give a number, and after commas other ones for stages, such as 7.5,0-1:1",
        ),
        ("", "cannot be read from ''"),
        ("7,", "cannot be read from '7,'"),
        ("0:x", "cannot be read"),
        ("1:2:3", "cannot be read"),
        ("7,10:1", "scale has no stages 10; they are 0..9."),
        ("7,4-2:1", "scale has no stages 4-2"),
        ("7,0-9999:1", "scale has no stages 0-9999"),
        ("7,0-99999999999:1", "cannot be read"),
    ],
)
def test_texts_that_give_no_scale(text: str, sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        read_scale(text, 10, 2.5)
    assert sentence in str(caught.value)


def test_a_request_knows_whether_it_is_guided() -> None:
    assert [Request(scale=scale).is_guided for scale in (1, [1.0] * 10, [1.0] * 9 + [2])] == [False, False, True]


def test_the_ends_of_the_ranges_are_taken() -> None:
    Request(ddim_steps=1, strength=0, scale=0, seed=0).for_model(ModelFacts())
    Request(ddim_steps=1000, strength=1, ddim_eta=1, scale=1000, seed=2**63 - 1, height=1 << 14).for_model(ModelFacts())


def test_the_home_folder_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    request = Request(content_dir=Path("~/a.png"), concepts={"*": "~/b.safetensors"})
    assert (request.content_dir, request.concepts) == ("/home/me/a.png", {"*": "/home/me/b.safetensors"})


def test_open_images_are_kept() -> None:
    image = Image.new("RGB", (8, 8))
    assert Request(content_dir=image).content_dir is image


def test_the_model_gives_what_the_request_leaves_open() -> None:
    filled = Request(width=64).for_model(FACTS)
    assert (filled.size, filled.guidance_scale) == ((128, 64), 2.5)
    assert Request(scale=1, height=32, width=32).for_model(FACTS).guidance_scale == 1
    with pytest.raises(ValueError, match="no personalization_config"):
        Request(concepts={"*": "a.pt"}).for_model(ModelFacts(placeholder=None))
    with pytest.raises(ValueError, match=r"ddim_steps must be in 1\.\.100, not 101"):
        Request(ddim_steps=101).for_model(ModelFacts(num_timesteps=100))


@pytest.mark.parametrize(
    ("strength", "steps", "expected"),
    [(0.29, 100, 29), (0.58, 50, 29), (0.57, 100, 57), (0.5, 25, 12), (0.99, 4, 3), (1.0, 50, 50), (0.05, 10, 0)],
)
def test_strength_counts_in_decimals(strength: float, steps: int, expected: int) -> None:
    assert edit_steps(strength, steps) == expected
    request = Request(strength=strength, ddim_steps=steps, spacing="trailing", content_dir="a.png")
    assert request.noised_entry == expected - 1  # the one that is denoised first
    request = Request(strength=strength, ddim_steps=steps)
    assert request.denoising_steps == steps
    assert Request(strength=strength, ddim_steps=steps, content_dir="a.png").denoising_steps == expected


def test_the_names_of_the_samplers_are_those_that_there_are() -> None:
    assert {name: kind.spacing for name, kind in SAMPLERS.items()} == SAMPLER_SPACINGS
    assert Request(sampler="dpmpp_2m").for_model(FACTS).spacing == "trailing"
    assert Request(sampler="dpmpp_2m", spacing="leading").for_model(FACTS).spacing == "leading"


# Words and placeholders


@pytest.mark.parametrize("kind", [list, tuple, OmegaConf.create])
def test_any_sequence_of_entries_is_taken(kind: type) -> None:
    assert check_words(kind(["a", 1, None, "*"]), 4) == ["a", 1, None, "*"]


@pytest.mark.parametrize(
    ("placeholder", "inside", "outside"),
    [
        ("*", ["dog*cat", "**", "*s"], ["a dog"]),
        ("<star>", ["a<star>b"], ["star"]),
        ("star", ["a star", "(star)", "star's", "star-fish", "*star", "<star>"], ["starfish", "nova_star", "ästar"]),
        ("sks", ["sks dog"], ["masks", "sks2", "Sks"]),
        ("étoile", ["une étoile."], ["étoiles"]),
        ("猫", ["黒猫の絵", "猫"], ["犬"]),  # no spaces between words
        ("a b", ["a b c"], ["la b", "a bc"]),
    ],
)
def test_placeholders_of_letters_are_whole_words(placeholder: str, inside: list[str], outside: list[str]) -> None:
    assert [text for text in inside if not mentions(text, placeholder)] == []
    assert [text for text in outside if mentions(text, placeholder)] == []


def test_the_longest_placeholder_counts() -> None:
    pattern = placeholder_pattern(["<cat>", "<cat>-2", "(.)+"])
    assert pattern.findall("<cat> on <cat>-2, (.)+ dog") == ["<cat>", "<cat>-2", "(.)+"]


# Facts of a model


@pytest.mark.parametrize("name", ["demo/finetune", "stable-diffusion/v1-inference"])
def test_facts_of_a_configuration_are_those_of_its_model(name: str) -> None:
    config = load_config(ROOT / f"configs/{name}.yaml")
    config.model.params.personalization_config.params.initializer_words = None
    with torch.device("meta"):
        model = instantiate_from_config(config.model)
    facts = model.facts = model_facts(config)
    assert replace(facts_of(model), num_layers=None) == facts  # which only the network knows
    small = name.startswith("demo")
    assert (facts.height, facts.width, facts.scale) == ((128, 128, 2.5) if small else (512, 512, 10.0))


def test_what_a_configuration_leaves_open_is_stable_diffusions() -> None:
    assert model_facts(OmegaConf.create({"model": {"target": "a", "params": {}}})) == ModelFacts(placeholder=None)
    config = load_config(ROOT / "configs/stable-diffusion/v1-finetune.yaml")
    config.model.params.first_stage_config.params.ddconfig.resolution = 256  # as in CompVis' own files
    assert model_facts(config) == ModelFacts()
    broken = {"timesteps": "few", "prospect_stages": "${nowhere}", "image_size": True, "unet_config": 3}
    assert model_facts(OmegaConf.create({"model": {"params": broken}})) == ModelFacts(placeholder=None)


def test_nothing_heavy_is_imported() -> None:
    source = "import sys, ldm.request; ldm.request.Request(prompt='a'); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert "ldm.request" in modules
    assert not set(modules) & {"torch", "numpy", "PIL", "omegaconf", "yaml", "transformers"}


def test_every_image_has_a_seed_that_repeats_it() -> None:
    assert Request(seed=2**63 - 4, n_samples=2, n_iter=2).seed == 2**63 - 4
    with pytest.raises(ValueError, match="seed [+] i of the last image is 9223372036854775808, beyond 92"):
        Request(seed=2**63 - 3, n_samples=2, n_iter=2)


@pytest.mark.parametrize("name", ["prompt", "negative_prompt"])
def test_endless_prompts_are_refused(name: str) -> None:
    """A prompt of the longest kind takes seconds; a record can hold megabytes."""
    assert Request(**{name: "a" * MAX_PROMPT})
    with pytest.raises(ValueError, match=r"has 4000000 characters, of which only the first are read; shorten it\.$"):
        Request(**{name: "star " * 800_000})
