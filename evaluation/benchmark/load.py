"""Opening a checkpoint: each way in a process of its own, so that its peak memory is its own."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch.utils.benchmark import timer

from evaluation.benchmark.measure import Row, compared, make_row, peak_resident
from evaluation.benchmark.models import read_config


def measure_loads(
    names: Sequence[str], size: str, checkpoint: Path, dtype: str, device: torch.device, repeats: int, clock: str
) -> list[Row]:
    """Load in turns the way of each name, `ours` or `reference`."""
    found: dict[str, list[tuple[tuple[float, float], int | None]]] = {name: [] for name in names}
    for _ in range(repeats):
        for name, runs in found.items():
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                try:
                    runs.append(process.submit(load_once, name, size, str(checkpoint), dtype, str(device)).result())
                except Exception as error:  # of any kind of file, in the reference's way
                    sentence = f"'{checkpoint}' could not be opened the way of '{name}': {error!r}"
                    raise ValueError(sentence) from error
    rows = []
    for name, runs in found.items():
        peak = max(peak or 0 for _, peak in runs)
        details = {"peak / file": peak / checkpoint.stat().st_size}
        rows.append(make_row(name, [times[clock == "cpu"] for times, _ in runs], peak or None, details=details))
    return compared(rows)


def load_once(name: str, size: str, checkpoint: str, dtype: str, device: str) -> tuple[tuple[float, float], int | None]:
    """Load; return the milliseconds without the imports, on the clock and of the processor, and the peak in bytes."""
    from pytorch_lightning.callbacks.model_checkpoint import ModelCheckpoint

    from ldm.config import instantiate_from_config
    from ldm.generate import load_model_from_config

    config = read_config(size)
    wall, processor = timer(), time.process_time()
    if name == "ours":
        load_model_from_config(config, checkpoint, device=device, dtype=dtype)
    else:  # the reference: the whole file into memory, a model with random weights, a copy from one to the other
        with torch.serialization.safe_globals([ModelCheckpoint]):  # public files name it
            state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
        config.model.params.personalization_config = None
        model = instantiate_from_config(config.model)
        model.load_state_dict(state, strict=False)
        model.to(device)
    return (1e3 * (timer() - wall), 1e3 * (time.process_time() - processor)), peak_resident()
