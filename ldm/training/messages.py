"""Messages of a training run: its log lines, its errors in one sentence, and how to use what it leaves."""

from __future__ import annotations

import logging
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning_fabric
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from ldm.embeddings import load_concept
from ldm.files.shipped import MODELS, command, name_of
from ldm.training.callbacks import SaveLast
from ldm.training.runs import EMBEDDINGS, Run, resume_command

logger = logging.getLogger(__name__)

LIGHTNING = tuple(Path(package.__file__).parent for package in (pl, lightning_fabric) if package.__file__)
LESS_MEMORY = (
    "model.params.frozen_dtype=float16 (on a CPU: bfloat16), model.params.unet_config.params.use_checkpoint=true, a "
    "smaller data.params.train.params.size or data.params.batch_size"
)


def quieten_libraries() -> None:
    """Show no messages of libraries about themselves."""
    for noisy in ("pytorch_lightning", "lightning", "lightning.pytorch", "lightning.fabric", "lightning_fabric"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    for message in (
        ".*is deprecated, use `isinstance",  # inside Lightning
        ".*module\\(s\\) in eval mode",  # frozen parts are meant to be
        ".*resuming from a checkpoint that ended before the epoch",  # `RunningSampler` takes the order up
        ".*does not have many workers",  # images are in memory
        "Total length of `list` across ranks is zero",  # no validation set
        "You have overridden `on_before_batch_transfer`",  # on purpose
    ):
        warnings.filterwarnings("ignore", message)


@contextmanager
def quiet_threads(debug: bool = False) -> Iterator[None]:
    """Keep threads from showing the trace of an `OSError` that they hand on, as TensorBoard's writing thread does."""
    shown = threading.excepthook
    if not debug:
        threading.excepthook = lambda args: None if isinstance(args.exc_value, OSError) else shown(args)
    try:
        yield
    finally:
        threading.excepthook = shown


def sentence(error: Exception) -> str | None:
    """Return the sentence of an error that the user can mend; None for a defect, which shows its trace."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
        return f"The memory is not enough ({str(error).partition(chr(10))[0]:.200}); these help: {LESS_MEMORY}."
    mendable = isinstance(error, ValueError | OSError | ImportError | MisconfigurationException)
    return str(error) if mendable or _is_lightnings(error) else None


def _is_lightnings(error: Exception) -> bool:
    """Return whether Lightning itself raised a `RuntimeError`, to refuse something: no other code is below it."""
    innermost = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)[-1:]]
    return isinstance(error, RuntimeError) and any(p.is_relative_to(folder) for p in innermost for folder in LIGHTNING)


def report(run: Run, trainer: pl.Trainer, config: DictConfig) -> int:
    """Log where the results are and how to use them, or how to resume; returns the exit code."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    saver = next(callback for callback in callbacks if isinstance(callback, SaveLast))
    if saver.stopped_by is not None:
        logger.info("Stopped and saved at step %d; resume with: %s", trainer.global_step, resume_command(run.folder))
        return 128 + saver.stopped_by
    if not trainer.is_global_zero:
        return 0
    results = sorted(path.name for path in run.checkpoints.iterdir())
    logger.info("Step %d reached; %s: %s", trainer.global_step, run.checkpoints, ", ".join(results))
    if profiles := sorted(run.folder.glob("*profile*.txt")):
        logger.info("Profile: %s", ", ".join(map(str, profiles)))
    logger.info("More steps: %s --max_steps N", resume_command(run.folder))
    if (run.checkpoints / EMBEDDINGS).is_file() and config.model.params.get("ckpt_path"):
        logger.info("Generate: %s", _generate_command(run, config))
    return 0


def _generate_command(run: Run, config: DictConfig) -> str:
    (settings,) = run.saved("project")
    file = run.checkpoints / EMBEDDINGS
    metadata = load_concept(file).metadata
    placeholder = metadata["placeholder"]
    concept = str(file) if placeholder == "*" else f"{placeholder}={file}"
    captions = metadata.get("captions", "").splitlines()
    classes = (caption for caption in captions if "{}" not in caption and placeholder not in caption)  # CatVersion's
    prompt = next(classes, f"a {placeholder}")
    ckpt = name_of(config.model.params.ckpt_path)
    base = [] if ckpt == MODELS["demo"].ckpt else ["--ckpt", ckpt]
    words = ["--config", str(settings), *base, "--concept", concept, "--prompt", prompt]
    return command("scripts/txt2img.py", "generate", *words)
