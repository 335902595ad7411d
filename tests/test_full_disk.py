"""No room, no right: one sentence with the folder and the remedy, and the last good files intact."""

import json
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from runs import LEARN, MADE_SMALL, every, finish, saved_tensors, start, unfinished

import main
from ldm.checkpoint import save_state_dict
from ldm.cli import sample as commands
from ldm.files.writing import WriteError, check_writable, replacing

NAMESPACE = ["unshare", "-rm"]


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """No file of this process may grow beyond `size` bytes: what a full disk is where none can be mounted."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def has_namespaces() -> bool:
    if not shutil.which("unshare"):
        return False
    # the interpreter may be where only root, which this process then only seems to be, can reach it
    mount = [*NAMESPACE, "sh", "-c", 'mount -t tmpfs none /mnt && exec "$0" -c ""', sys.executable]
    return subprocess.run(mount, capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """What `small_disk.py` saw, by case."""
    if not has_namespaces():
        pytest.skip("no file system can be mounted here; the tests with files_up_to() remain")
    folder = tmp_path_factory.mktemp("disks")
    process = start("tests/small_disk.py", str(folder), launcher=NAMESPACE, stdout=subprocess.PIPE)
    lines, errors = finish(process)
    found = [json.loads(line) for line in lines.splitlines() if line.startswith("{")]
    assert process.returncode == 0, errors
    return {case["case"]: case for case in found}


FULL = "No space left on device; give another folder."
READ_ONLY = "Read-only file system; give another folder."


@pytest.mark.parametrize(
    ("case", "place", "reason", "saved"),
    [
        ("checkpoint", "run/checkpoints", FULL, [2]),
        ("start", "run/configs", FULL, [2]),
        ("read-only", "run", READ_ONLY, [2]),
        ("read-only, new", "run", READ_ONLY, []),
        ("pictures", "run/images/train", FULL, []),
        ("embeddings", "run/checkpoints", FULL, []),
        ("events", "run", FULL, []),
        ("table", "run", FULL, []),
        ("generate", "pictures", FULL, []),
        ("generate, read-only", "pictures", READ_ONLY, []),
    ],
)
def test_small_and_read_only_disks(cases: dict[str, dict], case: str, place: str, reason: str, saved: list) -> None:
    found = cases[case]
    assert found["code"] == 2
    # TensorBoard is given the images, too: its thread may meet the full disk first, and it names the run's folder
    places = (place, "run") if case == "pictures" else (place,)
    sentence = found["errors"].splitlines()[-1].partition("error: ")[2]
    assert sentence in [f"Cannot write to '{found['folder']}/{place}': {reason}" for place in places]
    assert "Traceback" not in found["errors"]
    assert found["unfinished"] == [] and found["saved"] == saved
    ours = [name for name in found["files"] if not name.startswith(("filler", "run/csv", "run/tensorboard"))]
    assert not set(found["empty"]) & set(ours)
    if case.startswith("generate"):
        assert ours == []


def test_a_checkpoint_without_room_leaves_the_one_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    arguments = [*LEARN, *MADE_SMALL, *every(2), "-p", str(run)]
    assert main.main([*arguments, "--max_steps", "2"]) == 0
    before = saved_tensors(run / "checkpoints")
    with files_up_to(10_000_000):  # last.ckpt has 16 MB, everything else fits
        assert main.main(["-r", str(run), "-t", "--max_steps", "6", "--enable_progress_bar", "false"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert f"Cannot write to '{run}/checkpoints': File too large" in lines[-1]
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 2
    after = saved_tensors(run / "checkpoints")
    weights = [name for name in before if not name.startswith("embeddings")]
    assert weights and all(torch.equal(before[name], after[name]) for name in weights)
    assert unfinished(run) == []
    assert main.main(["-r", str(run), "-t", "--max_steps", "6", "--enable_progress_bar", "false"]) == 0


@pytest.mark.parametrize("flags", [["-l", "{}/file/logs"], ["-p", "{}/file"], ["-p", "{}/file/run"]])
def test_a_log_folder_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str]) -> None:
    (tmp_path / "file").write_text("kept")
    assert main.main([*LEARN, *MADE_SMALL, *(text.format(tmp_path) for text in flags)]) == 2
    assert f"Cannot write to '{tmp_path}/file" in capsys.readouterr().err.splitlines()[-1]
    assert [path.read_text() for path in tmp_path.iterdir()] == ["kept"]


def test_pictures_without_room(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with files_up_to(1000), pytest.raises(SystemExit) as ending:
        commands.run(["--prompt", "a star", "--steps", "1", "--outdir", str(tmp_path / "out")])
    assert ending.value.code == 2
    assert f"Cannot write to '{tmp_path}/out': File too large" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_weights_without_room(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_state_dict({"a": torch.ones(10)}, path)
    before = path.read_bytes()
    with files_up_to(1000), pytest.raises(WriteError, match="Cannot write to"):
        save_state_dict({"a": torch.ones(10_000)}, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_errors_of_other_places_are_left_alone(tmp_path: Path) -> None:
    with pytest.raises(NotADirectoryError), replacing(tmp_path / "a"):
        (Path(__file__) / "elsewhere").read_text()
    check_writable(tmp_path / "any/number/of/new/folders", "-l")
    assert list(tmp_path.iterdir()) == []
