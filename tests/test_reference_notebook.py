"""Code written for the reference's notebook runs against this package, call by call.

The calls are the reference's; only sizes are smaller, and nothing needs a GPU.
"""

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from pytorch_lightning import seed_everything
from torch import Tensor, autocast

from ldm.embeddings import Concept, save_concept
from ldm.generate import load_model_from_config
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.plms import PLMSSampler
from ldm.util import instantiate_from_config

ROOT = Path(__file__).parents[1]
CKPT = str(ROOT / "models/demo/model.safetensors")
C, f = 4, 8  # as for Stable Diffusion v1
H = W = 32
WORDS = ["a dotted star"] * 5 + ["a * heart", 3, "*", "a heart", "a heart"]
device = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LatentDiffusion:
    config = OmegaConf.load(f"{ROOT}/configs/demo/finetune.yaml")
    config.model.params.cond_stage_config.params.tokenizer = str(ROOT / "models/demo/tokenizer")
    model = load_model_from_config(config, CKPT)

    path = tmp_path_factory.mktemp("logs") / "embeddings.safetensors"
    save_concept(Concept(torch.randn(10, 128, generator=torch.Generator().manual_seed(1))), path)
    model.cpu()
    model.embedding_manager.load(str(path))
    return model.to(device)


def load_img(path: str) -> Tensor:
    image = Image.open(path).convert("RGB")
    image = image.resize((W, H), resample=Image.Resampling.LANCZOS)
    image = np.array(image).astype(np.float32) / 255.0
    image = image[None].transpose(0, 3, 1, 2)
    return 2.0 * torch.from_numpy(image) - 1.0


