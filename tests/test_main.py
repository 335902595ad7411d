"""`main.py` as users run it, on the small model that ships."""

from __future__ import annotations

import csv
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning_utilities.core.imports import RequirementCache
from omegaconf import OmegaConf
from pytorch_lightning.loggers import wandb
from runs import FourPictures
from safetensors import safe_open

import main
from ldm.checkpoint import file_hash, read_state_dict
from ldm.cli import train as cli
from ldm.data.repeated import Repeated
from ldm.embeddings import load_concept
from ldm.files import base_model
from ldm.training.setup import own_loggers

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "models/demo/model.safetensors"
PICTURES = ROOT / "models/demo/references/dotted-star"
LEARN = ["--base", str(ROOT / "configs/demo/finetune.yaml"), "-t", "--actual_resume", str(MODEL)]
LEARN += ["--data_root", str(PICTURES), "--enable_progress_bar", "false"]
NO_PICTURES = "lightning.callbacks.image_logger.params.disabled=true"


@pytest.fixture(autouse=True)
def in_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # configurations name the tokenizer's folder relative to it


def learn(folder: Path, *arguments: str) -> Path:
    """Learn into exactly `folder`; returns its checkpoints."""
    assert main.main([*LEARN, "-p", str(folder), NO_PICTURES, *arguments]) == 0
    return folder / "checkpoints"


def saved_tensors(checkpoints: Path) -> dict[str, torch.Tensor]:
    state = torch.load(checkpoints / "last.ckpt", weights_only=True)
    flat = dict(state["state_dict"])
    for number, moments in state["optimizer_states"][0]["state"].items():
        flat |= {f"{number}.{name}": value for name, value in moments.items()}
    return flat


def test_resumed_run_is_the_same_run(tmp_path: Path) -> None:
    """Interrupted between epochs or within one, with flags that are not given again: bit-identical."""
    steps = ["data.params.train.params.repeats=24", "data.params.batch_size=4"]  # epochs of 6 steps
    steps += ["-s", "7", "--scale_lr", "false", "model.base_learning_rate=1e-4", "--gpus", "0"]
    whole = learn(tmp_path / "whole", "--max_steps", "16", *steps)
    for stop in ("6", "9"):
        part = tmp_path / f"part{stop}"
        learn(part, "--max_steps", stop, *steps)
        assert main.main(["-r", str(part), "-t", "--max_steps", "16", "--enable_progress_bar", "false"]) == 0
        expected, got = saved_tensors(whole), saved_tensors(part / "checkpoints")
        assert expected.keys() == got.keys()
        assert all(torch.equal(expected[key], got[key]) for key in expected)
        one, two = (load_concept(run / "embeddings.safetensors") for run in (whole, part / "checkpoints"))
        assert torch.equal(one.vectors, two.vectors)


def test_a_run_that_has_no_checkpoint_yet_begins_with_its_own_flags(tmp_path: Path) -> None:
    steps = ["--max_steps", "2", "-s", "7", "--scale_lr", "false"]
    whole, again = learn(tmp_path / "whole", *steps), learn(tmp_path / "again", *steps)
    for path in again.iterdir():
        path.unlink()
    assert main.main(["-r", str(tmp_path / "again"), "-t", "--enable_progress_bar", "false"]) == 0
    expected, got = saved_tensors(whole), saved_tensors(again)
    assert all(torch.equal(expected[key], got[key]) for key in expected)


@pytest.mark.parametrize("seed", ["-1", "x", "true", "4294967296"])
def test_a_seed_in_the_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str], seed: str) -> None:
    assert main.main([*LEARN, "-p", str(tmp_path / "run"), f"lightning.seed={seed}"]) == 2
    assert "lightning.seed must be a whole number" in capsys.readouterr().err


def test_steps_of_several_batches(tmp_path: Path) -> None:
    """Also where they do not divide an epoch, here of 4 batches."""
    steps = ["data.params.train.params.repeats=8", "data.params.batch_size=2", "--accumulate_grad_batches", "3"]
    checkpoints = learn(tmp_path / "run", *steps, "--max_steps", "3", "--max_epochs", "9")
    assert torch.load(checkpoints / "last.ckpt", weights_only=True)["global_step"] == 3


