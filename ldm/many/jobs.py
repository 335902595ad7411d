"""Concepts to learn, one job each: read from a folder or a CSV, and noted beside what comes of them.

In the folder of the results lie, for each concept, `NAME.safetensors` when it is learned, and its run `runs/NAME` with
`runs/NAME.log` and, in `runs/NAME.json`, what was asked for.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ldm.checkpoint import base_model_of
from ldm.config import nearest
from ldm.data.personalized import find_images
from ldm.files.base_model import FINGERPRINT
from ldm.files.texts import check_file_name, read_table
from ldm.files.writing import replace_bytes, replace_text
from ldm.methods import find_method
from ldm.request import shown
from ldm.training.runs import EMBEDDINGS, Run

RESULTS = ("concepts.csv", "concepts.png")  # what is written of all concepts together
RETRIES = 2  # of a process that was killed
METHOD = "model.params.personalization_config.params.method"


@dataclass(frozen=True)
class Job:
    """A concept to learn.

    Args:
        image: an image, or a folder with images of the one concept.
        name: of the concept's file.
        init_word, method, steps: in place of what the configuration says.
    """

    image: Path
    name: str
    init_word: str | None = None
    method: str | None = None
    steps: int | None = None

    def arguments(self) -> list[str]:
        """Return the flags of `main.py` that say this; where the images lie comes from elsewhere."""
        arguments = ["--init_word", self.init_word] if self.init_word else []
        arguments += ["--max_steps", str(self.steps)] if self.steps else []
        return arguments + ([f"{METHOD}={self.method}"] if self.method else [])


@dataclass(frozen=True)
class Setting:
    """Settings that all concepts share: configurations, base model, further values as `key=value`."""

    base: tuple[Path, ...]
    ckpt: Path
    overrides: tuple[str, ...] = ()

    def command(self, job: Job, run: Path) -> list[str]:
        """Return the arguments of `main.py` that learn a concept, or resume its run."""
        if Run(run, "").saved("project"):
            return ["-r", str(run), "-t"]
        given = ["--actual_resume", str(self.ckpt), "--data_root", str(job.image), "-p", str(run)]
        return ["--base", *map(str, self.base), "-t", *given, *job.arguments(), *self.overrides]


@dataclass(frozen=True)
class Learned:
    """The result of a job: the file's content, or in `error` why there is none."""

    job: Job
    seconds: float
    concept: bytes | None = None
    error: str = ""


# --- what to learn -------------------------------------------------------------------------------------------------


def read_jobs(images: Path, defaults: Mapping[str, Any] | None = None) -> list[Job]:
    """Return the jobs of a folder (each image or sub-folder in it is a concept) or of a CSV.

    The CSV's columns are those of `Job`; only `image` must be there, relative to the CSV.

    Args:
        defaults: fields of `Job` where the CSV does not say them.

    Raises:
        ValueError: with the line, where it is the CSV's.
    """
    if images.is_file() and images.suffix.lower() == ".csv":
        jobs = _read_csv(images)
    elif images.is_dir():
        found = [path for path in sorted(images.iterdir()) if path.is_dir() and not path.name.startswith(".")]
        found = found or find_images(images)
        jobs = [Job(path, path.name if path.is_dir() else path.stem) for path in found]
    else:
        jobs = []
    if not jobs:
        remedy = "give a folder with a folder of images for each concept, or a .csv file"
        raise ValueError(f"There is nothing to learn in '{images}'; {remedy}.")
    jobs = [replace(job, **{k: v for k, v in (defaults or {}).items() if getattr(job, k) is None}) for job in jobs]
    _check(jobs, images)
    return jobs


def _check(jobs: Sequence[Job], images: Path) -> None:
    seen: dict[str, Job] = {}
    for job in jobs:
        try:
            check_file_name(job.name)
            find_method(job.method or "prospect")
        except ValueError as error:
            raise ValueError(f"'{images}', concept {shown(job.name)}: {error}") from error
        own = unicodedata.normalize("NFC", job.name.casefold())
        for name in (own, f"{own}.json", f"{own}.log"):  # what lies in `runs`
            if (other := seen.setdefault(name, job)) is not job:
                both = f"'{other.name}' of '{other.image}' and '{job.name}' of '{job.image}'"
                raise ValueError(f"{both} are the same files; rename one of them.")


