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

from ldm.cli import train as cli

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
    import pytorch_lightning as pl
    from pytorch_lightning.utilities.exceptions import SIGTERMException

    from ldm.config import allow_targets, instantiate_from_config
    from ldm.files.writing import writing_to
    from ldm.training import checks as run_checks
    from ldm.training import parts
    from ldm.training import setup as training
    from ldm.training.runs import open_run

    allow_targets(*options.allow_targets)
    run = open_run(options)
    config = training.build_config(options, run)
    pl.seed_everything(config.lightning.seed, verbose=False)
    missing = parts.missing_parts(config)
    data = instantiate_from_config(config.data)
    module = instantiate_from_config(config.model)
    module.seed = config.lightning.seed
    run_checks.check_sizes(module, data)
    run_checks.check_resumable(module, run.checkpoint)
    with run.opened() if options.train else contextlib.nullcontext():
        trainer = training.build_trainer(config, run, module)
        parts.check_alone(missing, trainer)
        run_checks.check_precision(module, trainer)
        training.set_learning_rate(config, module, data, trainer)
        if not options.train:
            logger.info("Everything is in place; add -t to train.")
            return 0
        if trainer.is_global_zero:
            training.save_configs(config, run)
            logger.info("Logging to %s", run.folder)
        if missing:
            code = parts.train_parts(missing, config, options, run, main)
            if code:
                return code
            training.save_configs(config, run)
            module.load_parts(**{key: config.model.params[key] for key in missing})
        with contextlib.suppress(SIGTERMException), writing_to(run.folder):  # the first is how Lightning stops
            trainer.fit(module, datamodule=data, ckpt_path=run.checkpoint, weights_only=True)
        return training.report(run, trainer)


def main(argv: Sequence[str] | None = None) -> int:
    options = cli.parse(argv)
    cli.set_up_logging()
    try:
        with cli.one_sentence(options.debug):
            return train(options)
    except KeyboardInterrupt:  # Ctrl-C before the first step; later ones save, see `SaveLast`
        return 130
    except Exception as error:
        if options.debug or not cli.is_mendable(error):
            raise
        return cli.complain(str(error))


if __name__ == "__main__":
    sys.exit(main())
