"""AUTOMATIC1111's web UI (and its forks): stages as prompt editing, `[from:to:when]`.

The program knows nothing of timesteps: `when` counts calls of the U-Net. So the text is made for one sampler and one
number of steps. In every version since 2022 call i (from 0) reads the first text with i ≤ `when`: a text lasts
one call longer than the documentation's "after `when` steps" says (stable-diffusion-webui, issue 7279).

Sources: modules/prompt_parser.py (grammar, `reconstruct_cond_batch`), sd_samplers_cfg_denoiser.py (`step`),
sd_samplers_timesteps.py and k-diffusion (timesteps).
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Sequence
from itertools import groupby

import numpy as np

from ldm.conditioning.stages import stage_of
from ldm.request import SAMPLERS as OWN_SPACING

TIMESTEPS = 1000
# One call of the U-Net for each step, at timesteps that are even down to 0 unless the name ends in another schedule.
SINGLE_CALL = ("euler", "euler a", "lms", "dpm++ 2m", "dpm++ 2m sde")
SCHEDULES = {" karras": "Karras", " sgm uniform": "SGM Uniform", "": "Uniform"}
SAMPLERS = ("ddim", "plms", *(f"{name}{ending}" for ending in SCHEDULES for name in SINGLE_CALL))
# Ours with trailing timesteps, which `SGM Uniform` are up to the rounding; a step of Euler is one of DDIM.
TRAILING = {"ddim": "Euler SGM Uniform", "dpmpp_2m": "DPM++ 2M SGM Uniform"}


def name_of(sampler: str, spacing: str | None = None) -> str:
    """Return what the web UI calls a sampler of ours with a spacing of ours; other names as they are."""
    if (spacing or OWN_SPACING.get(sampler)) == "trailing":
        return TRAILING.get(sampler, sampler)
    return "DPM++ 2M" if sampler == "dpmpp_2m" else sampler


def split_name(sampler: str) -> tuple[str, str]:
    """Return a sampler's name in small letters and with single spaces, and the schedule that it ends in (or '')."""
    plain = " ".join(sampler.lower().split())
    ending = next(ending for ending in SCHEDULES if plain.endswith(ending))
    return plain.removesuffix(ending), ending


def schedule_type(sampler: str) -> str | None:
    """Return what the web UI calls the spacing of a sampler's timesteps; None where it has no choice."""
    name, ending = split_name(sampler)
    return SCHEDULES[ending] if name in SINGLE_CALL else None


