"""The log folder of a run: a new one, or the one of the run to resume."""

from __future__ import annotations

import argparse
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from pytorch_lightning.utilities.rank_zero import rank_zero_only

from ldm.checkpoint import CheckpointError
from ldm.embeddings import EmbeddingError, load_concept
from ldm.files.shipped import IS_INSTALLED, command, quoted
from ldm.files.tensors import read_checkpoint
from ldm.files.writing import check_writable, is_unfinished, remove_unfinished, writing_to

logger = logging.getLogger(__name__)

LAST, PREVIOUS, EMBEDDINGS = "last.ckpt", "previous.ckpt", "embeddings.safetensors"
MAX_NAME = 250  # bytes of a folder's name: file systems take 255, and a number may be appended


@dataclass
class Run:
    """A run: its log folder, and the checkpoint that it resumes from.

    Args:
        resumed: whether the folder and its configuration are of an earlier start.
        checkpoint: None for a new run, and for one that was ended before it saved anything.
        step: of the checkpoint.
        exact: whether the folder is taken as it is, or is given a number where there already is one.
        changes: what differs from the configuration of the earlier start.
    """

    folder: Path
    started: str
    resumed: bool = False
    checkpoint: Path | None = None
    step: int = 0
    exact: bool = True
    changes: list[str] = field(default_factory=list)

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def configs(self) -> Path:
        return self.folder / "configs"

    def saved(self, *kinds: str) -> list[Path]:
        """Return the files `configs/<time>-<kind>.yaml` of the latest start; the kind `project` is written last."""
        for last in sorted(self.configs.glob("*-project.yaml"))[-1:]:
            paths = [last.with_name(last.name.replace("-project.yaml", f"-{kind}.yaml")) for kind in kinds]
            return [path for path in paths if path.is_file()]
        return []

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Make the folder, or clear what a killed process left half written in the folder of the run to resume.

        Of several processes only the first does that. What was made and stays empty is removed again.

        Raises:
            WriteError: the folder cannot be made.
        """
        if not is_first_process():
            yield
            return
        is_there = self.exact and self.folder.is_dir()
        made = [place for place in self.folder.parents if not place.exists()]
        with writing_to(self.folder):
            self._make()
            remove_unfinished(self.folder)
        try:
            yield
        finally:
            with suppress(OSError):
                for place in () if is_there else (self.folder, *made):
                    place.rmdir()

    def _make(self) -> None:
        if self.exact:
            self.folder.mkdir(parents=True, exist_ok=True)
            return
        wanted, number = self.folder, 1
        wanted.parent.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                self.folder.mkdir()  # of two runs that start in the same second only one can make it
                return
            except FileExistsError:
                number += 1
                self.folder = wanted.with_name(f"{wanted.name}-{number}")


def is_first_process() -> bool:
    """Return whether this is the one process of a run that writes."""
    return getattr(rank_zero_only, "rank", 0) == 0


def resume_command(place: Path) -> str:
    """Return what to type to resume the run in a log folder, or from a checkpoint."""
    return command("main.py", "learn", "-r", str(place), *([] if IS_INSTALLED else ["-t"]))


def open_run(options: argparse.Namespace) -> Run:
    """Return the log folder of a new run, which is not made yet, or of the run to resume.

    Raises:
        ValueError: there is nothing to resume at the place given, or it is damaged; a new run would overwrite files.
        WriteError: the place has no room or gives no right.
    """
    now = datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
    if options.resume:
        run, flag = _run_to_resume(Path(options.resume), now), "-r"
    elif options.project:
        run, flag = Run(Path(options.project), now), "-p"
        if is_first_process():  # for the others, it has started to write
            _check_empty(run)
    else:
        run, flag = Run(Path(options.logdir) / _folder_name(options, now), now, exact=False), "-l"
    check_writable(run.folder, flag)
    return run


def _check_empty(run: Run) -> None:
    """Raise `ValueError` where a new run would overwrite what is in its folder.

    Empty folders, and what a process that was killed had started to write, do not count.
    """
    places = (path.relative_to(run.folder) for path in run.folder.rglob("*") if path.is_symlink() or not path.is_dir())
    if not all(any(map(is_unfinished, place.parts)) for place in places):
        resume = f"holds a run: resume it ({resume_command(run.folder)}) or name another folder"
        what = resume if run.saved("project") else "is not empty; name a new or an empty folder with -p"
        raise ValueError(f"'{run.folder}' {what}.")


def _folder_name(options: argparse.Namespace, now: str) -> str:
    """Return `<data folder><time>_<name><postfix>`, of which the data folder's name is cut to what fits."""
    for flag, text in (("-n", options.name), ("-f", options.postfix)):
        if text and re.search(r"[/\\]", text):
            raise ValueError(f"{flag}: '{text:.80}' must be a name, not a path; a path goes to -l or -p.")
    name = options.name or _shortened(Path(options.base[0]).stem, 100)
    end = f"{now}_{name}{options.postfix}"
    data = Path(options.data_root).resolve().name if options.data_root and options.datadir_in_name else ""
    return _shortened(data, max(0, MAX_NAME - len(os.fsencode(end)))) + end


