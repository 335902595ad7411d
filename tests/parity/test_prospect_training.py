"""ProSpect's losses, gradients and optimizer steps against numbers recorded from the running reference."""

import pytest
import tiny
import torch
from torch import Tensor

from ldm.models.diffusion.ddpm import LatentDiffusion

RECORDED = tiny.golden("train")
NAMES = tiny.META["emb_param_names"]
# each attention sees one token, so that its softmax is 1 whatever queries and keys are
WITHOUT_GRADIENT = [
    *(f"attn{i}.to_{x}.weight" for i in (1, 2) for x in "qk"),
    "norm2.weight",
    "norm2.bias",
]


def sampled(tensor: Tensor) -> Tensor:
    """The elements of a tensor that were recorded."""
    return tensor.detach().flatten()[:: max(1, tensor.numel() // 64)][:64]


def close_relative(ours: Tensor, recorded: Tensor, tolerance: float = 1e-3) -> None:
    """Equal up to a part of the recorded tensor's largest value, and of its norm."""
    difference = ours - recorded
    assert difference.abs().max() <= tolerance * recorded.abs().max()
    assert difference.norm() <= tolerance * recorded.norm()


@pytest.mark.parametrize("t", [100, 500])
def test_noising(tiny_model: LatentDiffusion, t: int) -> None:
    noised = tiny_model.q_sample(RECORDED["x0"], torch.tensor([t]), RECORDED["noise"])
    torch.testing.assert_close(noised, RECORDED[f"q_sample.t{t}"], rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_losses(tiny_model: LatentDiffusion) -> None:
    contexts = tiny.stage_contexts()
    assert {0, 99, 100, 999} <= set(RECORDED["losses.t"].tolist())
    for t, record in zip(RECORDED["losses.t"], RECORDED["losses.loss_simple_vlb_total"], strict=True):
        loss, parts = tiny_model.p_losses(RECORDED["x0"], contexts, t.view(1), RECORDED["noise"])
        found = torch.stack([loss, *(parts[f"val/loss{kind}"] for kind in ("_simple", "_vlb", ""))])
        torch.testing.assert_close(found, record, rtol=1e-4, atol=0, msg=f"t = {t}")


@torch.no_grad()
def test_losses_of_a_batch_are_the_mean_of_its_samples(tiny_model: LatentDiffusion) -> None:
    """All recorded timesteps at once, so that every sample must read the context of its own stage."""
    t, record = RECORDED["losses.t"], RECORDED["losses.loss_simple_vlb_total"]
    count = len(t)
    contexts = [context.expand(count, -1, -1) for context in tiny.stage_contexts()]
    x0, noise = (RECORDED[name].expand(count, -1, -1, -1) for name in ("x0", "noise"))
    loss, parts = tiny_model.p_losses(x0, contexts, t, noise)
    torch.testing.assert_close(loss, record[:, 0].mean(), rtol=1e-4, atol=0)
    torch.testing.assert_close(parts["val/loss_vlb"], record[:, 2].mean(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("t", [0, 99, 100, 999])
def test_gradients(trainable: LatentDiffusion, t: int) -> None:
    cond = trainable.get_learned_conditioning(["*"])
    loss, _ = trainable.p_losses(RECORDED["x0"], cond, torch.tensor([t]), RECORDED["noise"])
    loss.backward()
    torch.testing.assert_close(loss.detach().view(1), RECORDED[f"grad.t{t}.loss"], rtol=1e-4, atol=0)
    gradients = {name: p.grad for name, p in trainable.embedding_manager.attention.named_parameters()}
    assert list(gradients) == NAMES
    norms = torch.stack([gradients[name].norm() for name in NAMES])
    torch.testing.assert_close(norms, RECORDED[f"grad.t{t}.l2"], rtol=1e-3, atol=0)
    for name in NAMES:
        close_relative(sampled(gradients[name]), RECORDED[f"grad.t{t}.sample.{name}"])
    for name in WITHOUT_GRADIENT:
        assert gradients[name].eq(0).all()
    stages_with_gradient = gradients["ff.net.2.bias"].view(10, 768).abs().sum(dim=1).nonzero().flatten()
    assert stages_with_gradient.tolist() == [t // 100], "only the stage of the timestep learns"


def test_three_optimizer_steps(trainable: LatentDiffusion) -> None:
    attention = trainable.embedding_manager.attention
    start = {name: p.detach().clone() for name, p in attention.named_parameters()}
    optimizer = trainable.configure_optimizers()
    group, recorded = optimizer.param_groups[0], tiny.META["adamw"]
    assert type(optimizer).__name__ == recorded["class"]
    for key in ("lr", "betas", "eps", "weight_decay", "amsgrad"):
        assert group[key] == (tuple(recorded[key]) if key == "betas" else recorded[key])
    for step, t in enumerate(RECORDED["adam.t"]):
        optimizer.zero_grad()
        x0, noise = RECORDED[f"adam.step{step}.x0"], RECORDED[f"adam.step{step}.noise"]
        cond = trainable.get_learned_conditioning(["*"])
        loss, _ = trainable.p_losses(x0, cond, t.view(1), noise)
        loss.backward()
        optimizer.step()
        torch.testing.assert_close(loss.detach(), RECORDED["adam.losses"][step], rtol=1e-3, atol=0)
        norms = torch.stack([p.detach().norm() for p in attention.parameters()])
        torch.testing.assert_close(norms, RECORDED[f"adam.step{step}.param_l2"], rtol=1e-3, atol=0)
    with torch.no_grad():
        vectors = trainable.embedding_manager.embeddings()
    torch.testing.assert_close(vectors, RECORDED["adam.final.placeholder_embeddings"], rtol=0, atol=1e-3)
    for name, parameter in attention.named_parameters():
        moved = (parameter.detach() - start[name]).norm().view(1)
        torch.testing.assert_close(moved, RECORDED[f"adam.final.delta_l2.{name}"], rtol=1e-3, atol=0)
        # three steps of lr each are the most that a flipped sign can make of a single weight
        difference = (sampled(parameter) - RECORDED[f"adam.final.sample.{name}"]).abs()
        assert difference.max() <= 6 * recorded["lr"]
        assert difference.median() <= 1e-6
