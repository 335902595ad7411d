"""`main.py` and `prospect learn`. Imports nothing heavy before the flags are read; values are checked in training."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ldm.cli.flags import Parser, add_flag, check_paths, log_to_terminal, one_line
from ldm.cli.models import check_weights
from ldm.files.shipped import MODELS, ROOT, shipped

logger = logging.getLogger("main")

CONFIGS = ROOT / "configs"

EPILOG = """\
examples:
  learn from the images of a folder, with the small model that ships:
    python main.py --base demo -t -n my_run --data_root path/to/images
  on Stable Diffusion v1.4, whose weights are models/sd/sd-v1-4.ckpt:
    python main.py --base sd -t -n my_run --gpus 0, --data_root path/to/images
  resume an interrupted run:
    python main.py -r logs/images2026-01-01T12-00-00_my_run -t
  with files of your own, and any value of the configuration changed:
    python main.py --base FILE.yaml -t --actual_resume FILE.ckpt --data_root DIR model.params.prospect_stages=4
"""

OVERRIDE = re.compile(r"^[A-Za-z_][\w.\[\]-]*=")


def boolean(text: str) -> bool:
    """`true`/`false` and their usual spellings."""
    lowered = text.lower()
    if lowered in ("yes", "true", "t", "y", "1"):
        return True
    if lowered in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"'{text}' is neither true nor false")


def number(text: str) -> int | float:
    """`1` stays a count (of batches), `1.0` a share."""
    return int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text)


def one_of(*names: str) -> Callable[[str], str]:
    """Return the type of a flag with these values."""

    def read(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"'{text}' is none of {', '.join(names)}")
        return text

    read.__name__ = "name"
    return read


ACCELERATORS = ("auto", "cpu", "cuda", "gpu", "mps", "tpu")
PRECISIONS = ["32-true", "16-mixed", "bf16-mixed", "64-true", "16-true", "bf16-true", "32", "16", "bf16", "64"]
PRECISIONS += ["transformer-engine", "transformer-engine-float16"]
# Flags handed to the Lightning trainer as they are: name -> type of the value.
TRAINER_FLAGS: dict[str, Callable[[str], object]] = {
    "max_steps": int,
    "min_steps": int,
    "max_epochs": int,
    "min_epochs": int,
    "max_time": str,
    "accumulate_grad_batches": int,
    "gradient_clip_val": number,
    "precision": one_of(*PRECISIONS),
    "accelerator": one_of(*ACCELERATORS),
    "strategy": str,
    "devices": str,
    "num_nodes": int,
    "limit_train_batches": number,
    "limit_val_batches": number,
    "val_check_interval": number,
    "check_val_every_n_epoch": int,
    "num_sanity_val_steps": int,
    "log_every_n_steps": int,
    "enable_progress_bar": boolean,
    "benchmark": boolean,
    "deterministic": boolean,
    "detect_anomaly": boolean,
    "fast_dev_run": boolean,
    "profiler": str,
}


def build_parser(prog: str = "main.py") -> Parser:
    parser = Parser(
        prog=prog,
        description="Learn stage embeddings from images, or train the parts of a latent diffusion model.",
        epilog=EPILOG if prog == "main.py" else EPILOG.replace("python main.py", prog).replace(" -t", ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for add_group in (_add_run, _add_data, _add_log_folder, _add_trainer):
        add_group(parser)
    return parser


def _add_switch(
    group: argparse._ActionsContainer, *names: str, help: str | None = None, default: bool | None = False
) -> None:
    """Add a flag that is true where it stands alone, and takes true or false."""
    add_flag(group, *names, help=help, default=default, type=boolean, nargs="?", const=True, metavar="BOOL")


def _add_path(group: argparse._ActionsContainer, *names: str, help: str, metavar: str, **options: object) -> None:
    """Add a flag for a path; the shell expands `~` only at the beginning of a word, and not in `--flag=~/x`."""
    add_flag(group, *names, help=help, metavar=metavar, type=os.path.expanduser, **options)


def _add_run(parser: Parser) -> None:
    group = parser.add_argument_group("what to run")
    several = {"nargs": "*", "action": "extend", "default": []}
    help_base = "configurations, merged left to right; demo (the small model) and sd are short names"
    _add_path(group, "-b", "--base", metavar="NAME|YAML", help=help_base, **several)
    _add_switch(group, "-t", "--train", help="train (without it, only the set-up is checked)")
    _add_path(group, "-r", "--resume", metavar="DIR|CKPT", help="resume the run in this log folder")
    add_flag(group, "-s", "--seed", type=int, help="seed of everything random (23)")
    packages = "packages of your own whose classes a configuration may name"
    add_flag(group, "--allow_targets", nargs="+", default=[], metavar="PACKAGE", help=packages)
    _add_switch(group, "--allow_resolvers", help="let configurations use resolvers, such as ${oc.env:HOME}")
    _add_switch(group, "--allow_outside", help="let callbacks and loggers of a configuration write anywhere")
    _add_switch(group, "--no_test", help="accepted; no configuration here has a test set")
    _add_switch(group, "-d", "--debug", help="show the whole trace of an error")


def _add_data(parser: Parser) -> None:
    group = parser.add_argument_group("model and images")
    _add_path(group, "--actual_resume", metavar="CKPT", help="base model: .ckpt, .safetensors or a diffusers folder")
    _add_path(group, "--data_root", metavar="PATH", help="folder with the images to learn from, or one image")
    _add_path(group, "--embedding_manager_ckpt", metavar="FILE", help="start from these learned embeddings")
    add_flag(group, "--placeholder_tokens", nargs="+", metavar="TOKEN", help="the token that is learned ('*')")
    add_flag(group, "--init_word", metavar="WORD", help="word(s) whose embedding the learning starts from")
    help_caption = "captions to learn in, with * for the token; what they name is not learned ('*')"
    add_flag(group, "--caption", nargs="+", metavar="TEXT", help=help_caption)


def _add_log_folder(parser: Parser) -> None:
    group = parser.add_argument_group("log folder: <logdir>/<data folder><time>_<name><postfix>")
    add_flag(group, "-n", "--name", help="name of the run")
    add_flag(group, "-f", "--postfix", default="", help="appended to the name")
    _add_path(group, "-l", "--logdir", metavar="DIR", default="logs", help="where log folders are made (logs)")
    _add_path(group, "-p", "--project", metavar="DIR", help="log into exactly this folder, which is new or empty")
    _add_switch(group, "--datadir_in_name", default=True, help="begin the name with the data folder's (true)")


def _add_trainer(parser: Parser) -> None:
    group = parser.add_argument_group("trainer (handed to pytorch_lightning.Trainer)")
    add_flag(group, "--gpus", metavar="0,1,", help="CUDA devices by number; translated to accelerator and devices")
    help_lr = "multiply the learning rate by batch size, devices and accumulation (true)"
    _add_switch(group, "--scale_lr", default=None, help=help_lr)
    for name, kind in TRAINER_FLAGS.items():
        if kind is boolean:
            _add_switch(group, f"--{name}", default=None)
        else:
            add_flag(group, f"--{name}", type=kind, metavar=kind.__name__.upper())


def parse(argv: Sequence[str] | None = None, parser: Parser | None = None) -> argparse.Namespace:
    """The options; `options.overrides` holds the dot-list, `options.trainer` the trainer flags that were given.

    Exits with code 2 and one sentence on an unknown flag or a value of another type.
    """
    parser = parser or build_parser()
    overrides, flags = split_overrides(parser, parser.underscored(sys.argv[1:] if argv is None else argv))
    options, unknown = parser.parse_known_args(flags)
    if unknown:
        parser.refuse(unknown[0], "see --help; values of the configuration are key=value")
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
    overrides: list[str] = []
    flags: list[str] = []
    for before, text in zip(("", *argv), argv, strict=False):
        (overrides if OVERRIDE.match(text) and before not in single else flags).append(text)
    return overrides, flags


def check_options(options: argparse.Namespace) -> None:
    """Put files in place of short names, and refuse paths that lead nowhere.

    Raises:
        ValueError: with the flag that gave it.
    """
    known = next((MODELS[name] for name in options.base if name in MODELS), None)
    given = [text.partition("=")[0] for text in options.overrides]
    if known and not options.resume:
        if not options.actual_resume and "model.params.ckpt_path" not in given:
            options.actual_resume = known.ckpt
        if not options.data_root and not any(key.startswith("data.") for key in given):
            raise ValueError("Say which images to learn from: --data_root, a folder with images or one image.")
    options.base = [configuration(name) for name in options.base]
    for name in ("actual_resume", "data_root", "embedding_manager_ckpt"):
        if (path := getattr(options, name)) is not None:
            setattr(options, name, shipped(path))
    if options.resume and not os.path.exists(options.resume):
        raise ValueError(f"Nothing to resume: there is no '{options.resume}'; -r takes a log folder of main.py.")
    check_paths({"--base": options.base, "--data_root": [options.data_root]})
    if options.actual_resume:
        check_weights(options.actual_resume, "--actual_resume")
    check_paths({"--embedding_manager_ckpt": [options.embedding_manager_ckpt]})


def configuration(name: str) -> str:
    """Return the file of a configuration that is given by its path, or by a short name: demo, sd, demo/neti.

    Raises:
        ValueError: a short name of none that ships.
    """
    if name in MODELS:
        return shipped(MODELS[name].learning)
    if Path(name).suffix or os.path.exists(name):
        return shipped(name)
    short = shipped(f"configs/{name}.yaml")
    if not os.path.exists(short):
        known = [*MODELS, *(file.relative_to(CONFIGS).with_suffix("").as_posix() for file in CONFIGS.glob("*/*.yaml"))]
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"give a YAML file, {' or '.join(MODELS)}."
        raise ValueError(f"There is no configuration '{name}'; {hint}")
    return short


def train(options: argparse.Namespace) -> int:
    """Run what the options say; returns the exit code."""
    from pytorch_lightning.utilities.exceptions import SIGTERMException

    from ldm.config import allow_targets
    from ldm.files.writing import writing_to
    from ldm.training.messages import report
    from ldm.training.runs import open_run
    from ldm.training.setup import build, build_config, save_configs
    from ldm.training.trainer import build_trainer

    allow_targets(*options.allow_targets)
    run = open_run(options)
    config = build_config(options, run)
    data, module = build(config, run)
    with run.opened() if options.train else contextlib.nullcontext():
        trainer = build_trainer(config, run, module, data, outside=options.allow_outside)
        if not options.train:
            logger.info("Everything is in place; add -t to train.")
            return 0
        if trainer.is_global_zero:
            save_configs(config, data, module, run)
            logger.info("Logging to %s%s", run.folder, f", resuming at step {run.step}" if run.step else "")
        with contextlib.suppress(SIGTERMException), writing_to(run.folder):  # the first is how Lightning stops
            trainer.fit(module, datamodule=data, ckpt_path=run.checkpoint, weights_only=True)
        return report(run, trainer, config)


def run(argv: Sequence[str] | None = None, prog: str = "main.py") -> int:
    """Learn or train what the flags ask for; returns the exit code.

    Args:
        argv: the flags, by default the program's own.
        prog: what the command is called.
    """
    parser = build_parser(prog)
    options = parse(argv, parser)
    with parser.sentences(options.debug):
        check_options(options)
    from ldm.training.messages import quiet_threads, quieten_libraries, sentence
    from ldm.util import usual_torch

    log_to_terminal(logging.INFO)
    quieten_libraries()
    try:
        with usual_torch(), quiet_threads(options.debug):
            return train(options)
    except KeyboardInterrupt:  # Ctrl-C before the first step; later ones save, see `SaveLast`
        return 130
    except Exception as error:
        text = None if options.debug else sentence(error)
        if text is None:
            raise
        sys.stderr.write(f"{prog}: error: {one_line(text)}\n")
        return 2
