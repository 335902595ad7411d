"""The arguments of `ldm.generate.main` that flags, a YAML file and the record of a picture give.

An argument comes from the last of these that gives it: the picture of `--from`, the YAML file of `--words`, the flags.
What a preset made is not taken from the picture then, but made anew: its text and its attribute are in the record.
"""

from __future__ import annotations

import argparse
import inspect
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ldm.cli.sampling_flags import MODEL_DEFAULTS

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion

logger = logging.getLogger(__name__)

NOT_SETTABLE = ("model", "callback")  # arguments of `main` that are objects
# In a picture's record: what `prompt` and `prospect_words` were made from, where a preset made them.
PRESET, PRESET_PROMPT = "preset", "preset_prompt"
TEXTS = ("prompt", "prospect_words")


def recorded_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """What the picture of `--from` says of itself; empty without one.

    Raises:
        ValueError: there is no such picture, it says nothing, or its model is to be given.
    """
    from ldm.generate import read_parameters

    if options.source is None:
        return {}
    if not Path(options.source).exists():
        raise ValueError(f"There is no file '{options.source}'; check the path given with --from.")
    recorded = read_parameters(options.source)
    if "ckpt" not in recorded and options.ckpt is None:
        used, name = Path(MODEL_DEFAULTS["ckpt"]).name, recorded.get("base_model")
        if name != used:
            raise ValueError(f"'{options.source}' was made with the model '{name}'; give it with --ckpt and --config.")
    return recorded


def warn_of_changed_concepts(
    recorded: Mapping[str, Any], concepts: Mapping[str, str], hashes: Mapping[str, str]
) -> None:
    """Warn of concepts of the picture of `--from` whose files are others now.

    Args:
        concepts: placeholder -> file, those that are used now.
        hashes: placeholder -> the file's hash.
    """
    was, files = (recorded.get(key) for key in ("concept_hashes", "concepts"))
    if not isinstance(was, Mapping) or not isinstance(files, Mapping):
        return
    for name, file in concepts.items():
        if files.get(name) == file and name in was and was[name] != hashes.get(name):
            logger.warning(
                "The concept '%s' (%s) is another file than the one that the picture was made with.", name, file
            )


def warn_of_changed_content(recorded: Mapping[str, Any], content: str | None) -> None:
    """Warn of a content picture of `--from` whose file shows something else now."""
    from ldm.generate import content_hash, open_content

    was = recorded.get("content_hash")
    if content and was and content == recorded.get("content_dir") and was != content_hash(open_content(content)):
        logger.warning("The content picture '%s' is another than the one that was edited.", content)


def given_arguments(
    options: argparse.Namespace, recorded: Mapping[str, Any], outline: LatentDiffusion, ckpt: str
) -> tuple[dict[str, Any], dict[str, str]]:
    """The arguments of `main` that the picture, the YAML file and the flags give, and what a preset was given.

    Args:
        recorded: from `recorded_arguments`.
        outline: the model, without weights.
        ckpt: beside it lie the windows of presets that were measured for the model.

    Returns:
        The arguments, and for the new picture's record `{PRESET: attribute, PRESET_PROMPT: text}`; empty without.

    Raises:
        ValueError: an unknown argument or preset, or texts that cannot be put together; with the remedy.
    """
    from ldm.conditioning.presets import presets_beside
    from ldm.conditioning.prompts import PLACEHOLDER
    from ldm.config import nearest
    from ldm.generate import main

    settable = [name for name in inspect.signature(main).parameters if name not in NOT_SETTABLE]
    given = words_file(options.words) if options.words is not None else {}
    for name in given:
        if name not in settable:
            raise ValueError(f"'{options.words}': main has no argument '{name}'{nearest(str(name), settable)}.")
    given |= {name: value for name in settable if (value := getattr(options, name, None)) is not None}
    if options.concept:
        own = outline.embedding_manager.placeholder_strings[0] if outline.embedding_manager else PLACEHOLDER
        given["concepts"] = concept_files(options.concept, own)
    arguments = {name: value for name, value in recorded.items() if name in settable} | given
    check_types(arguments)
    preset = {} if options.preset is None else {PRESET: options.preset}
    texts = {name: given[name] for name in TEXTS if name in given} | preset
    made_of = {key: recorded[key] for key in (PRESET, PRESET_PROMPT) if isinstance(recorded.get(key), str)}
    if texts:
        texts = _put_together(recorded, texts, options.source)
        made_of = {PRESET: texts[PRESET], PRESET_PROMPT: texts.get("prompt", "")} if PRESET in texts else {}
        arguments = {name: value for name, value in arguments.items() if name not in TEXTS} | texts
    if texts and made_of:
        where = {"num_stages": outline.num_stages, "windows": presets_beside(ckpt)}
        words = preset_words(arguments.pop(PRESET), made_of[PRESET_PROMPT], arguments.get("concepts") or {}, **where)
        arguments |= {"prompt": PLACEHOLDER, "prospect_words": words}
    if arguments.get("prospect_words") is not None:
        arguments.setdefault("prompt", PLACEHOLDER)
    return arguments, made_of


