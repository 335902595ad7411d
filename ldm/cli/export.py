"""What `scripts/export_embedding.py` does; imports nothing heavy before the flags are read."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli.flags import Once, Parser, add_flag
from ldm.cli.sampling_flags import HELP_PRESET, MODEL_DEFAULTS, ONE_PROMPT, word
from ldm.files.writing import check_writable, replace_text, writing_to
from ldm.native import Native, native

if TYPE_CHECKING:
    from ldm.embeddings import Concept
    from ldm.export.files import Use

PROGRAMS = ("diffusers", "a1111", "comfyui")


def build_parser(description: str) -> Parser:
    summary, _, examples = description.partition("\n")
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=summary, epilog="examples:\n" + examples.strip("\n"), formatter_class=raw)
    parser.add_argument("concepts", nargs="+", metavar="[PLACEHOLDER=]CONCEPT", help="embedding file ('*=…')")
    add_flag(parser, "--name", nargs="+", required=True, help="what each is called there: files NAME-0.safetensors, …")
    add_flag(parser, "--to", nargs="+", choices=PROGRAMS, default=[], metavar="PROGRAM", help=", ".join(PROGRAMS))
    add_flag(parser, "--outdir", type=Path, metavar="DIR", help="folder to write to (outputs/NAME)")
    add_flag(parser, "--force", action="store_true", help="overwrite files that are there")

    what = parser.add_argument_group("how they are used")
    help_prompt = "in it, * stands for the concept or for the words ('*')"
    add_flag(what, "--prompt", action=Once, instead=ONE_PROMPT, metavar="TEXT", help=help_prompt)
    add_flag(what, "--negative_prompt", default="", metavar="TEXT", help="plain text to lead away from (nothing)")
    words = what.add_mutually_exclusive_group()
    add_flag(words, "--words", metavar="FILE", help="YAML list, one entry for each stage, the END of generation first")
    add_flag(words, "--word", action="append", type=word, metavar="TEXT", help="one entry of it, once for each stage")
    add_flag(words, "--preset", metavar="ATTRIBUTE", help=HELP_PRESET)
    add_flag(what, "--presets", metavar="YAML", help="the presets' stages, as measured for a model (the paper's)")
    help_sampler = "as AUTOMATIC1111 names it: ddim, plms, 'Euler a', 'DPM++ 2M Karras', … (ddim)"
    add_flag(what, "--sampler", default="ddim", metavar="NAME", help=help_sampler)
    add_flag(what, "--steps", type=int, default=50, metavar="N", help="denoising steps (50)")
    add_flag(what, "--scale", type=float, metavar="X", help="guidance scale (the model's own, or 10)")
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
    add_flag(card, "--pictures", nargs="+", type=Path, default=[], metavar="FILE", help="samples to copy and show")
    return parser


def run(description: str, argv: Sequence[str] | None = None) -> list[Path]:
    """Write what the flags ask for, and warnings to standard error; ends with exit code 2 where that cannot be.

    Args:
        description: the script's docstring; its first line, then examples.
        argv: the flags, by default the program's own.

    Returns:
        The files written.
    """
    parser = build_parser(description)
    options = parser.parse_strictly(argv)
    with parser.sentences():
        paths, warnings = _export(options)
    for warning in warnings:
        sys.stderr.write(f"warning: {warning}\n")
    return paths


def _export(options: argparse.Namespace) -> tuple[list[Path], list[str]]:
    from ldm.cli.sampling_arguments import concept_files
    from ldm.embeddings import load_concept
    from ldm.export.card import caption, model_card
    from ldm.export.files import Export

    files = concept_files(options.concepts, "*")
    if len(files) != len(options.name):
        raise ValueError(f"There are {len(files)} concepts and {len(options.name)} names; give each one with --name.")
    named = zip(options.name, (load_concept(file, placeholder) for placeholder, file in files.items()), strict=True)
    concepts = dict(zip(files, named, strict=True))
    export = Export(concepts, _use(options, concepts))
    programs, folder = list(dict.fromkeys(options.to)), options.outdir or Path("outputs") / options.name[0]
    if options.pictures and not options.card:
        raise ValueError("--pictures are shown in the model card; say --card, too.")
    copies = {picture: folder / picture.name for picture in options.pictures}
    if len({copy.name for copy in copies.values()}) < len(copies):
        raise ValueError("--pictures have the same name in two folders; rename one of them.")
    captions = {copy.name: caption(picture) for picture, copy in copies.items()}
    copies = {picture: copy for picture, copy in copies.items() if picture.resolve() != copy.resolve()}

    paths = [*export.paths(programs, folder), *copies.values(), *([folder / "README.md"] if options.card else [])]
    there = [path.name for path in paths if path.exists()]
    if there and not options.force:
        listing = ", ".join(there[:4]) + (", …" if len(there) > 4 else "")
        raise ValueError(f"'{folder}' has {listing} already; say --force to overwrite, or name another --outdir.")
    check_writable(folder, "--outdir")
    with writing_to(folder):
        warnings = export.write(programs, folder)
        for picture, copy in copies.items():
            shutil.copyfile(picture, copy)
        if options.card:
            uses = [path.name for path in paths if path.suffix in (".py", ".txt", ".json")]
            about = {"base_model": options.base_model, "license_id": options.license, "pictures": captions}
            replace_text(folder / "README.md", model_card(concepts, uses, **about))
    return paths, warnings


def _use(options: argparse.Namespace, concepts: Mapping[str, tuple[str, Concept]]) -> Use:
    """What the flags say of the prompt and of sampling."""
    from ldm.cli.sampling_arguments import check_types, preset_words, words_file
    from ldm.conditioning.presets import load_presets
    from ldm.conditioning.prompts import PLACEHOLDER
    from ldm.export.files import Use, most_stages

    prompt, words = options.prompt, options.word
    if options.words is not None:
        given = words_file(options.words)
        unknown = sorted(set(given) - {"prompt", "prospect_words"})
        if unknown:
            raise ValueError(
                f"'{options.words}' has {', '.join(unknown)}; here it gives prospect_words and prompt only."
            )
        check_types(given)
        words, prompt = given.get("prospect_words"), given.get("prompt") if prompt is None else prompt
    if options.preset is not None:
        stages = most_stages(concept for _, concept in concepts.values())
        where = {"num_stages": stages, "windows": load_presets(options.presets)}
        words = preset_words(options.preset, prompt or "", concepts, **where)
        prompt = PLACEHOLDER
    settings = {name: getattr(options, name) for name in ("sampler", "steps", "scale", "seed", "width", "height")}
    settings |= _native(concepts).filled(**{name: settings[name] for name in Native._fields})
    others = {"documented": options.documented_counting, "negative_prompt": options.negative_prompt}
    return Use(PLACEHOLDER if prompt is None else prompt, words, **settings, **others)


def _native(concepts: Mapping[str, tuple[str, Concept]]) -> Native:
    """The size and guidance of the small model that ships, if the first concept was learned for it; else v1's."""
    from ldm.checkpoint import base_model_of
    from ldm.config import load_config
    from ldm.files.base_model import same_base

    _, first = next(iter(concepts.values()))
    ckpt = Path(MODEL_DEFAULTS["ckpt"])
    if ckpt.is_file() and same_base(first.metadata, base_model_of(ckpt)):
        return native(load_config(MODEL_DEFAULTS["config"]))
    return Native()
