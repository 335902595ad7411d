"""What callbacks save and show, and at which steps; the trainer and the module are stand-ins."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ldm.training.callbacks import AveragedWeights, ConfiguredRate, ImageLogger, StepBar


class Stub(nn.Module):
    """A module that gives one image to look at."""

    def log_images(self, batch: object, **_: object) -> dict[str, Tensor]:
        assert not self.training, "without dropout"
        return {"samples": torch.zeros(1, 3, 4, 4)}


@pytest.mark.parametrize(("increase", "expected"), [(False, [8, 16]), (True, [1, 2, 4, 8, 16])])
def test_images_are_saved_at_their_steps_once(tmp_path: Path, increase: bool, expected: list[int]) -> None:
    """The reference's list of doubling steps runs empty and prints that; with accumulation, a step comes twice."""
    module, callback = Stub().train(), ImageLogger(batch_frequency=8, increase_log_steps=increase)
    trainer: Any = SimpleNamespace(current_epoch=0, is_global_zero=True, default_root_dir=tmp_path, loggers=[])
    for batch in range(2 * 17):
        trainer.global_step = (batch + 1) // 2
        callback.on_train_batch_end(trainer, module, None, {}, batch)  # type: ignore[arg-type]
    names = sorted(path.name for path in (tmp_path / "images/train").iterdir())
    # batches count from one: the first of two that end with this step
    assert names == [f"samples_gs-{step:06}_e-000000_b-{2 * step:06}.jpg" for step in expected]
    assert module.training


def fit(module: pl.LightningModule, steps: int, callback: pl.Callback, path: Path, resume: bool = False,
        batches: int = 8, accelerator: str = "cpu") -> None:  # fmt: skip
    """Train for some steps, from the checkpoint or from the start, and save it."""
    trainer = pl.Trainer(max_steps=steps, accelerator=accelerator, devices=1, callbacks=[callback], logger=False,
                         enable_checkpointing=False, enable_progress_bar=False)  # fmt: skip
    trainer.fit(module, torch.ones(batches, 1, 2), ckpt_path=path if resume else None, weights_only=True)
    trainer.save_checkpoint(path)


class Linear(pl.LightningModule):
    """One layer, trained for a few steps."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.register_buffer("kept", torch.ones(3))

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        return self.layer(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Scheduled(Linear):
    """The same with a rate that falls to zero, as in training from scratch."""

    def __init__(self, learning_rate: float) -> None:
        super().__init__()
        self.learning_rate = learning_rate

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.learning_rate)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 8)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


@pytest.mark.parametrize("rate", [0.1, 0.02])
def test_a_falling_rate_goes_on_from_the_configured_one(rate: float, tmp_path: Path) -> None:
    rates = []
    for steps, configured in ((3, 0.1), (5, rate)):
        module = Scheduled(configured)
        module.on_train_batch_start = lambda *_, module=module: rates.append(module.optimizers().param_groups[0]["lr"])
        fit(module, steps, ConfiguredRate(), tmp_path / "last.ckpt", resume=steps == 5)
    assert rates == pytest.approx([0.1, 0.1 * 7 / 8, 0.1 * 6 / 8, rate * 5 / 8, rate * 4 / 8])


def devices(callback: AveragedWeights) -> set[str]:
    return {tensor.device.type for tensor in callback._average_model.state_dict().values()}


def test_averaged_weights_follow_the_module_to_its_device() -> None:
    """Lightning moves it after `setup` and before `on_fit_start`; every step would fetch all weights otherwise."""
    callback, module = AveragedWeights(), Linear()
    callback.setup(SimpleNamespace(), module, "fit")
    assert devices(callback) == {"cpu"}
    callback.on_fit_start(SimpleNamespace(), module.to("meta"))
    assert devices(callback) == {"meta"}


@pytest.mark.parametrize("accelerator", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_averaged_weights_go_on_where_they_were_saved(tmp_path: Path, accelerator: str) -> None:
    """Two steps and two more are four, in the module and in the average."""
    ended = []
    for first in (4, 2):
        torch.manual_seed(0)
        module, path = Linear(), tmp_path / f"{first}.ckpt"
        for steps in sorted({first, 4}):
            callback = AveragedWeights(0.5)
            fit(module, steps, callback, path, resume=steps > first, accelerator=accelerator)
            assert devices(callback) == {accelerator}
        ended.append(torch.load(path, map_location="cpu", weights_only=True))
    for key in ("state_dict", "current_model_state"):
        for one, two in zip(ended[0][key].values(), ended[1][key].values(), strict=True):
            assert torch.equal(one, two)
    assert not torch.equal(ended[0]["state_dict"]["layer.weight"], ended[0]["current_model_state"]["layer.weight"])


def test_the_bar_counts_the_steps_of_the_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Over several epochs of 4 batches, and from where a run is resumed."""
    for first, steps in ((0, 6), (6, 9)):
        fit(Linear(), steps, StepBar(), tmp_path / "last.ckpt", resume=first > 0, batches=4)
        shown = capsys.readouterr().err.replace("\r", "\n").splitlines()
        bars = [line for line in shown if line.startswith("Steps:")]
        assert f"{first}/{steps} [" in bars[0] and f"{steps}/{steps} [" in bars[-1]
