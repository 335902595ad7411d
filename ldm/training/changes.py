"""Compare a resumed run with its own configuration and data: changes are logged in one line, or refused."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import pytorch_lightning as pl
from omegaconf import DictConfig

from ldm.config import ConfigError, flatten, load_config
from ldm.data.datamodule import DataModuleFromConfig
from ldm.files.base_model import FINGERPRINT
from ldm.training.runs import Run
from ldm.yaml_files import read_yaml

logger = logging.getLogger(__name__)

# Keys that make no other run of it.
FREE = tuple(
    f"lightning.trainer.{name}"
    for name in ("max_steps", "max_epochs", "max_time", "enable_progress_bar", "profiler", "log_every_n_steps")
)
# Keys whose value a checkpoint brings with it -> what to call them.
_MANAGER = "model.params.personalization_config.params"
FIXED = {
    "lightning.seed": "--seed",
    "model.params.embedding_manager_ckpt": "--embedding_manager_ckpt",
    "model.params.prospect_stages": "model.params.prospect_stages",
    f"{_MANAGER}.initializer_words": "--init_word",
    f"{_MANAGER}.generator": f"{_MANAGER}.generator",
    f"{_MANAGER}.method": f"{_MANAGER}.method",
    f"{_MANAGER}.method_params": f"{_MANAGER}.method_params",
}
LISTED = 8


def run_config(run: Run, resolvers: bool = False) -> DictConfig:
    """Return the configuration that a run was started with, or resumed with the last time."""
    return load_config(*run.saved("project", "lightning"), flag="-r", resolvers=resolvers)


def differing(before: DictConfig, now: DictConfig) -> dict[str, tuple[object, object]]:
    """Return {key: (value before, value now)}; a key that is not there counts as null."""
    old, new = flatten(before), flatten(now)
    keys = [*old, *(key for key in new if key not in old)]
    pairs = {key: (old.get(key), new.get(key)) for key in keys if key not in FREE}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1] and not _empty(pair)}


def _empty(pair: tuple[object, object]) -> bool:
    return all(value is None or value == {} or value == [] for value in pair)


def check_applies(run: Run, before: DictConfig, now: DictConfig) -> None:
    """Raise `ConfigError` for a changed value that cannot apply, since the checkpoint brings its own."""
    if run.checkpoint is None:
        return
    for key, (old, new) in differing(before, now).items():
        for fixed, name in FIXED.items():
            if key == fixed or key.startswith(f"{fixed}."):
                raise ConfigError(
                    f"{name} does not apply to a resumed run ({old!r:.40} -> {new!r:.40}): what it decides is in "
                    f"'{run.checkpoint}'; omit it, or start a new run."
                )


def hashes_of(data: DataModuleFromConfig, module: pl.LightningModule) -> dict[str, str]:
    """Return what the files that a run learns from hold, as hashes: the training images, and the base model."""
    found = {}
    if paths := getattr(data.datasets["train"], "paths", None):
        found["images"] = _hash(paths)
    if base := getattr(module, "base_model", {}).get(FINGERPRINT):
        found["base_model"] = base
    return found


def _hash(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def log_changes(run: Run, before: DictConfig, now: DictConfig, hashes: dict[str, str]) -> None:
    """Log one line with what differs from the run's own configuration and data."""
    changes = [f"{key} ({old!r:.40} -> {new!r:.40})" for key, (old, new) in differing(before, now).items()]
    if len(changes) > LISTED:
        changes[LISTED:] = [f"{len(changes) - LISTED} more keys"]
    names = {"images": "the content of the images", "base_model": "the content of the base model"}
    known = _saved_hashes(run)
    changes += [names[key] for key in names if key in known and known[key] != hashes.get(key)]
    if changes:
        logger.warning("This run is resumed with changes: %s.", ", ".join(changes))


def _saved_hashes(run: Run) -> dict[str, str]:
    for path in run.saved("data"):
        content = read_yaml(path, "-r").content
        return content if isinstance(content, dict) else {}
    return {}
