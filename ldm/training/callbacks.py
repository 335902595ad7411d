"""Lightning callbacks: checkpoints, embeddings, averaged weights, image logging and the progress bar."""

from __future__ import annotations

import io
import math
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import WeightAveraging
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from ldm.conditioning.stages import stage_of
from ldm.files.images import make_grid, to_pil
from ldm.files.writing import replacing, writing_to
from ldm.models.diffusion.finite import FirstBad, NotFiniteError
from ldm.training.runs import EMBEDDINGS, LAST, PREVIOUS


class CheckpointWriter(TorchCheckpointIO):
    """Write a checkpoint whole or not at all, and keep the one before it as `previous.ckpt`.

    Lightning's own writer goes through the system's temporary folder, and passes over a folder without permission.

    Args:
        resumed: the checkpoint that the run is resumed from. If that is `previous.ckpt`, since `last.ckpt` is damaged,
            it stays until there is another.
    """

    def __init__(self, resumed: Path | None = None) -> None:
        super().__init__()
        self._resumed = resumed and resumed.resolve()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        content = io.BytesIO()  # torch hides the reason when a file cannot be written
        torch.save(checkpoint, content)
        previous = Path(path).with_name(PREVIOUS)
        with replacing(path, keep=None if previous.resolve() == self._resumed else previous) as temporary:
            temporary.write_bytes(content.getbuffer())
        self._resumed = None


class FiniteGuard(pl.Callback):
    """Stop a run whose loss or weights are not finite, before anything of it is saved.

    On the CPU every loss is checked before its step is made. A GPU would have to be waited for, so there the
    losses are marked on the device, and the marks are read every `every_n_steps` and before each saving.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        self.every_n_steps = every_n_steps
        self._losses = FirstBad()

    def on_before_backward(self, trainer: pl.Trainer, module: pl.LightningModule, loss: Tensor) -> None:
        self._losses.add(trainer.global_step + 1, loss.detach(), getattr(module, "timesteps", None))
        if self.reads_at_once(loss):
            self._check_losses(trainer, module)

    def reads_at_once(self, loss: Tensor) -> bool:
        return loss.device.type == "cpu"

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step % self.every_n_steps == 0:
            self._check_losses(trainer, module)

    def check(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Raise `NotFiniteError` if a loss was, or a trained weight is, not finite."""
        self._check_losses(trainer, module)
        weights = [p.detach() for p in module.parameters() if p.requires_grad]
        if weights and not torch.stack([torch.isfinite(p).all() for p in weights]).all():
            raise _not_finite(f"The weights are not finite after step {trainer.global_step}", trainer)

    def _check_losses(self, trainer: pl.Trainer, module: Any) -> None:
        if (found := self._losses.read()) is None:
            return
        step, timesteps = found
        where = ""
        if timesteps and (stages := getattr(module, "num_stages", None)):
            seen = sorted({int(stage_of(t, stages, module.num_timesteps)) for t in timesteps})
            where = f" (stage{'s' * (len(seen) > 1)} {', '.join(map(str, seen))})"
        raise _not_finite(f"The loss is not finite at step {step}{where}", trainer)


def _not_finite(what: str, trainer: pl.Trainer) -> NotFiniteError:
    return NotFiniteError(
        f"{what}; nothing of it was saved, '{trainer.default_root_dir}' holds the last good state. "
        "Learn more slowly (model.base_learning_rate), and with model.params.frozen_dtype=float32 or bfloat16."
    )


