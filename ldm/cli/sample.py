"""`scripts/txt2img.py` and `scripts/img2img.py`: flags and files to requests.

Flags, files and choices are checked before anything heavy is imported, so that `--help` and mistakes answer at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from itertools import chain, product
from pathlib import Path
from typing import Any

from ldm.cli.flags import Parser, add_field_flag, add_flag, check_paths, log_to_terminal, path, script_parser
from ldm.cli.images import LAYOUTS, OWN_LAYOUT, Drawing
from ldm.cli.models import MODEL_DEFAULTS, add_model_flags, check_weights, model_setup, read_config
from ldm.cli.prompts import add_stage_flags, concept_files, read_prompts, read_stages, seeds, word
from ldm.files.hub import is_hub, refuse_unfetched
from ldm.files.shipped import shipped
from ldm.files.writing import check_writable
from ldm.request import FAST, PLACEHOLDER, ModelFacts, Request, model_facts, read_scale, shown

MAX_IMAGES = 1000  # of one command with several prompts and seeds


# --- flags -----------------------------------------------------------------------------------------------------


def build_parser(docstring: str | None, editing: bool | None, prog: str | None = None) -> Parser:
    """Return the flags; those of a `Request` have its field's name as `dest`."""
    parser = script_parser(docstring, prog)
    what = parser.add_argument_group("what to show")
    if editing is not False:
        add_field_flag(what, Request, "content_dir", "--content", metavar="FILE")
        add_field_flag(what, Request, "strength")
        add_field_flag(what, Request, "resize", metavar="HOW")
    help_prompt = "what to show, * standing for the concept; given several times, an image of each and a grid"
    add_field_flag(what, Request, "prompt", action="append", help=help_prompt)
    help_prompts = (
        "text with a prompt in each line, {} standing for the concept; or YAML: a list of prompts or of {argument: "
        "value, …}"
    )
    add_flag(what, "--prompts", type=path, metavar="FILE", help=help_prompts)
    add_field_flag(what, Request, "negative_prompt")
    add_stage_flags(what)
    help_layers = "texts that replace * by U-Net layer (P+), in order of execution; numbers for learned tokens"
    add_field_flag(what, Request, "layer_words", nargs="+", type=word, metavar="TEXT", help=help_layers)
    help_concept = "learned embedding, or hf:user/name[@revision]; several: '<vase>=FILE', each named in the prompt"
    add_flag(what, "--concept", action="append", metavar="[NAME=]FILE", help=help_concept)
    add_field_flag(what, Request, "any_base")
    add_flag(what, "--from", dest="source", type=path, metavar="PNG", help="repeat this image; other flags change it")

    how = parser.add_argument_group("how")
    fast = f"{FAST['sampler']} with {FAST['ddim_steps']} steps: two fifths of the U-Net calls of the default"
    add_flag(how, "--fast", action="store_true", help=fast)
    add_field_flag(how, Request, "ddim_steps", "--steps")
    add_field_flag(how, Request, "ddim_eta", "--eta")
    help_seeds = "one or several, also ranges (10-13); several give an image of each and a grid (42)"
    add_field_flag(how, Request, "seed", nargs="+", type=seeds, help=help_seeds)
    add_field_flag(how, Request, "truncation", nargs="+", metavar="N")
    add_field_flag(how, Request, "scale", type=str, metavar="X[,STAGES:X…]")
    for name in ("rescale", "sampler", "spacing", "n_samples", "n_iter", "n_rows", "height", "width"):
        add_field_flag(how, Request, name)
    add_field_flag(how, Request, "legacy_word_tokens")

    model = parser.add_argument_group("model and files")
    add_model_flags(model)
    add_flag(model, "--outdir", type=path, default=Path("outputs"), metavar="DIR", help="for the images (outputs)")
    help_layout = f"name files as another program does: {', '.join(LAYOUTS)} (its JPEGs have no record of the flags)"
    add_flag(model, "--layout", choices=list(LAYOUTS), metavar="NAME", help=help_layout)
    add_flag(model, "--debug", action="store_true", help="show the whole trace of an error")
    return parser


# --- from flags and files to a request -------------------------------------------------------------------------


def run(
    docstring: str | None, editing: bool | None = False, argv: Sequence[str] | None = None, prog: str | None = None
) -> list[Path]:
    """Generate (or edit, with `editing`) what the flags ask for.

    Args:
        docstring: the command's; its first line, then examples.
        editing: whether an image is edited; None leaves that to --content.
        argv: the flags, by default the program's own.
        prog: what the command is called, by default like its file.

    Returns:
        The files written: the image, or the grid followed by its single images.
    """
    parser = build_parser(docstring, editing, prog)
    options = parser.parse_strictly(argv)
    log_to_terminal(talkative=["ldm.conditioning.presets"])
    with parser.sentences(options.debug):
        return _generate(options, editing)


