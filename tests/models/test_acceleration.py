"""Training and sampling steps: optimisations compute what the plain path computes, exactly or to what is said.

The switches that a benchmark can turn are compared in `tests/evaluation/test_benchmark.py`.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from runs import CONFIG, LEARN, MODEL, PICTURES, ROOT
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import main
from evaluation.world.rendered import RenderedWorld
from ldm.conditioning.context import Context
from ldm.conditioning.encoding import PromptConditioning
from ldm.config import load_config
from ldm.data.datamodule import DataModuleFromConfig, RunningSampler
from ldm.data.personalized import PersonalizedBase
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.diffusion.acceleration import FixedUNet, TensorStep, _Buffers
from ldm.models.diffusion.balance import LossBalance
from ldm.models.diffusion.ddim import ddim
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.sampling import guided
from ldm.models.diffusion.schedule import ddim_parameters, ddim_timesteps
from ldm.modules.attention import set_attention
from ldm.util import instantiate_from_config

WORDS = ["a *"] * 5 + ["a red thing"] * 5


def build(**params: object) -> LatentDiffusion:
    """The small model, without dropout: it would make every step differ."""
    config = load_config(CONFIG)
    for key, value in {"ckpt_path": str(MODEL), "personalization_config.params.dropout": 0.0, **params}.items():
        OmegaConf.update(config, f"model.params.{key}", value)
    torch.manual_seed(0)
    return instantiate_from_config(config.model)


@pytest.fixture(scope="module")
def shared() -> LatentDiffusion:
    return build().eval()


@pytest.fixture
def model(shared: LatentDiffusion) -> Iterator[LatentDiffusion]:
    yield shared
    shared.eval()
    shared.accelerate()
    shared.decode_batch = None
    shared.zero_grad()
    shared._latents, shared._prompts = None, None


def schedule(model: LatentDiffusion, steps: int) -> tuple:
    timesteps = ddim_timesteps(steps, 1000)
    return (timesteps, *ddim_parameters(model.host_alphas_cumprod, timesteps, 0.0))


def prompts(model: LatentDiffusion, count: int = 1) -> tuple[PromptConditioning, PromptConditioning]:
    return model.get_learned_conditioning(["*"] * count, WORDS), model.get_learned_conditioning([""] * count)


def noise(count: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(count, 4, 16, 16, generator=torch.Generator().manual_seed(seed))


def plain_ddim(model: LatentDiffusion, x: Tensor, steps: int, scale: float) -> Tensor:
    """Two prompts in one batch, everything computed anew in every step."""
    cond, uncond = prompts(model, len(x))

    def denoise(x: Tensor, t: int) -> Tensor:
        x = torch.cat([x, x])
        timesteps = torch.full((len(x),), t)
        context = Context.cat(uncond.at(t), cond.at(t))
        prediction = model.to_eps(model.model.diffusion_model(x, timesteps, context), x, timesteps)
        one, two = prediction.chunk(2)
        return one + scale * (two - one)

    return ddim(denoise, x, *schedule(model, steps))


def pictures(size: int = 128, **options: object) -> PersonalizedBase:
    return PersonalizedBase(PICTURES, size=size, **options)


def batch_of(numbers: list[int], dataset: PersonalizedBase | None = None) -> dict[str, object]:
    dataset = dataset or pictures()
    return torch.utils.data.default_collate([dataset[n] for n in numbers])


# Sampling


@torch.no_grad()
def test_kept_keys_and_values_change_nothing(model: LatentDiffusion) -> None:
    """Bit for bit; and they are computed once for a stage, not in every step."""
    calls: list[int] = []
    layer = next(m for n, m in model.model.named_modules() if n.endswith("attn2.to_k"))
    handle = layer.register_forward_hook(lambda *_: calls.append(1))
    cond, uncond = prompts(model)
    fast = ddim(guided(model, cond, uncond, 4.0), noise(), *schedule(model, 12))
    assert len(calls) == 10
    handle.remove()
    assert torch.equal(fast, plain_ddim(model, noise(), 12, 4.0))


@torch.no_grad()
def test_layers_of_a_context_keep_their_own_keys_and_values(model: LatentDiffusion) -> None:
    unet = model.model.diffusion_model
    layers = torch.randn(unet.num_attention_layers, 2, 7, 128, generator=torch.Generator().manual_seed(1))
    context = Context(layers, layers.flip(0))
    x, t = noise(2), torch.tensor([5, 700])
    assert torch.equal(unet(x, t, context), unet(x, t, unet.project(context)))


@torch.no_grad()
def check_one_call_serves_all(model: LatentDiffusion, fixed: FixedUNet, tolerance: float) -> None:
    """Three prompts and seeds, each without and with `fixed`, go through one set of buffers."""
    plan = schedule(model, 10)
    for words, seed in ((WORDS, 0), (["a star"] * 10, 1), (WORDS, 2)):
        latents = []
        for unet in (None, fixed):
            model._fixed_unet = unet
            cond, uncond = model.get_learned_conditioning(["*"], words), model.get_learned_conditioning([""])
            latents.append(ddim(guided(model, cond, uncond, 4.0), noise(seed=seed).to(model.device), *plan))
        torch.testing.assert_close(*latents, rtol=tolerance, atol=tolerance)
    assert len(fixed._buffers) == 1


@torch.no_grad()
def test_one_set_of_buffers_serves_stages_prompts_and_seeds(model: LatentDiffusion) -> None:
    """On the CPU they are there without a graph; results never lie in them."""
    fixed = FixedUNet(model.model.diffusion_model, "cuda_graph")
    check_one_call_serves_all(model, fixed, 1e-4)
    (buffers,) = fixed._buffers.values()
    first, second = (fixed(noise(seed=seed), torch.tensor([950]), prompts(model)[0].at(950)) for seed in (0, 1))
    owned = {x.untyped_storage().data_ptr() for x in (buffers.x, buffers.timesteps, *buffers.context.tensors())}
    assert len(owned | {x.untyped_storage().data_ptr() for x in (first, second)}) == len(owned) + 2


@pytest.mark.slow
def test_one_compilation_serves_stages_prompts_and_seeds() -> None:
    small = {"model_channels": 16, "channel_mult": [1], "attention_resolutions": [1], "num_res_blocks": 1}
    model = build(ckpt_path=None, **{f"unet_config.params.{key}": value for key, value in small.items()}).eval()
    for parameter in model.model.parameters():
        parameter.detach().normal_(std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    compilations: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        compilations.append(1)
        return graph.forward

    torch._dynamo.reset()
    fixed = FixedUNet(model.model.diffusion_model, "cuda_graph")
    fixed.call = torch.compile(model.model.diffusion_model, fullgraph=True, backend=backend)
    check_one_call_serves_all(model, fixed, 1e-4)
    assert len(compilations) == 1


@torch.no_grad()
def test_a_stage_without_guidance_makes_one_prediction(model: LatentDiffusion) -> None:
    """The first six of ten steps with two predictions, the others with one; the latents are those of the plain path."""
    scales, rows = [1.0] * 4 + [4.0] * 6, []
    plan, (cond, uncond) = schedule(model, 10), prompts(model)
    expected = ddim(guided(model, cond, uncond, scales), noise(), *plan)
    model.accelerate(cuda_graph=True)
    fixed, call = model._fixed_unet, model._fixed_unet.call
    fixed.call = lambda x, *rest: (rows.append(len(x)), call(x, *rest))[1]
    found = ddim(guided(model, cond, uncond, scales), noise(), *plan)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert rows == [2] * 6 + [1] * 4 and len(fixed._buffers) == 2


@torch.no_grad()
def test_autocast_has_buffers_of_its_own(model: LatentDiffusion) -> None:
    """Keys and values of another precision must not be rounded into the same place."""
    unet, (cond, _) = model.model.diffusion_model, prompts(model)
    inputs = noise(), torch.tensor([950]), cond.at(950)
    fixed = FixedUNet(unet, "cuda_graph")
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            assert torch.equal(fixed(*inputs), unet(*inputs))


@torch.no_grad()
def test_a_copied_model_has_buffers_of_its_own(model: LatentDiffusion) -> None:
    """As the callback for averaged weights copies it; what it has learned since must be read."""
    model.accelerate(cuda_graph=True)
    t, (cond, _) = torch.tensor([950]), prompts(model)
    before = model.apply_model(noise(), t, cond)
    other = copy.deepcopy(model)
    other.model.diffusion_model.out[2].bias += 1
    torch.testing.assert_close(other.apply_model(noise(), t, cond), before + 1, rtol=0, atol=1e-5)
    assert torch.equal(model.apply_model(noise(), t, cond), before)


@torch.no_grad()
def test_a_call_in_inference_mode_leaves_room_for_others(model: LatentDiffusion) -> None:
    fixed = FixedUNet(model.model.diffusion_model, "cuda_graph")
    x, t = noise(), torch.tensor([500])
    context = model.get_learned_conditioning(["a star"]).at(500)
    with torch.inference_mode():
        first = fixed(x.clone(), t.clone(), context).clone()
    assert torch.equal(fixed(x, t, context), first)


class Reached(Exception):
    """In place of a GPU."""


@torch.no_grad()
def test_captures_are_made_on_the_device_of_the_inputs(model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which need not be the current one (`--device cuda:1`)."""
    unet, entered = model.model.diffusion_model, []

    def device(place: torch.device) -> None:
        entered.append(place)
        raise Reached

    monkeypatch.setattr(torch.cuda, "device", device)
    with pytest.raises(Reached):
        _Buffers(unet, noise(), torch.tensor([950]), unet.project(prompts(model)[0].at(950)), capture=True)
    with pytest.raises(Reached):
        TensorStep(model.embedding_manager, model._loss_of_tensors).capture([noise()])
    assert entered == [torch.device("cpu")] * 2


