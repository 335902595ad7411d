"""Train: learn ProSpect embeddings against a frozen model, or train a small model from scratch.

    python main.py --base configs/stable-diffusion/v1-finetune.yaml -t --actual_resume CKPT \\
        -n NAME --gpus 0, --data_root DIR
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from collections.abc import Sequence

from ldm.cli.flags import log_to_terminal, one_line
from ldm.cli.train import parse

logger = logging.getLogger("main")

# Names that the reference's YAML files look for here, and where they live.
_HOMES = {"DataModuleFromConfig": "ldm.data.datamodule", "ImageLogger": "ldm.training.callbacks"}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'main' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


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
            save_configs(config, data, module, run, options.allow_resolvers)
            logger.info("Logging to %s%s", run.folder, f", resuming at step {run.step}" if run.step else "")
        with contextlib.suppress(SIGTERMException), writing_to(run.folder):  # the first is how Lightning stops
            trainer.fit(module, datamodule=data, ckpt_path=run.checkpoint, weights_only=True)
        return report(run, trainer, config)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
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
        sys.stderr.write(f"main.py: error: {one_line(text)}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
