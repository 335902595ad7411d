"""A run of `prospect learn` in a process of its own, and what its log folder says of it so far.

Stopping is Ctrl-C, so the run saves and can be resumed; memory and crashes are its own. What another page needs to show
and resume it lies beside it: the images, what it prints, and the number of its process.
"""

from __future__ import annotations

import csv
import os
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from subprocess import DEVNULL, STDOUT, Popen

from omegaconf import DictConfig, OmegaConf

from ldm.config import ConfigError, load_config
from ldm.embeddings import EmbeddingError, load_concept
from ldm.files.texts import slug
from ldm.files.writing import is_locked, lock

PACKAGES = Path(__file__).parents[2]  # where the process finds this program
PROGRAM = (sys.executable, "-m", "ldm.cli.main", "learn")
LOGDIR = Path("logs") / "page"
EMBEDDINGS = Path("checkpoints") / "embeddings.safetensors"
STAGE_LOSS = "train/loss_stage_"
# Training variants: name -> the configuration that lies beside the base one, '' for the base alone.
METHODS = {
    "ProSpect": "",
    "ProSpect, fast": "fast.yaml",
    "Textual Inversion": "ti.yaml",
    "P+ (XTI)": "xti.yaml",
    "NeTI": "neti.yaml",
    "CatVersion": "catversion.yaml",
}
RESOLVERS = "--allow_resolvers"
USUAL_STEPS = 300  # where a configuration says none
IN_A_CAPTION = "CatVersion"  # is learned in a caption that names the class
STOPPED = (130, -signal.SIGINT)  # exit codes after Ctrl-C, which has come while it trained or before
MOST_ERROR = 600  # characters of what a process said at last
OFTEN = ("--log_every_n_steps", "5")


@dataclass
class Learning:
    """A run that learns, and its log folder.

    Args:
        steps: that it is to take.
        process: None where another page has started it.
    """

    folder: Path
    steps: int
    process: Popen[bytes] | None = None
    stopping: bool = False

    @property
    def given(self) -> Path:
        """Where the things lie that the page keeps for the run, whose own folder is to be empty when it starts."""
        return self.folder.parent / "given" / self.folder.name

    @property
    def output(self) -> Path:
        """The file that holds what the process prints."""
        return self.given / "output.txt"

    @property
    def is_running(self) -> bool:
        """Whether a process learns there: the one of this run, or another that has resumed it."""
        return (self.process is not None and self.process.poll() is None) or is_locked(self.output)

    @property
    def step(self) -> int:
        """The last that was logged or saved."""
        saved = 0
        if self.concept is not None:
            with suppress(EmbeddingError):
                saved = int(load_concept(self.concept).metadata.get("step", 0))
        return max([saved, *(step for step, _ in self.losses())])

    @property
    def share(self) -> float:
        return self.step / max(1, self.steps)

    @property
    def status(self) -> str:
        """Where it is, in a line."""
        step = self.step
        if not self.is_running:
            state = "Failed" if self.error else "Complete" if step >= self.steps else "Stopped"
        elif self.stopping:
            return "Stopping after this step…"
        else:
            state = "Learning" if self.losses() else "Starting…"
        return f"{state} · step {step} of {self.steps} · {self.folder}"

    @property
    def concept(self) -> Path | None:
        """The embeddings, once they are saved."""
        path = self.folder / EMBEDDINGS
        return path if path.is_file() else None

    @property
    def error(self) -> str:
        """The sentence that it ended with; empty while it runs, and where it ended well or was stopped."""
        if self.process is None or self.process.poll() in (None, 0, *STOPPED):
            return ""
        lines = [line for line in self.output.read_text(errors="replace").splitlines() if line.strip()]
        last = lines[-1] if lines else f"The process ended with code {self.process.returncode}."
        return last.removeprefix("prospect learn: error: ")[-MOST_ERROR:]

    def start(self, words: Sequence[str]) -> Learning:
        """Start a command that learns here; returns the run."""
        self.given.mkdir(parents=True, exist_ok=True)
        paths = os.pathsep.join(filter(None, [str(PACKAGES), os.environ.get("PYTHONPATH")]))
        env = os.environ | {"PYTHONPATH": paths}
        with self.output.open("wb") as stream:
            lock(stream)  # for as long as the process lives, to which Ctrl-C in the terminal comes through the page
            self.process = Popen(words, stdin=DEVNULL, stdout=stream, stderr=STDOUT, start_new_session=True, env=env)
        (self.given / "pid").write_text(str(self.process.pid))
        return self

    def resumed(self, steps: int, trust: Sequence[str] = ()) -> Learning:
        """Resume it, up to `steps`; returns the new run."""
        words = [*PROGRAM, "-r", str(self.folder), "--max_steps", str(steps), *OFTEN, *trust]
        return Learning(self.folder, steps).start(words)

    def stop(self) -> None:
        """Let the step finish, save and end; on Windows, where no process takes Ctrl-C from another, at once."""
        self.stopping = True
        if self.is_running:
            pid = int((self.given / "pid").read_text())
            os.kill(pid, signal.SIGTERM if sys.platform == "win32" else signal.SIGINT)

    def losses(self) -> list[tuple[int, float]]:
        """The loss by step, of all starts of the run."""
        return [(int(row["step"]) + 1, float(row["train/loss"])) for row in self._rows() if row.get("train/loss")]

    def stage_losses(self) -> dict[int, float]:
        """The mean loss of each stage that was met, over the whole run."""
        found: dict[int, list[float]] = {}
        for row in self._rows():
            for name, value in row.items():
                if name and name.startswith(STAGE_LOSS) and value:
                    found.setdefault(int(name.removeprefix(STAGE_LOSS)), []).append(float(value))
        return {stage: sum(values) / len(values) for stage, values in sorted(found.items())}

    def _rows(self) -> list[dict[str, str]]:
        files = sorted((self.folder / "csv").glob("*/metrics.csv"))
        return [row for file in files for row in csv.DictReader(file.read_text().splitlines())]

    def samples(self) -> list[Path]:
        """The sample images, the earliest first."""
        return sorted((self.folder / "images" / "train").glob("samples_scaled_gs-*.jpg"))


