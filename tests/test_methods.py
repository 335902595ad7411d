"""Every method by its configuration: learned, resumed to the same bits, loaded, mixed with others, switched off."""

from pathlib import Path

import pytest
import torch
from runs import MADE_SMALL, resume
from torch import Tensor

import main
from ldm.config import load_config
from ldm.data.templates import TEMPLATES
from ldm.embeddings import load_concept
from ldm.generate import load_model_from_config
from ldm.generate import main as generate
from ldm.methods import find_method
from ldm.methods.base import Start
from ldm.methods.neti import NeTISettings
from ldm.models.diffusion.ddpm import LatentDiffusion

CONFIG, CKPT = "configs/demo/finetune.yaml", "models/demo/model.safetensors"
PARAMS = "model.params.personalization_config.params"
TOKENS = f"{PARAMS}.method_params.tokens=4"
METHODS = {
    "ti": ("textual-inversion", {"vectors": (1, 128)}),
    "xti": ("xti", {"table": (1, 7, 1, 128)}),
    "neti": ("neti", None),
    "catversion": ("catversion", {"prefix": (2, 2, 1, 4, 32)}),
}
PROMPT = {"catversion": "a thing"}  # which has no placeholder


def learn(method: str, folder: Path, *more: str) -> int:
    """Learn with one of the configurations; the exit code."""
    base = ["--base", CONFIG, f"configs/demo/{method}.yaml", "-t", "--actual_resume", CKPT, "-p", str(folder)]
    return main.main([*base, "--data_root", "models/demo/references/dotted-star", *MADE_SMALL, *more])


def learned(method: str, folder: Path, steps: int) -> Path:
    """Learn for some steps; the concept."""
    caption = ["--caption", "a thing"] if method == "catversion" else []
    assert learn(method, folder, "--max_steps", str(steps), *caption) == 0
    return folder / "checkpoints/embeddings.safetensors"


@pytest.fixture(scope="module")
def concepts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("methods")
    return {method: learned(method, folder / method, 4) for method in METHODS}


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return load_model_from_config(CONFIG, CKPT, device="cpu")


