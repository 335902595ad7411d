"""The training loss: what is drawn for it, what is trained and what must stay frozen, and v-prediction."""

import dataclasses

import pytest
import tiny
import torch
from diffusers import DDPMScheduler

from ldm.conditioning.stages import stage_of
from ldm.models.diffusion.ddpm import LatentDiffusion, draw_sample

X0, NOISE = (tiny.golden("train")[name] for name in ("x0", "noise"))
NAMES = tiny.META["emb_param_names"]


@pytest.mark.parametrize("stages", [1, 6, 10])
def test_stages_have_their_turn(tiny_model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch, stages: int) -> None:
    options = dataclasses.replace(tiny_model.options, time_sampling="stages")
    monkeypatch.setattr(tiny_model, "options", options)
    monkeypatch.setattr(tiny_model, "num_stages", stages)
    drawn = tiny_model._draw({"sample": torch.arange(600), "image": torch.empty(600, 8, 8, 3)}, "train")["t"].tolist()
    assert [stage_of(t, stages, 1000) for t in drawn] == [n % stages for n in range(600)]
    assert min(drawn) < 30 and max(drawn) > 970


def test_timesteps_are_uniform() -> None:
    t = torch.cat([draw_sample(n, 23, range(1000), (1, 1, 1))["t"] for n in range(4000)])
    counts = torch.bincount(t * 10 // 1000, minlength=10)
    chi_squared = ((counts - 400.0) ** 2 / 400).sum()
    assert t.min() >= 0 and t.max() <= 999
    assert chi_squared < 27.9  # one in a thousand for nine degrees of freedom


def test_noise_is_a_function_of_the_sample_and_the_seed() -> None:
    def noise(number: int, seed: int = 23, validating: bool = False, name: str = "noise") -> torch.Tensor:
        return draw_sample(number, seed, range(1000), (4, 16, 16), validating)[name]

    assert torch.equal(noise(1), noise(1))
    others = [noise(2), noise(1, 24), noise(1, validating=True), noise(1, name="posterior_noise")]
    assert not any(torch.equal(other, noise(1)) for other in others)


def test_only_the_embedding_manager_is_trained(trainable: LatentDiffusion) -> None:
    trainable.train()
    trained = {name for name, p in trainable.named_parameters() if p.requires_grad}
    assert trained == {f"embedding_manager.learned.{name}" for name in NAMES}
    assert trainable.embedding_manager.training
    for module in (trainable.model, trainable.first_stage_model, trainable.cond_stage_model):
        assert not any(m.training for m in module.modules())
    cond = trainable.get_learned_conditioning(["*"])
    trainable.p_losses(X0, cond, torch.tensor([500]), NOISE)[0].backward()
    assert {name for name, p in trainable.named_parameters() if p.grad is not None} == trained
    optimized = {id(p) for group in trainable.configure_optimizers().param_groups for p in group["params"]}
    assert optimized == {id(p) for p in trainable.embedding_manager.attention.parameters()}


def test_names_of_the_logged_losses(trainable: LatentDiffusion) -> None:
    for mode, prefix in ((True, "train"), (False, "val")):
        trainable.train(mode)
        _, parts = trainable.p_losses(X0, tiny.stage_contexts(), torch.tensor([5]), NOISE)
        assert set(parts) == {"losses", *(f"{prefix}/loss{kind}" for kind in ("", "_simple", "_vlb"))}
        assert not any(value.requires_grad for value in parts.values())


@torch.no_grad()
def test_v_prediction_is_that_of_diffusers(tiny_model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    """The target of the loss, and the noise that a prediction holds."""
    schedule = DDPMScheduler(1000, 0.00085, 0.0120, "scaled_linear", prediction_type="v_prediction")
    contexts = tiny.stage_contexts()
    for t in (0, 99, 500, 999):
        timesteps = torch.tensor([t])
        noised, velocity = tiny_model.q_sample(X0, timesteps, NOISE), schedule.get_velocity(X0, NOISE, timesteps)
        assert tiny_model.to_eps(velocity, noised, timesteps) is velocity, "eps is taken as it is"
        with monkeypatch.context() as patch:
            patch.setattr(tiny_model, "parameterization", "v")
            torch.testing.assert_close(tiny_model.to_eps(velocity, noised, timesteps), NOISE, rtol=1e-4, atol=1e-5)
            prediction = tiny_model.apply_model(schedule.add_noise(X0, NOISE, timesteps), timesteps, contexts)
            loss, _ = tiny_model.p_losses(X0, contexts, timesteps, NOISE)
            torch.testing.assert_close(loss, (prediction - velocity).square().mean(), rtol=1e-4, atol=0)
