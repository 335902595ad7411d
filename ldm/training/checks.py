"""Checks of a training run, made before its log folder is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf

from ldm.checkpoint import read_state_dict
from ldm.conditioning.prompts import warn_of_unknown
from ldm.config import ConfigError
from ldm.data.datamodule import DataModuleFromConfig
from ldm.modules.embedding_manager import is_prefix
from ldm.request import shown

# Keys of the reference's YAML files that no code stands behind -> the values that ask for what is done anyway, and
# what to do instead of any other. (When generating, they make no difference.)
MANAGER = "personalization_config.params"
UNMET: dict[str, tuple[tuple[object, ...], str]] = {
    "unfreeze_model": ((False,), "only the embedding is trained"),
    "scheduler_config": ((), "the rate is constant for embeddings, and falls to zero for training from scratch"),
    "num_timesteps_cond": ((1,), "there is one conditioning for all timesteps"),
    "conditioning_key": (("crossattn",), "conditioning is always cross-attention"),
    "use_ema": ((False,), "use the callback ldm.training.callbacks.AveragedWeights"),
    "lossconfig": (({"target": "torch.nn.Identity"},), "the loss is kl_weight and mse_weight"),
    f"{MANAGER}.per_image_tokens": ((False,), "one placeholder is learned from all images"),
    f"{MANAGER}.num_vectors_per_token": ((1,), "a token has one vector for each of its prospect_stages"),
}


def check_asked_for(config: DictConfig) -> None:
    """Raise `ConfigError` for a setting that would be accepted and not done, though it decides the result."""
    params = OmegaConf.select(config, "model.params") or OmegaConf.create()
    done = {f"{MANAGER}.num_vectors_per_token": params.get("prospect_stages", 10)}
    if params.get("personalization_config") is not None:
        done["use_ema"] = True  # the average of frozen weights is they
    for key, (harmless, instead) in UNMET.items():
        value = OmegaConf.select(params, key)
        if value is not None and value not in (*harmless, done.get(key)):
            raise ConfigError(f"model.params.{key}: {value!s:.40} is not supported: {instead}; omit it.")


def check_samples(module: Any, data: DataModuleFromConfig) -> None:
    """Raise `ValueError` unless the first sample of each data set is what the model learns from."""
    if (unit := getattr(module, "size_unit", None)) is None:
        return
    for split, dataset in data.datasets.items():
        if getattr(dataset, "size", 0) is None:
            raise ValueError(f"data.params.{split}.params.size is needed: images are learned at one size.")
        sample, name = dataset[0], getattr(dataset, "name", type(dataset).__name__)
        image, caption = module.image_key, module.caption_key
        shape = tuple(np.shape(sample.get(image)))
        if caption not in sample or len(shape) != 3 or shape[2] != 3:
            raise ValueError(
                f"The samples of {name} must hold '{caption}' and '{image}' (height, width, 3) in [-1, 1], not "
                f"{', '.join(sample)} {shape}."
            )
        for size in shape[:2]:
            if size % unit:
                near = max(1, round(size / unit)) * unit
                raise ValueError(f"The {split} images' size {size} must be a multiple of {unit}; nearest: {near}.")


def check_captions(module: Any, data: DataModuleFromConfig) -> None:
    """Raise `ConfigError` where the captions do not hold what is learned, or CatVersion's name no class.

    Warns of words in them that a small model never read.
    """
    manager = getattr(module, "embedding_manager", None)
    if manager is None or manager.learned is None:
        return
    sets = [d for d in data.datasets.values() if hasattr(d, "templates")]
    texts = [manager.initial_word, *(d.templates[0] for d in sets if len(d.templates) == 1)]
    warn_of_unknown(module.cond_stage_model.known_words, texts, manager.placeholder_strings)
    for template, placeholder in [(text, d.placeholder_token) for d in sets for text in d.templates]:
        if not is_prefix(manager.learned):
            _check_is_read(module, template.replace("{}", placeholder))
        elif "{}" in template or not template.strip():
            raise ConfigError("CatVersion learns in captions that name the class: give --caption 'teddybear' or so.")


def _check_is_read(module: Any, caption: str) -> None:
    """Raise `ConfigError` where a caption has no learned token, or it is not read to its end."""
    asked = sum(slot < 0 for _, slots in module.prompt_reader().words_in(caption) for slot in slots)
    if not asked:
        name = module.embedding_manager.placeholder_strings[0]
        raise ConfigError(
            f"The caption {shown(caption)} has no place for the learned token, which is called '{name}' "
            "(placeholder_strings); write it there (in YAML: {}, and the same placeholder_token)."
        )
    if int((module.get_learned_conditioning(caption).slots[0] < 0).sum()) < asked:
        raise ConfigError(f"The caption {shown(caption)} is too long, its learned token is cut off; shorten it.")


def check_resumable(module: pl.LightningModule, checkpoint: Path) -> None:
    """Raise `ValueError` unless the checkpoint to resume from holds what `module` trains."""
    saved = {key: x.shape for key, x in read_state_dict(checkpoint).items()}
    trained = {key for key, parameter in module.named_parameters() if parameter.requires_grad}
    for key, own in module.state_dict().items():
        if saved.get(key, None if key in trained else own.shape) != own.shape:
            found = tuple(saved[key]) if key in saved else "missing"
            raise ValueError(
                f"'{checkpoint}' does not fit the configuration ({key} is {found}, not {tuple(own.shape)}); resume "
                "with the run's own configuration, or start a new run."
            )
