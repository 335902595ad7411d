"""The weights that tests build are the ones the golden numbers were recorded with."""

import pytest
import tiny
import torch
from torch import nn

from ldm.methods.prospect import GeneratorBlock

ATTENTION = tiny.ATTENTION


@pytest.mark.parametrize(
    ("key", "shape", "first"),
    [
        (f"{ATTENTION}norm1.weight", (768,), [1.2374828, 1.1414921, 0.9775206, 1.2268056]),
        (f"{ATTENTION}ff.net.2.bias", (7680,), [-0.07752068, 0.05027703, -0.02397233, -0.06045949]),
        (tiny.TOKEN_TABLE, (1, 768), [-0.5126474, 0.8548379, -0.5809734, -0.2657157]),
        (
            "model.diffusion_model.input_blocks.0.0.weight",
            (32, 4, 3, 3),
            [0.00090068509, -0.02884863, -0.27415574, -0.01192595],
        ),
    ],
)
def test_first_values(key: str, shape: tuple[int, ...], first: list[float]) -> None:
    tensor = tiny.tiny_tensor(key, shape)
    assert tensor.shape == shape and tensor.dtype == torch.float32
    torch.testing.assert_close(tensor.flatten()[:4], torch.tensor(first), rtol=0, atol=6e-8)


def test_context() -> None:
    stage0 = tiny.context("stage0")
    assert stage0.shape == (1, 77, 768)
    expected = torch.tensor([-0.25878593, -0.37262779, 1.06053948, -1.37218833])
    torch.testing.assert_close(stage0.flatten()[:4], expected, rtol=0, atol=1.2e-7)
    stage0.zero_()
    assert tiny.context("stage0").abs().max() > 1, "a caller that writes into a context spoils it"


def test_checksum_of_the_generator_block() -> None:
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in GeneratorBlock(768, 10).named_parameters()}
    weights = {name: tiny.tiny_tensor(ATTENTION + name, shape) for name, shape in shapes.items()}
    found, recorded = tiny.checksum(weights, ATTENTION), tiny.META["checksums"]["emb"]
    assert set(shapes) == set(tiny.META["emb_param_names"])
    assert (found["sha256"], found["numel"]) == (recorded["sha256"], recorded["numel"])
    assert found["sum"] == pytest.approx(recorded["sum"])
    assert found["abs_sum"] == pytest.approx(recorded["abs_sum"])


def test_token_rows_give_the_recorded_initial_embedding() -> None:
    rows = tiny.token_rows([0, tiny.META["initializer_token_id"]])
    assert torch.equal(rows[1:], tiny.golden("embedding_manager")["initial_embeddings"])
    assert torch.equal(rows[0], tiny.tiny_tensor(tiny.TOKEN_TABLE, (1, 768))[0])


def test_fill_names_parameters_by_prefix_and_follows_the_seed() -> None:
    layer = nn.Sequential(nn.Conv2d(4, 32, 3), nn.BatchNorm2d(32))
    assert tiny.fill(layer, "model.diffusion_model.input_blocks.0.") is layer
    expected = tiny.tiny_tensor("model.diffusion_model.input_blocks.0.0.weight", (32, 4, 3, 3))
    assert torch.equal(layer[0].weight, expected)
    assert torch.equal(layer[1].running_mean, torch.zeros(32)), "buffers are left alone"
    tiny.fill(layer, "model.diffusion_model.input_blocks.0.", seed=1)
    assert not torch.equal(layer[0].weight, expected)
