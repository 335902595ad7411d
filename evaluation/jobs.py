"""Independent measurements in parallel processes (joblib); each result is kept on disk as soon as it is there."""

from __future__ import annotations

import dataclasses
import functools
import os
import zipfile
import zlib
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
except ImportError as error:
    raise ImportError("Measuring needs joblib, scipy and matplotlib: pip install -e '.[metrics]'") from error

Result = dict[str, np.ndarray]
Workers = int | str | None  # see `run_jobs`
Call = tuple[Path, Callable[..., Result], Mapping[str, Any]]  # arguments of `measure`
Name = TypeVar("Name", bound=Hashable)


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
    hash_of = functools.cache(file_hash)
    places = {}
    for name, arguments in jobs.items():
        key = joblib.hash([function.__qualname__, by_content(arguments, hash_of)])
        # where joblib's own cache, which earlier versions used, has it
        places[name] = Path(folder, "evaluation/jobs/measure", joblib.hash({"key": key}), "result.npz")
    found = {place: read(place) for place in places.values()}
    waiting = {place: (place, function, jobs[name]) for name, place in places.items() if found[place] is None}
    if isinstance(workers, str):
        _on_cluster(workers, waiting, description)
    else:
        _in_processes(workers, list(waiting.values()), description)
    return {name: found[place] or read(place) or {} for name, place in places.items()}


def read(place: Path) -> Result | None:
    """Return a result, None where there is none or a damaged one; no code in it is run."""
    try:
        with np.load(place, allow_pickle=False) as file:
            return dict(file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):
        return None


def measure(place: Path, function: Callable[..., Result], arguments: Mapping[str, Any]) -> None:
    """Run one job on one thread, and keep its result."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        result = function(**arguments)
    finally:
        torch.set_num_threads(threads)
    with replacing(place) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **result)


def _in_processes(workers: int | None, waiting: Sequence[Call], description: str) -> None:
    if workers is None:
        workers = 1 if torch.cuda.is_available() else joblib.cpu_count()
    parallel = joblib.Parallel(
        max(1, min(workers, len(waiting))), batch_size=1, return_as="generator_unordered", idle_worker_timeout=20
    )
    try:
        made = parallel(joblib.delayed(measure)(*call) for call in waiting)
        for _ in tqdm(made, description, len(waiting), disable=not waiting):
            pass
    except BrokenProcessPool as error:
        remedy = "finished results are kept; run the command again, with fewer --workers"
        raise ChildProcessError(f"A worker process was killed, most likely for want of memory; {remedy}.") from error


def _on_cluster(address: str, waiting: Mapping[Path, Call], description: str) -> None:
    """Ray does a job again, twice at most, whose worker was killed; all machines must see the folder of the results."""
    if not waiting:
        return
    with connected(address) as ray:
        for _, failure in tqdm(run_on(ray, measure, waiting), description, len(waiting)):
            if isinstance(failure, Exception):
                raise failure


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
