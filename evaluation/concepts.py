"""What a learned concept is worth: does it bring the picture back, and does it bring one attribute without the rest?

Counted on the rendered world, where picture and text have known attributes that differ in every factor.

Shapes: N pictures, F factors, S stages, D width.
"""

from __future__ import annotations

import logging
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from evaluation.captions import load, load_judge, to_bytes
from evaluation.pictures import generate
from evaluation.world.rendered import FACTORS, PREPOSITIONS, random_attributes, render
from ldm.conditioning.presets import preset
from ldm.conditioning.stages import matching_stage
from ldm.config import instantiate_from_config, load_config
from ldm.embeddings import Concept
from ldm.files.images import to_pil

MAX_STEPS = "lightning.trainer.max_steps"
COLUMNS = {name: column for column, name in enumerate(FACTORS)}


@dataclass(frozen=True)
class Transfer:
    """What a preset should take from the picture, and the prompt that names what it should not.

    Args:
        prompt: with {words of the text's factors}, and `*` for the concept.
        wanted: the factor that should be the picture's.
        unwanted: the factors that should not; those in neither may be either.
    """

    prompt: str
    wanted: str
    unwanted: tuple[str, ...]


OBJECT = "a {size} * {shape} {preposition} {position} on a {background} background"
TRANSFERS = {
    "content": Transfer("a * thing {preposition} {position} on a {background} background", "shape",
                        ("position", "background")),
    "layout": Transfer("a {texture} {colour} {shape}", "position", ("shape", "texture", "colour")),
    "material": Transfer(OBJECT, "texture", ("position", "size", "shape", "background")),
    "style": Transfer(OBJECT, "colour", ("position", "size", "shape", "background")),
}  # fmt: skip


def concept_attributes(number: int, seed: int) -> tuple[Tensor, Tensor]:
    """The attributes of picture `number`, a held-out combination, and of its text: long (F,) each, all different."""
    picture = random_attributes(number + 1, seed, held_out=True)[number]
    rng = np.random.default_rng((seed, number))
    choices = np.array([len(words) for words in FACTORS.values()])
    text = (picture.numpy() + rng.integers(1, choices)) % choices
    return picture, torch.from_numpy(text)


def concept_picture(number: int, seed: int) -> Tensor:
    """The picture to learn, (3, R, R) in [-1, 1]."""
    picture, _ = concept_attributes(number, seed)
    return render(picture[None], [seed * 1000 + number])[0]


def noises(number: int, seed: int, count: int) -> list[int]:
    """Seeds of the pictures that are made with concept `number`, alike in all prompts and ways of learning."""
    return [seed * 1000 + number * count + i for i in range(count)]


def fill(transfer: Transfer, attributes: Tensor) -> str:
    """The transfer's prompt with the words of the text's attributes (F,)."""
    words = {name: values[i] for (name, values), i in zip(FACTORS.items(), attributes.tolist(), strict=True)}
    return transfer.prompt.format(**words, preposition=PREPOSITIONS[words["position"]])


def configured(config: str, overrides: Mapping[str, Any]) -> DictConfig:
    """The configuration with other values for dotted keys."""
    settings = load_config(config)
    for key, value in overrides.items():
        OmegaConf.update(settings, key, value)
    return settings


