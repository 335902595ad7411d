"""Contexts and conditionings: joining, layers, stages, and what LDM code passes instead."""

from __future__ import annotations

import pytest
import torch

from ldm.conditioning.context import Conditioning, Context, as_conditioning
from ldm.conditioning.encoding import PromptConditioning, SlotEncoder
from ldm.conditioning.learned import NOTHING_LEARNED, Learned


def stages(count: int = 10, batch: int = 2) -> list[torch.Tensor]:
    return [torch.full((batch, 3, 4), float(s)) + torch.arange(batch).view(-1, 1, 1) * 100 for s in range(count)]


def test_stage_is_chosen_by_the_timestep() -> None:
    cond = as_conditioning(stages())
    for t, stage in {0: 0, 99: 0, 100: 1, 500: 5, 899: 8, 900: 9, 999: 9}.items():
        assert cond.at(t).k[0, 0, 0] == stage
    mixed = cond.at(torch.tensor([99, 900])).k
    assert mixed[:, 0, 0].tolist() == [0.0, 109.0]  # each sample its own stage


@pytest.mark.parametrize("count", [1, 4, 7, 50])
def test_any_number_of_stages(count: int) -> None:
    cond = as_conditioning(stages(count))
    assert [int(cond.at(t).k[0, 0, 0]) for t in range(1000)] == [t * count // 1000 for t in range(1000)]


def test_a_tensor_is_constant() -> None:
    x = torch.randn(2, 3, 4)
    cond = as_conditioning(x)
    assert cond.at(0).k is x and cond.at(torch.tensor([3, 999])).k is x
    assert cond.at(0).v is cond.at(0).k
    assert as_conditioning(cond) is cond


@pytest.mark.parametrize("bad", [None, "a dog", [], [1, 2], {"a": 1}])
def test_other_things_are_refused(bad: object) -> None:
    with pytest.raises(TypeError, match="must be a tensor"):
        as_conditioning(bad)


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="must be"):
        as_conditioning(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="3 timesteps were given for 2 prompts"):
        as_conditioning(stages()).at(torch.tensor([1, 2, 3]))


def test_layers() -> None:
    layered = Context.of(torch.arange(16.0).view(16, 1, 1, 1).expand(16, 2, 3, 4))
    plain = Context.of(torch.full((1, 3, 4), -1.0))
    assert layered.layer(5)[0].unique().tolist() == [5.0]
    joined = Context.cat(plain, layered)
    assert joined.k.shape == (16, 3, 3, 4) and joined.v is joined.k
    assert joined.layer(7)[0][:, 0, 0].tolist() == [-1.0, 7.0, 7.0]


def test_keys_and_values_may_differ() -> None:
    split = Context(torch.zeros(1, 3, 4), torch.ones(1, 3, 4))
    joined = Context.cat(split, Context.of(torch.full((1, 3, 4), 2.0)))
    assert joined.k[:, 0, 0].tolist() == [0.0, 2.0] and joined.v[:, 0, 0].tolist() == [1.0, 2.0]
    assert split.map(lambda x: x + 1).v.unique().tolist() == [2.0]


def test_a_context_is_computed_once_for_each_bucket() -> None:
    calls: list[int] = []

    def encode(bucket: int) -> Context:
        calls.append(bucket)
        return Context.of(torch.zeros(1, 3, 4))

    cond = Conditioning(encode, batch_size=1, num_buckets=10)
    for t in range(981, 0, -20):
        cond.at(t)
    assert calls == list(range(9, -1, -1))


def test_prompts_are_remembered_only_without_gradients() -> None:
    weight = torch.ones(1, requires_grad=True)
    slots = torch.arange(2 * 3 * 5).view(2, 3, 5)  # S = 2, B = 3, L = 5
    encode = lambda s, t, learned, *_: Context.of(s.unsqueeze(-1).float() * weight)  # noqa: E731
    cond = PromptConditioning(slots, SlotEncoder(encode, NOTHING_LEARNED))
    one = cond.at(100).k
    with torch.no_grad():
        weight.mul_(2)
    assert torch.equal(cond.at(100).k, 2 * one)
    with torch.no_grad():
        remembered = cond.at(100).k
        weight.mul_(2)
        assert torch.equal(cond.at(100).k, remembered)


def test_distinct_rows_are_found_on_the_cpu() -> None:
    """Devices without `unique`, of which `meta` is one, only encode them."""
    slots = torch.arange(10).view(10, 1, 1).expand(10, 2, 5)
    encoded: list[torch.Tensor] = []

    def encode(slots: torch.Tensor, t: torch.Tensor, learned: Learned | None, *_: object) -> Context:
        encoded.append(slots)
        return Context.of(slots.unsqueeze(-1).float())

    cond = PromptConditioning(slots, SlotEncoder(encode, NOTHING_LEARNED), device="meta")
    with torch.no_grad():
        context = cond.at(100).k
    assert cond.slots.device.type == context.device.type == encoded[0].device.type == "meta"
    assert (context.shape, encoded[0].shape) == ((2, 5, 1), (10, 5))
