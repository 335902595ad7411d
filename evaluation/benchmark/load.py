"""Opening a checkpoint: each way in a process of its own, so that its peak memory is its own."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.benchmark import timer

from evaluation.benchmark.measure import Measurement, peak_resident
from evaluation.benchmark.models import CONFIGS, ROOT, set_tokenizer

CHILD = "import sys, json; from evaluation.benchmark.load import child; print(json.dumps(child(*sys.argv[1:])))"


def alternate_loads(
    names: Sequence[str], size: str, checkpoint: Path, dtype: str, repeats: int, device: str
) -> dict[str, Measurement]:
    """Load in turns the way of each name, `ours` or `reference`."""
    found = {name: Measurement() for name in names}
    for _ in range(repeats):
        for name, measurement in found.items():
            command = [sys.executable, "-c", CHILD, name, size, str(checkpoint), dtype, device]
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
                raise ValueError(f"'{checkpoint}' could not be opened the way of '{name}': {reason}")
            values = json.loads(done.stdout.splitlines()[-1])
            measurement.wall_ms.append(values["wall_ms"])
            measurement.cpu_ms.append(values["cpu_ms"])
            measurement.peak_bytes = max(measurement.peak_bytes or 0, values["peak_bytes"] or 0) or None
    return found


def child(name: str, size: str, checkpoint: str, dtype: str, device: str) -> dict[str, float | None]:
    """Load once: milliseconds without the imports, and the peak of resident memory with them."""
    from pytorch_lightning.callbacks.model_checkpoint import ModelCheckpoint

    from ldm.config import instantiate_from_config, load_config
    from ldm.generate import load_model_from_config

    config = load_config(ROOT / CONFIGS[size])
    set_tokenizer(config, size)
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
    times = {"wall_ms": 1e3 * (timer() - wall), "cpu_ms": 1e3 * (time.process_time() - processor)}
    return {**times, "peak_bytes": peak_resident()}
