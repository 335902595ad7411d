"""`kill -9` at any moment: a resumed run ends as one that was never interrupted, bit for bit."""

import contextlib
import os
import random
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from runs import LEARN, MADE_SMALL, every, same_tensors, start, unfinished, wait_for

import main
from ldm.training.runs import LAST, PREVIOUS

pytestmark = pytest.mark.skipif(os.name != "posix", reason="processes are stopped and inspected by signals")
PHASES = ("start-up", "step", "checkpoint", "images")


def arguments_of(run: Path, steps: int) -> list[str]:
    """For a start of a run, or for another one."""
    begun = any(run.glob("configs/*-project.yaml"))
    arguments = ["-r", str(run)] if begun else [*LEARN, *MADE_SMALL, *every(2, pictures=2), "-p", str(run)]
    return [*arguments, "-t", "--max_steps", str(steps), "--enable_progress_bar", "false"]


class Attempt:
    """One start of a run that is killed in a given phase.

    The process is stopped (SIGSTOP), what it has written shows in which phase it stands, and it is killed or continued.
    """

    def __init__(self, run: Path, steps: int) -> None:
        self.run = run
        self.started = time.time_ns()
        self.process = start("main.py", *arguments_of(run, steps), stderr=subprocess.DEVNULL)

    def written(self, pattern: str) -> int:
        """How many such files this start has written."""
        count = 0
        for path in self.run.glob(pattern):
            with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
                count += path.stat().st_mtime_ns > self.started
        return count

    def phase(self) -> str:
        if self.written("checkpoints/.*"):
            return "checkpoint"
        if self.written("images/train/.*") or self.written("images/train/[!.]*") % 3:  # three images a step
            return "images"
        return "step" if self.written("checkpoints/embeddings*") else "start-up"

    def kill_in(self, phase: str, delay: float, skip: int) -> str:
        """Kill after `delay` seconds (start-up), or when `phase` was met and passed over `skip` times.

        Returns:
            The phase that it was killed in, which is another one where a start-up was over sooner.
        """
        end = time.monotonic() + delay
        while self.process.poll() is None and self.phase() == "start-up":
            if phase == "start-up" and time.monotonic() > end:
                break
            time.sleep(0.002)
        if phase == "step":
            time.sleep(delay / 10)
        while self.process.poll() is None:
            self.process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            if self.process.poll() is not None:
                break
            found = self.phase()
            skip -= found == phase
            if skip < 0 or phase == "start-up":
                self.process.kill()
                self.process.wait()
                return found
            self.process.send_signal(signal.SIGCONT)
            time.sleep(0.001)
        raise AssertionError(f"the run ended (code {self.process.returncode}) before it could be killed in: {phase}")


def kill_and_resume(folder: Path, phases: list[str], steps: int, seed: int) -> Counter[str]:
    """Kill one run in each of `phases`, in this order, and compare its end with that of an unharmed run.

    Returns:
        How often it was killed in which phase.
    """
    draw = random.Random(seed)
    kills: Counter[str] = Counter()
    whole, killed = folder / "whole", folder / "killed"
    start_up = 0.0  # seconds that it takes here
    if "start-up" in phases:
        attempt = Attempt(whole, steps)
        wait_for(lambda: attempt.phase() != "start-up")
        start_up = time.time() - attempt.started / 1e9
        assert attempt.process.wait() == 0
    else:
        assert main.main(arguments_of(whole, steps)) == 0
    for phase in phases:
        attempt = Attempt(killed, steps)
        try:
            kills[attempt.kill_in(phase, delay=draw.uniform(0, 0.9 * start_up), skip=draw.randrange(3))] += 1
        finally:
            attempt.process.kill()
            attempt.process.wait()
        for name in (LAST, PREVIOUS):  # at every moment they are whole, or not there yet
            if (killed / "checkpoints" / name).exists():
                torch.load(killed / "checkpoints" / name, weights_only=True)
    assert main.main(arguments_of(killed, steps)) == 0
    assert same_tensors(whole / "checkpoints", killed / "checkpoints")
    assert unfinished(killed) == []
    names = [sorted(path.name for path in (run / "images/train").iterdir()) for run in (whole, killed)]
    assert names[0] == names[1]
    return kills


def test_killed_while_writing(tmp_path: Path) -> None:
    kills = kill_and_resume(tmp_path, ["checkpoint", "images"], steps=8, seed=1)
    assert kills == {"checkpoint": 1, "images": 1}


@pytest.mark.slow
def test_killed_twenty_times(tmp_path: Path) -> None:
    phases = list(PHASES) * 5
    random.Random(7).shuffle(phases)
    kills = kill_and_resume(tmp_path, phases, steps=200, seed=2)
    assert sum(kills.values()) == 20
    assert all(kills[phase] >= 3 for phase in PHASES), kills  # a start-up may have been over
