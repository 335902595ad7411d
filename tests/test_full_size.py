"""Stable Diffusion v1 at its real size, with random weights in the public file's layout."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

import main
from evaluation.benchmark.models import build_model, variant
from evaluation.benchmark.switches import DEFAULTS
from ldm.embeddings import load_concept
from ldm.generate import load_model_from_config
from ldm.generate import main as generate
from ldm.models.diffusion.ddim import ddim
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.sampling import guided

# Largest relative distance (of norms) to float32 of what the U-Net predicts, of the loss's gradient by what is learned,
# and of the latents after one guided step, at 128 pixels with random weights: twice what was measured.
HALF_PRECISION = {
    ("float16", "frozen_dtype"): (3e-3, 4e-3, 3e-3),
    ("bfloat16", "frozen_dtype"): (2.5e-2, 2.5e-2, 2.5e-2),
    ("float16", "autocast"): (3e-3, 7e-3, 3e-3),
    ("bfloat16", "autocast"): (2.5e-2, 3e-2, 2.5e-2),
}
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


def _step(model: LatentDiffusion) -> tuple[Tensor, Tensor, Tensor]:
    """A prediction, the gradient of a loss, and latents after a guided step."""
    x, noise = (torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    t = torch.tensor([500])
    model.train().zero_grad()
    model.p_losses(x, model.get_learned_conditioning(["*"]), t, noise)[0].backward()
    gradient = torch.cat([p.grad.flatten() for p in model.trainable_parameters() if p.grad is not None])
    model.eval()
    with torch.no_grad():
        cond = model.get_learned_conditioning(["a *"])
        prediction = model.apply_model(x, t, cond)
        denoise = guided(model, cond, model.get_unconditional(), 5.0)
        latents = ddim(denoise, x, [500], [0.3], [0.5], [0.0])
    return prediction, gradient, latents


@pytest.mark.slow
def test_half_precision_at_real_size() -> None:
    """On the CPU, which rounds as a GPU does; both ways: frozen weights in half precision, and autocast (AMP)."""
    base = build_model("sd-v1", torch.device("cpu"))
    expected = _step(base)
    for (dtype, way), bounds in HALF_PRECISION.items():
        if way == "frozen_dtype":
            found = _step(variant(base, DEFAULTS | {dtype}))
        else:
            with torch.autocast("cpu", getattr(torch, dtype)):
                found = _step(variant(base, DEFAULTS))
        distances = [((one - two).norm() / two.norm()).item() for one, two in zip(found, expected, strict=True)]
        print(dtype, way, [f"{distance:.1e}" for distance in distances])
        assert all(d <= bound for d, bound in zip(distances, bounds, strict=True)), (dtype, way, distances)