class SaveLast(pl.Callback):
    """Keep `last.ckpt`: what is trained, the optimizer and the step; enough to resume exactly.

    Saves every `every_n_train_steps` (with `embeddings_gs-N.safetensors`), at the end, and on SIGUSR1. Ctrl-C and
    SIGTERM let the step finish, save and stop; a second Ctrl-C stops at once. It must be the last of the callbacks:
    whatever belongs to the step that `last.ckpt` holds is then on the disk, and a run that was killed and resumed
    leaves the same files. Only `embeddings.safetensors`, which the end of a run writes in any case, comes after it:
    where it is, there was a checkpoint.

    The YAML's `lightning.modelcheckpoint` gives its parameters.

    Attributes:
        guard: another callback, which is asked before anything is saved.
        stopped_by: number of the signal that ended the run.
    """

    ignored_keys = dict.fromkeys(("monitor", "save_top_k", "save_last", "filename", "verbose"), "last.ckpt is kept")

    def __init__(self, dirpath: str | Path, every_n_train_steps: int = 500) -> None:
        if type(every_n_train_steps) is not int or every_n_train_steps < 1:
            raise ValueError(f"every_n_train_steps must be a number of at least 1, not {every_n_train_steps!r}.")
        self.path = Path(dirpath) / LAST
        self.every_n_train_steps = every_n_train_steps
        self.guard = FiniteGuard()
        self.stopped_by: int | None = None
        self._requested = False
        self._saved_step = -1
        self._old_handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        # after Lightning has set its handlers: the one for SIGTERM talks to the other processes in the middle of a step
        if threading.current_thread() is not threading.main_thread():
            return  # only the main thread may handle signals
        for name, handler in {"SIGUSR1": self._request, "SIGINT": self._stop, "SIGTERM": self._stop}.items():
            if number := getattr(signal, name, None):  # Windows has no SIGUSR1
                self._old_handlers[number] = signal.signal(number, handler)

    def _request(self, *_: Any) -> None:
        self._requested = True

    def _stop(self, number: int, *_: Any) -> None:
        if self.stopped_by is not None:
            raise KeyboardInterrupt
        self.stopped_by = number

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        self._put_back()

    def _put_back(self) -> None:
        """Set the handlers that were there, before Lightning in its turn puts back what it found."""
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        self._old_handlers = {}

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        stopped_by, requested = self._agreed(trainer)
        if stopped_by:
            self.stopped_by = stopped_by
            trainer.should_stop = True
            trainer.fit_loop.min_epochs = trainer.fit_loop.epoch_loop.min_steps = None  # a stop goes before --min_steps
        due = trainer.global_step % self.every_n_train_steps == 0
        if stopped_by or requested or due:
            self._requested = False
            self._save(trainer, module, numbered=due)

    def _agreed(self, trainer: pl.Trainer) -> tuple[int, int]:
        """Return the signal that stops and whether to save, the same in all processes: they do both together.

        A signal that comes meanwhile counts in the next step.
        """
        flags = self.stopped_by or 0, int(self._requested)
        if trainer.world_size == 1:
            return flags
        reduced = torch.tensor(flags, device=trainer.strategy.root_device)
        stopped_by, requested = trainer.strategy.reduce(reduced, reduce_op="max").tolist()
        return stopped_by, requested

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._save(trainer, module)
        self._put_back()

    def on_fit_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Write the embeddings again, for a run that was complete when it was resumed and has made no step."""
        if trainer.global_step > 0:
            self._save_embeddings(trainer, module)

    def _save(self, trainer: pl.Trainer, module: pl.LightningModule, numbered: bool = False) -> None:
        if trainer.global_step in (0, self._saved_step):
            return  # with accumulation the same step comes several times
        self._saved_step = trainer.global_step
        self.guard.check(trainer, module)
        if numbered:
            self._save_embeddings(trainer, module, f"embeddings_gs-{trainer.global_step}.safetensors")
        trainer.save_checkpoint(self.path)
        self._save_embeddings(trainer, module)

    def _save_embeddings(self, trainer: pl.Trainer, module: Any, name: str = EMBEDDINGS) -> None:
        if trainer.is_global_zero and hasattr(module, "save_embeddings"):
            module.save_embeddings(self.path.with_name(name))


class ConfiguredRate(pl.Callback):
    """Let a resumed run learn at the rate of its configuration, not at the one that its checkpoint was saved with."""

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        rate = module.learning_rate
        for group in (group for optimizer in trainer.optimizers for group in optimizer.param_groups):
            saved = group.get("initial_lr", group["lr"])  # of a schedule, what it began with
            if saved != rate:
                group["lr"] = rate * (group["lr"] / saved)
            if "initial_lr" in group:
                group["initial_lr"] = rate
        for config in trainer.lr_scheduler_configs:
            config.scheduler.base_lrs = [rate] * len(config.scheduler.base_lrs)


class AveragedWeights(WeightAveraging):
    """The exponential moving average of the weights, saved in their place and used where they are validated.

    Lightning's own `EMAWeightAveraging` multiplies and adds, which in 1000 steps moves even frozen weights by 1e-5 of
    their size; interpolating all of them at once leaves those as they are, and is three times as fast.
    """

    def __init__(self, decay: float = 0.999) -> None:
        super().__init__(multi_avg_fn=get_ema_multi_avg_fn(decay))

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Follow the module to its device, where Lightning brings it after `setup` has made the copy."""
        assert self._average_model is not None
        self._average_model.to(module.device)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Leave the weights as they are: they are saved after this, and a resumed run continues with them."""


class ImageLogger(pl.Callback):
    """Write `images/train/<key>_gs-<step>_e-<epoch>_b-<batch>.jpg` every `batch_frequency` steps.

    TensorBoard shows them, too. They are what the module's `log_images(batch, **log_images_kwargs)` returns,
    {key: (N, 3, H, W) in [-1, 1]}.

    Args:
        increase_log_steps: also log at steps 1, 2, 4, 8, … below `batch_frequency`.
    """

    ignored_keys = {
        "rescale": "images are always scaled from [-1, 1] to 0..255",
        "clamp": "images are always clamped",
        "log_on_batch_idx": "steps are counted by the optimizer",
    }

    def __init__(
        self,
        batch_frequency: int,
        max_images: int = 4,
        increase_log_steps: bool = True,
        disabled: bool = False,
        log_first_step: bool = False,
        log_images_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(batch_frequency, int) or batch_frequency < 1:
            raise ValueError(f"batch_frequency must be at least 1 step, not {batch_frequency!r}; see `disabled`.")
        self.batch_frequency = batch_frequency
        self.max_images = max_images
        self.disabled = disabled
        self.log_images_kwargs = dict(log_images_kwargs or {})
        doubling = [2**i for i in range(batch_frequency.bit_length()) if 2**i < batch_frequency]
        self.extra_steps = set(doubling if increase_log_steps else []) | ({1} if log_first_step else set())
        self._last_step = -1

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        due = step % self.batch_frequency == 0 or step in self.extra_steps
        if due and step > 0 and step != self._last_step:
            self._last_step = step
            if not self.disabled and trainer.is_global_zero and hasattr(module, "log_images"):
                self._write(trainer, module, batch, batch_idx)

    def _write(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        was_training = module.training
        module.eval()
        with torch.no_grad():
            images = module.log_images(batch, N=self.max_images, split="train", **self.log_images_kwargs)
        module.train(was_training)
        folder = Path(trainer.default_root_dir) / "images/train"
        with writing_to(folder):
            folder.mkdir(parents=True, exist_ok=True)
        where = f"gs-{trainer.global_step:06}_e-{trainer.current_epoch:06}_b-{batch_idx + 1:06}"
        boards = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        for key, tensor in images.items():
            grid = make_grid([to_pil(image.float().cpu()) for image in tensor[: self.max_images]])
            with replacing(folder / f"{key}_{where}.jpg") as temporary:
                grid.save(temporary, format="JPEG", quality=95)
            for board in boards:
                pixels = np.asarray(grid)
                board.experiment.add_image(f"train/{key}", pixels, trainer.global_step, dataformats="HWC")


class StageLosses(pl.Callback):
    """Log `train/loss_stage_k` whenever the trainer logs: the mean loss of the samples of stage k since it last did.

    A stage without samples is left out.
    """

    def __init__(self) -> None:
        self._sums: torch.Tensor | None = None  # (2, S): of losses, of samples

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        losses = getattr(module, "losses", None)
        if losses is None:
            return
        if self._sums is None:
            self._sums = torch.zeros(2, module.num_stages, device=losses.device)
        stages = stage_of(module.timesteps, module.num_stages, module.num_timesteps)
        self._sums.index_add_(1, stages, torch.stack([losses, torch.ones_like(losses)]))
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and trainer.global_step % every == 0:
            sums, counts = self._sums.tolist()
            means = {f"train/loss_stage_{k}": sums[k] / count for k, count in enumerate(counts) if count}
            module.log_dict(means, batch_size=1)
            self._sums.zero_()


class StepBar(pl.Callback):
    """Step N of M over the whole run, with the loss.

    Showing the loss waits for the device, so beside a CPU the bar moves only as often as the logs are written.
    """

    def __init__(self) -> None:
        self._every = 1
        self._bar = tqdm(disable=True)

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        steps = trainer.estimated_stepping_batches
        total = int(steps) if math.isfinite(steps) else None
        hidden = not trainer.is_global_zero
        self._bar = tqdm(total=total, initial=trainer.global_step, desc="Steps", unit="step", disable=hidden)
        if trainer.strategy.root_device.type != "cpu":
            self._every = max(1, trainer.log_every_n_steps)  # type: ignore[attr-defined]

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        bar, step = self._bar, trainer.global_step
        if bar.disable or (step - bar.n < self._every and step != bar.total):
            return
        if (loss := trainer.callback_metrics.get("loss")) is not None:
            bar.set_postfix(loss=f"{loss.item():.3g}", refresh=False)
        bar.update(step - bar.n)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._bar.close()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        self._bar.close()