def four_pictures(folder: Path, *arguments: str, **params: object) -> int:
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
    assert four_pictures(tmp_path, "--max_steps", "5") == 0  # two steps an epoch
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 5
    dataset = Repeated(FourPictures())
    assert [dataset[n]["sample"] for n in (0, 6, 9)] == [0, 6, 9]
    assert all(torch.equal(dataset[n]["image"], FourPictures()[n % 4]["image"]) for n in range(12))


@pytest.mark.parametrize(
    ("params", "sentence"),
    [
        ({"count": 0}, "FourPictures has no samples that can be counted"),
        ({"lacks": "caption"}, "The samples of FourPictures lack 'caption'; add it"),
        ({"lacks": "image"}, "The samples of FourPictures lack 'image'; add it"),
        ({"shape": [3, 64, 64]}, "'image' of FourPictures must be (height, width, 3) in [-1, 1], not (3, 64"),
        ({"shape": [64, 60, 3]}, "The train pictures' size 60 must be a multiple of 32; nearest: 64."),
        ({"shape": [160000, 160000, 3]}, "Learning from 160000 x 160000 pixels, 2 at a time, needs about"),
    ],
)
def test_a_data_set_of_ones_own_that_does_not_fit(
    params: dict[str, object], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert four_pictures(tmp_path, **params) == 2
    assert sentence in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_base_model_is_hashed_once_for_all_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Path] = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(base_model, "REMEMBERED_FROM", 0)
    monkeypatch.setattr(base_model, "file_hash", lambda path: hashed.append(path) or file_hash(path))
    for name in ("a", "b"):
        concept = load_concept(learn(tmp_path / name, "--max_steps", "1") / "embeddings.safetensors")
        assert concept.metadata["base_model_sha256"] == file_hash(MODEL)
    assert hashed == [MODEL]


def test_another_seed_is_another_run(tmp_path: Path) -> None:
    one = load_concept(learn(tmp_path / "a", "--max_steps", "2") / "embeddings.safetensors")
    two = load_concept(learn(tmp_path / "b", "--max_steps", "2", "-s", "5") / "embeddings.safetensors")
    assert not torch.equal(one.vectors, two.vectors)


def test_what_a_run_leaves(tmp_path: Path) -> None:
    arguments = [*LEARN, "-n", "mine", "-l", str(tmp_path / "logs"), "--max_steps", "4", "--log_every_n_steps", "1"]
    overrides = [
        "lightning.modelcheckpoint.params.every_n_train_steps=2",
        "lightning.callbacks.image_logger.params.batch_frequency=4",
        "lightning.callbacks.image_logger.params.log_images_kwargs.ddim_steps=2",
        f"data.params.validation={{target: ldm.data.personalized.PersonalizedBase, params: "
        f"{{size: 64, set: val, data_root: {PICTURES}}}}}",
        "data.params.train.params.repeats=16",
    ]
    assert main.main([*arguments, *overrides]) == 0
    (run,) = (tmp_path / "logs").iterdir()
    assert re.fullmatch(r"dotted-star\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d_mine", run.name)

    checkpoints = {path.name for path in (run / "checkpoints").iterdir()}
    numbered = {"embeddings_gs-2.safetensors", "embeddings_gs-4.safetensors"}
    assert checkpoints == {"last.ckpt", "previous.ckpt", "embeddings.safetensors"} | numbered
    configs = {re.sub(r"^[\dT:-]+", "", path.name) for path in (run / "configs").iterdir()}
    assert configs == {"project.yaml", "lightning.yaml"}
    pictures = {path.name for path in (run / "images" / "train").iterdir()}
    where = "gs-000004_e-000001_b-000002.jpg"
    assert pictures == {f"{key}_{where}" for key in ("reconstruction", "samples", "samples_scaled")}

    (metrics,) = (run / "csv").glob("*/metrics.csv")
    with open(metrics, newline="") as file:
        names = set(next(csv.reader(file)))
    for split in ("train", "val"):
        assert {f"{split}/loss_simple", f"{split}/loss_vlb", f"{split}/loss"} <= names
    assert {"val/loss_simple_ema", "val/loss_ema"} <= names
    assert list((run / "tensorboard").glob("events*"))

    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["global_step"] == 4
    assert state["state_dict"] and all(key.startswith("embedding_manager.") for key in state["state_dict"])

    with safe_open(run / "checkpoints" / "embeddings.safetensors", "pt") as file:
        metadata = file.metadata()
        assert file.get_tensor("*").shape == (10, 128)
    assert metadata["init_word"] == "thing"
    assert metadata["step"] == "4"
    assert len(metadata["base_model_sha256"]) == 64


