"""Schedules, sampler timesteps and stages, against the recorded ones and by their contracts."""

import numpy as np
import pytest
import tiny
import torch

from ldm.conditioning.stages import stage_of
from ldm.models.diffusion.schedule import (
    ddim_parameters,
    ddim_timesteps,
    make_betas,
    schedule_buffers,
    vlb_weights,
)

BETAS = make_betas(0.00085, 0.0120)
RECORDED = tiny.golden("schedule")
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


def test_the_twelve_buffers_of_a_checkpoint() -> None:
    buffers = schedule_buffers(BETAS)
    assert set(buffers) == CHECKPOINT_BUFFERS
    for name, values in buffers.items():
        assert values.dtype == torch.float32
        torch.testing.assert_close(values, RECORDED[name], rtol=1e-6, atol=0)


def test_weights_of_the_variational_bound() -> None:
    torch.testing.assert_close(vlb_weights(BETAS), RECORDED["lvlb_weights"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [10, 20, 50])
def test_ddim_parameters(steps: int, eta: float) -> None:
    timesteps = ddim_timesteps(steps)
    alphas_cumprod = schedule_buffers(BETAS)["alphas_cumprod"].double().numpy()
    alphas, alphas_prev, sigmas = ddim_parameters(alphas_cumprod, timesteps, eta)
    record = {
        name.rpartition(".")[2]: values.numpy()
        for name, values in RECORDED.items()
        if name.startswith(f"ddim.S{steps}.eta{eta}.")
    }
    assert timesteps.tolist() == record["timesteps"].tolist()
    np.testing.assert_allclose(alphas, record["ddim_alphas"], rtol=1e-6)
    np.testing.assert_allclose(alphas_prev, record["ddim_alphas_prev"], rtol=1e-6)
    np.testing.assert_allclose(sigmas, record["ddim_sigmas"], rtol=1e-6)
    np.testing.assert_allclose(np.sqrt(1 - alphas), record["ddim_sqrt_one_minus_alphas"], rtol=1e-6)


def test_seven_steps_are_seven_where_the_reference_made_eight() -> None:
    assert len(RECORDED["ddim.S7.eta0.0.timesteps"]) == 8
    assert ddim_timesteps(7).tolist() == [1, 143, 286, 429, 572, 715, 858]


def test_every_number_of_steps_is_valid() -> None:
    for steps in range(1, 1001):
        timesteps = ddim_timesteps(steps)
        assert len(timesteps) == steps, steps
        assert timesteps[0] >= 0 and timesteps[-1] <= 999, steps
        assert (np.diff(timesteps) > 0).all(), steps
        if 1000 % steps == 0 and steps < 1000:
            assert np.array_equal(timesteps, np.arange(0, 1000, 1000 // steps) + 1), steps


@pytest.mark.parametrize("timesteps", [100, 500])
def test_a_shorter_schedule_has_its_own_limits(timesteps: int) -> None:
    for steps in range(1, timesteps + 1):
        chosen = ddim_timesteps(steps, timesteps)
        assert len(set(chosen.tolist())) == steps and chosen.min() >= 0 and chosen.max() < timesteps, steps


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_other_numbers_of_steps_are_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=f"1..1000, not {steps}"):
        ddim_timesteps(steps)


@pytest.mark.parametrize(("t", "stage"), [(0, 0), (99, 0), (100, 1), (499, 4), (500, 5), (899, 8), (999, 9)])
def test_the_stage_of_a_timestep(t: int, stage: int) -> None:
    assert stage_of(t, 10) == stage
    assert stage_of(torch.tensor([t, 0]), 10).tolist() == [stage, 0]


@pytest.mark.parametrize(("stages", "num_timesteps"), [(1, 1000), (3, 1000), (10, 500), (50, 1000), (1000, 1000)])
def test_stages_are_all_used_in_order_and_of_equal_size(stages: int, num_timesteps: int) -> None:
    found = [stage_of(t, stages, num_timesteps) for t in range(num_timesteps)]
    assert found == [int(np.floor(t * stages / num_timesteps)) for t in range(num_timesteps)]
    assert found[0] == 0 and found[-1] == stages - 1 and found == sorted(found)
    sizes = np.bincount(found)
    assert sizes.max() - sizes.min() <= 1
    assert torch.equal(stage_of(torch.arange(num_timesteps), stages, num_timesteps), torch.tensor(found))


def test_ddim_50_has_five_steps_in_each_stage() -> None:
    stages = stage_of(torch.tensor(ddim_timesteps(50)), 10)
    assert torch.bincount(stages).tolist() == [5] * 10
