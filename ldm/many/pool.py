"""Learn concepts in several processes of this machine."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import IO

import torch

from ldm.files.writing import lock
from ldm.many.jobs import LEFT, RETRIES, Job, Learned, Setting, log_of, result, run_of, save


def visible_gpus() -> list[str]:
    """Return the CUDA devices that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return named.split(",")[:count] if named else [str(i) for i in range(count)]


def learn_locally(
    jobs: Sequence[Job], setting: Setting, out: Path, workers: int, gpus: Sequence[str]
) -> Iterator[Learned]:
    """Learn concepts, `workers` at a time, each in a process with a CUDA device of its own.

    Ctrl-C ends all of them as it ends `main.py`: what they have learned is saved.
    """
    processes = _Processes(workers, gpus)
    with ThreadPoolExecutor(workers) as pool:
        try:
            for done in as_completed([pool.submit(processes.learn, job, setting, out) for job in jobs]):
                yield save(done.result(), out)
        except (KeyboardInterrupt, GeneratorExit):
            pool.shutdown(wait=False, cancel_futures=True)
            processes.stop()
            raise


class _Processes:
    """The processes that learn at the moment, each on a CUDA device of its own."""

    def __init__(self, workers: int, gpus: Sequence[str]) -> None:
        self._devices: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        for i in range(workers):
            self._devices.put(gpus[i % len(gpus)] if gpus else None)
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped = False

    def learn(self, job: Job, setting: Setting, out: Path) -> Learned:
        device = self._devices.get()
        try:
            return self._learn(job, setting, out, device)
        finally:
            self._devices.put(device)

    def _learn(self, job: Job, setting: Setting, out: Path, device: str | None) -> Learned:
        start, run, log, code = time.monotonic(), run_of(out, job), log_of(out, job), -1
        environment = {"OMP_NUM_THREADS": "1"} | os.environ | ({"CUDA_VISIBLE_DEVICES": device} if device else {})
        program = [sys.executable, "-m", "ldm.cli.main", "learn"]
        for _ in range(1 + RETRIES):
            if code < 0 and not self._stopped:
                with log.open("ab") as file:
                    if not lock(file):
                        return Learned(job, 0.0, error=LEFT)
                    code = self._run([*program, *setting.command(job, run)], file, environment)
        return result(job, run, code, log.read_text(encoding="utf-8", errors="replace"), time.monotonic() - start)

    def _run(self, command: Sequence[str], log: IO[bytes], environment: Mapping[str, str]) -> int:
        # a session of its own: Ctrl-C in a terminal reaches only this process, which hands it on
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        ) as process:
            self._running.add(process)
            code = process.wait()
            self._running.discard(process)
        return code

    def stop(self) -> None:
        self._stopped = True
        for process in list(self._running):
            process.send_signal(signal.SIGINT if os.name == "posix" else signal.SIGTERM)
