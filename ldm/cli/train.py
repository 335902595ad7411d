"""The flags of `main.py`. Imports nothing heavy, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import logging
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ldm.cli.flags import Parser, add_flag, log_to_terminal, one_line

EPILOG = """\
examples:
  learn from the pictures of a folder, on Stable Diffusion v1.4:
    python main.py --base configs/stable-diffusion/v1-finetune.yaml -t \\
        --actual_resume models/sd/sd-v1-4.ckpt -n my_run --gpus 0, --data_root path/to/pictures
  go on with an interrupted run:
    python main.py -r logs/pictures2026-01-01T12-00-00_my_run -t
  change any value of the configuration:
    python main.py --base CFG -t ... model.params.prospect_stages=4
"""

OVERRIDE = re.compile(r"^[A-Za-z_][\w.\[\]-]*=")
MAX_SEED = 2**32 - 1  # NumPy's
# What other programs have a flag for -> the key that says it here.
KEYS = {
    "batch_size": "data.params.batch_size=N",
    "num_workers": "data.params.num_workers=N",
    "resolution": "data.params.train.params.size=N",
    "size": "data.params.train.params.size=N",
    "learning_rate": "model.base_learning_rate=X",
    "lr": "model.base_learning_rate=X",
    "num_stages": "model.params.prospect_stages=N",
    "stages": "model.params.prospect_stages=N",
    "max_train_steps": "--max_steps N",
    "steps": "--max_steps N",
    "mixed_precision": "--precision bf16-mixed",
}


def boolean(text: str) -> bool:
    """`true`/`false` and their usual spellings."""
    lowered = text.lower()
    if lowered in ("yes", "true", "t", "y", "1"):
        return True
    if lowered in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"'{text}' is neither true nor false")


def natural(text: str) -> int:
    """A whole number, 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of 0 or more")
    return int(text)


def positive(text: str) -> int:
    """A whole number, 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' must be a whole number of at least 1")
    return int(text)


def number(text: str) -> int | float:
    """A number of 0 or more; `1` stays a count (of batches), `1.0` a share."""
    try:
        value = int(text) if text.isdecimal() else float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of 0 or more")
    return value


def seed(text: str) -> int:
    """A whole number that every generator of random numbers takes."""
    if not text.isdecimal() or int(text) > MAX_SEED:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 0 to {MAX_SEED}")
    return int(text)


def folder_name(text: str) -> str:
    """A part of a folder's name: no path, and short enough for every file system."""
    if "/" in text or "\\" in text:
        raise argparse.ArgumentTypeError(f"'{text}' must be a name, not a path; a path goes to -l or -p")
    if len(text.encode(errors="replace")) > 100:
        raise argparse.ArgumentTypeError(f"'{text[:20]}…' is too long for a folder; take at most 100 characters")
    return text


def devices(text: str) -> str:
    """How many devices (-1: all there are), `auto`, or device numbers with commas."""
    if not re.fullmatch(r"auto|-1|0*[1-9]\d*|\d+(,\d+)+,?|\d+,", text):
        raise argparse.ArgumentTypeError(f"'{text}' must be a number of at least 1, device numbers such as 0,1 or auto")
    return text


# Flags handed to the Lightning trainer as they are: name -> type of the value.
TRAINER_FLAGS: dict[str, Callable[[str], Any]] = {
    "max_steps": int,
    "min_steps": int,
    "max_epochs": int,
    "min_epochs": int,
    "max_time": str,
    "accumulate_grad_batches": positive,
    "gradient_clip_val": number,
    "precision": str,
    "accelerator": str,
    "strategy": str,
    "devices": devices,
    "num_nodes": positive,
    "limit_train_batches": number,
    "limit_val_batches": number,
    "val_check_interval": number,
    "check_val_every_n_epoch": positive,
    "num_sanity_val_steps": int,
    "log_every_n_steps": natural,
    "enable_progress_bar": bool,
    "benchmark": bool,
    "deterministic": bool,
    "detect_anomaly": bool,
    "fast_dev_run": bool,
    "profiler": str,
}


