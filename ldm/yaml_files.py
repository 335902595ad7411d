"""YAML files of strangers, checked before they are parsed: what is read is what the text says, and is not endless."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf.errors import OmegaConfBaseException
from yaml.error import MarkedYAMLError
from yaml.reader import ReaderError

# What constructors do with values of a wrong type or size, beside the ValueErrors that they raise themselves.
MISMATCHES = (TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError)
MAX_NODES = 20_000  # of a YAML file, also with its aliases written out
MAX_BYTES = 512 << 10  # its parser needs seconds for them

_WINDOWS_PATH = re.compile(r"[A-Za-z]:[\x00-\x1f\x85\xa0\u2028\u2029]")
_MERGE = "tag:yaml.org,2002:merge"  # the key `<<`
_BACKSLASH = "in double quotes a backslash begins an escape: put paths in single quotes, or write /"


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says which key and what to do."""


class Yaml(NamedTuple):
    text: str
    content: object  # plain Python values


def read_yaml(path: str | Path, flag: str, what: str = "configuration file", hint: str = "correct that place") -> Yaml:
    """Return a YAML file that is safe to parse.

    Args:
        flag: where the path came from.
        what: how to call the file.
        hint: what to do about a mistake in it.

    Raises:
        ConfigError: there is no such file, it is not YAML, a key is there twice, or its aliases or its depth would
            fill the memory. The message names the line and the column.
    """
    path = Path(path).expanduser()
    if not os.path.isfile(path):  # unlike pathlib's, no error for a name that is too long
        problem = f"'{path}' is a folder and no {what}" if os.path.isdir(path) else f"There is no {what} '{path}'"
        raise ConfigError(f"{problem}; check the path given with {flag}.")
    if path.stat().st_size > MAX_BYTES:
        raise ConfigError(f"'{path}' has {path.stat().st_size >> 10} KB; a {what} has at most {MAX_BYTES >> 10} KB.")
    try:
        text = path.read_bytes().decode("utf-8")
        return Yaml(text, _parse(text))
    except RecursionError as error:
        raise ConfigError(f"'{path}' is nested too deeply; write it with fewer levels.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"'{path}' is not a readable YAML file ({_yaml_problem(error)}); {hint}.") from error
    except ConfigError as error:
        raise ConfigError(f"'{path}' {error}") from error


class _Loader(yaml.SafeLoader):
    """Refuses text that loaders read as something else than it says, or that is endless."""

    nodes = 0

    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise ConfigError(f"has more than {MAX_NODES} entries; write fewer.")
        return super().compose_node(parent, index)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE):
            if key.value in seen:
                raise MarkedYAMLError(problem=f"the key '{key.value}' is there twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return node

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        node = super().compose_scalar_node(anchor)
        if node.style == '"' and _WINDOWS_PATH.match(node.value):
            raise MarkedYAMLError(problem=_BACKSLASH, problem_mark=node.start_mark)
        try:
            if node.tag != _MERGE:
                yaml.SafeLoader("").construct_object(node)
        except (ValueError, *MISMATCHES) as error:
            problem = f"'{node.value:.40}' is no value of the type {node.tag.rpartition(':')[2]}"
            raise MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from error
        return node


def _parse(text: str) -> object:
    """Return the values of a text; raises `YAMLError` where loaders would read something else than it says."""
    root = yaml.compose(text, _Loader)
    if root is None:
        return None
    if _count_nodes(root, {}) > MAX_NODES:
        raise ConfigError(f"has aliases that stand for more than {MAX_NODES} entries; write it without them.")
    return yaml.SafeLoader("").construct_document(root)


@contextmanager
def in_one_sentence(what: str) -> Iterator[None]:
    """Turn any error of YAML or OmegaConf into a `ConfigError` that begins with `what`."""
    try:
        yield
    except ConfigError:
        raise
    except (yaml.YAMLError, OmegaConfBaseException, AssertionError, ValueError, *MISMATCHES) as error:
        raise ConfigError(f"{what} ({_yaml_problem(error)}).") from error


def _yaml_problem(error: Exception) -> str:
    """Return the place and the reason of an error, in one line."""
    if isinstance(error, UnicodeDecodeError):
        line = error.object[: error.start].count(b"\n") + 1
        return f"line {line} is not UTF-8 text"
    if isinstance(error, ReaderError):
        return f"character {error.position + 1} is #x{error.character:04x}, which YAML does not allow"
    if not isinstance(error, MarkedYAMLError) or error.problem is None:
        return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    problem = " ".join(error.problem.split())
    if "escape" in problem:
        problem += f"; {_BACKSLASH}" if problem != _BACKSLASH else ""
    elif "'\\t'" in problem:
        problem += "; indent with spaces"
    mark = error.problem_mark or error.context_mark
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}" if mark else problem


def _count_nodes(node: yaml.Node | None, counts: dict[int, float]) -> float:
    """Count the entries of a YAML tree with its aliases written out; infinite for one that contains itself."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in counts:
        counts[id(node)] = math.inf  # until it is known
        pairs = isinstance(node, yaml.MappingNode)
        children = [child for pair in node.value for child in pair] if pairs else node.value
        counts[id(node)] = 1 + sum(_count_nodes(child, counts) for child in children)
    return counts[id(node)]
