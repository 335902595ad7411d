"""Which model a command uses: its flags, the names of what ships, and the model itself."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.flags import add_flag, check_paths, path
from ldm.files.shipped import MODELS, shipped
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
    add_flag(group, "--config", metavar="NAME|YAML", help=help_config)
    help_ckpt = f".ckpt, .safetensors or diffusers folder (demo: {MODELS['demo'].ckpt}, sd: {MODELS['sd'].ckpt})"
    add_flag(group, "--ckpt", type=path, metavar="FILE", help=help_ckpt)
    add_flag(group, "--dtype", metavar="TYPE", help="of the weights: float32, float16 or bfloat16 (float32)")
    help_device = "cpu, cuda, cuda:1 or mps (PROSPECT_DEVICE, or the fastest there is)"
    add_flag(group, "--device", type=device, metavar="NAME", help=help_device)
    help_allow = "packages of your own whose classes the configuration may name"
    add_flag(group, "--allow_targets", nargs="+", default=[], metavar="PACKAGE", help=help_allow)
    help_resolvers = "let the configuration use resolvers, such as ${oc.env:HOME}"
    add_flag(group, "--allow_resolvers", action="store_true", help=help_resolvers)


def device(text: str) -> str:
    """A device's name: cpu, mps, cuda or cuda:N."""
    if re.fullmatch(r"(cpu|mps|cuda)(:\d+)?", text) is None:
        raise argparse.ArgumentTypeError(f"'{text}' is none of cpu, mps, cuda and cuda:0, cuda:1, …")
    return text


def model_setup(options: argparse.Namespace, recorded: Mapping[str, Any]) -> dict[str, str]:
    """Return configuration, checkpoint and precision: of the flags, else of the record, else the small model's."""
    given: dict[str, Any] = {}
    if options.config in MODELS:
        given = {"config": MODELS[options.config].config, "ckpt": MODELS[options.config].ckpt}
    elif options.config is not None:
        given = {"config": os.path.expanduser(options.config)}
    given |= {name: value for name in ("ckpt", "dtype") if (value := getattr(options, name)) is not None}
    setup = {}
    for name, default in MODEL_DEFAULTS.items():
        value = given.get(name) or recorded.get(name) or default
        if not isinstance(value, (str, Path)):
            raise ValueError(f"'{options.source}' has no readable {name} ({shown(value)}); give it with --{name}.")
        setup[name] = shipped(value)
    if setup["dtype"] not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {shown(setup['dtype'])}.")
    return setup


def check_weights(ckpt: str, flag: str = "--ckpt") -> None:
    """Raise `ValueError` where the weights of the base model are not there; `flag` gives others."""
    if ckpt == MODELS["sd"].ckpt and not os.path.exists(ckpt):
        raise ValueError(f"Stable Diffusion's weights, '{ckpt}', are not there; put them there, or give {flag} FILE.")
    check_paths({flag: [ckpt]})


def read_config(options: argparse.Namespace, setup: Mapping[str, str]) -> DictConfig:
    """Return the configuration that flags name."""
    from ldm.config import allow_targets, check_generates, load_config

    if "." not in setup["config"] and not os.path.exists(setup["config"]):
        raise ValueError(f"Unknown --config '{setup['config']}'; there are {', '.join(MODELS)}, or give a YAML file.")
    allow_targets(*options.allow_targets)
    config = load_config(setup["config"], flag="--config", resolvers=options.allow_resolvers)
    check_generates(config)
    return config


def load_model(options: argparse.Namespace) -> DiffusionModel:
    """Return the model that flags name."""
    setup = model_setup(options, {})
    check_weights(setup["ckpt"])
    config = read_config(options, setup)
    from ldm.generate import load_model_from_config

    return load_model_from_config(config, setup["ckpt"], device=options.device, dtype=setup["dtype"], lightning=False)
