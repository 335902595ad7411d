"""Generate images from text, stage by stage.

python scripts/txt2img.py --prompt "a large striped red star on the left on a navy background"
python scripts/txt2img.py --concept models/demo/concepts/dotted-star.safetensors --preset material --prompt "a * heart"
python scripts/txt2img.py --from outputs/a-large-striped-red-star-on-the-left-on-42.png --seed 7
python scripts/txt2img.py --config sd --ckpt sd-v1-4.ckpt --prompt "*" --stages "7-9=a mug" "0-6=a blue mug"
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain, product
from pathlib import Path
from typing import Any

from ldm.cli.flags import Parser, add_field_flag, check_paths, path, script_parser
from ldm.cli.images import LAYOUTS, OWN_LAYOUT, Drawing
from ldm.cli.models import MODEL_DEFAULTS, add_model_flags, load_model, read_setup
from ldm.cli.prompts import add_stage_flags, concept_files, entry, read_prompts, read_stages, seeds
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
        add_field_flag(what, Request, "content_dir", "--content", type=shipped, metavar="FILE")
        add_field_flag(what, Request, "strength")
        add_field_flag(what, Request, "resize", metavar="HOW")
    texts = what.add_mutually_exclusive_group()
    help_prompt = "what to show, * standing for the concept; given several times, an image of each and a grid"
    add_field_flag(texts, Request, "prompt", action="append", help=help_prompt)
    help_prompts = "a prompt in each line, {} standing for the concept; or YAML: prompts, or {argument: value, …}"
    texts.add_argument("--prompts", type=path, metavar="FILE", help=help_prompts)
    add_field_flag(what, Request, "negative_prompt")
    add_stage_flags(what)
    help_layers = "texts that replace * by U-Net layer (P+), in order of execution; numbers for learned tokens"
    add_field_flag(what, Request, "layer_words", nargs="+", type=entry, metavar="TEXT", help=help_layers)
    help_concept = "learned embedding, or hf:user/name[@revision]; several: '<vase>=FILE', each named in the prompt"
    what.add_argument("--concept", action="append", metavar="[NAME=]FILE", help=help_concept)
    add_field_flag(what, Request, "any_base")
    what.add_argument("--from", dest="source", type=path, metavar="PNG", help="repeat this image; more flags change it")

    how = parser.add_argument_group("how")
    fast = f"{FAST['sampler']} with {FAST['ddim_steps']} steps: two fifths of the U-Net calls of the default"
    how.add_argument("--fast", action="store_true", help=fast)
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
    model.add_argument("--outdir", type=path, default=Path("outputs"), metavar="DIR", help="for the images (outputs)")
    help_layout = f"name files as another program does: {', '.join(LAYOUTS)} (its JPEGs have no record of the flags)"
    model.add_argument("--layout", choices=list(LAYOUTS), metavar="NAME", help=help_layout)
    model.add_argument("--debug", action="store_true", help="show the whole trace of an error")
    return parser


# --- from flags and files to a request -------------------------------------------------------------------------


def run(
    argv: Sequence[str] | None = None,
    prog: str | None = None,
    editing: bool | None = None,
    docstring: str | None = __doc__,
) -> list[Path]:
    """Generate what the flags ask for; returns the files written: the image, or a grid followed by its single images.

    Args:
        editing: an image is edited; None leaves that to --content.
        docstring: the command's; its first line, then examples.
    """
    parser = build_parser(docstring, editing, prog)
    return parser.run(lambda options: _generate(options, editing), argv)


def _generate(options: argparse.Namespace, editing: bool | None) -> list[Path]:
    recorded = _recorded(options)
    setup, config = read_setup(options, recorded)
    facts, columns = model_facts(config), _columns(options)
    rows = build_requests(options, recorded, facts)
    count = len(rows) * len(columns)
    if options.layout == "catversion" and count > 1:
        raise ValueError(f"--layout {options.layout} goes with one prompt and one seed; --n_iter makes several images.")
    for request in rows:
        if editing is not None and editing == (request.content_dir is None):
            raise ValueError("scripts/img2img.py edits an image, --content FILE, and scripts/txt2img.py edits none.")
        files = [file for file in (request.concepts or {}).values() if not is_hub(file)]
        check_paths({"--concept": files, "--content": [request.content_dir]})
    check_writable(options.outdir, "--outdir")

    from ldm.embeddings import load_concept, refuse_other_width

    # a file that is no concept ends here, before the weights are read
    loaded = {}
    for name, file in sorted({named for request in rows for named in (request.concepts or {}).items()}):
        loaded[name, file] = load_concept(file, name)
        refuse_other_width(loaded[name, file], name, facts.token_width, Path(setup["ckpt"]).name)
    requests = []
    for request in rows:
        concepts = {name: loaded[name, file] for name, file in (request.concepts or {}).items()}
        requests.append([replace(request, concepts=concepts, **column) for column in columns])
    model, layout = load_model(options, setup, config), LAYOUTS.get(options.layout, OWN_LAYOUT)
    drawing = Drawing(model, setup, options.outdir, recorded, layout)
    if options.layout == "neti":
        return drawing.draw_grouped(list(chain.from_iterable(requests)))
    return drawing.draw_sheet(requests, columns) if count > 1 else drawing.draw(requests[0][0])


def _columns(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What differs from image to image of a prompt: truncations and seeds, where flags give them."""
    given = {"truncation": options.truncation, "seed": options.seed and list(chain.from_iterable(options.seed))}
    several = {name: values for name, values in given.items() if values}
    return [dict(zip(several, values, strict=True)) for values in product(*several.values())]


