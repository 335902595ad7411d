"""What the command lines read besides single values: stages, files of prompts, lists of seeds, files of concepts."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ldm.cli.flags import add_field_flag
from ldm.files.hub import fetch, is_hub
from ldm.files.shipped import shipped
from ldm.files.texts import read_text
from ldm.request import PRESETS, Request, check_placeholder, mentions, shown

MAX_SEEDS = 1000
WHOLE_FILES = ("embeddings.safetensors", "learned_embeds.safetensors")  # of a concept's folder


def seeds(text: str) -> list[int]:
    """One seed, or all of a range such as 10-13."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if not 0 <= last - first < MAX_SEEDS:
        raise argparse.ArgumentTypeError(f"'{text}' is neither a seed (42) nor a range of up to {MAX_SEEDS} (42-45)")
    return list(range(first, last + 1))


# --- stages ----------------------------------------------------------------------------------------------------


def add_stage_flags(group: argparse._ArgumentGroup) -> None:
    """Add --stages and --preset, of which one can be given."""
    stages = group.add_mutually_exclusive_group()
    help_stages = (
        "texts that replace * by stage, 0 being the end of sampling: '7-9=a mug' '0-6=a blue mug', open ranges (5-), "
        "numbers for learned tokens (0-4=3); or preset:ATTRIBUTE"
    )
    stages.add_argument("--stages", nargs="+", action="extend", metavar="RANGE=TEXT", help=help_stages)
    add_field_flag(stages, Request, "preset", metavar="ATTRIBUTE")


def entry(text: str) -> str | int:
    """An entry of a list of words: a number is the learned token of that stage or layer, anything else a text."""
    return int(text) if re.fullmatch(r"-?\d{1,9}", text) else text


def read_stages(texts: Sequence[str], num_stages: int) -> dict[str, Any]:
    """Return the texts of `--stages` as `preset`, or as `prospect_words`, where stages that are not named are None.

    Args:
        texts: `preset:NAME` alone, or `RANGE=TEXT`: a range is a stage (3), several (0-6) or open (5-); a text that
            is a number is the learned token of that stage.

    Raises:
        ValueError: something else, a stage that there is not, or one that is given twice.
    """
    if len(texts) == 1 and texts[0].startswith("preset:"):
        return {"preset": texts[0].removeprefix("preset:")}
    words: dict[int, str | int] = {}
    for text in texts:
        match = re.fullmatch(r"\s*(\d{1,4})(-(\d{1,4})?)?\s*=(.*)", text, re.DOTALL)
        first, last = (int(match[1]), int(match[3] or (num_stages - 1 if match[2] else match[1]))) if match else (1, 0)
        if match is None or not first <= last < num_stages:
            kinds = f"of the stages 0 (the end of sampling) to {num_stages - 1}: 7-9=TEXT, 3=TEXT or 5-=TEXT"
            raise ValueError(f"--stages: {shown(text)} must be RANGE=TEXT, {kinds}; or preset:{PRESETS[2]} alone.")
        new = dict.fromkeys(range(first, last + 1), entry(match[4]))
        if twice := words.keys() & new:
            raise ValueError(f"--stages gives stage {min(twice)} twice; let '{text}' leave it out.")
        words |= new
    return {"prospect_words": [words.get(stage) for stage in range(num_stages)]}


# --- prompts ---------------------------------------------------------------------------------------------------


def read_prompts(file: str | Path, names: Sequence[str], num_stages: int) -> list[dict[str, Any]]:
    """Return the entries of a file of prompts, each as arguments of a request.

    Args:
        file: a text with a prompt in each line (empty lines and those that begin with # do not count), or YAML: a
            list of prompts, or of mappings of arguments.
        names: what a mapping may give, beside `stages`.

    Raises:
        ValueError: there is no such file, it holds no prompt, or an entry is something else.
    """
    if Path(file).suffix.lower() in (".yaml", ".yml"):
        from ldm.yaml_files import read_yaml

        content = read_yaml(file, "--prompts", "file", "a text that begins with * needs quotes").content
        entries: object = [content] if isinstance(content, dict) else content
    else:  # other separators of Unicode are part of a prompt
        lines = (line.strip() for line in re.split(r"\r\n?|\n", read_text(file, "--prompts")))
        entries = [line for line in lines if line and not line.startswith("#")]
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"'{file}' holds no prompts; write one in each line, or a YAML list of prompts.")
    return [_arguments(file, entry, names, num_stages) for entry in entries]


def _arguments(file: str | Path, entry: object, names: Sequence[str], num_stages: int) -> dict[str, Any]:
    if not isinstance(entry, Mapping):
        return {"prompt": entry}
    given = dict(entry)
    for name in given:
        if name not in (*names, "stages"):
            from ldm.config import nearest

            raise ValueError(f"'{file}': there is no argument '{name}'{nearest(str(name), [*names, 'stages'])}.")
    if (stages := given.pop("stages", None)) is not None:
        texts = [stages] if isinstance(stages, str) else stages
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"'{file}': stages must be a list such as ['7-9=a mug', '0-6=a blue mug'].")
        given |= read_stages(texts, num_stages)
    return given


# --- concepts --------------------------------------------------------------------------------------------------


def concept_files(texts: Sequence[str], own: str, prompts: str = "") -> dict[str, str]:
    """Return `FILE` or `NAME=FILE`, several times, as {placeholder: file}.

    A file without a name is called what it calls itself; where `prompts` have only `own` for it, or it has no name, it
    is called that.
    """
    concepts: dict[str, str] = {}
    for text in texts:
        name, sign, file = text.partition("=")
        if not sign or os.path.isfile(text):
            file = shipped(text)
            name = placeholder_in(file) or own
            if mentions(prompts, own) and not mentions(prompts, name):
                name = own
        if not name or name in concepts:
            raise ValueError(f"--concept {text}: give every concept a name of its own, as in '<vase>={file}'.")
        concepts[name] = shipped(file)  # behind a =, the shell does not expand ~
    return concepts


def placeholder_in(file: str) -> str | None:
    """Return what a concept's file says to be called, without importing anything that reads tensors.

    That is in a safetensors file's description, or in token_identifier.txt of a folder or beside the file.
    """
    if is_hub(file):
        file = str(fetch(file)[0])
    path = Path(file)
    folder = path if os.path.isdir(path) else path.parent
    path = next((path / name for name in WHOLE_FILES if os.path.isfile(path / name)), path)
    # any file may be given here, and says anything; `load_concept` has the sentences
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, StopIteration):
        if (beside := folder / "token_identifier.txt").is_file():
            name = read_text(beside, "--concept").strip()
        elif os.path.isfile(path):  # a pipe would be waited for
            with path.open("rb") as stream:
                size = int.from_bytes(stream.read(8), "little")
                header = json.loads(stream.read(min(size, 1 << 20)))
            own = header.pop("__metadata__", {}).get("placeholder")
            name = own or next(name for name in header if len(header) == 1 and name.startswith("<"))
        else:
            return None
        check_placeholder(name)
        return name
    return None
