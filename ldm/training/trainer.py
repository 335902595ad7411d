"""The Lightning trainer of a run, from `lightning:` of its configuration."""

from __future__ import annotations

import inspect
import logging
import math
import os
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger
from pytorch_lightning.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler

from ldm.config import ConfigError, check_parameters, get_class, instantiate_from_config, resolved
from ldm.data.datamodule import DataModuleFromConfig
from ldm.training.callbacks import CheckpointWriter, ConfiguredRate, EmbeddingSaver, SaveLast, StageLosses, StepBar
from ldm.training.checks import check_images, check_precision
from ldm.training.finite import FiniteGuard
from ldm.training.runs import Run
from ldm.yaml_files import MISMATCHES

logger = logging.getLogger(__name__)

OWN = ("logger", "callbacks", "enable_checkpointing", "default_root_dir", "plugins", "use_distributed_sampler")
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
        for section in ("callbacks", "logger"):
            check_inside(lightning.get(section), run.folder, f"lightning.{section}")
    arguments = trainer_arguments(lightning.get("trainer") or {}, run)
    callbacks = _callbacks(lightning, run, module, arguments.get("enable_progress_bar", True))
    tensorboard = TensorBoardLogger(run.folder, name="", version="", sub_dir="tensorboard")
    # a folder of its own, since it empties one that it finds; written at once, for whoever watches the run
    csv = CSVLogger(run.folder, name="csv", version=run.started, flush_logs_every_n_steps=1)
    try:
        trainer = pl.Trainer(
            default_root_dir=run.folder,
            logger=[tensorboard, csv, *own_loggers(lightning.get("logger"), run)],
            callbacks=callbacks,
            enable_checkpointing=False,
            plugins=CheckpointWriter(run.checkpoint),
            use_distributed_sampler=False,  # `RunningSampler` knows ranks
            **arguments,
        )
    except MISMATCHES as error:  # a value of a wrong type; others Lightning explains itself
        raise ConfigError(f"lightning.trainer cannot be used: {str(error).partition(chr(10))[0]}") from error
    check_precision(trainer)
    set_learning_rate(config, module, data, trainer)
    return trainer


def _callbacks(lightning: dict[str, Any], run: Run, module: pl.LightningModule, bar: bool) -> list[pl.Callback]:
    saving = (lightning.get("modelcheckpoint") or {}) | {"target": "ldm.training.callbacks.SaveLast"}
    saver: SaveLast = instantiate_from_config(saving, dirpath=run.checkpoints)
    saver.guard = FiniteGuard(saver.every_n_train_steps)
    callbacks: list[pl.Callback] = [saver.guard, ConfiguredRate(), StageLosses()]
    if bar:
        callbacks.append(StepBar())
    if getattr(module, "embedding_manager", None) is not None:
        callbacks.append(EmbeddingSaver(run.checkpoints, saver.every_n_train_steps))
    for name, section in (lightning.get("callbacks") or {}).items():
        if section is None:  # switched off, by lightning.callbacks.NAME=null
            continue
        callback = instantiate_from_config(section)
        if not isinstance(callback, pl.Callback):
            raise ConfigError(f"lightning.callbacks.{name}: {section['target']} is no Lightning callback.")
        callbacks.append(callback)
    check_images(callbacks, module)
    return [*callbacks, saver]


def trainer_arguments(section: Mapping[str, Any], run: Run) -> dict[str, Any]:
    """Check the values of `lightning.trainer`, and turn them into arguments of Lightning's trainer.

    Raises:
        ConfigError: a key is unknown or not free to choose, or its value has another type than Lightning documents.
    """
    arguments = choose_devices(section)
    for name in OWN:
        if name in arguments:
            raise ConfigError(f"lightning.trainer.{name} is what main.py decides; omit it.")
    check_parameters(pl.Trainer, arguments)
    hints = get_type_hints(pl.Trainer.__init__)
    for name, value in arguments.items():
        if not fits(value, hints[name]):
            kind = inspect.formatannotation(hints[name])
            raise ConfigError(f"lightning.trainer.{name} must be of the type {kind}, not {value!r:.40}.")
        if isinstance(value, int | float) and not LEAST.get(name, -math.inf) <= value < math.inf:
            raise ConfigError(f"lightning.trainer.{name} must be a number of at least {LEAST.get(name)}, not {value}.")
    if str(arguments.get("devices", "")).isdigit():
        arguments["devices"] = int(arguments["devices"])
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


