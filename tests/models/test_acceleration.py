"""Every optimisation computes what the plain path computes: exactly, or within the tolerance said."""

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
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import main
from ldm.conditioning.context import Context
from ldm.conditioning.encoding import PromptConditioning
from ldm.config import load_config
from ldm.data.personalized import PersonalizedBase
from ldm.models.diffusion.acceleration import FixedUNet, TensorStep, _Buffers
from ldm.models.diffusion.balance import LossBalance
from ldm.models.diffusion.ddim import ddim
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.latents import LatentCache
from ldm.models.diffusion.sampling import guided
from ldm.models.diffusion.schedule import ddim_parameters, ddim_timesteps
from ldm.modules.attention import attend, set_attention
from ldm.util import instantiate_from_config

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "models/demo/references/dotted-star"
WORDS = ["a *"] * 5 + ["a red thing"] * 5


def build(**params: object) -> LatentDiffusion:
    config = load_config(ROOT / "configs/demo/finetune.yaml")
    OmegaConf.update(config, "model.params.ckpt_path", str(ROOT / "models/demo/model.safetensors"))
    OmegaConf.update(config, "model.params.personalization_config.params.dropout", 0.0)
    for key, value in params.items():
        OmegaConf.update(config, f"model.params.{key}", value)
    torch.manual_seed(0)
    return instantiate_from_config(config.model)


@pytest.fixture(scope="module")
def shared() -> LatentDiffusion:
    return build().eval()


@pytest.fixture
def model(shared: LatentDiffusion) -> Iterator[LatentDiffusion]:
    yield shared
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


def batch_of(dataset: PersonalizedBase, numbers: list[int]) -> dict[str, object]:
    return torch.utils.data.default_collate([dataset[n] for n in numbers])


# Sampling


@torch.no_grad()
def test_kept_keys_and_values_change_nothing(model: LatentDiffusion) -> None:
    """Bit for bit; and they are computed once for a stage, not in every step."""
    calls: list[int] = []
    layer = next(m for n, m in model.model.named_modules() if n.endswith("attn2.to_k"))
    handle = layer.register_forward_hook(lambda *_: calls.append(1))
    cond, uncond = prompts(model)
    fast = ddim(guided(model, cond, uncond, 4.0), noise(), *schedule(model, 20))
    assert len(calls) == 10
    handle.remove()
    assert torch.equal(fast, plain_ddim(model, noise(), 20, 4.0))


@torch.no_grad()
def test_layers_of_a_context_keep_their_own_keys_and_values(model: LatentDiffusion) -> None:
    unet = model.model.diffusion_model
    layers = torch.randn(unet.num_attention_layers, 2, 7, 128, generator=torch.Generator().manual_seed(1))
    context = Context(layers, layers.flip(0))
    x, t = noise(2), torch.tensor([5, 700])
    assert torch.equal(unet(x, t, context), unet(x, t, unet.project(context)))


@torch.no_grad()
def test_all_prompts_are_encoded_in_one_batch(model: LatentDiffusion) -> None:
    """As many text passes as there are distinct prompts of stages, and one for the unconditional prompt."""
    rows: list[int] = []
    text = model.cond_stage_model.transformer.text_model
    handle = text.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    cond, uncond = prompts(model, count=3)
    ddim(guided(model, cond, uncond, 4.0), noise(3), *schedule(model, 10))
    handle.remove()
    assert rows == [5 + 1 + 1]  # five learned tokens, one text, the empty prompt; whatever the batch
    alone = [prompts(model)[i] for i in (0, 1)]
    for together, single in zip((cond, uncond), alone, strict=True):
        for t in (50, 950):
            torch.testing.assert_close(together.at(t).k[:1], single.at(t).k, rtol=0, atol=1e-5)


