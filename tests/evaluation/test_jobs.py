from pathlib import Path

import numpy as np
import pytest
import torch

from evaluation.jobs import run_jobs


def square(number: int, folder: str, content: object = None) -> dict[str, np.ndarray]:
    """Leaves a line for each time that it is run in the folder."""
    if number < 0:
        raise ValueError("negative")
    with (Path(folder) / "ran").open("a") as file:
        file.write(f"{number}\n")
    return {"square": np.array(number**2)}


@pytest.mark.parametrize("workers", [1, 2])
def test_results_are_kept_and_not_made_twice(workers: int, tmp_path: Path):
    jobs = {f"job-{i}": {"number": i, "folder": str(tmp_path)} for i in range(4)}
    first = run_jobs(square, dict(list(jobs.items())[:2]), tmp_path / "jobs", workers)
    assert [int(result["square"]) for result in first.values()] == [0, 1]
    every = run_jobs(square, jobs, tmp_path / "jobs", workers)
    assert {name: int(result["square"]) for name, result in every.items()} == {f"job-{i}": i**2 for i in range(4)}
    assert sorted((tmp_path / "ran").read_text().split()) == ["0", "1", "2", "3"]


def test_other_arguments_are_another_job(tmp_path: Path):
    run_jobs(square, {"job": {"number": 2, "folder": str(tmp_path)}}, tmp_path, 1)
    assert run_jobs(square, {"job": {"number": 3, "folder": str(tmp_path)}}, tmp_path, 1)["job"]["square"] == 9


def test_what_is_done_by_the_time_of_an_error_stays(tmp_path: Path):
    jobs = {"good": {"number": 5, "folder": str(tmp_path)}, "bad": {"number": -1, "folder": str(tmp_path)}}
    with pytest.raises(ValueError, match="negative"):
        run_jobs(square, jobs, tmp_path / "jobs", 1)
    assert (tmp_path / "jobs" / "good.npz").exists() and not (tmp_path / "jobs" / "bad.npz").exists()


def runs(folder: Path) -> int:
    return len((folder / "ran").read_text().split())


@pytest.mark.parametrize("wrapped", [lambda path: path, lambda path: {"*": [path]}])
def test_files_count_by_content_wherever_they_are(wrapped, tmp_path: Path):
    def run(name: str, content: str) -> int:
        (tmp_path / name).write_text(content)
        job = {"number": 2, "folder": str(tmp_path), "content": wrapped(str(tmp_path / name))}
        run_jobs(square, {"job": job}, tmp_path / "jobs", 1)
        return runs(tmp_path)

    assert [run("one", "a"), run("two", "a"), run("two", "b"), run("two", "b")] == [1, 1, 2, 2]


@pytest.mark.parametrize("content", [b"", b"0" * 500, None])
def test_a_damaged_result_is_made_anew(content: bytes | None, tmp_path: Path, caplog):
    job = {"job": {"number": 3, "folder": str(tmp_path)}}
    run_jobs(square, job, tmp_path / "jobs", 1)
    path = tmp_path / "jobs" / "job.npz"
    path.write_bytes(path.read_bytes()[:-40] if content is None else content)
    assert run_jobs(square, job, tmp_path / "jobs", 1)["job"]["square"] == 9
    assert runs(tmp_path) == 2 and f"'{path}' is damaged" in caplog.text
    assert sorted(file.name for file in path.parent.iterdir()) == ["job.npz"]


def threads() -> dict[str, np.ndarray]:
    return {"threads": np.array(torch.get_num_threads())}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_job_has_one_thread_whatever_the_number_of_workers(workers: int, tmp_path: Path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # as in the processes of a user
    torch.set_num_threads(2)
    try:
        found = run_jobs(threads, {"one": {}, "two": {}}, tmp_path, workers)
        assert [result["threads"] for result in found.values()] == [1, 1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
