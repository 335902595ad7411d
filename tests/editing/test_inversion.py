"""Inversion: what must hold without the reference, and what an inversion keeps when it is stopped."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from editing_cases import OPTIONS, PROMPT, STAR
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from ldm.conditioning.context import Context
from ldm.editing import inversion
from ldm.editing.image import image_latents, psnr
from ldm.editing.inversion import Sweep, ddim_invert, follow, inversion_timesteps, levels, record
from ldm.editing.invert import PSNR, Subject, change_of, edit_image, invert_image, make_learner
from ldm.editing.request import Edit, InversionOptions
from ldm.embeddings import Concept, load_concept, save_concept
from ldm.methods.base import FIRST, START
from ldm.methods.null_text import NullText
from ldm.methods.stylediffusion import StyleDiffusion, modulate
from ldm.models.diffusion.ddim import ddim
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.sampling import guided


@pytest.mark.parametrize("steps", [1, 7, 30, 50])
def test_what_does_not_depend_on_latents_is_inverted_exactly(demo: LatentDiffusion, steps: int) -> None:
    timesteps, alphas = inversion_timesteps(steps), demo.host_alphas_cumprod
    z_0 = torch.randn(1, 4, 8, 8, dtype=torch.float64)

    def denoise(x: Tensor, t: int) -> Tensor:
        return torch.full_like(x, math.sin(t / 100))

    path = ddim_invert(denoise, z_0, timesteps, alphas)
    at, below = levels(timesteps, alphas)
    back = ddim(denoise, path[-1], timesteps, at, below, np.zeros(steps))
    torch.testing.assert_close(back, z_0, rtol=0, atol=1e-12)
    a_0, a_1 = alphas[0], alphas[1]
    expected = (a_1 / a_0) ** 0.5 * z_0
    expected = expected + ((1 - a_1) ** 0.5 - (a_1 * (1 - a_0) / a_0) ** 0.5) * math.sin(0.01)
    torch.testing.assert_close(path[1], expected)


def test_the_paper_s_formula_replaces_values(demo: LatentDiffusion) -> None:
    learner = StyleDiffusion(2, torch.randn(1, 197, 128), 32, "replace")
    context = demo.get_unconditional(PROMPT).at(0)
    found = modulate(context, learner.values(0).detach())
    torch.testing.assert_close(found.v, learner.networks[0](learner.features))
    assert found.k is context.k


@pytest.mark.parametrize("kind", [StyleDiffusion, NullText])
def test_an_unchanged_learner_follows_plain_guidance(demo: LatentDiffusion, kind: type) -> None:
    """With nothing learned, following the path is sampling with guidance from its end."""
    subject = Subject(demo, STAR, PROMPT)
    way = record(demo, subject.z_0, subject.cond, 4)
    cond, uncond = subject.contexts()
    learner = StyleDiffusion(4, torch.randn(1, 197, 128), 32) if kind is StyleDiffusion else NullText(4, uncond.k)
    sweep = Sweep(demo, way, learner, cond, uncond, OPTIONS)
    if kind is StyleDiffusion:
        learner.kind = lambda values, timesteps: lambda context, t: context  # type: ignore[method-assign]
    at, below = levels(way.timesteps, demo.host_alphas_cumprod)
    denoise = guided(demo, cond, uncond, OPTIONS.guidance_scale)
    expected = ddim(denoise, way.path[-1], way.timesteps, at, below, np.zeros(4))
    torch.testing.assert_close(follow(sweep), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", ["stylediffusion", "text"])
def test_learning_reconstructs_better(demo: LatentDiffusion, method: str) -> None:
    """What is learned brings the end nearer to the image the longer it is learned."""
    given = [InversionOptions(steps=3, guidance_scale=5.0, inner_steps=inner) for inner in (1, 8)]
    found = [invert_image(demo, STAR, PROMPT, method, options, progress=False) for options in given]
    shorter, longer = (float(concept.metadata[PSNR]) for concept in found)
    assert longer > shorter + 0.1


@pytest.mark.parametrize("method", ["stylediffusion", "null-text"])
def test_stopped_and_resumed(
    demo: LatentDiffusion, concepts: dict[str, Concept], method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C after two steps; resumed, the concept is the same to the last bit."""
    kept = tmp_path / "kept.safetensors"
    learn = Sweep.learn

    def stop(self: Sweep, step: inversion.Step, *args: object) -> Tensor:
        if step.number == 2:
            raise KeyboardInterrupt
        return learn(self, step, *args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Sweep, "learn", stop)
        invert_image(demo, STAR, PROMPT, method, OPTIONS, kept, progress=False)
    assert kept.exists()
    with pytest.raises(ValueError, match="unfinished inversion with another prompt"):
        invert_image(demo, STAR, "a star", method, OPTIONS, kept, progress=False)
    begun = []
    monkeypatch.setattr(Sweep, "learn", lambda self, step, *a: begun.append(step.number) or learn(self, step, *a))
    found = invert_image(demo, STAR, PROMPT, method, OPTIONS, kept, progress=False)
    assert begun == [2, 3] and not kept.exists()
    assert found.identity == concepts[method].identity


def test_concepts_are_files(demo: LatentDiffusion, concepts: dict[str, Concept], tmp_path: Path) -> None:
    subject = Subject(demo, STAR, PROMPT)
    way = record(demo, subject.z_0, subject.cond, 4)
    for method, concept in concepts.items():
        save_concept(concept, tmp_path / f"{method}.safetensors")
        found = load_concept(tmp_path / f"{method}.safetensors")
        assert found.identity == concept.identity and found.metadata.items() >= concept.metadata.items()
        assert torch.equal(found.tensors[FIRST], image_latents(demo, subject.image))
        torch.testing.assert_close(found.tensors[START], way.path[-1], rtol=0, atol=1e-4)
        change = change_of(found)
        assert change.timesteps == (751, 501, 251, 1)
        assert isinstance(change(demo.get_unconditional(PROMPT).at(0), 251), Context)
    assert concepts["stylediffusion"].tensors["gamma_beta"].shape == (4, 64, 128)
    assert concepts["null-text"].tensors["contexts"].shape == (4, 32, 128)


def test_psnr() -> None:
    image = torch.zeros(1, 3, 4, 4)
    assert psnr(image + 0.2, image) == pytest.approx(20.0, abs=1e-4)


def test_pytorchs_defaults_change_nothing(demo: LatentDiffusion, concepts: dict[str, Concept]) -> None:
    method = "stylediffusion"
    edit = Edit("a dotted blue star", blend=("star", "star"))
    expected = edit_image(demo, concepts[method], edit, progress=False).image
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")  # where nothing can be computed
    try:
        with torch.inference_mode():
            found = invert_image(demo, Image.open(STAR), PROMPT, method, OPTIONS, progress=False)
            image = edit_image(demo, found, edit, progress=False).image
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert found.identity == concepts[method].identity and image == expected


def test_a_damaged_unfinished_inversion(demo: LatentDiffusion, tmp_path: Path) -> None:
    unfinished = tmp_path / "u.safetensors"
    subject = Subject(demo, STAR, PROMPT)
    _, said = make_learner(subject, "null-text", OPTIONS)
    for tensors in ({}, {"z": torch.zeros(1)}, {"z": torch.zeros(1), "contexts.0": torch.zeros(2)}):
        save_file({"x": torch.zeros(1)} | tensors, unfinished, said)
        with pytest.raises(ValueError, match="u.safetensors' keeps an unfinished inversion that is damaged; delete it"):
            invert_image(demo, STAR, PROMPT, "null-text", OPTIONS, unfinished, progress=False)
