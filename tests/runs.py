"""Real runs of `main.py` on the small model, and of other programs, in processes of their own or in this one."""

import contextlib
import io
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import Dataset

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "models/demo/model.safetensors"
CONFIG = ROOT / "configs/demo/finetune.yaml"
PICTURES = ROOT / "models/demo/references/dotted-star"
LEARN = ["--base", str(CONFIG), "-t", "--actual_resume", str(MODEL), "--data_root", str(PICTURES)]
LEARN += ["--enable_progress_bar", "false"]
NO_PICTURES = "lightning.callbacks.image_logger.params.disabled=true"
LOGGER = "lightning.callbacks.image_logger.params"
# Gives the commands of its argument (JSON) to `prospect`, and prints the exit code and the processor time of each.
DRIVER = """\
import json, logging, sys, time
from ldm.cli.main import main
for argv in json.loads(sys.argv[1]):
    logging.getLogger().handlers.clear()
    start = time.process_time()
    try:
        code = main(argv)
    except SystemExit as ended:
        code = ended.code
    print(json.dumps([code or 0, time.process_time() - start]), flush=True)
"""
MADE_SMALL = ["data.params.batch_size=2", f"{LOGGER}.max_images=2", f"{LOGGER}.log_images_kwargs.ddim_steps=2"]


def learn(folder: Path, *arguments: str) -> Path:
    """Learn into exactly `folder` in this process, without logged images unless asked for; its checkpoints."""
    import main

    assert main.main([*LEARN, "-p", str(folder), NO_PICTURES, *arguments]) == 0
    return folder / "checkpoints"


def resume(place: Path, *arguments: str) -> int:
    """Resume a run in this process; the exit code."""
    import main

    return main.main(["-r", str(place), "-t", "--enable_progress_bar", "false", *arguments])


def same_tensors(one: Path, two: Path) -> bool:
    """Whether two runs' checkpoints hold the same weights, moments and embeddings, bit for bit."""
    expected, got = saved_tensors(one), saved_tensors(two)
    return expected.keys() == got.keys() and all(torch.equal(expected[name], got[name]) for name in expected)


def every(steps: int, pictures: int | None = None) -> list[str]:
    """Overrides: save every `steps` steps and log images every `pictures` steps (None: never)."""
    saving = f"lightning.modelcheckpoint.params.every_n_train_steps={steps}"
    return [saving, NO_PICTURES if pictures is None else f"{LOGGER}.batch_frequency={pictures}"]


class Poison(pl.Callback):
    """Makes the gradients of one step infinite, as the backward pass in half precision can.

    Named in a configuration: `--allow_targets runs`, and `lightning.callbacks.poison.target=runs.Poison`.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule, _: object) -> None:
        if trainer.global_step + 1 == self.step:
            for parameter in module.trainable_parameters():
                parameter.grad.fill_(torch.inf)


class CtrlC(pl.Callback):
    """Presses it in a step (0: before the first), or sends another signal; named in a configuration as `Poison` is."""

    def __init__(self, step: int, name: str = "SIGINT", rank: int = 0) -> None:
        self.step, self.number, self.rank = step, signal.Signals[name], rank

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.step == 0:
            signal.raise_signal(self.number)

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule, _: object) -> None:
        if trainer.global_step + 1 == self.step and trainer.global_rank == self.rank:
            signal.raise_signal(self.number)


class FourPictures(Dataset):
    """A data set as others write them: numbered from 0 to its length, and no further.

    Named in a configuration: `--allow_targets runs`, and `data.params.train.target=runs.FourPictures`.
    """

    def __init__(self, shape: tuple[int, ...] = (64, 64, 3), count: int = 4, lacks: str = "") -> None:
        self.shape, self.count, self.lacks = tuple(shape), count, lacks

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict[str, object]:
        if not 0 <= i < self.count:
            raise IndexError(i)
        sample = {"image": torch.tensor(i / self.count).expand(self.shape), "caption": "*"}
        return {key: value for key, value in sample.items() if key != self.lacks}


def start(program: str, *arguments: str, launcher: Sequence[str] = (), **options: object) -> subprocess.Popen:
    """A process of its own, on one thread, that finds the code beside these tests, and this module."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [*launcher, sys.executable, program, *arguments]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, **options}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)


def call(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program as `start` does and wait, but in this process: PyTorch is imported once."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", [program, *arguments])
        try:
            runpy.run_path(str(ROOT / program), run_name="__main__")
        except SystemExit as ending:
            code = ending.code or 0
        except Exception:
            traceback.print_exc()
            code = 1
    return subprocess.CompletedProcess([program, *arguments], code, out.getvalue(), err.getvalue())


def finish(process: subprocess.Popen, seconds: float = 240) -> tuple[str | None, str]:
    """Wait for the end; what it wrote on standard output (where that is a pipe) and standard error."""
    try:
        return process.communicate(timeout=seconds)
    finally:
        process.kill()


def wait_for(condition: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def saved_tensors(checkpoints: Path) -> dict[str, torch.Tensor]:
    """Weights and moments of `last.ckpt`, and the embeddings."""
    from ldm.embeddings import load_concept

    state = torch.load(checkpoints / "last.ckpt", weights_only=True)
    flat = dict(state["state_dict"])
    for number, moments in state["optimizer_states"][0]["state"].items():
        flat |= {f"{number}.{name}": value for name, value in moments.items()}
    return flat | {path.name: load_concept(path).vectors for path in checkpoints.glob("*.safetensors")}


def unfinished(folder: Path) -> list[str]:
    """What lies below `folder` and was not written to its end."""
    return sorted(path.name for path in folder.rglob(".*"))
