"""The configuration of a run, and the model and the data that it names."""

from __future__ import annotations

import argparse
import logging
import os
from typing import Any

import pytorch_lightning as pl
import yaml
from omegaconf import DictConfig, OmegaConf

from ldm.config import ConfigError, instantiate_from_config, literal, load_config, merge, nearest
from ldm.data.datamodule import DataModuleFromConfig
from ldm.files.writing import replacing_set, writing_to
from ldm.training.changes import check_applies, hashes_of, log_changes, run_config
from ldm.training.checks import check_asked_for, check_captions, check_resumable, check_sizes, warn_of_words
from ldm.training.runs import Run, check_start

logger = logging.getLogger(__name__)

MAX_SEED = 2**32 - 1  # NumPy's
LIGHTNING_KEYS = ("trainer", "callbacks", "modelcheckpoint", "logger", "seed", "scale_lr")
DEFAULT_CONFIG = {
    "lightning": {
        "seed": 23,
        "scale_lr": True,
        "trainer": {"num_sanity_val_steps": 0, "log_every_n_steps": 10, "enable_model_summary": False},
    }
}
NEEDED = {
    "model": "",
    "data": "",
    "model.base_learning_rate": "",
    "data.params": "",
    "data.params.train": ", the images to learn from",
}
_MANAGER = "model.params.personalization_config.params"


def build_config(options: argparse.Namespace, run: Run) -> DictConfig:
    """Merge the configurations of the resumed run and the command line, and put the flags in.

    Raises:
        ConfigError: something is missing, unknown, or does not apply to a resumed run.
    """
    saved = run.saved("project", "lightning") if run.resumed else []
    resolvers = options.allow_resolvers
    given = load_config(*saved, *options.base, overrides=options.overrides, resolvers=resolvers)
    config = merge(DEFAULT_CONFIG, given)
    for section, what in NEEDED.items():
        if OmegaConf.select(config, section) is None:
            raise ConfigError(f"The configuration does not say '{section}:'{what}; see configs/ for complete ones.")
    for key in config.lightning:
        if key not in LIGHTNING_KEYS:
            raise ConfigError(f"Unknown key 'lightning.{key}'{nearest(str(key), LIGHTNING_KEYS)}")
    _put_flags(config, options)
    _check(config)
    if run.resumed:
        check_applies(run, run_config(run, resolvers), config)
    if options.embedding_manager_ckpt:
        check_start(options.embedding_manager_ckpt)
    return config


def _put_flags(config: DictConfig, options: argparse.Namespace) -> None:
    """Put what the flags say into the configuration, where it is saved and resumed from."""
    manager = {
        "--embedding_manager_ckpt": ("model.params.embedding_manager_ckpt", options.embedding_manager_ckpt),
        "--placeholder_tokens": (f"{_MANAGER}.placeholder_strings", options.placeholder_tokens),
        "--init_word": (f"{_MANAGER}.initializer_words", options.init_word if options.init_word is None else
                        [options.init_word]),
    }  # fmt: skip
    learns = OmegaConf.select(config, "model.params.personalization_config") is not None
    for flag, (_, value) in manager.items():
        if value is not None and not learns:
            raise ConfigError(f"{flag} needs a configuration that learns embeddings (personalization_config).")
    values = dict(manager.values()) | {
        "lightning.seed": options.seed,
        "lightning.scale_lr": options.scale_lr,
        "model.params.ckpt_path": options.actual_resume,
        **{f"lightning.trainer.{name}": value for name, value in options.trainer.items()},
    }
    for key, value in values.items():
        if value is not None:
            OmegaConf.update(config, key, _readable(key, value))
    if options.gpus is not None or "devices" in options.trainer:  # what was saved gives way to either
        OmegaConf.update(config, "lightning.trainer.gpus", options.gpus)
    if options.data_root:
        _put_data_root(config, options)
    captions: dict[str, object] = {}
    if options.placeholder_tokens:
        captions["placeholder_token"] = literal(options.placeholder_tokens[0])
    if options.caption:
        captions["templates"] = [_readable("--caption", text.replace("*", "{}")) for text in options.caption]
    for split in ("train", "validation"):
        if captions and config.data.params.get(split):
            OmegaConf.update(config, f"data.params.{split}.params", captions)


