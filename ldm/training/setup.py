"""The parts of a training run that `main.py` puts together: folder, configuration, model, trainer."""

from __future__ import annotations

import argparse
import inspect
import logging
import math
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger

from ldm.cli.train import MAX_SEED, translate_gpus
from ldm.config import ConfigError, check_parameters, get_class, instantiate_from_config, load_config, nearest
from ldm.files.writing import replacing, writing_to
from ldm.training.callbacks import CheckpointWriter, ConfiguredRate, EmbeddingSaver, SaveLast
from ldm.training.checks import check_pictures
from ldm.training.finite import FiniteGuard
from ldm.training.runs import Run, check_start

logger = logging.getLogger(__name__)

DEFAULT_SAVE_EVERY = 500
CHECKPOINT_KEYS = ("every_n_train_steps", "monitor", "save_top_k", "save_last", "dirpath", "filename", "verbose")
LIGHTNING_KEYS = ("trainer", "callbacks", "modelcheckpoint", "logger", "seed", "scale_lr")
DEFAULT_CONFIG = {
    "lightning": {
        "seed": 23,
        "scale_lr": True,
        "trainer": {"num_sanity_val_steps": 0, "log_every_n_steps": 10, "enable_model_summary": False},
    }
}


def build_config(options: argparse.Namespace, run: Run) -> DictConfig:
    """The configurations of the command line (and of the resumed run), with its flags put in."""
    saved = [sorted(run.configs.glob(f"*-{kind}.yaml"))[-1:] for kind in ("project", "lightning") if run.resumed]
    config = load_config(*sum(saved, []), *options.base, overrides=options.overrides)
    config = OmegaConf.merge(DEFAULT_CONFIG, config)
    for section in ("model", "data", "model.base_learning_rate", "data.params"):
        if OmegaConf.select(config, section) is None:
            raise ConfigError(f"The configuration does not say '{section}:'; see configs/ for complete ones.")
    for key in config.lightning or ():
        if key not in LIGHTNING_KEYS:
            raise ConfigError(f"Unknown key 'lightning.{key}'{nearest(key, LIGHTNING_KEYS)}")
    for name in ("seed", "scale_lr"):
        if getattr(options, name) is not None:
            config.lightning[name] = getattr(options, name)
    if options.gpus is not None or "devices" in options.trainer:  # what was saved gives way to either
        OmegaConf.update(config, "lightning.trainer.gpus", options.gpus)
    check_seed(config.lightning.seed)
    params = config.model.get("params") or {}
    if OmegaConf.select(config, "data.params.train") is None:
        raise ConfigError("The configuration does not say 'data.params.train:', the pictures to learn from.")
    if options.data_root:
        for split in ("train", "validation"):
            if config.data.params.get(split):
                pictures = {"data_root": options.data_root, "seed": config.lightning.seed}
                if options.placeholder_tokens:
                    pictures["placeholder_token"] = options.placeholder_tokens[0]
                OmegaConf.update(config, f"data.params.{split}.params", pictures)
    if options.actual_resume:
        OmegaConf.update(config, "model.params.ckpt_path", options.actual_resume)
    manager = "model.params.personalization_config.params"
    flags = {
        "--embedding_manager_ckpt": (options.embedding_manager_ckpt, "model.params.embedding_manager_ckpt"),
        "--placeholder_tokens": (options.placeholder_tokens, f"{manager}.placeholder_strings"),
        "--init_word": (None if options.init_word is None else [options.init_word], f"{manager}.initializer_words"),
    }
    for flag, (value, key) in flags.items():
        if value is None:
            continue
        if "personalization_config" not in params:
            raise ConfigError(f"{flag} needs a configuration that learns embeddings (personalization_config).")
        OmegaConf.update(config, key, value)
    if options.embedding_manager_ckpt:
        check_start(options.embedding_manager_ckpt)
    for name, value in options.trainer.items():
        OmegaConf.update(config, f"lightning.trainer.{name}", value)
    pictures = config.data.params.train
    if str(pictures.get("target")).endswith("PersonalizedBase") and not OmegaConf.select(pictures, "params.data_root"):
        raise ConfigError("Say which pictures to learn from: --data_root, a folder with pictures or one picture.")
    if "personalization_config" in params and not params.get("ckpt_path"):
        if "ckpt_path" not in params:
            raise ConfigError(
                "Say which base model to learn against: --actual_resume FILE, such as models/sd/sd-v1-4.ckpt "
                "(model.params.ckpt_path=null tries the machinery on random weights)."
            )
        logger.warning("No base model is given (--actual_resume): embeddings are learned against random weights.")
    return config


