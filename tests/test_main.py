"""`main.py` as users run it, on the small model that ships."""

from __future__ import annotations

import csv
import re
import shlex
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from runs import (
    LEARN,
    LOGGER,
    MADE_SMALL,
    MODEL,
    NO_PICTURES,
    ROOT,
    FourPictures,
    every,
    learn,
    resume,
    same_tensors,
)
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main
from ldm.checkpoint import read_state_dict
from ldm.cli import sample
from ldm.config import instantiate_from_config, load_config
from ldm.data.datamodule import Repeated
from ldm.embeddings import load_concept
from ldm.training import messages
from ldm.training.runs import LAST, PREVIOUS


def test_a_resumed_run_is_the_same_run(tmp_path: Path) -> None:
    """Interrupted between epochs or within one, with flags that are not given again: bit-identical."""
    steps = ["data.params.train.params.repeats=12", "data.params.batch_size=4"]  # epochs of 3 steps
    steps += ["-s", "7", "--scale_lr", "false", "model.base_learning_rate=1e-4", "--gpus", "0"]
    whole = learn(tmp_path / "whole", "--max_steps", "6", *steps)
    for stop in ("3", "4"):
        part = tmp_path / f"part{stop}"
        learn(part, "--max_steps", stop, *steps)
        assert resume(part, "--max_steps", "6") == 0
        assert same_tensors(whole, part / "checkpoints")


def test_torchs_global_state_and_the_seed(tmp_path: Path) -> None:
    """What a caller set for its own work changes nothing that is learned; another seed does."""
    steps = ["--max_steps", "2", "data.params.batch_size=2"]
    usual = learn(tmp_path / "usual", *steps)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode(), torch.device("meta"):
            otherwise = learn(tmp_path / "otherwise", *steps)
            assert torch.is_inference_mode_enabled() and torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert same_tensors(usual, otherwise)
    assert not same_tensors(usual, learn(tmp_path / "seed", *steps, "-s", "5"))


