"""The configuration of a run, and the model and the data that it names."""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import yaml
from omegaconf import DictConfig, OmegaConf

from ldm.checkpoint import read_state_dict
from ldm.conditioning.prompts import warn_of_unknown
from ldm.config import ConfigError, flatten, instantiate_from_config, literal, load_config, merge, nearest
from ldm.data.datamodule import DataModuleFromConfig
from ldm.files.base_model import FINGERPRINT
from ldm.files.writing import replacing_set, writing_to
from ldm.modules.embedding_manager import is_prefix
from ldm.request import shown
from ldm.training.runs import Run, check_start
from ldm.yaml_files import read_yaml

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
NEEDED = ("model", "data", "model.base_learning_rate", "data.params", "data.params.train")
_MANAGER = "personalization_config.params"
MANAGER = f"model.params.{_MANAGER}"
# Keys that make no other run of it.
FREE = tuple(
    f"lightning.trainer.{name}"
    for name in ("max_steps", "max_epochs", "max_time", "enable_progress_bar", "profiler", "log_every_n_steps")
)
# Keys whose value a checkpoint brings with it -> the flag, where one gives it.
FIXED = {
    "lightning.seed": "--seed",
    "model.params.embedding_manager_ckpt": "--embedding_manager_ckpt",
    "model.params.prospect_stages": "",
    f"{MANAGER}.initializer_words": "--init_word",
    **{f"{MANAGER}.{name}": "" for name in ("generator", "method", "method_params")},
}
LISTED = 8
# Keys of the reference's YAML files that no code stands behind -> the values that ask for what is done anyway, and
# what to do instead of any other. (When generating, they make no difference.)
UNMET: dict[str, tuple[tuple[object, ...], str]] = {
    "unfreeze_model": ((False,), "only the embedding is trained"),
    "scheduler_config": ((), "the rate is constant for embeddings, and falls to zero for training from scratch"),
    "num_timesteps_cond": ((1,), "there is one conditioning for all timesteps"),
    "conditioning_key": (("crossattn",), "conditioning is always cross-attention"),
    "use_ema": ((False,), "use the callback ldm.training.callbacks.AveragedWeights"),
    "lossconfig": (({"target": "torch.nn.Identity"},), "the loss is kl_weight and mse_weight"),
    f"{_MANAGER}.per_image_tokens": ((False,), "one placeholder is learned from all images"),
    f"{_MANAGER}.num_vectors_per_token": ((1,), "a token has one vector for each of its prospect_stages"),
}


def build_config(options: argparse.Namespace, run: Run) -> DictConfig:
    """Merge the configurations of the resumed run and the command line, and put the flags in.

    Raises:
        ConfigError: something is missing, unknown, or does not apply to a resumed run.
    """
    saved = run.saved("project", "lightning") if run.resumed else []
    resolvers = options.allow_resolvers
    given = load_config(*saved, *options.base, overrides=options.overrides, resolvers=resolvers)
    config = merge(DEFAULT_CONFIG, given)
    for section in NEEDED:
        if OmegaConf.select(config, section) is None:
            raise ConfigError(f"The configuration does not say '{section}:'; see configs/ for complete ones.")
    for key in config.lightning:
        if key not in LIGHTNING_KEYS:
            raise ConfigError(f"Unknown key 'lightning.{key}'{nearest(str(key), LIGHTNING_KEYS)}")
    _put_flags(config, options)
    _check(config)
    if run.resumed:
        changed = _changed(load_config(*saved, flag="-r", resolvers=resolvers), config)
        for key, change in changed.items():
            fixed = next((name for name in FIXED if f"{key}.".startswith(f"{name}.")), None)
            if fixed and run.checkpoint:
                name = FIXED[fixed] or fixed
                raise ConfigError(f"{name} does not apply to a resumed run ({change}); omit it, or start a new run.")
        run.changes = [f"{key} ({change})" for key, change in changed.items()]
    if options.embedding_manager_ckpt:
        check_start(options.embedding_manager_ckpt)
    return config


