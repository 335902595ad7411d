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
from ldm.request import MAX_PROMPT, ModelFacts, Request, mentions, model_facts, placeholder_pattern, read_scale
from ldm.request import SAMPLERS as SAMPLER_SPACINGS

ROOT = Path(__file__).parents[1]
TEN = ["a star"] * 10
FACTS = ModelFacts(size_unit=32, height=128, width=128, scale=2.5, num_layers=7)
HUGE = 10**5000  # too long to be written in decimal
NAN = float("nan")

REFUSED: list[tuple[dict[str, object], str]] = [
    # texts
    ({"prompt": b"a star"}, "A prompt must be a text, not a bytes; in YAML, put it in quotes."),
    ({"prompt": 7}, "A prompt must be a text, not 7"),
    ({"prompt": "a \udce4 star"}, "has bytes that are no text"),
    ({"prompt": "star " * 800_000}, "has 4000000 characters, of which only the first are read; shorten it."),
    ({"negative_prompt": 3}, "negative_prompt must be a text, not 3"),
    ({"negative_prompt": "a" * (MAX_PROMPT + 1)}, "negative_prompt has 131073 characters"),
    ({"negative_prompt": "a *"}, "negative_prompt has the placeholder '*'; it must be plain text"),
    ({"negative_prompt": "a <b>", "concepts": {"<b>": "b.pt"}}, "negative_prompt has the placeholder '<b>'"),
    # words
    ({"prospect_words": TEN[1:]}, "has 9 entries, but this model has 10 stages; entry 0 is the end of generation"),
    ({"prospect_words": [*TEN, "x"]}, "has 11 entries, but this model has 10 stages"),
    ({"prospect_words": "0123456789"}, "must be a list of one entry for each stage, not '0123456789'"),
    ({"prospect_words": b"0123456789"}, "not a bytes"),
    ({"prospect_words": dict.fromkeys(range(10), "a")}, "not a dict"),
    ({"prospect_words": np.arange(10)}, "not a ndarray"),
    ({"prospect_words": (word for word in TEN)}, "not a generator"),
    ({"prospect_words": [10, *TEN[1:]]}, "[0] must be a text, a stage number in 0..9, or None, not 10."),
    ({"prospect_words": [*TEN[1:], -1]}, "[9] must be a text, a stage number in 0..9, or None, not -1."),
    ({"prospect_words": [HUGE, *TEN[1:]]}, "not a number of more than 20 digits"),
    ({"prospect_words": [True, *TEN[1:]]}, "[0] must be a text, a stage number, or None, not True."),
    ({"prospect_words": [np.float32(1), *TEN[1:]]}, "or None, not 1.0."),
    ({"prospect_words": [["a"], *TEN[1:]]}, "or None, not a list."),
    ({"prospect_words": ["\ud800", *TEN[1:]]}, "prospect_words[0] has bytes that are no text"),
    ({"prospect_words": TEN, "preset": "style"}, "prospect_words and preset exclude each other; give one."),
    ({"layer_words": TEN[:7], "preset": "style"}, "layer_words and preset exclude each other; give one."),
    ({"layer_words": TEN}, "layer_words has 10 entries, but this model has 7 layers; entry 0 is the first layer."),
    ({"layer_words": [7, *TEN[:6]]}, "layer_words[0] must be a text, a layer number in 0..6, or None, not 7."),
    # choices
    ({"preset": "mood"}, "Unknown preset 'mood'; there are content, layout, material, style."),
    ({"sampler": "euler"}, "Unknown sampler 'euler'; there are ddim, plms, dpmpp_2m."),
    ({"sampler": ["ddim"]}, "Unknown sampler a list; there are ddim, plms, dpmpp_2m."),
    ({"spacing": "karras"}, "Unknown spacing 'karras'; there are leading, trailing."),
    ({"ddim_eta": 0.5, "sampler": "dpmpp_2m"}, "dpmpp_2m is deterministic: ddim_eta must be 0, not 0.5; use DDIM."),
    ({"resize": None}, "Unknown resize None; there are crop, pad, squash."),
    ({"legacy_word_tokens": 1}, "Unknown legacy_word_tokens 1; there are False, True."),
    # numbers
    ({"ddim_steps": 0}, "ddim_steps must be in 1..1000, not 0."),
    ({"ddim_steps": 1001}, "ddim_steps must be in 1..1000, not 1001."),
    ({"ddim_steps": 20.0}, "ddim_steps must be a whole number, not 20.0."),
    ({"ddim_steps": "9" * 5000}, "ddim_steps must be a whole number, not '9999"),
    ({"ddim_steps": True}, "ddim_steps must be a whole number, not True."),
    ({"ddim_steps": torch.tensor(3)}, "ddim_steps must be a whole number, not a Tensor."),
    ({"strength": NAN}, "strength must be in 0..1, not nan."),
    ({"strength": "much"}, "strength must be a number, not 'much'."),
    ({"strength": np.float32(1.5)}, "strength must be in 0..1, not 1.5"),
    ({"strength": Decimal("0.5")}, "strength must be a number, not a Decimal."),
    ({"scale": float("inf")}, "scale must be in 0..1000, not inf"),
    ({"scale": HUGE}, "scale must be in 0..1000, not a number of more than 20 digits"),
    ({"scale": [3.0] * 9}, "scale has 9 entries, but this model has 10 stages; entry 0 is the end of generation"),
    ({"scale": []}, "scale has 0 entries"),
    ({"scale": [2, -1, *[2] * 8]}, "scale[1] must be in 0..1000, not -1."),
    ({"scale": (True, *[2] * 9)}, "scale[0] must be a number, not True."),
    ({"scale": {0: 1}}, "scale must be a number, not a dict."),
    ({"rescale": None}, "rescale must be a number, not None."),
    ({"seed": 2**63}, "seed must be in 0..9223372036854775807, not 9223372036854775808"),
    ({"seed": 2**63 - 3, "n_samples": 2, "n_iter": 2}, "seed + i of the last image is 9223372036854775808, beyond 92"),
    ({"n_samples": 10**8}, "n_samples must be in 1..4096, not 100000000"),
    ({"height": 70}, "height must be a multiple of 32 for this model, not 70; nearest: 64."),
    ({"width": 160_000}, "width must be in 1..16384, not 160000."),
    # files
    ({"content_dir": ""}, "content_dir must be a file's path (--content FILE) or an image of Pillow, not ''."),
    ({"content_dir": b"a.png"}, "an image of Pillow, not a bytes."),
    ({"content_dir": np.zeros((64, 64, 3))}, "an image of Pillow, not a ndarray."),
    ({"concepts": ["x"]}, "concepts must be {name: file}, not a list; give them with --concept NAME=FILE."),
    ({"concepts": {"*": 3}}, "The concept '*' has no file here, but 3; give --concept '*=FILE'."),
    ({"concepts": {"*": ""}}, "The concept '*' has no file here, but ''; give --concept '*=FILE'."),
    ({"concepts": {"": "a.pt"}}, "such as '*', not ''."),
    ({"concepts": {"\ud800": "a.pt"}}, "A placeholder must be a visible text"),
    ({"concepts": {"a" * 101: "a.pt"}}, "A placeholder must be a visible text of at most 100 characters"),
    ({"concepts": {3: "a.pt"}}, "A placeholder must be a visible text of at most 100 characters, such as '*', not 3."),
    ({"concepts": {"<*>": "a.pt"}}, "The placeholder '<*>' must not contain '*'"),
    ({"concepts": {f"<{i}>": "a.pt" for i in range(10_000)}}, "There are 10000 concepts; a request takes at most 100."),
]


