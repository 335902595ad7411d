"""`scripts/export_embedding.py`. Imports nothing heavy before the flags are read."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from ldm.cli.flags import (
    Once,
    Parser,
    add_field_flag,
    add_flag,
    check_paths,
    input_path,
    log_to_terminal,
    path,
    printable,
    script_parser,
)
from ldm.cli.models import MODEL_DEFAULTS
from ldm.cli.prompts import add_stage_flags, concept_files, read_stages
from ldm.files.hub import is_hub
from ldm.files.shipped import MODELS, shipped
from ldm.files.writing import check_writable
from ldm.request import PLACEHOLDER, ModelFacts, Request, model_facts, read_scale

if TYPE_CHECKING:
    from ldm.conditioning.presets import Windows
    from ldm.embeddings import Concept
    from ldm.export.files import Use

OWN_FILES = ("neti", "kohya")  # programs with formats of their own, which say nothing of a prompt
PROGRAMS = ("diffusers", "a1111", "comfyui", *OWN_FILES)
MAX_SEED = 2**32 - 1  # other programs do not tell longer ones apart, or lose their digits


def build_parser(docstring: str | None, prog: str | None = None) -> Parser:
    parser = script_parser(docstring, prog)
    parser.add_argument("concepts", nargs="+", metavar="[PLACEHOLDER=]CONCEPT", help="embedding file ('*=…')")
    add_flag(parser, "--name", nargs="+", required=True, help="what each is called there: files NAME-0.safetensors, …")
    add_flag(parser, "--to", nargs="+", choices=PROGRAMS, default=[], metavar="PROGRAM", help=", ".join(PROGRAMS))
    add_flag(parser, "--outdir", type=path, metavar="DIR", help="folder to write to (outputs/NAME)")
    add_flag(parser, "--force", action="store_true", help="overwrite files that are there")
    add_flag(parser, "--any_base", action="store_true", help="also concepts of different base models")

    what = parser.add_argument_group("how they are used")
    help_prompt = "in it, * stands for the concept or for the words ('*')"
    add_flag(what, "--prompt", action=Once, instead="an export has one prompt.", metavar="TEXT", help=help_prompt)
    add_field_flag(what, Request, "negative_prompt", default="")
    add_stage_flags(what)
    help_presets = "the presets' stages (presets.yaml beside the base model, or the paper's)"
    add_flag(what, "--presets", type=input_path, metavar="YAML", help=help_presets)
    help_ckpt = "the base model, for its presets (the small model, if the concept was learned for it)"
    add_flag(what, "--ckpt", type=input_path, metavar="FILE", help=help_ckpt)
    add_flag(what, "--config", metavar="NAME|YAML", help="demo, sd or its configuration, for its size and guidance")
    help_sampler = "ddim, plms, dpmpp_2m, or as AUTOMATIC1111 names it: 'Euler a', 'DPM++ 2M SGM Uniform', … (ddim)"
    add_flag(what, "--sampler", default="ddim", metavar="NAME", help=help_sampler)
    add_field_flag(what, Request, "spacing")
    add_flag(what, "--steps", type=int, default=50, metavar="N", help="denoising steps (50)")
    help_scale = "guidance scale, with others for some stages as in 7.5,0-1:1 (the model's own, or 10)"
    add_flag(what, "--scale", metavar="X[,STAGES:X…]", help=help_scale)
    add_flag(what, "--rescale", type=float, default=0.0, metavar="X", help="of guidance, 0 to 1; diffusers only (0)")
    add_flag(what, "--seed", type=int, default=42, metavar="N", help="(42)")
    add_flag(what, "--height", type=int, metavar="PIXELS", help="(the model's own, or 512)")
    add_flag(what, "--width", type=int, metavar="PIXELS", help="(the same)")
    help_count = (
        "a1111: 'after N steps' as documented; the program itself switches one step later, which is the default"
    )
    add_flag(what, "--documented_counting", action="store_true", help=help_count)

    card = parser.add_argument_group("model card (README.md)")
    add_flag(card, "--card", action="store_true", help="write one")
    add_flag(card, "--license", default="creativeml-openrail-m", metavar="ID", help="(creativeml-openrail-m)")
    add_flag(card, "--base_model", metavar="ID", help="the base model's name on the hub")
    more = {"dest": "images", "help": "samples to copy and show"}  # --pictures: its name in earlier versions
    add_flag(card, "--images", "--pictures", nargs="+", type=input_path, default=[], metavar="FILE", **more)
    return parser


def run(docstring: str | None, argv: Sequence[str] | None = None, prog: str | None = None) -> list[Path]:
    """Write what the flags ask for, and warnings to standard error; ends with exit code 2 where that cannot be.

    Args:
        docstring: the script's; its first line, then examples.
        argv: the flags, by default the program's own.
        prog: what the command is called, by default like its file.

    Returns:
        The files written.
    """
    parser = build_parser(docstring, prog)
    options = parser.parse_strictly(argv)
    log_to_terminal(talkative=["ldm.conditioning.presets"])
    with parser.sentences():
        paths, warnings = _export(options)
    for warning in warnings:
        sys.stderr.write(f"warning: {printable(warning)}\n")
    return paths


def _export(options: argparse.Namespace) -> tuple[list[Path], list[str]]:
    files = concept_files(options.concepts, PLACEHOLDER, options.prompt or PLACEHOLDER)
    config = MODELS[options.config].config if options.config in MODELS else options.config
    options.config = None if config is None else path(shipped(config))
    here = [file for file in files.values() if not is_hub(file)]
    given = {"--ckpt": options.ckpt, "--config": options.config, "--presets": options.presets}
    check_paths({"CONCEPT": here} | {flag: [file] for flag, file in given.items()})
    how = {name: getattr(options, name) for name in ("preset", "rescale", "spacing")}
    Request(prompt=options.prompt or "", **how)  # which checks them
    from ldm.embeddings import load_concept
    from ldm.export.card import Card
    from ldm.export.files import Export

    if len(files) != len(options.name):
        raise ValueError(f"There are {len(files)} concepts and {len(options.name)} names; give each one with --name.")
    named = zip(options.name, (load_concept(file, placeholder) for placeholder, file in files.items()), strict=True)
    concepts = dict(zip(files, named, strict=True))
    if set(OWN_FILES) & set(options.to):
        return _export_whole(options, concepts, list(files.values())), []
    export = Export(concepts, _use(options, concepts), options.any_base)
    programs, folder = list(dict.fromkeys(options.to)), options.outdir or Path("outputs") / options.name[0]
    if options.images and not options.card:
        raise ValueError("--images are shown in the model card; use --card, too.")
    card = Card(options.license, options.base_model, options.images) if options.card else None
    paths = export.paths(programs, folder, card)
    check_writable(folder, "--outdir")
    _refuse_overwriting(paths, [*files.values(), *options.images], folder, options.force)
    return paths, export.write(programs, folder, card)


def _export_whole(
    options: argparse.Namespace, concepts: Mapping[str, tuple[str, Concept]], files: Sequence[str | Path]
) -> list[Path]:
    """Write a program's own files, which say nothing of a prompt."""
    from ldm.export import kohya, neti
    from ldm.export.texts import check_name

    if len(options.to) > 1 or options.card:
        names = " and ".join(OWN_FILES)
        raise ValueError(f"--to {names} each write files of their own; give one alone, without --card.")
    program: ModuleType = neti if options.to == ["neti"] else kohya
    folder = options.outdir or Path("outputs") / options.name[0]
    for name, concept in concepts.values():
        check_name(name)
        program.check_exports(concept)
    check_writable(folder, "--outdir")
    paths = [path for name, _ in concepts.values() for path in program.paths(folder, name)]
    _refuse_overwriting(paths, files, folder, options.force)
    for placeholder, (name, concept) in concepts.items():
        program.save(concept, folder, name, placeholder)
    return paths


