"""Noise schedules and DDIM runs against numbers recorded from the running reference (tests/golden)."""

import numpy as np
import pytest
import tiny
import torch
from tiny import Recorder, close
from torch import Tensor

from ldm.conditioning.context import Conditioning
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.sampling import guided
from ldm.models.diffusion.schedule import ddim_parameters, ddim_timesteps, make_betas, schedule_buffers, vlb_weights

SCHEDULE, SAMPLE = tiny.golden("schedule"), tiny.golden("sample")
IMG2IMG = tiny.META["img2img"]
BETAS = make_betas(0.00085, 0.0120)
CHECKPOINT_BUFFERS = {
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
}


# Schedules


def test_the_twelve_buffers_of_a_checkpoint() -> None:
    buffers = schedule_buffers(BETAS)
    assert set(buffers) == CHECKPOINT_BUFFERS
    for name, values in buffers.items():
        assert values.dtype == torch.float32
        torch.testing.assert_close(values, SCHEDULE[name], rtol=1e-6, atol=0)


def test_weights_of_the_variational_bound() -> None:
    torch.testing.assert_close(vlb_weights(BETAS), SCHEDULE["lvlb_weights"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [10, 20, 50])
def test_ddim_parameters(steps: int, eta: float) -> None:
    timesteps = ddim_timesteps(steps)
    alphas_cumprod = schedule_buffers(BETAS)["alphas_cumprod"].double().numpy()
    alphas, alphas_prev, sigmas = ddim_parameters(alphas_cumprod, timesteps, eta)
    record = {
        name.rpartition(".")[2]: values.numpy()
        for name, values in SCHEDULE.items()
        if name.startswith(f"ddim.S{steps}.eta{eta}.")
    }
    assert timesteps.tolist() == record["timesteps"].tolist()
    np.testing.assert_allclose(alphas, record["ddim_alphas"], rtol=1e-6)
    np.testing.assert_allclose(alphas_prev, record["ddim_alphas_prev"], rtol=1e-6)
    np.testing.assert_allclose(sigmas, record["ddim_sigmas"], rtol=1e-6)
    np.testing.assert_allclose(np.sqrt(1 - alphas), record["ddim_sqrt_one_minus_alphas"], rtol=1e-6)


def test_seven_steps_are_seven_where_the_reference_made_eight() -> None:
    assert len(SCHEDULE["ddim.S7.eta0.0.timesteps"]) == 8
    assert ddim_timesteps(7).tolist() == [1, 143, 286, 429, 572, 715, 858]


# Runs


def check_run(model: LatentDiffusion, name: str, latents: Tensor, recorder: Recorder) -> None:
    trajectory = SAMPLE[f"ddim.{name}.trajectory_xprev_and_predx0"]
    every = len(recorder.pairs) // len(trajectory)  # of 50 steps, ten were recorded
    for pair, recorded in zip(recorder.pairs[::every], trajectory, strict=True):
        close(pair[0], recorded[0])
        close(pair[1], recorded[1])
    close(latents, SAMPLE[f"ddim.{name}.latent"])
    close(model.decode_first_stage(latents), SAMPLE[f"ddim.{name}.image"])


@pytest.mark.parametrize(("steps", "scale"), tiny.META["sampling"]["scales"])
def test_guided_runs(
    tiny_model: LatentDiffusion, teddy: Conditioning, empty: Conditioning, steps: int, scale: float
) -> None:
    recorder = Recorder()
    latents, _ = DDIMSampler(tiny_model).sample(
        S=steps,
        batch_size=1,
        shape=[4, 8, 8],
        conditioning=teddy,
        eta=0.0,
        x_T=SAMPLE["x_T"],
        unconditional_guidance_scale=scale,
        unconditional_conditioning=empty,
        step_callback=recorder,
    )
    check_run(tiny_model, f"S{steps}.scale{scale}", latents, recorder)
    assert recorder.steps == list(enumerate(range(1001 - 1000 // steps, 0, -1000 // steps)))


@pytest.mark.parametrize("uncond", [True, False])
def test_scale_1_is_the_conditional_prediction(
    tiny_model: LatentDiffusion, teddy: Conditioning, empty: Conditioning, uncond: bool
) -> None:
    recorder = Recorder()
    batches: list[int] = []
    unet = tiny_model.model.diffusion_model
    handle = unet.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    latents, _ = DDIMSampler(tiny_model).sample(
        S=10,
        batch_size=1,
        shape=(4, 8, 8),
        conditioning=teddy,
        x_T=SAMPLE["x_T"],
        unconditional_conditioning=empty if uncond else None,
        step_callback=recorder,
    )
    handle.remove()
    check_run(tiny_model, "S10.scale1_correct", latents, recorder)
    assert batches == [1] * 10, "nothing is computed that has no weight"
    with_bug = SAMPLE["ddim.S10.scale1_upstream_bug.latent"]
    assert (latents - with_bug).abs().max() > 0.01 * with_bug.abs().max(), "the records tell the two apart"


def test_contexts_as_tensors(tiny_model: LatentDiffusion) -> None:
    recorder = Recorder()
    latents, _ = DDIMSampler(tiny_model).sample(
        S=10,
        batch_size=1,
        shape=(4, 8, 8),
        conditioning=tiny.stage_contexts(),
        x_T=SAMPLE["x_T"],
        unconditional_guidance_scale=7.5,
        unconditional_conditioning=tiny.context("uncond"),
        step_callback=recorder,
    )
    check_run(tiny_model, "S10.synthetic_ctx", latents, recorder)


def test_recorded_noises(tiny_model: LatentDiffusion, teddy: Conditioning, empty: Conditioning) -> None:
    """Every step adds its noise, the last one too."""
    sampler, recorder = DDIMSampler(tiny_model), Recorder()
    sampler.make_schedule(ddim_num_steps=10, ddim_eta=0.5)
    noises = iter(SAMPLE["eta_noises"])
    latents = sampler.run(guided(tiny_model, teddy, empty, 7.5), SAMPLE["x_T"], 10, lambda: next(noises), recorder)
    check_run(tiny_model, "S10.eta0.5", latents, recorder)
    assert next(noises, None) is None


@pytest.mark.parametrize("strength", IMG2IMG["strength"])
def test_image_to_image(tiny_model: LatentDiffusion, empty: Conditioning, strength: float) -> None:
    cond = tiny_model.get_learned_conditioning([IMG2IMG["prompt"]], prospect_words=IMG2IMG["words"])
    posterior = tiny_model.encode_first_stage(SAMPLE["i2i.image"])
    start = tiny_model.get_first_stage_encoding(posterior, SAMPLE["i2i.posterior_noise"])
    close(start, SAMPLE["i2i.init_latent"])
    sampler = DDIMSampler(tiny_model)
    sampler.make_schedule(ddim_num_steps=IMG2IMG["S"], ddim_eta=0.0, verbose=False)
    t_enc = int(strength * IMG2IMG["S"])
    assert [t_enc] == SAMPLE[f"i2i.strength{strength}.t_enc"].tolist()
    z_enc = sampler.stochastic_encode(start, torch.tensor([t_enc]), noise=SAMPLE["i2i.encode_noise"])
    close(z_enc, SAMPLE[f"i2i.strength{strength}.z_enc"])
    latents = sampler.decode(
        z_enc, cond, t_enc, unconditional_guidance_scale=IMG2IMG["scale"], unconditional_conditioning=empty
    )
    close(latents, SAMPLE[f"i2i.strength{strength}.latent"])
    close(tiny_model.decode_first_stage(latents), SAMPLE[f"i2i.strength{strength}.image"])


@pytest.mark.parametrize("steps", [7, 50, 1000])
def test_attributes_after_make_schedule(tiny_model: LatentDiffusion, steps: int) -> None:
    sampler = DDIMSampler(tiny_model)
    sampler.make_schedule(ddim_num_steps=steps, ddim_eta=0.5, verbose=False)
    assert sampler.ddpm_num_timesteps == 1000
    for name in ("timesteps", "alphas", "alphas_prev", "sigmas", "sqrt_one_minus_alphas"):
        assert getattr(sampler, f"ddim_{name}").shape == (steps,)
    record = f"ddim.S{steps}.eta0.5."
    if steps == 50:
        for name in ("alphas", "alphas_prev", "sigmas", "sqrt_one_minus_alphas"):
            expected = SCHEDULE[f"{record}ddim_{name}"].double().numpy()
            np.testing.assert_allclose(getattr(sampler, f"ddim_{name}"), expected, rtol=1e-6)