@torch.no_grad()
def test_one_compilation_serves_stages_prompts_and_seeds() -> None:
    """And one set of buffers, which on the CPU are there without a graph; one more each for a batch of another size."""
    small = {"model_channels": 16, "channel_mult": [1], "attention_resolutions": [1], "num_res_blocks": 1}
    model = build(ckpt_path=None, **{f"unet_config.params.{key}": value for key, value in small.items()}).eval()
    for parameter in model.model.parameters():
        parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    compilations: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        compilations.append(1)
        return graph.forward

    torch._dynamo.reset()
    fixed = FixedUNet(model.model.diffusion_model, "cuda_graph")
    fixed.call = torch.compile(model.model.diffusion_model, fullgraph=True, backend=backend)
    for latents in both_ways(model, fixed):
        torch.testing.assert_close(*latents, rtol=0, atol=1e-4)
        assert latents[0].std() > 0.1
    assert len(compilations) == 1
    (buffers,) = fixed._buffers.values()
    cond, _ = prompts(model)
    first, second = (fixed(noise(seed=seed), torch.tensor([950]), cond.at(950)) for seed in (0, 1))
    torch.testing.assert_close(first, model.model.diffusion_model(noise(), torch.tensor([950]), cond.at(950)))
    owned = {x.untyped_storage().data_ptr() for x in (buffers.x, buffers.timesteps, *buffers.context.tensors())}
    assert len(owned | {x.untyped_storage().data_ptr() for x in (first, second)}) == len(owned) + 2
    again = FixedUNet(model.model.diffusion_model, "cuda_graph")
    again.call = fixed.call
    check_a_stage_without_guidance(model, again, tolerance=1e-4)
    assert len(compilations) <= 2, "one for each size of a batch"


def both_ways(model: LatentDiffusion, fixed: FixedUNet) -> Iterator[list[Tensor]]:
    """Three prompts and seeds, each without and with `fixed`."""
    plan = schedule(model, 10)
    for words, seed in ((WORDS, 0), (["a star"] * 10, 1), (WORDS, 2)):
        latents = []
        for accelerated in (None, fixed):
            model._fixed_unet = accelerated
            cond = model.get_learned_conditioning(["*"], words)
            uncond = model.get_learned_conditioning([""])
            latents.append(ddim(guided(model, cond, uncond, 4.0), noise(seed=seed).to(model.device), *plan))
        yield latents


@torch.no_grad()
def test_buffers_have_the_size_of_the_inputs(model: LatentDiffusion) -> None:
    expected = [plain_ddim(model, noise(count), 3, 4.0) for count in (1, 2)]
    model.accelerate(cuda_graph=True)
    for _ in range(2):
        for count in (1, 2):
            cond, uncond = prompts(model, count)
            found = ddim(guided(model, cond, uncond, 4.0), noise(count), *schedule(model, 3))
            torch.testing.assert_close(found, expected[count - 1], rtol=0, atol=1e-5)
    assert len(model._fixed_unet._buffers) == 2


@torch.no_grad()
def test_a_stage_without_guidance_makes_one_prediction(model: LatentDiffusion) -> None:
    check_a_stage_without_guidance(model, FixedUNet(model.model.diffusion_model, "cuda_graph"))


def check_a_stage_without_guidance(model: LatentDiffusion, fixed: FixedUNet, tolerance: float = 1e-5) -> None:
    """The first six of ten steps with two predictions, the others with one; the latents are those of the plain path."""
    scales, rows = [1.0] * 4 + [4.0] * 6, []
    plan, (cond, uncond) = schedule(model, 10), prompts(model)
    model._fixed_unet = None
    expected = ddim(guided(model, cond, uncond, scales), noise(), *plan)
    model._fixed_unet, call = fixed, fixed.call
    fixed.call = lambda x, *rest: (rows.append(len(x)), call(x, *rest))[1]
    found = ddim(guided(model, cond, uncond, scales), noise(), *plan)
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
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


