"""Load, merge and check YAML configurations, and build the objects they name."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

logger = logging.getLogger(__name__)

# A `target:` may only name a class that is defined below one of these, or in a package that the caller allows.
# A configuration cannot allow anything itself: it may come from a stranger.
ALLOWED_TARGETS = (
    "ldm",
    "evaluation",
    "main",
    "torch.nn.modules.linear.Identity",
    "pytorch_lightning.callbacks",
    "pytorch_lightning.loggers",
    "taming.modules.vqvae",
)
CONFIG_KEYS = ("target", "params", "base_learning_rate")  # of a section that names a class
TOP_LEVEL_KEYS = ("model", "data", "lightning", "parts")
SECTIONS = (
    *("model", "model.params", "data", "data.params", "data.params.train", "data.params.validation", "lightning"),
    *(
        "lightning.trainer",
        "lightning.callbacks",
        "lightning.logger",
        "lightning.logger.params",
        "lightning.modelcheckpoint",
        "lightning.modelcheckpoint.params",
        "parts",
    ),
)
# What constructors do with values of a wrong type or size, beside the ValueErrors that they raise themselves.
MISMATCHES = (TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError)
MAX_NODES = 100_000  # of a YAML file whose aliases are written out

_allowed: set[str] = set()


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says which key and what to do."""


def allow_targets(*packages: str) -> None:
    """Let the configurations of this process name classes of `packages` too, as in `allow_targets("my_package")`."""
    _allowed.update(packages)