def _refuse_overwriting(paths: Sequence[Path], inputs: Sequence[str | Path], folder: Path, force: bool) -> None:
    """Raise `ValueError` where a file to write is there, and with `force` only where it is one that was read."""
    there = [path for path in paths if path.exists()]
    read = {Path(given).resolve() for given in inputs}
    if any(path.resolve() in read for path in there):
        raise ValueError(f"Files that are read would be overwritten in '{folder}'; name another --outdir.")
    if there and not force:
        listing = ", ".join(path.name for path in there[:4]) + (", …" if len(there) > 4 else "")
        raise ValueError(f"'{folder}' has {listing} already; use --force to overwrite, or name another --outdir.")


def _use(options: argparse.Namespace, concepts: Mapping[str, tuple[str, Concept]]) -> Use:
    """What the flags say of the prompt and of sampling."""
    from ldm.conditioning.presets import load_presets, preset_words
    from ldm.export.files import Use, most_stages
    from ldm.export.webui import name_of

    if not 0 <= options.seed <= MAX_SEED:
        raise ValueError(f"seed must be in 0..{MAX_SEED}, which other programs tell apart, not {options.seed}.")
    facts, windows = _base_model(options, concepts)
    prompt = options.prompt
    stages = most_stages(concept for _, concept in concepts.values())
    given = read_stages(options.stages, stages) if options.stages else {"preset": options.preset}
    words = given.get("prospect_words")
    if given.get("preset") is not None:
        if options.presets is not None:
            windows = load_presets(options.presets)
        words = preset_words(given["preset"], prompt or "", tuple(concepts), stages, windows)
        prompt = PLACEHOLDER
    own = {name: getattr(options, name) for name in ("scale", "width", "height")}
    if options.scale is not None:
        stages = len(words) if words else most_stages(concept for _, concept in concepts.values())
        own["scale"] = read_scale(options.scale, stages, facts.scale)
    Request(**own)  # which checks them
    settings = {name: getattr(facts, name) if value is None else value for name, value in own.items()}
    sampler = name_of(options.sampler, options.spacing)
    settings |= {"rescale": options.rescale, "sampler": sampler, "steps": options.steps, "seed": options.seed}
    others = {"documented": options.documented_counting, "negative_prompt": options.negative_prompt}
    return Use(PLACEHOLDER if prompt is None else prompt, words, **settings, **others)


