"""Losses and weights that are not finite: stopped with the step, the stage and the remedy."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import LEARN, MADE_SMALL, every
from torch import nn

import main
from ldm.models.diffusion.finite import NotFiniteError
from ldm.training.callbacks import FiniteGuard


def fail_to_learn(folder: Path, *overrides: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Learn until the run stops itself; its sentence."""
    assert main.main([*LEARN, *MADE_SMALL, "-p", str(folder), *overrides]) == 2
    *_, last = capsys.readouterr().err.splitlines()
    return last


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A learning rate so high that the text transformer overflows: the state before stays as it was saved."""
    table = "model.params.personalization_config.params.generator=table"
    rate = "model.base_learning_rate=1.0e+37"
    sentence = fail_to_learn(tmp_path, table, *every(1), rate, "--max_steps", "9", capsys=capsys)
    assert re.search(r"The loss is not finite at step 2 \(stages? \d(, \d)*\); nothing of it was saved", sentence)
    assert f"'{tmp_path}' holds the last good state" in sentence and "model.base_learning_rate" in sentence
    state = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert state["global_step"] == 1 and all(value.isfinite().all() for value in state["state_dict"].values())
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"last.ckpt", "embeddings.safetensors", "embeddings_gs-1.safetensors"}


@pytest.mark.parametrize("steps", ["9", "4"], ids=["when they are due", "at the end"])
def test_weights_that_are_not_finite_are_not_saved(
    steps: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    poison = ["--allow_targets", "runs", "lightning.callbacks.poison={target: runs.Poison, params: {step: 4}}"]
    saving = every(4 if steps == "9" else 100)
    sentence = fail_to_learn(tmp_path, *saving, *poison, "--max_steps", steps, capsys=capsys)
    assert "The weights are not finite after step 4; nothing of it was saved" in sentence
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_on_a_gpu_marks_are_read_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step and the stages are those of the bad step, not of the one that noticed; it is noticed at a saving."""
    monkeypatch.setattr(FiniteGuard, "reads_at_once", lambda *_: False)
    trainer: Any = SimpleNamespace(global_step=0, default_root_dir="run")
    module: Any = nn.Linear(1, 1)
    module.num_stages, module.num_timesteps = 10, 1000
    guard = FiniteGuard(every_n_steps=6)
    for step in range(1, 6):
        module.timesteps = torch.tensor([100 * step, 100 * step + 250])
        guard.on_before_backward(trainer, module, torch.tensor(1.0 if step < 3 else torch.nan))
        trainer.global_step = step
        guard.on_train_batch_end(trainer, module)
    for notice in (lambda: guard.check(trainer, module), lambda: guard.on_train_batch_end(trainer, module)):
        trainer.global_step = 6
        with pytest.raises(NotFiniteError, match=r"not finite at step 3 \(stages 3, 5\)"):
            notice()
