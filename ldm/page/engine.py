"""One model for all tabs, and one generation at a time: jobs wait for each other in the order they came."""

from __future__ import annotations

import logging
import shutil
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from PIL import Image
from torch import Tensor

from ldm.cli.images import Drawing
from ldm.conditioning.stages import stage_of
from ldm.files.shipped import MODELS, shipped
from ldm.generate import Interrupted, facts_of, generate_image
from ldm.page.learning import EMBEDDINGS, Learning, usual_steps
from ldm.page.preview import Preview, inline
from ldm.request import PLACEHOLDER, Request, placeholder_pattern

if TYPE_CHECKING:
    from ldm.models.diffusion.latent_diffusion import DiffusionModel

logger = logging.getLogger(__name__)

LOGS = Path("logs")
LIBRARY = logging.getLogger("ldm")
TALKATIVE = "ldm.conditioning.presets"  # says which stages a preset is, and from where
PREVIEW_SHARE = 10  # a preview is made when this many times its own duration has passed since the last
AnyJob = TypeVar("AnyJob", bound="Job")
MENDABLE = (ValueError, OSError, ImportError, ArithmeticError)  # errors whose sentence is for the user


@dataclass(eq=False)
class Job:
    """Something that one thread works on, and the page reads meanwhile.

    Args:
        state: waiting, running, done, stopped or failed; opened: an image that was opened in place of being made.
        progress, outcome: the status while it runs, and when it is done.
        messages: (level, sentence) of the library, in order.
        files: what was written, a grid of them first.
    """

    state: str = "waiting"
    step: int = 0
    steps: int = 0
    progress: str = "Preparing…"
    outcome: str = "Done"
    messages: list[tuple[str, str]] = field(default_factory=list)
    error: str = ""
    files: list[Path] = field(default_factory=list)
    stopping: bool = False
    future: Future[None] = field(default_factory=Future)

    @property
    def is_running(self) -> bool:
        return self.state in ("waiting", "running")

    @property
    def share(self) -> float:
        return self.step / max(1, self.steps)

    @property
    def status(self) -> str:
        """Where it is, in a line."""
        kept = f" · kept as {self.files[0]}" if self.files else ""
        said = {"waiting": "Waiting for another tab's image…", "running": self.progress, "opened": self.outcome}
        said |= {"done": self.outcome + kept, "stopped": f"Stopped after step {self.step} of {self.steps}{kept}"}
        return said.get(self.state, "")

    def stop(self) -> None:
        """Stop before the next step; one that waits stops at once."""
        self.stopping = True
        if self.state == "waiting":
            self.state = "stopped"

    def count_step(self, what: str = "Step", more: str = "") -> None:
        """Count a step that is made; raises `Stopped` if the user has asked for it."""
        if self.stopping:
            raise Stopped
        self.step += 1
        self.progress = f"{what} {self.step} of {self.steps}{more}"

    def do(self, engine: Engine) -> None:
        """Do the work, in the engine's thread."""


@dataclass(eq=False)
class ImageJob(Job):
    """A request on its way to an image.

    Args:
        keep: save the image.
        preview: what the last step predicts, then an image that is not saved; a URL that holds it.
        previews: stage -> what a step in it predicts.
    """

    request: Request = field(default_factory=Request)
    keep: bool = True
    preview: str = ""
    previews: dict[int, str] = field(default_factory=dict)
    image: Image.Image | None = None

    def do(self, engine: Engine) -> None:
        """Generate; batches that are finished when it is stopped are kept, as after Ctrl-C."""
        start, next_preview, model = time.monotonic(), 0.0, engine.model

        def after(step: int, t: int, x: Tensor, x_0: Tensor) -> None:
            nonlocal next_preview
            stage, now = int(stage_of(t, model.num_stages, model.num_timesteps)), time.monotonic()
            if now >= next_preview or stage not in self.previews:
                self.preview = self.previews[stage] = inline(engine.preview(x_0))
                next_preview = time.monotonic() + PREVIEW_SHARE * (time.monotonic() - now)
            self.count_step(more=f" · t {t} · stage {stage}")

        try:
            self.image = generate_image(self.request, model, after, progress=False)
            self.outcome = f"Done in {time.monotonic() - start:.1f} s"
        except Interrupted as stop:
            self.image = stop.image
            raise Stopped from stop
        finally:
            if self.image is not None and self.keep:
                self.files = Drawing(engine.model, engine.setup, engine.outdir).save(self.image)
            elif self.image is not None:
                self.preview = inline(self.image)


class Stopped(KeyboardInterrupt):
    """The user has stopped a job."""


