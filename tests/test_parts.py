"""A configuration with `parts:` trains them first, in the folder of the run, and what comes out can be packed."""

import shutil
import signal
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from runs import ROOT, finish, saved_tensors, start, wait_for
from safetensors.torch import load_file

import main
from evaluation.captions import load, load_judge
from evaluation.pictures import generate
from ldm.config import load_config
from scripts import pack_model

PARTS = {"first_stage_ckpt": "autoencoder", "cond_stage_ckpt": "text"}
QUICK = ["-t", "--enable_progress_bar", "false", "--accelerator", "cpu"]


def small(name: str, folder: Path, steps: int = 2) -> Path:
    """configs/demo/NAME.yaml for a few steps of two pictures."""
    config = load_config(ROOT / "configs/demo" / f"{name}.yaml")
    for key, value in {
        "data.params.batch_size": 2,
        "data.params.train.params.size": 8,
        "data.params.validation": None,
        "lightning.trainer.max_steps": steps,
        "lightning.modelcheckpoint.params.every_n_train_steps": 1,
    }.items():
        OmegaConf.update(config, key, value)
    config.lightning.trainer.pop("val_check_interval", None)
    config.lightning.get("callbacks", {}).pop("image_logger", None)
    for key in config.get("parts") or ():
        config.parts[key] = str(folder / f"{PARTS[key]}.yaml")
    OmegaConf.save(config, folder / f"{name}.yaml")
    return folder / f"{name}.yaml"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


@pytest.fixture
def at_root(monkeypatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture
def base(tmp_path: Path) -> str:
    """A configuration whose parts take two steps each."""
    small("autoencoder", tmp_path)
    small("text", tmp_path)
    return str(small("diffusion", tmp_path))


def test_parts_come_first_and_are_the_same_as_given_ones(base: str, tmp_path: Path, at_root):
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert main.main(["--base", base, "-p", str(whole), *QUICK]) == 0
    saved = weights(whole)
    parts = {f"first_stage_model.{key}": value for key, value in weights(whole / "first_stage").items()}
    parts |= {key: value for key, value in weights(whole / "cond_stage").items() if key.startswith("cond_stage_model.")}
    kept = [key for key in parts if "quant_conv" not in key]  # those take up the standardization of the latents
    assert len(kept) > 150 and all(torch.equal(saved[key], parts[key]) for key in kept)
    given = [f"model.params.{key}={whole / key.removesuffix('_ckpt')}/checkpoints/last.ckpt" for key in PARTS]
    assert main.main(["--base", base, "-p", str(again), *QUICK, *given]) == 0
    assert not (again / "first_stage").exists()
    other = weights(again)
    assert saved.keys() == other.keys() and all(torch.equal(saved[key], other[key]) for key in saved)


def test_parts_are_trained_where_and_how_the_model_is(base: str, tmp_path: Path, at_root):
    run = tmp_path / "run"
    settings = ["--precision", "32-true", "--scale_lr", "false", "-s", "7", "lightning.trainer.accelerator=cpu"]
    quick = [flag for flag in QUICK if flag not in ("--accelerator", "cpu")]
    assert main.main(["--base", base, "-p", str(run), *quick, *settings]) == 0
    for folder in (run, run / "first_stage", run / "cond_stage"):
        (lightning,) = (OmegaConf.load(file).lightning for file in folder.glob("configs/*-lightning.yaml"))
        assert (lightning.trainer.precision, lightning.trainer.accelerator) == ("32-true", "cpu")
    rates = [torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["optimizer_states"][0]["param_groups"][0]
             ["initial_lr"] for folder in (run / "first_stage", run / "cond_stage")]  # fmt: skip
    assert rates == [4.0e-5, 4.0e-6]  # not times the batch


@pytest.mark.parametrize("name", ["autoencoder", "text", "classifier"])
def test_a_resumed_run_from_scratch_is_the_same_run(name: str, tmp_path: Path, at_root):
    """Interrupted at step 2 of 4: weights, averages and moments end bit-identical."""
    whole, part = tmp_path / "whole", tmp_path / "part"
    save = "lightning.modelcheckpoint.params.every_n_train_steps=2"
    assert main.main(["--base", str(small(name, tmp_path, steps=4)), "-p", str(whole), *QUICK, save]) == 0
    shutil.copytree(whole, part)
    (part / "checkpoints/previous.ckpt").replace(part / "checkpoints/last.ckpt")
    assert main.main(["-r", str(part), *QUICK]) == 0
    expected, got = (saved_tensors(run / "checkpoints") for run in (whole, part))
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[key], got[key]) for key in expected)


