"""Schedules, sampler timesteps and stages by their contracts."""

import numpy as np
import pytest
import torch

from ldm.conditioning.stages import stage_of
from ldm.models.diffusion.schedule import ddim_timesteps


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