def unfinished() -> list[Learning]:
    """The page's runs that are running, or have not taken all their steps; the latest first."""
    settings = {path.parents[1]: path for path in sorted(LOGDIR.glob("*/configs/*-lightning.yaml"))}
    runs = []
    for folder, path in sorted(settings.items(), key=lambda pair: pair[1].name, reverse=True):
        with suppress(ConfigError):
            steps = OmegaConf.select(_load(path, ()), "lightning.trainer.max_steps") or USUAL_STEPS
            runs.append(Learning(folder, int(steps)))
    return [run for run in runs if run.is_running or run.step < run.steps]


@dataclass
class LearnForm:
    """What is filled in on the tab Learn, and the run that is shown there.

    Args:
        init_word: the word that learning starts from; of CatVersion the class.
        caption: what is learned in, with `*` for the concept.
    """

    images: list[Path] = field(default_factory=list)
    name: str = ""
    init_word: str = ""
    caption: str = ""
    method: str = next(iter(METHODS))
    steps: int | None = None
    run: Learning | None = None

    def start(self, setup: Mapping[str, str], trust: Sequence[str] = ()) -> Learning:
        """Learn what is filled in, in a new folder.

        Raises:
            ValueError: there is no image, a number that cannot be used, or no configuration for learning.
        """
        if not self.images or not self.steps or self.steps < 1:
            raise ValueError("Choose the images to learn from, and at least one step.")
        self.steps = int(self.steps)  # which a number's input has made a fraction
        run = Learning(LOGDIR / f"{slug(self.name or 'concept')}-{datetime.now():%Y-%m-%dT%H-%M-%S}", self.steps)
        images = run.given / "images"
        images.mkdir(parents=True)
        for number, path in enumerate(self.images):
            shutil.copyfile(path, images / f"{number}-{path.name}")
        return run.start(self.command(images, run.folder, setup, trust))

    def command(self, images: Path, folder: Path, setup: Mapping[str, str], trust: Sequence[str] = ()) -> list[str]:
        """Return the command that learns, as a user would type it.

        Args:
            images: the folder of the images.
            folder: the log folder, which is new.
            trust: the flags for what the configurations may do, which the page has.

        Raises:
            ConfigError: the page's configuration is for generating, and there is none for learning beside it.
        """
        base = learning_config(Path(setup["config"]), trust)
        bases = [str(base), *([str(base.with_name(METHODS[self.method]))] if METHODS[self.method] else [])]
        words = [*PROGRAM, "--base", *bases, "--actual_resume", setup["ckpt"], *trust]
        words += ["-p", str(folder), "--data_root", str(images), "--max_steps", str(self.steps), *OFTEN]
        caption, init_word = self.caption.strip(), self.init_word.strip()
        if self.method == IN_A_CAPTION and not caption:
            caption, init_word = f"a {init_word or 'thing'}", ""
        words += [f"--caption={caption}"] if caption else []
        return words + ([f"--init_word={init_word}"] if init_word else [])


def learning_config(config: Path, trust: Sequence[str] = ()) -> Path:
    """Return the configuration itself, if it says what to learn from, or the one for learning beside it.

    Raises:
        ConfigError: there is none.
    """
    for path in (config, *sorted(config.parent.glob("*finetune.yaml"))):
        if "data" in _load(path, trust):
            return path
    example = "configs/stable-diffusion/v1-finetune.yaml"
    raise ConfigError(f"'{config}' is for generating; to learn, start the page with a --config such as {example}.")


def usual_steps(config: Path, trust: Sequence[str] = ()) -> dict[str, int]:
    """Return the training variants that there are for a configuration, each with its steps; of a bad one none."""
    with suppress(ConfigError):  # its sentence is shown when it is to learn
        base = learning_config(config, trust)
        files = {method: base.with_name(name) if name else base for method, name in METHODS.items()}
        found = {method: _load(file, trust) for method, file in files.items() if file.is_file()}
        steps = {method: OmegaConf.select(said, "lightning.trainer.max_steps") for method, said in found.items()}
        return {method: count or steps["ProSpect"] or USUAL_STEPS for method, count in steps.items()}
    return {}


def _load(path: Path, trust: Sequence[str]) -> DictConfig:
    return load_config(path, flag="--config", resolvers=RESOLVERS in trust)