def _base_model(options: argparse.Namespace, concepts: Mapping[str, tuple[str, Concept]]) -> tuple[ModelFacts, Windows]:
    """Size, guidance and presets' windows of the base model, as `scripts/txt2img.py` finds them.

    The base model is `--ckpt`, or the small model that ships if the first concept was learned for it. Where neither
    says it, they are Stable Diffusion v1's and the paper's.
    """
    from ldm.checkpoint import base_model_of
    from ldm.conditioning.presets import Windows, presets_beside
    from ldm.config import load_config
    from ldm.files.base_model import refuse_other_base

    ckpt, config = options.ckpt, options.config
    if ckpt is None and _learned_for(concepts, small := Path(shipped(MODEL_DEFAULTS["ckpt"]))):
        ckpt, config = small, config or Path(shipped(MODEL_DEFAULTS["config"]))
    facts = ModelFacts() if config is None else model_facts(load_config(config, flag="--config"))
    if ckpt is None:
        return facts, Windows()
    if not ckpt.exists():
        raise ValueError(f"There is no file '{ckpt}'; check the path given with --ckpt.")
    for name, concept in concepts.values() if options.ckpt and not options.any_base else ():
        refuse_other_base(concept.metadata, base_model_of(ckpt), f"The concept '{name}'")
    return facts, presets_beside(ckpt)


def _learned_for(concepts: Mapping[str, tuple[str, Concept]], base: Path) -> bool:
    from ldm.checkpoint import base_model_of
    from ldm.files.base_model import same_base

    _, first = next(iter(concepts.values()))
    return base.is_file() and bool(same_base(first.metadata, base_model_of(base)))