def build_parser() -> Parser:
    parser = Parser(
        prog="main.py",
        description="Learn stage embeddings from pictures, or train the parts of a latent diffusion model.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

    switch = {"type": boolean, "nargs": "?", "const": True, "metavar": "BOOL"}

    run = parser.add_argument_group("what to run")
    add_flag(
        run,
        "-b",
        "--base",
        nargs="*",
        action="extend",
        default=[],
        metavar="YAML",
        help="configurations, merged left to right",
    )
    add_flag(run, "-t", "--train", default=False, help="train (without it, only the set-up is checked)", **switch)
    add_flag(run, "-r", "--resume", metavar="DIR|CKPT", help="go on with the run in this log folder")
    add_flag(run, "-s", "--seed", type=seed, help="seed of everything random (23)")
    add_flag(
        run,
        "--allow_targets",
        nargs="+",
        default=[],
        metavar="PACKAGE",
        help="packages of your own whose classes a configuration may name",
    )
    add_flag(run, "--no_test", default=False, help="accepted; no configuration here has a test set", **switch)
    add_flag(run, "-d", "--debug", default=False, help="show the whole trace of an error", **switch)

    data = parser.add_argument_group("model and pictures")
    add_flag(data, "--actual_resume", metavar="CKPT", help="base model: .ckpt, .safetensors or a diffusers folder")
    add_flag(data, "--data_root", metavar="PATH", help="folder with the pictures to learn from, or one picture")
    add_flag(data, "--embedding_manager_ckpt", metavar="FILE", help="start from these learned embeddings")
    add_flag(data, "--placeholder_tokens", nargs="+", metavar="TOKEN", help="the token that is learned ('*')")
    add_flag(data, "--init_word", metavar="WORD", help="word(s) whose embedding the learning starts from")

    logs = parser.add_argument_group("log folder: <logdir>/<data folder><time>_<name><postfix>")
    add_flag(logs, "-n", "--name", type=folder_name, help="name of the run")
    add_flag(logs, "-f", "--postfix", type=folder_name, default="", help="appended to the name")
    add_flag(logs, "-l", "--logdir", default="logs", help="where log folders are made (logs)")
    add_flag(logs, "-p", "--project", metavar="DIR", help="log into exactly this folder")
    add_flag(logs, "--datadir_in_name", default=True, help="begin the name with the data folder's (true)", **switch)

    trainer = parser.add_argument_group("trainer (handed to pytorch_lightning.Trainer)")
    add_flag(trainer, "--gpus", metavar="0,1,", help="CUDA devices by number; translated to accelerator and devices")
    help_lr = "multiply the learning rate by batch size, devices and accumulation (true)"
    add_flag(trainer, "--scale_lr", help=help_lr, **switch)
    for name, kind in TRAINER_FLAGS.items():
        options = dict(switch, default=None) if kind is bool else {"type": kind, "metavar": kind.__name__.upper()}
        add_flag(trainer, f"--{name}", **options)
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; `options.overrides` holds the dot-list, `options.trainer` the trainer flags that were given.

    Exits with code 2 and one sentence on an unknown flag or a bad value.
    """
    parser = build_parser()
    overrides, flags = split_overrides(parser, sys.argv[1:] if argv is None else argv)
    options, unknown = parser.parse_known_args(flags)
    if unknown:
        key = KEYS.get(unknown[0].partition("=")[0].lstrip("-").replace("-", "_"))
        otherwise = "see --help; values of the configuration are key=value"
        parser.refuse(unknown[0], otherwise, instead=key)
    options.overrides = overrides
    options.trainer = {name: getattr(options, name) for name in TRAINER_FLAGS if getattr(options, name) is not None}
    if options.name and options.resume:
        parser.error("-n/--name and -r/--resume exclude each other; a resumed run keeps its folder")
    if not options.base and not options.resume:
        parser.error("a configuration is needed: --base configs/stable-diffusion/v1-finetune.yaml (or -r LOGDIR)")
    return options


def split_overrides(parser: Parser, argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """`key=value` wherever it stands, and the flags: a list (`--base a.yaml key=value`) would swallow it."""
    single = {name for action in parser._actions if action.nargs is None for name in action.option_strings}
    overrides, flags = [], []
    for before, text in zip(("", *argv), argv, strict=False):
        (overrides if OVERRIDE.match(text) and before not in single else flags).append(text)
    return overrides, flags


def translate_gpus(gpus: str | None) -> list[int] | int | None:
    """`0,` -> [0], `0,1` -> [0, 1]; a bare number counts: `2` -> [0, 1], `0` -> [], `-1` -> -1 (all); '' -> None.

    Raises:
        ValueError: not a list of device numbers.
    """
    if not gpus:
        return None
    parts = [part for part in gpus.split(",") if part.strip()]
    try:
        numbers = [int(part) for part in parts]
    except ValueError:
        raise ValueError(f"--gpus takes device numbers such as '0,' or '0,1', not '{gpus}'.") from None
    if "," in gpus:
        return numbers
    return -1 if numbers[0] == -1 else list(range(numbers[0]))


def complain(message: str) -> int:
    """Print one error sentence; returns the exit code 2."""
    sys.stderr.write(f"main.py: error: {one_line(message)}\n")
    return 2


def is_mendable(error: Exception) -> bool:
    """Whether an error is one that its sentence lets a user mend; anything else is a defect and shows its trace."""
    from pytorch_lightning.utilities.exceptions import MisconfigurationException

    return isinstance(error, (ValueError, OSError, ImportError, MisconfigurationException))


@contextmanager
def one_sentence(debug: bool = False) -> Iterator[None]:
    """Keep threads from showing the trace of an `OSError` that they hand on, as TensorBoard's writing thread does."""
    shown = threading.excepthook
    if not debug:
        threading.excepthook = lambda args: None if isinstance(args.exc_value, OSError) else shown(args)
    try:
        yield
    finally:
        threading.excepthook = shown


def set_up_logging() -> None:
    """Let the program's own lines through, and quieten libraries that talk about themselves."""
    import pytorch_lightning  # noqa: F401, sets its own level when it is imported

    log_to_terminal(logging.INFO)
    for noisy in ("pytorch_lightning", "lightning", "lightning.pytorch", "lightning.fabric", "lightning_fabric"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    for message in (
        ".*is deprecated, use `isinstance",  # inside Lightning
        ".*module\\(s\\) in eval mode",  # frozen parts are meant to be
        ".*resuming from a checkpoint that ended before the epoch",  # `RunningSampler` takes the order up
        ".*does not have many workers",  # pictures are in memory
        "Total length of `list` across ranks is zero",  # no validation set
        "You have overridden `on_before_batch_transfer`",  # on purpose
    ):
        warnings.filterwarnings("ignore", message)
