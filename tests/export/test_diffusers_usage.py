"""diffusers loads what was exported and, with the script that was written, makes our image of the same noise."""

import ast
import copy
import importlib.util
import os
import runpy
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from ldm.cli.export import run
from ldm.embeddings import Concept, save_concept
from ldm.generate import load_model_from_config, main
from ldm.models.diffusion.ddpm import LatentDiffusion
from scripts.make_diffusers_folder import build_pipeline

ROOT = Path(__file__).parents[2]
CONFIG, CKPT = ROOT / "configs/demo/finetune.yaml", ROOT / "models/demo/model.safetensors"
SMALL = ["--steps", "10", "--scale", "3", "--seed", "7", "--height", "64", "--width", "64"]
WORDS = ["a * heart", 9, "<b>, * on white", "a <b> on a navy background", None]
WORDS += ["(a) * circle", 0, "*", "* *", "a thing"]
BY_STAGE = [1.0, 1.0, 8.0, 8.0, 1.0, 3.0, 8.0, 8.0, 5.0, 5.0]
HEARTS = ["a * heart"] * 5 + ["a heart"] * 5  # of the preset material


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return load_model_from_config(CONFIG, CKPT, device="cpu")


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionPipeline:
    """Made in another folder than the repository, whose configuration names its tokenizer by a relative path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("elsewhere"))
        pipe = build_pipeline(CONFIG, CKPT)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(untouched: StableDiffusionPipeline) -> StableDiffusionPipeline:
    return copy.deepcopy(untouched)


def words_like(model: LatentDiffusion, path: Path, shape: tuple[int, ...], seed: int) -> Path:
    """A concept whose vectors are as unlike each other as words are."""
    table, generator = model.cond_stage_model.token_table, torch.Generator().manual_seed(seed)
    values = table[torch.randint(520, 690, shape, generator=generator)]
    values = values + 0.1 * table.std() * torch.randn(values.shape, generator=generator)
    save_concept(Concept(values) if len(shape) == 1 else Concept({"table": values}, method="table"), path)
    return path


@pytest.fixture(scope="module")
def concepts(model: LatentDiffusion, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("concepts")
    stages = {"*": ("star", 10), "<b>": ("b", 4)}
    return {p: words_like(model, folder / f"{n}.safetensors", (s,), s) for p, (n, s) in stages.items()}


def exported(concepts: dict[str, Path], folder: Path, *flags: str, words: list | None = None) -> ModuleType:
    """The script that was written, as a module."""
    sources = [f"{placeholder}={path}" for placeholder, path in concepts.items()]
    stages = [f"{stage}={word}" for stage, word in enumerate(words or ()) if word is not None]
    flags = (*SMALL, *flags, *(("--stages", *stages) if stages else ()))
    paths = run([*sources, "--name", "star", "b", "--to", "diffusers", "--outdir", str(folder), *flags])
    spec = importlib.util.spec_from_file_location("usage", paths[-1])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def psnr(a: Image.Image, b: Image.Image) -> float:
    error = np.square(np.asarray(a, np.float64) - np.asarray(b.convert("RGB"), np.float64)).mean()
    return float("inf") if error == 0 else 10 * float(np.log10(255**2 / error))


def ours(model: LatentDiffusion, concepts: dict[str, Path], prompt: str, words: list | None, **changed: object):
    """Our image, and its latents (4, 8, 8)."""
    seen: list[torch.Tensor] = []
    settings = {"height": 64, "width": 64, "ddim_steps": 10, "seed": 7, "scale": 3.0, "progress": False} | changed
    hook = {"callback": lambda step, t, x, x_0: seen.append(x)}
    image = main(prompt, prospect_words=words, concepts=concepts, model=model, **settings, **hook)
    return image, seen[-1][0]


def theirs(usage: ModuleType, pipe: StableDiffusionPipeline, output_type: str = "latent") -> torch.Tensor:
    noise = torch.Generator().manual_seed(7)
    return usage.generate(pipe, height=64, width=64, generator=noise, output_type=output_type).images[0]


@pytest.mark.parametrize(
    ("flag", "scale"),
    [("8", 8.0), ("1", 1.0), ("8,0-1:1,4:1,5:3,8-9:5", BY_STAGE), ("1,0-4:6", [6.0] * 5 + [1.0] * 5)],
)
def test_their_image_is_ours(flag: str, scale: float | list, pipe, model, concepts, tmp_path: Path) -> None:
    """Several concepts, of ten and of four stages, entries of every kind, with and without guidance, and by stage."""
    usage = exported(concepts, tmp_path, "--prompt", "a large *", "--scale", flag, words=WORDS)
    usage.load(pipe)
    image, latents = ours(model, concepts, "a large *", WORDS, scale=scale)
    torch.testing.assert_close(theirs(usage, pipe), latents, rtol=0, atol=1e-3)
    if flag != "8":
        return
    assert psnr(image, theirs(usage, pipe, "pil")) >= 40
    # and not with the first prompt alone, nor with each prompt a step late
    callback = usage.StagePrompts.__call__
    for wrong in (lambda *args: args[-1], lambda self, pipe, step, *args: callback(self, pipe, step - 1, *args)):
        usage.StagePrompts.__call__ = wrong
        assert (theirs(usage, pipe) - latents).abs().max() > 0.01


@pytest.mark.parametrize(
    ("steps", "sampler"), [(20, {"sampler": "dpmpp_2m"}), (12, {"sampler": "dpmpp_2m"}), (20, {"spacing": "trailing"})]
)
def test_trailing_samplers(steps: int, sampler: dict[str, str], pipe, model, concepts, tmp_path: Path) -> None:
    """The script restarts the solver where we do."""
    flags = ["--steps", str(steps), "--preset", "material", "--prompt", "a * heart"]
    usage = exported(concepts, tmp_path, *flags, *(f"--{name}={value}" for name, value in sampler.items()))
    usage.load(pipe)
    pipe.scheduler = usage.scheduler(pipe.scheduler.config)
    _, latents = ours(model, concepts, "*", HEARTS, ddim_steps=steps, **sampler)
    torch.testing.assert_close(theirs(usage, pipe), latents, rtol=0, atol=2e-3)


@torch.no_grad()
def test_consecutive_tokens_and_layers(pipe, model, tmp_path: Path) -> None:
    """Three tokens for all of sampling, and two for each of ten stages and seven U-Net layers."""
    shapes = {"*": (1, 1, 3), "<b>": (10, 7, 2)}
    concepts = {p: words_like(model, tmp_path / f"{i}", shape, 0) for i, (p, shape) in enumerate(shapes.items())}
    words = ["a <b> beside *"] * 6 + ["*", "<b>", None, "a thing"]
    usage = exported(concepts, tmp_path / "out", "--prompt", "a large *", words=words)
    assert usage.FILES == ["star-0.safetensors", "b-layers.safetensors"]
    usage.load(pipe)
    _, latents = ours(model, concepts, "a large *", words)
    torch.testing.assert_close(theirs(usage, pipe), latents, rtol=0, atol=1e-3)
    for module in pipe.unet.modules():  # and not where every layer reads the first one's tokens
        if isinstance(getattr(module, "processor", None), usage.OfLayer):
            module.processor.layer = 0
    assert (theirs(usage, pipe) - latents).abs().max() > 0.01


def test_several_images_at_once(pipe, model, concepts, tmp_path: Path) -> None:
    usage = exported(concepts, tmp_path, "--prompt", "a * beside a <b>")
    usage.load(pipe)
    latents = torch.cat([torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(s)) for s in (7, 8)])
    images = usage.generate(pipe, height=64, width=64, latents=latents, num_images_per_prompt=2).images
    expected, _ = ours(model, concepts, "a * beside a <b>", None)
    assert psnr(expected, images[0]) >= 40 > psnr(expected, images[1])


def test_the_script_as_a_user_runs_it(untouched, model, concepts, tmp_path: Path, monkeypatch, capsys) -> None:
    """It needs nothing of this program, and ends where its files are not those that it was exported with."""
    untouched.save_pretrained(tmp_path / "base")
    exported(concepts, tmp_path / "out", "--preset", "material", "--prompt", "a * heart")
    script = tmp_path / "out/star_diffusers.py"
    nodes = list(ast.walk(ast.parse(script.read_text(encoding="utf-8"))))
    imported = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    assert imported == {"__future__", "sys", "pathlib", "typing", "torch", "safetensors", "diffusers"}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path / "base")])
    capsys.readouterr()
    runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().out == "star.png\n"
    assert psnr(ours(model, concepts, "*", HEARTS)[0], Image.open("star.png")) >= 40
    exported(dict(zip(concepts, reversed(concepts.values()), strict=True)), tmp_path / "other")
    os.replace(tmp_path / "other/star-0.safetensors", tmp_path / "out/star-0.safetensors")
    with pytest.raises(SystemExit, match=r"^'star-0.safetensors' is of another export than this script; export the"):
        runpy.run_path(str(script), run_name="__main__")