def test_steps_of_several_batches(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also where they do not divide an epoch, here of 4 batches; the learning rate is scaled, and logged."""
    steps = ["data.params.train.params.repeats=8", "data.params.batch_size=2", "--accumulate_grad_batches", "3"]
    with caplog.at_level("INFO"):
        checkpoints = learn(tmp_path / "run", *steps, "--max_steps", "3", "--max_epochs", "9", "--gpus", "0,")
    assert torch.load(checkpoints / "last.ckpt", weights_only=True)["global_step"] == 3
    assert [line for line in caplog.messages if line.startswith("Learning rate")] == [
        "Learning rate 1.80e-04 = 3 (accumulate_grad_batches) x 1 (devices) x 2 (batch size) x 3.00e-05 (base)"
    ]


def four_images(folder: Path, *arguments: str, **params: object) -> int:
    """Learn from a data set that knows nothing of running sample numbers; the exit code."""
    config = OmegaConf.load(ROOT / "configs/demo/finetune.yaml")
    config.data.params.train = {"target": "runs.FourPictures", "params": params}
    config.data.params.validation = {"target": "runs.FourPictures"}
    config.data.params.batch_size = 2
    OmegaConf.save(config, folder / "own.yaml")
    own = ["--base", str(folder / "own.yaml"), "--allow_targets", "runs", "-p", str(folder / "run")]
    flags = ["-t", "--actual_resume", str(MODEL), "--enable_progress_bar", "false", NO_PICTURES]
    return main.main([*own, *flags, *arguments])


def test_a_data_set_of_ones_own_runs_on(tmp_path: Path) -> None:
    assert four_images(tmp_path, "--max_steps", "5") == 0  # two steps an epoch
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 5
    dataset = Repeated(FourPictures())
    assert [dataset[n]["sample"] for n in (0, 6, 9)] == [0, 6, 9]
    assert all(torch.equal(dataset[n]["image"], FourPictures()[n % 4]["image"]) for n in range(12))


@pytest.mark.parametrize(
    ("params", "sentence"),
    [
        ({"count": 0}, "FourPictures has no samples that can be counted"),
        ({"lacks": "caption"}, "The samples of FourPictures must hold 'caption' and 'image' (height, width, 3) in ["),
        ({"lacks": "image"}, "in [-1, 1], not caption, sample ()"),
        ({"shape": [3, 64, 64]}, "in [-1, 1], not image, caption, sample (3, 64, 64)"),
        ({"shape": [64, 60, 3]}, "The train images' size 60 must be a multiple of 32; nearest: 64."),
    ],
)
def test_a_data_set_of_ones_own_that_does_not_fit(
    params: dict[str, object], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert four_images(tmp_path, **params) == 2
    assert sentence in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_what_a_run_leaves(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    arguments = [*LEARN, "-n", "mine", "-l", str(tmp_path / "logs"), "--max_steps", "4", "--log_every_n_steps", "1"]
    arguments += ["data.params.train.params.repeats=16", f"{LOGGER}.log_images_kwargs.ddim_steps=2"]  # 2 steps an epoch
    data = "data.params.validation={target: ldm.data.personalized.PersonalizedBase, params: {size: 64, set: val}}"
    with caplog.at_level("INFO"):
        assert main.main([*arguments, *every(2, pictures=4), data, "--profiler", "simple"]) == 0
    (run,) = (tmp_path / "logs").iterdir()
    assert re.fullmatch(r"dotted-star\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d_mine", run.name)

    checkpoints = {path.name for path in (run / "checkpoints").iterdir()}
    numbered = {"embeddings_gs-2.safetensors", "embeddings_gs-4.safetensors"}
    assert checkpoints == {"last.ckpt", "previous.ckpt", "embeddings.safetensors"} | numbered
    configs = {re.sub(r"^[\dT:-]+", "", path.name) for path in (run / "configs").iterdir()}
    assert configs == {"project.yaml", "lightning.yaml", "data.yaml"}
    keys = ("reconstruction", "samples", "samples_scaled")
    images = {path.name for path in (run / "images" / "train").iterdir()}
    assert images == {f"{key}_gs-000004_e-000001_b-000002.jpg" for key in keys}
    assert "optimizer_step" in (run / "fit-profile.txt").read_text()

    (metrics,) = (run / "csv").glob("*/metrics.csv")
    with open(metrics, newline="") as file:
        names = set(next(csv.reader(file)))
    assert {f"{split}/loss{kind}" for split in ("train", "val") for kind in ("_simple", "_vlb", "")} <= names
    assert {"val/loss_simple_ema", "val/loss_ema"} <= names
    stages = {name for name in names if re.fullmatch(r"train/loss_stage_\d", name)}
    assert 5 <= len(stages) <= 10  # 32 samples fall into most of ten stages
    board = EventAccumulator(str(run / "tensorboard")).Reload().Tags()
    assert stages <= set(board["scalars"]) and board["images"] == [f"train/{key}" for key in keys]

    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["global_step"] == 4
    assert state["state_dict"] and all(key.startswith("embedding_manager.") for key in state["state_dict"])
    with safe_open(run / "checkpoints" / "embeddings.safetensors", "pt") as file:
        metadata = file.metadata()
        assert file.get_tensor("*").shape == (10, 128)
    assert (metadata["init_word"], metadata["step"]) == ("thing", "4") and metadata["base_model_fingerprint"]

    (line,) = [line for line in caplog.messages if line.startswith("Generate: python scripts/txt2img.py")]
    words = shlex.split(line)[3:]
    (image,) = sample.run([*words, "--steps", "1", "--outdir", str(tmp_path / "out")])
    assert image.name.startswith("a-")


def test_only_the_embedding_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Any] = []

    def build(config: DictConfig) -> Any:
        built.append(instantiate_from_config(config))
        return built[-1]

    monkeypatch.setattr("ldm.training.setup.instantiate_from_config", build)
    learn(tmp_path / "run", "--max_steps", "2", "data.params.batch_size=2")
    module = built[1]
    before = build(load_config(LEARN[1], overrides=[f"model.params.ckpt_path={MODEL}"]).model)
    unchanged = {key: value for key, value in before.state_dict().items() if not key.startswith("embedding_manager.")}
    assert all(torch.equal(value, module.state_dict()[key]) for key, value in unchanged.items())
    frozen = [module.model, module.first_stage_model, module.cond_stage_model]
    assert all(p.grad is None and not p.requires_grad for part in frozen for p in part.parameters())
    initial = before.embedding_manager.initial_embeddings
    assert not torch.allclose(initial, module.embedding_manager.eval().embeddings(), atol=1e-4)


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="the platform has no such signal")
def test_signals_save(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """SIGUSR1 saves and runs on; SIGTERM, as Ctrl-C, finishes the step, saves and says how to resume."""
    run, send = tmp_path / "run", "lightning.callbacks.{0}={{target: runs.CtrlC, params: {{step: {1}, name: {0}}}}}"
    signals = ["--allow_targets", "runs", send.format("SIGUSR1", 2), send.format("SIGTERM", 4)]
    arguments = [*LEARN, *MADE_SMALL, *every(100_000), *signals, "--max_steps", "9", "-p", str(run)]
    with caplog.at_level("INFO"):
        assert main.main(arguments) == 128 + signal.SIGTERM
    assert caplog.messages[-1] == f"Stopped and saved at step 4; resume with: python main.py -r {run} -t"
    saved = [torch.load(run / "checkpoints" / name, weights_only=True)["global_step"] for name in (PREVIOUS, LAST)]
    assert saved == [2, 4]


def test_embedding_flags(tmp_path: Path) -> None:
    """`${x}` in a name or a word is a text like any other; `--embedding_manager_ckpt` trains saved vectors further."""
    named = ["--init_word", "red ${x}", "--placeholder_tokens", "<${star}>"]
    first = learn(tmp_path / "one", "--max_steps", "1", *named)
    assert resume(tmp_path / "one", "--max_steps", "3") == 0
    with safe_open(first / "embeddings.safetensors", "pt") as file:
        assert list(file.keys()) == ["<${star}>"]
        assert (file.metadata()["init_word"], file.metadata()["step"]) == ("red ${x}", "3")
    assert read_state_dict(first / "last.ckpt")["embedding_manager.initial_embeddings"].shape == (1, 128)
    begin = ["--max_steps", "1", *named, "--embedding_manager_ckpt", str(first / "embeddings.safetensors")]
    still = learn(tmp_path / "two", *begin, "model.base_learning_rate=1e-12")
    moved = learn(tmp_path / "three", *begin)
    runs = (first, still, moved)
    start, still, moved = (load_concept(run / "embeddings.safetensors").vectors for run in runs)
    assert torch.allclose(still, start, atol=1e-5) and not torch.allclose(moved, start, atol=1e-3)


def test_learning_without_a_base_model_is_asked_for_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    arguments = [text for text in LEARN if text not in ("--actual_resume", str(MODEL))]
    arguments += ["-p", str(tmp_path / "run"), NO_PICTURES, "--max_steps", "1", "model.params.ckpt_path=null"]
    assert main.main(arguments) == 0
    assert any("against random weights" in line for line in caplog.messages)


def test_errors_that_are_not_the_users(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A defect shows its trace; memory that is too small names what helps, and Lightning's refusals are sentences."""

    def failing(error: Exception) -> None:
        def fail(*_: object) -> None:
            raise error

        monkeypatch.setattr("ldm.training.runs.open_run", fail)

    failing(RuntimeError("a defect"))
    with pytest.raises(RuntimeError, match="a defect"):
        main.main(LEARN)
    failing(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."))
    assert main.main(LEARN) == 2
    assert "model.params.frozen_dtype=float16" in capsys.readouterr().err
    assert messages.sentence(RuntimeError("never raised")) is None


def test_make_small_model_trains_the_parts_in_order(tmp_path: Path) -> None:
    """Each is started, or resumed where it was started; the U-Net's configuration names what the others leave."""
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin/python"
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    (tmp_path / ".installed").touch()
    for path in ("pyproject.toml", "requirements.lock", "Makefile"):
        (tmp_path / path).write_bytes((ROOT / path).read_bytes())
    (tmp_path / "logs/small/text/configs").mkdir(parents=True)
    (tmp_path / "logs/small/text/configs/x-lightning.yaml").touch()
    make = ["make", "-s", "small-model", "BIN=bin", "INSTALLED=.installed", "-o", ".installed"]
    ran = subprocess.run(make, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.splitlines()
    names = ("autoencoder", "text", "diffusion", "classifier")
    expected = [f"main.py --base configs/demo/{name}.yaml -p logs/small/{name} -t" for name in names]
    assert ran == [expected[0], "main.py -r logs/small/text -t", *expected[2:]]
    params = load_config(ROOT / "configs/demo/diffusion.yaml").model.params
    assert params.first_stage_ckpt == "logs/small/autoencoder/checkpoints/last.ckpt"
    assert params.cond_stage_ckpt == "logs/small/text/checkpoints/last.ckpt"