def _recorded(options: argparse.Namespace) -> dict[str, Any]:
    """The record of the image of `--from`; empty without one."""
    if options.source is None:
        return {}
    check_paths({"--from": [options.source]})
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
    names = list(Request.__dataclass_fields__)
    columns = _columns(options)
    given = {name: value for name in names if (value := getattr(options, name, None)) is not None}
    flags = {**(FAST if options.fast else {}), **given, **columns[0]}
    if options.stages is not None:
        flags |= read_stages(options.stages, facts.num_stages)
    if options.scale is not None:
        flags["scale"] = read_scale(options.scale, facts.num_stages, facts.scale)
    rows: list[dict[str, Any]] = [{"prompt": prompt} for prompt in flags.pop("prompt", ())] or [{}]
    if options.prompts is not None:
        rows = read_prompts(options.prompts, names, facts.num_stages)
    if (count := len(rows) * len(columns)) > MAX_IMAGES:
        raise ValueError(f"{count} images are too many for one command, which makes at most {MAX_IMAGES}; give fewer.")
    own = facts.placeholder or PLACEHOLDER
    if options.concept:
        texts = " ".join(str(texts["prompt"]) for texts in [*rows, recorded] if "prompt" in texts)
        flags["concepts"] = concept_files(options.concept, own, texts)
    if options.prompts is not None:
        called = next(iter(flags.get("concepts", ())), own)
        for row in rows:
            if isinstance(row.get("prompt"), str):
                row["prompt"] = row["prompt"].replace("{}", called)
    return [_request(options.source, recorded, row | flags).for_model(facts) for row in rows]


def _request(source: Path | None, recorded: Mapping[str, Any], given: dict[str, Any]) -> Request:
    if "preset" in recorded and "prospect_words" not in given and len({"prompt", "preset"} & given.keys()) == 1:
        raise ValueError(f"'{source}' was made with a preset; to change it, give --prompt and --preset, or --stages.")
    own = {"preset": "prospect_words", "sampler": "spacing"}  # what a flag brings with it
    replaced = {"preset", *(own[name] for name in own if given.get(name) is not None)}
    repeated = {name: recorded[name] for name in Request.__dataclass_fields__ if name in recorded}
    arguments = {name: value for name, value in repeated.items() if name not in replaced} | given
    if arguments.get("prospect_words") is not None or arguments.get("layer_words") is not None:
        arguments.setdefault("prompt", PLACEHOLDER)
    if "prompt" not in arguments and not arguments.get("content_dir"):
        raise ValueError("Say what to show: --prompt TEXT, or --prompts FILE.")
    return Request(**arguments)
