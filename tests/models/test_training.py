"""The training step: what is encoded, cached, drawn, and in which precision it runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from evaluation.world.rendered import RenderedWorld
from ldm.config import load_config
from ldm.data.datamodule import DataModuleFromConfig, RunningSampler
from ldm.data.personalized import PersonalizedBase
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.diffusion.balance import LossBalance
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.latents import LatentCache
from ldm.util import instantiate_from_config

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "models/demo/references"


def build(**params: object) -> LatentDiffusion:
    config = load_config(ROOT / "configs/demo/finetune.yaml")
    OmegaConf.update(config, "model.params.ckpt_path", str(ROOT / "models/demo/model.safetensors"))
    for key, value in params.items():
        OmegaConf.update(config, f"model.params.{key}", value)
    torch.manual_seed(0)
    return instantiate_from_config(config.model)


@pytest.fixture
def model() -> LatentDiffusion:
    return build()


def batch_of(dataset: PersonalizedBase, numbers: list[int]) -> dict[str, object]:
    return torch.utils.data.default_collate([dataset[n] for n in numbers])


def rows_encoded(model: LatentDiffusion) -> list[int]:
    """Filled with the number of token sequences of each text pass."""
    counts: list[int] = []
    model.cond_stage_model.transformer.text_model.register_forward_hook(
        lambda module, inputs, output: counts.append(len(inputs[0]))
    )
    return counts


@pytest.mark.parametrize("stages", [1, 10, 50])
def test_a_step_encodes_one_prompt_for_each_sample(stages: int) -> None:
    model = build(prospect_stages=stages).train()
    counts = rows_encoded(model)
    dataset = PersonalizedBase(PICTURES / "dotted-star", size=64)
    model.training_step(batch_of(dataset, list(range(5))), 0).backward()
    assert counts == [5]
    assert all(p.grad is None for p in model.model.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.embedding_manager.parameters())


def test_samples_of_a_batch_have_their_own_stage(model: LatentDiffusion) -> None:
    model.eval()  # dropout would make every call differ
    cond = model.get_learned_conditioning(["a * thing"] * 3)
    t = torch.tensor([50, 550, 950])
    mixed = cond.at(t).k
    for i, timestep in enumerate(t.tolist()):
        assert torch.allclose(mixed[i], cond.at(timestep).k[i], atol=1e-6)
    assert not torch.allclose(mixed[0], mixed[1], atol=1e-3)


def test_generating_encodes_each_distinct_prompt_once(model: LatentDiffusion) -> None:
    counts = rows_encoded(model)
    words = ["a * star"] * 5 + ["a red star"] * 5
    with torch.no_grad():
        cond = model.get_learned_conditioning(["*"] * 2, words)
        for t in range(0, 1000, 20):
            cond.at(t)
    assert counts == [6]  # five learned stages and one text, shared by both pictures


@pytest.mark.parametrize("learning", [False, True])
def test_copies_are_waited_for_beside_cuda(
    model: LatentDiffusion, learning: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = PersonalizedBase(PICTURES / "striped-heart", size=64)
    model._latents = LatentCache(model.encode_first_stage, dataset)
    batch, move, waited = batch_of(dataset, [0, 1]), Tensor.to, []

    def spy(tensor: Tensor, *args: object, **options: object) -> Tensor:
        waited.append(not options.get("non_blocking", False))
        return move(tensor, *args, **options)

    monkeypatch.setattr(Tensor, "to", spy)
    with torch.set_grad_enabled(learning):
        model.shared_step(batch, "train" if learning else "val")
    assert waited and all(waited)


@pytest.mark.parametrize(("workers", "cuda_graph", "pins"), [(0, True, True), (1, False, True), (1, True, False)])
def test_no_thread_pins_memory_while_a_step_is_captured(
    workers: int, cuda_graph: bool, pins: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DataModuleFromConfig(1, num_workers=workers)
    data.datasets["train"] = [0]  # in no memory of its own
    data.trainer = SimpleNamespace(lightning_module=SimpleNamespace(cuda_graph=cuda_graph))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert data._loader("train").pin_memory is pins


def test_the_cache_changes_nothing(model: LatentDiffusion) -> None:
    """Moments from the cache, for every picture and flip, give the losses that encoding anew gives."""
    model.eval()  # dropout would make every step differ
    folder = PICTURES / "striped-heart"
    dataset = PersonalizedBase(folder, size=64, flip_p=0.5)
    batches = [batch_of(dataset, list(range(n, n + 3))) for n in (0, 3, 6)]
    assert {bool(f) for batch in batches for f in batch["flipped"]} == {True, False}
    fresh = [model.shared_step(batch, "val")[0] for batch in batches]
    model._latents = LatentCache(model.encode_first_stage, dataset)
    small = [batch_of(dataset, list(range(n, n + 3))) for n in (0, 3, 6)]
    assert all("image" not in batch for batch in small)
    cached = [model.shared_step(batch, "val")[0] for batch in small]
    for one, two in zip(fresh, cached, strict=True):
        assert torch.allclose(one, two, rtol=1e-4)


def test_a_sample_depends_on_its_number_only(model: LatentDiffusion) -> None:
    """Sample 7 has the same loss in a batch with others and alone."""
    model.eval()
    dataset = PersonalizedBase(PICTURES / "dotted-star", size=64)
    alone = model.shared_step(batch_of(dataset, [7]), "val")[0]
    others = model.shared_step(batch_of(dataset, [8]), "val")[0]
    both = model.shared_step(batch_of(dataset, [7, 8]), "val")[0]
    assert torch.allclose(both, (alone + others) / 2, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_frozen_half_precision(model: LatentDiffusion, dtype: str) -> None:
    """Frozen weights in half, what is trained in float32; the loss is the same up to the precision."""
    half = build(frozen_dtype=dtype)
    assert {p.dtype for p in half.model.parameters()} == {getattr(torch, dtype)}
    assert {p.dtype for p in half.embedding_manager.parameters()} == {torch.float32}
    half.embedding_manager.load_state_dict(model.embedding_manager.state_dict())
    batch = batch_of(PersonalizedBase(PICTURES / "dotted-star", size=64), [0, 1, 2, 3])
    losses = []
    for m in (model, half):
        m.embedding_manager.eval()
        loss = m.shared_step(batch, "val")[0]
        loss.backward()
        losses.append(loss)
        assert all(p.grad.dtype == torch.float32 for p in m.embedding_manager.parameters() if p.grad is not None)
    assert torch.allclose(losses[0], losses[1], rtol=0.02)


def test_channels_last_and_checkpointing_change_nothing(model: LatentDiffusion) -> None:
    batch = batch_of(PersonalizedBase(PICTURES / "dotted-star", size=64), [0, 1])
    model.embedding_manager.eval()
    loss = model.shared_step(batch, "val")[0]
    loss.backward()
    for switch in ({"channels_last": True}, {"unet_config.params.use_checkpoint": True}):
        other = build(**switch)
        other.embedding_manager.load_state_dict(model.embedding_manager.state_dict())
        other.embedding_manager.eval()
        other_loss = other.shared_step(batch, "val")[0]
        other_loss.backward()
        assert torch.allclose(loss, other_loss, rtol=1e-5)
        pairs = zip(model.embedding_manager.parameters(), other.embedding_manager.parameters(), strict=True)
        for one, two in pairs:
            if one.grad is not None:
                assert torch.allclose(one.grad, two.grad, rtol=1e-3, atol=1e-6)


def test_regularisation_pulls_to_the_initial_word() -> None:
    model = build(embedding_reg_weight=0.5, prospect_stages=2).eval()
    batch = batch_of(PersonalizedBase(PICTURES / "dotted-star", size=64), [0])
    loss, parts = model.shared_step(batch, "val")
    distance = (model.embedding_manager.embeddings() - model.embedding_manager.initial_embeddings).pow(2).sum(1).mean()
    assert torch.allclose(loss, parts["val/loss_simple"] + 0.5 * distance, rtol=1e-5)


def sampler_numbers(position: int, rank: int = 0, world: int = 1) -> Iterator[int]:
    return iter(RunningSampler(20, 4, lambda: position, rank, world))


def test_running_sampler() -> None:
    assert list(sampler_numbers(0)) == list(range(20))
    assert list(sampler_numbers(3)) == list(range(12, 20))  # resumed within the first epoch
    assert list(sampler_numbers(5)) == list(range(20, 40))  # the second epoch goes on counting
    both = [list(sampler_numbers(0, rank, 2)) for rank in (0, 1)]
    assert both == [[0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]]
    assert len(RunningSampler(2, 8, lambda: 0)) == 8  # fewer pictures than a batch


def test_standardised_latents_reconstruct_the_same() -> None:
    model = build()
    first_stage: AutoencoderKL = model.first_stage_model
    first_stage.quant_conv.weight.data[:2] *= 3.0
    first_stage.quant_conv.bias.data += 0.7
    world = RenderedWorld(size=48, seed=9)
    images = world.images(range(4))
    with torch.no_grad():
        before = first_stage.encode(images)
        noise = torch.randn(before.mean.shape)
        expected = first_stage.decode(before.sample(noise))
        cache = LatentCache(model.encode_first_stage, world)
        cache.standardize(first_stage)
        after = first_stage.encode(images)
        assert torch.allclose(first_stage.decode(after.sample(noise)), expected, atol=1e-4)
    moments: Tensor = cache.moments
    mean = moments[:, :4]
    assert torch.allclose(mean.mean((0, 2, 3)), torch.zeros(4), atol=1e-5)
    assert torch.allclose(mean.std((0, 2, 3)), torch.ones(4), atol=1e-5)
    assert torch.allclose(moments[:4], after.parameters, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_latents_are_standardised(dtype: str) -> None:
    """On images of 32 pixels: a convolution in half precision takes a second at 128 on a CPU."""
    model, world = build(frozen_dtype=dtype), RenderedWorld(size=16, seed=9, resolution=32)
    model.first_stage_model.quant_conv.weight.data *= 3.0

    @torch.no_grad()
    def reconstructed() -> Tensor:
        return model.decode_first_stage(model.encode_first_stage(world.images(range(4))).mode())

    before = reconstructed()
    LatentCache(model.encode_first_stage, world).standardize(model.first_stage_model)
    assert (reconstructed() - before).abs().mean() < 0.02 < before.std()


def test_balanced_losses_count_alike() -> None:
    balance = LossBalance(bins=2)
    for _ in range(200):
        balanced = balance(torch.tensor([0.01, 1.0]), torch.tensor([0.1, 0.9]))
    assert torch.allclose(balanced, torch.ones(2), rtol=1e-3)


def test_text_transformer_is_trained_only_on_request() -> None:
    parts = [f"model.params.{part}_ckpt=null" for part in ("first_stage", "cond_stage")]
    config = load_config(ROOT / "configs/demo/diffusion.yaml", overrides=parts)
    for trainable in (False, True):
        OmegaConf.update(config, "model.params.cond_stage_trainable", trainable)
        model = instantiate_from_config(config.model).train()
        trained = {id(p) for p in model.trainable_parameters()}
        text = list(model.cond_stage_model.parameters())
        assert all(p.requires_grad is trainable and (id(p) in trained) is trainable for p in text)
        assert all(id(p) in trained for p in model.model.parameters())
        assert not any(p.requires_grad for p in model.first_stage_model.parameters())
        assert model.cond_stage_model.training is trainable and not model.first_stage_model.training
