"""Latents and images that are not finite when generating: refused, or mended once."""

import logging
from pathlib import Path

import pytest
import torch
from runs import CONFIG, MODEL

from ldm.cli import sample as commands
from ldm.embeddings import Concept, save_concept
from ldm.generate import load_model_from_config
from ldm.generate import main as generate
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.finite import NotFiniteError


@pytest.fixture(scope="module")
def small_model() -> LatentDiffusion:
    return load_model_from_config(CONFIG, MODEL, device="cpu")


def test_latents_that_are_not_finite_make_no_image(
    small_model: LatentDiffusion, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    huge = tmp_path / "huge.safetensors"  # finite, but their mean is not
    save_concept(Concept(torch.full((10, small_model.embedding_manager.width), 3e38)), huge)
    with pytest.raises(NotFiniteError, match=r"from timestep \d+ on \(stage \d\); use float32"):
        settings = {"ddim_steps": 4, "height": 64, "width": 64, "progress": False}
        generate("a <huge> star", model=small_model, concepts={"<huge>": huge}, **settings)
    flags = ["--prompt", "a * star", "--concept", str(huge), "--steps", "2", "--outdir", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ending:
        commands.run(flags)
    assert ending.value.code == 2 and "The latents are not finite" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_first_stage_that_overflows_becomes_float32_once(caplog: pytest.LogCaptureFixture) -> None:
    """Weights that make activations too large for float16, which the layer after them makes small again."""
    model = load_model_from_config(CONFIG, MODEL, device="cpu", dtype="float16")
    first_stage = model.first_stage_model
    latents = 20 * torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = model.decode_first_stage(latents)
    assert next(first_stage.parameters()).dtype == torch.float16 and not caplog.records
    with torch.no_grad():
        first_stage.post_quant_conv.weight.mul_(4096)
        first_stage.post_quant_conv.bias.mul_(4096)
        first_stage.decoder.conv_in.weight.div_(4096)
    bad = model.decode_first_stage(latents * torch.nan)
    assert bad.isnan().all() and not caplog.records, "the latents' fault, not the first stage's"
    with caplog.at_level(logging.WARNING):
        images = [model.decode_first_stage(latents) for _ in range(2)]
    assert [record.message for record in caplog.records] == [
        "The first stage (VAE) overflows in float16; from now on it works in float32."
    ]
    assert all(image.isfinite().all() for image in images)
    assert (images[0] - expected).abs().mean() < 0.02
    assert next(model.model.parameters()).dtype == torch.float16, "only the first stage changes"