def learn(config: str, ckpt: str, picture: Tensor, overrides: Mapping[str, Any], seed: int = 23) -> Concept:
    """Learn one picture (3, R, R) as `main.py` does, with `overrides` of the configuration's dotted keys.

    `learning_rate` among them is the final one, not multiplied by the batch size; of the trainer's settings only
    `MAX_STEPS` counts.
    """
    overrides = dict(overrides)
    learning_rate = overrides.pop("learning_rate", None)
    settings = configured(config, overrides)
    settings.model.params.ckpt_path = ckpt
    pl.seed_everything(seed, verbose=False)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)  # its notices would hide the progress bar
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        to_pil(picture).save(Path(folder) / "picture.png")
        settings.data.params.train.params.data_root = folder
        model = instantiate_from_config(settings.model)
        model.seed = seed
        data = instantiate_from_config(settings.data)
        if learning_rate is None:
            learning_rate = settings.model.base_learning_rate * settings.data.params.batch_size
        model.learning_rate = learning_rate
        trainer = pl.Trainer(
            max_steps=OmegaConf.select(settings, MAX_STEPS), accelerator="auto", devices=1, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(model, data)
    model.eval()
    with torch.no_grad():
        return Concept(model.embedding_manager.embeddings().detach().float().cpu())


def windowed(prompt: str, window: Sequence[int], stages: int) -> list[str]:
    """`prompt` with its `*` in a window of tenths of time and without it elsewhere: `stages` texts.

    A stage carries the `*` when its middle lies in the window.
    """
    inside = [s for s in range(stages) if matching_stage(s, stages, 10) in window]
    return preset("content", prompt, stages=inside, num_stages=stages)


def stages_for(concept_stages: int) -> int:
    """The number of stages in which both tenths and the concept's own stages have their bounds."""
    return int(np.lcm(10, concept_stages))


def learn_concept(
    config: str, ckpt: str, number: int, seed: int, overrides: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Learn concept `number`: vectors (S, D), and the seconds that it took."""
    start = time.monotonic()
    concept = learn(config, ckpt, concept_picture(number, seed), overrides)
    return {"vectors": concept.vectors.numpy(), "seconds": np.array(time.monotonic() - start)}


@torch.no_grad()
def bring(
    config: str, ckpt: str, classifier: str, vectors: Sequence[Sequence[float]], number: int, seed: int,
    placements: Mapping[str, Mapping[str, Sequence[int]]], seeds: Sequence[int], steps: int = 50, scale: float = 2.5,
) -> dict[str, np.ndarray]:  # fmt: skip
    """What the learned vectors (S, D) of concept `number` bring into N pictures for each prompt.

    Args:
        placements: {name: {preset: window}}, where `*` stands; a window is a list of tenths of time.
        seeds: of the N pictures, alike in all prompts.

    Returns:
        picture and text, the attributes (F,); latent_distance (N,) of the regenerated picture to the picture, root
        mean square; read/reconstruction and, for all of TRANSFERS and all placements, read/PLACEMENT/PRESET (N, F);
        pictures/… uint8 beside them.
    """
    concept = Concept(torch.tensor(vectors))
    picture = concept_picture(number, seed)
    attributes, text = concept_attributes(number, seed)
    stages = stages_for(concept.num_stages)
    model, judge = load(config, ckpt, stages), load_judge(classifier)
    model.embedding_manager.load(concept)
    texts = {"reconstruction": ["a *"] * stages}
    for placement, windows in placements.items():
        for name, transfer in TRANSFERS.items():
            texts[f"{placement}/{name}"] = windowed(fill(transfer, text), windows[name], stages)
    names = [name for name in texts for _ in seeds]
    columns = [[texts[name][stage] for name in names] for stage in range(stages)]
    pictures = generate(model, columns, list(seeds) * len(texts), steps, scale)
    latents = model.encode_first_stage(pictures[: len(seeds)]).mode()
    wanted = model.encode_first_stage(picture[None]).mode()
    result = {
        "picture": attributes.numpy(),
        "text": text.numpy(),
        "latent_distance": (latents - wanted).pow(2).mean(dim=(1, 2, 3)).sqrt().cpu().numpy(),
    }
    drawn = pictures.split(len(seeds))
    for name, part, read in zip(texts, drawn, judge.read(pictures).split(len(seeds)), strict=True):
        result |= {f"read/{name}": read.numpy(), f"pictures/{name}": to_bytes(part)}
    return result


def brought(read: np.ndarray, picture: np.ndarray, transfer: Transfer) -> dict[str, np.ndarray]:
    """How pictures (N, F) of one concept compare with its picture (F,), bool (N,) each.

    `wanted`: the wanted factor is the picture's. `leaked/FACTOR`: an unwanted factor is. `transferred`: the wanted
    factor is and none of the unwanted ones.
    """
    same = read == picture
    wanted = same[:, COLUMNS[transfer.wanted]]
    leaked = {f"leaked/{name}": same[:, COLUMNS[name]] for name in transfer.unwanted}
    return {"wanted": wanted, "transferred": wanted & ~np.any(list(leaked.values()), axis=0)} | leaked
