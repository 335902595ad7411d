"""Odd and wrong prompts and words, given to the functions: what is refused, what works, and what is warned of."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from bad_files import CONFIG, MODEL, ROOT

from ldm.embeddings import Concept
from ldm.generate import load_model_from_config, main, read_parameters, save_picture
from ldm.models.diffusion.ddpm import LatentDiffusion

TEN = ["a star"] * 10


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        model = load_model_from_config(CONFIG, MODEL, device="cpu")
        model.cond_stage_model.tokenizer  # noqa: B018, opened while its folder is found
    model.embedding_manager.load(Concept(torch.randn(10, 128, generator=torch.Generator().manual_seed(0))))
    return model


REFUSED: list[tuple[dict[str, object], str]] = [
    ({"prompt": None}, "A prompt must be a text, not a NoneType."),
    ({"prompt": b"a star"}, "A prompt must be a text, not a bytes."),
    ({"prompt": 7}, "A prompt must be a text, not a int."),
    ({"prompt": 1.5}, "A prompt must be a text, not a float."),
    ({"prompt": ["a star"]}, "A prompt must be a text, not a list."),
    ({"prompt": "a \udce4 star"}, "has bytes that are no text"),
    ({"prospect_words": []}, "has 0 entries, but this model has 10 stages"),
    ({"prospect_words": TEN[1:]}, "has 9 entries, but this model has 10 stages"),
    ({"prospect_words": [*TEN, "x"]}, "has 11 entries, but this model has 10 stages"),
    ({"prospect_words": "a star"}, "must be a list of 10 entries, not a str"),
    ({"prospect_words": b"0123456789"}, "must be a list of 10 entries, not a bytes"),
    ({"prospect_words": dict.fromkeys(range(10), "a")}, "must be a list of 10 entries, not a dict"),
    ({"prospect_words": {"a", "b"}}, "must be a list of 10 entries, not a set"),
    ({"prospect_words": [10, *TEN[1:]]}, "prospect_words[0] = 10: a stage number must be in 0..9"),
    ({"prospect_words": [*TEN[1:], -1]}, "prospect_words[9] = -1: a stage number must be in 0..9"),
    ({"prospect_words": [10**30, *TEN[1:]]}, "a stage number must be in 0..9"),
    ({"prospect_words": [True, *TEN[1:]]}, "prospect_words[0] is a bool; an entry is a text, a stage number, or None"),
    ({"prospect_words": [0.0, *TEN[1:]]}, "prospect_words[0] is a float"),
    ({"prospect_words": [b"a", *TEN[1:]]}, "prospect_words[0] is a bytes"),
    ({"prospect_words": [["a"], *TEN[1:]]}, "prospect_words[0] is a list"),
    ({"prospect_words": ["\ud800", *TEN[1:]]}, "prospect_words[0] has bytes that are no text"),
    ({"ddim_steps": True}, "ddim_steps must be a whole number, not True"),
    ({"strength": False}, "strength must be a number, not False"),
    ({"scale": "7"}, "scale must be a number, not '7'"),
    ({"scale": float("nan")}, "scale must be in 0..1000, not nan"),
    ({"scale": 1e30}, "scale must be in 0..1000, not 1e+30"),
    ({"seed": 1.0}, "seed must be a whole number, not 1.0"),
    ({"seed": 2**63 - 1, "n_samples": 2}, "seed must be in 0.."),
    ({"height": 100_000, "width": 1_600_000}, "of memory, and"),
    ({"height": "64"}, "height must be a whole number, not '64'"),
    ({"concepts": {"*": 3}}, "a file's path"),
    ({"concepts": {"": "a.safetensors"}}, "A placeholder must be a visible text such as '*', not ''."),
    ({"concepts": {3: "a.safetensors"}}, "A placeholder must be a visible text such as '*', not 3."),
    ({"concepts": {"<*>": "a.safetensors"}}, "The placeholder '<*>' must not contain '*'"),
    ({"content_dir": 5}, "'5' cannot be read"),
]


def small(model: LatentDiffusion, **arguments: object):
    usual = {"model": model, "height": 32, "width": 32, "ddim_steps": 1, "progress": False, "prompt": "*"}
    return main(**(usual | arguments))


@pytest.mark.parametrize(("arguments", "sentence"), REFUSED)
def test_refused(model: LatentDiffusion, arguments: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        small(model, **arguments)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


TAKEN: dict[str, tuple[str, list | None, str]] = {
    # prompt, words, part of the warning ('' for none)
    "empty": ("", None, ""),
    "only spaces": ("  \t \n ", None, ""),
    "emoji": ("a 🌟 star 👩‍👩‍👧", None, ""),
    "right to left": ("نجمة \u202eabc\u202c של", None, ""),
    "control characters": ("a\x00\x07\x1b[31m star\x7f\u200b", None, ""),
    "other planes": ("\U0001f600\U00020000\ufeff\uffff", None, ""),
    "very long": ("star " * 500, None, "longer than 30 tokens; cut off"),
    "one word of 100,000 letters": ("a" * 100_000, None, "longer than 30 tokens"),
    "a thousand stars": ("*" * 1000, None, "longer than 30 tokens"),
    "no placeholder": ("a star", TEN, "prospect_words has no effect: the prompt 'a star' has no '*'"),
    "unknown placeholder": ("a <vase> star", None, ""),
    "empty words": ("*", [""] * 10, ""),
    "None": ("*", [None] * 10, ""),
    "numpy's numbers": ("*", list(np.arange(10)), ""),
    "a tuple": ("*", tuple(range(10)), ""),
}


@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize("legacy", [False, True])
def test_taken(
    name: str, legacy: bool, model: LatentDiffusion, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It gives a picture, and the record in the picture gives the same prompt back."""
    prompt, words, warning = TAKEN[name]
    with caplog.at_level(logging.WARNING):
        picture = small(model, prompt=prompt, prospect_words=words, legacy_word_tokens=legacy)
    assert np.asarray(picture).std() > 0
    if warning and not legacy:  # the reference cuts without a word
        assert sum(warning in message for message in caplog.messages) == 1
    elif not warning:
        assert caplog.messages == []
    save_picture(picture, tmp_path / "a.png")
    assert read_parameters(tmp_path / "a.png")["prompt"] == prompt


def test_an_unlearned_placeholder_is_said(model: LatentDiffusion, caplog: pytest.LogCaptureFixture) -> None:
    loaded = dict(model.embedding_manager.loaded)
    model.embedding_manager.loaded.clear()
    small(model)
    model.embedding_manager.loaded.update(loaded)
    assert caplog.messages == ["Nothing is learned or loaded for '*', so it is read as an ordinary character."]
