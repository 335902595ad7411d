"""Losses, weights and latents that are not finite: stopped with the step, the stage and the remedy."""

import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import torch
from runs import CONFIG, LEARN, MADE_SMALL, MODEL, ROOT, every
from torch import nn

import main as program
from ldm.cli import sample as commands
from ldm.embeddings import Concept, save_concept
from ldm.generate import load_model_from_config
from ldm.generate import main as generate
from ldm.models.diffusion.finite import FirstBad, NotFiniteError
from ldm.training.finite import FiniteGuard

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion


@pytest.fixture(autouse=True)
def in_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def small_model() -> "LatentDiffusion":
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return load_model_from_config(CONFIG, MODEL, device="cpu")


def fail_to_learn(folder: Path, *overrides: str, capsys: pytest.CaptureFixture[str]) -> tuple[str, int]:
    """Learn until the run stops itself: its sentence, and the step of the files that it leaves."""
    assert program.main([*LEARN, *MADE_SMALL, "-p", str(folder), "--max_steps", "9", *overrides]) == 2
    *_, last = capsys.readouterr().err.splitlines()
    state = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    assert all(value.isfinite().all() for value in state["state_dict"].values())
    return last, state["global_step"]


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A learning rate so high that the text transformer overflows: the state before stays as it was saved."""
    table = "model.params.personalization_config.params.generator=table"
    sentence, step = fail_to_learn(tmp_path, table, *every(1), "model.base_learning_rate=1.0e+37", capsys=capsys)
    assert re.search(r"The loss is not finite at step 2 \(stages? \d(, \d)*\); nothing of it was saved", sentence)
    assert f"'{tmp_path}' holds the last good state" in sentence and "model.base_learning_rate" in sentence
    assert step == 1
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"last.ckpt", "embeddings.safetensors", "embeddings_gs-1.safetensors"}


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    poison = ["--allow_targets", "runs", "lightning.callbacks.poison={target: runs.Poison, params: {step: 4}}"]
    sentence, step = fail_to_learn(tmp_path, *every(2), *poison, capsys=capsys)
    assert "The weights are not finite after step 4; nothing of it was saved" in sentence and step == 2
    assert not (tmp_path / "checkpoints/embeddings_gs-4.safetensors").exists()


def test_nor_at_the_end_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    poison = ["--allow_targets", "runs", "lightning.callbacks.poison={target: runs.Poison, params: {step: 3}}"]
    arguments = [*LEARN, *MADE_SMALL, *every(100), *poison, "-p", str(tmp_path), "--max_steps", "3"]
    assert program.main(arguments) == 2
    assert "The weights are not finite after step 3" in capsys.readouterr().err
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_on_a_gpu_marks_are_read_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step and the stages are those of the bad step, not of the one that noticed; it is noticed at a saving."""
    monkeypatch.setattr(FiniteGuard, "reads_at_once", lambda *_: False)
    trainer = SimpleNamespace(global_step=0, default_root_dir="run")
    module = nn.Linear(1, 1)
    module.num_stages, module.num_timesteps = 10, 1000
    guard = FiniteGuard(save_every=100, every_n_steps=6)
    for step in range(1, 6):
        module.timesteps = torch.tensor([100 * step, 100 * step + 250])
        guard.on_before_backward(trainer, module, torch.tensor(1.0 if step < 3 else torch.nan))
        trainer.global_step = step
        guard.on_train_batch_end(trainer, module)
    for notice in (lambda: guard.check(trainer, module), lambda: guard.on_train_batch_end(trainer, module)):
        trainer.global_step = 6
        with pytest.raises(NotFiniteError, match=r"not finite at step 3 \(stages 3, 5\)"):
            notice()


def test_on_the_cpu_the_bad_step_is_not_made() -> None:
    module, trainer = nn.Linear(1, 1), SimpleNamespace(global_step=6, default_root_dir="run")
    with pytest.raises(NotFiniteError, match="The loss is not finite at step 7; nothing"):
        FiniteGuard(save_every=100).on_before_backward(trainer, module, torch.tensor(torch.inf))


def test_the_first_bad_step_is_remembered() -> None:
    watch = FirstBad()
    assert watch.read() is None
    for step, value in enumerate((1.0, torch.inf, torch.nan, 1.0)):
        watch.add(step, torch.tensor([0.0, value]))
    assert watch.read() == (1, [])


def test_latents_that_are_not_finite_make_no_picture(
    small_model: "LatentDiffusion", tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    huge = tmp_path / "huge.safetensors"  # finite, but their mean is not
    save_concept(Concept(torch.full((10, small_model.embedding_manager.width), 3e38)), huge)
    with pytest.raises(NotFiniteError, match=r"from timestep \d+ on \(stage \d\); use float32"):
        settings = {"ddim_steps": 4, "height": 64, "width": 64, "progress": False}
        generate("a <huge> star", model=small_model, concepts={"<huge>": huge}, **settings)
    flags = ["--prompt", "a * star", "--concept", str(huge), "--steps", "2", "--outdir", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ending:
        commands.run("Generate.", argv=flags)
    assert ending.value.code == 2 and "The latents are not finite" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_first_stage_that_overflows_becomes_float32_once(caplog: pytest.LogCaptureFixture) -> None:
    """Weights that make activations too large for float16, which the layer after them makes small again."""
    model = load_model_from_config(CONFIG, MODEL, device="cpu", dtype="float16")
    first_stage = model.first_stage_model
    latents = 20 * torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = model.decode_first_stage(latents)
    assert next(first_stage.parameters()).dtype == torch.float16 and not caplog.records
    with torch.no_grad():
        first_stage.post_quant_conv.weight.mul_(4096)
        first_stage.post_quant_conv.bias.mul_(4096)
        first_stage.decoder.conv_in.weight.div_(4096)
    bad = model.decode_first_stage(latents * torch.nan)
    assert bad.isnan().all() and not caplog.records, "the latents' fault, not the first stage's"
    with caplog.at_level(logging.WARNING):
        pictures = [model.decode_first_stage(latents) for _ in range(2)]
    assert [record.message for record in caplog.records] == [
        "The first stage (VAE) overflows in float16; from now on it works in float32."
    ]
    assert all(picture.isfinite().all() for picture in pictures)
    assert (pictures[0] - expected).abs().mean() < 0.02
    assert next(model.model.parameters()).dtype == torch.float16, "only the first stage changes"