@pytest.mark.parametrize(
    ("method", "rate", "batch", "steps", "captions"),
    [("ti", 1e-2, 2, 6100, 81), ("xti", 5e-3, 8, 500, 27), ("neti", 8e-3, 8, 1000, 27)],
)
def test_published_settings(method: str, rate: float, batch: int, steps: int, captions: int) -> None:
    """The rate and the batch of an optimizer step, with what a run on one device multiplies them by."""
    config = load_config("configs/stable-diffusion/v1-finetune.yaml", f"configs/stable-diffusion/{method}.yaml")
    params, trainer = config.model.params.personalization_config.params, config.lightning.trainer
    together = config.data.params.batch_size * trainer.get("accumulate_grad_batches", 1)
    assert together == batch and trainer.max_steps == steps
    assert config.model.base_learning_rate * together == pytest.approx(rate)
    for split in ("train", "validation"):
        assert len(TEMPLATES[config.data.params[split].params.templates]) == captions
    learned = find_method(params.method).learn(Start(torch.ones(1, 768), 1, 10, 16), **params.method_params)
    sizes = {"ti": 768, "xti": 16 * 768, "neti": 563_616}
    assert sum(p.numel() for p in learned.parameters()) == sizes[method]
    if method == "neti":
        assert learned.settings.target_norm == pytest.approx(768**0.5)
        assert learned.settings == NeTISettings(target_norm=learned.settings.target_norm)
    elif method == "xti":
        assert (learned.table == 1).all()


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_learns_the_same_bits(
    method: str, concepts: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    learned(method, tmp_path / "run", 2)
    assert f"--prompt '{PROMPT.get(method, 'a *')}'" in caplog.text  # of the command that generates
    assert resume(tmp_path / "run", "--max_steps", "4") == 0
    resumed, whole = load_concept(tmp_path / "run/checkpoints/embeddings.safetensors"), load_concept(concepts[method])
    name, shapes = METHODS[method]
    assert resumed.method == whole.method == name and resumed.identity == whole.identity
    assert shapes is None or {key: tuple(x.shape) for key, x in whole.tensors.items()} == shapes


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_it_changes_the_image_and_not_what_guidance_leads_away_from(
    method: str, concepts: dict[str, Path], model: LatentDiffusion
) -> None:
    plain = model.get_unconditional("a thing").at(500).k
    before = generate("a thing", ddim_steps=3, model=model, progress=False)
    prompt = PROMPT.get(method, "a *")
    shown = generate(prompt, ddim_steps=3, model=model, progress=False, concepts={"*": concepts[method]})
    assert shown.tobytes() != before.tobytes()
    model.embedding_manager.load(concepts[method])
    assert torch.equal(model.get_unconditional("a thing").at(500).k, plain)
    model.embedding_manager.unload()


def rows_encoded(model: LatentDiffusion) -> list[int]:
    """Counts the sequences that the text transformer encodes from now on."""
    counts: list[int] = []
    text = model.cond_stage_model.transformer.text_model
    text.register_forward_hook(lambda _, inputs, __: counts.append(len(inputs[0])))
    return counts


@torch.no_grad()
def test_text_passes_of_a_run(concepts: dict[str, Path], model: LatentDiffusion) -> None:
    """As many as the method needs, and one for the unconditional prompt, however many images there are."""
    expected = {"ti": 1, "xti": 7, "neti": 7 * 3, "catversion": 1}
    for method, passes in expected.items():
        counts = rows_encoded(model)
        prompt = PROMPT.get(method, "a *")
        generate(prompt, ddim_steps=3, n_samples=2, model=model, progress=False, concepts={"*": concepts[method]})
        assert sum(counts) == passes + 1, method


@torch.no_grad()
def test_methods_mix_in_one_prompt(concepts: dict[str, Path], model: LatentDiffusion) -> None:
    """A ProSpect layout, a NeTI token and a CatVersion prefix; each still does what it does alone."""
    star = "models/demo/concepts/dotted-star.safetensors"
    loaded = {"*": star, "<n>": concepts["neti"], "<c>": concepts["catversion"]}

    def context(names: set[str], t: int) -> Tensor:
        model.embedding_manager.unload()
        model.embedding_manager.load({name: loaded[name] for name in names})
        words = [None] * 5 + ["a thing"] * 5
        return model.get_learned_conditioning(["a * on <n>"], words).at(t).k

    everything = context({"*", "<n>", "<c>"}, 100)
    assert everything.shape[0] == 7
    for missing in ("*", "<n>", "<c>"):
        without = context({"*", "<n>", "<c>"} - {missing}, 100)
        assert not torch.allclose(everything, without.expand_as(everything), atol=1e-3), missing
    model.embedding_manager.unload()


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("neti", ["--caption", "a thing"], "no place for the learned token"),
        ("ti", ["--caption", "star " * 40 + "*"], "…' is too long, its learned token is cut off; shorten it"),
        ("ti", ["--caption", "star " * 28 + "*", TOKENS], "its learned token is cut off"),
        ("neti", ["--init_word", "a thing"], "super-category must be a word of one token"),
        ("neti", [f"{PARAMS}.method_params.num_anchors=7"], "must divide 1000"),
        ("ti", [f"{PARAMS}.method=nti"], "method 'nti', which is unknown"),
        ("catversion", [], "captions that name the class"),
        # warned of, whether the learning starts from it or a caption has it
        ("ti", ["--init_word", "dog", "--caption", "a teapot"], "does not know 'dog', 'teapot'; it knows left"),
    ],
)
def test_mistakes(
    method: str,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert learn(method, tmp_path / "r", *arguments) == 2
    assert message in capsys.readouterr().err + caplog.text and not (tmp_path / "r").exists()
