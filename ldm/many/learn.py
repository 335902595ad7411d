"""Learn many concepts: each is a run of its own, which resumes, in a process of its own or on another machine."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch

from ldm.files.writing import lock
from ldm.many.cluster import connected, learn_on
from ldm.many.jobs import LEFT, RETRIES, Job, Learned, Setting, log_of, result, run_of, save


def learn_many(
    jobs: Sequence[Job], setting: Setting, out: Path, workers: int | None, cluster: str | None, gpu_share: float
) -> Iterator[Learned]:
    """Learn concepts on this machine, or on a Ray cluster, and yield each as soon as it is there.

    A failure stops no other. A process that was killed is started again, which resumes its run, twice at most.

    Args:
        workers: processes at a time on this machine; None: one for each GPU, else for each core.
        cluster: address of a Ray cluster: "local", "auto" or HOST:PORT.
        gpu_share: of a GPU, for each concept on the cluster.
    """
    if cluster:
        with connected(cluster) as ray:
            yield from learn_on(ray, jobs, setting, out, gpu_share)
        return
    gpus = visible_gpus()
    yield from learn_locally(jobs, setting, out, workers or len(gpus) or os.cpu_count() or 1, gpus)


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
    with ThreadPoolExecutor(workers, initializer=processes.take_device) as pool:
        try:
            for done in as_completed([pool.submit(processes.learn, job, setting, out) for job in jobs]):
                yield save(done.result(), out)
        except (KeyboardInterrupt, GeneratorExit):
            pool.shutdown(wait=False, cancel_futures=True)
            processes.stop()
            raise


class _Processes:
    """The processes that learn at the moment, one for each thread, on a CUDA device of its own."""

    def __init__(self, workers: int, gpus: Sequence[str]) -> None:
        self._devices: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
        for i in range(workers):
            self._devices.put({"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} if gpus else {})
        self._thread = threading.local()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped = False

    def take_device(self) -> None:
        """Give this thread a device."""
        self._thread.device = self._devices.get()

    def learn(self, job: Job, setting: Setting, out: Path) -> Learned:
        start, run, log, code = time.monotonic(), run_of(out, job), log_of(out, job), -1
        environment = {"OMP_NUM_THREADS": "1"} | os.environ | self._thread.device
        for _ in range(1 + RETRIES):
            if code < 0 and not self._stopped:
                command = [sys.executable, "-m", "ldm.cli.main", "learn", *setting.command(job, run)]
                # a session of its own: Ctrl-C in a terminal reaches only this process, which hands it on
                with log.open("ab") as file:
                    if not lock(file):
                        return Learned(job, 0.0, error=LEFT)
                    with subprocess.Popen(
                        command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment,
                        start_new_session=True,
                    ) as process:  # fmt: skip
                        self._running.add(process)
                        code = process.wait()
                        self._running.discard(process)
        return result(job, run, code, log.read_text(encoding="utf-8", errors="replace"), time.monotonic() - start)

    def stop(self) -> None:
        self._stopped = True
        for process in list(self._running):
            process.send_signal(signal.SIGINT if os.name == "posix" else signal.SIGTERM)
