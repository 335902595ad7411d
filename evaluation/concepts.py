"""Score learned concepts: do they regenerate their image, and do they transfer one attribute without the rest?

Counted on the rendered world, where image and text have known attributes that differ in every factor.

Shapes: N images, F factors, S stages, D width.
"""

from __future__ import annotations

import logging
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from torch import Tensor

from evaluation.images import Sampling, decode, encode, load, load_concepts, sample, to_bytes
from evaluation.jobs import Result
from evaluation.judges import load_judge
from evaluation.world.attributes import COLUMNS, PREPOSITIONS, other_attributes, random_attributes, words_of
from evaluation.world.rendered import render
from ldm.conditioning.presets import preset
from ldm.conditioning.stages import matching_stage
from ldm.config import instantiate_from_config, load_config
from ldm.embeddings import Concept
from ldm.files.images import to_pil

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion

SEED = 23  # of training
MAX_STEPS = "lightning.trainer.max_steps"


@dataclass(frozen=True)
class Subject:
    """Image `number` of a series to learn: its attributes, and those of a text that differ in every factor, (F,)."""

    number: int
    seed: int  # of the series

    @property
    def attributes(self) -> Tensor:
        return random_attributes(self.number + 1, self.seed, held_out=True)[self.number]

    @property
    def text(self) -> Tensor:
        return other_attributes(self.attributes, np.random.default_rng((self.seed, self.number)))

    @property
    def image(self) -> Tensor:
        """(3, R, R) in [-1, 1]."""
        return render(self.attributes[None], [self.seed * 1000 + self.number])[0]

    def save(self, folder: str | Path) -> None:
        """Write the image into a folder, as training reads it."""
        to_pil(self.image).save(Path(folder) / "image.png")

    def seeds(self, count: int) -> list[int]:
        """Return seeds of images that are generated with the concept: the same for all prompts and variants."""
        return [self.seed * 1000 + self.number * count + i for i in range(count)]


def build(
    config: str, ckpt: str, folder: str, overrides: Mapping[str, Any]
) -> tuple[LatentDiffusion, pl.LightningDataModule, int]:
    """Return the model, data and steps that learn the image in `folder`, with `overrides` of dotted keys."""
    settings = load_config(config, flag="--config")
    given = {"model.params.ckpt_path": ckpt, "data.params.train.params.data_root": folder}
    for key, value in (given | dict(overrides)).items():
        OmegaConf.update(settings, key, value)
    pl.seed_everything(SEED, verbose=False)
    model = instantiate_from_config(settings.model)
    model.seed = SEED
    model.learning_rate = settings.model.base_learning_rate * settings.data.params.batch_size  # as main.py does
    return model, instantiate_from_config(settings.data), OmegaConf.select(settings, MAX_STEPS)


def learn_concept(config: str, ckpt: str, subject: Subject, overrides: Mapping[str, Any]) -> Result:
    """Learn a subject as `main.py` does: vectors (S, D), and the seconds that it took.

    Of the trainer's settings only `MAX_STEPS` counts.
    """
    start = time.monotonic()
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)  # its notices would hide the progress bar
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        subject.save(folder)
        model, data, steps = build(config, ckpt, folder, overrides)
        trainer = pl.Trainer(
            max_steps=steps, devices=1, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(model, data)
    model.eval()
    with torch.no_grad():
        manager: Any = model.embedding_manager
        vectors = manager.embeddings().detach().float().cpu()
    return {"vectors": vectors.numpy(), "seconds": np.array(time.monotonic() - start)}


@dataclass(frozen=True)
class Transfer:
    """The attribute that a preset should take from the learned image, and a prompt that names the others."""

    prompt: str  # with {words of the text's factors}, and `*` for the concept
    wanted: str  # the factor that should be the image's
    unwanted: tuple[str, ...]  # the factors that should not; those in neither may be either

    def fill(self, text: Tensor) -> str:
        """Return the prompt with the words of the text's attributes (F,)."""
        words = words_of(text)
        return self.prompt.format(**words, preposition=PREPOSITIONS[words["position"]])


OBJECT = "a {size} * {shape} {preposition} {position} on a {background} background"
TRANSFERS = {
    "content": Transfer("a * thing {preposition} {position} on a {background} background", "shape",
                        ("position", "background")),
    "layout": Transfer("a {texture} {colour} {shape}", "position", ("shape", "texture", "colour")),
    "material": Transfer(OBJECT, "texture", ("position", "size", "shape", "background")),
    "style": Transfer(OBJECT, "colour", ("position", "size", "shape", "background")),
}  # fmt: skip


def windowed(prompt: str, window: Sequence[int], stages: int) -> list[str]:
    """Return `stages` texts: `prompt` with its `*` in stages whose middle lies in a window of tenths of time."""
    inside = [s for s in range(stages) if matching_stage(s, stages, 10) in window]
    return preset("content", prompt, stages=inside, num_stages=stages)


@torch.no_grad()
def measure_transfer(
    model: tuple[str, str, str],
    vectors: np.ndarray,
    subject: Subject,
    placements: Mapping[str, Mapping[str, Sequence[int]]],
    count: int,
    sampling: Sampling,
) -> Result:
    """Read the attributes of N = `count` images for each prompt with a learned concept.

    Args:
        model: configuration, checkpoint and classifier.
        vectors: (S, D).
        placements: {name: {preset: window}}, where `*` stands; a window is a list of tenths of time.

    Returns:
        image, attributes (F,) of the learned one; latent_distance (N,), root mean square, of the regenerated images to
        it; read/reconstruction and read/PLACEMENT/PRESET (N, F) for all presets; images/… uint8 beside them; latents of
        all of them, one group of N behind the other.
    """
    config, ckpt, classifier = model
    concept = Concept(torch.from_numpy(vectors))
    stages = int(np.lcm(10, concept.num_stages))  # bounds of the tenths and of the concept's stages are theirs, too
    network, judge = load(config, ckpt, stages), load_judge(classifier)
    load_concepts(network, {"*": concept})
    texts = {"reconstruction": ["a *"] * stages}
    for placement, windows in placements.items():
        for name, transfer in TRANSFERS.items():
            texts[f"{placement}/{name}"] = windowed(transfer.fill(subject.text), windows[name], stages)
    columns = [[texts[name][stage] for name in texts for _ in range(count)] for stage in range(stages)]
    latents = sample(network, columns, subject.seeds(count) * len(texts), sampling)
    images = decode(network, latents)
    apart = encode(network, images[:count]) - encode(network, subject.image[None])
    result = {
        "image": subject.attributes.numpy(),
        "latent_distance": apart.pow(2).mean(dim=(1, 2, 3)).sqrt().cpu().numpy(),
        "latents": latents.numpy(),
    }
    for name, part, read in zip(texts, images.split(count), judge.read(images).split(count), strict=True):
        result |= {f"read/{name}": read.numpy(), f"images/{name}": to_bytes(part)}
    return result


def transferred(read: np.ndarray, image: np.ndarray, transfer: Transfer) -> dict[str, np.ndarray]:
    """Compare the attributes (N, F) of generated images with those (F,) of the learned one, bool (N,) each.

    `wanted`: the wanted factor is the learned image's. `leaked/FACTOR`: an unwanted factor is. `transferred`: the
    wanted factor is and none of the unwanted ones.
    """
    same = read == image
    wanted = same[:, COLUMNS[transfer.wanted]]
    leaked = {f"leaked/{name}": same[:, COLUMNS[name]] for name in transfer.unwanted}
    return {"wanted": wanted, "transferred": wanted & ~np.any(list(leaked.values()), axis=0)} | leaked
