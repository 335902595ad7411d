"""ComfyUI: stages as timestep ranges, in a workflow of its API format, which the program opens like any other.

`ConditioningSetTimestepRange` maps a percentage p to the noise level of timestep (1 - p)·999, and a text is used
between the levels of its end and of its start. The U-Net gets the nearest whole timestep. So ranges that meet
half a timestep below a stage's first one are exact for every sampler, schedule and number of steps.

Sources: comfy/model_sampling.py (`percent_to_sigma`, `timestep`), comfy/samplers.py, comfy/sd1_clip.py, nodes.py;
ComfyUI_frontend, src/utils/formatUtil.ts (`processDynamicPrompt`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from ldm.conditioning.stages import timesteps_of
from ldm.export.webui import TIMESTEPS, split_name

# By their names in the web UI.
SAMPLERS = {
    "ddim": "ddim",
    "plms": "ddim",
    "euler": "euler",
    "euler a": "euler_ancestral",
    "lms": "lms",
    "dpm++ 2m": "dpmpp_2m",
    "dpm++ 2m sde": "dpmpp_2m_sde",
}


def stage_range(first: int, last: int, num_stages: int) -> tuple[float, float]:
    """(start, end) of `ConditioningSetTimestepRange` for the stages from `first` to `last`."""

    def percent(stage: int) -> float:
        """Where a stage begins, seen from the end of sampling."""
        timestep = timesteps_of(stage, num_stages, TIMESTEPS)[0]
        return round(1 - (timestep - 0.5) / (TIMESTEPS - 1), 7)

    return 0.0 if last == num_stages - 1 else percent(last + 1), 1.0 if first == 0 else percent(first)


def sampling(sampler: str = "ddim", steps: int = 50, scale: float = 10.0, seed: int = 42) -> dict[str, Any]:
    """Inputs of a KSampler node; `sampler` is named as in the web UI, and an unknown one becomes ddim."""
    name, ending = split_name(sampler)
    own = SAMPLERS.get(name, "ddim")
    schedule = ending.strip().replace(" ", "_") or ("ddim_uniform" if own == "ddim" else "normal")
    return {"seed": seed, "steps": steps, "cfg": scale, "sampler_name": own, "scheduler": schedule, "denoise": 1.0}


def workflow(
    texts: Sequence[str],
    checkpoint: str,
    sampler: Mapping[str, Any],
    width: int = 512,
    height: int = 512,
    prefix: str = "prospect",
    negative: str = "",
) -> dict[str, Any]:
    """Return a workflow that reads `texts[stage]` in each stage; entry 0 is the end of sampling.

    Args:
        texts: escaped (`escape`), learned tokens as `spell` writes them.
        checkpoint: file in ComfyUI's models/checkpoints.
        sampler: from `sampling`.
        prefix: of the image's file name.
        negative: what guidance leads away from, in all stages; escaped.
    """
    nodes: dict[str, Any] = {}

    def add(class_type: str, **inputs: Any) -> str:
        nodes[str(len(nodes) + 1)] = {"class_type": class_type, "inputs": inputs}
        return str(len(nodes))

    model = add("CheckpointLoaderSimple", ckpt_name=checkpoint)
    uncond = add("CLIPTextEncode", text=negative, clip=[model, 1])
    latent = add("EmptyLatentImage", width=width, height=height, batch_size=1)
    positive = ""
    for first, last in _ranges(texts):
        part = add("CLIPTextEncode", text=texts[first], clip=[model, 1])
        start, end = stage_range(first, last, len(texts))
        part = add("ConditioningSetTimestepRange", conditioning=[part, 0], start=start, end=end)
        if positive:
            part = add("ConditioningCombine", conditioning_1=[positive, 0], conditioning_2=[part, 0])
        positive = part
    inputs = {"positive": [positive, 0], "negative": [uncond, 0], "latent_image": [latent, 0]}
    sampled = add("KSampler", model=[model, 0], **inputs, **sampler)
    image = add("VAEDecode", samples=[sampled, 0], vae=[model, 2])
    add("SaveImage", images=[image, 0], filename_prefix=prefix)
    return nodes


def _ranges(texts: Sequence[str]) -> list[tuple[int, int]]:
    """(first, last) stage of each run of neighbours with one text, start of sampling first."""
    runs = [[stage for stage, _ in run] for _, run in groupby(enumerate(texts), key=lambda entry: entry[1])]
    return [(stages[0], stages[-1]) for stages in reversed(runs)]


def spell(token: str) -> str:
    """A learned token as ComfyUI names the file of an embedding."""
    return f"embedding:{token}"


def escape(word: str) -> str:
    """A word of a prompt with round brackets that are no weights and curly ones that are no choice.

    The backslashes before curly brackets are for ComfyUI's page, which opens the workflow. A space is put where none
    can help: into a double slash, which begins a comment there, and behind a backslash that would escape more.
    """
    return re.sub(r"([(){}])", r"\\\1", re.sub(r"(?<=/)(?=/)|(?<=\\)(?=[{}]|$)", " ", word))


_MISREAD = {
    "//": "ComfyUI takes what follows // for a comment, so that it is written as / / in the workflow.",
    "[{}]": "ComfyUI's page takes {a|b} for a choice, so that { and } have a backslash in the workflow; where it is "
    "sent to the program without the page, the backslash is read, too.",
    "^embedding:": "ComfyUI takes a word that begins with embedding: for the name of an embedding, and omits it.",
}


def misread(texts: Iterable[Iterable[str]]) -> list[str]:
    """Warnings, each a sentence, of words that ComfyUI reads in another way, however they are written."""
    words = {word for text in texts for word in text}
    return [warning for pattern, warning in _MISREAD.items() if any(re.search(pattern, word) for word in words)]