def _put_flags(config: DictConfig, options: argparse.Namespace) -> None:
    """Put what the flags say into the configuration, where it is saved and resumed from."""
    if OmegaConf.select(config, "model.params.personalization_config") is None:
        for name in ("embedding_manager_ckpt", "placeholder_tokens", "init_word"):
            if getattr(options, name) is not None:
                raise ConfigError(f"--{name} needs a configuration that learns embeddings (personalization_config).")
    values = {
        "model.params.embedding_manager_ckpt": options.embedding_manager_ckpt,
        f"{MANAGER}.placeholder_strings": options.placeholder_tokens,
        f"{MANAGER}.initializer_words": None if options.init_word is None else [options.init_word],
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
    params: dict[str, object] = {}
    if options.data_root:
        params = {"data_root": _readable("--data_root", options.data_root), "seed": config.lightning.seed}
    if options.placeholder_tokens:
        params["placeholder_token"] = literal(options.placeholder_tokens[0])
    if options.caption:
        params["templates"] = [_readable("--caption", text.replace("*", "{}")) for text in options.caption]
    for split in ("train", "validation"):
        if params and config.data.params.get(split):
            OmegaConf.update(config, f"data.params.{split}.params", params)
    train = config.data.params.train
    if str(train.get("target")).endswith("PersonalizedBase") and not OmegaConf.select(train, "params.data_root"):
        raise ConfigError("Say which images to learn from: --data_root, a folder with images or one image.")


def _readable(name: str, value: object) -> object:
    """Return a flag's value, literally, if a YAML file can hold it."""
    for text in map(str, value if isinstance(value, list) else [value]):
        escaped = os.fsencode(text).decode(errors="backslashreplace")
        if escaped != text:
            raise ConfigError(f"{name}: '{escaped}' is not UTF-8, which a configuration cannot hold; rename it.")
    return literal(value)


def _check(config: DictConfig) -> None:
    """Raise `ConfigError` for what is missing or wrong, or decides the result and would be accepted and not done."""
    seed = config.lightning.seed
    if type(seed) is not int or not 0 <= seed <= MAX_SEED:
        raise ConfigError(f"lightning.seed must be a whole number from 0 to {MAX_SEED}, not '{seed!s:.40}'.")
    if not isinstance(config.lightning.scale_lr, bool):
        raise ConfigError(f"lightning.scale_lr must be true or false, not '{config.lightning.scale_lr}'.")
    params = config.model.get("params") or OmegaConf.create()
    if "personalization_config" in params and not params.get("ckpt_path"):
        if "ckpt_path" not in params:
            remedy = "--actual_resume FILE, or model.params.ckpt_path=null for random weights"
            raise ConfigError(f"Say which base model to learn against: {remedy}.")
        logger.warning("No base model is given (--actual_resume): embeddings are learned against random weights.")
    done = {f"{_MANAGER}.num_vectors_per_token": params.get("prospect_stages", 10)}
    if params.get("personalization_config") is not None:
        done["use_ema"] = True  # the average of frozen weights is they
    for key, (harmless, instead) in UNMET.items():
        value = OmegaConf.select(params, key)
        if value is not None and value not in (*harmless, done.get(key)):
            raise ConfigError(f"model.params.{key}: {value!s:.40} is not supported: {instead}; omit it.")


def _changed(before: DictConfig, now: DictConfig) -> dict[str, str]:
    """Return {key: "value before -> value now"}; a key that is not there counts as null, as does an empty section."""
    empty: tuple[object, ...] = (None, {}, [])
    old, new = flatten(before), flatten(now)
    pairs = {key: (old.get(key), new.get(key)) for key in old | new if key not in FREE}
    return {
        key: f"{old_value!r:.40} -> {new_value!r:.40}"
        for key, (old_value, new_value) in pairs.items()
        if old_value != new_value and not (old_value in empty and new_value in empty)
    }


def build(config: DictConfig, run: Run) -> tuple[DataModuleFromConfig, pl.LightningModule]:
    """Build the data and the model, from the configured seed.

    Raises:
        ValueError: they do not fit each other, or not the checkpoint to resume from.
    """
    pl.seed_everything(config.lightning.seed, verbose=False)
    data: DataModuleFromConfig = instantiate_from_config(config.data)
    module: Any = instantiate_from_config(config.model)
    module.seed = config.lightning.seed
    _check_samples(module, data)
    _check_captions(module, data)
    if run.checkpoint is not None:
        _check_resumable(module, run.checkpoint)
    return data, module


def _check_samples(module: Any, data: DataModuleFromConfig) -> None:
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
            wanted = f"'{caption}' and '{image}' (height, width, 3) in [-1, 1]"
            raise ValueError(f"The samples of {name} must hold {wanted}, not {', '.join(sample)} {shape}.")
        for size in shape[:2]:
            if size % unit:
                near = max(1, round(size / unit)) * unit
                raise ValueError(f"The {split} images' size {size} must be a multiple of {unit}; nearest: {near}.")


def _check_captions(module: Any, data: DataModuleFromConfig) -> None:
    """Raise `ConfigError` where the captions do not hold what is learned, or CatVersion's name no class.

    Warns of words in them that a small model never read.
    """
    manager = getattr(module, "embedding_manager", None)
    if manager is None or manager.learned is None:
        return
    sets = [d for d in data.datasets.values() if hasattr(d, "templates")]
    texts = [manager.initial_word, *(d.templates[0] for d in sets if len(d.templates) == 1)]
    warn_of_unknown(module.cond_stage_model.known_words, texts, manager.placeholder_strings)
    for template, dataset in [(text, d) for d in sets for text in d.templates]:
        if not is_prefix(manager.learned):
            _check_is_read(module, template.replace("{}", getattr(dataset, "placeholder_token", "*")))
        elif "{}" in template or not template.strip():
            raise ConfigError("CatVersion learns in captions that name the class: give --caption 'teddybear' or so.")


def _check_is_read(module: Any, caption: str) -> None:
    """Raise `ConfigError` where a caption has no learned token, or it is not read to its end."""
    asked = sum(slot < 0 for _, slots in module.prompt_reader().words_in(caption) for slot in slots)
    if not asked:
        name = module.embedding_manager.placeholder_strings[0]
        what = f"The caption {shown(caption)} has no place for the learned token, which is called '{name}'"
        raise ConfigError(f"{what}; write it there (in YAML: {{}}, and placeholder_token: '{name}').")
    if int((module.get_learned_conditioning(caption).slots[0] < 0).sum()) < asked:
        raise ConfigError(f"The caption {shown(caption)} is too long, its learned token is cut off; shorten it.")


def _check_resumable(module: pl.LightningModule, checkpoint: Path) -> None:
    """Raise `ValueError` unless the checkpoint to resume from holds what `module` trains."""
    saved = {key: x.shape for key, x in read_state_dict(checkpoint).items()}
    trained = {key for key, parameter in module.named_parameters() if parameter.requires_grad}
    for key, own in module.state_dict().items():
        if saved.get(key, None if key in trained else own.shape) != own.shape:
            found = tuple(saved[key]) if key in saved else "missing"
            misfit = f"'{checkpoint}' does not fit the configuration ({key} is {found}, not {tuple(own.shape)})"
            raise ValueError(f"{misfit}; resume with the run's own configuration, or start a new run.")


def save_configs(config: DictConfig, data: DataModuleFromConfig, module: pl.LightningModule, run: Run) -> None:
    """Write the run's configuration, and hashes of what it learns from, into its folder as `configs/<time>-….yaml`.

    Of a resumed run, what differs from the ones that are there is logged in one line.
    """
    hashes = _hashes(data, module)
    before: Any = next((read_yaml(path, "-r").content for path in run.saved("data")), None) or {}
    changes = run.changes[:LISTED]
    if more := len(run.changes) - len(changes):
        changes.append(f"{more} more keys")
    for key in ("images", "base_model"):
        if key in before and before[key] != hashes.get(key):
            changes.append(f"the content of the {key.replace('_', ' ')}")
    if changes:
        logger.warning("This run is resumed with changes: %s.", ", ".join(changes))
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


def _hashes(data: DataModuleFromConfig, module: pl.LightningModule) -> dict[str, str]:
    """Return what the files that a run learns from hold, as hashes: the training images, and the base model."""
    found = {}
    if paths := getattr(data.datasets["train"], "paths", None):
        digests = (hashlib.sha256(path.read_bytes()).digest() for path in paths)
        found["images"] = hashlib.sha256(b"".join(digests)).hexdigest()
    if base := getattr(module, "base_model", {}).get(FINGERPRINT):
        found["base_model"] = base
    return found
