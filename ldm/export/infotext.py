"""How a picture was made, as AUTOMATIC1111's web UI writes it into PNG files and as most other tools read it."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.embeddings import Concept, load_concept
from ldm.export.texts import escaped, stage_texts
from ldm.export.webui import escape, prompt_editing
from ldm.files.embedding_formats import short_hash
from ldm.request import edit_steps

NEEDED = {"prompt", "sampler", "ddim_steps", "scale", "seed", "width", "height"}
_QUOTED = re.compile(r"[,:\n\"]")


def infotext(record: Mapping[str, Any]) -> str:
    """The text of the chunk `parameters`: the prompt, the negative prompt, and a line of settings.

    The prompt is the one that gives the picture there, after the concepts were exported under the names of their
    files (`scripts/export_embedding.py --to a1111`); what was asked for here stands among the settings.

    Args:
        record: what `ldm.generate.main` attaches to a picture; at least what is in `NEEDED`.
    """
    words, sources = record.get("prospect_words"), record.get("concepts") or {}
    concepts = {placeholder: _concept(file) for placeholder, file in sources.items()}
    stages = record.get("num_stages") or max((c.num_stages for c in concepts.values() if c is not None), default=10)
    stages = stages if words is None else len(words)
    rows = {p: list(range(stages)) if c is None else c.rows_for(stages) for p, c in concepts.items()}
    names = {placeholder: _name(file, number) for number, (placeholder, file) in enumerate(sources.items())}
    texts = stage_texts(record["prompt"], words, stages, names, rows, escape=escape)
    steps = record["ddim_steps"]
    calls = edit_steps(record["strength"], steps) if record.get("content_dir") is not None else None
    prompt, _ = prompt_editing(texts, record["sampler"], steps, calls=calls)

    hashes = {p: found for p, file in sources.items() if (found := short_hash(file))}
    hashes |= record.get("concept_hashes") or {}
    settings = {
        "Steps": record["ddim_steps"],
        "Sampler": record["sampler"].upper(),
        "CFG scale": f"{record['scale']:g}",
        "Seed": record["seed"],
        "Size": f"{record['width']}x{record['height']}",
        "Model": Path(record.get("base_model") or "unknown").stem,
        "Denoising strength": f"{record['strength']:g}" if record.get("content_dir") is not None else None,
        "Eta DDIM": f"{record['ddim_eta']:g}" if record.get("ddim_eta") else None,
        "ProSpect prompt": record["prompt"],
        "ProSpect words": None if words is None else json.dumps(words, ensure_ascii=False),
        "ProSpect concepts": ", ".join(f"{names[p]}: {hashes.get(p, 'unknown')}" for p in sources) or None,
    }
    line = ", ".join(f"{key}: {_quote(str(value))}" for key, value in settings.items() if value is not None)
    return f"{prompt}\nNegative prompt: {escaped(record.get('negative_prompt', ''), escape)}\n{line}"


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if _QUOTED.search(text) or text != text.strip() else text


def _concept(file: str) -> Concept | None:
    """The concept, if its file is still there."""
    with contextlib.suppress(ValueError, OSError):
        return load_concept(file)
    return None


def _name(file: str, number: int) -> str:
    """What the concept of a file would be called: the file, or for a run's `embeddings` the run."""
    path = Path(file)
    stem = path.parent.parent.name if path.stem == "embeddings" and path.parent.name == "checkpoints" else path.stem
    name = re.sub(r"[^A-Za-z0-9]+", "-", stem).strip("-") or "concept"
    return name if number == 0 else f"{name}-{chr(ord('a') + number % 26)}"