@torch.no_grad()
def test_decoding_in_slices(model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    """By choice, and where memory does not hold the batch."""
    z = noise(5)
    expected = model.decode_first_stage(z)
    sizes: list[int] = []
    decode = model.first_stage_model.decode

    def limited(z: Tensor) -> Tensor:
        sizes.append(len(z))
        if len(z) > 2:
            raise torch.OutOfMemoryError("too much")
        return decode(z)

    monkeypatch.setattr(model.first_stage_model, "decode", limited)
    torch.testing.assert_close(model.decode_first_stage(z), expected, rtol=0, atol=1e-5)
    model.decode_batch = 2
    torch.testing.assert_close(model.decode_first_stage(z), expected, rtol=0, atol=1e-5)
    assert sizes == [5, 1, 1, 1, 1, 1, 2, 2, 1]
    with pytest.raises(ValueError, match="decode_batch must be a whole number of at least 1"):
        build(decode_batch=0)


def test_attention_is_chosen_for_a_whole_model(model: LatentDiffusion) -> None:
    set_attention(model, "plain")
    kinds = {type(m).__name__ for m in model.modules() if getattr(m, "attention_backend", None) == "plain"}
    set_attention(model, "auto")
    assert kinds == {"CrossAttention", "CLIPAttention", "AttnBlock"}


# The training step


def gradients(model: LatentDiffusion) -> Tensor:
    values = torch.cat([p.grad.flatten() for p in model.trainable_parameters() if p.grad is not None])
    model.zero_grad()
    return values


def loss_and_gradients(model: LatentDiffusion, batch: dict[str, object]) -> tuple[Tensor, Tensor]:
    loss = model.shared_step(batch, "train")[0]
    loss.backward()
    return loss.detach(), gradients(model)


def test_a_step_encodes_one_prompt_for_each_sample() -> None:
    model = build(prospect_stages=50).train()
    rows: list[int] = []
    text = model.cond_stage_model.transformer.text_model
    text.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    model.training_step(batch_of(list(range(5)), pictures(64)), 0).backward()
    assert rows == [5]
    assert all(p.grad is None for p in model.model.parameters())
    assert gradients(model).abs().sum() > 0


def test_a_sample_depends_on_its_number_only(model: LatentDiffusion) -> None:
    """Sample 7 has the same loss in a batch with one of another stage and alone."""
    alone, others, both = (model.shared_step(batch_of(n, pictures(64)), "val")[0] for n in ([7], [8], [7, 8]))
    assert torch.allclose(both, (alone + others) / 2, rtol=1e-4)


def test_the_step_as_a_function_of_tensors(model: LatentDiffusion) -> None:
    """What a CUDA graph captures: the same loss, logged values and gradients, exactly."""
    batch = batch_of([0, 1, 2])
    loss, parts = model.shared_step(batch, "train")
    loss.backward()
    expected = gradients(model)
    draw = model._draw(batch, "train")
    z = model.get_first_stage_encoding(model.posterior(batch), draw["posterior_noise"])
    slots = model.get_learned_conditioning(batch["caption"]).rows(draw["t"])
    step = TensorStep(model.embedding_manager, model._loss_of_tensors)
    assert {id(p) for p in step.parameters()} == {id(p) for p in model.trainable_parameters()}
    found, named = step.named(step(z, draw["t"], draw["noise"], slots))
    found.backward()
    assert torch.equal(found, loss) and named.keys() == parts.keys()
    assert all(torch.equal(named[name], part) for name, part in parts.items())
    assert torch.equal(gradients(model), expected)


@pytest.mark.parametrize(
    ("accumulate", "processes", "mixed", "captured"),
    [(1, 1, False, True), (2, 1, False, False), (1, 2, False, False), (1, 1, True, False)],
)
def test_when_a_step_is_captured(
    model: LatentDiffusion,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    accumulate: int,
    processes: int,
    mixed: bool,
    captured: bool,
) -> None:
    """On a GPU, of which only the name is here; autocast is on in the steps only, and the log knows nevertheless."""

    @contextlib.contextmanager
    def forward_context() -> Iterator[None]:
        torch.set_autocast_enabled("cuda", mixed)
        yield
        torch.set_autocast_enabled("cuda", False)

    trainer = SimpleNamespace(accumulate_grad_batches=accumulate, world_size=processes, datamodule=None)
    trainer.precision_plugin = SimpleNamespace(forward_context=forward_context)
    model.accelerate(cuda_graph=True)
    monkeypatch.setattr(LatentDiffusion, "device", torch.device("cuda:0"))
    monkeypatch.setattr(model, "_trainer", trainer)
    model._captured["sizes"] = TensorStep(model.embedding_manager, model._loss_of_tensors)
    with caplog.at_level(logging.INFO, logger="ldm"):
        model.on_fit_start()
    assert ("cuda_graph is not used" not in caplog.text) is captured and "cuda_graph" in caplog.text
    assert not model._captured, "weights may lie elsewhere since an earlier fit"
    with forward_context():
        assert model._captures("train") is captured and not model._captures("val")


class HostReads(TorchDispatchMode):
    """Counts the values that are read from tensors one by one."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_the_trainer_reads_nothing_in_a_step_either(tmp_path: Path) -> None:
    """Between two writings of the log: the loss of the progress bar, the optimizer, the callbacks."""

    def reads(steps: int) -> int:
        arguments = [*LEARN, "-l", str(tmp_path), "-n", str(steps), "--max_steps", str(steps)]
        arguments += ["data.params.batch_size=1", "--log_every_n_steps", "1000"]
        with HostReads() as mode:
            assert main.main(arguments) == 0
        return mode.count

    # a sample's dropout seed is read from the batch, which is still on the host; and the loss is looked at by the
    # guard, which does so in every step on the CPU only
    assert reads(4) - reads(2) == 2 * 2


@pytest.mark.parametrize("learning", [False, True])
def test_copies_are_waited_for_beside_cuda(
    model: LatentDiffusion, learning: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = pictures(64)
    model.cache_latents(dataset)
    batch, move, waited = batch_of([0, 1], dataset), Tensor.to, []

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


def test_prompts_are_read_once(model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until captions or placeholders change."""
    batch = batch_of([0, 1])
    read: list[tuple[str, ...]] = []
    learned = model.get_learned_conditioning
    monkeypatch.setattr(
        model, "get_learned_conditioning", lambda captions: (read.append(captions), learned(captions))[1]
    )
    losses = [model.shared_step(batch, "train")[0] for _ in range(2)]
    assert len(read) == 1 and torch.equal(*losses)
    model.shared_step({**batch, "caption": ["a *", "*"]}, "train")
    assert len(read) == 2
    with torch.no_grad():  # contexts are remembered then, and must not be those of an earlier step
        model.shared_step(batch, "val")
        model.shared_step(batch, "val")
    assert len(read) == 4


def test_the_cache_changes_nothing(model: LatentDiffusion) -> None:
    """Moments from the cache, for every picture and flip, give the losses that encoding anew gives."""
    dataset, numbers = pictures(64, flip_p=0.5), ([0, 1, 2], [3, 4, 5], [6, 7, 8])
    batches = [batch_of(n, dataset) for n in numbers]
    assert {bool(f) for batch in batches for f in batch["flipped"]} == {True, False}
    fresh = [model.shared_step(batch, "val")[0] for batch in batches]
    model.cache_latents(dataset)
    small = [batch_of(n, dataset) for n in numbers]
    assert all("image" not in batch for batch in small)
    for one, batch in zip(fresh, small, strict=True):
        assert torch.allclose(one, model.shared_step(batch, "val")[0], rtol=1e-4)


def test_gradients_through_float16(model: LatentDiffusion) -> None:
    """A mean over 512² pixels has small gradients, which in float16 layers would vanish in part without a scale."""
    half = build(frozen_dtype="float16")
    assert {p.dtype for p in half.model.parameters()} == {torch.float16}
    assert {p.dtype for p in half.embedding_manager.parameters()} == {torch.float32}
    losses, gradient = [], []
    for m in (model.train(), half.train()):
        cond = m.get_learned_conditioning(["*"])
        loss = m.p_losses(noise(seed=1), cond, torch.tensor([500]), noise(seed=2))[0]
        (loss / 16).backward()  # 16² latents, not 64²: half precision is slow on a CPU
        losses.append(loss)
        gradient.append(gradients(m))
    assert torch.allclose(*losses, rtol=0.02) and gradient[1].dtype == torch.float32
    assert (gradient[1] - gradient[0]).norm() < 0.005 * gradient[0].norm()


def test_gradients_under_autocast_are_not_enlarged(model: LatentDiffusion) -> None:
    """The trainer's own scaler does that, where the weights are float32."""
    gradient = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.float16, enabled=enabled):
            cond = model.train().get_learned_conditioning(["*"])
            model.p_losses(noise(seed=1), cond, torch.tensor([500]), noise(seed=2))[0].backward()
        gradient.append(gradients(model))
    assert (gradient[1] - gradient[0]).norm() < 0.05 * gradient[0].norm()


