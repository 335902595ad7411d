"""The training loss: what is trained and what must stay frozen, and v-prediction."""

import pytest
import tiny
import torch
from diffusers import DDPMScheduler

from ldm.models.diffusion.ddpm import LatentDiffusion

X0, NOISE = (tiny.golden("train")[name] for name in ("x0", "noise"))
NAMES = tiny.META["emb_param_names"]


# What is trained


def test_only_the_embedding_manager_is_trained(trainable: LatentDiffusion) -> None:
    trainable.train()
    trained = {name for name, p in trainable.named_parameters() if p.requires_grad}
    assert trained == {f"embedding_manager.learned.{name}" for name in NAMES}
    assert trainable.embedding_manager.training
    for module in (trainable.model, trainable.first_stage_model, trainable.cond_stage_model):
        assert not any(m.training for m in module.modules())
    cond = trainable.get_learned_conditioning(["*"])
    trainable.p_losses(X0, cond, torch.tensor([500]), NOISE)[0].backward()
    with_gradient = {name for name, p in trainable.named_parameters() if p.grad is not None}
    assert with_gradient == trained
    optimized = {id(p) for group in trainable.configure_optimizers().param_groups for p in group["params"]}
    assert optimized == {id(p) for p in trainable.embedding_manager.attention.parameters()}


def test_names_of_the_logged_losses(trainable: LatentDiffusion) -> None:
    for mode, prefix in ((True, "train"), (False, "val")):
        trainable.train(mode)
        _, parts = trainable.p_losses(X0, tiny.stage_contexts(), torch.tensor([5]), NOISE)
        assert set(parts) == {"losses", *(f"{prefix}/loss{kind}" for kind in ("", "_simple", "_vlb"))}
        assert not any(value.requires_grad for value in parts.values())


# v-prediction


@pytest.fixture(scope="module")
def diffusers_schedule() -> DDPMScheduler:
    return DDPMScheduler(1000, 0.00085, 0.0120, "scaled_linear", prediction_type="v_prediction")


@torch.no_grad()
def test_the_v_target_is_that_of_diffusers(
    tiny_model: LatentDiffusion, diffusers_schedule: DDPMScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_model, "parameterization", "v")
    contexts = tiny.stage_contexts()
    for t in (0, 99, 500, 999):
        timesteps = torch.tensor([t])
        prediction = tiny_model.apply_model(diffusers_schedule.add_noise(X0, NOISE, timesteps), timesteps, contexts)
        target = diffusers_schedule.get_velocity(X0, NOISE, timesteps)
        loss, _ = tiny_model.p_losses(X0, contexts, timesteps, NOISE)
        torch.testing.assert_close(loss, (prediction - target).square().mean(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("t", [0, 500, 999])
def test_a_v_prediction_holds_the_noise(
    tiny_model: LatentDiffusion, diffusers_schedule: DDPMScheduler, monkeypatch: pytest.MonkeyPatch, t: int
) -> None:
    timesteps = torch.tensor([t])
    noised = tiny_model.q_sample(X0, timesteps, NOISE)
    velocity = diffusers_schedule.get_velocity(X0, NOISE, timesteps)
    assert tiny_model.to_eps(velocity, noised, timesteps) is velocity, "eps is taken as it is"
    monkeypatch.setattr(tiny_model, "parameterization", "v")
    torch.testing.assert_close(tiny_model.to_eps(velocity, noised, timesteps), NOISE, rtol=1e-4, atol=1e-5)