def call_timesteps(sampler: str, steps: int) -> list[float] | None:
    """Return the timestep of every call of the U-Net, start of sampling first; None for an unknown sampler.

    The last one may be a step more than the web UI makes (since 1.6 its DDIM and PLMS omit it).

    Args:
        sampler: as the web UI names it, with the schedule behind it: 'ddim', 'Euler a', 'DPM++ 2M Karras'.

    Raises:
        ValueError: `steps` is not in 1..1000.
    """
    if not 1 <= steps <= TIMESTEPS:
        raise ValueError(f"The number of steps must be in 1..{TIMESTEPS}, not {steps}.")
    name, ending = split_name(sampler)
    if name in ("ddim", "plms") and not ending:
        spaced = [float(min(t + 1, TIMESTEPS - 1)) for t in range(0, TIMESTEPS, TIMESTEPS // steps)][::-1]
        # PLMS begins with a look at the second timestep
        return spaced[:1] + spaced[1:2] + spaced[1:] if name == "plms" else spaced
    if name not in SINGLE_CALL:
        return None
    if ending == " sgm uniform":
        return _even(steps + 1)[:-1]
    return _karras(steps) if ending == " karras" else _even(steps)


def _even(steps: int) -> list[float]:
    return ((TIMESTEPS - 1) * (1 - np.linspace(0, 1, steps))).tolist()


def _karras(steps: int) -> list[float]:
    """Noise levels of Karras et al. 2022, eq. 5 with rho = 7, as timesteps of Stable Diffusion's schedule."""
    betas = np.linspace(0.00085**0.5, 0.0120**0.5, TIMESTEPS) ** 2
    sigmas = np.sqrt(1 / np.cumprod(1 - betas) - 1)
    least, most = sigmas[0] ** (1 / 7), sigmas[-1] ** (1 / 7)
    levels = 7 * np.log(most + np.linspace(0, 1, steps) * (least - most))
    return np.interp(levels, np.log(sigmas), np.arange(TIMESTEPS)).tolist()


def other_images(texts: Sequence[str], sampler: str, steps: int) -> list[str]:
    """Warnings, each a sentence, of samplers that treat stages badly; none where all have one text."""
    (name, ending), warnings = split_name(sampler), []
    timesteps = call_timesteps(sampler, steps)
    if len(set(texts)) == 1 or timesteps is None:
        return []
    if ending == " karras":
        stages = [stage_of(int(t), len(texts), TIMESTEPS) for t in timesteps]
        counts = ", ".join(str(stages.count(stage)) for stage in reversed(range(len(texts))))
        warnings.append(
            f"Karras spacing gives the stages {counts} calls, the start of sampling first, so that the middle ones, "
            f"where content and material are, have few; use '{name} sgm uniform'."
        )
    if name.startswith("dpm++ 2m"):
        warnings.append(
            "DPM++ 2M mixes the predictions for two prompts where the stage changes, except here and in the script for "
            "diffusers, so that the image is another in other programs."
        )
    return warnings


def prompt_editing(
    texts: Sequence[str], sampler: str, steps: int, documented: bool = False, calls: int | None = None
) -> tuple[str, list[str]]:
    """Return one prompt that is `texts[stage]` at every call of the U-Net, and what keeps it from being exact.

    Args:
        texts: one for each stage, entry 0 = end of sampling, escaped (`escape`).
        documented: count as the documentation says, "after `when` steps", and not as the program does.
        calls: of an image that is edited, how many of the steps are made: the last ones, counted from 0 again.

    Returns:
        The prompt, and warnings, each a sentence; without any the prompt is exact.
    """
    warnings: list[str] = []
    timesteps = call_timesteps(sampler, steps)
    if timesteps is None:
        timesteps = _even(steps)
        warnings.append(
            f"The timesteps of '{sampler}' are not known, so the stages change only about where they should; "
            f"exact are {', '.join(SAMPLERS)}, and ComfyUI with any sampler."
        )
    if calls:
        timesteps, steps = timesteps[-calls:], calls
    runs = _runs(texts, timesteps)
    if len(runs) > 1 and not documented:
        warnings += _miscounted(runs[0][1], len(timesteps), sampler, steps)
    if any("#" in text for text in texts):
        warnings.append("The web UI takes what follows a # for a comment, unless that is switched off in its settings.")
    return _nested(runs, documented), warnings


def _runs(texts: Sequence[str], timesteps: Sequence[float]) -> list[tuple[str, int]]:
    """(text, number of the last call that reads it) in order."""
    read = (texts[stage_of(int(t), len(texts), TIMESTEPS)] for t in timesteps)
    return [(text, list(run)[-1][0]) for text, run in groupby(enumerate(read), key=lambda call: call[1])]


def _miscounted(first_last: int, calls: int, sampler: str, steps: int) -> list[str]:
    """Warnings of texts that the web UI cannot read when it should; the first is meant up to call `first_last`."""
    warnings = []
    if first_last == 0:
        warnings.append(
            f"With {steps} steps the first text is for one step only, which the web UI cannot do: it begins with the "
            "second text, or shows the first one for two steps; use more steps."
        )
    if calls - 1 > steps:
        warnings.append(
            f"With {steps} steps of {sampler} the web UI calls the U-Net {calls} times, and after call "
            f"{steps + 1} it reads the first text again; use a number of steps that divides {TIMESTEPS}."
        )
    return warnings


def _nested(runs: Sequence[tuple[str, int]], documented: bool) -> str:
    """`[[first:second:when]:third:when]` between the words that all texts begin and end with."""
    words = [text.split() for text, _ in runs]
    head = len(os.path.commonprefix(words))
    tail = len(os.path.commonprefix([rest[head:][::-1] for rest in words]))
    nested, *later = (" ".join(text[head : len(text) - tail]) for text in words)
    for (_, last), text in zip(runs, later, strict=False):
        when = last + 1 if documented else max(last, 1)
        nested = f"[{nested}:{text}:{when}]" if nested else f"[{text}:{when}]"
    around = " ".join(words[0][:head]), " ".join(words[0][len(words[0]) - tail :])
    return " ".join(part for part in (around[0], nested, around[1]) if part)


def escape(word: str) -> str:
    """A word of a prompt with what the web UI gives a meaning to taken as it is; AND and BREAK in small letters."""
    word = re.sub(r"\b(AND|BREAK)\b", lambda match: match[0].lower(), word)
    return re.sub(r"([\\()\[\]:|])", r"\\\1", word)