def _shortened(text: str, size: int) -> str:
    """Return the beginning of a file's name in at most `size` bytes of UTF-8."""
    return os.fsencode(text)[:size].decode(errors="ignore")


def _run_to_resume(path: Path, now: str) -> Run:
    is_folder = path.is_dir()
    folder, checkpoint = (path, path / "checkpoints" / LAST) if is_folder else (path.parent.parent, path)
    run = Run(folder, now, resumed=True)
    if checkpoint.is_file() and checkpoint.suffix == ".ckpt":
        try:
            run.step = _step_of(checkpoint)
        except CheckpointError as error:
            reason = str(error).rpartition("; ")[0]
            raise CheckpointError(f"{reason}; {_way_on(folder, checkpoint)}.") from error
        run.checkpoint = checkpoint
    # `last.ckpt` is written before the embeddings: where they are, it is lost
    elif is_folder and any((folder / "checkpoints" / name).is_file() for name in (PREVIOUS, EMBEDDINGS)):
        raise CheckpointError(f"There is no file '{checkpoint}'; {_way_on(folder, checkpoint)}.")
    if not (is_folder or run.checkpoint) or len(run.saved("project", "lightning")) < 2:
        hint = "" if is_folder else f" To start from learned embeddings: --embedding_manager_ckpt {quoted(str(path))}."
        raise ValueError(f"Nothing to resume: '{path}' is neither a log folder of main.py nor its last.ckpt.{hint}")
    if run.checkpoint is None:
        logger.info("'%s' has no checkpoint yet: the run starts anew.", folder)
    return run


def _step_of(checkpoint: Path) -> int:
    """Return the step that a checkpoint was saved at.

    Raises:
        CheckpointError: it is foreign, cut off, has holes, or lacks what a run needs beside the weights.
    """
    saved = read_checkpoint(checkpoint, ["state_dict", "optimizer_states", "global_step"])
    loops = saved.get("loops")
    parts = {**saved, "loops": loops.get("fit_loop") if isinstance(loops, dict) else None}
    kinds = {"state_dict": dict, "optimizer_states": list, "loops": dict, "pytorch-lightning_version": str}
    if unfit := [name for name, kind in kinds.items() if not isinstance(parts.get(name), kind) or not parts[name]]:
        raise CheckpointError(f"'{checkpoint}' has no usable {', '.join(unfit)}; use another copy of it.")
    return int(saved["global_step"])


def _way_on(folder: Path, damaged: Path) -> str:
    """Return what to do instead of resuming from the checkpoint `damaged`: the latest that is whole."""
    previous = folder / "checkpoints" / PREVIOUS
    if previous != damaged and previous.is_file():
        with suppress(CheckpointError):
            _step_of(previous)
            return f"resume from the one before it: {resume_command(previous)}"
    if (latest := latest_embeddings(folder / "checkpoints")) is not None:
        return f"start a new run with its latest embeddings: --embedding_manager_ckpt {quoted(str(latest))}"
    return "start a new run"


def latest_embeddings(checkpoints: Path) -> Path | None:
    """Return the saved embeddings of the highest step that can be read."""
    steps: dict[Path, int] = {}
    for path in checkpoints.glob("embeddings*.safetensors"):
        with suppress(EmbeddingError):
            step = load_concept(path).metadata.get("step", "")
            steps[path] = int(step) if step.isdecimal() else 0
    return max(steps, key=lambda path: (steps[path], path.name), default=None)


def check_start(path: str | Path) -> None:
    """Raise `EmbeddingError` for embeddings to start from that are damaged, naming those saved before them."""
    try:
        load_concept(path)
    except EmbeddingError as error:
        before = latest_embeddings(Path(path).parent)
        if before is None or not Path(path).is_file():
            raise
        raise EmbeddingError(f"{str(error).rstrip('.')}, or the ones saved before it: '{before}'.") from error
