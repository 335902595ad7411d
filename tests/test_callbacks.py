"""What is saved beside training, and at which steps; the trainer and the module are stand-ins."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from ldm.callbacks import EmbeddingSaver, ImageLogger


class Stub(nn.Module):
    """A module that gives one picture to look at, and writes its name as its embeddings."""

    def __init__(self, name: str = "") -> None:
        super().__init__()
        self.name = name
        self.saved: list[str] = []

    def log_images(self, batch: object, **_: object) -> dict[str, Tensor]:
        assert not self.training, "without dropout"
        return {"samples": torch.zeros(1, 3, 4, 4)}

    def save_embeddings(self, path: Path) -> None:
        self.saved.append(path.name)
        path.write_text(self.name)


def run(callback: ImageLogger | EmbeddingSaver, module: Stub, folder: Path, steps: int, accumulate: int = 2) -> None:
    """`steps` optimizer steps of `accumulate` batches each."""
    trainer = SimpleNamespace(global_step=0, current_epoch=0, is_global_zero=True, default_root_dir=folder)
    for batch in range(steps * accumulate):
        trainer.global_step = (batch + 1) // accumulate
        callback.on_train_batch_end(trainer, module, None, {}, batch)


@pytest.mark.parametrize(("increase", "expected"), [(False, [8, 16]), (True, [1, 2, 4, 8, 16])])
def test_pictures_are_logged_at_their_steps_once(tmp_path: Path, increase: bool, expected: list[int]) -> None:
    """The reference's list of doubling steps runs empty and prints that; with accumulation, a step comes twice."""
    module = Stub().train()
    run(ImageLogger(batch_frequency=8, increase_log_steps=increase), module, tmp_path, steps=17)
    names = sorted(path.name for path in (tmp_path / "images/train").iterdir())
    # batches count from one: the first of two that end with this step
    assert names == [f"samples_gs-{step:06}_e-000000_b-{2 * step:06}.jpg" for step in expected]
    assert module.training


def test_a_second_run_in_the_same_folder_keeps_its_own_embeddings(tmp_path: Path) -> None:
    """With `-p DIR` the files of an earlier run may be there; none of them may pass for this run's."""
    for name in ("first", "second"):
        module = Stub(name)
        run(EmbeddingSaver(tmp_path, every_n_train_steps=2), module, tmp_path, steps=5)
        assert module.saved == ["embeddings_gs-2.safetensors", "embeddings_gs-4.safetensors"], "each step once"
        assert {path.read_text() for path in tmp_path.iterdir()} == {name}
