"""Learn stage embeddings from images, or train the parts of a latent diffusion model.

learn from the images of a folder, with the small model that ships:
  python main.py --base demo -t -n my_run --data_root path/to/images
on Stable Diffusion v1.4, whose weights are models/sd/sd-v1-4.ckpt:
  python main.py --base sd -t -n my_run --gpus 0, --data_root path/to/images
resume an interrupted run:
  python main.py -r logs/images2026-01-01T12-00-00_my_run -t
with files of your own, and any value of the configuration changed:
  python main.py --base FILE.yaml -t --actual_resume FILE.ckpt --data_root DIR model.params.prospect_stages=4
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from ldm.cli.flags import Parser, check_paths, log_to_terminal, one_line, script_parser
from ldm.cli.models import check_weights, configuration
from ldm.files.shipped import MODELS, shipped

logger = logging.getLogger("main")

OVERRIDE = re.compile(r"^[A-Za-z_][\w.\[\]-]*=")
BOOLEANS = dict.fromkeys(("yes", "true", "t", "y", "1"), True) | dict.fromkeys(("no", "false", "f", "n", "0"), False)


def boolean(text: str) -> bool:
    """`true`/`false` and their usual spellings."""
    if text.lower() not in BOOLEANS:
        raise argparse.ArgumentTypeError(f"'{text}' is neither true nor false")
    return BOOLEANS[text.lower()]


def number(text: str) -> int | float:
    """`1` stays a count (of batches), `1.0` a share."""
    return int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text)


# What Lightning knows, which takes seconds to import.
ACCELERATORS = ("auto", "cpu", "cuda", "gpu", "mps", "tpu")
PRECISIONS = ["32-true", "16-mixed", "bf16-mixed", "64-true", "16-true", "bf16-true", "32", "16", "bf16", "64"]
PRECISIONS += ["transformer-engine", "transformer-engine-float16"]
_INT, _TEXT, _NUMBER = ({"type": kind, "metavar": kind.__name__.upper()} for kind in (int, str, number))
# A flag that is true where it stands alone, and takes true or false.
SWITCH: dict[str, Any] = {"type": boolean, "nargs": "?", "const": True, "default": False, "metavar": "BOOL"}
# Flags handed to the Lightning trainer as they are.
TRAINER_FLAGS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("max_steps", "min_steps", "max_epochs", "min_epochs", "accumulate_grad_batches"), _INT),
    **dict.fromkeys(("check_val_every_n_epoch", "num_sanity_val_steps", "log_every_n_steps", "num_nodes"), _INT),
    **dict.fromkeys(("max_time", "strategy", "devices", "profiler"), _TEXT),
    **dict.fromkeys(("limit_train_batches", "limit_val_batches", "val_check_interval", "gradient_clip_val"), _NUMBER),
    **dict.fromkeys(("enable_progress_bar", "benchmark", "deterministic"), SWITCH | {"default": None}),
    **dict.fromkeys(("detect_anomaly", "fast_dev_run"), SWITCH | {"default": None}),
    "precision": {"choices": PRECISIONS, "metavar": "NAME"},
    "accelerator": {"choices": ACCELERATORS, "metavar": "NAME"},
}
HOME = os.path.expanduser  # the shell expands ~ only at the beginning of a word, and not in --flag=~/x


def build_parser(prog: str | None = None) -> Parser:
    parser = script_parser(__doc__ if prog is None else __doc__.replace(" -t", ""), prog)
    run = parser.add_argument_group("what to run")
    help_base = "configurations, merged left to right; demo (the small model) and sd are short names"
    several: dict[str, Any] = {"nargs": "*", "action": "extend", "default": []}
    run.add_argument("-b", "--base", type=HOME, metavar="NAME|YAML", help=help_base, **several)
    run.add_argument("-t", "--train", **SWITCH, help="train (without it, only the set-up is checked)")
    run.add_argument("-r", "--resume", type=HOME, metavar="DIR|CKPT", help="resume the run in this log folder")
    run.add_argument("-s", "--seed", type=int, help="seed of everything random (23)")
    packages = "packages of your own whose classes a configuration may name"
    run.add_argument("--allow_targets", nargs="+", default=[], metavar="PACKAGE", help=packages)
    run.add_argument("--allow_resolvers", **SWITCH, help="let configurations use resolvers, such as ${oc.env:HOME}")
    run.add_argument("--allow_outside", **SWITCH, help="let callbacks and loggers of a configuration write anywhere")
    run.add_argument("--no_test", **SWITCH, help="accepted; no configuration here has a test set")
    run.add_argument("-d", "--debug", **SWITCH, help="show the whole trace of an error")

    data = parser.add_argument_group("model and images")
    help_model = "base model: .ckpt, .safetensors or a diffusers folder"
    data.add_argument("--actual_resume", type=shipped, metavar="CKPT", help=help_model)
    data.add_argument("--data_root", type=shipped, metavar="PATH", help="folder with images to learn from, or an image")
    data.add_argument("--embedding_manager_ckpt", type=shipped, metavar="FILE", help="start from learned embeddings")
    data.add_argument("--placeholder_tokens", nargs="+", metavar="TOKEN", help="the token that is learned ('*')")
    data.add_argument("--init_word", metavar="WORD", help="word(s) whose embedding the learning starts from")
    help_caption = "captions to learn in, with * for the token; what they name is not learned ('*')"
    data.add_argument("--caption", nargs="+", metavar="TEXT", help=help_caption)

    log = parser.add_argument_group("log folder: <logdir>/<data folder><time>_<name><postfix>")
    log.add_argument("-n", "--name", help="name of the run")
    log.add_argument("-f", "--postfix", default="", help="appended to the name")
    log.add_argument("-l", "--logdir", type=HOME, metavar="DIR", default="logs", help="where log folders are (logs)")
    log.add_argument("-p", "--project", type=HOME, metavar="DIR", help="log into exactly this folder, new or empty")
    help_name = "begin the name with the data folder's (true)"
    log.add_argument("--datadir_in_name", **(SWITCH | {"default": True}), help=help_name)

    trainer = parser.add_argument_group("trainer (handed to pytorch_lightning.Trainer)")
    trainer.add_argument("--gpus", metavar="0,1,", help="CUDA devices by number; translated to accelerator and devices")
    help_lr = "multiply the learning rate by batch size, devices and accumulation (true)"
    trainer.add_argument("--scale_lr", **(SWITCH | {"default": None}), help=help_lr)
    for name, how in TRAINER_FLAGS.items():
        trainer.add_argument(f"--{name}", **how)
    return parser


def parse(argv: Sequence[str] | None = None, parser: Parser | None = None) -> argparse.Namespace:
    """The options; `options.overrides` holds the dot-list, `options.trainer` the trainer flags that were given.

    Exits with code 2 and one sentence on an unknown flag or a value of another type.
    """
    parser = parser or build_parser()
    given = parser.underscored(argv)
    # `key=value` counts wherever it stands: a list (`--base a.yaml key=value`) would swallow it
    single = {name for action in parser._actions if action.nargs is None for name in action.option_strings}
    overrides: list[str] = []
    flags: list[str] = []
    for before, text in zip(("", *given), given, strict=False):
        (overrides if OVERRIDE.match(text) and before not in single else flags).append(text)
    options = parser.parse_strictly(flags)
    options.overrides = overrides
    options.trainer = {name: getattr(options, name) for name in TRAINER_FLAGS if getattr(options, name) is not None}
    if options.name and options.resume:
        parser.error("-n/--name and -r/--resume exclude each other; a resumed run keeps its folder")
    if not options.base and not options.resume:
        parser.error("a configuration is needed: --base configs/stable-diffusion/v1-finetune.yaml (or -r LOGDIR)")
    return options


def find_files(options: argparse.Namespace) -> None:
    """Put files in place of short names.

    Raises:
        ValueError: there is no such file, with the flag that gave it.
    """
    known = next((MODELS[name] for name in options.base if name in MODELS), None)
    given = [text.partition("=")[0] for text in options.overrides]
    if known and not options.resume:
        if not options.actual_resume and "model.params.ckpt_path" not in given:
            options.actual_resume = shipped(known.ckpt)
        if not options.data_root and not any(key.startswith("data.") for key in given):
            raise ValueError("Say which images to learn from: --data_root, a folder with images or one image.")
    options.base = [configuration(name, learning=True) for name in options.base]
    paths = {"-r": [options.resume], "--base": options.base, "--data_root": [options.data_root]}
    check_paths(paths | {"--embedding_manager_ckpt": [options.embedding_manager_ckpt]})
    if options.actual_resume:
        check_weights(options.actual_resume, "--actual_resume")


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


def run(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Learn or train what the flags ask for; returns the exit code."""
    parser = build_parser(prog)
    options = parse(argv, parser)
    with parser.sentences(options.debug):
        find_files(options)
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
        sys.stderr.write(f"{parser.prog}: error: {one_line(text)}\n")
        return 2