def read_yaml(path: str | Path, flag: str, what: str = "configuration file", hint: str = "mend that place") -> str:
    """The text of a YAML file that is safe to parse; `flag` is where the path came from.

    Raises:
        ConfigError: there is no such file, it is not YAML, or its aliases or its depth would fill the memory.
    """
    path = Path(path)
    if not path.is_file():
        problem = f"'{path}' is a folder and no {what}" if path.is_dir() else f"There is no {what} '{path}'"
        raise ConfigError(f"{problem}; check the path given with {flag}.")
    try:
        text = path.read_text(encoding="utf-8")
        nodes = _count_nodes(yaml.compose(text, yaml.SafeLoader), {})
    except RecursionError as error:
        raise ConfigError(f"'{path}' is nested too deeply; write it with fewer levels.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        first_line = str(error).splitlines()[0]
        raise ConfigError(f"'{path}' is not a readable YAML file ({first_line}); {hint}.") from error
    if nodes > MAX_NODES:
        raise ConfigError(f"'{path}' has aliases that stand for more than {MAX_NODES} entries; write it without them.")
    return text


def read_yaml_content(path: str | Path, flag: str, what: str, hint: str = "mend that place") -> object:
    """The content of a YAML file as plain Python values; see `read_yaml`.

    Raises:
        ConfigError: as `read_yaml`, or a value that does not fit its tag, such as `!!bool x`.
    """
    text = read_yaml(path, flag, what, hint)
    try:
        return yaml.safe_load(text)
    except Exception as error:  # PyYAML's constructors fail with KeyError, AttributeError, IndexError, …
        cause = str(error).partition("\n")[0] if isinstance(error, (yaml.YAMLError, ValueError)) else "a tag's value"
        raise ConfigError(f"'{path}' is not a readable YAML file ({cause}); {hint}.") from error


def _count_nodes(node: yaml.Node | None, counts: dict[int, float]) -> float:
    """Entries of a YAML tree with its aliases written out; infinite for one that contains itself."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in counts:
        counts[id(node)] = math.inf  # until it is known
        pairs = isinstance(node, yaml.MappingNode)
        children = [child for pair in node.value for child in pair] if pairs else node.value
        counts[id(node)] = 1 + sum(_count_nodes(child, counts) for child in children)
    return counts[id(node)]


def load_config(*paths: str | Path, overrides: Sequence[str] = (), flag: str = "--base") -> DictConfig:
    """Merge YAML files from left to right, then dot-list `overrides` such as `model.params.image_size=8`.

    Raises:
        ConfigError: a file is missing, is not YAML, or holds an unknown top-level section.
    """
    configs = []
    for path in map(Path, paths):
        text = read_yaml(path, flag)
        try:
            config = OmegaConf.create(text) if text.strip() else OmegaConf.create()
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            first_line = str(error).splitlines()[0]
            raise ConfigError(f"'{path}' is not a readable YAML file ({first_line}); mend that place.") from error
        if not isinstance(config, DictConfig):
            raise ConfigError(f"'{path}' must hold a YAML mapping with the sections {', '.join(TOP_LEVEL_KEYS)}.")
        configs.append(config)
    try:
        merged = OmegaConf.merge(*configs, OmegaConf.from_dotlist(list(overrides)))
    except (OmegaConfBaseException, yaml.YAMLError, TypeError, AssertionError) as error:
        raise ConfigError(f"The configuration cannot be merged: {str(error).splitlines()[0]}.") from error
    for key in merged:
        if key == "allow_targets":
            raise ConfigError("A configuration cannot allow its own targets; if you trust it, use --allow_targets.")
        if key not in TOP_LEVEL_KEYS:
            raise ConfigError(f"Unknown section '{key}' in the configuration{nearest(str(key), TOP_LEVEL_KEYS)}")
    check_sections(merged, *SECTIONS)
    return merged


def check_sections(config: DictConfig, *names: str) -> None:
    """Raise `ConfigError` where one of `names` is there and is no mapping."""
    for name in names:
        *parents, key = name.split(".")
        parent = OmegaConf.select(config, ".".join(parents)) if parents else config
        if parent is not None and parent.get(key) is not None and not isinstance(parent[key], DictConfig):
            raise ConfigError(f"'{name}:' must be a section with keys of its own, not {parent[key]!r}.")


def check_generates(config: DictConfig) -> None:
    """Raise `ConfigError` unless `config` is of a model that makes images from text; nothing is imported."""
    if OmegaConf.select(config, "model.params") is None or "target" not in config.model:
        raise ConfigError("The configuration does not say 'model:' with 'target:' and 'params:'; see configs/.")
    if not {"unet_config", "first_stage_config", "cond_stage_config"} <= set(config.model.params):
        use = "such as configs/demo/finetune.yaml or configs/stable-diffusion/v1-inference.yaml"
        raise ConfigError(f"A {config.model.target} makes no images from text; use a whole model's file, {use}.")


def nearest(name: str, known: Sequence[str]) -> str:
    """The end of a sentence: `; did you mean 'x'?` for the closest known name, or what is known."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(known)}."


def get_class(target: str) -> type:
    """The class that the dotted path `target` names.

    Raises:
        ConfigError: the path is outside the allow-list, does not exist, or is not a class.
    """
    module_name, _, name = str(target).rpartition(".")
    allow_list = (*ALLOWED_TARGETS, *sorted(_allowed))
    is_alias = target == "torch.nn.Identity"  # public name of an allowed class
    if not is_alias and not _is_below(str(target), allow_list):
        raise ConfigError(
            f"target '{target}' is outside the packages a configuration may name ({', '.join(allow_list)}); "
            "if you trust it, allow its package with --allow_targets."
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


def instantiate_from_config(config: Mapping[str, Any], **extra: Any) -> Any:
    """Build `config.target(**config.params, **extra)`.

    A class may list reference keys that lost their meaning in `ignored_keys: dict[name, reason]`; each is
    accepted with one logged line. Every other key that the constructor does not take is an error.

    Raises:
        ConfigError: `target` is missing or refused, a parameter is unknown or missing.
    """
    if not isinstance(config, Mapping | DictConfig):
        raise ConfigError(f"A section with a `target:` must be a mapping, not {config!r}.")
    if "target" not in config:
        raise ConfigError(f"A `target:` is missing beside the keys {', '.join(map(str, config)) or '(none)'}.")
    for key in config:
        if key not in CONFIG_KEYS:
            raise ConfigError(
                f"Unknown key '{key}' beside `target: {config['target']}`{nearest(str(key), CONFIG_KEYS)}"
            )
    cls = get_class(config["target"])
    params = config.get("params") or {}
    if not isinstance(params, Mapping | DictConfig):
        raise ConfigError(f"`params:` of {cls.__name__} must be a mapping, not {params!r}.")
    try:
        params = OmegaConf.to_container(params, resolve=True) if OmegaConf.is_config(params) else dict(params)
    except OmegaConfBaseException as error:  # ${…} that leads nowhere
        raise ConfigError(f"The parameters of {cls.__name__}: {str(error).splitlines()[0]}.") from error
    params.update(extra)
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


def check_parameters(cls: type, params: Mapping[str, Any]) -> None:
    """Raise `ConfigError` unless `cls(**params)` has all it needs and nothing it does not know."""
    parameters = inspect.signature(cls).parameters
    options = getattr(cls, "options_type", None)  # a dataclass whose fields are taken as keywords
    known = [*parameters, *(field.name for field in dataclasses.fields(options))] if options else [*parameters]
    if options or not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for key in params:
            if key not in known:
                raise ConfigError(f"{cls.__name__} has no parameter '{key}'{nearest(key, known)}")
    for name, p in parameters.items():
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and name not in params:
            raise ConfigError(f"{cls.__name__} needs the parameter '{name}', which the configuration does not give.")