def test_fused_adamw_is_adamw() -> None:
    """To a hundredth of the rate after three steps; where a gradient is nearly 0, its direction is rounding."""
    batch = batch_of([0, 1], pictures(64))
    learned = []
    for fused in (True, False):
        model = build(fused_adamw=fused).train()
        model.learning_rate = 1e-3
        start = torch.cat([p.detach().flatten() for p in model.trainable_parameters()])
        optimizer = model.configure_optimizers()
        assert bool(optimizer.param_groups[0]["fused"]) is fused
        for _ in range(3):
            model.shared_step(batch, "train")[0].backward()
            optimizer.step()
            optimizer.zero_grad()
        learned.append(torch.cat([p.detach().flatten() for p in model.trainable_parameters()]))
    assert (learned[0] - start).abs().max() > 1e-3
    torch.testing.assert_close(*learned, rtol=1e-5, atol=1e-5)


def test_gradients_can_be_clipped_in_mixed_precision(tmp_path: Path) -> None:
    """Lightning refuses to clip for fused optimizers."""
    arguments = [*LEARN, "-l", str(tmp_path), "--max_steps", "1", "--precision", "bf16-mixed"]
    arguments += ["model.params.cuda_graph=true"]  # declined, on a GPU too
    assert main.main([*arguments, "--gradient_clip_val", "1.0", "data.params.batch_size=1"]) == 0


