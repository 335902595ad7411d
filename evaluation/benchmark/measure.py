"""Time, memory and arithmetic of calls that are compared with each other, as rows of one table."""

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
Row = dict[str, Any]  # one way to do the work: its numbers, of which those that are not known are None
HEADER = {
    "name": "", "ms": "ms", "ms_from": "from", "ms_to": "to", "per_second": "per s", "peak_mb": "peak MB",
    "gflop": "GFLOP", "gflop_per_second": "GFLOP/s", "of_ceiling": "of ceiling", "deviation": "deviation",
    "times_first": "times first",
}  # fmt: skip
FORMATS = {"name": "{}", "of_ceiling": "{:.0%}", "deviation": "{:.1e}", "times_first": "{:.2f}"}


@dataclass
class Contender:
    """One way to do the work."""

    name: str
    run: Callable[[], object]  # does it once; this is what is timed
    result: Callable[[], Tensor] | None = None  # does it once, and returns values that are compared with the first's
    dtype: torch.dtype = torch.float32  # of most of the arithmetic
    samples: int = 1  # images, or samples of a training step, that one run makes
    opaque: bool = False  # a compiled or captured call hides its operations from the counter
    details: dict[str, Any] = field(default_factory=dict)
    other_images: bool = False  # the result is another one on purpose


def measure(
    contenders: Sequence[Contender],
    device: torch.device,
    repeats: int,
    clock: str = "wall",
    ceilings: Mapping[torch.dtype, float] | None = None,
) -> list[Row]:
    """Compare the results, then run the contenders in turns, A B C A B C …, after runs of each that warm up and count.

    In turns, so that what else the machine does meanwhile affects all alike. `torch.utils.benchmark.Timer` does not
    serve: it makes two more runs for each timed one, and reads one clock only.

    Args:
        clock: wall, or cpu for the time of the processor.
        ceilings: FLOP per millisecond that the device reaches, see `matmul_ceiling`.
    """
    alike = [c for c in contenders if c.other_images == contenders[0].other_images]
    distances = deviations({c.name: c.result() for c in alike if c.result})
    peaks, flop = [], []
    for c in contenders:
        peaks.append(peak_memory(c.run, device))
        flop.append(0 if c.opaque else count_flop(c.run))
        for _ in range(3 if c.opaque else 0):
            c.run()
    times: list[list[float]] = [[] for _ in contenders]
    for _ in range(repeats):
        for c, own in zip(contenders, times, strict=True):
            own.append(time_run(c.run, device)[clock == "cpu"])
    return compared([
        make_row(c.name, own, peak, count, c.samples, (ceilings or {}).get(c.dtype), distances.get(c.name), c.details)
        for c, own, peak, count in zip(contenders, times, peaks, flop, strict=True)
    ])  # fmt: skip


def make_row(
    name: str,
    times: Sequence[float],
    peak_bytes: int | None,
    flop: int = 0,
    samples: int = 1,
    ceiling: float | None = None,
    deviation: float | None = None,
    details: Mapping[str, Any] | None = None,
) -> Row:
    """Return a row of runs that took `times` in ms; `ceiling` is in FLOP per ms."""
    ms = statistics.median(times)
    rate = flop / ms if flop else None
    return {
        "name": name, "ms": ms, "ms_from": min(times), "ms_to": max(times), "per_second": 1e3 * samples / ms,
        "peak_mb": peak_bytes and peak_bytes / 1e6, "gflop": flop / 1e9 if flop else None,
        "gflop_per_second": rate and rate / 1e6, "of_ceiling": rate and ceiling and rate / ceiling,
        "deviation": deviation, "details": dict(details or {}),
    }  # fmt: skip


def compared(rows: list[Row]) -> list[Row]:
    """Add `times_first`: how many times as fast as the first row each is."""
    return [row | {"times_first": rows[0]["ms"] / row["ms"]} for row in rows]


def table(rows: Sequence[Row]) -> str:
    """Return aligned columns; names to the left, numbers to the right."""
    lines = [list(HEADER.values()), *([_cell(key, row[key]) for key in HEADER] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines
    )


def _cell(key: str, value: Any) -> str:
    if value is None:
        return "-"
    significant = "{:.0f}" if key != "name" and abs(value) >= 100 else "{:.3g}"  # three digits, without exponent
    return FORMATS.get(key, significant).format(value)


def deviations(results: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the relative distance (of norms) of every result to the first, over the values that both have."""
    flat = {name: result.double().flatten().cpu() for name, result in results.items()}
    distances = {}
    for name, x in flat.items():
        first = next(iter(flat.values()))[: len(x)]
        distances[name] = float((x[: len(first)] - first).norm() / first.norm().clamp(min=1e-30))
    return distances


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


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or the processor's with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    about = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    processor = (re.findall(r"model name\s*: (.*)", about) or [platform.processor()])[0]
    name = f"{processor}, {torch.get_num_threads()} thread(s)"
    return name if device.type == "cpu" else f"{device.type} on {name}"
