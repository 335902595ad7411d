"""Many independent measurements: in several processes, each result kept in a file as soon as it is there."""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import zipfile
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ldm.checkpoint import file_hash
from ldm.files.writing import replacing

logger = logging.getLogger(__name__)

Result = dict[str, np.ndarray]


def run_jobs(
    function: Callable[..., Result],
    jobs: Mapping[str, Mapping[str, Any]],
    folder: str | Path,
    workers: int | None = None,
    description: str = "measuring",
) -> dict[str, Result]:
    """The results of `function(**arguments)` for every named job.

    Results lie in `folder` as NAME.npz with the job's arguments; a job whose file is there with the same arguments
    is not run again, so an interrupted measurement goes on where it was. (A change of the code does not count: then
    take another folder.)

    Args:
        function: defined at the top level of a module; its arguments are plain data (JSON).
        workers: processes of one thread each, so that results do not depend on their number; None: one for each
            core, or one in all where there is a GPU.

    Raises:
        Whatever a job raises; results that are there by then stay.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    results, waiting = {}, {}
    for name, arguments in jobs.items():
        key = _key(function, arguments)
        found = _read(folder / f"{name}.npz", key)
        if found is None:
            waiting[name] = key
        else:
            results[name] = found
    if workers is None:
        workers = 1 if torch.cuda.is_available() else _cores()
    workers = max(1, min(workers, len(waiting)))
    with tqdm(total=len(jobs), initial=len(results), desc=description, disable=not waiting) as bar:
        for name, result in _results(function, {name: jobs[name] for name in waiting}, workers):
            _write(folder / f"{name}.npz", waiting[name], result)
            results[name] = result
            bar.update()
    return {name: results[name] for name in jobs}


def _results(function: Callable[..., Result], jobs: Mapping[str, Mapping[str, Any]], workers: int):
    if workers == 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield from ((name, function(**arguments)) for name, arguments in jobs.items())
        finally:
            torch.set_num_threads(threads)
        return
    context = multiprocessing.get_context("spawn")  # a forked child would hang in the parent's thread pools
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures = {pool.submit(_work, function, arguments): name for name, arguments in jobs.items()}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _work(function: Callable[..., Result], arguments: Mapping[str, Any]) -> Result:
    """One job in a process of its own, which does not go on when the one that asked is gone."""
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        os._exit(1)
    torch.set_num_threads(1)
    return function(**arguments)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # Linux: those that this process may use
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _key(function: Callable[..., Result], arguments: Mapping[str, Any]) -> str:
    """What tells jobs apart; files (and models' folders) count by their content, so any checkout has the same keys."""
    text = json.dumps([function.__qualname__, _by_content(arguments)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _by_content(value: Any) -> Any:
    """Plain data with the names of files replaced by what they hold."""
    if isinstance(value, Mapping):
        return {key: _by_content(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_by_content(entry) for entry in value]
    return file_hash(value) if isinstance(value, str) and _is_file(value) else value


def _is_file(text: str) -> bool:
    """Whether a text names a file, or a model's folder in the layout of diffusers."""
    try:
        return Path(text).is_file() or (Path(text) / "model_index.json").is_file()
    except (OSError, ValueError):  # too long, or with characters that no path has
        return False


def _read(path: Path, key: str) -> Result | None:
    """The result, or None where it is not there, is of another job or is damaged."""
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files if name != "key"} if str(file["key"]) == key else None
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error):
        logger.warning("'%s' is damaged, and is made anew.", path)
        return None


def _write(path: Path, key: str, result: Result) -> None:
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, key=np.array(key), **result)
