"""Images of folders or of a concept, and their scores as rows: mean, spread, count, and what they are measured with."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from evaluation.metrics.alignment import BACKGROUNDS, alignment, geometric_mean, masked_alignment
from evaluation.metrics.backbones import Backbone
from ldm.conditioning.prompts import class_words
from ldm.data.personalized import find_images
from ldm.embeddings import Concept
from ldm.files.images import open_image
from ldm.files.writing import replace_text
from ldm.generate import facts_of, generate_image
from ldm.methods import find_method
from ldm.modules.embedding_manager import is_prefix
from ldm.request import PLACEHOLDER, Request

if TYPE_CHECKING:
    from ldm.models.diffusion.latent_diffusion import DiffusionModel

ALL = "(all prompts)"


@dataclass(frozen=True)
class Row:
    """One score."""

    concept: str
    prompt: str
    text: str  # that images were compared with
    metric: str
    mean: (
        float | None
    )  # of `count` pairs of images, generated images, or the prompts' means; None for what is no number
    std: float | None  # None for a geometric mean, which is one value
    count: int
    backbone: str
    preprocessing: str


@dataclass(frozen=True)
class Case:
    """A prompt's images and its references: RGB, by name, scored together."""

    concept: str
    prompt: str
    text: str  # that images are compared with
    references: Mapping[str, Image.Image]
    generated: Mapping[str, Image.Image]
    masks: Mapping[str, Image.Image]  # by `reference NAME` and `generated NAME`; empty: whole images are compared alone


def score(backbone: Backbone, case: Case, background: str = "black") -> list[Row]:
    """Return the rows of one prompt: image, text, their geometric mean, and the same with masks where there are any.

    Raises:
        ValueError: a mask is missing or of another size.
    """
    found = {"": alignment(backbone, [*case.references.values()], [*case.generated.values()], case.text)}
    if case.masks:
        references = {f"reference {name}": image for name, image in case.references.items()}
        generated = {f"generated {name}": image for name, image in case.generated.items()}
        found["masked_"] = masked_alignment(backbone, references, generated, case.masks, case.text, background)
    names = (case.concept, case.prompt, case.text)
    settings = (backbone.name, f"{backbone.preprocessing}, background {background}")
    rows = []
    for kind, values in found.items():
        means = {name: float(x.double().mean()) for name, x in values.items()}
        for name, x in values.items():
            spread = float(x.double().std(correction=0))
            rows.append(Row(*names, f"{kind}{name}", means[name], spread, x.numel(), *settings))
        overall = _number(geometric_mean(means["text"], means["image"]))
        rows.append(Row(*names, f"{kind}geometric_mean", overall, None, len(case.generated), *settings))
    return rows


def read_images(folder: Path, background: str = "black") -> dict[str, Image.Image]:
    """Return the images of a folder, or of one file, by name; transparency gets the background.

    The grid that CatVersion leaves in a folder, called as the folder, is left out.
    """
    if not folder.exists():
        raise ValueError(f"There are no images '{folder}'; check the path.")
    files = find_images(folder)
    own = [file for file in files if len(files) == 1 or file.stem != folder.name]
    return {file.name: open_image(file, BACKGROUNDS[background]) for file in own}


def read_masks(kind: str, folder: Path, images: Mapping[str, Image.Image]) -> dict[str, Image.Image]:
    """Return the masks that a folder has, of the same name up to the suffix, as `KIND NAME` of their images."""
    files = {path.stem: path for path in find_images(folder)}
    return {f"{kind} {name}": open_image(files[Path(name).stem]) for name in images if Path(name).stem in files}


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
    """Return `count` images by file name, written into the folder, too; image i has the seed + i."""
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


def aggregate(rows: Sequence[Row]) -> list[Row]:
    """Return a row for each metric over all prompts: mean and spread of the prompts' means."""
    found = []
    for metric in dict.fromkeys(row.metric for row in rows):
        own = [row for row in rows if row.metric == metric]
        means = np.array([math.nan if row.mean is None else row.mean for row in own])
        settings = (own[0].backbone, own[0].preprocessing)
        mean, std = _number(float(means.mean())), _number(float(means.std()))
        found.append(Row(own[0].concept, ALL, "", metric, mean, std, len(own), *settings))
    return found


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def write(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write the rows as scores.csv and scores.json."""
    content = [asdict(row) for row in rows]
    text = io.StringIO()
    table = csv.DictWriter(text, list(content[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(content)
    files = {folder / "scores.csv": text.getvalue(), folder / "scores.json": json.dumps(content, indent=1) + "\n"}
    folder.mkdir(parents=True, exist_ok=True)
    for file, written in files.items():
        replace_text(file, written)
    return list(files)