LOGGER = "lightning.logger.target=pytorch_lightning.loggers"


def test_a_logger_of_ones_own(tmp_path: Path) -> None:
    """Beside those that are always there; it lies in the run's folder unless it is given another."""
    arguments = ["--max_steps", "2", "--log_every_n_steps", "1", f"{LOGGER}.CSVLogger"]
    learn(tmp_path / "run", *arguments, "lightning.logger.params.version=mine", "lightning.logger.params.prefix=x")
    (usual,) = (tmp_path / "run/csv").glob("*/metrics.csv")
    own = tmp_path / "run/lightning_logs/mine/metrics.csv"
    usual, own = (path.read_text().splitlines()[0].split(",") for path in (usual, own))
    assert "train/loss" in usual and "x-train/loss" in own
    learn(tmp_path / "other", *arguments, f"lightning.logger.params={{save_dir: {tmp_path}/there, name: n}}")
    assert (tmp_path / "there/n/version_0/metrics.csv").is_file()


def test_a_logger_is_called_as_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """WandbLogger has no name and the folder it was started in of its own."""
    monkeypatch.setattr(wandb, "_WANDB_AVAILABLE", True)
    run = SimpleNamespace(folder=tmp_path / "run")
    (logger,) = own_loggers({"target": "pytorch_lightning.loggers.WandbLogger", "params": {"project": "p"}}, run)
    assert (logger.save_dir, logger._name, logger._project) == (str(run.folder), "run", "p")


