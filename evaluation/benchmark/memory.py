"""Peak memory of learning and sampling, counted on PyTorch's `meta` device: no GPU, no memory and no arithmetic.

What is counted are the bytes of all tensors that are alive at once, weights included. A GPU needs more: the allocator's
fragmentation, and the workspaces of cuDNN and cuBLAS.

    python -m evaluation.benchmark.memory        # the tables of docs/benchmarks.md, a few minutes on one core
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from evaluation.benchmark.models import CONFIGS, ROOT, set_tokenizer
from evaluation.benchmark.sample import Sampling
from evaluation.benchmark.switches import DEFAULTS
from evaluation.benchmark.train import TrainingStep
from ldm.config import instantiate_from_config, load_config
from ldm.editing.edit import Branches, Prompts, denoise_pair, plan_edit
from ldm.editing.inversion import Sweep, record, step_of
from ldm.editing.request import Edit, InversionOptions
from ldm.methods.stylediffusion import FEATURE_TOKENS, StyleDiffusion
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import LatentDiffusion


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, and the most that were alive at once.

    Args:
        module: its weights count from the start.
    """

    def __init__(self, module: nn.Module | None = None) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()
        if module is not None:
            for tensor in (*module.parameters(), *module.buffers()):
                self.add(tensor)

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage until nobody holds it."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return result


@contextmanager
def fused_attention() -> Iterator[None]:
    """Take the memory-efficient kernel for attention, as on a GPU; on `meta` PyTorch would make the probabilities."""

    def attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, is_causal: bool = False, **_: Any) -> Tensor:
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, True, 0.0, is_causal)[0]

    with mock.patch.object(F, "scaled_dot_product_attention", attend):
        yield


def meta_model(size: str = "sd-v1", **params: Any) -> LatentDiffusion:
    """Return a model of `demo` or `sd-v1` size on the meta device; `params` go over `model.params`."""
    config = load_config(ROOT / CONFIGS[size])
    set_tokenizer(config, size)
    OmegaConf.update(config, "model.params.ckpt_path", None)
    for key, value in params.items():
        OmegaConf.update(config, f"model.params.{key}", value)
    with torch.device("meta"):
        model = instantiate_from_config(config.model)
    return model.to("meta")


def learning_peak(model: LatentDiffusion, side: int = 64, batch: int = 1) -> int:
    """Return the peak in bytes of three training steps on latents (batch, C, side, side)."""
    model.train()
    optimizer = model.configure_optimizers()
    x, noise = (torch.empty(batch, model.channels, side, side, device="meta") for _ in range(2))
    t = torch.zeros(batch, dtype=torch.long, device="meta")
    cond = model.get_learned_conditioning(["*"] * batch)
    with fused_attention(), PeakMemory(model) as memory:
        for _ in range(3):
            loss = model.p_losses(x, cond, t, noise)[0]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return memory.peak


@torch.no_grad()
def sampling_peak(model: LatentDiffusion, side: int = 64, batch: int = 1) -> int:
    """Return the peak in bytes of three guided DDIM steps and of decoding, for latents (batch, C, side, side)."""
    model.eval()
    with fused_attention(), PeakMemory(model) as memory:
        cond, uncond = model.get_learned_conditioning(["*"] * batch), model.get_unconditional(count=batch)
        latents, _ = DDIMSampler(model).sample(
            S=3,
            batch_size=batch,
            shape=(model.channels, side, side),
            conditioning=cond,
            unconditional_guidance_scale=5.0,
            unconditional_conditioning=uncond,
        )
        model.decode_first_stage(latents)
    return memory.peak


def inversion_peak(model: LatentDiffusion, side: int = 64, steps: int = 30) -> int:
    """Return the peak in bytes of an image's path with all maps kept, and of learning two steps of its values."""
    model.eval().requires_grad_(False)
    options = InversionOptions(steps=steps)
    encoder = model.cond_stage_model
    with fused_attention(), PeakMemory(model) as memory, torch.device("meta"):
        z_0 = torch.empty(1, model.channels, side, side)
        cond, uncond = model.get_unconditional("a thing"), model.get_unconditional()
        way = record(model, z_0, cond, steps, maps=True)
        learner = StyleDiffusion(steps, torch.empty(1, FEATURE_TOKENS, encoder.width), encoder.max_length)
        with torch.no_grad():
            contexts = cond.at(0), uncond.at(0)
        sweep, z = Sweep(model, way, learner, *contexts, options), way.path[-1]
        for i in range(2):
            step = step_of(model, way, i, z)
            parameters = learner.begin(i, True)
            adam = torch.optim.Adam(parameters)
            sweep.loss(step, sweep.fixed(step)).total.backward()
            adam.step()
    return memory.peak


