"""Stable Diffusion v1 at its real size, with random weights in the public file's layout."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import main
from ldm.embeddings import load_concept
from ldm.generate import load_model_from_config
from ldm.generate import main as generate

ROOT = Path(__file__).parent.parent
TOKENIZER = f"model.params.cond_stage_config.params.tokenizer={ROOT / 'tests/golden/tokenizer'}"


@pytest.mark.slow
def test_load_train_a_step_and_sample(tmp_path: Path) -> None:
    """A float16 `.ckpt` (2.1 GB) that pickles Lightning's class, as the public file does; at 256 pixels."""
    ckpt = tmp_path / "sd-v1-4.ckpt"
    make = [sys.executable, "scripts/make_random_sd_v1.py", "--out", str(ckpt), "--dtype", "float16"]
    subprocess.run(make, check=True, cwd=ROOT)

    arguments = f"--base {ROOT}/configs/stable-diffusion/v1-finetune.yaml -t --actual_resume {ckpt} -n full --gpus 0,"
    arguments += f" --data_root {ROOT}/models/demo/references/dotted-star -l {tmp_path}/logs --max_steps 1"
    sizes = [f"data.params.{split}.params.size=256" for split in ("train", "validation")]
    assert main.main([*arguments.split(), *sizes, TOKENIZER, "--enable_progress_bar", "false"]) == 0
    (concept,) = tmp_path.glob("logs/*/checkpoints/embeddings.safetensors")
    assert load_concept(concept).vectors.shape == (10, 768)

    from ldm.config import load_config

    config = load_config(ROOT / "configs/stable-diffusion/v1-inference.yaml", overrides=[TOKENIZER])
    model = load_model_from_config(config, ckpt, device="cpu")
    model.embedding_manager.load(concept)
    assert model.model.diffusion_model.dtype == torch.float32
    picture = generate("a * dog", ddim_steps=2, height=256, width=256, model=model, progress=False)
    assert isinstance(picture, Image.Image) and picture.size == (256, 256)
    assert len(picture.getcolors(256 * 256)) > 100  # neither black (not a number) nor flat