class StandInGPU:
    """Takes the place of `torch.cuda` in a capture; remembers on which device things are made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current = "the first one"
        self.made: list[object] = []
        places = {"device": self.device, "graph": self.graph, "Stream": self.stream, "current_stream": self.stream}
        places |= {"stream": contextlib.nullcontext, "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None)}
        for name, value in places.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda step, *_, **__: self.made.append(self.current))

    @contextlib.contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, self.current = self.current, device
        yield
        self.current = before

    def stream(self) -> SimpleNamespace:
        self.made.append(self.current)
        return SimpleNamespace(device=self.current, wait_stream=lambda other: None)

    @contextlib.contextmanager
    def graph(self, graph: object, stream: SimpleNamespace, capture_error_mode: str) -> Iterator[None]:
        self.made += [self.current, stream.device]
        yield


@torch.no_grad()
def test_captures_are_made_on_the_device_of_the_inputs(model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which need not be the current one (`--device cuda:1`)."""
    gpu = StandInGPU(monkeypatch)
    context = model.project_context(prompts(model)[0].at(950))
    _Buffers(model.model.diffusion_model, noise(), torch.tensor([950]), context, capture=True)
    assert len(gpu.made) == 5
    TensorStep(model).capture([noise()])
    assert gpu.made == [torch.device("cpu")] * 6


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
    with pytest.raises(ValueError, match="decode_batch must be at least 1"):
        build(decode_batch=0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_and_fused_attention_are_the_same(causal: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 9, 8, generator=generator).to(dtype).requires_grad_() for _ in range(3))
    results = []
    for backend in ("plain", "fused"):
        out = attend(q, k, v, backend=backend, causal=causal)
        results.append((out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))))
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(plain, fused, rtol=tolerance, atol=tolerance)


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


def test_the_step_as_a_function_of_tensors(model: LatentDiffusion) -> None:
    """What a CUDA graph captures: the same loss, logged values and gradients, exactly."""
    batch = batch_of(PersonalizedBase(PICTURES, size=128), [0, 1, 2])
    loss, parts = model.shared_step(batch, "train")
    loss.backward()
    expected = gradients(model)
    draw = model._draw(batch, "train")
    z = model.get_first_stage_encoding(model.posterior(batch), draw["posterior_noise"])
    slots = model.get_learned_conditioning(batch["caption"]).rows(draw["t"])
    step = TensorStep(model)
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
    with caplog.at_level(logging.INFO, logger="ldm"):
        model.on_fit_start()
    assert ("cuda_graph is not used" not in caplog.text) is captured and "cuda_graph" in caplog.text
    with forward_context():
        assert model._captures("train") is captured and not model._captures("val")