def _put_data_root(config: DictConfig, options: argparse.Namespace) -> None:
    for split in ("train", "validation"):
        if config.data.params.get(split):
            values = {"data_root": _readable("--data_root", options.data_root), "seed": config.lightning.seed}
            OmegaConf.update(config, f"data.params.{split}.params", values)


def _readable(name: str, value: object) -> object:
    """Return a flag's value, literally, if a YAML file can hold it."""
    for text in map(str, value if isinstance(value, list) else [value]):
        shown = os.fsencode(text).decode(errors="backslashreplace")
        if shown != text:
            raise ConfigError(f"{name}: '{shown}' is not UTF-8, which a configuration cannot hold; rename it.")
    return literal(value)


def _check(config: DictConfig) -> None:
    """Raise `ConfigError` for what is missing or wrong in a complete configuration."""
    seed = config.lightning.seed
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= MAX_SEED:
        raise ConfigError(f"lightning.seed must be a whole number from 0 to {MAX_SEED}, not '{seed!s:.40}'.")
    if not isinstance(config.lightning.scale_lr, bool):
        raise ConfigError(f"lightning.scale_lr must be true or false, not '{config.lightning.scale_lr}'.")
    check_asked_for(config)
    train = config.data.params.train
    if str(train.get("target")).endswith("PersonalizedBase") and not OmegaConf.select(train, "params.data_root"):
        raise ConfigError("Say which images to learn from: --data_root, a folder with images or one image.")
    params = config.model.get("params") or {}
    if "personalization_config" in params and not params.get("ckpt_path"):
        if "ckpt_path" not in params:
            raise ConfigError(
                "Say which base model to learn against: --actual_resume FILE, such as models/sd/sd-v1-4.ckpt "
                "(model.params.ckpt_path=null tries the machinery on random weights)."
            )
        logger.warning("No base model is given (--actual_resume): embeddings are learned against random weights.")


def build(config: DictConfig, run: Run) -> tuple[DataModuleFromConfig, pl.LightningModule]:
    """Build the data and the model, from the configured seed.

    Raises:
        ValueError: they do not fit each other, or not the checkpoint to resume from.
    """
    pl.seed_everything(config.lightning.seed, verbose=False)
    data: DataModuleFromConfig = instantiate_from_config(config.data)
    module: Any = instantiate_from_config(config.model)
    module.seed = config.lightning.seed
    check_sizes(module, data)
    warn_of_words(module, data)
    check_captions(module, data)
    check_resumable(module, run.checkpoint)
    return data, module


def save_configs(
    config: DictConfig, data: DataModuleFromConfig, module: pl.LightningModule, run: Run, resolvers: bool = False
) -> None:
    """Write the run's configuration, and hashes of what it learns from, into its folder as `configs/<time>-….yaml`.

    Of a resumed run, what differs from the ones that are there is logged.
    """
    hashes = hashes_of(data, module)
    if run.resumed:
        log_changes(run, run_config(run, resolvers), config, hashes)
    with writing_to(run.folder):
        run.checkpoints.mkdir(parents=True, exist_ok=True)
    parts = {
        "data": yaml.safe_dump(hashes),
        "project": OmegaConf.to_yaml(OmegaConf.masked_copy(config, ["model", "data"])),
        "lightning": OmegaConf.to_yaml(OmegaConf.create({"lightning": config.lightning})),
    }
    with replacing_set(run.configs) as folder:
        for kind, text in parts.items():
            (folder / f"{run.started}-{kind}.yaml").write_text(text, encoding="utf-8")
