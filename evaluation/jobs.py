"""Independent measurements in parallel processes; each result is kept on disk as soon as it is there (joblib)."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from tqdm import tqdm

from ldm.checkpoint import file_hash
from ldm.files.writing import replacing
from ldm.many.cluster import connected, run_on

try:
    import joblib
    from joblib._store_backends import FileSystemStoreBackend
except ImportError as error:
    raise ImportError("Measuring needs joblib, scipy and matplotlib: pip install -e '.[metrics]'") from error

Result = dict[str, np.ndarray]
Workers = int | str | None  # see `run_jobs`
Waiting = Mapping[str, tuple[Any, ...]]  # key -> arguments of `measure`
Name = TypeVar("Name", bound=Hashable)


class ArrayStore(FileSystemStoreBackend):
    """joblib's folder of results, as .npz files instead of pickles: reading one runs no code.

    Unlike with joblib's own, a full disk is an error and not a warning.
    """

    def _path(self, call_id: Sequence[str]) -> Path:
        return Path(self.location, *call_id, "result.npz")

    def contains_item(self, call_id: Sequence[str]) -> bool:
        return self._path(call_id).is_file()

    def load_item(self, call_id: Sequence[str], **_: Any) -> Result:
        with np.load(self._path(call_id), allow_pickle=False) as file:
            return dict(file)

    def dump_item(self, call_id: Sequence[str], item: Result, **_: Any) -> None:
        self._path(call_id).parent.mkdir(parents=True, exist_ok=True)
        with replacing(self._path(call_id)) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **item)


joblib.register_store_backend("arrays", ArrayStore)


def run_jobs(
    function: Callable[..., Result],
    jobs: Mapping[Name, Mapping[str, Any]],
    folder: str | Path,
    workers: Workers = None,
    description: str = "measuring",
) -> dict[Name, Result]:
    """Return the results of `function(**arguments)` for every named job, or raise what a job raises.

    A result that lies in `folder` is not made again, so an interrupted measurement resumes where it was. (A change of
    the code does not count: then use another folder.)

    Args:
        function: defined at the top level of a module. Its arguments are plain data, arrays and dataclasses; files
            count by their content.
        workers: processes of one thread each; None: one for each core, or one in all where there is a GPU. A
            text is the address of a Ray cluster to measure on: "local", "auto" or HOST:PORT.
    """
    cached = joblib.Memory(folder, backend="arrays", verbose=0).cache(measure, ignore=["function", "arguments"])
    hash_of = functools.cache(file_hash)
    calls = [(joblib.hash([function.__qualname__, by_content(x, hash_of)]), function, x) for x in jobs.values()]
    waiting = {call[0]: call for call in calls if not cached.check_call_in_cache(*call)}
    if isinstance(workers, str):
        _on_cluster(workers, cached, waiting, description)
    else:
        _in_processes(workers, cached, waiting, description)
    return {name: cached(*call) for name, call in zip(jobs, calls, strict=True)}


def _in_processes(workers: int | None, cached: Any, waiting: Waiting, description: str) -> None:
    if workers is None:
        workers = 1 if torch.cuda.is_available() else joblib.cpu_count()
    parallel = joblib.Parallel(
        max(1, min(workers, len(waiting))), batch_size=1, return_as="generator_unordered", idle_worker_timeout=20
    )
    try:
        made = parallel(joblib.delayed(cached.call_and_shelve)(*call) for call in waiting.values())
        for _ in tqdm(made, description, len(waiting), disable=not waiting):
            pass
    except BrokenProcessPool as error:
        remedy = "finished results are kept; run the command again, with fewer --workers"
        raise ChildProcessError(f"A worker process was killed, most likely for want of memory; {remedy}.") from error


def _on_cluster(address: str, cached: Any, waiting: Waiting, description: str) -> None:
    """Ray does a job again, twice at most, whose worker was killed; all machines must see the folder of the results."""
    if not waiting:
        return
    with connected(address) as ray:
        for _, found in tqdm(
            run_on(ray, lambda *call: cached.call_and_shelve(*call), waiting), description, len(waiting)
        ):
            if isinstance(found, Exception):
                raise found


def measure(key: str, function: Callable[..., Result], arguments: Mapping[str, Any]) -> Result:
    """Run one job on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return function(**arguments)
    finally:
        torch.set_num_threads(threads)


def by_content(value: Any, hash_of: Callable[[str], str]) -> Any:
    """Return data with the names of files, and of models' folders, replaced by a hash of what they hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {key: by_content(entry, hash_of) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [by_content(entry, hash_of) for entry in value]
    is_file = isinstance(value, str) and any(map(os.path.isfile, (value, os.path.join(value, "model_index.json"))))
    return hash_of(value) if is_file else value
