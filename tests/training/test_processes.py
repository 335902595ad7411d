"""Several processes: one run in two of them, and two runs that start together."""

import os
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import LEARN, MADE_SMALL, PICTURES, every, finish, saved_tensors, start

import main
from ldm.training.runs import Run

VALIDATION = "data.params.validation={target: ldm.data.personalized.PersonalizedBase, params: %s}"
# Sums are made in another order, and Adam divides small gradients by small ones; relative, of 8 steps.
TOLERANCE = 2e-3


def loopback_is_up() -> bool:
    with socket.create_server(("127.0.0.1", 0)) as server:
        try:
            socket.create_connection(server.getsockname(), timeout=5).close()
        except OSError:
            return False
    return True


@pytest.mark.skipif(not loopback_is_up(), reason="processes of one run talk over the loopback device")
def test_two_processes_learn_what_one_learns_with_twice_the_batch(tmp_path: Path) -> None:
    """The same embedding from the same samples at the same rate; rank 0 alone writes, and a signal to the other one
    stops both."""
    common = [*LEARN, *MADE_SMALL, *every(4, pictures=8), "--log_every_n_steps", "4", "--allow_targets", "runs"]
    # validated after every fourth step
    common += [VALIDATION % f"{{size: 64, set: val, data_root: {PICTURES}}}", "data.params.train.params.repeats=16"]
    stop = "lightning.callbacks.stop={target: runs.CtrlC, params: {step: 8, name: SIGTERM, rank: 1}}"
    flags = ["--devices", "2", "--accelerator", "cpu", "--strategy", "ddp", "--max_steps", "1000", stop]
    two = start("main.py", *common, "-l", str(tmp_path / "two"), "-n", "x", *flags)
    seen = set()
    while two.poll() is None:
        seen |= {path.name for path in tmp_path.glob("two/*")}
        time.sleep(0.01)
    _, errors = finish(two)
    assert two.returncode == 128 + 15, errors
    assert "Stopped and saved at step 8" in errors and "error" not in errors
    assert len(seen) == 1, "at no time had the second process a folder of its own"
    one = ["-l", str(tmp_path / "one"), "-n", "x", "data.params.batch_size=4", "--max_steps", "8"]
    assert main.main([*common, *one]) == 0
    assert len(re.findall(r"Learning rate 1.20e-04 = .* 2 \(devices\) x 2 \(batch size\)", errors)) >= 1

    folders = [run for name in ("one", "two") for run in (tmp_path / name).iterdir()]
    assert len(folders) == 2, "one log folder for both processes"
    names = [sorted(re.sub(r"[\dT:-]{19}|\.\d{9,}.*", "", str(file.relative_to(run))) for file in run.rglob("*"))
             for run in folders]  # fmt: skip
    assert names[0] == names[1] and len(names[0]) == len(set(names[0]))

    one, two = (saved_tensors(run / "checkpoints") for run in folders)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one if name.endswith("step"))
    learned, again = one["embeddings.safetensors"], two["embeddings.safetensors"]
    earlier = one["embeddings_gs-4.safetensors"]
    assert (learned - again).norm() < TOLERANCE * learned.norm()
    assert (learned - earlier).norm() > 20 * TOLERANCE * learned.norm(), "it would notice other steps"


def test_runs_of_the_same_second_have_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads open 15 runs of one name each, as fast as they can; for folders they are what two processes are."""
    both, mkdir = threading.Barrier(2), os.mkdir

    def late(*arguments: Any, **options: Any) -> None:
        time.sleep(0.002)  # whatever looked before whether the folder is there will be wrong
        mkdir(*arguments, **options)

    def open_runs(_: int) -> list[Path]:
        folders = []
        both.wait(timeout=60)
        for _ in range(15):
            run = Run(tmp_path / "logs/run", "now", exact=False)
            with run.opened():
                (run.folder / "mine").touch(exist_ok=False)
                folders.append(run.folder)
        return folders

    monkeypatch.setattr(os, "mkdir", late)
    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(open_runs, range(2))
    assert [len(one), len(two)] == [15, 15] and len({*one, *two}) == 30


def test_a_folder_that_is_asked_for_is_taken_as_it_is(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", "now")
    with pytest.raises(KeyError), run.opened():
        raise KeyError
    assert not run.folder.exists(), "nothing is left of a run that did not begin"
    run.checkpoints.mkdir(parents=True)
    (run.checkpoints / ".prospect-1-0123abcd.partial").write_text("half")
    (run.checkpoints / ".tmp_notes.txt").write_text("of its owner")
    with pytest.raises(KeyError), run.opened():
        raise KeyError
    assert [path.name for path in run.checkpoints.iterdir()] == [".tmp_notes.txt"]