class Engine:
    """A model with what its images are recorded with, and the thread that generates.

    Args:
        setup: config, ckpt and dtype, which an image records so that the command line repeats it.
        outdir: where images are kept.
        trust: the flags for what configurations may do, which learning is given, too.
    """

    def __init__(
        self, model: DiffusionModel, setup: Mapping[str, str], outdir: Path, trust: Sequence[str] = ()
    ) -> None:
        self.model, self.setup, self.outdir, self.trust = model, dict(setup), outdir, trust
        self.facts = facts_of(model)
        self.windows = model.presets
        self.most_tokens = int(model.cond_stage_model.max_length) - 2  # of a text that are read, without start and end
        self.preview = Preview(model)
        self.uploads = Path(tempfile.mkdtemp(prefix="prospect-page-"))
        self.runs: dict[Path, Learning] = {}  # log folder -> the latest that learns there
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="generate")
        logging.getLogger(TALKATIVE).setLevel(logging.INFO)

    @property
    def title(self) -> str:
        """What the base model is called."""
        ckpt = Path(self.setup["ckpt"])
        return "small model" if ckpt == Path(shipped(MODELS["demo"].ckpt)) else ckpt.stem

    @cached_property
    def methods(self) -> dict[str, int]:
        """The training variants that there are for this model, each with the steps that it takes."""
        return usual_steps(Path(self.setup["config"]), self.trust)

    def close(self) -> None:
        """Let what is being learned save and end, drop what waits, and the files that were uploaded."""
        for run in self.runs.values():
            run.stop()
        self._pool.shutdown(wait=False, cancel_futures=True)
        shutil.rmtree(self.uploads, ignore_errors=True)

    def concepts(self, uploaded: Sequence[str] = ()) -> dict[str, str]:
        """File -> what it is called: `uploaded`, those beside the checkpoint, those learned here, the latest first."""
        beside = sorted((Path(self.setup["ckpt"]).parent / "concepts").glob("*.safetensors"))
        learned = [*LOGS.glob(f"*/{EMBEDDINGS}"), *LOGS.glob(f"*/*/{EMBEDDINGS}")]
        learned.sort(key=lambda path: -path.stat().st_mtime)
        return {str(path): concept_name(path) for path in (*map(Path, uploaded), *beside, *learned)}

    def reference_of(self, concept: str) -> Path | None:
        """The image that a concept was learned from, where it ships beside the checkpoint."""
        name = Path(concept).stem
        path = Path(self.setup["ckpt"]).parent / "references" / name / f"{name}.png"
        return path if path.is_file() else None

    def tokens(self, text: str, placeholders: Sequence[str] = ()) -> int:
        """How many tokens a text is; a concept counts as one."""
        pieces = placeholder_pattern([PLACEHOLDER, *placeholders]).split(text)
        tokenizer = self.model.cond_stage_model.tokenizer
        texts = [tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"] for piece in pieces[::2]]
        return sum(map(len, texts)) + len(pieces[1::2])

    def submit(self, request: Request, keep: bool = True) -> ImageJob:
        """Check a request and queue it; its image is saved if it is to be kept.

        Raises:
            ValueError: the model cannot do it.
        """
        request = request.for_model(self.facts)
        return self.queue(ImageJob(request=request, keep=keep, steps=request.n_iter * request.denoising_steps))

    def queue(self, job: AnyJob) -> AnyJob:
        """Do a job when those before it are over; returns it."""
        job.future = self._pool.submit(self._work, job)
        return job

    def _work(self, job: Job) -> None:
        if job.stopping:
            return
        job.state, state, ear = "running", "failed", _Ear(job)
        LIBRARY.addHandler(ear)
        try:
            job.do(self)
            state = "done"
        except Stopped:
            state = "stopped"
        except MENDABLE as error:
            job.error = str(error)
        except Exception as error:
            logger.exception("A job of the page failed.")
            job.error = f"{type(error).__name__}: {error}"
        finally:
            LIBRARY.removeHandler(ear)
            job.state = state


class _Ear(logging.Handler):
    """Adds what the library logs in this thread to the messages of a job."""

    def __init__(self, job: Job) -> None:
        super().__init__(logging.INFO)
        self.job, self.thread = job, threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        said = (record.levelname.lower(), record.getMessage())
        shown = record.levelno >= logging.WARNING or record.name == TALKATIVE
        if shown and record.thread == self.thread and said not in self.job.messages:
            self.job.messages.append(said)


def concept_name(path: Path) -> str:
    """What a concept is called: its file, or of a run its folder."""
    return path.parents[1].name if path.name == EMBEDDINGS.name else path.stem
