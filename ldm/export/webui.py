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

import numpy as np

from ldm.conditioning.stages import stage_of
from ldm.models.diffusion.schedule import make_betas

TIMESTEPS = 1000
# One call of the U-Net for each step, at timesteps that are even unless the name ends in `karras`.
SINGLE_CALL = ("euler", "euler a", "lms", "dpm++ 2m", "dpm++ 2m sde")
SAMPLERS = ("ddim", "plms", *SINGLE_CALL, *(f"{name} karras" for name in SINGLE_CALL))


def call_timesteps(sampler: str, steps: int) -> list[float] | None:
    """The timestep of every call of the U-Net, START of generation first; None for a sampler that is not known.

    A step more than the web UI makes may be at the end (since 1.6 its DDIM and PLMS leave out the last).

    Args:
        sampler: as the web UI names it, with the schedule behind it: 'ddim', 'Euler a', 'DPM++ 2M Karras'.

    Raises:
        ValueError: `steps` is not in 1..1000.
    """
    if not 1 <= steps <= TIMESTEPS:
        raise ValueError(f"The number of steps must be in 1..{TIMESTEPS}, not {steps}.")
    sampler = " ".join(sampler.lower().split())
    if sampler in ("ddim", "plms"):
        spaced = [float(min(t + 1, TIMESTEPS - 1)) for t in range(0, TIMESTEPS, TIMESTEPS // steps)][::-1]
        # PLMS begins with a look at the second timestep
        return spaced[:1] + spaced[1:2] + spaced[1:] if sampler == "plms" else spaced
    if sampler not in SAMPLERS:
        return None
    ramp = np.linspace(0, 1, steps)
    if not sampler.endswith(" karras"):
        return ((TIMESTEPS - 1) * (1 - ramp)).tolist()
    alphas_cumprod = np.cumprod(1 - make_betas(0.00085, 0.0120, TIMESTEPS))
    sigmas = np.sqrt(1 / alphas_cumprod - 1)
    least, most = sigmas[0] ** (1 / 7), sigmas[-1] ** (1 / 7)  # Karras et al. 2022, eq. 5 with rho = 7
    return np.interp(7 * np.log(most + ramp * (least - most)), np.log(sigmas), np.arange(TIMESTEPS)).tolist()


def schedule_type(sampler: str) -> str | None:
    """What the web UI calls the spacing of a sampler's timesteps; None where it has no choice, or is not known."""
    name = " ".join(sampler.lower().split())
    if name not in SAMPLERS or name in ("ddim", "plms"):
        return None
    return "Karras" if name.endswith(" karras") else "Uniform"


def prompt_editing(
    texts: Sequence[str], sampler: str, steps: int, documented: bool = False, calls: int | None = None
) -> tuple[str, list[str]]:
    """One prompt that is `texts[stage]` at every call of the U-Net, and what keeps it from being that exactly.

    Args:
        texts: one for each stage, entry 0 = END of generation, escaped (`escape`).
        documented: count as the documentation says, "after `when` steps", and not as the program does.
        calls: of a picture that is edited, how many of the steps are made: the last ones, counted from 0 again.

    Returns:
        The prompt, and warnings, each a sentence; without any the prompt is exact.
    """
    warnings = []
    timesteps = call_timesteps(sampler, steps)
    if timesteps is None:
        timesteps = call_timesteps("euler", steps)
        warnings.append(
            f"The timesteps of '{sampler}' are not known, so the stages change only about where they should; "
            f"exact are {', '.join(SAMPLERS)}, and ComfyUI with any sampler."
        )
    if calls:
        timesteps, steps = timesteps[-calls:], calls
    runs: list[list] = []  # [text, number of the last call that reads it]
    for call, t in enumerate(timesteps):
        text = texts[stage_of(int(t), len(texts), TIMESTEPS)]
        if runs and runs[-1][0] == text:
            runs[-1][1] = call
        else:
            runs.append([text, call])
    if len(runs) > 1 and runs[0][1] == 0 and not documented:
        warnings.append(
            f"With {steps} steps the first text is for one step only, which the web UI cannot do: it begins with the "
            "second text, or shows the first one for two steps; use more steps."
        )
    if len(timesteps) - 1 > steps and not documented and len(runs) > 1:
        warnings.append(
            f"With {steps} steps of {sampler} the web UI calls the U-Net {len(timesteps)} times, and after call "
            f"{steps + 1} it reads the first text again; use a number of steps that divides {TIMESTEPS}."
        )
    if any("#" in text for text in texts):
        warnings.append("The web UI takes what follows a # for a comment, unless that is switched off in its settings.")
    words = [text.split() for text, _ in runs]
    head = len(os.path.commonprefix(words))
    tail = len(os.path.commonprefix([rest[head:][::-1] for rest in words]))
    middles = [" ".join(text[head : len(text) - tail]) for text in words]
    nested = middles[0]
    for (_, last), text in zip(runs, middles[1:], strict=False):
        when = last + 1 if documented else max(last, 1)
        nested = f"[{nested}:{text}:{when}]" if nested else f"[{text}:{when}]"
    around = " ".join(words[0][:head]), " ".join(words[0][len(words[0]) - tail :])
    return " ".join(part for part in (around[0], nested, around[1]) if part), warnings


def escape(word: str) -> str:
    """A word of a prompt with what the web UI gives a meaning to taken as it is; AND and BREAK in small letters."""
    word = re.sub(r"\b(AND|BREAK)\b", lambda match: match[0].lower(), word)
    return re.sub(r"([\\()\[\]:|])", r"\\\1", word)
