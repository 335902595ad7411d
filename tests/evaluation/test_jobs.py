import contextlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluation.jobs import run_jobs
from ldm.many import cluster


@dataclass(frozen=True)
class Argument:
    file: str


def square(number: int, folder: str, content: object = None) -> dict[str, np.ndarray]:
    """Leaves a line in the folder each time that it is run."""
    if number < 0:
        raise ValueError("negative")
    with (Path(folder) / "ran").open("a") as file:
        file.write(f"{number}\n")
    if number > 99:
        time.sleep(0.5)  # so that the others are done
        os.kill(os.getpid(), signal.SIGKILL)
    return {"square": np.array(number**2)}


def runs(folder: Path) -> list[str]:
    return sorted((folder / "ran").read_text().split())


def jobs(folder: Path, *numbers: int) -> dict[int, dict[str, object]]:
    return {number: {"number": number, "folder": str(folder)} for number in numbers}


@pytest.mark.parametrize("workers", [1, 2])
def test_results_are_kept_and_not_made_twice(workers: int, tmp_path: Path):
    first = run_jobs(square, jobs(tmp_path, 0, 1), tmp_path / "jobs", workers)
    assert [int(result["square"]) for result in first.values()] == [0, 1]
    every = run_jobs(square, jobs(tmp_path, 0, 1, 2, 3), tmp_path / "jobs", workers)
    assert {number: int(result["square"]) for number, result in every.items()} == {i: i**2 for i in range(4)}
    assert runs(tmp_path) == ["0", "1", "2", "3"]


def test_finished_results_stay_when_a_job_fails_or_a_worker_is_killed(tmp_path: Path):
    with pytest.raises(ValueError, match="negative"):
        run_jobs(square, jobs(tmp_path, 5, -1), tmp_path / "jobs", 1)
    with pytest.raises(ChildProcessError, match="finished results are kept"):
        run_jobs(square, jobs(tmp_path, 1, 2, 100), tmp_path / "jobs", 2)
    run_jobs(square, jobs(tmp_path, 1, 2, 5), tmp_path / "jobs", 2)
    assert runs(tmp_path) == ["1", "100", "2", "5"]


@pytest.mark.parametrize("wrapped", [lambda path: path, lambda path: {"*": [path]}, lambda path: Argument(path)])
def test_files_count_by_content_wherever_they_are(wrapped, tmp_path: Path):
    def run(name: str, content: str) -> int:
        (tmp_path / name).write_text(content)
        job = {"number": 2, "folder": str(tmp_path), "content": wrapped(str(tmp_path / name))}
        run_jobs(square, {"job": job}, tmp_path / "jobs", 1)
        return len(runs(tmp_path))

    assert [run("one", "a"), run("two", "a"), run("two", "b"), run("two", "b")] == [1, 1, 2, 2]


def test_a_damaged_result_is_made_anew_and_runs_no_code(tmp_path: Path):
    run_jobs(square, jobs(tmp_path, 3), tmp_path / "jobs", 1)
    (path,) = tmp_path.rglob("*.npz")
    whole = path.read_bytes()
    np.savez(tmp_path / "code.npz", square=np.array([Argument("pickled")], dtype=object))
    for content in (b"", b"0" * 500, whole[:-40], (tmp_path / "code.npz").read_bytes()):
        path.write_bytes(content)
        for _ in range(2):
            assert run_jobs(square, jobs(tmp_path, 3), tmp_path / "jobs", 1)[3]["square"] == 9
    assert runs(tmp_path) == ["3"] * 5


def test_results_of_earlier_versions_are_found(tmp_path: Path):
    """They lie where joblib's own cache put them: the hash is that of a job called `threads` without arguments."""
    place = tmp_path / "evaluation/jobs/measure/eb7c85e43673c4b52106b7994c2a7714"
    place.mkdir(parents=True)
    np.savez(place / "result.npz", threads=np.array(7))
    assert int(run_jobs(threads, {"one": {}}, tmp_path, 1)["one"]["threads"]) == 7


def threads() -> dict[str, np.ndarray]:
    return {"threads": np.array(torch.get_num_threads())}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_job_has_one_thread_whatever_the_number_of_workers(workers: int, tmp_path: Path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # as in the processes of a user
    torch.set_num_threads(2)
    try:
        found = run_jobs(threads, {"one": {}, "two": {}}, tmp_path, workers)
        assert [int(result["threads"]) for result in found.values()] == [1, 1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_on_a_cluster_each_result_is_kept_and_a_failure_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("evaluation.jobs.connected", contextlib.nullcontext)
    monkeypatch.setattr("evaluation.jobs.run_on", lambda _, run, calls: [(name, run(*x)) for name, x in calls.items()])
    found = run_jobs(square, jobs(tmp_path, 2, 3), tmp_path / "jobs", "local")
    assert [int(result["square"]) for result in found.values()] == [4, 9]
    monkeypatch.setattr("evaluation.jobs.run_on", lambda *_: [("7", ValueError("negative"))])
    with pytest.raises(ValueError, match="negative"):
        run_jobs(square, jobs(tmp_path, 2, 7), tmp_path / "jobs", "local")
    assert runs(tmp_path) == ["2", "3"]


@pytest.mark.slow
def test_on_a_ray_cluster_a_job_whose_worker_is_killed_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "results").mkdir()
    with cluster.connected("local") as ray:
        # one cluster for both: it takes seconds to start
        monkeypatch.setattr("evaluation.jobs.connected", {"local": contextlib.nullcontext(ray)}.__getitem__)
        results = run_jobs(killed_once, jobs(tmp_path / "results", 2, 3), tmp_path / "jobs", "local")
        assert {number: int(result["square"]) for number, result in results.items()} == {2: 4, 3: 9}
        assert runs(tmp_path / "results") == ["2", "3", "3"]
        with pytest.raises(ValueError, match="negative"):
            run_jobs(square, jobs(tmp_path / "results", -1), tmp_path / "jobs", "local")
    assert not (tmp_path / ".ray").exists()


def killed_once(number: int, folder: str) -> dict[str, np.ndarray]:
    """As `square`; the first process to do number 3 is killed."""
    again = "3" in (Path(folder) / "ran").read_text() if (Path(folder) / "ran").exists() else False
    result = square(number, folder)
    if number == 3 and not again:
        os.kill(os.getpid(), signal.SIGKILL)
    return result
