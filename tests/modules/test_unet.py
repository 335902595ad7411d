"""The U-Net's contexts for each layer, and switches that change no number."""

from collections.abc import Iterator

import pytest
import tiny
import torch
from torch import Tensor

from ldm.conditioning.context import Context
from ldm.modules import attention
from ldm.modules.attention import BasicTransformerBlock, attend
from ldm.modules.diffusionmodules.openaimodel import UNetModel

X = tiny.golden("unet")["x"]
# in order of execution; the tiny model has attention in every level, as Stable Diffusion has in three of four
ATTENTION_PLACES = ["input_blocks.1", "input_blocks.2", "input_blocks.4", "input_blocks.5", "middle_block"] + [
    f"output_blocks.{i}" for i in range(6)
]


@pytest.fixture
def layers(unet: UNetModel) -> dict[int, str]:
    blocks = {n: m for n, m in unet.named_modules() if isinstance(m, BasicTransformerBlock)}
    return {module.layer_index: name for name, module in blocks.items()}


def test_attention_layers_are_numbered_in_order_of_execution(unet: UNetModel, layers: dict[int, str]) -> None:
    assert [layers[i].split(".1.transformer_blocks")[0] for i in sorted(layers)] == ATTENTION_PLACES
    assert unet.num_attention_layers == len(ATTENTION_PLACES)


@torch.no_grad()
def test_a_context_for_each_layer_reaches_that_layer(unet: UNetModel, layers: dict[int, str]) -> None:
    """Same context in every layer: same output. Another one in layer i: the first change is in layer i."""
    count = len(ATTENTION_PLACES)
    layered = tiny.context("unet").expand(count, 1, 77, 768).clone()
    x, t = X, torch.tensor([250])
    assert torch.equal(unet(x, t, Context.of(layered)), unet(x, t, Context.of(tiny.context("unet"))))

    outputs: dict[int, Tensor] = {}
    handles = [
        unet.get_submodule(f"{name}.attn2").register_forward_hook(
            lambda module, args, output, i=i: outputs.__setitem__(i, output)
        )
        for i, name in layers.items()
    ]
    try:
        unet(x, t, Context.of(layered))
        before = dict(outputs)
        for changed in range(count):
            other = layered.clone()
            other[changed] = tiny.context("unet2")
            unet(x, t, Context.of(other))
            different = [i for i in range(count) if not torch.equal(outputs[i], before[i])]
            assert different[0] == changed
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def test_keys_and_values_may_differ(unet: UNetModel) -> None:
    k, v = tiny.context("unet"), tiny.context("unet2")
    x, t = X, torch.tensor([250])
    split = unet(x, t, Context(k, v))
    block = unet.input_blocks[1][1].transformer_blocks[0].attn2
    h = torch.randn(1, 64, 32, generator=torch.Generator().manual_seed(0))
    q, keys, values = (p.unflatten(-1, (4, 8)).transpose(1, 2) for p in (block.to_q(h), block.to_k(k), block.to_v(v)))
    expected = ((q @ keys.mT * 8**-0.5).softmax(-1) @ values).transpose(1, 2).flatten(2)
    torch.testing.assert_close(block(h, k, v), block.to_out(expected), rtol=1e-5, atol=1e-5)
    for same in (k, v):
        assert (split - unet(x, t, Context.of(same))).abs().max() > 1e-2


@pytest.fixture
def recomputing(unet: UNetModel) -> Iterator[UNetModel]:
    was = unet.use_checkpoint
    yield unet
    unet.use_checkpoint = was


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_generators_are_read_only_where_they_are_used(dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recomputing repeats dropout; without it, nobody asks for their state, which a CUDA graph may not read."""
    torch.manual_seed(0)
    unet = UNetModel(4, 8, 4, 1, [1], context_dim=6, channel_mult=[1], num_heads=2, dropout=dropout, norm_num_groups=4)
    for parameter in unet.parameters():
        parameter.detach().normal_(std=0.3)
    reads: list[bool] = []
    read = torch.get_rng_state
    monkeypatch.setattr(torch, "get_rng_state", lambda: (reads.append(True), read())[1])
    gradients = []
    for use, training in ((False, True), (False, False), (True, True), (True, False)):
        unet.use_checkpoint = use
        torch.manual_seed(1)
        inputs = torch.randn(1, 4, 4, 4), torch.tensor([250]), Context.of(torch.randn(1, 3, 6))
        loss = unet.train(training)(*inputs).square().sum()
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(unet.parameters()))]))
    assert torch.equal(torch.cat(gradients[:2]), torch.cat(gradients[2:]))
    assert torch.equal(gradients[0], gradients[1]) is (dropout == 0)
    assert bool(reads) is (dropout > 0)


def test_recomputed_activations_give_the_same_gradients(recomputing: UNetModel) -> None:
    """With frozen weights, where only the context carries a gradient; and the switch really recomputes."""
    assert not any(p.requires_grad for p in recomputing.parameters())
    calls: list[str] = []
    # before, not after: recomputation stops where the last activation it needs is there
    handle = recomputing.middle_block.register_forward_pre_hook(lambda *_: calls.append("middle"))
    gradients = []
    try:
        for use in (False, True):
            recomputing.use_checkpoint = use
            context = tiny.context("unet").requires_grad_()
            calls.clear()
            recomputing(X, torch.tensor([250]), Context.of(context)).square().sum().backward()
            gradients.append(context.grad)
            assert len(calls) == 1 + use
    finally:
        handle.remove()
    assert gradients[0].abs().max() > 0
    assert torch.equal(*gradients)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_attention_equals_the_fused_one(
    dtype: torch.dtype, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 77, 8, generator=generator).to(dtype).requires_grad_() for _ in range(3))
    fused_calls: list[bool] = []
    fused = attention.F.scaled_dot_product_attention

    def counting(*args: Tensor, **options: bool) -> Tensor:
        fused_calls.append(True)
        return fused(*args, **options)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", counting)
    results = []
    for limit in (2**17, 0):
        monkeypatch.setattr(attention, "PLAIN_ATTENTION_PAIRS", limit)
        monkeypatch.setattr(attention, "PLAIN_ATTENTION_PAIRS_HALF", limit)
        out = attend(q, k, v, causal=causal)
        results.append((out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))))
        assert len(fused_calls) == (limit == 0)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    for plain, other in zip(*results, strict=True):
        torch.testing.assert_close(plain, other, rtol=tolerance, atol=tolerance)


def test_widths_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"widths \[32\] must be multiples of num_heads=5"):
        UNetModel(4, 32, 4, 1, [1], 8, (1,), num_heads=5)


def test_a_new_network_starts_as_zero() -> None:
    unet = UNetModel(4, 32, 4, 1, [1], 8, (1, 2), num_heads=4, transformer_depth=2)
    out = unet(torch.randn(1, 4, 4, 6), torch.tensor([5]), Context.of(torch.randn(1, 3, 8)))
    assert out.shape == (1, 4, 4, 6) and out.eq(0).all()
    assert unet.num_attention_layers == 2 * 4  # one place each in input and middle, two in output; depth 2
