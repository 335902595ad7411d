"""Time, memory and arithmetic of calls that are compared with each other."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

MATMUL_SIDES = {"cpu": 1536, "cuda": 8192, "mps": 4096}


@dataclass
class Contender:
    """One way to do the work.

    Args:
        run: does it once; this is what is timed.
        result: does it in a way that can be compared: a vector (n,), which `compare` holds against another's.
        dtype: in which most of the arithmetic is done.
        samples: pictures, or samples of a training step, that one run makes.
    """

    name: str
    run: Callable[[], object]
    result: Callable[[], Tensor]
    dtype: torch.dtype = torch.float32
    samples: int = 1
    opaque: bool = False  # a compiled or captured call hides its operations from the counter
    details: dict[str, Any] = field(default_factory=dict)


@dataclass
class Measurement:
    """Milliseconds of every run, on the clock and of the processor; peak memory in bytes; FLOP of one run."""

    wall_ms: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    flop: int = 0

    def median(self, clock: str) -> float:
        return statistics.median(self._times(clock))

    def spread(self, clock: str) -> tuple[float, float]:
        return min(self._times(clock)), max(self._times(clock))

    def _times(self, clock: str) -> list[float]:
        return self.cpu_ms if clock == "cpu" else self.wall_ms


def alternate(contenders: Sequence[Contender], device: torch.device, repeats: int) -> dict[str, Measurement]:
    """Run the contenders in turns, A B C A B C …, after runs of each that warm it up and count."""
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
    """Milliseconds of one run: by device events on CUDA, by the clock elsewhere; and of the processor."""
    processor = time.process_time()
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize(device)
        wall = start.elapsed_time(end)
    else:
        begin = time.perf_counter()
        run()
        synchronize(device)
        wall = 1e3 * (time.perf_counter() - begin)
    return wall, 1e3 * (time.process_time() - processor)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _cpu_attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _cpu_attention_backward(grad_out: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad_out, query, key, value)


def count_flop(run: Callable[[], object]) -> int:
    """Floating-point operations of matrix products, convolutions and attention, by torch's own counter."""
    cpu_kernels = {  # which the counter does not know
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward,
    }
    with FlopCounterMode(display=False, custom_mapping=cpu_kernels) as counter:
        run()
    return counter.get_total_flops()


def peak_memory(run: Callable[[], object], device: torch.device) -> int | None:
    """Bytes at the peak of a run: allocated on the device, or on the CPU resident in this process (Linux only)."""
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
    """The largest resident size of this process in bytes; None where it cannot be known."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)


def matmul_ceiling(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> float:
    """FLOP per millisecond of a large square matrix product, the best of some, on both clocks the same work."""
    side = MATMUL_SIDES[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    torch.mm(a, b)
    times = [time_run(lambda: torch.mm(a, b), device) for _ in range(repeats)]
    return 2 * side**3 / min(min(wall, processor) if device.type == "cpu" else wall for wall, processor in times)


def deviations(results: Mapping[str, Tensor], oracle: str) -> dict[str, float]:
    """Relative distance (of norms) of every result to the oracle's, over the values that both have."""
    expected = results[oracle].double().flatten().cpu()
    distances = {}
    for name, result in results.items():
        found = result.double().flatten().cpu()
        common = min(len(found), len(expected))
        difference = (found[:common] - expected[:common]).norm() / expected[:common].norm().clamp(min=1e-30)
        distances[name] = difference.item()
    return distances


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        processor = platform.processor() or platform.machine()
    name = f"{processor}, {torch.get_num_threads()} thread(s)"
    return name if device.type == "cpu" else f"{device.type} on {name}"
