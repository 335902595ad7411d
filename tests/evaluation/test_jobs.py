from pathlib import Path

import numpy as np
import pytest

from ldm.evaluation.jobs import run_jobs


def square(number: int, folder: str) -> dict[str, np.ndarray]:
    """Leaves a line for each time that it is run."""
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
