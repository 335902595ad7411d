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
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from evaluation.benchmark.editing import inversion_step
from evaluation.benchmark.models import meta_model
from evaluation.benchmark.ours import Sampling, TrainingStep
from evaluation.benchmark.switches import DEFAULTS, Work
from evaluation.statistics import table
from ldm.editing.edit import Branches, denoise_pair, plan_edit
from ldm.editing.request import Edit
from ldm.models.diffusion.ddpm import LatentDiffusion


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of a module's weights and of all storages that operations make: the most alive at once."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()
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


def learning_peak(model: LatentDiffusion, resolution: int, batch: int = 1, switches: frozenset[str] = DEFAULTS) -> int:
    """Return the peak in bytes of three training steps on images (batch, 3, R, R)."""
    return _peak_of(TrainingStep(model, switches, Work("train", batch, resolution)), runs=3)


def sampling_peak(model: LatentDiffusion, resolution: int, batch: int = 1, switches: frozenset[str] = DEFAULTS) -> int:
    """Return the peak in bytes of three guided DDIM steps and of decoding, for images (batch, 3, R, R)."""
    return _peak_of(Sampling(model, switches, Work("sample", batch, resolution, steps=3)), runs=1)


def _peak_of(way: TrainingStep | Sampling, runs: int) -> int:
    with fused_attention(), PeakMemory(way.model) as memory:
        for _ in range(runs):
            way.run()
    return memory.peak


def inversion_peak(model: LatentDiffusion, resolution: int, steps: int = 30) -> int:
    """Return the peak in bytes of an image's path with all maps kept, and of learning its values twice."""
    with fused_attention(), PeakMemory(model) as memory:
        inversion = inversion_step(model, resolution, steps)
        inversion.run()
        inversion.run()
    return memory.peak


@torch.no_grad()
def editing_peak(model: LatentDiffusion, resolution: int = 512) -> int:
    """Return the peak in bytes of three steps of an edit with everything on, and of decoding both images."""
    model.eval()
    timesteps = [901, 501, 1]
    edit = Edit("a thing", tau_v=1, tau_c=1, tau_s=1, tau_u=1, blend=(("thing",), ("thing",)))
    with fused_attention(), PeakMemory(model) as memory:
        side = resolution // model.first_stage_model.downsampling
        x = torch.empty(1, model.channels, side, side, device="meta")
        plan = plan_edit(model, "a thing", edit, timesteps, x)
        branches = Branches(*(model.get_unconditional(text) for text in ("a thing", "a thing", "")))
        model.decode_first_stage(denoise_pair(model, x, branches, plan, timesteps, 7.5, progress=False))
    return memory.peak


# Captured and compiled calls cannot be counted here, nor can `stages`, whose reference order reads the timesteps.
SWITCHED = ("frozen", "attention", "batch", "latents", "guidance_batch", "kv", "text_batch", "fused_adamw")
TURNED_ON = ("decode_slices", "channels_last", "fast", "half_guided")
PRECISIONS = frozenset[str](), frozenset({"bfloat16"})


def work_table() -> str:
    """Return the Markdown table of the peaks at Stable Diffusion's size and 512²."""
    model, rows = meta_model(), []
    for name, count, batch, switches in (
        ("learning, batch 1", learning_peak, 1, DEFAULTS),
        ("learning, batch 4", learning_peak, 4, DEFAULTS),
        ("sampling and decoding, batch 1", sampling_peak, 1, DEFAULTS),
        ("sampling and decoding, batch 8", sampling_peak, 8, DEFAULTS),
        ("the same with `decode_batch=1`", sampling_peak, 8, DEFAULTS | {"decode_slices"}),
    ):
        rows.append([name, *(gigabytes(count(model, 512, batch, switches | dtype)) for dtype in PRECISIONS)])
    halves = (editing_peak(meta_model(frozen_dtype=dtype)) for dtype in ("float32", "bfloat16"))
    rows.append(["edit and decoding, both rows", *map(gigabytes, halves)])
    rows.append(["inversion, 30 steps (StyleDiffusion)", gigabytes(inversion_peak(model, 512)), "float32 only"])
    return table(["512², counted", "float32", "bfloat16 or float16"], rows)


def switch_table(batch: int = 4) -> str:
    """Return the Markdown table of what the switches do to the peaks, at Stable Diffusion's size and 512²."""
    columns = [(dtype, count) for dtype in PRECISIONS for count in (learning_peak, sampling_peak)]
    ways = {"as it is": DEFAULTS, **{f"without `{name}`": DEFAULTS - {name} for name in SWITCHED}}
    ways |= {f"with `{name}`": DEFAULTS | {name} for name in TURNED_ON} | {"with `use_checkpoint`": DEFAULTS}
    rows = []
    for name, switches in ways.items():
        model = meta_model("sd-v1", **{"unet_config.params.use_checkpoint": "use_checkpoint" in name})
        rows.append([name, *(gigabytes(count(model, 512, batch, switches | dtype)) for dtype, count in columns)])
    head = [f"{what}, {dtype}" for dtype in ("float32", "bfloat16") for what in ("learning", "sampling")]
    return table([f"512², batch {batch}, counted", *head], rows)


def gigabytes(peak: int) -> str:
    return f"{peak / 1e9:.1f} GB"


if __name__ == "__main__":
    logging.disable(logging.INFO)
    print(work_table(), switch_table(), sep="\n\n")  # noqa: T201
