"""`scripts/txt2img.py` and `scripts/img2img.py`: flags and files to a `Request`, and its images to PNG files.

Flags, files and choices are checked before anything heavy is imported, so that `--help` and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.flags import Once, Parser, add_field_flag, add_flag, log_to_terminal, path, script_parser
from ldm.files.writing import check_writable, writing_to
from ldm.request import PLACEHOLDER, ModelFacts, Request, model_facts, read_scale, shown

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)

# What makes the model, recorded in an image beside the request.
MODEL_DEFAULTS = {"config": "configs/demo/finetune.yaml", "ckpt": "models/demo/model.safetensors", "dtype": "float32"}
DTYPES = ("float32", "float16", "bfloat16")
ONE_PROMPT = "for other images run the command again, for a text of its own in each stage give --word for each."
TEXTS = ("prompt", "prospect_words", "preset")
_ROOT = Path(__file__).parents[2]


# --- flags -----------------------------------------------------------------------------------------------------


def build_parser(docstring: str | None, editing: bool) -> Parser:
    """Return the flags; those of a `Request` have its field's name as `dest`."""
    parser = script_parser(docstring)
    what = parser.add_argument_group("what to show")
    if editing:
        add_field_flag(what, Request, "content_dir", "--content", metavar="FILE")
        add_field_flag(what, Request, "strength")
        add_field_flag(what, Request, "resize", metavar="HOW")
    add_field_flag(what, Request, "prompt", action=Once, instead=ONE_PROMPT)
    help_prompts = "prompts, one a line, for an image each; {} stands for the concept"
    add_flag(what, "--prompts", type=path, metavar="FILE", help=help_prompts)
    add_field_flag(what, Request, "negative_prompt")
    add_word_flags(what)
    help_concept = "learned embedding; several: '<vase>=FILE', each with its own name in the prompt"
    add_flag(what, "--concept", action="append", metavar="[NAME=]FILE", help=help_concept)
    add_field_flag(what, Request, "any_base")
    add_flag(what, "--from", dest="source", type=path, metavar="PNG", help="repeat this image; other flags change it")

    how = parser.add_argument_group("how")
    add_field_flag(how, Request, "ddim_steps", "--steps")
    add_field_flag(how, Request, "ddim_eta", "--eta")
    for name in ("seed", "truncation"):
        add_field_flag(how, Request, name, nargs="+", metavar="N")
    add_field_flag(how, Request, "scale", type=str, metavar="X[,STAGES:X…]")
    for name in ("rescale", "sampler", "spacing", "n_samples", "n_iter", "n_rows", "height", "width"):
        add_field_flag(how, Request, name)
    add_field_flag(how, Request, "legacy_word_tokens")

    model = parser.add_argument_group("model and files")
    add_flag(model, "--config", type=path, metavar="YAML", help=f"({MODEL_DEFAULTS['config']})")
    help_ckpt = f".ckpt, .safetensors or diffusers folder ({MODEL_DEFAULTS['ckpt']})"
    add_flag(model, "--ckpt", type=path, metavar="FILE", help=help_ckpt)
    add_flag(model, "--dtype", metavar="TYPE", help="of the weights: float32, float16 or bfloat16 (float32)")
    add_flag(model, "--device", type=device, metavar="NAME", help="cpu, cuda, cuda:1 or mps (the fastest there is)")
    help_allow = "packages of your own whose classes the configuration may name"
    add_flag(model, "--allow_targets", nargs="+", default=[], metavar="PACKAGE", help=help_allow)
    help_resolvers = "let the configuration use resolvers, such as ${oc.env:HOME}"
    add_flag(model, "--allow_resolvers", action="store_true", help=help_resolvers)
    add_flag(model, "--outdir", type=path, default=Path("outputs"), metavar="DIR", help="for the images (outputs)")
    add_flag(model, "--debug", action="store_true", help="show the whole trace of an error")
    return parser


def add_word_flags(group: argparse._ArgumentGroup) -> None:
    """Add --words, --word and --preset, of which one can be given."""
    words = group.add_mutually_exclusive_group()
    help_words = "YAML: a list of one entry for each stage, the end of sampling first; or {argument: value, …}"
    add_flag(words, "--words", type=path, metavar="FILE", help=help_words)
    help_word = "one entry of that list, given once for each stage; a number is the learned token of that stage"
    add_flag(words, "--word", dest="prospect_words", action="append", type=word, metavar="TEXT", help=help_word)
    add_field_flag(words, Request, "preset", metavar="ATTRIBUTE")


