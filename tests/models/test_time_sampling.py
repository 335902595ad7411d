"""Which timestep a training sample is drawn at."""

import pytest
import torch

from ldm.conditioning.stages import stage_of
from ldm.config import instantiate_from_config, load_config
from ldm.models.diffusion.ddpm import LatentDiffusion


def model(**params: object) -> LatentDiffusion:
    config = load_config("configs/demo/diffusion.yaml", overrides=[f"model.params.{k}={v}" for k, v in params.items()])
    with torch.device("meta"):
        return instantiate_from_config(config.model)


def timesteps(model: LatentDiffusion, count: int) -> list[int]:
    draw = model._draw_timestep
    return [int(draw(n, torch.Generator(device="cpu").manual_seed(n))) for n in range(count)]


@pytest.mark.parametrize("stages", [1, 6, 10])
def test_stages_have_their_turn(stages: int) -> None:
    drawn = timesteps(model(time_sampling="stages", prospect_stages=stages), 600)
    assert [stage_of(t, stages, 1000) for t in drawn] == [n % stages for n in range(600)]
    assert min(drawn) < 30 and max(drawn) > 970


def test_uniform_is_the_default() -> None:
    drawn = timesteps(model(), 600)
    assert drawn == timesteps(model(time_sampling="uniform", prospect_stages=6), 600)
    assert [stage_of(t, 10, 1000) for t in drawn] != [n % 10 for n in range(600)]


def test_another_name_is_refused() -> None:
    with pytest.raises(ValueError, match="'uniform' or 'stages', not 'turns'"):
        model(time_sampling="turns")