def test_a_logger_whose_package_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(wandb, "_WANDB_AVAILABLE", RequirementCache("wandb>=9999"))
    assert main.main([*LEARN, "-p", str(tmp_path / "run"), f"{LOGGER}.WandbLogger"]) == 2
    assert "lightning.logger: pytorch_lightning.loggers.WandbLogger needs a package" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_only_the_embedding_is_trained(tmp_path: Path) -> None:
    from ldm.training.runs import open_run
    from ldm.training.setup import build_config, build_trainer, save_configs
    from ldm.util import instantiate_from_config

    options = cli.parse([*LEARN, "-p", str(tmp_path / "run"), "--max_steps", "2", NO_PICTURES])
    run = open_run(options)
    config = build_config(options, run)
    module, data = instantiate_from_config(config.model), instantiate_from_config(config.data)
    save_configs(config, run)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    initial = module.embedding_manager.eval().embeddings().detach()
    build_trainer(config, run, module).fit(module, datamodule=data)
    for key, value in module.state_dict().items():
        if not key.startswith("embedding_manager.attention."):
            assert torch.equal(before[key], value), key
    frozen = [module.model, module.first_stage_model, module.cond_stage_model]
    assert all(p.grad is None and not p.requires_grad for part in frozen for p in part.parameters())
    assert not torch.allclose(initial, module.embedding_manager.eval().embeddings())


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="the platform has no such signal")
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_signals_save(tmp_path: Path, ending: signal.Signals) -> None:
    """SIGUSR1 saves and goes on; Ctrl-C and SIGTERM finish the step, save and say how to resume."""
    command = [sys.executable, "main.py", *LEARN, "-p", str(tmp_path / "run"), NO_PICTURES, "--max_steps", "100000"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    last = tmp_path / "run/checkpoints/last.ckpt"
    metrics = tmp_path / "run/csv"
    try:
        wait_for(lambda: any(metrics.glob("*/metrics.csv")) or last.exists())
        process.send_signal(signal.SIGUSR1)
        wait_for(last.exists)
        process.send_signal(ending)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + ending
    assert "Stopped and saved at step" in errors and "-r" in errors
    assert torch.load(last, weights_only=True)["global_step"] > 0


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--bas", "x.yaml"], "unknown argument '--bas'; did you mean --base?"),
        (["--base", "x.yaml"], "There is no configuration file 'x.yaml'"),
        ([], "a configuration is needed"),
        (["--base", "main.py"], "not a readable YAML file"),
        ([*LEARN, "modl.x=1"], "Unknown section 'modl' in the configuration; did you mean 'model'?"),
        ([*LEARN, "model.params.prospect_stage=3"], "did you mean 'prospect_stages'?"),
        ([*LEARN, "lightning.trainer.max_step=3"], "did you mean 'max_steps'?"),
        ([*LEARN, "lightning.trainr.max_steps=3"], "did you mean 'trainer'?"),
        ([*LEARN, "model.base_learning_rate=null"], "does not say 'model.base_learning_rate:'"),
        ([*LEARN, "model.target=os.system"], "outside the packages a configuration may name"),
        ([*LEARN, "model.target=ldm.config.importlib"], "must be a class"),
        ([*LEARN, "--actual_resume", "nowhere.ckpt"], "nowhere.ckpt"),
        ([*LEARN, "--data_root", "nowhere"], "nowhere"),
        ([*LEARN, "--gpus", "zero"], "--gpus takes device numbers"),
        ([*LEARN, "--max_steps", "many"], "invalid int value"),
        ([*LEARN, "model.base_learning_rat=1"], "did you mean 'base_learning_rate'?"),
        ([*LEARN, "model.prospect_stages=4"], "Unknown key 'prospect_stages' beside"),
        ([*LEARN, "model.base_learning_rate=fast"], "base_learning_rate must be a number"),
        ([*LEARN, "model.params.channels=8"], "the U-Net takes 4"),
        ([*LEARN, "model.params.channels=[1"], "The configuration cannot be merged"),
        ([*LEARN, "model.params.prospect_stages=ten"], "prospect_stages must be a whole number"),
        ([*LEARN, "data.batch_size=4"], "Unknown key 'batch_size' beside"),
        ([*LEARN, "data.params.train=null"], "does not say 'data.params.train:'"),
        ([*LEARN, "data.params.train.params.size=60"], "must be a multiple of 32; nearest: 64"),
        ([*LEARN, "data.params.train.params.size=null"], "size is needed"),
        ([*LEARN, "lightning.modelcheckpoint.params.every_n_train_step=2"], "did you mean 'every_n_train_steps'?"),
        ([*LEARN, "lightning.modelcheckpoint.params.every_n_train_steps=0"], "at least 1"),
        ([*LEARN, "lightning.callbacks.image_logger.params.batch_frequency=0"], "at least 1"),
        ([*LEARN, "--accumulate_grad_batches", "0"], "at least 1"),
        ([*LEARN, "--placeholder_tokens", ""], "A placeholder must be a visible text"),
        ([*LEARN, "--init_word", ""], "has no token"),
        ([*LEARN, "-s", "-1"], "is not a whole number"),
        (LEARN[:5], "--data_root"),
        (["-r", "nowhere"], "Nothing to resume"),
        (["-r", "x", "-n", "y", "--base", "z"], "exclude each other"),
    ],
)
def test_bad_input_gets_one_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = [*arguments, "-l", str(tmp_path)]
    try:
        code = main.main(arguments)
    except SystemExit as error:
        code = error.code
    assert code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1 and sentence in lines[0]
    assert not list(tmp_path.iterdir())


def test_help_is_quick_and_complete() -> None:
    started = time.monotonic()
    text = subprocess.run([sys.executable, "main.py", "--help"], capture_output=True, text=True, cwd=ROOT).stdout
    assert time.monotonic() - started < 1.0
    flags = "base train resume seed no_test project debug postfix logdir scale_lr datadir_in_name actual_resume"
    flags += " data_root embedding_manager_ckpt placeholder_tokens init_word name gpus max_steps precision devices"
    for flag in flags.split():
        assert f"--{flag}" in text