def test_the_balance_of_losses_is_the_plain_loop() -> None:
    """Also where several samples of a batch share a level."""
    balance = LossBalance(bins=4)
    mean = torch.zeros(4)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        losses, time = torch.rand(8, generator=generator), torch.rand(8, generator=generator)
        balanced = balance(losses, time)
        for place, loss in zip((time * 4).long().tolist(), losses, strict=True):
            mean[place] = balance.decay * mean[place] + (1 - balance.decay) * loss if mean[place] > 0 else loss
        assert torch.equal(balance.mean, mean)
        assert torch.equal(balanced, losses / mean[(time * 4).long()])


def test_regularisation_pulls_to_the_initial_word() -> None:
    model = build(embedding_reg_weight=0.5, prospect_stages=2).eval()
    loss, parts = model.shared_step(batch_of([0], pictures(64)), "val")
    distance = (model.embedding_manager.embeddings() - model.embedding_manager.initial_embeddings).pow(2).sum(1).mean()
    assert torch.allclose(loss, parts["val/loss_simple"] + 0.5 * distance, rtol=1e-5)


def test_running_sampler() -> None:
    def numbers(position: int, rank: int = 0, world: int = 1) -> list[int]:
        return list(RunningSampler(20, 4, lambda: position, rank, world))

    assert numbers(0) == list(range(20))
    assert numbers(3) == list(range(12, 20))  # resumed within the first epoch
    assert numbers(5) == list(range(20, 40))  # the second epoch goes on counting
    assert numbers(0, 0, 2) == [0, 1, 2, 3, 8, 9, 10, 11] and numbers(0, 1, 2) == [4, 5, 6, 7, 12, 13, 14, 15]
    assert len(RunningSampler(2, 8, lambda: 0)) == 8  # fewer pictures than a batch