def translate_gpus(gpus: str | None) -> list[int] | int | None:
    """Translate `0,` to [0], `0,1` to [0, 1]; a bare number counts: `2` is [0, 1], `0` [], `-1` -1 (all); '' is None.

    Raises:
        ConfigError: not a list of device numbers.
    """
    if not gpus:
        return None
    parts = [part for part in gpus.split(",") if part.strip()]
    try:
        numbers = [int(part) for part in parts]
    except ValueError:
        raise ConfigError(f"--gpus takes device numbers such as '0,' or '0,1', not '{gpus:.40}'.") from None
    if "," in gpus:
        return numbers
    return -1 if numbers[0] == -1 else list(range(numbers[0]))


def choose_devices(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Translate `gpus: 0,` (the flag `--gpus`) into Lightning's accelerator and devices.

    Without a usable GPU the run falls back to the CPU, which is logged once.
    """
    chosen = {key: value for key, value in trainer.items() if key != "gpus"}
    gpus = trainer.get("gpus")
    numbers = translate_gpus(str(gpus) if gpus is not None else None)
    if os.environ.get("PROSPECT_DEVICE") == "cpu" and "accelerator" not in chosen:
        return {**chosen, "accelerator": "cpu", "devices": chosen.get("devices", 1)}
    if numbers is None or "accelerator" in chosen:
        return chosen
    if numbers == []:
        return {**chosen, "accelerator": "cpu", "devices": 1}
    if torch.cuda.is_available():
        return {**chosen, "accelerator": "gpu", "devices": numbers}
    if torch.backends.mps.is_available():
        return {**chosen, "accelerator": "mps", "devices": 1}
    logger.info("No usable GPU here; --gpus %s falls back to the CPU.", gpus)
    return {**chosen, "accelerator": "cpu", "devices": 1}


def check_inside(section: object, folder: Path, key: str) -> None:
    """Raise `ConfigError` for a path in `section` that leads out of the log folder: a file may be a stranger's."""
    for name, value in _texts(section, key):
        *_, last = [part for part in name.split(".") if not part.isdecimal()]
        path = Path(value.removeprefix("file:")).expanduser()
        is_path = any(word in last for word in PATH_NAMES) and last not in RELATIVE_NAMES
        from_here = is_path and "://" not in value
        if not (from_here or path.is_absolute() or ".." in path.parts):
            continue
        place = (path if from_here else folder / path).resolve()
        if not place.is_relative_to(folder.resolve()):
            raise ConfigError(
                f"{name}: '{value:.80}' is outside the log folder '{folder}'; omit it, or use --allow_outside if you "
                "trust the configuration."
            )


def _texts(value: object, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping | list):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for name, inner in items:
            yield from _texts(inner, f"{key}.{name}")


def own_loggers(section: Mapping[str, Any] | None, run: Run) -> list[Logger]:
    """Build the logger of the YAML's `lightning.logger`; without a place or name of its own it gets the run's.

    Raises:
        ConfigError: it is no logger, has other parameters, or needs a package that is not installed.
    """
    if not section:
        return []
    if "target" not in section:
        raise ConfigError("lightning.logger must be a section with a `target:`.")
    known = inspect.signature(get_class(section["target"])).parameters
    given: dict[str, object] = {"save_dir": run.folder} if "save_dir" in known else {}
    if "name" in known and known["name"].default is None:
        given["name"] = run.folder.name
    try:
        found = instantiate_from_config({**section, "params": given | (section.get("params") or {})})
    except ImportError as error:
        raise ConfigError(f"lightning.logger: {section['target']} needs a package that is missing: {error}") from error
    if not isinstance(found, Logger):
        raise ConfigError(f"lightning.logger: {section['target']} is no logger; see pytorch_lightning.loggers.")
    return [found]


def set_learning_rate(config: DictConfig, module: Any, data: DataModuleFromConfig, trainer: pl.Trainer) -> None:
    """Give the module its learning rate and log how it came about, in one line."""
    try:
        base = float(config.model.base_learning_rate)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"base_learning_rate must be a number, not '{config.model.base_learning_rate}'.") from error
    if not 0 < base < math.inf:
        raise ConfigError(f"base_learning_rate must be more than 0 and finite, not {base}.")
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