def test_trainer_flags_are_the_trainers() -> None:
    import inspect

    import pytorch_lightning as pl

    assert set(cli.TRAINER_FLAGS) <= set(inspect.signature(pl.Trainer).parameters)


def test_flags_take_both_spellings() -> None:
    for spelling in ("--data_root", "--data-root"):
        assert cli.parse(["--base", "a.yaml", spelling, "b", "x.y=1"]).data_root == "b"
    assert cli.parse(["--base", "a.yaml", "x.y=1"]).overrides == ["x.y=1"]
    lists = ["--placeholder_tokens", "<a>", "x=1", "-r", "y=2/run", "-t", "z.w=3", "--gpus", "0,"]
    options = cli.parse(lists)
    assert options.overrides == ["x=1", "z.w=3"] and options.train and options.placeholder_tokens == ["<a>"]
    assert options.resume == "y=2/run", "the value of a flag stays its value"


@pytest.mark.parametrize(
    ("gpus", "numbers"), [("0,", [0]), ("0,1", [0, 1]), ("2", [0, 1]), (None, None), ("1,", [1]), ("0", []), ("-1", -1)]
)
def test_gpus(gpus: str | None, numbers: list[int] | int | None) -> None:
    assert cli.translate_gpus(gpus) == numbers


def test_learning_rate_is_scaled_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        learn(tmp_path / "run", "--max_steps", "1", "--accumulate_grad_batches", "2", "--gpus", "0,")
    lines = [record.message for record in caplog.records if record.message.startswith("Learning rate")]
    assert lines == [
        "Learning rate 4.80e-04 = 2 (accumulate_grad_batches) x 1 (devices) x 8 (batch size) x 3.00e-05 (base)"
    ]


def test_embedding_flags(tmp_path: Path) -> None:
    first = learn(tmp_path / "one", "--max_steps", "1", "--init_word", "red star", "--placeholder_tokens", "<star>")
    with safe_open(first / "embeddings.safetensors", "pt") as file:
        assert list(file.keys()) == ["<star>"]
        assert file.metadata()["init_word"] == "red star"
    assert read_state_dict(first / "last.ckpt")["embedding_manager.initial_embeddings"].shape == (1, 128)


def test_learning_goes_on_from_a_file(tmp_path: Path) -> None:
    """`--embedding_manager_ckpt` starts from the saved vectors, and they are trained further."""
    first = learn(tmp_path / "one", "--max_steps", "3") / "embeddings.safetensors"
    start = load_concept(first).vectors
    still = learn(tmp_path / "two", "--max_steps", "1", "--embedding_manager_ckpt", str(first),
                  "model.base_learning_rate=1e-12")  # fmt: skip
    moved = learn(tmp_path / "three", "--max_steps", "1", "--embedding_manager_ckpt", str(first))
    still, moved = (load_concept(run / "embeddings.safetensors").vectors for run in (still, moved))
    assert torch.allclose(still, start, atol=1e-5)
    assert not torch.allclose(moved, start, atol=1e-3)


def test_a_damaged_checkpoint_is_not_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = learn(tmp_path / "run", "--max_steps", "2") / "last.ckpt"
    last.write_bytes(last.read_bytes()[:5000])
    assert main.main(["-r", str(tmp_path / "run"), "-t"]) == 2
    assert str(last) in capsys.readouterr().err


def test_learning_without_a_base_model_is_asked_for_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    arguments = [text for text in LEARN if text not in ("--actual_resume", str(MODEL))] + [
        "model.params.ckpt_path=null"
    ]
    assert main.main([*arguments, "-p", str(tmp_path / "run"), NO_PICTURES, "--max_steps", "1"]) == 0
    assert any("against random weights" in record.message for record in caplog.records)


def test_base_may_be_given_twice() -> None:
    assert cli.parse(["-b", "a.yaml", "b.yaml", "--base", "c.yaml"]).base == ["a.yaml", "b.yaml", "c.yaml"]
    assert cli.parse(["-b", "d.yaml"]).base == ["d.yaml"]  # nothing is left of an earlier call
