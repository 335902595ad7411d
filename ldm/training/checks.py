"""Checks of a training run, made before its log folder is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf

from ldm.checkpoint import read_state_dict
from ldm.conditioning.prompts import warn_of_unknown
from ldm.config import ConfigError, check_parameters
from ldm.data.datamodule import DataModuleFromConfig
from ldm.data.repeated import image_sides
from ldm.modules.embedding_manager import is_prefix
from ldm.request import shown
from ldm.training.callbacks import ImageLogger

CASTS_ALL = {"bf16-true": "bfloat16", "16-true": "float16"}  # Lightning casts the whole module, buffers too
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


def check_images(callbacks: Sequence[pl.Callback], module: Any) -> None:
    """Raise `ConfigError` for an unknown key of `log_images_kwargs`, before the first images are due."""
    for callback in callbacks:
        if isinstance(callback, ImageLogger) and not callback.disabled and hasattr(module, "log_images"):
            check_parameters(module.log_images, {"batch": None, **callback.log_images_kwargs})


def check_precision(trainer: pl.Trainer) -> None:
    """Raise `ConfigError` where the trainer's precision would spoil what is learned; `64-true` loses no digits."""
    precision = trainer.precision
    if precision in CASTS_ALL:
        mixed = precision.replace("true", "mixed")
        raise ConfigError(
            f"precision '{precision}' would round the noise schedule and what is learned; to halve frozen weights use "
            f"model.params.frozen_dtype={CASTS_ALL[precision]}, and to train from scratch --precision {mixed}."
        )


def check_resumable(module: pl.LightningModule, checkpoint: Path | None) -> None:
    """Raise `ValueError` unless the checkpoint to resume from holds what `module` trains."""
    if checkpoint is None:
        return
    saved = {key: x.shape for key, x in read_state_dict(checkpoint).items()}
    trained = {key for key, parameter in module.named_parameters() if parameter.requires_grad}
    for key, own in module.state_dict().items():
        if saved.get(key, None if key in trained else own.shape) != own.shape:
            found = tuple(saved[key]) if key in saved else "missing"
            raise ValueError(
                f"'{checkpoint}' does not fit the configuration ({key} is {found}, not {tuple(own.shape)}); resume "
                "with the run's own configuration, or start a new run."
            )


def check_sizes(module: Any, data: DataModuleFromConfig) -> None:
    """Raise `ValueError` unless the data sets' images have a size that the model takes."""
    if not hasattr(module, "size_unit"):
        return
    for split, dataset in data.datasets.items():
        sides = image_sides(dataset, module.image_key, module.caption_key)
        if sides is None:
            raise ValueError(f"data.params.{split}.params.size is needed: images are learned at one size.")
        for size in sides:
            if size % module.size_unit:
                unit, nearest_size = module.size_unit, max(1, round(size / module.size_unit)) * module.size_unit
                raise ValueError(
                    f"The {split} images' size {size} must be a multiple of {unit}; nearest: {nearest_size}."
                )


def check_captions(module: Any, data: DataModuleFromConfig) -> None:
    """Raise `ConfigError` where the captions do not hold what is learned, or CatVersion's name no class."""
    manager = getattr(module, "embedding_manager", None)
    if manager is None or manager.learned is None:
        return
    for dataset in data.datasets.values():
        for template in getattr(dataset, "templates", ()):
            if is_prefix(manager.learned) and ("{}" in template or not template.strip()):
                raise ConfigError(
                    "CatVersion has no token of its own; it learns in captions that name the class: give --caption "
                    "'teddybear' or so."
                )
            if not is_prefix(manager.learned) and "{}" not in template:
                raise ConfigError(
                    f"The caption '{template}' has no place for the learned token; write * (in YAML: {{}}) there."
                )
            if not is_prefix(manager.learned):
                _check_is_read(module, template, getattr(dataset, "placeholder_token", "*"))


def warn_of_words(module: Any, data: DataModuleFromConfig) -> None:
    """Warn where the learning starts from a word, or has a caption, that a small model never read."""
    manager = getattr(module, "embedding_manager", None)
    if manager is not None and manager.learned is not None:
        templates: list[Sequence[str]] = [getattr(dataset, "templates", ()) for dataset in data.datasets.values()]
        texts = [manager.initial_word, *(found[0] for found in templates if len(found) == 1)]
        warn_of_unknown(module.cond_stage_model.known_words, texts, manager.placeholder_strings)


def _check_is_read(module: Any, template: str, placeholder: str) -> None:
    """Raise `ConfigError` where a caption's token is not learned, or not read to its end."""
    learned, caption = module.embedding_manager.placeholder_strings, template.replace("{}", placeholder)
    if placeholder not in learned:
        raise ConfigError(
            f"The captions' placeholder_token is '{placeholder}', but what is learned is called '{learned[0]}' "
            "(placeholder_strings); write the same in both."
        )
    asked = sum(slot < 0 for _, slots in module.prompt_reader().words_in(caption) for slot in slots)
    if int((module.get_learned_conditioning(caption).slots[0] < 0).sum()) < asked:
        raise ConfigError(f"The caption {shown(caption)} is too long, its learned token is cut off; shorten it.")
