"""Load, merge and check configurations, and build the objects they name."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ldm.yaml_files import MISMATCHES, ConfigError, in_one_sentence, read_yaml

logger = logging.getLogger(__name__)

# A `target:` may only name a class that is defined below one of these, or in a package that the caller allows.
# A configuration cannot allow anything itself: it may come from a stranger.
ALLOWED_TARGETS = (
    "ldm",
    "evaluation",
    "torch.nn.modules.linear.Identity",
    "pytorch_lightning.callbacks",
    "pytorch_lightning.loggers",
    "taming.modules.vqvae",
)
# Other names of classes; the reference's main.py defines the first two.
ALIASES = {
    "main.DataModuleFromConfig": "ldm.data.datamodule.DataModuleFromConfig",
    "main.ImageLogger": "ldm.training.callbacks.ImageLogger",
    "torch.nn.Identity": "torch.nn.modules.linear.Identity",
}
# Values that are paths, where they stand in a file: relative to it, if they lead somewhere from there.
PATH_KEYS = ("tokenizer", "data_root", "ckpt_path", "first_stage_ckpt", "cond_stage_ckpt", "embedding_manager_ckpt")
CONFIG_KEYS = ("target", "params", "base_learning_rate")  # of a section that names a class
TOP_LEVEL_KEYS = ("model", "data", "lightning")
SECTIONS = (
    *("model", "model.params", "data", "data.params", "data.params.train", "data.params.validation", "lightning"),
    *("lightning.trainer", "lightning.callbacks", "lightning.logger", "lightning.logger.params"),
    *("lightning.modelcheckpoint", "lightning.modelcheckpoint.params"),
)

_PLAIN_INTERPOLATION = re.compile(r"\$\{[^{}:$]*\}")
_ESCAPED = re.compile(r"(?<!\\)(?:\\\\)*\\\$\{")

_allowed: set[str] = set()


def allow_targets(*packages: str) -> None:
    """Let the configurations of this process name classes of `packages` too, as in `allow_targets("my_package")`."""
    _allowed.update(packages)


def load_config(
    *paths: str | Path, overrides: Sequence[str] = (), flag: str = "--base", resolvers: bool = False
) -> DictConfig:
    """Merge YAML files from left to right, then dot-list `overrides` such as `model.params.image_size=8`.

    Args:
        resolvers: allow OmegaConf's resolvers, such as `${oc.env:HOME}`; `${model.params.channels}` always works.

    Raises:
        ConfigError: a file is missing, is not YAML, holds an unknown top-level section, or calls a resolver.
    """
    merged = OmegaConf.create()
    for part in (*(_parse_file(path, flag) for path in paths), _parse_overrides(overrides)):
        if not resolvers:
            _check_resolvers(part)
        merged = merge(merged, part)
    for key in map(str, merged):
        if key not in TOP_LEVEL_KEYS:
            raise ConfigError(f"Unknown section '{key!s:.60}' in the configuration{nearest(key, TOP_LEVEL_KEYS)}")
    for name in SECTIONS:
        with in_one_sentence(f"The section '{name}' cannot be read"):
            section = OmegaConf.select(merged, name)
        if section is not None and not isinstance(section, DictConfig):
            raise ConfigError(f"'{name}:' must be a section with keys of its own, not {section!r}.")
    return merged


def merge(first: DictConfig | dict[str, Any], second: DictConfig) -> DictConfig:
    """Return both configurations in one, where `second` decides.

    Raises:
        ConfigError: one has a list or a section where the other has something else.
    """
    with in_one_sentence("The configuration cannot be merged"):
        merged = OmegaConf.merge(first, second)
        assert isinstance(merged, DictConfig)
        return merged


def _parse_file(path: str | Path, flag: str) -> DictConfig:
    text = read_yaml(path, flag).text
    with in_one_sentence(f"'{path}' is not a readable YAML file"):
        config = OmegaConf.create(text) if text.strip() else OmegaConf.create()
    if not isinstance(config, DictConfig):
        raise ConfigError(f"'{path}' must hold a YAML mapping with the sections {', '.join(TOP_LEVEL_KEYS)}.")
    _find_beside(config, Path(path).expanduser().parent)
    return config


def _find_beside(config: DictConfig, folder: Path) -> None:
    """Let relative paths that lead somewhere from the file's folder say so from the current one."""
    for key, value in flatten(config).items():
        if key.rpartition(".")[2] in PATH_KEYS and isinstance(value, str) and value and "${" not in value:
            place = Path(os.path.normpath(folder / value))
            if not os.path.isabs(value) and place.exists():
                OmegaConf.update(config, key, literal(str(place)))


def _parse_overrides(overrides: Sequence[str]) -> DictConfig:
    parsed = OmegaConf.create()
    for text in overrides:
        with in_one_sentence(f"{text!r:.80} cannot be read as key=value"):
            parsed.merge_with_dotlist([text])
    return parsed


def _check_resolvers(config: DictConfig) -> None:
    """Raise `ConfigError` where a value calls a resolver: a stranger's file could read the environment.

    Only `${key.other}` is let through, also within another: whatever else OmegaConf may read is refused.
    """
    for key, value in flatten(config).items():
        if isinstance(value, str) and "${" in value:
            rest, count = _ESCAPED.sub("", value), 1
            while count:
                rest, count = _PLAIN_INTERPOLATION.subn("x", rest)
            if "${" in rest:
                remedy = "write the value itself, or use --allow_resolvers if you trust it"
                raise ConfigError(f"{key}: '{value:.80}' calls a resolver, which a configuration may not; {remedy}.")


