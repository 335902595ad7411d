"""A concept as a repository of the Hugging Face hub: the whole, its stages for other programs, and a model card."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from ldm.embeddings import Concept, save_concept
from ldm.export.card import Card, model_card
from ldm.export.files import Export
from ldm.files.embedding_formats import WHOLE
from ldm.files.writing import replacing_set


def write_repository(concept: Concept, name: str, folder: Path, card: Card) -> list[Path]:
    """Write the files of a repository called `name` into a folder; returns them.

    Raises:
        ValueError: the card cannot be written.
        WriteError: no room or no right.
    """
    token = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-") or "concept"
    placeholder = concept.metadata.get("placeholder", "*")
    uses = [WHOLE]
    with replacing_set(folder) as staging:
        if concept.has_table:
            Export({"*": (token, concept)}).write(["diffusers"], staging)
            uses.append(f"{token}_diffusers.py")
        save_concept(concept, staging / WHOLE, placeholder)
        text = model_card({placeholder: (token, concept)}, uses, card)
        (staging / "README.md").write_text(text, encoding="utf-8")
        for image in card.images:
            shutil.copyfile(image, staging / image.name)
    return sorted(path for path in folder.rglob("*") if path.is_file())
