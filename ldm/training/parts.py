"""Training the parts of a model before the model itself, as in one run: a configuration's section `parts:`.

    parts:
      first_stage_ckpt: configs/demo/autoencoder.yaml

says that where `model.params.first_stage_ckpt` is not given, this configuration trains it, in a folder of the run.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence

import pytorch_lightning as pl
from omegaconf import DictConfig
from pytorch_lightning.utilities.seed import isolate_rng

from ldm.config import ConfigError, check_generates, load_config, nearest
from ldm.training.callbacks import LAST
from ldm.training.runs import Run

logger = logging.getLogger(__name__)

KNOWN = ("first_stage_ckpt", "cond_stage_ckpt")


def missing_parts(config: DictConfig) -> dict[str, str]:
    """{parameter of the model: configuration that trains it} of `parts:`, without those that are given.

    Raises:
        ConfigError: a part is no parameter for a checkpoint, or its configuration cannot be read.
    """
    parts = config.get("parts") or {}
    if not parts:
        return {}
    check_generates(config)
    params = config.model.params
    if params.get("ckpt_path"):  # of a whole model
        return {}
    for key, base in parts.items():
        if key not in KNOWN:
            raise ConfigError(f"parts: '{key}' is no part that can be trained first{nearest(key, KNOWN)}")
        load_config(base, flag=f"parts.{key}")
    return {key: base for key, base in parts.items() if not params.get(key)}


def check_alone(parts: dict[str, str], trainer: pl.Trainer) -> None:
    """Raise `ConfigError` where several processes would each train the parts."""
    if parts and trainer.world_size > 1:
        given = " ".join(f"model.params.{key}=FILE" for key in parts)
        raise ConfigError(
            f"Parts are trained first on one device only: use --devices 1, or train {' and '.join(parts.values())} "
            f"in runs of their own and give {given}."
        )


def train_parts(
    parts: dict[str, str],
    config: DictConfig,
    options: argparse.Namespace,
    run: Run,
    train: Callable[[Sequence[str]], int],
) -> int:
    """Train every part, or go on with it, and put the checkpoints into `config`; the exit code of the first to stop.

    Args:
        train: `main.main`.
    """
    trainer = config.lightning.get("trainer") or {}
    handed_on = {"seed": config.lightning.seed, "scale_lr": config.lightning.scale_lr, "debug": options.debug}
    handed_on |= {"devices": 1, "gpus": trainer.get("gpus"), "accelerator": trainer.get("accelerator")}
    handed_on |= {name: options.trainer.get(name) for name in ("precision", "deterministic", "enable_progress_bar")}
    flags = [text for name, value in handed_on.items() if value is not None for text in (f"--{name}", str(value))]
    for number, (key, base) in enumerate(parts.items(), 1):
        folder = run.folder / key.removesuffix("_ckpt")
        logger.info("Part %d of %d, trained before the model: %s", number, len(parts), base)
        begun = any((folder / "configs").glob("*-lightning.yaml"))
        with isolate_rng():
            code = train([*(("-r", str(folder)) if begun else ("--base", base, "-p", str(folder))), "-t", *flags])
        if code:
            logger.info("To go on with all of it: %s", run.resume_command)
            return code
        config.model.params[key] = str(folder / "checkpoints" / LAST)
    return 0
