"""The small model that ships, loaded once, behind the page's engine."""

import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ldm.generate import load_model_from_config
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.page.engine import Engine

ROOT = Path(__file__).parents[2]
SETUP = {"config": "configs/demo/finetune.yaml", "ckpt": "models/demo/model.safetensors", "dtype": "float32"}
STAR = "models/demo/concepts/dotted-star.safetensors"


@pytest.fixture(autouse=True)
def modules_stay() -> Iterator[None]:
    """NiceGUI's simulation forgets the module of a page and its parents, `ldm` among them."""
    kept = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "ldm"}
    yield
    sys.modules.update(kept)


@pytest.fixture(scope="session")
def small_model() -> LatentDiffusion:
    model = load_model_from_config(SETUP["config"], SETUP["ckpt"], device="cpu")
    gc.freeze()  # NiceGUI collects garbage twice for each page
    return model


@pytest.fixture
def engine(small_model: LatentDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """An engine of its own; what it makes and learns goes into the test's folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("configs", "models"):
        (tmp_path / name).symlink_to(ROOT / name)
    made = Engine(small_model, SETUP, tmp_path / "outputs")
    yield made
    made.close()