def sample(model: LatentDiffusion, prompts: list[str], words: list | None, scale: float, seed: int = 42) -> Tensor:
    """The reference's txt2img, to the pictures (B, 3, H, W) in 0..1."""
    n_samples = len(prompts)
    seed_everything(seed, verbose=False)
    sampler = DDIMSampler(model)
    with torch.no_grad(), nullcontext("cuda"), model.ema_scope():
        uc = None
        if scale != 1.0:
            uc = model.get_learned_conditioning(n_samples * [""])
        c = model.get_learned_conditioning(prompts, prospect_words=words)
        shape = [C, H // f, W // f]
        samples, intermediates = sampler.sample(
            S=5,
            conditioning=c,
            batch_size=n_samples,
            shape=shape,
            verbose=False,
            unconditional_guidance_scale=scale,
            unconditional_conditioning=uc,
            eta=0.0,
        )
        assert samples.shape == (n_samples, *shape)
        assert set(intermediates) == {"x_inter", "pred_x0"}
        x_samples = model.decode_first_stage(samples)
        return torch.clamp((x_samples + 1.0) / 2.0, min=0.0, max=1.0)


@pytest.mark.parametrize(("n_samples", "scale"), [(1, 3.0), (3, 3.0), (1, 1.0)])
def test_txt2img(model: LatentDiffusion, n_samples: int, scale: float) -> None:
    pictures = sample(model, n_samples * ["*"], WORDS, scale)
    assert pictures.shape == (n_samples, 3, H, W) and pictures.dtype == torch.float32
    assert torch.isfinite(pictures).all() and pictures.std() > 0
    assert torch.equal(pictures, sample(model, n_samples * ["*"], WORDS, scale))  # seed_everything seeds it all
    assert not torch.equal(pictures, sample(model, n_samples * ["*"], None, scale))
    assert not torch.equal(pictures, sample(model, n_samples * ["*"], WORDS, scale, seed=41))


@pytest.mark.parametrize("strength", [0.0, 0.6, 1.0])
def test_img2img(model: LatentDiffusion, strength: float) -> None:
    batch_size, ddim_steps, scale = 2, 5, 3.0
    seed_everything(42, verbose=False)
    sampler = DDIMSampler(model)
    init_image = load_img(f"{ROOT}/models/demo/references/dotted-star/dotted-star.png").to(device)
    init_image = init_image.repeat(batch_size, 1, 1, 1)
    with torch.no_grad(), model.ema_scope():
        init_latent = model.get_first_stage_encoding(model.encode_first_stage(init_image))
        assert init_latent.shape == (batch_size, C, H // f, W // f)
        sampler.make_schedule(ddim_num_steps=ddim_steps, ddim_eta=0.0, verbose=False)
        t_enc = int(strength * ddim_steps)
        uc = model.get_learned_conditioning(batch_size * [""])
        c = model.get_learned_conditioning(batch_size * ["*"], prospect_words=WORDS)
        z_enc = sampler.stochastic_encode(init_latent, torch.tensor([t_enc] * batch_size).to(device))
        samples = sampler.decode(z_enc, c, t_enc, unconditional_guidance_scale=scale, unconditional_conditioning=uc)
        x_samples = model.decode_first_stage(samples)
    assert x_samples.shape == (batch_size, 3, H, W) and torch.isfinite(x_samples).all()
    # z_enc is what the schedule says: sqrt(a) z + sqrt(1 - a) noise, at the timestep of entry t_enc (or the last)
    a = float(sampler.ddim_alphas[min(t_enc, ddim_steps - 1)])
    noise = (z_enc - a**0.5 * init_latent) / (1 - a) ** 0.5
    assert abs(noise.std() - 1) < 0.15 and abs(noise.mean()) < 0.15
    assert torch.equal(samples, z_enc) == (t_enc == 0)


def test_the_schedule_is_there_after_make_schedule(model: LatentDiffusion) -> None:
    sampler = DDIMSampler(model)
    sampler.make_schedule(ddim_num_steps=50, ddim_eta=0.5, verbose=False)
    assert list(sampler.ddim_timesteps) == list(range(1, 1000, 20))
    assert len(sampler.ddim_alphas) == len(sampler.ddim_sigmas) == 50
    assert sampler.ddim_alphas[0] > sampler.ddim_alphas[-1] > 0 and sampler.ddim_sigmas[-1] > 0


def test_plms_takes_the_same_call(model: LatentDiffusion) -> None:
    c = model.get_learned_conditioning(["*"], prospect_words=WORDS)
    uc = model.get_learned_conditioning([""])
    arguments = {"S": 4, "conditioning": c, "batch_size": 1, "shape": [C, H // f, W // f], "verbose": False}
    guidance = {"unconditional_guidance_scale": 3.0, "unconditional_conditioning": uc, "eta": 0.0}
    start = torch.randn(1, C, H // f, W // f, generator=torch.Generator().manual_seed(0))
    plms, ddim = (
        Sampler(model).sample(**arguments, **guidance, x_T=start)[0] for Sampler in (PLMSSampler, DDIMSampler)
    )
    assert plms.shape == ddim.shape and torch.isfinite(plms).all()
    assert not torch.equal(plms, ddim)


def test_conditioning_may_be_a_tensor_or_a_list_of_one_for_each_stage(model: LatentDiffusion) -> None:
    c = model.get_learned_conditioning(["*"], prospect_words=WORDS)
    stages = c.stages()
    assert len(stages) == 10 and stages[0].shape == (1, 32, 128)
    x = torch.randn(1, C, H // f, W // f, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for t in (0, 99, 100, 550, 999):
            of_prompt = model.apply_model(x, torch.tensor([t]), c)
            torch.testing.assert_close(model.apply_model(x, torch.tensor([t]), stages), of_prompt)
            torch.testing.assert_close(model.apply_model(x, torch.tensor([t]), stages[t // 100]), of_prompt)
        assert not torch.equal(
            model.apply_model(x, torch.tensor([550]), stages[0]), model.apply_model(x, torch.tensor([550]), stages[6])
        )


def test_autocast_changes_little(model: LatentDiffusion) -> None:
    """The reference samples under `autocast`; on the CPU that is bfloat16."""
    plain = sample(model, ["*"], WORDS, scale=2.0)
    with autocast("cpu", dtype=torch.bfloat16):
        cast = sample(model, ["*"], WORDS, scale=2.0)
    assert torch.isfinite(cast).all()
    assert 0 < (cast.float() - plain).abs().mean() < 0.05


def test_instantiate_from_config_builds_the_yaml_of_the_reference() -> None:
    config = OmegaConf.create({"target": "ldm.models.diffusion.ddim.DDIMSampler", "params": {"schedule": "linear"}})
    stand_in = type("Model", (), {"num_timesteps": 1000})()
    assert isinstance(instantiate_from_config(config, model=stand_in), DDIMSampler)