def device(text: str) -> str:
    """A device's name: cpu, mps, cuda or cuda:N."""
    if re.fullmatch(r"(cpu|mps|cuda)(:\d+)?", text) is None:
        raise argparse.ArgumentTypeError(f"'{text}' is none of cpu, mps, cuda and cuda:0, cuda:1, …")
    return text


def word(text: str) -> str | int:
    """An entry of `prospect_words`: a number is the learned token of that stage, anything else a text."""
    return int(text) if re.fullmatch(r"-?\d{1,9}", text) else text


# --- from flags and files to a request -------------------------------------------------------------------------


def run(docstring: str | None, editing: bool = False, argv: Sequence[str] | None = None) -> list[Path]:
    """Generate (or edit, with `editing`) what the flags ask for.

    Args:
        docstring: the script's; its first line, then examples.
        argv: the flags, by default the program's own.

    Returns:
        The files written: the image, or the grid followed by its single images.
    """
    parser = build_parser(docstring, editing)
    options = parser.parse_strictly(argv)
    log_to_terminal(talkative=["ldm.conditioning.presets"])
    with parser.sentences(options.debug):
        return _generate(options, editing)


def _generate(options: argparse.Namespace, editing: bool) -> list[Path]:
    recorded = _recorded(options)
    setup = _setup(options, recorded)
    from ldm.config import allow_targets, check_generates, load_config

    allow_targets(*options.allow_targets)
    config = load_config(setup["config"], flag="--config", resolvers=options.allow_resolvers)
    check_generates(config)
    facts = model_facts(config)
    requests = build_requests(options, recorded, facts)
    for request in requests:
        _check_purpose(request, editing)
    requests = [request.for_model(facts) for request in requests]
    _check_files(requests[0], setup["ckpt"])
    check_writable(options.outdir, "--outdir")

    from ldm.embeddings import load_concept
    from ldm.generate import Interrupted, generate_image, load_model_from_config

    # a file that is no concept ends here, before the weights are read
    concepts = {name: load_concept(file, name) for name, file in (requests[0].concepts or {}).items()}
    model = load_model_from_config(config, setup["ckpt"], device=options.device, dtype=setup["dtype"])
    written: list[Path] = []
    for request in requests:
        try:
            image = generate_image(replace(request, concepts=concepts), model)
        except Interrupted as stop:
            paths = _save(stop.picture, recorded, setup, options.outdir)
            kept = "is kept" if len(paths) == 1 else f"and the {len(paths) - 1} images in it are kept"
            raise KeyboardInterrupt(f"stopped by Ctrl-C; what was finished, '{paths[0]}', {kept}") from stop
        written += _save(image, recorded, setup, options.outdir)
    return written


def _recorded(options: argparse.Namespace) -> dict[str, Any]:
    """The record of the image of `--from`; empty without one.

    Raises:
        ValueError: there is no such image, it has no record, or its model is to be given.
    """
    if options.source is None:
        return {}
    if not options.source.exists():
        raise ValueError(f"There is no file '{options.source}'; check the path given with --from.")
    from ldm.files.records import read_parameters

    recorded = read_parameters(options.source)
    name = recorded.get("base_model")
    if "ckpt" not in recorded and options.ckpt is None and name != Path(MODEL_DEFAULTS["ckpt"]).name:
        raise ValueError(f"'{options.source}' was made with the model {shown(name)}; give it with --ckpt and --config.")
    return recorded


def _setup(options: argparse.Namespace, recorded: Mapping[str, Any]) -> dict[str, str]:
    """Configuration, checkpoint and precision: of the flags, else of the record, else the small model's."""
    setup = {}
    for name, default in MODEL_DEFAULTS.items():
        value = getattr(options, name) or recorded.get(name) or shipped(default)
        if not isinstance(value, (str, Path)):
            raise ValueError(f"'{options.source}' has no readable {name} ({shown(value)}); give it with --{name}.")
        setup[name] = str(value)
    if setup["dtype"] not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {shown(setup['dtype'])}.")
    return setup


