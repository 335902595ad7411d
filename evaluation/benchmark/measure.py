"""Time, memory and arithmetic of calls that are compared with each other."""

from __future__ import annotations

import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import timer
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

MATMUL_SIDES = {"cpu": 1536, "cuda": 8192, "mps": 4096}


@dataclass
class Contender:
    """One way to do the work."""

    name: str
    run: Callable[[], object]  # does it once; this is what is timed
    result: Callable[[], Tensor]  # does it once, and returns values that are compared with another's
    dtype: torch.dtype = torch.float32  # of most of the arithmetic
    samples: int = 1  # images, or samples of a training step, that one run makes
    opaque: bool = False  # a compiled or captured call hides its operations from the counter
    details: dict[str, Any] = field(default_factory=dict)
    other_images: bool = False  # the result is another one on purpose


@dataclass
class Measurement:
    """Milliseconds of every run, on the clock and of the processor; peak memory in bytes; FLOP of one run."""

    wall_ms: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    flop: int = 0

    def times(self, clock: str) -> list[float]:
        return self.cpu_ms if clock == "cpu" else self.wall_ms

    def median(self, clock: str) -> float:
        return statistics.median(self.times(clock))


def alternate(contenders: Sequence[Contender], device: torch.device, repeats: int) -> dict[str, Measurement]:
    """Run the contenders in turns, A B C A B C …, after runs of each that warm it up and count.

    In turns, so that what else the machine does meanwhile affects all alike. `torch.utils.benchmark.Timer` does not
    serve: it makes two more runs for each timed one, and reads one clock only.
    """
    found = {contender.name: Measurement() for contender in contenders}
    for contender in contenders:
        found[contender.name].peak_bytes = peak_memory(contender.run, device)
        if contender.opaque:
            for _ in range(3):
                contender.run()
        else:
            found[contender.name].flop = count_flop(contender.run)
    for _ in range(repeats):
        for contender in contenders:
            wall, processor = time_run(contender.run, device)
            found[contender.name].wall_ms.append(wall)
            found[contender.name].cpu_ms.append(processor)
    return found


def time_run(run: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Return the milliseconds of one run on the clock, until the device is done, and of the processor."""
    clock = time.perf_counter if device.type == "cpu" else timer  # torch's own, which waits for the device
    processor, wall = time.process_time(), clock()
    run()
    return 1e3 * (clock() - wall), 1e3 * (time.process_time() - processor)


def count_flop(run: Callable[[], object]) -> int:
    """Count the operations of matrix products, convolutions and attention, by torch's own counter."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # which the counter does not know
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    mapping = {
        kernel: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        backward: lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v),
    }
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        run()
    return counter.get_total_flops()


def peak_memory(run: Callable[[], object], device: torch.device) -> int | None:
    """Return the bytes at the peak of a run: allocated on CUDA, elsewhere resident in this process (Linux only)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # begins a new peak
    except OSError:
        return None
    run()
    return peak_resident()


def peak_resident() -> int | None:
    """Return the largest resident size of this process in bytes; None where it cannot be known."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)


def matmul_ceiling(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> float:
    """Return the FLOP per millisecond of a large square matrix product, the best of some."""
    side = MATMUL_SIDES[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    torch.mm(a, b)
    times = [time_run(lambda: torch.mm(a, b), device) for _ in range(repeats)]
    return 2 * side**3 / min(min(wall, processor) if device.type == "cpu" else wall for wall, processor in times)


def deviations(results: Mapping[str, Tensor], oracle: str) -> dict[str, float]:
    """Return the relative distance (of norms) of every result to the oracle's, over the values that both have."""
    flat = {name: result.double().flatten().cpu() for name, result in results.items()}
    distances = {}
    for name, found in flat.items():
        pairs = min(len(found), len(flat[oracle]))
        expected = flat[oracle][:pairs]
        distances[name] = float((found[:pairs] - expected).norm() / expected.norm().clamp(min=1e-30))
    return distances


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or the processor's with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    about = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    processor = (re.findall(r"model name\s*: (.*)", about) or [platform.processor()])[0]
    name = f"{processor}, {torch.get_num_threads()} thread(s)"
    return name if device.type == "cpu" else f"{device.type} on {name}"