def _read_csv(path: Path) -> list[Job]:
    known = [field.name for field in fields(Job)]
    rows = read_table(path, "IMAGES", ["image"])
    for column in rows[0][1] if rows else ():
        if column not in known:
            raise ValueError(f"'{path}' has an unknown column '{column}'{nearest(column, known)}")
    return [_job(row, path, line) for line, row in rows]


def _job(row: dict[str, str], path: Path, line: int) -> Job:
    """Return the job in a line of a CSV."""
    values: dict[str, Any] = {key: value.strip() for key, value in row.items() if value.strip()}
    where, steps = f"'{path}', line {line}", values.get("steps", "1")
    if not re.fullmatch(r"0*[1-9]\d{0,8}", steps):
        raise ValueError(f"{where}: steps must be a whole number of at least 1, not {shown(steps)}.")
    image = path.parent / Path(values.get("image", "")).expanduser()
    if "image" not in values or not os.path.exists(image):
        raise ValueError(f"{where}: there is no image '{values.get('image', '')!s:.300}'.")
    own = {"image": image, "name": values.get("name", image.name if image.is_dir() else image.stem)}
    return Job(**values | own | ({"steps": int(steps)} if "steps" in values else {}))


def unfinished(jobs: Sequence[Job], setting: Setting, out: Path) -> list[Job]:
    """Return the jobs that are still to be done, and note what each is.

    Raises:
        ValueError: a concept that was learned, or started, had other images or settings, a file is someone else's, or a
            folder has no image.
    """
    theirs = [] if (out / "runs").is_dir() else [out / name for name in RESULTS]
    theirs += [finished(out, job) for job in jobs if not noted(out, job).is_file()]
    if theirs := [file for file in theirs if file.exists()]:
        raise ValueError(f"'{theirs[0]}' is there already and was not written by this command; use another --out.")
    shared = {
        "base": [hashlib.sha256(path.read_bytes()).hexdigest() for path in setting.base],
        "overrides": list(setting.overrides),
        "base_model": base_model_of(setting.ckpt)[FINGERPRINT],
    }
    asked: dict[str, Any] = {}
    for job in jobs:
        images = hashlib.sha256(b"".join(hashlib.sha256(p.read_bytes()).digest() for p in find_images(job.image)))
        values = {key: value for key, value in asdict(job).items() if key != "image"}
        asked[job.name] = values | {"images": images.hexdigest()} | shared
        if (note := noted(out, job)).is_file() and _note(note) != asked[job.name]:
            remedy = f"'{finished(out, job)}', '{run_of(out, job)}', '{log_of(out, job)}' and '{note}'"
            what = f"'{job.name}' was started in '{out}' with other images or settings"
            raise ValueError(f"{what}; use another --out, or remove {remedy}.")
    (out / "runs").mkdir(parents=True, exist_ok=True)
    for job in jobs:
        if not noted(out, job).is_file():
            replace_text(noted(out, job), json.dumps(asked[job.name], indent=1))
    return [job for job in jobs if not finished(out, job).is_file()]


def _note(file: Path) -> object:
    """What was asked for; None where it cannot be read, as after damage."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None


def finished(out: Path, job: Job) -> Path:
    return out / f"{job.name}.safetensors"


def noted(out: Path, job: Job) -> Path:
    return out / "runs" / f"{job.name}.json"


def run_of(out: Path, job: Job) -> Path:
    return out / "runs" / job.name


def log_of(out: Path, job: Job) -> Path:
    return out / "runs" / f"{job.name}.log"


def save(learned: Learned, out: Path) -> Learned:
    """Put a concept where the results are."""
    if learned.concept is not None:
        replace_bytes(finished(out, learned.job), learned.concept)
    return learned


def result(job: Job, run: Path, code: int, log: str, seconds: float) -> Learned:
    """Return what a run has learned, or the sentence with which it failed."""
    if code == 0:
        return Learned(job, seconds, (run / "checkpoints" / EMBEDDINGS).read_bytes())
    lines = [line for line in log.splitlines() if line.strip()] or [f"exit code {code}"]
    error = lines[-1].partition("error: ")[2] or lines[-1]
    return Learned(job, seconds, error=KILLED if code < 0 else error)


LEFT = "another process learns it, of a command that runs or was killed; wait until it is finished"
KILLED = f"its process was killed {1 + RETRIES} times, most likely for want of memory; use fewer --workers"
