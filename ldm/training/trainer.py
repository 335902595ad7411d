"""The Lightning trainer of a run, from `lightning:` of its configuration."""

from __future__ import annotations

import inspect
import logging
import math
import os
import re
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger
from pytorch_lightning.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler

from ldm.config import ConfigError, check_parameters, flatten, get_class, instantiate_from_config, resolved
from ldm.data.datamodule import DataModuleFromConfig
from ldm.training.callbacks import CheckpointWriter, ConfiguredRate, ImageLogger, SaveLast, StageLosses, StepBar
from ldm.training.runs import Run
from ldm.yaml_files import MISMATCHES

logger = logging.getLogger(__name__)

# Numbers that Lightning takes and then fails with, or silently does nothing.
LEAST = {
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
    "gradient_clip_val": 0,
    "log_every_n_steps": 0,
    "min_steps": 0,
    "min_epochs": 0,
    "num_sanity_val_steps": -1,
}
PROFILERS = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}
CASTS_ALL: dict[str, str] = {"bf16-true": "bfloat16", "16-true": "float16"}  # the whole module, buffers too
PATH_NAMES = ("dir", "path", "folder", "file", "root", "uri", "location")
RELATIVE_NAMES = ("sub_dir", "filename")  # of what lies in another of these


def build_trainer(
    config: DictConfig, run: Run, module: pl.LightningModule, data: DataModuleFromConfig, outside: bool = False
) -> pl.Trainer:
    """Build the trainer with loggers (TensorBoard, CSV) and callbacks (saving, images), and the YAML's own.

    The module gets its learning rate, which depends on the number of devices.

    Args:
        outside: the YAML's callbacks and loggers may write outside the log folder.

    Raises:
        ConfigError: a value of `lightning:` cannot be used.
    """
    lightning = resolved(config.lightning, "The section 'lightning'")
    if not outside:
        check_inside({f"lightning.{name}": lightning.get(name) for name in ("callbacks", "logger")}, run.folder)
    arguments = trainer_arguments(lightning.get("trainer") or {}, run)
    callbacks = _callbacks(lightning, run, module, bar=arguments.pop("enable_progress_bar", True))
    tensorboard = TensorBoardLogger(run.folder, name="", version="", sub_dir="tensorboard")
    # a folder of its own, since it empties one that it finds; written at once, for whoever watches the run
    csv = CSVLogger(run.folder, name="csv", version=run.started, flush_logs_every_n_steps=1)
    try:
        trainer = pl.Trainer(
            default_root_dir=run.folder,
            logger=[tensorboard, csv, *own_loggers(lightning.get("logger"), run)],
            callbacks=callbacks,
            enable_checkpointing=False,
            enable_progress_bar=False,  # `StepBar` is one
            plugins=CheckpointWriter(run.checkpoint),
            use_distributed_sampler=False,  # `RunningSampler` knows ranks
            **arguments,
        )
    except MISMATCHES as error:  # a value of a wrong type, or one that is given above; others Lightning explains
        raise ConfigError(f"lightning.trainer cannot be used: {str(error).partition(chr(10))[0]}; omit it.") from error
    if half := CASTS_ALL.get(trainer.precision):
        raise ConfigError(
            f"precision '{trainer.precision}' would round the noise schedule and what is learned; use "
            f"model.params.frozen_dtype={half}, or to train from scratch a mixed precision."
        )
    set_learning_rate(config, module, data, trainer)
    return trainer


def _callbacks(lightning: dict[str, Any], run: Run, module: Any, bar: bool) -> list[pl.Callback]:
    saving = (lightning.get("modelcheckpoint") or {}) | {"target": "ldm.training.callbacks.SaveLast"}
    saver: SaveLast = instantiate_from_config(saving, dirpath=run.checkpoints)
    callbacks: list[pl.Callback] = [saver.guard, ConfiguredRate(), StageLosses(), *([StepBar()] if bar else [])]
    for name, section in (lightning.get("callbacks") or {}).items():
        if section is None:  # switched off, by lightning.callbacks.NAME=null
            continue
        callback = instantiate_from_config(section)
        if not isinstance(callback, pl.Callback):
            raise ConfigError(f"lightning.callbacks.{name}: {section['target']} is no Lightning callback.")
        if isinstance(callback, ImageLogger) and hasattr(module, "log_images"):  # before the first images are due
            check_parameters(module.log_images, {"batch": None, **callback.log_images_kwargs})
        callbacks.append(callback)
    return [*callbacks, saver]


def trainer_arguments(section: Mapping[str, Any], run: Run) -> dict[str, Any]:
    """Check the values of `lightning.trainer`, and turn them into arguments of Lightning's trainer.

    Raises:
        ConfigError: a key is unknown, or its value has another type than Lightning documents.
    """
    arguments = choose_devices(section)
    check_parameters(pl.Trainer, arguments)
    hints = get_type_hints(pl.Trainer.__init__)
    for name, value in arguments.items():
        if not fits(value, hints[name]):
            kind = inspect.formatannotation(hints[name])
            raise ConfigError(f"lightning.trainer.{name} must be of the type {kind}, not {value!r:.40}.")
        if isinstance(value, int | float) and not LEAST.get(name, -math.inf) <= value < math.inf:
            raise ConfigError(f"lightning.trainer.{name} must be a number of at least {LEAST.get(name)}, not {value}.")
    profiler = str(arguments.get("profiler")).lower()
    if profiler in PROFILERS:  # by its name alone, Lightning would only log the result, on a level that is not shown
        arguments["profiler"] = PROFILERS[profiler](dirpath=run.folder, filename="profile")
    return arguments


