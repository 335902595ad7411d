"""The small model, and an inversion of each kind of an image that is rendered."""

import pytest
from editing_cases import OPTIONS, PROMPT, ROOT, STAR
from PIL import Image

from ldm.editing.invert import invert_image
from ldm.embeddings import Concept
from ldm.generate import load_model_from_config
from ldm.models.diffusion.ddpm import LatentDiffusion


@pytest.fixture(scope="package")
def demo() -> LatentDiffusion:
    config, ckpt = ROOT / "configs/demo/finetune.yaml", ROOT / "models/demo/model.safetensors"
    return load_model_from_config(config, ckpt, device="cpu")


@pytest.fixture(scope="package")
def concepts(demo: LatentDiffusion) -> dict[str, Concept]:
    """method -> a short inversion."""
    methods = ("stylediffusion", "null-text", "text")
    return {m: invert_image(demo, Image.open(STAR), PROMPT, m, OPTIONS, progress=False) for m in methods}
