"""Whether the memory suffices: an estimate, compared with what is free before work starts.

    loading      what the weights take, in the precision they are held in
    generating   6 x the largest activation of the U-Net or the first stage's decoder, and the finished pictures
    learning     all activations of the U-Net (with `use_checkpoint`: its blocks' inputs and the largest block twice),
                 and 4 times what is trained (weights, gradients and AdamW's two moments)

Activations are counted on a copy of the model without memory, at one small size, and scale with the number of
pixels and of samples: attention keeps no pairs of positions. The peak is within a factor `MARGIN` of the estimate
(`tests/test_memory.py` measures it). What would not fit even so is refused; where it is tight, a warning says so.
"""

from __future__ import annotations

import copy
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ldm.conditioning.context import Context
from ldm.data.repeated import picture_sides

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion

logger = logging.getLogger(__name__)

COPIES = 6  # of the largest activation that are in memory together: a block's input, its norm, its convolutions, …
MARGIN = 2
FOR_GENERATING = "smaller --height and --width, fewer --n_samples or --n_iter, or --dtype float16"
FOR_LEARNING = (
    "model.params.frozen_dtype=float16, model.params.unet_config.params.use_checkpoint=true, a smaller "
    "data.params.train.params.size or data.params.batch_size"
)


class MemoryShort(ValueError):
    """Work that cannot fit into the memory; the message says how much is missing and which switches help."""


class Activations(NamedTuple):
    """Bytes for each sample and each latent element: the largest activation, and what a backward pass keeps."""

    largest: float
    kept: float


_counted: WeakKeyDictionary[nn.Module, Activations] = WeakKeyDictionary()


def free_memory(device: torch.device | str = "cpu") -> int | None:
    """Bytes that this process can still take on `device`; None where that cannot be known.

    On the CPU the least of what the system and the control groups (containers) leave.
    """
    device = torch.device(device)
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type != "cpu":
        return None
    known = [_available(), *_group_limits()]
    return min((value for value in known if value is not None), default=None)


def _available() -> int | None:
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _group_limits(root: str = "/sys/fs/cgroup", groups: str = "/proc/self/cgroup") -> list[int]:
    """What the control groups of this process, version 1 and 2, leave."""
    left = []
    for line in _read(groups).splitlines():
        _, kinds, path = line.split(":", 2)
        if kinds == "":
            top, limit, used, cached = Path(root), "memory.max", "memory.current", ""
        elif "memory" in kinds.split(","):
            top, limit, used = Path(root) / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cached = "total_"
        else:
            continue
        folder = top / path.lstrip("/")
        for place in (folder, *folder.parents):  # inside a container the group's own path is not there
            numbers = [_read(place / name).strip() for name in (limit, used)]
            if all(number.isdecimal() for number in numbers):
                taken = max(0, int(numbers[1]) - _file_cache(place / "memory.stat", cached))
                left.append(max(0, int(numbers[0]) - taken))
            if place == top:
                break
    return left


def _file_cache(statistics: Path, prefix: str) -> int:
    """Bytes of files that a group keeps in memory, and gives up when a program needs it."""
    lines = (line.split() for line in _read(statistics).splitlines())
    counts = {words[0]: int(words[1]) for words in lines if len(words) == 2 and words[1].isdecimal()}
    return counts.get(f"{prefix}inactive_file", 0) + counts.get(f"{prefix}active_file", 0)


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def check(needed: float, device: torch.device | str, what: str, remedy: str) -> None:
    """Compare an estimate in bytes with what is free on `device`.

    Raises:
        MemoryShort: less than `needed / MARGIN` is free.
    """
    free = free_memory(device)
    if free is None or needed <= free:
        return
    kind = torch.device(device).type
    sizes = f"about {_size(needed)} of memory, and {_size(free)} are free ({kind})"
    if needed / MARGIN > free:
        raise MemoryShort(f"{what} needs {sizes}; these help: {remedy}.")
    logger.warning("%s needs %s: it may not fit; these help: %s.", what, sizes, remedy)


def _size(count: float) -> str:
    return f"{count / 2**30:,.1f} GB" if count >= 2**30 else f"{count / 2**20:.0f} MB"


