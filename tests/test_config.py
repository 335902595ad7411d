"""Configurations: what is merged, what is refused, and with which sentence."""

from __future__ import annotations

import importlib
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ldm.config import ConfigError, allow_targets, get_class, instantiate_from_config, load_config
from ldm.util import instantiate_from_config as from_util
from ldm.util import pick_device, to_device

ATTENTION = "ldm.modules.attention.CrossAttention"


def test_builds_with_parameters() -> None:
    module = instantiate_from_config({"target": ATTENTION, "params": {"query_dim": 8}}, heads=2, dim_head=4)
    assert module.to_q.weight.shape == (8, 8)
    assert isinstance(instantiate_from_config({"target": "torch.nn.Identity"}), nn.Identity)
    assert from_util is instantiate_from_config


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({}, "A `target:` is missing"),
        ({"target": "os.system", "params": {"command": "true"}}, "outside the packages"),
        ({"target": "builtins.eval"}, "outside the packages"),
        ({"target": "subprocess.Popen"}, "outside the packages"),
        ({"target": "torch.nn.Linear"}, "outside the packages"),
        ({"target": "ldmx.thing"}, "outside the packages"),
        ({"target": "ldm.checkpoint.os.system"}, "cannot be imported"),
        ({"target": "ldm.config.importlib"}, "must be a class"),
        ({"target": "ldm.config.load_config"}, "must be a class"),
        ({"target": "ldm.config.Path"}, "must be a class"),  # a class, but not one of ours
        ({"target": "ldm.modules.attention.Nothing"}, "cannot be imported"),
        ({"target": ATTENTION, "params": {"query_dim": 8, "headz": 2}}, "did you mean 'heads'?"),
        ({"target": ATTENTION}, "needs the parameter 'query_dim'"),
    ],
)
def test_refuses(config: dict, sentence: str) -> None:
    with pytest.raises(ConfigError, match=".*") as caught:
        instantiate_from_config(config)
    assert sentence in str(caught.value)


def test_the_allow_list_can_be_extended_by_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm.config._allowed", set())
    with pytest.raises(ConfigError, match="allow its package with --allow_targets"):
        get_class("fractions.Fraction")
    allow_targets("fractions")
    assert get_class("fractions.Fraction").__name__ == "Fraction"
    config = {"target": "torch.nn.Identity", "params": {"inner": {"target": "fractions.Fraction"}}}
    assert instantiate_from_config(config["params"]["inner"]) == 0  # configurations inside others, too


def test_a_key_without_meaning_is_accepted_and_named_once(caplog: pytest.LogCaptureFixture) -> None:
    config = {"target": "ldm.training.callbacks.ImageLogger", "params": {"batch_frequency": 8, "clamp": True}}
    with caplog.at_level(logging.INFO):
        instantiate_from_config(config)
    assert [record.message for record in caplog.records if "'clamp'" in record.message]
    assert len(caplog.records) == 1


def test_merges_from_left_to_right(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("model: {x: 1, y: 2}\n")
    (tmp_path / "b.yaml").write_text("model: {y: 3}\n")
    config = load_config(tmp_path / "a.yaml", tmp_path / "b.yaml", overrides=["model.z.w=4"])
    assert config.model == {"x": 1, "y": 3, "z": {"w": 4}}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("model: [1", "not a readable YAML file"),
        ("- 1\n- 2\n", "must hold a YAML mapping"),
        ("modell: {}\n", "did you mean 'model'?"),
        ("model: !!python/object/apply:os.system ['touch /tmp/never']\n", "not a readable YAML file"),
    ],
)
def test_unreadable_files(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_binary_and_missing_files(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(bytes(range(256)))
    for path in (tmp_path / "binary.yaml", tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ConfigError):
            load_config(path)


@pytest.mark.parametrize(
    "path",
    [
        "ldm.models.diffusion.ddpm.LatentDiffusion",
        "ldm.models.diffusion.ddim.DDIMSampler",
        "ldm.models.diffusion.plms.PLMSSampler",
        "ldm.models.autoencoder.AutoencoderKL",
        "ldm.modules.diffusionmodules.openaimodel.UNetModel",
        "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
        "ldm.modules.embedding_manager.EmbeddingManager",
        "ldm.data.personalized.PersonalizedBase",
        "main.DataModuleFromConfig",
        "main.ImageLogger",
    ],
)
def test_names_that_existing_files_rely_on(path: str) -> None:
    module, _, name = path.rpartition(".")
    assert isinstance(getattr(importlib.import_module(module), name), type)
    assert get_class(path).__name__ == name


def test_every_configuration_that_ships_builds() -> None:
    root = Path(__file__).parent.parent
    for path in sorted(path for path in (root / "configs").rglob("*.yaml") if path.parent.name != "evidence"):
        config = load_config(path)
        with torch.device("meta"):
            config.model.params.pop("personalization_config", None)
            instantiate_from_config(config.model)


@pytest.mark.parametrize(("device", "waits"), [("cuda:1", False), ("mps", True), ("cpu", True), (None, True)])
def test_only_copies_to_cuda_are_not_waited_for(device: str | None, waits: bool) -> None:
    asked = SimpleNamespace(to=lambda device, non_blocking: (device, non_blocking))
    assert to_device(asked, device) == (device, not waits)


def test_pick_device() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device().type in ("cuda", "mps", "cpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="not usable here; usable: "):
            pick_device("cuda")


@pytest.mark.parametrize(("gpus", "usable"), [(0, "cpu"), (1, "cuda:0, cpu"), (2, "cuda:0, cuda:1, cpu")])
def test_a_device_must_be_there(gpus: int, usable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for device in ("cuda", "cuda:0", "cuda:1", "cuda:7"):
        if int(device.removeprefix("cuda").strip(":") or 0) < gpus:
            assert pick_device(device) == torch.device(device)
        else:
            with pytest.raises(ValueError, match=f"^Device '{device}' is not usable here; usable: {usable}\\.$"):
                pick_device(device)
    assert pick_device().type == ("cuda" if gpus else "cpu")
