"""Timesteps and noises of training samples."""

import pytest
import torch

from ldm.conditioning.stages import stage_of
from ldm.models.diffusion.draws import Draws

SIZE = torch.Size((4, 16, 16))


def timesteps(draws: Draws, count: int) -> list[int]:
    return draws.batch(range(count), torch.Size((1, 1, 1)))["t"].tolist()


@pytest.mark.parametrize("stages", [1, 6, 10])
def test_stages_have_their_turn(stages: int) -> None:
    drawn = timesteps(Draws(23, stages, 1000, by_stage=True), 600)
    assert [stage_of(t, stages, 1000) for t in drawn] == [n % stages for n in range(600)]
    assert min(drawn) < 30 and max(drawn) > 970


def test_timesteps_are_uniform() -> None:
    t = torch.tensor(timesteps(Draws(23, 10, 1000), 4000))
    counts = torch.bincount(t * 10 // 1000, minlength=10)
    chi_squared = ((counts - 400.0) ** 2 / 400).sum()
    assert t.min() >= 0 and t.max() <= 999
    assert chi_squared < 27.9  # one in a thousand for nine degrees of freedom


def test_noise_is_a_function_of_the_sample_and_the_seed() -> None:
    draws = Draws(23, 10, 1000)
    first, second, again = (draws.batch([n], SIZE) for n in (1, 2, 1))
    assert torch.equal(first["posterior_noise"], again["posterior_noise"])
    assert not torch.equal(first["posterior_noise"], second["posterior_noise"])
    assert not torch.equal(first["posterior_noise"], first["noise"])
    assert not torch.equal(draws.batch([1], SIZE, validating=True)["noise"], first["noise"])
    assert not torch.equal(Draws(24, 10, 1000).batch([1], SIZE)["noise"], first["noise"])
    together = draws.batch([1, 2], SIZE)
    assert torch.equal(together["noise"], torch.cat([first["noise"], second["noise"]]))
