"""How an image was made, as AUTOMATIC1111's web UI writes it into PNG files and as most other tools read it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.conditioning.stages import matching_stage
from ldm.export.texts import name_like, stage_words, written
from ldm.export.webui import escape, name_of, prompt_editing, schedule_type, split_name

NEEDED = {"prompt", "sampler", "ddim_steps", "scale", "seed", "width", "height"}
_QUOTED = re.compile(r"[,:\n\"]")


def infotext(record: Mapping[str, Any]) -> str:
    """The text of the chunk `parameters`: the prompt, the negative prompt, and a line of settings.

    The prompt is the one that gives the image there, after the concepts were exported under the names of their
    files (`scripts/export_embedding.py --to a1111`), without words that were cut off here and would be read there.
    What was asked for stands among the settings.

    Args:
        record: what `ldm.generate.main` attaches to an image; at least what is in `NEEDED`.
    """
    sources = record.get("concepts") or {}
    names = {placeholder: _name(file, number) for number, (placeholder, file) in enumerate(sources.items())}
    edited = record.get("content_dir") is not None
    # of an edited image the web UI makes this many of the steps (sd_samplers_common.py, `setup_img2img_steps`)
    calls = int(min(record["strength"], 0.999) * record["ddim_steps"]) if edited else None
    sampler = name_of(record["sampler"], record.get("spacing"))
    _, ending = split_name(sampler)
    prompt, _ = prompt_editing(_texts(record, names), sampler, record["ddim_steps"], calls=calls)
    room = (record.get("words_read") or {}).get("negative_prompt")
    negative = written(record.get("negative_prompt", "").split()[:room], escape)

    scales = record["scale"] if isinstance(record["scale"], list) else [record["scale"]]
    words, hashes = record.get("prospect_words"), record.get("concept_hashes") or {}
    layers = record.get("layer_words")
    settings = {
        "Steps": record["ddim_steps"],
        "Sampler": sampler[: len(sampler) - len(ending)] if schedule_type(sampler) else sampler.upper(),
        "Schedule type": schedule_type(sampler),
        "CFG scale": f"{max(scales):g}",
        "Seed": record["seed"],
        "Size": f"{record['width']}x{record['height']}",
        "Model": Path(record.get("base_model") or "unknown").stem,
        "Denoising strength": f"{record['strength']:g}" if edited else None,
        "Eta DDIM": f"{record['ddim_eta']:g}" if record.get("ddim_eta") else None,
        "ProSpect prompt": record["prompt"],
        "ProSpect scale": json.dumps(scales) if len(scales) > 1 else None,
        "ProSpect rescale": f"{record['rescale']:g}" if record.get("rescale") else None,
        "ProSpect truncation": record.get("truncation"),
        "ProSpect layer words": json.dumps(layers, ensure_ascii=False) if layers else None,
        "ProSpect words": None if words is None else json.dumps(words, ensure_ascii=False),
        "ProSpect concepts": ", ".join(f"{names[p]}: {hashes.get(p, 'unknown')}" for p in sources) or None,
    }
    line = ", ".join(f"{key}: {_quote(str(value))}" for key, value in settings.items() if value is not None)
    return f"{prompt}\nNegative prompt: {negative}\n{line}"


def _texts(record: Mapping[str, Any], names: Mapping[str, str]) -> list[str]:
    """What the web UI should read in each stage."""
    words, stages_of = record.get("prospect_words"), record.get("concept_stages") or {}
    stages = len(words) if words is not None else record.get("num_stages") or max(stages_of.values(), default=10)
    rows = {p: [matching_stage(s, stages, stages_of.get(p, stages)) for s in range(stages)] for p in names}
    lines = stage_words(record["prompt"], words, stages, names, rows)
    room = (record.get("words_read") or {}).get("prompt") or [None] * stages
    return [written(line[:count], escape) for line, count in zip(lines, room, strict=True)]


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if _QUOTED.search(text) or text != text.strip() else text


def _name(file: str, number: int) -> str:
    """What the concept of a file would be called: the file, or for a run's `embeddings` the run."""
    path = Path(file)
    stem = path.parent.parent.name if path.stem == "embeddings" and path.parent.name == "checkpoints" else path.stem
    return name_like(stem) + (f"-{chr(ord('a') + number % 26)}" if number else "")
