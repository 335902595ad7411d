"""The log folder of a run: a new one of its own, or the one of the run to go on with."""

from __future__ import annotations

import argparse
import logging
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from pytorch_lightning.utilities import rank_zero_only

from ldm.checkpoint import CheckpointError
from ldm.embeddings import EmbeddingError, load_concept
from ldm.files.tensors import read_checkpoint
from ldm.files.writing import check_writable, remove_unfinished, writing_to
from ldm.training.callbacks import LAST, PREVIOUS

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """Where a run logs, and what it resumes from.

    Args:
        resumed: whether the folder and its configuration are of an earlier start.
        checkpoint: None for a new run, and for one that was ended before it saved anything.
        exact: whether the folder is taken as it is, or is given a number where there already is one.
    """

    folder: Path
    started: str
    resumed: bool = False
    checkpoint: Path | None = None
    exact: bool = True

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def configs(self) -> Path:
        return self.folder / "configs"

    @property
    def resume_command(self) -> str:
        return resume_command(self.folder)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Make the folder, which is no other run's, and clear what a killed process left half written in it.

        Of several processes only the first does that. What was made and stays empty is removed again.

        Raises:
            WriteError: the folder cannot be made.
        """
        if rank_zero_only.rank != 0:
            yield
            return
        made = [place for place in self.folder.parents if not place.exists()]
        with writing_to(self.folder):
            is_new = self._make()
            for place in (self.checkpoints, self.configs, self.folder / "images"):
                remove_unfinished(place)  # and nowhere else: the folder may hold more than the run
        try:
            yield
        finally:
            if is_new:
                with suppress(OSError):
                    for place in (self.folder, *made):
                        place.rmdir()

    def _make(self) -> bool:
        """Whether the folder was made; False where it is there and is the one that was asked for."""
        wanted, number = self.folder, 1
        wanted.parent.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                self.folder.mkdir()  # of two runs that start in the same second only one can make it
                return True
            except FileExistsError:
                if self.exact and wanted.is_dir():
                    return False
                if self.exact:
                    raise
            number += 1
            self.folder = wanted.with_name(f"{wanted.name}-{number}")


def resume_command(place: Path) -> str:
    """What to type to go on with the run in a log folder, or from a checkpoint."""
    return f"python main.py -r {shlex.quote(str(place))} -t"


def open_run(options: argparse.Namespace) -> Run:
    """The log folder of a new run, which is not made yet, or of the run to resume.

    Raises:
        ValueError: there is nothing to resume at the place given, or it is damaged; a new run would overwrite another.
        WriteError: the place has no room or gives no right.
    """
    now = datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
    if options.resume:
        run, flag = _run_to_resume(Path(options.resume), now), "-r"
    elif options.project:
        run, flag = Run(Path(options.project), now), "-p"
        if any((run.checkpoints / name).is_file() for name in (LAST, PREVIOUS)):
            raise ValueError(
                f"'{run.folder}' holds a run already: go on with it ({run.resume_command}) or name another folder."
            )
    else:
        data = Path(options.data_root).resolve().name if options.data_root and options.datadir_in_name else ""
        name = options.name or Path(options.base[0]).stem
        run, flag = Run(Path(options.logdir) / f"{data}{now}_{name}{options.postfix}", now, exact=False), "-l"
    check_writable(run.folder, flag)
    return run


def _run_to_resume(path: Path, now: str) -> Run:
    folder = path if path.is_dir() else path.parent.parent
    checkpoint = folder / "checkpoints" / LAST if path.is_dir() else path
    if checkpoint.is_file() and checkpoint.suffix == ".ckpt":
        try:
            _check_whole(checkpoint)
        except CheckpointError as error:
            reason = str(error).rpartition("; ")[0]
            raise CheckpointError(f"{reason}; {_way_on(folder, checkpoint)}.") from error
        if not any((folder / "configs").glob("*-project.yaml")):
            raise ValueError(f"'{folder}' is no run of main.py (it has no configs/); -r takes a log folder of it.")
        return Run(folder, now, resumed=True, checkpoint=checkpoint)
    if path.is_dir() and (folder / "checkpoints" / PREVIOUS).is_file():
        raise CheckpointError(f"There is no file '{checkpoint}'; {_way_on(folder, checkpoint)}.")
    if path.is_dir() and all(any(folder.glob(f"configs/*-{kind}.yaml")) for kind in ("project", "lightning")):
        logger.info("'%s' has no checkpoint yet: the run begins anew.", folder)
        return Run(folder, now, resumed=True)
    if path.is_file():
        raise ValueError(
            f"Nothing to resume: '{path}' is neither a log folder nor its last.ckpt. To start from learned embeddings: "
            f"--embedding_manager_ckpt {shlex.quote(str(path))}."
        )
    raise ValueError(f"Nothing to resume: there is no file '{checkpoint}'; -r takes a log folder of main.py.")


def _check_whole(checkpoint: Path) -> None:
    """Raise `CheckpointError` for a file that is foreign, cut off, or has holes."""
    read_checkpoint(checkpoint, ["state_dict", "optimizer_states", "global_step"])


def _way_on(folder: Path, damaged: Path) -> str:
    """What to do instead of going on from the checkpoint `damaged`: the latest that is whole."""
    previous = folder / "checkpoints" / PREVIOUS
    if previous != damaged and previous.is_file():
        with suppress(CheckpointError):
            _check_whole(previous)
            return f"go on from the one before it: {resume_command(previous)}"
    if (latest := latest_embeddings(folder / "checkpoints")) is not None:
        return f"begin a new run with its latest embeddings: --embedding_manager_ckpt {latest}"
    return "begin a new run"


def latest_embeddings(checkpoints: Path) -> Path | None:
    """The `embeddings_gs-N.safetensors` of the highest step that can be read."""
    numbered = {int(p.stem.rpartition("-")[2]): p for p in checkpoints.glob("embeddings_gs-*[0-9].safetensors")}
    for step in sorted(numbered, reverse=True):
        with suppress(EmbeddingError):
            load_concept(numbered[step])
            return numbered[step]
    return None


def check_start(path: str | Path) -> None:
    """Raise `EmbeddingError` for embeddings to start from that are damaged, naming those saved before them."""
    try:
        load_concept(path)
    except EmbeddingError as error:
        before = latest_embeddings(Path(path).parent)
        if before is None or not Path(path).is_file():
            raise
        raise EmbeddingError(f"{str(error).rstrip('.')}, or the ones saved before it: '{before}'.") from error
