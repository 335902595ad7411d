"""What `-r` and `--embedding_manager_ckpt` do with files that another program left half written."""

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import LEARN, MADE_SMALL, ROOT, every, saved_tensors

import main
from ldm.embeddings import load_concept


@pytest.fixture(autouse=True)
def in_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log folder of a run of 6 steps, saved every 2."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        assert main.main([*LEARN, *MADE_SMALL, *every(2), "-p", str(folder), "--max_steps", "6"]) == 0
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def resume(path: Path, steps: int = 6) -> int:
    return main.main(["-r", str(path), "-t", "--max_steps", str(steps), "--enable_progress_bar", "false"])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def hole(path: Path) -> None:
    """As a program leaves it that reserves the size first."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(10_000))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def tail(path: Path) -> None:
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: size // 2] + bytes(size - size // 2))


@pytest.mark.parametrize("damage", [cut, hole, empty, tail, Path.unlink])
def test_the_checkpoint_before_is_offered(
    run: Path, finished: Path, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence with the command that goes on from it; and that ends as the whole run did."""
    damage(run / "checkpoints/last.ckpt")
    assert resume(run) == 2
    (line,) = capsys.readouterr().err.splitlines()
    previous = run / "checkpoints/previous.ckpt"
    assert f"'{run}/checkpoints/last.ckpt'" in line
    assert line.endswith(f"; go on from the one before it: python main.py -r {previous} -t.")
    assert torch.load(previous, weights_only=True)["global_step"] == 4
    assert resume(previous) == 0
    assert torch.load(previous, weights_only=True)["global_step"] == 4  # the damaged one does not take its place
    expected, got = saved_tensors(finished / "checkpoints"), saved_tensors(run / "checkpoints")
    assert expected.keys() == got.keys() and all(torch.equal(expected[name], got[name]) for name in expected)


def test_the_last_embeddings_are_offered(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where both checkpoints are damaged: the embeddings of the latest step that can be read."""
    for name in ("last.ckpt", "previous.ckpt", "embeddings_gs-6.safetensors"):
        cut(run / "checkpoints" / name)
    for path in (run, run / "checkpoints/previous.ckpt"):
        assert resume(path) == 2
        (line,) = capsys.readouterr().err.splitlines()
        latest = run / "checkpoints/embeddings_gs-4.safetensors"
        assert line.endswith(f"; begin a new run with its latest embeddings: --embedding_manager_ckpt {latest}.")
    for path in run.glob("checkpoints/*.safetensors"):
        path.unlink()
    assert resume(run) == 2
    assert capsys.readouterr().err.rstrip().endswith("; begin a new run.")


def test_damaged_embeddings_to_start_from(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = run / "checkpoints/embeddings.safetensors"
    cut(damaged)
    flags = ["-p", str(tmp_path / "new"), "--max_steps", "1", "--embedding_manager_ckpt"]
    assert main.main([*LEARN, *MADE_SMALL, *flags, str(damaged)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    before = run / "checkpoints/embeddings_gs-6.safetensors"
    assert str(damaged) in line and line.endswith(f", or the ones saved before it: '{before}'.")
    assert not (tmp_path / "new").exists()
    assert main.main([*LEARN, *MADE_SMALL, *flags, str(before)]) == 0


def test_a_resumed_run_learns_at_the_rate_it_is_asked_for(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As the sentence about a loss that is not finite advises."""
    arguments = ["-t", "--max_steps", "7", "-s", "7", "model.base_learning_rate=1e-3"]
    assert main.main(["-r", str(run), *arguments]) == 0
    (state,) = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["optimizer_states"]
    assert [group["lr"] for group in state["param_groups"]] == [2e-3]  # for a batch of 2
    assert "The run goes on with its own seed 23, not with 7." in caplog.messages


def test_a_stop_goes_before_a_least_number_of_steps(tmp_path: Path) -> None:
    stop = ["--allow_targets", "runs", "lightning.callbacks.stop={target: runs.CtrlC, params: {step: 2}}"]
    flags = ["-p", str(tmp_path / "run"), "--max_steps", "6", "--min_steps", "6", "--min_epochs", "1"]
    assert main.main([*LEARN, *MADE_SMALL, *every(100), *flags, *stop]) == 130
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 2


def test_a_complete_run_that_is_resumed_mends_its_embeddings(run: Path, finished: Path) -> None:
    name = "checkpoints/embeddings.safetensors"
    cut(run / name)
    assert resume(run) == 0
    assert torch.equal(load_concept(run / name).vectors, load_concept(finished / name).vectors)


POISON = "lightning.callbacks.poison={target: runs.Poison, params: {step: 8}}"


def test_signals_are_the_programs_own_again_after_a_run(run: Path) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    for steps, arguments, code in ((7, [], 0), (9, ["--allow_targets", "runs", POISON], 2)):
        assert main.main(["-r", str(run), "-t", "--max_steps", str(steps), *arguments]) == code
        assert [signal.getsignal(number) for number in numbers] == before


def test_a_run_that_saved_nothing_begins_anew(run: Path, finished: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.rmtree(run / "checkpoints")
    with caplog.at_level("INFO"):
        assert resume(run) == 0
    assert f"'{run}' has no checkpoint yet: the run begins anew." in caplog.messages
    expected, got = saved_tensors(finished / "checkpoints"), saved_tensors(run / "checkpoints")
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_a_folder_without_a_configuration_is_not_resumed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run / "checkpoints")
    shutil.rmtree(run / "configs")
    assert resume(run) == 2
    assert "Nothing to resume" in capsys.readouterr().err


def test_a_new_run_overwrites_no_other(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main.main([*LEARN, *MADE_SMALL, "-p", str(run), "--max_steps", "1"]) == 2
    assert f"'{run}' holds a run already: go on with it (python main.py -r {run} -t)" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