def check_types(arguments: Mapping[str, Any]) -> None:
    """Raise ValueError for a prompt or concepts that are no texts."""
    prompt, concepts = arguments.get("prompt", ""), arguments.get("concepts") or {}
    if not isinstance(prompt, str):
        raise ValueError(f"prompt must be a text, not {prompt!r}; in YAML, put it in quotes.")
    if not isinstance(concepts, Mapping) or not all(isinstance(x, str) and x for x in concepts.values()):
        raise ValueError(f"concepts must be {{name: file}}, not {concepts!r}; give them with --concept NAME=FILE.")


def _put_together(recorded: Mapping[str, Any], given: Mapping[str, Any], source: str | None) -> dict[str, Any]:
    """`prompt`, and `prospect_words` or `PRESET`: those given, and for the others those that the picture was made of.

    Raises:
        ValueError: what the picture's words were made of is not recorded, and they cannot stay as they are.
    """
    from ldm.conditioning.prompts import PLACEHOLDER

    old = {name: recorded[name] for name in TEXTS if name in recorded}
    if PRESET in recorded:
        old = {PRESET: recorded[PRESET], "prompt": recorded.get(PRESET_PROMPT)}
        if not all(isinstance(value, str) for value in old.values()):
            raise ValueError(f"'{source}' has no readable preset; repeat it without --prompt, --preset and --word.")
    elif old.get("prospect_words") is None or old.get("prompt") != PLACEHOLDER:
        pass  # the prompt is a text of its own
    elif "prospect_words" not in given and not {PRESET, "prompt"} <= given.keys():
        raise ValueError(
            f"'{source}' does not say what its words were made of, so they cannot be changed in part; give --prompt "
            "with --preset, or all --word anew."
        )
    replaced = {PRESET: "prospect_words", "prospect_words": PRESET}
    return {name: value for name, value in old.items() if replaced.get(name) not in given} | dict(given)


def preset_words(
    attribute: str, prompt: str, concepts: Mapping[str, Any], num_stages: int, windows: Mapping[str, Sequence[int]]
) -> list[str]:
    """The `prospect_words` of a preset for the first concept that the prompt names (else the first, else `*`).

    Where there are several, a warning says which one it is.
    """
    from ldm.conditioning.presets import preset
    from ldm.conditioning.prompts import PLACEHOLDER

    named = [*(name for name in concepts if name in prompt), *concepts, PLACEHOLDER]
    if len(concepts) > 1:
        logger.warning(
            "--preset takes %s from '%s' alone; ldm.prompts.joint, in Python, takes something from each concept.",
            *(attribute, named[0]),
        )
    return preset(attribute, prompt, num_stages=num_stages, placeholder=named[0], windows=windows)


def words_file(path: str) -> dict[str, Any]:
    """The YAML file of `--words` as arguments of `main`; a list is `prospect_words`."""
    from ldm.config import read_yaml

    hint = "an entry that begins with * needs quotes"
    text = read_yaml(path, "--words", "file", hint)
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # tags, keys and dates that cannot be made
        first = str(error).partition("\n")[0]
        raise ValueError(f"'{path}' is not a readable YAML file ({first}); {hint}.") from error
    if isinstance(content, list):
        return {"prospect_words": content}
    if not isinstance(content, dict):
        raise ValueError(f"'{path}' must hold a YAML list with one entry for each stage, or a mapping of arguments.")
    return content


def concept_files(texts: Sequence[str], own: str) -> dict[str, str]:
    """`FILE` or `NAME=FILE`, several times, as {placeholder: file}; `own` is the placeholder of a bare file."""
    concepts: dict[str, str] = {}
    for text in texts:
        name, sign, path = text.partition("=")
        if not sign or Path(text).is_file():
            name, path = own, text
        if not name or name in concepts:
            raise ValueError(
                f"--concept {text}: give every concept a name of its own, as in --concept '<vase>={path}'."
            )
        concepts[name] = os.path.expanduser(path)  # behind a =, the shell does not
    return concepts
