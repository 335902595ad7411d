"""The reference's own configuration and command line, with tiny sizes put in by dot-list."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

import main
from ldm.checkpoint import save_state_dict
from ldm.config import load_config
from ldm.embeddings import load_concept
from ldm.util import instantiate_from_config

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "tests/golden/reference-v1-finetune.yaml"
PICTURES = ROOT / "models/demo/references/striped-heart"
TINY = [
    "model.params.unet_config.params.model_channels=32",
    "model.params.unet_config.params.num_res_blocks=1",
    "model.params.unet_config.params.num_heads=4",
    "model.params.first_stage_config.params.ddconfig.ch=32",
    "model.params.first_stage_config.params.ddconfig.num_res_blocks=1",
    f"model.params.cond_stage_config.params.tokenizer={ROOT / 'tests/golden/tokenizer'}",
    "model.params.cond_stage_config.params.version=tiny",
    "model.params.cond_stage_config.params.text_config.num_hidden_layers=1",
    "model.params.cond_stage_config.params.text_config.intermediate_size=64",
    "data.params.train.params.size=64",
    "data.params.validation.params.size=64",
]


def test_the_references_command_line_trains(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = load_config(CONFIG, overrides=TINY)
    torch.manual_seed(0)
    state = instantiate_from_config(config.model).state_dict()
    weights = {key: value for key, value in state.items() if not key.startswith("embedding_manager.")}
    save_state_dict(weights, tmp_path / "tiny.safetensors", {})

    command = f"--base {CONFIG} -t --actual_resume {tmp_path}/tiny.safetensors -n run --gpus 0, "
    command += f"--data_root {PICTURES} -l {tmp_path}/logs --no-test --max_steps 2 --enable_progress_bar false"
    with caplog.at_level(logging.INFO):
        assert main.main([*command.split(), *TINY]) == 0
    (run,) = (tmp_path / "logs").iterdir()
    concept = load_concept(run / "checkpoints" / "embeddings.safetensors")
    assert concept.vectors.shape == (10, 768)
    assert concept.metadata["init_word"] == "teddy"  # the reference took its first letter

    # each key that lost its meaning is named in one line
    lines = [record.message for record in caplog.records if "accepted and not used" in record.message]
    for key in ("num_timesteps_cond", "log_every_t", "conditioning_key", "use_ema", "num_vectors_per_token", "wrap"):
        assert sum(f"'{key}'" in line for line in lines) == 1, key


def test_our_configuration_means_the_same() -> None:
    """What ships under configs/ builds the same model as the reference's file."""
    theirs = load_config(CONFIG)
    ours = load_config(ROOT / "configs/stable-diffusion/v1-finetune.yaml")
    for part in ("unet_config", "first_stage_config"):
        shapes = []
        for config in (theirs, ours):
            with torch.device("meta"):
                module = instantiate_from_config(config.model.params[part])
            shapes.append({key: tuple(value.shape) for key, value in module.state_dict().items()})
        assert shapes[0] == shapes[1]
    inference = load_config(ROOT / "configs/stable-diffusion/v1-inference.yaml")
    for part in ("unet_config", "first_stage_config", "cond_stage_config"):
        mine = OmegaConf.to_container(ours.model.params[part])
        mine.get("params", {}).pop("use_checkpoint", None)
        assert OmegaConf.to_container(inference.model.params[part]) == mine