def check_seed(seed: object) -> None:
    """Raise `ConfigError` for a `lightning.seed` that is no seed."""
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= MAX_SEED:
        raise ConfigError(f"lightning.seed must be a whole number from 0 to {MAX_SEED}, not '{seed}'.")


def choose_devices(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Translate `gpus: 0,` (the flag `--gpus`) into Lightning's accelerator and devices.

    With no usable GPU the run says so once and uses the CPU.
    """
    chosen = {key: value for key, value in trainer.items() if key != "gpus"}
    gpus = trainer.get("gpus")
    numbers = translate_gpus(str(gpus) if gpus is not None else None)
    if numbers is None or "accelerator" in chosen:
        return chosen
    if numbers == []:
        return {**chosen, "accelerator": "cpu", "devices": 1}
    if torch.cuda.is_available():
        return {**chosen, "accelerator": "gpu", "devices": numbers}
    if torch.backends.mps.is_available():
        return {**chosen, "accelerator": "mps", "devices": 1}
    logger.info("No usable GPU here; --gpus %s is answered with the CPU.", gpus)
    return {**chosen, "accelerator": "cpu", "devices": 1}


def build_trainer(config: DictConfig, run: Run, module: pl.LightningModule) -> pl.Trainer:
    """The Lightning trainer with loggers (TensorBoard, CSV) and callbacks (saving, pictures), and the YAML's own."""
    lightning = OmegaConf.to_container(config.lightning, resolve=True)
    trainer = lightning.get("trainer") or {}
    trainer = choose_devices(trainer)
    devices = str(trainer.get("devices", ""))
    if devices.isdigit():
        trainer["devices"] = int(devices)
    save_every = saving_interval(lightning.get("modelcheckpoint") or {})
    guard = FiniteGuard(save_every)
    callbacks: list[pl.Callback] = [guard, ConfiguredRate()]
    if trainer.get("enable_progress_bar", True):
        callbacks.append(ProgressBar())
    if getattr(module, "embedding_manager", None) is not None:
        callbacks.append(EmbeddingSaver(run.checkpoints, save_every))
    for name, callback in (lightning.get("callbacks") or {}).items():
        if not isinstance(callback, Mapping) or "target" not in callback:
            raise ConfigError(f"lightning.callbacks.{name} must be a section with a `target:`.")
        callbacks.append(instantiate_from_config(callback))
    check_pictures(callbacks, module)
    callbacks.append(SaveLast(run.checkpoints, save_every, guard))
    check_parameters(pl.Trainer, trainer)
    if trainer.get("accumulate_grad_batches", 1) < 1:
        raise ConfigError("accumulate_grad_batches must be at least 1.")
    tensorboard = TensorBoardLogger(run.folder, name="", version="", sub_dir="tensorboard")
    csv = CSVLogger(run.folder, name="csv", version=run.started)  # the logger empties a folder it finds
    # no distributed sampler: `RunningSampler` knows ranks
    trainer = {"plugins": CheckpointWriter(run.checkpoint), "use_distributed_sampler": False, **trainer}
    try:
        return pl.Trainer(
            default_root_dir=run.folder,
            logger=[tensorboard, csv, *own_loggers(lightning.get("logger"), run)],
            callbacks=callbacks,
            enable_checkpointing=False,
            **trainer,
        )
    except (TypeError, KeyError) as error:  # a value of a wrong type; others Lightning explains itself
        raise ConfigError(f"lightning.trainer cannot be used: {str(error).partition(chr(10))[0]}") from error


def own_loggers(section: Mapping[str, Any] | None, run: Run) -> list[Logger]:
    """The logger of the YAML's `lightning.logger`, if any; without a place or name of its own it gets the run's.

    Raises:
        ConfigError: it is no logger, has other parameters, or needs a package that is not installed.
    """
    if not section:
        return []
    if "target" not in section:
        raise ConfigError("lightning.logger must be a section with a `target:`.")
    known = inspect.signature(get_class(section["target"])).parameters
    given = {"save_dir": run.folder} if "save_dir" in known else {}
    if "name" in known and known["name"].default is None:
        given["name"] = run.folder.name
    try:
        found = instantiate_from_config({**section, "params": given | (section.get("params") or {})})
    except ImportError as error:
        raise ConfigError(f"lightning.logger: {section['target']} needs a package that is missing: {error}") from error
    if not isinstance(found, Logger):
        raise ConfigError(f"lightning.logger: {section['target']} is no logger; see pytorch_lightning.loggers.")
    return [found]


def saving_interval(modelcheckpoint: Mapping[str, Any]) -> int:
    """How many steps lie between two savings, from the YAML's `lightning.modelcheckpoint`.

    Only `params.every_n_train_steps` means something here: what is saved, and where, is always the same.
    """
    params = modelcheckpoint.get("params") or {}
    for key in modelcheckpoint:
        if key not in ("target", "params"):
            raise ConfigError(f"Unknown key 'lightning.modelcheckpoint.{key}'{nearest(key, ('target', 'params'))}")
    for key in params:
        if key not in CHECKPOINT_KEYS:
            where = f"lightning.modelcheckpoint.params.{key}"
            raise ConfigError(f"Unknown key '{where}'{nearest(key, CHECKPOINT_KEYS)}")
        if key != CHECKPOINT_KEYS[0]:
            logger.info("modelcheckpoint: '%s' is accepted and not used: last.ckpt is always kept", key)
    interval = params.get(CHECKPOINT_KEYS[0], DEFAULT_SAVE_EVERY)
    if not isinstance(interval, int) or interval < 1:
        raise ConfigError(f"{CHECKPOINT_KEYS[0]} must be a number of steps, at least 1, not '{interval}'.")
    return interval


class ProgressBar(TQDMProgressBar):
    """Lightning's, with the loss and without the loggers' version number.

    Showing a number waits for the device, so beside a CPU the bar moves only as often as the logs are written.
    """

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, module, stage)
        if trainer.strategy.root_device.type != "cpu":
            self._refresh_rate = max(self._refresh_rate, trainer.log_every_n_steps)

    def get_metrics(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
        metrics = {key: value for key, value in super().get_metrics(trainer, module).items() if key != "v_num"}
        loss = trainer.callback_metrics.get("loss")
        return metrics if loss is None else {"loss": f"{loss.item():.3g}", **metrics}


def set_learning_rate(config: DictConfig, module: pl.LightningModule, data: Any, trainer: pl.Trainer) -> None:
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


def save_configs(config: DictConfig, run: Run) -> None:
    """Write the run's configuration into its folder, as `<time>-project.yaml` and `<time>-lightning.yaml`."""
    with writing_to(run.folder):
        for folder in (run.checkpoints, run.configs):
            folder.mkdir(parents=True, exist_ok=True)
    project = OmegaConf.masked_copy(config, [key for key in config if key != "lightning"])
    lightning = OmegaConf.create({"lightning": config.lightning})
    for kind, part in {"project": project, "lightning": lightning}.items():
        with replacing(run.configs / f"{run.started}-{kind}.yaml") as temporary:
            OmegaConf.save(part, temporary)


def report(run: Run, trainer: pl.Trainer) -> int:
    """Say where the results are, or how to go on after an interruption; returns the exit code."""
    saver = next(callback for callback in trainer.callbacks if isinstance(callback, SaveLast))
    if saver.stopped_by is not None:
        logger.info("Stopped and saved at step %d; go on with: %s", trainer.global_step, run.resume_command)
        return 128 + saver.stopped_by
    if not trainer.is_global_zero:
        return 0
    results = sorted(path.name for path in run.checkpoints.iterdir())
    logger.info("Step %d reached; %s: %s", trainer.global_step, run.checkpoints, ", ".join(results))
    logger.info("More steps: %s --max_steps N", run.resume_command)
    return 0
