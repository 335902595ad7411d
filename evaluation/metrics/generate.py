"""Images of a concept to be scored."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ldm.conditioning.prompts import class_words
from ldm.embeddings import Concept
from ldm.files.writing import writing_to
from ldm.generate import facts_of, generate_image
from ldm.methods import find_method
from ldm.modules.embedding_manager import is_prefix
from ldm.request import PLACEHOLDER, Request

if TYPE_CHECKING:
    from ldm.models.diffusion.latent_diffusion import DiffusionModel


def filled(prompt: str, concept: Concept, name: str = PLACEHOLDER) -> str:
    """Return the prompt with the concept's `name` in place of {}, or with its class word in place of either.

    Raises:
        ValueError: it has neither (an imported adapter of CatVersion).
    """
    prompt = prompt.replace("{}", name)
    if name not in prompt or not is_prefix(find_method(concept.method).load(concept.tensors, concept.metadata)):
        return prompt
    words = class_words(concept.metadata.get("captions", "").splitlines())
    if not words:
        raise ValueError(
            f"The concept '{concept.source}' does not say its class word; write it into '{prompt}', or import it with "
            "scripts/import_embedding.py --caption WORD."
        )
    return prompt.replace(name, words[0])


def concept_images(
    model: DiffusionModel, settings: Mapping[str, Any], count: int, batch_size: int, folder: Path
) -> dict[str, Image.Image]:
    """Return `count` images by file name, which are also written into the folder.

    Args:
        settings: of a `Request`; image i has its seed + i.
    """
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
    images: dict[str, Image.Image] = {}
    for start in range(0, count, batch_size):
        size, seed = min(batch_size, count - start), settings["seed"] + start
        request = Request(**{**settings, "seed": seed, "n_samples": size, "n_rows": size})
        row = generate_image(request.for_model(facts_of(model)), model)
        width = row.width // size
        for i in range(size):
            name = f"{seed + i}.png"
            images[name] = row.crop((i * width, 0, (i + 1) * width, row.height))
            images[name].save(folder / name)
    return images