@torch.no_grad()
def test_standardised_latents_reconstruct_the_same() -> None:
    model = build()
    first_stage: AutoencoderKL = model.first_stage_model
    first_stage.quant_conv.weight.data[:2] *= 3.0
    first_stage.quant_conv.bias.data += 0.7
    world = RenderedWorld(size=48, seed=9, resolution=32)
    images = world.images(range(4))
    before = first_stage.encode(images)
    noise = torch.randn(before.mean.shape)
    expected = first_stage.decode(before.sample(noise))
    cache = model.cache_latents(world)
    cache.standardize(first_stage)
    after = first_stage.encode(images)
    assert torch.allclose(first_stage.decode(after.sample(noise)), expected, atol=1e-4)
    mean = cache.moments[:, :4]
    assert torch.allclose(mean.mean((0, 2, 3)), torch.zeros(4), atol=1e-5)
    assert torch.allclose(mean.std((0, 2, 3)), torch.ones(4), atol=1e-5)
    assert torch.allclose(cache.moments[:4], after.parameters, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_latents_are_standardised(dtype: str) -> None:
    """On images of 32 pixels: a convolution in half precision takes a second at 128 on a CPU."""
    model, world = build(frozen_dtype=dtype), RenderedWorld(size=16, seed=9, resolution=32)
    model.first_stage_model.quant_conv.weight.data *= 3.0

    @torch.no_grad()
    def reconstructed() -> Tensor:
        return model.decode_first_stage(model.encode_first_stage(world.images(range(4))).mode())

    before = reconstructed()
    model.cache_latents(world).standardize(model.first_stage_model)
    assert (reconstructed() - before).abs().mean() < 0.02 < before.std()


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


@pytest.mark.slow
def test_the_compiled_unet_computes_the_same() -> None:
    """The real compiler, forward and backward: to 1e-4 of the largest value."""
    batch = batch_of([0, 1])
    results = [loss_and_gradients(build(compile_unet=use).train(), batch) for use in (False, True)]
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4 * one.abs().max().item())


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["cuda_graph", "reduce-overhead"])
def test_an_accelerated_call_computes_the_same(mode: str) -> None:
    """To 1e-3: three prompts and seeds through one graph."""
    model = build(channels_last=True).eval().cuda()
    check_one_call_serves_all(model, FixedUNet(model.model.diffusion_model, mode), 1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_a_captured_call_on_another_device_computes_the_same() -> None:
    model = build().eval().to("cuda:1")
    check_one_call_serves_all(model, FixedUNet(model.model.diffusion_model, "cuda_graph"), 1e-3)


class GPUSteps:
    """Training steps from cached latents and pinned draws."""

    def __init__(self, **switches: object) -> None:
        self.model, self.dataset = build(**switches).cuda().train(), pictures()
        self.model.cache_latents(self.dataset)
        self.optimizer = self.model.configure_optimizers()

    def loss(self, *numbers: int) -> Tensor:
        batch = batch_of(list(numbers), self.dataset)
        batch["draw"] = {k: v.pin_memory() for k, v in self.model._draw(batch, "train").items()}
        batch["image_number"], batch["flipped"] = batch["image_number"].pin_memory(), batch["flipped"].pin_memory()
        return self.model.shared_step(batch, "train")[0]

    def run(self, *numbers: int) -> Tensor:
        loss = self.loss(*numbers)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss


@pytest.mark.gpu
def test_a_captured_step_draws_the_dropout_of_the_plain_one() -> None:
    """From the first step on, which warms up before: a resumed run captures anew and must go on as it would have."""
    losses = []
    for cuda_graph in (False, True):
        steps = GPUSteps(cuda_graph=cuda_graph, **{"personalization_config.params.dropout": 0.1})
        for seed in (5, 6):
            torch.manual_seed(seed)
            losses.append(steps.loss(0, 1).item())
    assert losses[:2] == pytest.approx(losses[2:], rel=1e-3) and losses[0] != losses[1]


@pytest.mark.gpu
def test_threads_share_a_captured_call() -> None:
    """Two threads with stages of their own, while one of them captures."""
    model = build().eval().cuda()
    plan = schedule(model, 10)

    @torch.no_grad()
    def latents(seed: int) -> Tensor:
        cond, uncond = model.get_learned_conditioning(["*"], WORDS[seed:] + WORDS[:seed]), prompts(model)[1]
        return ddim(guided(model, cond, uncond, 4.0), noise(seed=seed).cuda(), *plan)

    alone = [latents(seed) for seed in range(4)]
    model.accelerate(cuda_graph=True)
    with ThreadPoolExecutor(2) as pool:
        for one, two in zip(alone, pool.map(latents, range(4)), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("switch", [{}, {"unet_config.params.use_checkpoint": True}])
def test_a_captured_step_learns_the_same(switch: dict[str, bool]) -> None:
    losses, learned = [], []
    for switches in ({}, {"cuda_graph": True, **switch}):
        steps = GPUSteps(**switches)
        losses.append([steps.run(2 * n, 2 * n + 1).item() for n in range(5)])
        learned.append(steps.model.embedding_manager.embeddings().detach().cpu())
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    torch.testing.assert_close(*learned, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_step_does_not_synchronise(cuda_graph: bool) -> None:
    steps = GPUSteps(cuda_graph=cuda_graph)
    for n in range(3):
        steps.run(n)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps.run(3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