def flatten(config: DictConfig | dict[str, Any]) -> dict[str, object]:
    """Return {dotted key: value} of all values but mappings and lists; interpolations stay as they are written."""
    flat: dict[str, object] = {}

    def walk(value: object, key: str) -> None:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
        if not items:
            flat[key] = value
            return
        for name, inner in items:
            walk(inner, f"{key}.{name}" if key else str(name))

    walk(OmegaConf.to_container(config) if isinstance(config, DictConfig) else config, "")
    return flat


def literal(value: object) -> object:
    """Return a value that OmegaConf takes as it is: `${` in a name or a word is no interpolation."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return [literal(item) for item in value] if isinstance(value, list) else value


def as_config(config: Mapping[str, Any] | DictConfig) -> DictConfig:
    """Return a copy that can be changed, of a plain dict or of a configuration in struct or read-only mode.

    Raises:
        ConfigError: it is no mapping, or holds what OmegaConf cannot.
    """
    with in_one_sentence("The configuration cannot be used"):
        copy = OmegaConf.create(OmegaConf.to_container(config) if OmegaConf.is_config(config) else dict(config))
        assert isinstance(copy, DictConfig)
        return copy


def resolved(section: Mapping[str, Any] | DictConfig, what: str) -> dict[str, Any]:
    """Return the plain values of a section, with `${…}` filled in.

    Raises:
        ConfigError: one leads nowhere, or it is no section; `what` is how to call it.
    """
    with in_one_sentence(f"{what} cannot be read as a section"):
        values: Any = OmegaConf.to_container(section, resolve=True) if OmegaConf.is_config(section) else dict(section)
        return {str(key): value for key, value in values.items()}


def check_generates(config: DictConfig) -> None:
    """Raise `ConfigError` unless `config` is of a model that makes images from text; nothing is imported."""
    params = OmegaConf.select(config, "model.params") or ()
    if not {"unet_config", "first_stage_config", "cond_stage_config"} <= set(params) or "target" not in config.model:
        raise ConfigError(
            "The configuration makes no images from text: 'model:' needs 'target:' and 'params:' with unet_config, "
            "first_stage_config and cond_stage_config; use a file such as configs/stable-diffusion/v1-inference.yaml."
        )


def nearest(name: str, known: Sequence[str]) -> str:
    """Return the end of a sentence: `; did you mean 'x'?` for the closest known name, or what is known."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(known)}."


def get_class(target: str) -> type:
    """Return the class that the dotted path `target` names.

    Raises:
        ConfigError: the path is outside the allow-list, does not exist, or is not a class.
    """
    target = ALIASES.get(str(target), str(target))
    module, _, name = target.rpartition(".")
    packages = (*ALLOWED_TARGETS, *sorted(_allowed))
    try:
        found = getattr(importlib.import_module(module), name) if _is_below(target, packages) else None
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"target '{target}' cannot be imported: {error}.") from error
    if not inspect.isclass(found) or not _is_below(f"{found.__module__}.{found.__qualname__}", packages):
        raise ConfigError(
            f"target '{target}' is no class, or outside the packages a configuration may name ({', '.join(packages)}); "
            "if you trust it, allow its package with --allow_targets."
        )
    return found


def _is_below(path: str, packages: Sequence[str]) -> bool:
    return any(path == package or path.startswith(package + ".") for package in packages)


def instantiate_from_config(config: Mapping[str, Any], **extra: Any) -> Any:
    """Build `config.target(**config.params, **extra)`.

    A class may list reference keys that lost their meaning in `ignored_keys: dict[name, reason]`; each is
    accepted with one logged line. Every other key that the constructor does not take is an error.

    Raises:
        ConfigError: `target` is missing or refused, a parameter is unknown or missing.
    """
    if not isinstance(config, Mapping) or "target" not in config:
        raise ConfigError(f"A `target:` is missing in {config!r:.80}; see configs/.")
    if unknown := [str(key) for key in config if key not in CONFIG_KEYS]:
        remedy = nearest(unknown[0], CONFIG_KEYS)
        raise ConfigError(f"Unknown key '{unknown[0]}' beside `target: {config['target']}`{remedy}")
    cls = get_class(config["target"])
    params = resolved(config.get("params") or {}, f"`params:` of {cls.__name__}") | extra
    for key, reason in getattr(cls, "ignored_keys", {}).items():
        if key in params:
            logger.info("%s: '%s' is accepted and not used: %s", cls.__name__, key, reason)
            del params[key]
    check_parameters(cls, params)
    try:
        return cls(**params)
    except MISMATCHES as error:  # most often a text where a number belongs
        what = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise ConfigError(f"{cls.__name__} cannot be built from its parameters ({what}); compare configs/.") from error


def check_parameters(cls: Callable[..., Any], params: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for a parameter that a class or a function does not have; it names the nearest one."""
    parameters = inspect.signature(cls).parameters
    options = getattr(cls, "options_type", None)  # a dataclass whose fields are taken as keywords
    known = [*parameters, *(field.name for field in dataclasses.fields(options))] if options else [*parameters]
    takes_all = options is None and any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    unknown = [] if takes_all else [str(key) for key in params if key not in known]
    if unknown:
        raise ConfigError(f"{cls.__name__} has no parameter '{unknown[0]}'{nearest(unknown[0], known)}")
