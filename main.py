"""Train: learn ProSpect embeddings against a frozen model, or train a small model from scratch.

    python main.py --base configs/stable-diffusion/v1-finetune.yaml -t --actual_resume CKPT \\
        -n NAME --gpus 0, --data_root DIR
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from ldm import cli

# Names that the reference's YAML files look for here, and where they live.
_HOMES = {"DataModuleFromConfig": "ldm.data.datamodule", "ImageLogger": "ldm.callbacks"}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'main' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def train(options) -> None:
    import pytorch_lightning as pl

    from ldm import training
    from ldm.config import instantiate_from_config

    pl.seed_everything(options.seed, verbose=False)
    run = training.open_run(options)
    config = training.build_config(options, run)
    allowed = config.get("allow_targets", ())
    data = instantiate_from_config(config.data, allowed)
    module = instantiate_from_config(config.model, allowed)
    trainer = training.build_trainer(config, options, run, module)
    training.set_learning_rate(config, module, data, trainer, options.scale_lr)
    if not options.train:
        logging.getLogger(__name__).info("Everything is in place; add -t to train.")
        return
    training.save_configs(config, run)
    logging.getLogger(__name__).info("Logging to %s", run.folder)
    trainer.fit(module, datamodule=data, ckpt_path=run.checkpoint, weights_only=True)
    logging.getLogger(__name__).info("Done: %s", run.checkpoints)


def main(argv: Sequence[str] | None = None) -> int:
    options = cli.parse(argv)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    for noisy in ("pytorch_lightning", "lightning", "lightning.fabric"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        train(options)
    except (ValueError, OSError, ImportError) as error:  # what a user can mend; everything else is a defect
        if options.debug:
            raise
        return cli.complain(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
