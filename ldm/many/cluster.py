"""The same work on a Ray cluster: on this machine, or on all that have joined one (`ray start`).

A task whose process or machine dies is done again, twice at most. No dashboard, no usage statistics, and no file in the
user's home folder.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import signal
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from ldm.cli import train
from ldm.files.writing import lock, replace_bytes
from ldm.many.jobs import KILLED, LEFT, RETRIES, Job, Learned, Setting, log_of, noted, result, run_of, save

Name = TypeVar("Name", bound=Hashable)
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prospect-ldm"


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """Ray, connected to the cluster `address`: "local" (made for as long as this lasts), "auto" or HOST:PORT.

    Raises:
        ImportError, ConnectionError: Ray is not installed, or nothing answers there.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    local = address == "local"
    if local:  # it listens for the workers; the token keeps others out, and in the environment it needs no file
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    try:
        import ray
    except ImportError as error:
        raise ImportError('--cluster needs Ray: pip install "prospect-ldm[cluster]"') from error
    terminate = signal.getsignal(signal.SIGTERM)  # which Ray replaces
    place: dict[str, Any] = {"_node_ip_address": "127.0.0.1"} if local else {"address": address}
    try:
        ray.init(**place, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
        signal.signal(signal.SIGTERM, terminate)
    except ConnectionError as error:
        remedy = "start one with: ray start --head"
        raise ConnectionError(f"No Ray cluster answers at '{address}' (--cluster); {remedy}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def run_on(
    ray: Any,
    function: Callable[..., Any],
    jobs: Mapping[Name, Sequence[Any]],
    gpu_share: float = 1.0,
    once: bool = False,
) -> Iterator[tuple[Name, Any]]:
    """Yield (name, `function(*arguments)`) as soon as each is there; for a task that failed, its exception.

    Each has a CPU core, and a share of a GPU where the cluster has one.

    Args:
        once: whether a process does one task only, instead of one after the other.
    """
    share = {"num_cpus": 1, "num_gpus": gpu_share if ray.cluster_resources().get("GPU") else 0}
    remote = ray.remote(max_retries=RETRIES, max_calls=int(once), **share)(function)
    names = {remote.remote(*arguments): name for name, arguments in jobs.items()}
    waiting = list(names)
    try:
        while waiting:
            (done,), waiting = ray.wait(waiting)
            try:
                yield names[done], ray.get(done)
            except ray.exceptions.RayError as error:
                yield names[done], getattr(error, "cause", None) or error
    finally:
        for task in waiting:  # as Ctrl-C does: a run saves what it has learned
            ray.cancel(task)
        ray.wait(waiting, num_returns=len(waiting), timeout=60) if waiting else None


# --- learning ------------------------------------------------------------------------------------------------------


class Sent(NamedTuple):
    """A file or folder of this machine, for machines that do not have it."""

    path: str
    stamp: tuple[tuple[str, int, int], ...]  # (name, size, time of change) of each file
    content: Any  # reference to {name: bytes} in Ray's store, where it lies once

    def here(self, ray: Any) -> Path:
        """Return where it lies on this machine, after writing it to the cache if it is not there."""
        path = Path(self.path)
        if stamp_of(path) == self.stamp:
            return path
        place = CACHE / "sent" / hashlib.sha256(repr(self[:2]).encode()).hexdigest()[:16] / path.name
        if not all((place / name).is_file() for name, _, _ in self.stamp):
            for name, content in ray.get(self.content).items():
                (place / name).parent.mkdir(parents=True, exist_ok=True)
                replace_bytes(place / name, content)  # whole, also where two tasks write it
        return place


def stamp_of(path: Path) -> tuple[tuple[str, int, int], ...]:
    """Return (name, size, time of change) of each file; of a missing path, nothing."""
    stats = {name: file.stat() for name, file in _files(path).items()}
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items())


def _files(path: Path) -> dict[str, Path]:
    """Return {name below `path`: file}; a file itself has no name."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return {"" if file == path else file.relative_to(path).as_posix(): file for file in files}


def send(ray: Any, path: Path) -> Sent:
    """Put a file or folder into Ray's store."""
    content = {name: np.fromfile(file, np.uint8) for name, file in _files(path).items()}
    return Sent(str(path), stamp_of(path), ray.put(content))


def learn_on(ray: Any, jobs: Sequence[Job], setting: Setting, out: Path, gpu_share: float) -> Iterator[Learned]:
    """Do as `learn_locally` does, on a cluster.

    A run lies in `out` on machines that see this folder, and resumes there, else in the machine's own cache.
    """
    ckpt, base = send(ray, setting.ckpt), [send(ray, path) for path in setting.base]
    calls = {
        job: (job, setting, (ckpt, base, send(ray, job.image)), str(out), noted(out, job).read_text("utf-8"))
        for job in jobs
    }
    for job, found in run_on(ray, learn_here, calls, gpu_share, once=True):
        if isinstance(found, Exception):
            died = isinstance(found, (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError))
            found = Learned(job, 0.0, error=KILLED if died else str(found)), ""
        learned, log = found
        if log:
            log_of(out, job).write_text(log, encoding="utf-8")
        yield save(learned, out)


def learn_here(
    job: Job, setting: Setting, sent: tuple[Sent, Sequence[Sent], Sent], out: str, note: str
) -> tuple[Learned, str]:
    """Learn a concept in this process; returns it and, where `out` is on another machine, the log."""
    import ray

    start, folder = time.monotonic(), Path(out)
    shared = noted(folder, job).is_file() and noted(folder, job).read_text(encoding="utf-8") == note
    if not shared:
        folder = CACHE / hashlib.sha256((out + note).encode()).hexdigest()[:16]
    run, log = run_of(folder, job), log_of(folder, job)
    log.parent.mkdir(parents=True, exist_ok=True)
    ckpt, base, images = sent
    with log.open("ab") as file:
        if not lock(file):
            return Learned(job, 0.0, error=LEFT), ""
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    here = replace(setting, ckpt=ckpt.here(ray), base=tuple(each.here(ray) for each in base))
    code = train.run(here.command(replace(job, image=images.here(ray)), run))
    text = log.read_text(encoding="utf-8", errors="replace")
    return result(job, run, code, text, time.monotonic() - start), "" if shared else text
