"""A run of `prospect learn` in a process of its own, and what its log folder says of it so far.

Stopping is Ctrl-C, so the run saves and can be resumed; memory and crashes are its own.
"""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from ldm.config import ConfigError, load_config

PACKAGES = Path(__file__).parents[2]  # where the process finds this program
PROGRAM = (sys.executable, "-m", "ldm.cli.main", "learn")
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


@dataclass
class Learning:
    """A process that learns, and its log folder.

    Args:
        output: the file that holds what it prints.
    """

    folder: Path
    steps: int
    process: subprocess.Popen[bytes]
    output: Path

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    @property
    def concept(self) -> Path | None:
        """The embeddings, once they are saved."""
        path = self.folder / EMBEDDINGS
        return path if path.is_file() else None

    @property
    def error(self) -> str:
        """The sentence that it ended with; empty while it runs, and where it ended well or was stopped."""
        if self.process.poll() in (None, 0, *STOPPED):
            return ""
        lines = [line for line in self.output.read_text(errors="replace").splitlines() if line.strip()]
        last = lines[-1] if lines else f"The process ended with code {self.process.returncode}."
        return last.removeprefix("prospect learn: error: ")[-MOST_ERROR:]

    def stop(self) -> None:
        """Let the step finish, save and end; on Windows, where no process takes Ctrl-C from another, at once."""
        if self.is_running:
            self.process.send_signal(signal.SIGTERM if sys.platform == "win32" else signal.SIGINT)


@dataclass
class LearnForm:
    """What is filled in on the tab Learn, and the run that it has started.

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


def command(
    form: LearnForm, images: Path, folder: Path, setup: Mapping[str, str], trust: Sequence[str] = ()
) -> list[str]:
    """Return the command that learns, as a user would type it.

    Args:
        images: the folder of the images.
        folder: the log folder, which is new.
        trust: the flags for what the configurations may do, which the page has.

    Raises:
        ConfigError: the page's configuration is for generating, and there is none for learning beside it.
    """
    base = learning_config(Path(setup["config"]), trust)
    bases = [str(base), *([str(base.with_name(METHODS[form.method]))] if METHODS[form.method] else [])]
    words = [*PROGRAM, "--base", *bases, "--actual_resume", setup["ckpt"], *trust]
    words += ["-p", str(folder), "--data_root", str(images)]
    words += ["--max_steps", str(form.steps), "--log_every_n_steps", "5"]
    caption, init_word = form.caption.strip(), form.init_word.strip()
    if form.method == IN_A_CAPTION and not caption:
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
    raise ConfigError(
        f"'{config}' is for generating; to learn, start the page with the --config of a run, such as "
        "configs/stable-diffusion/v1-finetune.yaml."
    )


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


def start(words: Sequence[str], folder: Path, steps: int, output: Path) -> Learning:
    """Start a command; what it prints goes into the file `output`."""
    output.parent.mkdir(parents=True, exist_ok=True)
    known = os.environ.get("PYTHONPATH")
    paths = os.pathsep.join([str(PACKAGES), *([known] if known else [])])
    with output.open("wb") as stream:  # Ctrl-C in the terminal is for the page, which stops it in its turn
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": paths},
        )
    return Learning(folder, steps, process, output)


def resume(run: Learning, steps: int, trust: Sequence[str] = ()) -> Learning:
    """Resume a run, up to `steps`."""
    words = [*PROGRAM, "-r", str(run.folder), "--max_steps", str(steps), "--log_every_n_steps", "5", *trust]
    return start(words, run.folder, steps, run.output)


def losses(folder: Path) -> list[tuple[int, float]]:
    """The loss by step, of all starts of a run."""
    return [(int(row["step"]) + 1, float(row["train/loss"])) for row in _rows(folder) if row.get("train/loss")]


def stage_losses(folder: Path) -> dict[int, float]:
    """The mean loss of each stage that was met, over the whole run."""
    found: dict[int, list[float]] = {}
    for row in _rows(folder):
        for name, value in row.items():
            if name and name.startswith(STAGE_LOSS) and value:
                found.setdefault(int(name.removeprefix(STAGE_LOSS)), []).append(float(value))
    return {stage: sum(values) / len(values) for stage, values in sorted(found.items())}


def _rows(folder: Path) -> list[dict[str, str]]:
    rows = []
    for path in sorted((folder / "csv").glob("*/metrics.csv")):
        with path.open(newline="") as stream:
            rows += list(csv.DictReader(stream))
    return rows


def samples(folder: Path) -> list[Path]:
    """The sample images of a run, the earliest first."""
    return sorted((folder / "images" / "train").glob("samples_scaled_gs-*.jpg"))
