"""Prompt editing for AUTOMATIC1111's web UI, read by an implementation of its grammar that knows nothing of ours.

The grammar is that of its documentation: `[from:to:when]`, `[to:when]`, `[from::when]`, nested, with backslashes
before characters that are meant as they are. How the text is applied to the calls of the U-Net is its program's.
"""

import functools
import itertools
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, PNDMScheduler

from ldm.export.webui import SAMPLERS, call_timesteps, escape, name_of, other_images, prompt_editing
from ldm.models.diffusion.schedule import ddim_timesteps

Reader = Callable[[str, int, int], str]  # prompt, steps, number of the call -> text
TEXTS = [f"a teddy-{stage} walking" for stage in range(10)]

PART = r"((?:\\.|[^\\\[\]():|])*)"
EDIT = re.compile(rf"(?<!\\)\[{PART}(?::{PART})?:(\d+)\]")


@functools.cache
def at_step(text: str, step: int) -> str:
    """The prompt where the editing has come to `step`, from the inside to the outside."""

    def chosen(found: re.Match) -> str:
        before, after, when = found.groups()
        before, after = ("", before) if after is None else (before, after)
        return before if step <= int(when) else after

    while EDIT.search(text):
        text = EDIT.sub(chosen, text)
    assert re.fullmatch(PART, text), f"an unescaped sign in {text}"
    return text


def words(text: str) -> str:
    """A text without its escapes and with single spaces."""
    return " ".join(re.sub(r"\\(.)", r"\1", text).split())


def program(prompt: str, steps: int, call: int) -> str:
    """What call `call` of the U-Net, counted from 0, reads: the text of the first boundary that is not below it."""
    boundaries = map(int, re.findall(r"(?<!\\):(\d+)\]", prompt))
    ends = sorted({min(when, steps) for when in boundaries if when >= 1} | {steps})
    end = next((end for end in ends if call <= end), ends[0])  # past the last one it begins anew
    return words(at_step(prompt, end))


def documentation(prompt: str, steps: int, call: int) -> str:
    """What step `call + 1` reads where texts change after `when` steps."""
    return words(at_step(prompt, call + 1))


def test_the_grammar_on_the_documentations_examples() -> None:
    """And on those of the program's own tests, with its counting: (last step, text)."""
    assert [program("a [b:3]", 10, i) for i in (3, 4)] == ["a", "a b"]
    assert [program("a[b:[c:d:2]:1]e", 10, i) for i in (0, 1, 2, 3)] == ["abe", "abe", "ace", "ade"]
    assert [documentation("a [fantasy:cyberpunk:16] landscape", 30, i) for i in (15, 16)] == [
        "a fantasy landscape",
        "a cyberpunk landscape",
    ]
    assert [documentation("[from::2] x", 10, i) for i in (1, 2)] == ["from x", "x"]
    assert program(r"\[a\: b\]", 10, 0) == "[a: b]"


