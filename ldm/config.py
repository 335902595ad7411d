"""Load, merge and check YAML configurations, and build the objects they name."""

from __future__ import annotations

import difflib
import importlib
import inspect
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

logger = logging.getLogger(__name__)

# A `target:` may only name a class that is defined below one of these; a configuration adds its own packages
# with a top-level `allow_targets: [my_package]`.
ALLOWED_TARGETS = (
    "ldm",
    "main",
    "torch.nn.modules.linear.Identity",
    "pytorch_lightning.callbacks",
    "pytorch_lightning.loggers",
    "taming.modules.vqvae",
)
CONFIG_KEYS = ("target", "params", "base_learning_rate")  # of a section that names a class
TOP_LEVEL_KEYS = ("model", "data", "lightning", "allow_targets")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says which key and what to do."""


def load_config(*paths: str | Path, overrides: Sequence[str] = ()) -> DictConfig:
    """Merge YAML files from left to right, then dot-list `overrides` such as `model.params.image_size=8`.

    Raises:
        ConfigError: a file is missing, is not YAML, or holds an unknown top-level section.
    """
    configs = []
    for path in map(Path, paths):
        if not path.is_file():
            raise ConfigError(f"There is no configuration file '{path}'; check the path given with --base.")
        try:
            config = OmegaConf.load(path)
        except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
            first_line = str(error).splitlines()[0]
            raise ConfigError(f"'{path}' is not a readable YAML file ({first_line}).") from error
        if not isinstance(config, DictConfig):
            raise ConfigError(f"'{path}' must hold a YAML mapping with the sections {', '.join(TOP_LEVEL_KEYS)}.")
        configs.append(config)
    try:
        merged = OmegaConf.merge(*configs, OmegaConf.from_dotlist(list(overrides)))
    except (OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(f"The configuration cannot be merged: {str(error).splitlines()[0]}.") from error
    for key in merged:
        if key not in TOP_LEVEL_KEYS:
            raise ConfigError(f"Unknown section '{key}' in the configuration{nearest(str(key), TOP_LEVEL_KEYS)}")
    return merged


def nearest(name: str, known: Sequence[str]) -> str:
    """The end of a sentence: `; did you mean 'x'?` for the closest known name, or what is known."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(known)}."


def get_class(target: str, allowed: Sequence[str] = ()) -> type:
    """The class that the dotted path `target` names.

    Raises:
        ConfigError: the path is outside the allow-list, does not exist, or is not a class.
    """
    module_name, _, name = str(target).rpartition(".")
    allow_list = (*ALLOWED_TARGETS, *allowed)
    is_alias = target == "torch.nn.Identity"  # public name of an allowed class
    if not is_alias and not _is_below(str(target), allow_list):
        raise ConfigError(
            f"target '{target}' is outside the packages a configuration may name ({', '.join(allow_list)}); "
            "if you trust it, add its package to `allow_targets` in the configuration."
        )
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"target '{target}' cannot be imported: {error}.") from error
    if not inspect.isclass(found) or not _is_below(f"{found.__module__}.{found.__qualname__}", allow_list):
        raise ConfigError(f"target '{target}' must be a class defined in {', '.join(allow_list)}.")
    return found


def _is_below(path: str, packages: Sequence[str]) -> bool:
    return any(path == package or path.startswith(package + ".") for package in packages)


def instantiate_from_config(config: Mapping[str, Any], allowed: Sequence[str] = (), **extra: Any) -> Any:
    """Build `config.target(**config.params, **extra)`.

    A class may list reference keys that lost their meaning in `ignored_keys: dict[name, reason]`; each is
    accepted with one logged line. Every other key that the constructor does not take is an error.

    Raises:
        ConfigError: `target` is missing or refused, a parameter is unknown or missing.
    """
    if "target" not in config:
        raise ConfigError(f"A `target:` is missing beside the keys {', '.join(map(str, config)) or '(none)'}.")
    for key in config:
        if key not in CONFIG_KEYS:
            raise ConfigError(
                f"Unknown key '{key}' beside `target: {config['target']}`{nearest(str(key), CONFIG_KEYS)}"
            )
    cls = get_class(config["target"], allowed)
    params = config.get("params") or {}
    params = OmegaConf.to_container(params, resolve=True) if OmegaConf.is_config(params) else dict(params)
    params.update(extra)
    for key, reason in getattr(cls, "ignored_keys", {}).items():
        if key in params:
            logger.info("%s: '%s' is accepted and not used: %s", cls.__name__, key, reason)
            del params[key]
    check_parameters(cls, params)
    try:
        return cls(**params)
    except TypeError as error:  # most often a text where a number belongs
        raise ConfigError(f"{cls.__name__} cannot be built from its parameters: {error}.") from error


def check_parameters(cls: type, params: Mapping[str, Any]) -> None:
    """Raise `ConfigError` unless `cls(**params)` has all it needs and nothing it does not know."""
    parameters = inspect.signature(cls).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for key in params:
            if key not in parameters:
                raise ConfigError(f"{cls.__name__} has no parameter '{key}'{nearest(key, list(parameters))}")
    for name, p in parameters.items():
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and name not in params:
            raise ConfigError(f"{cls.__name__} needs the parameter '{name}', which the configuration does not give.")