def check_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Raise `MemoryShort` unless the weights of `model` (on the meta device) can be read, which the CPU does."""
    needed = dtype.itemsize * sum(p.numel() for p in model.parameters())
    check(needed, "cpu", "The model", "frozen_dtype or --dtype float16, or other programs closed")


def generating(model: LatentDiffusion, height: int, width: int, n_samples: int, n_iter: int = 1) -> float:
    """Bytes that `ldm.generate.main` needs beside the weights; the model may be on the meta device."""
    samples = 2 * n_samples  # with guidance
    elements = height * width / model.first_stage_model.downsampling**2
    unet, decoder = activations(model.model.diffusion_model), activations(model.first_stage_model.decoder)
    decoded = min(n_samples, model.decode_batch or n_samples)  # at a time
    pictures = 2 * 3 * height * width * n_samples * n_iter  # each alone, and in the grid
    return COPIES * elements * max(samples * unet.largest, decoded * decoder.largest) + pictures


def check_generating(model: LatentDiffusion, device: torch.device | str, **arguments: int) -> None:
    """Raise `MemoryShort` for pictures that surely cannot be made; `arguments` are those of `generating`."""
    what = "Making {n_iter} x {n_samples} pictures of {width} x {height}".format(**arguments)
    check(generating(model, **arguments) + _weights_elsewhere(model, device), device, what, FOR_GENERATING)


def _weights_elsewhere(model: nn.Module, device: torch.device | str) -> int:
    """Bytes of the weights that are still to be brought to `device`."""
    kind = torch.device(device).type
    return sum(p.nbytes for p in model.parameters() if p.device.type != kind)


def learning(model: LatentDiffusion, size: float, batch_size: int) -> float:
    """Bytes that a step of learning at `size` x `size` pixels needs beside the frozen weights."""
    trained = sum(p.nbytes for p in model.trainable_parameters())
    elements = (size / model.first_stage_model.downsampling) ** 2
    encoding = COPIES * activations(model.first_stage_model.decoder).largest  # one picture, before and after
    return max(batch_size * activations(model.model.diffusion_model).kept, encoding) * elements + 3 * trained


def check_learning(model: nn.Module, data: Any, device: torch.device | str = "cpu") -> None:
    """Raise `MemoryShort` where a latent diffusion model surely cannot learn from `data`."""
    if not hasattr(model, "first_stage_model"):
        return
    sides = picture_sides(data.datasets["train"], model.image_key, model.caption_key)
    if sides is not None:
        needed = learning(model, math.prod(sides) ** 0.5, data.batch_size) + _weights_elsewhere(model, device)
        what = f"Learning from {sides[1]} x {sides[0]} pixels, {data.batch_size} at a time,"
        check(needed, device, what, FOR_LEARNING)


@torch.no_grad()
def activations(network: nn.Module, side: int = 16) -> Activations:
    """What a U-Net or a decoder makes, counted on a copy that has shapes and no memory; remembered."""
    if network in _counted:
        return _counted[network]
    skeleton = _skeleton(network)
    largest = 0
    block: list[int] = [0]
    inputs: list[int] = []

    def leaf(module: nn.Module, given: Any, output: Any) -> None:
        nonlocal largest
        largest = max(largest, output.nbytes)
        block[-1] += output.nbytes

    def whole(module: nn.Module, given: Any, output: Any) -> None:
        inputs.append(given[0].nbytes)
        block.append(0)

    for module in skeleton.modules():
        if not list(module.children()):
            module.register_forward_hook(leaf)
    is_unet = hasattr(skeleton, "input_blocks")
    channels = skeleton.in_channels if is_unet else skeleton.conv_in.in_channels
    latents = torch.empty(1, channels, side, side, device="meta", dtype=next(skeleton.parameters()).dtype)
    if is_unet:
        for part in (*skeleton.input_blocks, skeleton.middle_block, *skeleton.output_blocks):
            part.register_forward_hook(whole)
        context = Context.of(torch.empty(1, 77, skeleton.context_dim, device="meta"))
        skeleton(latents, torch.empty(1, device="meta"), context)
    else:
        skeleton(latents)
    kept = sum(inputs) + 2 * max(block) if getattr(network, "use_checkpoint", False) else sum(block)
    _counted[network] = Activations(largest / side**2, kept / side**2)
    return _counted[network]


def _skeleton(network: nn.Module) -> nn.Module:
    """A copy on the meta device: nothing of the original is copied or moved, so that others can use it meanwhile."""
    memo: dict[int, Tensor] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False) for p in network.parameters()
    }
    memo |= {id(b): torch.empty_like(b, device="meta") for b in network.buffers()}
    return copy.deepcopy(network, memo)