def _generate(options: argparse.Namespace, editing: bool | None) -> list[Path]:
    recorded = _recorded(options)
    setup = model_setup(options, recorded)
    config = read_config(options, setup)
    facts = model_facts(config)
    rows = build_requests(options, recorded, facts)
    if options.layout == "catversion" and len(rows) * len(_columns(options)) > 1:
        raise ValueError(f"--layout {options.layout} goes with one prompt and one seed; --n_iter makes several images.")
    for request in rows:
        _check_purpose(request, editing)
        _check_files(request, setup["ckpt"])
    check_writable(options.outdir, "--outdir")

    from ldm.embeddings import load_concept, refuse_other_width
    from ldm.generate import load_model_from_config

    # a file that is no concept ends here, before the weights are read
    named = {(name, file) for request in rows for name, file in (request.concepts or {}).items()}
    loaded = {(name, file): load_concept(file, name) for name, file in sorted(named)}
    for (name, _), concept in loaded.items():
        refuse_other_width(concept, name, facts.token_width, Path(setup["ckpt"]).name)
    rows = [
        replace(row, concepts={name: loaded[name, file] for name, file in (row.concepts or {}).items()}) for row in rows
    ]
    model = load_model_from_config(config, setup["ckpt"], device=options.device, dtype=setup["dtype"], lightning=False)
    columns, layout = _columns(options), LAYOUTS.get(options.layout, OWN_LAYOUT)
    drawing = Drawing(model, recorded, setup, options.outdir, layout)
    if options.layout == "neti":
        return drawing.draw_grouped([replace(row, **column) for row in rows for column in columns])
    if len(rows) * len(columns) > 1:
        return drawing.draw_sheet(rows, columns)
    return drawing.draw(replace(rows[0], **columns[0]))


def _columns(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What differs from image to image of a prompt: truncations and seeds, where flags give them."""
    given = {"truncation": options.truncation, "seed": options.seed and list(chain.from_iterable(options.seed))}
    several = {name: values for name, values in given.items() if values}
    return [dict(zip(several, values, strict=True)) for values in product(*several.values())]


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
    if "cells" in recorded:
        raise ValueError(f"'{options.source}' shows images of several commands; repeat one of its single images.")
    if not options.concept:
        refuse_unfetched(recorded.get("concepts"))
    name = recorded.get("base_model")
    if "ckpt" not in recorded and options.ckpt is None and name != Path(MODEL_DEFAULTS["ckpt"]).name:
        raise ValueError(f"'{options.source}' was made with the model {shown(name)}; give it with --ckpt and --config.")
    return recorded


def build_requests(options: argparse.Namespace, recorded: Mapping[str, Any], facts: ModelFacts) -> list[Request]:
    """Return a request for each prompt. Precedence, lowest first: the record of `--from`, the file of prompts, flags.

    Raises:
        ValueError: an unknown argument, or a value that cannot be used; with the remedy.
    """
    names = [field.name for field in fields(Request)]
    flags = {name: value for name in names if (value := getattr(options, name, None)) is not None}
    flags = (FAST if options.fast else {}) | flags
    prompts = flags.pop("prompt", None)
    columns = _columns(options)
    flags |= columns[0]
    if options.stages is not None:
        flags |= read_stages(options.stages, facts.num_stages)
    if options.scale is not None:
        flags["scale"] = read_scale(options.scale, facts.num_stages, facts.scale)
    rows = [{"prompt": prompt} for prompt in prompts] if prompts else [{}]
    if options.prompts is not None:
        if prompts:
            raise ValueError("--prompts FILE takes the place of --prompt; give one of them.")
        rows = read_prompts(options.prompts, names, facts.num_stages)
    if (count := len(rows) * len(columns)) > MAX_IMAGES:
        raise ValueError(f"{count} images are too many for one command, which makes at most {MAX_IMAGES}; give fewer.")
    repeated = {name: recorded[name] for name in names if name in recorded and name != "preset"}
    texts = " ".join(str(given["prompt"]) for given in [*rows, repeated] if "prompt" in given)
    if "content_dir" in flags:
        flags["content_dir"] = shipped(flags["content_dir"])
    if options.concept:
        flags["concepts"] = concept_files(options.concept, facts.placeholder or PLACEHOLDER, texts)
    if options.prompts is not None:
        name = next(iter(flags.get("concepts", ())), facts.placeholder or PLACEHOLDER)
        rows = [row | {"prompt": row["prompt"].replace("{}", name)} if _is_text(row) else row for row in rows]
    return [_request(options.source, recorded, repeated, given | flags).for_model(facts) for given in rows]


def _is_text(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("prompt"), str)


def _request(
    source: Path | None, recorded: Mapping[str, Any], repeated: Mapping[str, Any], given: Mapping[str, Any]
) -> Request:
    if "preset" in recorded and "prospect_words" not in given and len({"prompt", "preset"} & given.keys()) == 1:
        raise ValueError(
            f"'{source}' was made with a preset; to show something else, give both --prompt and --preset, or --stages."
        )
    if given.get("preset") is not None:
        repeated = {name: value for name, value in repeated.items() if name != "prospect_words"}
    if "sampler" in given:
        repeated = {name: value for name, value in repeated.items() if name != "spacing"}
    arguments = {**repeated, **given}
    if arguments.get("prospect_words") is not None or arguments.get("layer_words") is not None:
        arguments.setdefault("prompt", PLACEHOLDER)
    if "prompt" not in arguments and not arguments.get("content_dir"):
        raise ValueError("Say what to show: --prompt TEXT, or --prompts FILE.")
    return Request(**arguments)


def _check_purpose(request: Request, editing: bool | None) -> None:
    if editing and request.content_dir is None:
        raise ValueError("Give the image to edit with --content FILE; without one, use scripts/txt2img.py.")
    if editing is False and request.content_dir is not None:
        raise ValueError("Here images come from noise; to edit one (content_dir), use scripts/img2img.py.")


def _check_files(request: Request, ckpt: str) -> None:
    check_weights(ckpt)
    concepts = [file for file in (request.concepts or {}).values() if not is_hub(file)]
    check_paths({"--concept": concepts, "--content": [request.content_dir]})
