"""Makes `tests/` importable, keeps every test on one thread, and builds the tiny model of the golden records."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# Before torch is imported: OpenMP reads this once, and two spinning threads on a busy machine are far slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

import copy  # noqa: E402

import pytest  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

    from ldm.conditioning.context import Conditioning
    from ldm.conditioning.prompts import PromptReader
    from ldm.models.diffusion.ddpm import LatentDiffusion
    from ldm.modules.diffusionmodules.openaimodel import UNetModel

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def in_root() -> Iterator[None]:
    """Configurations name the tokenizer's folder and the model relative to the repository."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(Path(__file__).parents[1])
        yield


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration of the tiny model as a user would write it, with its checkpoint beside it."""
    from ldm.config import load_config
    from ldm.util import instantiate_from_config

    folder = tmp_path_factory.mktemp("tiny")
    config = load_config(tiny.CONFIG)
    text = config.model.params.cond_stage_config.params
    text.text_config = tiny.TEXT_CONFIG
    text.tokenizer = str(tiny.TOKENIZER)
    with torch.device("meta"):
        sizes = instantiate_from_config(config.model)
    tiny.write_checkpoint(sizes, folder / "tiny-a.safetensors")
    config.model.params.ckpt_path = str(folder / "tiny-a.safetensors")
    OmegaConf.save(config, folder / "tiny-a.yaml")
    return folder / "tiny-a.yaml"


@pytest.fixture(scope="session")
def demo_model() -> "LatentDiffusion":
    """The small model that ships, loaded for generating; shared, so a test that changes it puts it back."""
    from runs import CONFIG, MODEL

    from ldm.generate import load_model_from_config

    return load_model_from_config(CONFIG, MODEL, device="cpu")


@pytest.fixture(scope="session")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of files that a user may hand in by mistake."""
    import bad_files

    return bad_files.write_all(tmp_path_factory.mktemp("bad"))


@pytest.fixture(scope="session")
def tiny_model(tiny_config: Path) -> "LatentDiffusion":
    """The tiny model in evaluation mode; shared, so a test that changes it puts it back."""
    from ldm.config import load_config
    from ldm.util import instantiate_from_config

    model = instantiate_from_config(load_config(tiny_config).model)
    tiny.fill(model.embedding_manager.attention, tiny.ATTENTION)
    return model.eval()


@pytest.fixture
def trainable(tiny_model: "LatentDiffusion") -> Iterator["LatentDiffusion"]:
    """The tiny model with an embedding manager of its own, to be trained; in evaluation mode: no dropout."""
    shared = tiny_model.embedding_manager
    tiny_model.embedding_manager = copy.deepcopy(shared)
    yield tiny_model
    tiny_model.embedding_manager = shared
    tiny_model.zero_grad()
    tiny_model.eval()


@pytest.fixture
def unet(tiny_model: "LatentDiffusion") -> "UNetModel":
    """The shared tiny model's U-Net."""
    return tiny_model.model.diffusion_model


@pytest.fixture(scope="module")
def teddy(tiny_model: "LatentDiffusion") -> "Conditioning":
    """The prompt of the recorded sampling runs."""
    prompt = tiny.META["prompts"][tiny.META["sampling"]["prompt"]]
    return tiny_model.get_learned_conditioning([prompt["prompt"]], prospect_words=prompt["prospect_words"])


@pytest.fixture(scope="module")
def empty(tiny_model: "LatentDiffusion") -> "Conditioning":
    """The unconditional prompt of the recorded sampling runs."""
    return tiny_model.get_learned_conditioning([tiny.META["sampling"]["uc"]])


@pytest.fixture(scope="module")
def tokenizer() -> "CLIPTokenizer":
    """The tokenizer of the records."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(tiny.TOKENIZER)


@pytest.fixture(scope="module")
def reader(tokenizer: "CLIPTokenizer") -> "PromptReader":
    """Reads `*` as one learned token in each of ten stages."""
    from ldm.conditioning.prompts import PromptReader

    return PromptReader(tokenizer, {"*": [[row] for row in range(10)]}, 10)