@pytest.mark.parametrize(("documented", "reader"), [(False, program), (True, documentation)])
def test_every_number_of_ddim_steps_is_exact_or_warned_of(documented: bool, reader: Reader) -> None:
    every = [(10, steps) for steps in (*range(1, 120), 167, 199, 250, 333, 500, 501, 999, 1000)]
    exact = 0
    for stages, steps in (*every, *itertools.product((1, 3, 7, 20), (20, 25, 50, 100))):
        texts = [f"a t{stage} walking" for stage in range(stages)]
        prompt, warnings = prompt_editing(texts, "DDIM", steps, documented)
        timesteps = [min(t + 1, 999) for t in range(0, 1000, 1000 // steps)][::-1]
        assert 1000 % steps or steps == 1000 or timesteps == ddim_timesteps(steps)[::-1].tolist()
        read = [reader(prompt, steps, call) for call in range(len(timesteps))]
        is_exact = read == [texts[t * stages // 1000] for t in timesteps]
        assert is_exact == (not warnings), (stages, steps)
        exact += is_exact
    assert exact > 60


def test_trailing_timesteps_have_another_name_there() -> None:
    for steps in (10, 20, 30, 50):
        theirs = call_timesteps(name_of("dpmpp_2m"), steps)
        assert np.abs(np.array(theirs) - ddim_timesteps(steps, spacing="trailing")[::-1]).max() < 2
        assert [int(t) // 100 for t in theirs] == [9 - step * 10 // steps for step in range(steps)]
    assert [name_of(name) for name in ("ddim", "plms", "Euler a")] == ["ddim", "plms", "Euler a"]
    assert name_of("dpmpp_2m", "leading") == "DPM++ 2M"


def test_karras_spacing_is_warned_of() -> None:
    karras, mixing = other_images(TEXTS, "DPM++ 2M Karras", 20)
    assert "the stages 3, 2, 2, 1, 1, 1, 1, 1, 2, 6 calls" in karras and "use 'dpm++ 2m sgm uniform'" in karras
    assert mixing.startswith("DPM++ 2M mixes the predictions for two prompts")
    assert other_images(["a"] * 10, "DPM++ 2M Karras", 20) == other_images(TEXTS, "ddim", 20) == []


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [20, 30, 37])
def test_every_known_sampler_is_exact_or_warned_of(sampler: str, steps: int) -> None:
    timesteps = call_timesteps(sampler.upper(), steps)
    prompt, warnings = prompt_editing(TEXTS, sampler, steps)
    read = [program(prompt, steps, call) for call in range(len(timesteps))]
    assert (read == [TEXTS[int(t) // 100] for t in timesteps]) == (not warnings)
    assert bool(warnings) == (sampler == "plms" and steps in (30, 37))


@pytest.mark.parametrize("karras", [False, True])
def test_timesteps_of_the_samplers_are_those_of_diffusers(karras: bool) -> None:
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    theirs = EulerDiscreteScheduler(**schedule, timestep_spacing="linspace", use_karras_sigmas=karras)
    theirs.set_timesteps(23)
    ours = torch.tensor(call_timesteps("Euler a karras" if karras else "Euler a", 23))
    torch.testing.assert_close(ours, theirs.timesteps.float(), rtol=0, atol=0.02)
    theirs = PNDMScheduler(skip_prk_steps=True, steps_offset=1, timestep_spacing="leading")  # with a look ahead
    theirs.set_timesteps(20)
    assert call_timesteps("plms", 20) == theirs.timesteps.tolist()


def test_what_is_not_known_is_warned_of() -> None:
    prompt, warnings = prompt_editing(TEXTS, "DPM adaptive", 20)
    assert "teddy-9" in prompt and len(warnings) == 1
    assert "timesteps of 'DPM adaptive' are not known" in warnings[0]
    assert any("comment" in warning for warning in prompt_editing(["a #1 dad"] * 10, "ddim", 20)[1])


def test_any_texts() -> None:
    for texts in (
        ["same"] * 10,
        [""] * 5 + ["only early"] * 5,
        ["only late"] * 5 + [""] * 5,
        ["a b", "a", "b", "", "b a", "a a", "a a a", "b", "b b", "a b"],
        [f"{k} {k + 1}" for k in range(10)],
    ):
        prompt, _ = prompt_editing(texts, "ddim", 20)
        assert [program(prompt, 20, call) for call in range(20)] == [texts[9 - call // 2] for call in range(20)]


def test_signs_that_mean_something_there_are_taken_as_they_are() -> None:
    text = r"(a) [b]: c|d \e f:1.3 AND BREAK BRAND"
    escaped = " ".join(map(escape, text.split()))
    prompt, _ = prompt_editing([escaped, "x"] * 5, "ddim", 20)
    assert program(prompt, 20, 19) == text.replace("AND BREAK", "and break")
    assert not re.search(r"\b(AND|BREAK)\b", prompt)
