"""What happens on file systems of a few pages, and on read-only ones; run by `test_full_disk.py` as

    unshare -rm python tests/small_disk.py FOLDER

which gives this process a mount table of its own, without any privilege. Prints one JSON object a case.
"""

import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from runs import LEARN, MADE_SMALL, every, unfinished

import main
from ldm.cli import sample as commands
from ldm.embeddings import load_concept

PAGE = 4096


@contextlib.contextmanager
def disk(folder: Path, options: str) -> Iterator[Path]:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], check=True)
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path, leave: int = 0) -> None:
    """Use up the disk, but for `leave` bytes."""
    filler = folder / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(PAGE))
    with filler.open("r+b") as file:
        file.truncate(filler.stat().st_size - leave)


def lock(folder: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)


def attempt(program: object, arguments: list[str], folder: Path, case: str) -> None:
    """Run a command in this process, and say how it ended and what is there afterwards."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        try:
            code = program(arguments)
        except SystemExit as error:
            code = error.code
    checkpoints = folder / "run/checkpoints"
    found: dict[str, object] = {"case": case, "folder": str(folder), "code": code, "errors": errors.getvalue()}
    found["unfinished"] = unfinished(folder)
    found["files"] = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    found["empty"] = [name for name in found["files"] if not (folder / name).stat().st_size]
    found["saved"] = [torch.load(path, weights_only=True)["global_step"] for path in checkpoints.glob("last.ckpt")]
    for path in checkpoints.glob("embeddings*.safetensors"):
        load_concept(path)
    sys.stdout.write(json.dumps(found) + "\n")


def learn(folder: Path, case: str, steps: int, *overrides: str) -> None:
    arguments = [*LEARN, *MADE_SMALL, "-p", str(folder / "run"), "--max_steps", str(steps), *overrides]
    attempt(main.main, arguments, folder, case)


def resume(folder: Path, case: str, steps: int) -> None:
    arguments = ["-r", str(folder / "run"), "-t", "--max_steps", str(steps), "--enable_progress_bar", "false"]
    attempt(main.main, arguments, folder, case)


def generate(folder: Path, case: str) -> None:
    flags = ["--prompt", "a red star", "--steps", "1", "--outdir", str(folder / "pictures")]
    attempt(lambda flags: commands.run(flags) and 0, flags, folder, case)


if __name__ == "__main__":
    root = Path(sys.argv[1])
    with disk(root / "a", "size=24m") as folder:  # last.ckpt has 16 MB
        learn(folder, "checkpoint", 6, *every(2))
        (folder / "filler").touch()
        fill(folder)
        resume(folder, "start", 6)
        (folder / "filler").unlink()
        lock(folder)
        resume(folder, "read-only", 6)
        learn(folder / "other", "read-only, new", 6)
    with disk(root / "b", f"size={10 * PAGE}") as folder:  # configurations, events, one image
        learn(folder, "pictures", 4, *every(100, pictures=2))
    with disk(root / "c", f"size={6 * PAGE}") as folder:
        learn(folder, "embeddings", 4, *every(2))
    with disk(root / "d", f"size={5 * PAGE}") as folder:
        learn(folder, "events", 60, *every(100), "--log_every_n_steps", "1")
    with disk(root / "f", f"size={4 * PAGE}") as folder:
        learn(folder, "table", 60, *every(100), "--log_every_n_steps", "1")
    with disk(root / "e", "size=1m") as folder:
        fill(folder, leave=PAGE)
        generate(folder, "generate")
        lock(folder)
        generate(folder, "generate, read-only")