def test_wrong_values_get_one_short_sentence() -> None:
    for arguments, sentence in REFUSED:
        with pytest.raises(ValueError) as caught:
            Request(**arguments).for_model(FACTS)
        message = str(caught.value)
        assert sentence in message and "\n" not in message and len(message) < 220


def test_the_ends_of_the_ranges_are_taken() -> None:
    Request(ddim_steps=1, strength=0, scale=0, seed=0).for_model(ModelFacts())
    Request(ddim_steps=1000, strength=1, ddim_eta=1, scale=1000, seed=2**63 - 1, height=1 << 14).for_model(ModelFacts())
    assert Request(seed=2**63 - 4, n_samples=2, n_iter=2, prompt="a" * MAX_PROMPT).seed == 2**63 - 4


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
    assert Request(prospect_words=OmegaConf.create(["a", 1, None])).prospect_words == ("a", 1, None)


@pytest.mark.parametrize(
    ("text", "scale"),
    [
        ("7.5", 7.5),
        ("7.5,0-1:1", [1, 1, *[7.5] * 8]),
        ("7.5, 9:3, 0-1:1,1:2", [1, 2, *[7.5] * 7, 3]),
        ("0:1", [1, *[2.5] * 9]),  # the model's own elsewhere
        ("0-4:1,5-9:3", [1] * 5 + [3] * 5),
        (
            "x",
            "scale cannot be read from 'x'; give a number, and after commas other ones for stages, such as 7.5,0-1:1",
        ),
        ("7,", "cannot be read from '7,'"),
        ("0:x", "cannot be read"),
        (":3", "cannot be read"),
        ("1:2:3", "cannot be read"),
        ("7,5-:1", "cannot be read"),
        ("7,10:1", "scale has no stages 10; they are 0..9."),
        ("7,4-2:1", "scale has no stages 4-2"),
        ("7,0-99999999999:1", "scale has no stages 0-99999999999"),
    ],
)
def test_a_text_gives_the_scale_of_each_stage(text: str, scale: object) -> None:
    if isinstance(scale, str):
        with pytest.raises(ValueError) as caught:
            read_scale(text, 10, 2.5)
        assert scale in str(caught.value)
        return
    assert read_scale(text, 10, 2.5) == scale
    request = Request(scale=read_scale(text, 10, 2.5)).for_model(FACTS)
    assert request.guidance_scale == (tuple(scale) if isinstance(scale, list) else scale)