def test_graphs_of_an_earlier_fit_are_forgotten(model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights may lie elsewhere since, and switches be others."""
    monkeypatch.setattr(model, "_trainer", SimpleNamespace(datamodule=None))
    for forget in (model.on_fit_start, model.accelerate):
        model._captured["sizes"] = TensorStep(model)
        forget()
        assert not model._captured


def test_a_step_never_reads_from_the_device() -> None:
    """On the meta device there is nothing to read: a step that waited for a value would fail."""
    model = build(embedding_reg_weight=0.1).train()
    model.balance = LossBalance()
    model._latents = LatentCache(model.encode_first_stage, PersonalizedBase(PICTURES, size=128))
    batch = batch_of(PersonalizedBase(PICTURES, size=128), [0, 1, 2])
    del batch["image"]
    model = model.to("meta")
    model._latents.moments = model._latents.moments.to("meta")
    batch["draw"] = model._draw(batch, "train")
    batch = {key: value.to("meta") if isinstance(value, Tensor) else value for key, value in batch.items()}
    loss, parts = model.shared_step(batch, "train")
    loss.backward()
    assert loss.is_meta and all(part.is_meta for part in parts.values())
    with pytest.raises(RuntimeError):
        loss.item()


class HostReads(TorchDispatchMode):
    """Counts the values that are read from tensors one by one."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_the_trainer_reads_nothing_in_a_step_either(tmp_path: Path) -> None:
    """Between two writings of the log: the loss of the progress bar, the optimizer, the callbacks."""

    def reads(steps: int) -> int:
        arguments = ["--base", "configs/demo/finetune.yaml", "-t", "--actual_resume", "models/demo/model.safetensors"]
        arguments += ["--data_root", str(PICTURES), "-l", str(tmp_path), "-n", str(steps), "--max_steps", str(steps)]
        arguments += ["data.params.batch_size=1", "--log_every_n_steps", "1000", "--enable_progress_bar", "false"]
        with HostReads() as mode:
            assert main.main(arguments) == 0
        return mode.count

    # a sample's dropout seed is read from the batch, which is still on the host; and the loss is looked at by the
    # guard, which does so in every step on the CPU only
    assert reads(9) - reads(4) == 5 * 2


def test_prompts_are_read_once(model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until captions or placeholders change."""
    batch = batch_of(PersonalizedBase(PICTURES, size=128), [0, 1])
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


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 0.005), ("bfloat16", 0.05)])
def test_gradients_through_half_precision(dtype: str, tolerance: float) -> None:
    """A mean over 512² pixels has small gradients, which in float16 layers would vanish in part without a scale."""
    gradient = []
    for precision in ("float32", dtype):
        model = build(frozen_dtype=precision).train()
        cond = model.get_learned_conditioning(["*"])
        loss = model.p_losses(noise(seed=1), cond, torch.tensor([500]), noise(seed=2))[0]
        (loss / 16).backward()  # 16² latents, not 64²: half precision is slow on a CPU
        gradient.append(gradients(model))
    assert (gradient[1] - gradient[0]).norm() < tolerance * gradient[0].norm()


def test_gradients_under_autocast_are_not_enlarged() -> None:
    """The trainer's own scaler does that, where the weights are float32."""
    gradient = []
    for enabled in (False, True):
        model = build().train()
        with torch.autocast("cpu", torch.float16, enabled=enabled):
            cond = model.get_learned_conditioning(["*"])
            model.p_losses(noise(seed=1), cond, torch.tensor([500]), noise(seed=2))[0].backward()
        gradient.append(gradients(model))
    assert (gradient[1] - gradient[0]).norm() < 0.05 * gradient[0].norm()


def test_fused_adamw_is_adamw() -> None:
    """To a hundredth of the rate after five steps; where a gradient is nearly 0, its direction is rounding."""
    batch = batch_of(PersonalizedBase(PICTURES, size=128), [0, 1])
    learned = []
    for fused in (True, False):
        model = build(fused_adamw=fused).train()
        model.learning_rate = 1e-3
        start = torch.cat([p.detach().flatten() for p in model.trainable_parameters()])
        optimizer = model.configure_optimizers()
        assert bool(optimizer.param_groups[0]["fused"]) is fused
        for _ in range(5):
            model.shared_step(batch, "train")[0].backward()
            optimizer.step()
            optimizer.zero_grad()
        learned.append(torch.cat([p.detach().flatten() for p in model.trainable_parameters()]))
    assert (learned[0] - start).abs().max() > 1e-3
    torch.testing.assert_close(*learned, rtol=1e-5, atol=1e-5)


def test_gradients_can_be_clipped_in_mixed_precision(tmp_path: Path) -> None:
    """Lightning refuses to clip for fused optimizers."""
    arguments = ["--base", "configs/demo/finetune.yaml", "-t", "--actual_resume", "models/demo/model.safetensors"]
    arguments += ["--data_root", str(PICTURES), "-l", str(tmp_path), "--max_steps", "1", "--precision", "bf16-mixed"]
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


@pytest.mark.slow
def test_the_compiled_unet_computes_the_same() -> None:
    """The real compiler, forward and backward: to 1e-4 of the largest value."""
    model, compiled = build().train(), build(compile_unet=True).train()
    batch = batch_of(PersonalizedBase(PICTURES, size=128), [0, 1])
    results = []
    for m in (model, compiled):
        loss = m.shared_step(batch, "train")[0]
        loss.backward()
        results.append((loss.detach(), gradients(m)))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4 * one.abs().max().item())


@torch.no_grad()
def test_a_call_in_inference_mode_leaves_room_for_others(model: LatentDiffusion) -> None:
    fixed = FixedUNet(model.model.diffusion_model, "cuda_graph")
    x, t = torch.randn(1, 4, 16, 16), torch.tensor([500])
    context = model.get_learned_conditioning(["a star"]).at(500)
    with torch.inference_mode():
        first = fixed(x.clone(), t.clone(), context).clone()
    assert torch.equal(fixed(x, t, context), first)


# On a GPU


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("mode", ["cuda_graph", "reduce-overhead"])
def test_an_accelerated_call_computes_the_same(mode: str) -> None:
    """To 1e-3: three prompts and seeds through one graph."""
    model = build(channels_last=True).eval().cuda()
    fixed = FixedUNet(model.model.diffusion_model, mode)
    for latents in both_ways(model, fixed):
        torch.testing.assert_close(*latents, rtol=1e-3, atol=1e-3)
    assert len(fixed._buffers) == 1


def steps_on_gpu(steps: int, **switches: object) -> tuple[list[float], Tensor]:
    """Losses of some steps, and what is learned after them."""
    model = build(**switches).cuda().train()
    dataset = PersonalizedBase(PICTURES, size=128)
    model._latents = LatentCache(model.encode_first_stage, dataset)
    optimizer = model.configure_optimizers()
    losses = []
    for n in range(steps):
        batch = batch_of(dataset, [2 * n, 2 * n + 1])
        batch["draw"] = {k: v.pin_memory() for k, v in model._draw(batch, "train").items()}
        losses.append(model.shared_step(batch, "train")[0])
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return [loss.item() for loss in losses], model.embedding_manager.embeddings().detach().cpu()


@pytest.mark.gpu
def test_a_captured_step_draws_the_dropout_of_the_plain_one() -> None:
    """From the first step on, which warms up before: a resumed run captures anew and must go on as it would have."""
    losses = []
    for cuda_graph in (False, True):
        model = build(cuda_graph=cuda_graph, **{"personalization_config.params.dropout": 0.1}).cuda().train()
        dataset = PersonalizedBase(PICTURES, size=128)
        model._latents = LatentCache(model.encode_first_stage, dataset)
        batch = batch_of(dataset, [0, 1])
        batch["draw"] = {k: v.pin_memory() for k, v in model._draw(batch, "train").items()}
        for seed in (5, 6):
            torch.manual_seed(seed)
            losses.append(model.shared_step(batch, "train")[0].item())
    assert losses[:2] == pytest.approx(losses[2:], rel=1e-3) and losses[0] != losses[1]


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_a_captured_call_on_another_device_computes_the_same() -> None:
    model = build().eval().to("cuda:1")
    fixed = FixedUNet(model.model.diffusion_model, "cuda_graph")
    for latents in both_ways(model, fixed):
        torch.testing.assert_close(*latents, rtol=1e-3, atol=1e-3)


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
    plain, captured = steps_on_gpu(5), steps_on_gpu(5, cuda_graph=True, **switch)
    assert captured[0] == pytest.approx(plain[0], rel=1e-3)
    torch.testing.assert_close(captured[1], plain[1], rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_step_does_not_synchronise(cuda_graph: bool) -> None:
    model = build(cuda_graph=cuda_graph).cuda().train()
    dataset = PersonalizedBase(PICTURES, size=128)
    model._latents = LatentCache(model.encode_first_stage, dataset)
    optimizer = model.configure_optimizers()

    def step(n: int) -> None:
        batch = batch_of(dataset, [n])
        batch["draw"] = {k: v.pin_memory() for k, v in model._draw(batch, "train").items()}
        batch["image_number"], batch["flipped"] = batch["image_number"].pin_memory(), batch["flipped"].pin_memory()
        model.shared_step(batch, "train")[0].backward()
        optimizer.step()
        optimizer.zero_grad()

    for n in range(3):
        step(n)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