@torch.no_grad()
def editing_peak(model: LatentDiffusion, side: int = 64) -> int:
    """Return the peak in bytes of three steps of an edit with everything on, and of decoding both images."""
    model.eval()
    timesteps = [901, 501, 1]
    edit = Edit("a thing", tau_v=1, tau_c=1, tau_s=1, tau_u=1, blend=(("thing",), ("thing",)))
    with fused_attention(), PeakMemory(model) as memory:
        x = torch.empty(1, model.channels, side, side, device="meta")
        plan = plan_edit(model, Prompts(model.prompt_reader(), "a thing", None, edit), timesteps, x)
        branches = Branches(*(model.get_unconditional(text) for text in ("a thing", "a thing", "")))
        model.decode_first_stage(denoise_pair(model, x, branches, plan, timesteps, 7.5, progress=False))
    return memory.peak


def table() -> str:
    """Return the Markdown table of Stable Diffusion's size at 512²."""
    lines = ["| 512², counted | float32 | bfloat16 or float16 |", "|---|---|---|"]
    rows: dict[str, tuple[Any, dict[str, Any], dict[str, int]]] = {
        "learning, batch 1": (learning_peak, {}, {}),
        "learning, batch 4": (learning_peak, {}, {"batch": 4}),
        "inversion, 30 steps (StyleDiffusion)": (inversion_peak, {}, {}),
        "edit and decoding, both rows": (editing_peak, {}, {}),
        "sampling and decoding, batch 1": (sampling_peak, {}, {}),
        "sampling and decoding, batch 8": (sampling_peak, {}, {"batch": 8}),
        "the same with `decode_batch=1`": (sampling_peak, {"decode_batch": 1}, {"batch": 8}),
    }
    for name, (count, params, sizes) in rows.items():
        dtypes = ("float32",) if count is inversion_peak else ("float32", "bfloat16")
        peaks = [f"{count(meta_model(**params, frozen_dtype=dtype), **sizes) / 1e9:.1f} GB" for dtype in dtypes]
        lines.append(f"| {name} | {' | '.join([*peaks, 'float32 only'][:2])} |")
    return "\n".join(lines)


def switched_peaks(model: LatentDiffusion, switches: frozenset[str], resolution: int, batch: int) -> tuple[int, int]:
    """Return the peaks in bytes of three training steps, and of three guided DDIM steps with decoding."""
    step = TrainingStep(model, switches, batch, resolution)
    with fused_attention(), PeakMemory(step.model) as learning:
        for _ in range(3):
            step.run()
    images = Sampling(model, switches, batch, resolution, 3)
    with fused_attention(), PeakMemory(images.model) as sampling:
        images.run()
    return learning.peak, sampling.peak


# Captured and compiled calls cannot be counted here, nor can `stages`, whose reference order reads the timesteps.
SWITCHED = ("frozen", "attention", "batch", "latents", "guidance_batch", "kv", "text_batch", "fused_adamw")
TURNED_ON = ("decode_slices", "channels_last", "fast", "half_guided")


def switch_table(batch: int = 4) -> str:
    """Return the Markdown table of what the switches do to the peaks, at Stable Diffusion's size and 512²."""
    head = [f"{what}, {dtype}" for dtype in ("float32", "bfloat16") for what in ("learning", "sampling")]
    lines = [f"| 512², batch {batch}, counted | {' | '.join(head)} |", "|---|---|---|---|---|"]
    rows = {"as it is": DEFAULTS, **{f"without `{name}`": DEFAULTS - {name} for name in SWITCHED}}
    rows |= {f"with `{name}`": DEFAULTS | {name} for name in TURNED_ON} | {"with `use_checkpoint`": DEFAULTS}
    found: dict[str, list[str]] = {}
    for name, switches in rows.items():
        model = meta_model("sd-v1", **{"unet_config.params.use_checkpoint": "use_checkpoint" in name})
        peaks = [switched_peaks(model, switches | dtype, 512, batch) for dtype in (set[str](), {"bfloat16"})]
        found[name] = [f"{peak / 1e9:.1f} GB" for pair in peaks for peak in pair]
    same = [name for name in rows if name != "as it is" and found[name] == found["as it is"]]
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in found.items() if name not in same]
    return "\n".join([*lines, "", f"No difference: {', '.join(same)}."])


if __name__ == "__main__":
    logging.disable(logging.INFO)
    print(table(), switch_table(), sep="\n\n")  # noqa: T201
