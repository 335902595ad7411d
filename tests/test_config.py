"""Configurations: what is merged, what is refused, and with which sentence."""

from __future__ import annotations

import importlib
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import nn

from ldm.config import ConfigError, allow_targets, as_config, get_class, instantiate_from_config, load_config
from ldm.util import instantiate_from_config as from_util
from ldm.util import pick_device, to_device
from ldm.yaml_files import read_yaml

ROOT = Path(__file__).parents[1]
ATTENTION = "ldm.modules.attention.CrossAttention"


def test_builds_with_parameters() -> None:
    module = instantiate_from_config({"target": ATTENTION, "params": {"query_dim": 8}}, heads=2, dim_head=4)
    assert module.to_q.weight.shape == (8, 8)
    assert isinstance(instantiate_from_config({"target": "torch.nn.Identity"}), nn.Identity)
    assert from_util is instantiate_from_config


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({}, "A `target:` is missing in {}"),
        ({"target": "os.system", "params": {"command": "true"}}, "outside the packages"),
        ({"target": "builtins.eval"}, "outside the packages"),
        ({"target": "torch.nn.Linear"}, "outside the packages"),
        ({"target": "ldmx.thing"}, "outside the packages"),
        ({"target": "ldm.checkpoint.os.system"}, "cannot be imported"),
        ({"target": "ldm.config.importlib"}, "is no class"),
        ({"target": "ldm.config.load_config"}, "is no class"),
        ({"target": "ldm.config.Path"}, "is no class"),  # a class, but not one of ours
        ({"target": "ldm.modules.attention.Nothing"}, "cannot be imported"),
        ({"target": ATTENTION, "params": {"query_dim": 8, "headz": 2}}, "did you mean 'heads'?"),
        ({"target": ATTENTION, "params": {1: 2}}, "has no parameter '1'"),
        ({"target": ATTENTION, "params": 5}, "`params:` of CrossAttention cannot be read as a section ("),
        ({"target": ATTENTION}, "missing 1 required positional argument: 'query_dim'"),
    ],
)
def test_refuses(config: dict, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
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
    assert len(caplog.messages) == 1 and "'clamp' is accepted and not used" in caplog.messages[0]


def test_merges_from_left_to_right(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("model: {x: 1, y: 2, same: '${model.y}'}\n")
    (tmp_path / "b.yaml").write_text("model: {<<: {u: 1e-3}, y: 3}\n")
    config = load_config(tmp_path / "a.yaml", tmp_path / "b.yaml", overrides=["model.z.w=4"])
    assert config.model == {"x": 1, "u": 1e-3, "y": 3, "same": 3, "z": {"w": 4}}


UNREADABLE = "is not a readable YAML file (line "


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("model: [1", f"{UNREADABLE}1, column 10: expected ',' or ']'"),
        ("model:\n\tx: 1\n", f"{UNREADABLE}2, column 1: found character '\\t' that cannot start any token; indent"),
        ("model:\n  x: 1\n  y: 'a\n", f"{UNREADABLE}4, column 1: found unexpected end of stream"),
        ("model:\n  x: 1\n  x: 2\n", f"{UNREADABLE}3, column 3: the key 'x' is there twice)"),
        ('model:\n  x: "C:\\Users\\me"\n', "expected escape sequence of 8 hexadecimal"),
        ('model:\n  x: "D:\\data"\n', "in double quotes a backslash begins an escape: put paths in single quotes"),
        ('model:\n  x: "C:\\new"\n', f"{UNREADABLE}2, column 6: in double quotes a backslash begins an escape"),
        ("model: {x: !!bool maybe}\n", f"{UNREADABLE}1, column 12: 'maybe' is no value of the type bool)"),
        ("model: {x: !!timestamp y}\n", "'y' is no value of the type timestamp)"),
        (f"model: {'9' * 5000}\n", "is no value of the type int)"),
        ("model: {x: !!set [1]}\n", UNREADABLE),
        ("model: {null: 1}\n", "is not a readable YAML file"),
        ("model: !!python/object/apply:os.system ['touch /tmp/never']\n", "could not determine a constructor"),
        ("model: a\0b\n", "character 9 is #x0000"),
        ("- 1\n- 2\n", "must hold a YAML mapping"),
        ("modell: {}\n", "did you mean 'model'?"),
        ("parts: {}\n", "Unknown section 'parts'"),
        ("lightning: {trainer: 5}\n", "'lightning.trainer:' must be a section"),
        ("a: &a [*a]\n", "has aliases"),
    ],
)
def test_unreadable_files(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_binary_and_missing_files(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("model: 1\nname: Jörg\n".encode("latin-1"))
    for name, problem in (("latin.yaml", "line 2 is not UTF-8"), ("none.yaml", "There is no"), ("", "is a folder")):
        with pytest.raises(ConfigError, match=problem):
            load_config(tmp_path / name)


@pytest.mark.parametrize(
    "value",
    [
        "${oc.env:TOKEN}",
        "a ${ oc.env : TOKEN } b",
        "${oc.env:${model.name}}",
        "${${model.name}:TOKEN}",
        "${model.${oc.env:TOKEN}}",
        "\\\\${oc.env:TOKEN}",
        "${oc.decode:'1'}",
        "${oc.create:{a: 1}}",
    ],
)
def test_no_file_reads_the_environment(value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "secret")
    path = tmp_path / "stranger.yaml"
    path.write_text(yaml.safe_dump({"model": {"name": "oc.env", "params": {"words": [value]}}}))
    with pytest.raises(ConfigError, match=r"model.params.words.0: '.*' calls a resolver") as caught:
        load_config(path)
    assert "secret" not in str(caught.value) and "--allow_resolvers" in str(caught.value)
    with pytest.raises(ConfigError, match="calls a resolver"):
        load_config(overrides=[f"model.x={json.dumps(value)}"])


def test_what_is_no_resolver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "secret")
    path = tmp_path / "own.yaml"
    values = {"name": "b", "b": 1, "plain": "${.b}", "inner": "${model.${model.name}}", "text": "\\${oc.env:TOKEN}"}
    path.write_text(yaml.safe_dump({"model": values}))
    config = load_config(path)
    assert (config.model.plain, config.model.inner, config.model.text) == (1, 1, "${oc.env:TOKEN}")
    assert load_config(overrides=["model.x=${oc.env:TOKEN}"], resolvers=True).model.x == "secret"


def test_configurations_of_other_kinds() -> None:
    """In struct or read-only mode, or plain: a copy that can be changed, and the given one stays."""
    plain = {"model": {"params": {"x": 1}, "y": "${model.params.x}"}}
    locked = OmegaConf.create(plain)
    OmegaConf.set_struct(locked, True)
    OmegaConf.set_readonly(locked.model.params, True)
    for config in (plain, locked):
        copy = as_config(config)
        copy.model.params.update(x=2, new=3)
        assert copy.model.y == 2 and config["model"]["params"] == {"x": 1}
    assert (
        instantiate_from_config(OmegaConf.create({"target": "torch.nn.Identity"}, flags={"struct": True})) is not None
    )
    for wrong in (None, [1], "model", {"model": object()}):
        with pytest.raises(ConfigError):
            as_config(wrong)  # type: ignore[arg-type]


MARKS = st.sampled_from(list("{}[]:,-&*!|>'\"%@`#?\\$\t\n ") + ["!!bool ", "!!int ", "${", "<<: ", "0o17", "1:2", "~"])
WHOLE = (ROOT / "configs/demo/finetune.yaml").read_text()


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(changes=st.lists(st.tuples(st.integers(0, len(WHOLE)), MARKS, st.integers(0, 3)), min_size=1, max_size=4))
def test_any_damage_to_a_file_is_read_or_refused(
    changes: list[tuple[int, str, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    text = WHOLE
    for place, mark, removed in changes:
        text = text[:place] + mark + text[place + removed :]
    path = tmp_path_factory.getbasetemp() / "damaged.yaml"
    path.write_text(text)
    try:
        load_config(path, overrides=[f"model.x={text[changes[0][0] :][:20]}"])
        yaml.safe_load(read_yaml(path, "--words").text)
    except ConfigError as error:
        assert "\n" not in str(error) and len(str(error)) < 500


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
    for path in sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "evidence"):
        config = load_config(path)
        if "target" not in config.model:  # a method, beside the learning configuration
            config = load_config(ROOT / "configs/demo/finetune.yaml", path)
        for key in ("personalization_config", "first_stage_ckpt", "cond_stage_ckpt"):
            config.model.params.pop(key, None)
        with torch.device("meta"):
            instantiate_from_config(config.model)


def test_a_file_that_is_no_configuration_is_not_quoted_whole(tmp_path: Path) -> None:
    (tmp_path / "secrets.yaml").write_text("line " * 150 + ": 1\n")
    with pytest.raises(ConfigError, match="^Unknown section 'line line") as caught:
        load_config(tmp_path / "secrets.yaml")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(("device", "waits"), [("cuda:1", False), ("mps", True), ("cpu", True), (None, True)])
def test_only_copies_to_cuda_are_not_waited_for(device: str | None, waits: bool) -> None:
    asked = SimpleNamespace(to=lambda device, non_blocking: (device, non_blocking))
    assert to_device(asked, device) == (device, not waits)  # type: ignore[arg-type]


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
    for device in ("gpu", "cuda:-1", "meta", "CPU"):
        monkeypatch.setenv("PROSPECT_DEVICE", device)
        with pytest.raises(ValueError, match=f"^Device '{device}' is not usable here; usable: {usable}\\.$"):
            pick_device()
    monkeypatch.setenv("PROSPECT_DEVICE", "")
    assert pick_device().type == ("cuda" if gpus else "cpu") and pick_device("cpu") == torch.device("cpu")
