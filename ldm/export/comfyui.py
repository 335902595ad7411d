"""ComfyUI: stages as timestep ranges, in a workflow of its API format, which the program opens like any other.

`ConditioningSetTimestepRange` maps a percentage p to the noise level of timestep (1 - p)·999, and a text is used
between the levels of its end and of its start. The U-Net gets the nearest whole timestep. So ranges that meet
half a timestep below a stage's first one are exact for every sampler, schedule and number of steps.

Sources: comfy/model_sampling.py (`percent_to_sigma`, `timestep`), comfy/samplers.py, nodes.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

TIMESTEPS = 1000
SAMPLERS = {"ddim": "ddim", "plms": "ddim", "euler": "euler", "euler a": "euler_ancestral", "lms": "lms"}
SAMPLERS |= {"dpm++ 2m": "dpmpp_2m", "dpm++ 2m sde": "dpmpp_2m_sde"}


def stage_range(stage: int, num_stages: int, last: int | None = None) -> tuple[float, float]:
    """(start, end) of `ConditioningSetTimestepRange` for a stage, or for the stages from `stage` to `last`."""
    last = stage if last is None else last

    def percent(s: int) -> float:
        """Where stage s begins, seen from the END of generation."""
        first = -(-s * TIMESTEPS // num_stages)  # its lowest timestep
        return round(1 - (first - 0.5) / (TIMESTEPS - 1), 7)

    start = 0.0 if last == num_stages - 1 else percent(last + 1)
    return start, 1.0 if stage == 0 else percent(stage)


def knows(sampler: str) -> bool:
    """Whether a sampler, as the web UI names it, has a name in ComfyUI here."""
    return " ".join(sampler.lower().split()).partition(" karras")[0] in SAMPLERS


def workflow(
    texts: Sequence[str],
    checkpoint: str,
    *,
    sampler: str = "ddim",
    steps: int = 50,
    scale: float = 10.0,
    seed: int = 42,
    width: int = 512,
    height: int = 512,
    prefix: str = "prospect",
    negative: str = "",
) -> dict[str, Any]:
    """A workflow that reads `texts[stage]` in each stage; entry 0 is the END of generation.

    Args:
        texts: escaped (`escape`), learned tokens as `spell` writes them.
        checkpoint: file in ComfyUI's models/checkpoints.
        sampler: as the web UI names it; one that is not known becomes ddim.
        prefix: of the picture's file name.
        negative: what guidance leads away from, in all stages; escaped.
    """
    name, karras, _ = " ".join(sampler.lower().split()).partition(" karras")
    schedule = "karras" if karras else "normal" if name in SAMPLERS and SAMPLERS[name] != "ddim" else "ddim_uniform"
    nodes: dict[str, Any] = {}

    def add(class_type: str, **inputs: Any) -> str:
        nodes[str(len(nodes) + 1)] = {"class_type": class_type, "inputs": inputs}
        return str(len(nodes))

    model = add("CheckpointLoaderSimple", ckpt_name=checkpoint)
    negative = add("CLIPTextEncode", text=negative, clip=[model, 1])
    latent = add("EmptyLatentImage", width=width, height=height, batch_size=1)
    positive = None
    stage = len(texts) - 1
    while stage >= 0:  # neighbours with one text share a range
        first = stage
        while first > 0 and texts[first - 1] == texts[stage]:
            first -= 1
        part = add("CLIPTextEncode", text=texts[stage], clip=[model, 1])
        start, end = stage_range(first, len(texts), stage)
        part = add("ConditioningSetTimestepRange", conditioning=[part, 0], start=start, end=end)
        if positive is not None:
            part = add("ConditioningCombine", conditioning_1=[positive, 0], conditioning_2=[part, 0])
        positive, stage = part, first - 1
    sampled = add(
        "KSampler",
        model=[model, 0],
        positive=[positive, 0],
        negative=[negative, 0],
        latent_image=[latent, 0],
        seed=seed,
        steps=steps,
        cfg=scale,
        sampler_name=SAMPLERS.get(name, "ddim"),
        scheduler=schedule,
        denoise=1.0,
    )
    picture = add("VAEDecode", samples=[sampled, 0], vae=[model, 2])
    add("SaveImage", images=[picture, 0], filename_prefix=prefix)
    return nodes


def spell(token: str) -> str:
    return f"embedding:{token}"


def escape(word: str) -> str:
    """A word of a prompt with brackets that are no weights."""
    return re.sub(r"([()])", r"\\\1", word)