def fits(value: object, hint: Any) -> bool:
    """Return whether a value from a YAML file is of an annotated type; a bool is no number, and an int is a float."""
    kind = get_origin(hint) or hint
    if kind in (Union, types.UnionType):
        return any(fits(value, option) for option in get_args(hint))
    if kind is Literal:
        return any(value == option and type(value) is type(option) for option in get_args(hint))
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, int | float)
    return isinstance(value, kind) if isinstance(kind, type) else False


def choose_devices(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Translate `gpus: 0,` (the flag `--gpus`) into Lightning's accelerator and devices.

    A list of numbers ends with or has a comma; a bare number counts: `2` is 0 and 1, `0` the CPU, `-1` all. Without a
    usable GPU the run falls back to the CPU, which is logged once.

    Raises:
        ConfigError: not a list of device numbers.
    """
    chosen = {key: value for key, value in trainer.items() if key != "gpus"}
    gpus = "" if trainer.get("gpus") is None else str(trainer["gpus"]).replace(" ", "")
    if not re.fullmatch(r"(-1|\d+(,\d+)*,?)?", gpus):
        raise ConfigError(f"--gpus takes device numbers such as '0,' or '0,1', not '{gpus:.40}'.")
    cpu = {"accelerator": "cpu", "devices": 1}
    if "accelerator" in chosen:
        return chosen
    if os.environ.get("PROSPECT_DEVICE") == "cpu":
        return cpu | chosen
    if not gpus:
        return chosen
    if gpus == "0":
        return chosen | cpu
    if torch.cuda.is_available():
        return {**chosen, "accelerator": "gpu", "devices": gpus}
    if torch.backends.mps.is_available():
        return {**chosen, "accelerator": "mps", "devices": 1}
    logger.info("No usable GPU here; --gpus %s falls back to the CPU.", gpus)
    return chosen | cpu


def check_inside(sections: dict[str, Any], folder: Path) -> None:
    """Raise `ConfigError` for a path in `sections` that leads out of the log folder: a file may be a stranger's."""
    for name, value in flatten(sections).items():
        if not isinstance(value, str):
            continue
        *_, last = [part for part in name.split(".") if not part.isdecimal()]
        path = Path(value.removeprefix("file:")).expanduser()
        is_path = any(word in last for word in PATH_NAMES) and last not in RELATIVE_NAMES
        from_here = is_path and "://" not in value
        if not (from_here or path.is_absolute() or ".." in path.parts):
            continue
        if not (path if from_here else folder / path).resolve().is_relative_to(folder.resolve()):
            remedy = "omit it, or use --allow_outside if you trust the configuration"
            raise ConfigError(f"{name}: '{value:.80}' is outside the log folder '{folder}'; {remedy}.")


def own_loggers(section: Mapping[str, Any] | None, run: Run) -> list[Logger]:
    """Build the logger of the YAML's `lightning.logger`; without a place or name of its own it gets the run's.

    Raises:
        ConfigError: it is no logger, or has other parameters.
    """
    if not section:
        return []
    known = inspect.signature(get_class(section["target"])).parameters if "target" in section else {}
    given: dict[str, object] = {"save_dir": run.folder} if "save_dir" in known else {}
    if "name" in known and known["name"].default is None:
        given["name"] = run.folder.name
    found = instantiate_from_config({**section, "params": given | (section.get("params") or {})})
    if not isinstance(found, Logger):
        raise ConfigError(f"lightning.logger: {section['target']} is no logger; see pytorch_lightning.loggers.")
    return [found]


def set_learning_rate(config: DictConfig, module: Any, data: DataModuleFromConfig, trainer: pl.Trainer) -> None:
    """Give the module its learning rate and log how it came about, in one line."""
    try:
        base = float(config.model.base_learning_rate)
    except (TypeError, ValueError):
        base = math.nan
    if not 0 < base < math.inf:
        given = config.model.base_learning_rate
        raise ConfigError(f"base_learning_rate must be a number above 0 and finite, not '{given!s:.40}'.")
    if not config.lightning.scale_lr:
        module.learning_rate = base
        logger.info("Learning rate %.2e (--scale_lr false)", base)
        return
    accumulate, world, batch = trainer.accumulate_grad_batches, trainer.world_size, data.batch_size
    module.learning_rate = base * accumulate * world * batch
    logger.info(
        "Learning rate %.2e = %d (accumulate_grad_batches) x %d (devices) x %d (batch size) x %.2e (base)",
        *(module.learning_rate, accumulate, world, batch, base),
    )
