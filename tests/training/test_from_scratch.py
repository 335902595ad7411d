"""The parts of the small model, trained from scratch for a few steps, resumed, packed and used."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from runs import MODEL, ROOT, resume, same_tensors
from safetensors.torch import load_file

import main
from evaluation.captions import load, load_judge
from ldm.config import load_config
from scripts import pack_model

QUICK = ["-t", "--enable_progress_bar", "false", "--accelerator", "cpu"]


def train(name: str, folder: Path, *arguments: str, steps: int = 2) -> Path:
    """Train configs/demo/NAME.yaml for a few steps of two images; the log folder."""
    config = load_config(ROOT / "configs/demo" / f"{name}.yaml")
    for key, value in {
        "data.params.batch_size": 2,
        "data.params.train.params.size": 8,
        "data.params.validation": None,
        "lightning.trainer.max_steps": steps,
        "lightning.modelcheckpoint.params.every_n_train_steps": 2,
    }.items():
        OmegaConf.update(config, key, value)
    config.lightning.trainer.pop("val_check_interval", None)
    config.lightning.get("callbacks", {}).pop("image_logger", None)
    OmegaConf.save(config, folder / f"{name}.yaml")
    assert main.main(["--base", str(folder / f"{name}.yaml"), "-p", str(folder / name), *QUICK, *arguments]) == 0
    return folder / name


def weights(run: Path) -> dict[str, dict[str, torch.Tensor]]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


NAMES = ("autoencoder", "text", "classifier")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The log folders of three steps, saved at 2 and 3."""
    folder = tmp_path_factory.mktemp("trained")
    return {name: train(name, folder, steps=3) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_from_scratch_is_the_same_run(name: str, trained: dict[str, Path], tmp_path: Path) -> None:
    """Interrupted at step 2 of 3: weights, averages and moments end bit-identical; the average is not the weights."""
    whole, part = trained[name], tmp_path / "part"
    shutil.copytree(whole, part)
    (part / "checkpoints/previous.ckpt").replace(part / "checkpoints/last.ckpt")
    assert resume(part) == 0
    assert same_tensors(whole / "checkpoints", part / "checkpoints")
    if name == "autoencoder":
        checkpoint, key = weights(whole), "encoder.conv_in.weight"
        assert not torch.equal(checkpoint["state_dict"][key], checkpoint["current_model_state"][key])


def test_the_model_of_trained_parts_is_packed_and_generates(trained: dict[str, Path], tmp_path: Path) -> None:
    first_stage, text = trained["autoencoder"], trained["text"]
    parts = {"first_stage_ckpt": first_stage, "cond_stage_ckpt": text}
    given = [f"model.params.{key}={run}/checkpoints/last.ckpt" for key, run in parts.items()]
    run, packed = train("diffusion", tmp_path, *given), tmp_path / "model.safetensors"
    checkpoint = weights(run)
    averaged, current = checkpoint["state_dict"], checkpoint["current_model_state"]
    expected = {f"first_stage_model.{key}": x for key, x in weights(first_stage)["state_dict"].items()}
    expected |= {key: x for key, x in weights(text)["state_dict"].items() if key.startswith("cond_stage_model.")}
    kept = [key for key in expected if "quant_conv" not in key]  # those take up the standardization of the latents
    assert len(kept) > 150 and all(torch.equal(averaged[key], expected[key]) for key in kept)
    frozen = [key for key in averaged if key.startswith(("first_stage_model.", "cond_stage_model."))]
    assert all(torch.equal(averaged[key], current[key]) for key in frozen)  # standardization included
    assert not torch.equal(averaged["model.diffusion_model.out.2.bias"], current["model.diffusion_model.out.2.bias"])

    pack_model.main([str(run), str(packed)])
    shipped, own = (load_file(file) for file in (MODEL, packed))
    assert {key: x.shape for key, x in own.items()} == {key: x.shape for key, x in shipped.items()}
    assert all(torch.equal(x, averaged[key].half()) for key, x in own.items())
    model = load("configs/demo/diffusion.yaml", str(packed), stages=1)
    assert all(torch.equal(x.half(), own[key]) for key, x in model.state_dict().items() if key in own)


def test_the_trained_classifier_is_packed_and_reads(trained: dict[str, Path], tmp_path: Path) -> None:
    packed = tmp_path / "classifier.safetensors"
    pack_model.main([str(trained["classifier"]), str(packed)])
    assert load_judge(str(packed)).read(torch.zeros(1, 3, 128, 128)).shape == (1, 6)