def test_a_request_knows_whether_it_is_guided() -> None:
    assert [Request(scale=scale).is_guided for scale in (1, [1.0] * 10, [1.0] * 9 + [2])] == [False, False, True]


def test_paths_are_expanded_and_open_images_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    request = Request(content_dir=Path("~/a.png"), concepts={"*": "~/b.safetensors"})
    assert (request.content_dir, request.concepts) == ("/home/me/a.png", {"*": "/home/me/b.safetensors"})
    image = Image.new("RGB", (8, 8))
    assert Request(content_dir=image).content_dir is image


def test_the_model_gives_what_the_request_leaves_open() -> None:
    filled = Request(width=64).for_model(FACTS)
    assert (filled.size, filled.guidance_scale) == ((128, 64), 2.5)
    assert Request(scale=1, height=32, width=32).for_model(FACTS).guidance_scale == 1
    with pytest.raises(ValueError, match="no personalization_config"):
        Request(concepts={"*": "a.pt"}).for_model(ModelFacts(placeholder=None))


@pytest.mark.parametrize(
    ("strength", "steps", "expected"),
    [(0.29, 100, 29), (0.58, 50, 29), (0.57, 100, 57), (0.5, 25, 12), (0.99, 4, 3), (1.0, 50, 50), (0.05, 10, 0)],
)
def test_strength_counts_in_decimals(strength: float, steps: int, expected: int) -> None:
    request = Request(strength=strength, ddim_steps=steps, spacing="trailing", content_dir="a.png")
    assert request.denoising_steps == expected
    assert request.noised_entry == expected - 1  # the one that is denoised first
    assert replace(request, content_dir=None).denoising_steps == steps


def test_the_names_of_the_samplers_are_those_that_there_are() -> None:
    assert {name: kind.spacing for name, kind in SAMPLERS.items()} == SAMPLER_SPACINGS
    assert Request(sampler="dpmpp_2m").for_model(FACTS).spacing == "trailing"
    assert Request(sampler="dpmpp_2m", spacing="leading").for_model(FACTS).spacing == "leading"


# Placeholders


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
    broken = {"prospect_stages": "${nowhere}", "image_size": True, "unet_config": 3}
    assert model_facts(OmegaConf.create({"model": {"params": broken}})) == ModelFacts(placeholder=None)


def test_nothing_heavy_is_imported() -> None:
    source = "import sys, ldm.request; ldm.request.Request(prompt='a'); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert "ldm.request" in modules
    assert not set(modules) & {"torch", "numpy", "PIL", "omegaconf", "yaml", "transformers"}
