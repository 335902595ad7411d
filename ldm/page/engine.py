"""One model for all tabs, and one generation at a time: jobs wait for each other in the order they came."""

from __future__ import annotations

import logging
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from torch import Tensor

from ldm.cli.sample import save_images
from ldm.conditioning.presets import Windows
from ldm.conditioning.stages import stage_of
from ldm.generate import Interrupted, facts_of, generate_image
from ldm.page.learning import EMBEDDINGS, Learning
from ldm.page.preview import Preview
from ldm.request import PLACEHOLDER, Request, placeholder_pattern

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion

logger = logging.getLogger(__name__)

LOGS = Path("logs")
LIBRARY = "ldm"
TALKATIVE = "ldm.conditioning.presets"  # says which stages a preset is, and from where
PREVIEW_SHARE = 10  # a preview is made when this many times its own duration has passed since the last
MENDABLE = (ValueError, OSError, ImportError, ArithmeticError)  # errors whose sentence is for the user


@dataclass
class Job:
    """One request on its way to an image; read by the page while another thread works on it.

    Args:
        state: waiting, running, done, stopped or failed.
        previews: stage -> what a step in it predicts.
        messages: (level, sentence) of the library, in order.
        version: grows with every change.
    """

    request: Request
    state: str = "waiting"
    step: int = 0
    steps: int = 0
    timestep: int = 0
    stage: int | None = None
    seconds: float = 0.0
    preview: Image.Image | None = None
    previews: dict[int, Image.Image] = field(default_factory=dict)
    messages: list[tuple[str, str]] = field(default_factory=list)
    error: str = ""
    image: Image.Image | None = None
    files: list[Path] = field(default_factory=list)
    version: int = 0
    stopping: bool = False
    keep: bool = True

    @property
    def is_over(self) -> bool:
        return self.state in ("done", "stopped", "failed")

    def stop(self) -> None:
        """Stop before the next step; one that waits stops at once."""
        self.stopping = True
        if self.state == "waiting":
            self.change(state="stopped")

    def change(self, **values: Any) -> None:
        for name, value in values.items():
            setattr(self, name, value)
        self.version += 1


class Stopped(KeyboardInterrupt):
    """The user has stopped a generation; finished batches are kept, as after Ctrl-C."""


class Engine:
    """A model with what its images are recorded with, and the thread that generates.

    Args:
        setup: config, ckpt and dtype, which an image records so that the command line repeats it.
        outdir: where images are kept.
    """

    def __init__(self, model: LatentDiffusion, setup: Mapping[str, str], outdir: Path) -> None:
        self.model, self.setup, self.outdir = model, dict(setup), outdir
        self.facts = facts_of(model)
        self.windows = model.presets if isinstance(model.presets, Windows) else Windows(model.presets)
        self.preview = Preview(model)
        self.uploads = Path(tempfile.mkdtemp(prefix="prospect-page-"))
        self.runs: list[Learning] = []
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="generate")
        logging.getLogger(TALKATIVE).setLevel(logging.INFO)

    def close(self) -> None:
        """Let what is being learned save and end, drop what waits, and the files that were uploaded."""
        for run in self.runs:
            run.stop()
        self._pool.shutdown(wait=False, cancel_futures=True)
        shutil.rmtree(self.uploads, ignore_errors=True)

    def concepts(self) -> list[str]:
        """The concept files that ship beside the checkpoint, then those that were learned here, the latest first."""
        beside = sorted((Path(self.setup["ckpt"]).parent / "concepts").glob("*.safetensors"))
        learned = [*LOGS.glob(f"*/{EMBEDDINGS}"), *LOGS.glob(f"*/*/{EMBEDDINGS}")]
        return [str(path) for path in (*beside, *sorted(learned, key=lambda path: -path.stat().st_mtime))]

    def concept_names(self, uploaded: Sequence[str] = ()) -> dict[str, str]:
        """File -> what it is called: `concepts`, and those that were uploaded."""
        return {file: concept_name(Path(file)) for file in (*uploaded, *self.concepts())}

    def reference_of(self, concept: str) -> Path | None:
        """The image that a concept was learned from, where it ships beside the checkpoint."""
        name = Path(concept).stem
        path = Path(self.setup["ckpt"]).parent / "references" / name / f"{name}.png"
        return path if path.is_file() else None

    def tokens(self, text: str) -> int:
        """How many tokens a text is; a concept counts as one."""
        pieces = placeholder_pattern([PLACEHOLDER]).split(text)
        tokenizer = self.model.cond_stage_model.tokenizer
        return sum(len(tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]) for piece in pieces)

    def submit(self, request: Request, keep: bool = True) -> Job:
        """Check a request and queue it; its image is saved if it is to be kept.

        Raises:
            ValueError: the model cannot do it.
        """
        job = Job(request.for_model(self.facts), keep=keep)
        job.steps = job.request.n_iter * job.request.denoising_steps
        self._pool.submit(self._work, job)
        return job

    def _work(self, job: Job) -> None:
        if job.stopping:
            return
        job.change(state="running")
        start = time.monotonic()
        with heard(job):
            try:
                image = generate_image(job.request, self.model, _Watch(job, self), progress=False)
                self._keep(job, image, "done", start)
            except Interrupted as stop:
                self._keep(job, stop.picture, "stopped", start)
            except Stopped:
                job.change(state="stopped")
            except MENDABLE as error:
                job.change(state="failed", error=str(error))
            except Exception as error:
                logger.exception("The page's request failed.")
                job.change(state="failed", error=f"{type(error).__name__}: {error}")

    def _keep(self, job: Job, image: Image.Image, state: str, start: float) -> None:
        """Save an image with all that repeats it, if it is to be kept."""
        files = save_images(image, {}, self.setup, self.outdir) if job.keep else []
        job.change(state=state, image=image, files=files, seconds=time.monotonic() - start)


class _Watch:
    """The callback of a generation: counts, shows and stops."""

    def __init__(self, job: Job, engine: Engine) -> None:
        self.job, self.engine = job, engine
        self._count, self._next = 0, 0.0

    def __call__(self, step: int, t: int, x: Tensor, x_0: Tensor) -> None:
        job, model = self.job, self.engine.model
        if job.stopping:
            raise Stopped
        self._count += 1
        stage = int(stage_of(t, model.num_stages, model.num_timesteps))
        now = time.monotonic()
        if now >= self._next or stage not in job.previews:
            job.preview = job.previews[stage] = self.engine.preview(x_0)
            cost = time.monotonic() - now
            self._next = time.monotonic() + PREVIEW_SHARE * cost
        job.change(step=self._count, timestep=t, stage=stage)


class _Ear(logging.Handler):
    def __init__(self, job: Job) -> None:
        super().__init__(logging.INFO)
        self.job, self.thread = job, threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        said = (record.levelname.lower(), record.getMessage())
        shown = record.levelno >= logging.WARNING or record.name == TALKATIVE
        if shown and record.thread == self.thread and said not in self.job.messages:
            self.job.messages.append(said)
            self.job.change()


def concept_name(path: Path) -> str:
    """What a concept is called: its file, or of a run its folder."""
    return path.parents[1].name if path.name == EMBEDDINGS.name else path.stem


@contextmanager
def heard(job: Job) -> Iterator[None]:
    """Add what the library logs in this thread to the messages of a job."""
    ear = _Ear(job)
    logging.getLogger(LIBRARY).addHandler(ear)
    try:
        yield
    finally:
        logging.getLogger(LIBRARY).removeHandler(ear)
