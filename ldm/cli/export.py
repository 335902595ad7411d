"""Export learned concepts to diffusers, AUTOMATIC1111's web UI and ComfyUI, a file for each stage.

python scripts/export_embedding.py models/demo/concepts/dotted-star.safetensors --name star \\
    --to diffusers a1111 comfyui --preset material --prompt "a large * heart on a black background"
python scripts/export_embedding.py "<a>=star.safetensors" "<b>=heart.safetensors" --name star heart \\
    --to a1111 --prompt "a <a> beside a <b>" --steps 20 --sampler "DPM++ 2M Karras" --card
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli.flags import Parser, add_field_flag, check_paths, input_path, path, printable, script_parser
from ldm.cli.models import MODEL_DEFAULTS, configuration
from ldm.cli.prompts import add_stage_flags, concept_files, read_stages
from ldm.files.hub import is_hub
from ldm.files.shipped import shipped
from ldm.files.writing import check_writable
from ldm.request import PLACEHOLDER, ModelFacts, Request, model_facts, read_scale

if TYPE_CHECKING:
    from ldm.conditioning.presets import Windows
    from ldm.embeddings import Concept
    from ldm.export.files import Use

    Named = Mapping[str, tuple[str, Concept]]  # placeholder -> name in the other program, concept
    Plan = tuple[list[Path], Callable[[], list[str]]]  # what is written; what writes it, and returns warnings

OWN_FILES = ("neti", "kohya")  # programs with formats of their own, which say nothing of a prompt
PROGRAMS = ("diffusers", "a1111", "comfyui", *OWN_FILES)
MAX_SEED = 2**32 - 1  # other programs do not tell longer ones apart, or lose their digits


def build_parser(prog: str | None) -> Parser:
    parser = script_parser(__doc__, prog)
    parser.add_argument("concepts", nargs="+", metavar="[PLACEHOLDER=]CONCEPT", help="embedding file ('*=…')")
    help_name = "what each is called there: files NAME-0.safetensors, …"
    parser.add_argument("--name", nargs="+", required=True, help=help_name)
    parser.add_argument("--to", nargs="+", choices=PROGRAMS, default=[], metavar="PROGRAM", help=", ".join(PROGRAMS))
    parser.add_argument("--outdir", type=path, metavar="DIR", help="folder to write to (outputs/NAME)")
    parser.add_argument("--force", action="store_true", help="overwrite files that are there")
    parser.add_argument("--any_base", action="store_true", help="also concepts of different base models")

    what = parser.add_argument_group("how they are used")
    help_prompt = "in it, * stands for the concept or for the words ('*')"
    what.add_argument("--prompt", action="append", metavar="TEXT", help=help_prompt)
    add_field_flag(what, Request, "negative_prompt", default="")
    add_stage_flags(what)
    help_presets = "the presets' stages (presets.yaml beside the base model, or the paper's)"
    what.add_argument("--presets", type=input_path, metavar="YAML", help=help_presets)
    help_ckpt = "the base model, for its presets (the small model, if the concept was learned for it)"
    what.add_argument("--ckpt", type=input_path, metavar="FILE", help=help_ckpt)
    what.add_argument("--config", metavar="NAME|YAML", help="demo, sd or its configuration, for its size and guidance")
    help_sampler = "ddim, plms, dpmpp_2m, or as AUTOMATIC1111 names it: 'Euler a', 'DPM++ 2M SGM Uniform', … (ddim)"
    what.add_argument("--sampler", default="ddim", metavar="NAME", help=help_sampler)
    add_field_flag(what, Request, "spacing")
    what.add_argument("--steps", type=int, default=50, metavar="N", help="denoising steps (50)")
    help_scale = "guidance scale, with others for some stages as in 7.5,0-1:1 (the model's own, or 10)"
    what.add_argument("--scale", metavar="X[,STAGES:X…]", help=help_scale)
    add_field_flag(what, Request, "rescale", default=0.0, help="of guidance, 0 to 1; diffusers only (0)")
    what.add_argument("--seed", type=int, default=42, metavar="N", help="(42)")
    add_field_flag(what, Request, "height", help="(the model's own, or 512)")
    add_field_flag(what, Request, "width", help="(the same)")
    help_count = "a1111: 'after N steps' as documented; the program switches one step later, which is the default"
    what.add_argument("--documented_counting", action="store_true", help=help_count)

    card = parser.add_argument_group("model card (README.md)")
    card.add_argument("--card", action="store_true", help="write one")
    card.add_argument("--license", default="creativeml-openrail-m", metavar="ID", help="(creativeml-openrail-m)")
    card.add_argument("--base_model", metavar="ID", help="the base model's name on the hub")
    names = ("--images", "--pictures")  # the second was its name before
    card.add_argument(*names, nargs="+", type=input_path, default=[], metavar="FILE", help="samples to copy and show")
    return parser


def run(argv: Sequence[str] | None = None, prog: str | None = None) -> list[Path]:
    """Write what the flags ask for, and warnings to standard error; returns the files written."""
    return build_parser(prog).run(_export, argv)


def _export(options: argparse.Namespace) -> list[Path]:
    if len(options.prompt or ()) > 1:
        raise ValueError("--prompt is given twice; an export has one prompt.")
    options.prompt = options.prompt[0] if options.prompt else None
    options.config = None if options.config is None else configuration(options.config)
    files = concept_files(options.concepts, PLACEHOLDER, options.prompt or PLACEHOLDER)
    if len(files) != len(options.name):
        raise ValueError(f"There are {len(files)} concepts and {len(options.name)} names; give each one with --name.")
    given = {f"--{name}": [getattr(options, name)] for name in ("ckpt", "config", "presets")}
    check_paths({"CONCEPT": [file for file in files.values() if not is_hub(file)], **given})
    names = ("preset", "rescale", "spacing", "height", "width")
    Request(prompt=options.prompt or "", **{name: getattr(options, name) for name in names})  # which checks them
    from ldm.embeddings import load_concept

    named = zip(options.name, files.items(), strict=True)
    concepts = {placeholder: (name, load_concept(file, placeholder)) for name, (placeholder, file) in named}
    folder = options.outdir or Path("outputs", options.name[0])
    plan = _plan_own_files if set(OWN_FILES) & set(options.to) else _plan_stage_files
    paths, write = plan(options, concepts, folder)
    check_writable(folder, "--outdir")
    there = [path for path in paths if path.exists()]
    read = {Path(file).resolve() for file in [*files.values(), *options.images]}
    if any(path.resolve() in read for path in there):
        raise ValueError(f"Files that are read would be overwritten in '{folder}'; name another --outdir.")
    if there and not options.force:
        listing = ", ".join(path.name for path in there[:4]) + (", …" if len(there) > 4 else "")
        raise ValueError(f"'{folder}' has {listing} already; use --force to overwrite, or name another --outdir.")
    for warning in write():
        sys.stderr.write(f"warning: {printable(warning)}\n")
    return paths


def _plan_stage_files(options: argparse.Namespace, concepts: Named, folder: Path) -> Plan:
    from ldm.export.card import Card
    from ldm.export.files import Export

    if options.images and not options.card:
        raise ValueError("--images are shown in the model card; use --card, too.")
    export = Export(concepts, _use(options, concepts), options.any_base)
    programs = list(dict.fromkeys(options.to))
    card = Card(options.license, options.base_model, options.images) if options.card else None
    return export.paths(programs, folder, card), lambda: export.write(programs, folder, card)


def _plan_own_files(options: argparse.Namespace, concepts: Named, folder: Path) -> Plan:
    from ldm.export import kohya, neti
    from ldm.export.texts import check_name

    if len(options.to) > 1 or options.card:
        names = " and ".join(OWN_FILES)
        raise ValueError(f"--to {names} each write files of their own; give one alone, without --card.")
    program = neti if options.to == ["neti"] else kohya
    for name, concept in concepts.values():
        check_name(name)
        program.check_exports(concept)

    def write() -> list[str]:
        for placeholder, (name, concept) in concepts.items():
            program.save(concept, folder, name, placeholder)
        return []

    return [file for name, _ in concepts.values() for file in program.paths(folder, name)], write


def _use(options: argparse.Namespace, concepts: Named) -> Use:
    """What the flags say of the prompt and of sampling."""
    from ldm.conditioning.presets import load_presets, preset_words
    from ldm.export.files import Use, most_stages
    from ldm.export.webui import name_of

    if not 0 <= options.seed <= MAX_SEED:
        raise ValueError(f"seed must be in 0..{MAX_SEED}, which other programs tell apart, not {options.seed}.")
    facts, windows = _base_model(options, concepts)
    prompt, stages = options.prompt, most_stages(concept for _, concept in concepts.values())
    given = read_stages(options.stages, stages) if options.stages else {"preset": options.preset}
    words = given.get("prospect_words")
    if given.get("preset") is not None:
        if options.presets is not None:
            windows = load_presets(options.presets)
        words = preset_words(given["preset"], prompt or "", tuple(concepts), stages, windows)
        prompt = PLACEHOLDER
    scale: float | Sequence[float] = facts.scale
    if options.scale is not None:
        scale = Request(scale=read_scale(options.scale, len(words) if words else stages, facts.scale)).guidance_scale
    return Use(
        PLACEHOLDER if prompt is None else prompt,
        words,
        sampler=name_of(options.sampler, options.spacing),
        steps=options.steps,
        scale=scale,
        seed=options.seed,
        width=facts.width if options.width is None else options.width,
        height=facts.height if options.height is None else options.height,
        documented=options.documented_counting,
        negative_prompt=options.negative_prompt,
        rescale=options.rescale,
    )


def _base_model(options: argparse.Namespace, concepts: Named) -> tuple[ModelFacts, Windows]:
    """Size, guidance and presets' windows of the base model, as `scripts/txt2img.py` finds them.

    The base model is `--ckpt`, or the small model that ships if the first concept was learned for it. Where neither
    says it, they are Stable Diffusion v1's and the paper's.
    """
    from ldm.checkpoint import base_model_of
    from ldm.conditioning.presets import Windows, presets_beside
    from ldm.config import load_config
    from ldm.files.base_model import refuse_other_base, same_base

    ckpt, config, small = options.ckpt, options.config, shipped(MODEL_DEFAULTS["ckpt"])
    _, first = next(iter(concepts.values()))
    if ckpt is None and same_base(first.metadata, base_model_of(small)):
        ckpt, config = small, config or shipped(MODEL_DEFAULTS["config"])
    for name, concept in concepts.values() if options.ckpt and not options.any_base else ():
        refuse_other_base(concept.metadata, base_model_of(ckpt), f"The concept '{name}'")
    facts = ModelFacts() if config is None else model_facts(load_config(config, flag="--config"))
    return facts, Windows() if ckpt is None else presets_beside(ckpt)