def test_an_interrupted_part_goes_on(base: str, tmp_path: Path, at_root):
    small("text", tmp_path, steps=100_000)
    run = tmp_path / "run"
    process = start("main.py", "--base", base, "-p", str(run), *QUICK)
    wait_for((run / "cond_stage/checkpoints/last.ckpt").is_file)
    process.send_signal(signal.SIGINT)
    _, errors = finish(process)
    assert process.returncode == 130 and f"main.py -r {run} -t" in errors
    assert not (run / "checkpoints/last.ckpt").exists()
    before = (run / "first_stage/checkpoints/last.ckpt").read_bytes()
    reached = torch.load(run / "cond_stage/checkpoints/last.ckpt", weights_only=True)["global_step"]
    (saved,) = (run / "cond_stage/configs").glob("*-lightning.yaml")
    saved.write_text(saved.read_text().replace("100000", str(reached + 2)))
    assert main.main(["-r", str(run), *QUICK]) == 0
    assert torch.load(run / "cond_stage/checkpoints/last.ckpt", weights_only=True)["global_step"] == reached + 2
    assert (run / "first_stage/checkpoints/last.ckpt").read_bytes() == before
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 2


def test_the_trained_model_is_packed_and_generates(base: str, tmp_path: Path, at_root):
    run, packed = tmp_path / "run", tmp_path / "model.safetensors"
    assert main.main(["--base", base, "-p", str(run), *QUICK]) == 0
    pack_model.main([str(run), str(packed)])
    shipped, own = (load_file(file) for file in (ROOT / "models/demo/model.safetensors", packed))
    assert {key: x.shape for key, x in own.items()} == {key: x.shape for key, x in shipped.items()}
    checkpoint = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    averaged, current = checkpoint["state_dict"], checkpoint["current_model_state"]
    assert all(torch.equal(x, averaged[key].half()) for key, x in own.items())
    assert not torch.equal(averaged["model.diffusion_model.out.2.bias"], current["model.diffusion_model.out.2.bias"])
    frozen = [key for key in averaged if key.startswith(("first_stage_model.", "cond_stage_model."))]
    assert all(torch.equal(averaged[key], current[key]) for key in frozen)  # standardization of the latents included
    model = load("configs/demo/finetune.yaml", str(packed), stages=1)
    assert generate(model, [["a star"]], [0], steps=2, scale=2.5).shape == (1, 3, 128, 128)


def test_the_trained_classifier_is_packed_and_reads(tmp_path: Path, at_root):
    run, packed = tmp_path / "run", tmp_path / "classifier.safetensors"
    assert main.main(["--base", str(small("classifier", tmp_path)), "-p", str(run), *QUICK]) == 0
    pack_model.main([str(run), str(packed)])
    assert load_judge(str(packed)).read(torch.zeros(1, 3, 128, 128)).shape == (1, 6)


def test_a_run_that_ends_between_savings_keeps_average_and_weights(tmp_path: Path, at_root):
    run = tmp_path / "run"
    saving = "lightning.modelcheckpoint.params.every_n_train_steps=2"
    assert main.main(["--base", str(small("autoencoder", tmp_path, steps=3)), "-p", str(run), *QUICK, saving]) == 0
    checkpoint = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    averaged, current = checkpoint["state_dict"], checkpoint["current_model_state"]
    assert checkpoint["global_step"] == 3
    assert not torch.equal(averaged["encoder.conv_in.weight"], current["encoder.conv_in.weight"])


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["parts.first_stage_ckpt=none.yaml"], "no configuration file 'none.yaml'"),
        (["parts.first_stag_ckpt=a.yaml"], "did you mean 'first_stage_ckpt'?"),
        (["parts=a.yaml"], "'parts:' must be a section"),
        (["--devices", "2", "--strategy", "ddp"], "use --devices 1"),
    ],
)
def test_wrong_parts_get_one_sentence(arguments: list[str], names: str, base: str, tmp_path: Path, capsys, at_root):
    run = tmp_path / "run"
    assert main.main(["--base", base, "-p", str(run), *QUICK, *arguments]) == 2
    assert names in capsys.readouterr().err and not run.exists()


def test_a_whole_model_needs_no_parts(base: str, tmp_path: Path, at_root):
    model = ROOT / "models/demo/model.safetensors"
    run = tmp_path / "run"
    settings = ["--max_steps", "1", "model.params.standardize_latents=false"]
    assert main.main(["--base", base, "-p", str(run), "--actual_resume", str(model), *settings, *QUICK]) == 0
    assert not (run / "first_stage").exists()