def shipped(name: str) -> str:
    """The path of a file that ships: from the current folder, or else from this one's."""
    return name if not (_ROOT / name).exists() or Path(name).exists() else str(_ROOT / name)


def build_requests(options: argparse.Namespace, recorded: Mapping[str, Any], facts: ModelFacts) -> list[Request]:
    """Return a request for each line of `--prompts`, each `--truncation` and each `--seed`; see `build_request`."""
    prompts: Sequence[str | None] = [options.prompt]
    if options.prompts is not None:
        if options.prompt is not None or options.prospect_words is not None or options.words is not None:
            raise ValueError("--prompts FILE takes the place of --prompt, --word and --words; give one of them.")
        placeholder = facts.placeholder or PLACEHOLDER
        name = next(iter(concept_files(options.concept or [], placeholder)), placeholder)
        prompts = [line.replace("{}", name) for line in read_prompts(options.prompts)]
    several = product(prompts, options.truncation or [None], options.seed or [None])
    return [
        build_request(
            argparse.Namespace(**vars(options) | {"prompt": prompt, "truncation": truncation, "seed": seed}),
            recorded,
            facts,
        )
        for prompt, truncation, seed in several
    ]


def read_prompts(file: Path) -> list[str]:
    """Return the prompts of a text file, one a line.

    Raises:
        ValueError: it cannot be read, or holds none.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ValueError(f"'{file}' cannot be read ({reason}); give a text file with --prompts.") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"'{file}' has no prompt; write one into each line.")
    return prompts


def build_request(options: argparse.Namespace, recorded: Mapping[str, Any], facts: ModelFacts) -> Request:
    """Return the request. Precedence, lowest first: the record of `--from`, the YAML file of `--words`, flags.

    Args:
        facts: of the model: the placeholder of a concept that is given without a name, and the number of stages.

    Raises:
        ValueError: an unknown argument, or a value that cannot be used; with the remedy.
    """
    names = [field.name for field in fields(Request)]
    given = read_words(options.words) if options.words is not None else {}
    for name in given:
        if name not in names:
            from ldm.config import nearest

            raise ValueError(f"'{options.words}': main has no argument '{name}'{nearest(str(name), names)}.")
    given |= {name: value for name in names if (value := getattr(options, name, None)) is not None}
    if options.concept:
        given["concepts"] = concept_files(options.concept, facts.placeholder or PLACEHOLDER)
    if options.scale is not None:
        given["scale"] = read_scale(options.scale, facts.num_stages, facts.scale)
    repeated = {name: recorded[name] for name in names if name in recorded and name != "preset"}
    if "preset" in recorded and "prospect_words" not in given and len({"prompt", "preset"} & given.keys()) == 1:
        raise ValueError(
            f"'{options.source}' was made with a preset; to show something else, give both --prompt and --preset, or "
            "--word for each stage."
        )
    if given.get("preset") is not None:
        repeated.pop("prospect_words", None)
    if "sampler" in given:
        repeated.pop("spacing", None)
    arguments = repeated | given
    if arguments.get("prospect_words") is not None:
        arguments.setdefault("prompt", PLACEHOLDER)
    if "prompt" not in arguments and not arguments.get("content_dir"):
        raise ValueError("Say what to show: --prompt TEXT, or --words FILE.")
    return Request(**arguments)


def read_words(file: str | Path) -> dict[str, Any]:
    """Return the YAML file of `--words` as arguments of `main`; a list is `prospect_words`."""
    from ldm.config import read_yaml_content

    content = read_yaml_content(file, "--words", "file", "an entry that begins with * needs quotes")
    if isinstance(content, list):
        return {"prospect_words": content}
    if not isinstance(content, dict):
        raise ValueError(f"'{file}' must hold a YAML list with one entry for each stage, or a mapping of arguments.")
    return content


def concept_files(texts: Sequence[str], own: str) -> dict[str, str]:
    """Return `FILE` or `NAME=FILE`, several times, as {placeholder: file}; `own` is the placeholder of a bare file."""
    concepts: dict[str, str] = {}
    for text in texts:
        name, sign, file = text.partition("=")
        if not sign or Path(text).is_file():
            name, file = own, text
        if not name or name in concepts:
            raise ValueError(
                f"--concept {text}: give every concept a name of its own, as in --concept '<vase>={file}'."
            )
        concepts[name] = os.path.expanduser(file)  # behind a =, the shell does not
    return concepts


def _check_purpose(request: Request, editing: bool) -> None:
    if editing and request.content_dir is None:
        raise ValueError("Give the image to edit with --content FILE; without one, use scripts/txt2img.py.")
    if not editing and request.content_dir is not None:
        raise ValueError("Here images come from noise; to edit one (content_dir), use scripts/img2img.py.")


def _check_files(request: Request, ckpt: str) -> None:
    """Raise `ValueError` for a path that leads nowhere, before the time is spent to load PyTorch and the model."""
    files = {"--ckpt": [ckpt], "--concept": [*(request.concepts or {}).values()], "--content": [request.content_dir]}
    for flag, paths in files.items():
        for file in paths:
            if file is not None and not os.path.exists(file):
                raise ValueError(f"There is no file '{file}'; check the path given with {flag}.")


# --- from images to files --------------------------------------------------------------------------------------


def _save(image: Image.Image, repeated: Mapping[str, Any], setup: Mapping[str, str], folder: Path) -> list[Path]:
    """Write the image, or a grid and its single images, each with what repeats it."""
    from ldm.files.records import PNG_KEY

    record = json.loads(image.info[PNG_KEY])
    _warn_of_changes(repeated, record)
    if repeated.get("preset") and "preset" not in record and all(record[n] == repeated.get(n) for n in TEXTS[:2]):
        record |= {key: value for key, value in repeated.items() if key.startswith("preset")}
    record |= setup
    name, height, width, seed = _stem(record), record["height"], record["width"], record["seed"]
    count = record["n_iter"] * record["n_samples"]
    if count == 1:
        return [_write(image, folder, f"{name}-{seed}", record)]
    written = [_write(image, folder, f"{name}-{seed}-grid", record)]
    for i in range(count):
        row, column = divmod(i, image.width // width)
        box = (column * width, row * height, (column + 1) * width, (row + 1) * height)
        alone = record | {"seed": seed + i, "n_iter": 1, "n_samples": 1, "n_rows": 0}
        written.append(_write(image.crop(box), folder, f"{name}-{seed + i}", alone))
    return written


def _warn_of_changes(repeated: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Warn where files of the image of `--from` are others now."""
    was, is_now = repeated.get("concept_hashes"), record["concept_hashes"]
    if isinstance(was, Mapping) and isinstance(repeated.get("concepts"), Mapping):
        for name, file in record["concepts"].items():
            if repeated["concepts"].get(name) == file and name in was and was[name] != is_now.get(name):
                logger.warning(
                    "The concept '%s' (%s) is another file than the one that the image was made with.", name, file
                )
    content, was = record["content_dir"], repeated.get("content_hash")
    if content and was and content == repeated.get("content_dir") and was != record["content_hash"]:
        logger.warning("The content image '%s' is another than the one that was edited.", content)


