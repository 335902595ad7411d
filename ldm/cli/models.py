"""Which model a command uses: its flags, the names of what ships, and the model itself."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.flags import check_paths, path
from ldm.files.shipped import MODELS, ROOT, shipped
from ldm.request import shown

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from ldm.models.diffusion.latent_diffusion import DiffusionModel

# What makes the model, recorded in an image beside the request.
MODEL_DEFAULTS = {"config": MODELS["demo"].config, "ckpt": MODELS["demo"].ckpt, "dtype": "float32"}
DTYPES = ("float32", "float16", "bfloat16")


def add_model_flags(group: argparse._ActionsContainer) -> None:
    """Add what says which model generates; by default the small one that ships."""
    help_config = "of the base model: demo (the small model), sd (Stable Diffusion v1) or a file (demo)"
    group.add_argument("--config", metavar="NAME|YAML", help=help_config)
    help_ckpt = f".ckpt, .safetensors or diffusers folder (demo: {MODELS['demo'].ckpt}, sd: {MODELS['sd'].ckpt})"
    group.add_argument("--ckpt", type=path, metavar="FILE", help=help_ckpt)
    group.add_argument("--dtype", choices=DTYPES, metavar="TYPE", help=f"of the weights: {', '.join(DTYPES)} (float32)")
    help_device = "cpu, cuda, cuda:1 or mps (PROSPECT_DEVICE, or the fastest there is)"
    group.add_argument("--device", type=device, metavar="NAME", help=help_device)
    help_allow = "packages of your own whose classes the configuration may name"
    group.add_argument("--allow_targets", nargs="+", default=[], metavar="PACKAGE", help=help_allow)
    help_resolvers = "let the configuration use resolvers, such as ${oc.env:HOME}"
    group.add_argument("--allow_resolvers", action="store_true", help=help_resolvers)


def device(text: str) -> str:
    """A device's name: cpu, mps, cuda or cuda:N."""
    if re.fullmatch(r"(cpu|mps|cuda)(:\d+)?", text) is None:
        raise argparse.ArgumentTypeError(f"'{text}' is none of cpu, mps, cuda and cuda:0, cuda:1, …")
    return text


def configuration(name: str, learning: bool = False) -> str:
    """Return the file of a configuration that is given by its path, or by a short name: demo, sd, demo/neti.

    Raises:
        ValueError: a short name of none that ships.
    """
    if name in MODELS:
        return shipped(MODELS[name].learning if learning else MODELS[name].config)
    if Path(name).suffix or os.path.exists(name):
        return shipped(name)
    file = shipped(f"configs/{name}.yaml")
    if not os.path.exists(file):
        from ldm.config import nearest

        folder = ROOT / "configs"
        known = [*MODELS, *(path.relative_to(folder).with_suffix("").as_posix() for path in folder.glob("*/*.yaml"))]
        raise ValueError(f"There is no configuration '{name}'{nearest(name, known)}")
    return file


def check_weights(ckpt: str, flag: str = "--ckpt") -> None:
    """Raise `ValueError` where the weights of the base model are not there; `flag` gives others."""
    if ckpt == MODELS["sd"].ckpt and not os.path.exists(ckpt):
        raise ValueError(f"Stable Diffusion's weights, '{ckpt}', are not there; put them there, or give {flag} FILE.")
    check_paths({flag: [ckpt]})


def read_setup(
    options: argparse.Namespace, recorded: Mapping[str, Any] | None = None
) -> tuple[dict[str, str], DictConfig]:
    """Return which model is meant, and its configuration, without anything heavy.

    Returns:
        config, ckpt and dtype: those of the flags, else of the record of an image, else the small model's.
    """
    from ldm.config import allow_targets, check_generates, load_config

    known = MODELS.get(options.config)
    given = {"config": options.config} if known is None else {"config": known.config, "ckpt": known.ckpt}
    given |= {name: value for name in ("ckpt", "dtype") if (value := getattr(options, name)) is not None}
    setup = {}
    for name, default in MODEL_DEFAULTS.items():
        value = given.get(name) or (recorded or {}).get(name) or default
        if not isinstance(value, (str, Path)):
            raise ValueError(f"'{options.source}' has no readable {name} ({shown(value)}); give it with --{name}.")
        setup[name] = configuration(str(value)) if name == "config" else shipped(value)
    check_weights(setup["ckpt"])
    allow_targets(*options.allow_targets)
    config = load_config(setup["config"], flag="--config", resolvers=options.allow_resolvers)
    check_generates(config)
    return setup, config


def load_model(options: argparse.Namespace, setup: Mapping[str, str], config: DictConfig) -> DiffusionModel:
    """Return the model that `read_setup` found."""
    from ldm.generate import load_model_from_config

    return load_model_from_config(config, setup["ckpt"], device=options.device, dtype=setup["dtype"], lightning=False)
