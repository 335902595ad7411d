"""The contexts and weights that tests build are those of the records; `tests/parity` compares checksums of networks."""

import tiny
import torch
from torch import nn


def test_context() -> None:
    stage0 = tiny.context("stage0")
    assert stage0.shape == (1, 77, 768)
    expected = torch.tensor([-0.25878593, -0.37262779, 1.06053948, -1.37218833])
    torch.testing.assert_close(stage0.flatten()[:4], expected, rtol=0, atol=1.2e-7)
    stage0.zero_()
    assert tiny.context("stage0").abs().max() > 1, "a caller that writes into a context spoils it"


def test_token_rows_give_the_recorded_initial_embedding() -> None:
    rows = tiny.token_rows([0, tiny.META["initializer_token_id"]])
    assert torch.equal(rows[1:], tiny.golden("embedding_manager")["initial_embeddings"])
    assert torch.equal(rows[0], tiny.tiny_tensor(tiny.TOKEN_TABLE, (1, 768))[0])


def test_fill_names_parameters_by_prefix_and_follows_the_seed() -> None:
    layer, prefix = nn.Sequential(nn.Conv2d(4, 32, 3), nn.BatchNorm2d(32)), f"{tiny.UNET}input_blocks.0."
    assert tiny.fill(layer, prefix) is layer
    expected = tiny.tiny_tensor(f"{prefix}0.weight", (32, 4, 3, 3))
    assert torch.equal(layer[0].weight, expected)
    assert torch.equal(layer[1].running_mean, torch.zeros(32)), "buffers are left alone"
    assert not torch.equal(tiny.fill(layer, prefix, seed=1)[0].weight, expected)