def _stem(record: Mapping[str, Any]) -> str:
    """A file name for an image: of its prompt, its preset and its truncation."""
    words = next((word for word in record["prospect_words"] or [] if isinstance(word, str)), "")
    name = re.sub(r"\W+", "-", record["prompt"].replace(PLACEHOLDER, words))[:40].strip("-") or "image"
    if (preset := record.get("preset")) and isinstance(preset, str):
        name = f"{name}-{re.sub(r'[^a-z]+', '-', preset)}"
    return name if record.get("truncation") is None else f"{name}-truncation-{record['truncation']}"


def _write(image: Image.Image, folder: Path, stem: str, record: Mapping[str, Any]) -> Path:
    from ldm.generate import PNG_KEY, save_picture

    image.info[PNG_KEY] = json.dumps(record)
    file = _new_file(folder, stem)
    try:
        save_picture(image, file)
    except BaseException:  # Ctrl-C, too
        file.unlink(missing_ok=True)
        raise
    return file


def _new_file(folder: Path, stem: str) -> Path:
    """An empty file made at `folder/stem.png`, or with the first free number behind it."""
    number = 1
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            file = folder / (f"{stem}.png" if number == 1 else f"{stem}-{number}.png")
            try:
                file.touch(exist_ok=False)  # so that two programs at once do not take the same name
                return file
            except FileExistsError:
                number += 1
