"""Invert an image into a concept that it can be edited with.

python scripts/invert.py photo.png --prompt "a dog on the grass" --out dog.safetensors
python scripts/invert.py photo.png --prompt "a dog on the grass" --method null-text --steps 50 --inner_steps 10
python scripts/invert.py photo.png --prompt "a dog" --import "model-inner100-epoch1-learnv-[1].pth" --clip DIR
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import fields
from itertools import chain
from pathlib import Path
from typing import Any

from ldm.cli.flags import (
    Parser,
    add_field_flag,
    add_flag,
    check_paths,
    input_path,
    log_to_terminal,
    natural,
    path,
    script_parser,
)
from ldm.cli.models import add_model_flags, check_weights, load_model, model_setup
from ldm.editing.request import InversionOptions, check_words_in
from ldm.files.texts import slug
from ldm.files.writing import check_new_file, check_writable
from ldm.request import check_prompt

logger = logging.getLogger(__name__)

METHODS = ("stylediffusion", "null-text", "text")
UNFINISHED = ".unfinished"  # behind the name of a concept's file, while it is learned


def add_inversion_flags(group: argparse._ActionsContainer) -> None:
    """Add what says how an image is inverted."""
    help_method = "stylediffusion (learned values), null-text, or text (learned contexts) (stylediffusion)"
    add_flag(group, "--method", choices=METHODS, default=METHODS[0], metavar="NAME", help=help_method)
    for name, flag in (("steps", ""), ("inner_steps", ""), ("guidance_scale", "--scale"), ("epochs", "")):
        add_field_flag(group, InversionOptions, name, flag)
    add_field_flag(group, InversionOptions, "half_maps")
    add_flag(
        group,
        "--no_attention_loss",
        dest="attention_loss",
        action="store_const",
        const=False,
        help="do not compare maps",
    )
    help_clip = "folder of transformers' CLIP ViT-B/16, which sees the image (its patches, without weights)"
    add_flag(group, "--clip", type=input_path, metavar="DIR", help=help_clip)
    help_features = "file with these features as its one tensor (1, T, width), in place of --clip"
    add_flag(group, "--features", type=input_path, metavar="FILE", help=help_features)
    help_mode = "affine (c * gamma + beta, the released code) or replace (the paper's formula) (affine)"
    add_flag(group, "--value_mode", choices=("affine", "replace"), default="affine", metavar="HOW", help=help_mode)
    add_flag(group, "--start_seed", type=natural, default=0, metavar="N", help="of the networks' first weights (0)")


def build_parser(docstring: str | None, prog: str | None = None) -> Parser:
    parser = script_parser(docstring, prog)
    parser.add_argument("image", type=input_path, metavar="IMAGE", help="the image; the middle of it is used")
    add_flag(parser, "--prompt", required=True, metavar="TEXT", help="what is in the image")
    how = parser.add_argument_group("how")
    add_inversion_flags(how)
    add_flag(how, "--height", type=natural, metavar="N", help="in pixels (the model's own)")
    add_flag(how, "--width", type=natural, metavar="N", help="in pixels (the model's own)")
    help_import = "take what StyleDiffusion's own code learned of the image: its .pth file"
    add_flag(how, "--import", dest="source", type=path, metavar="FILE", help=help_import)
    files = parser.add_argument_group("model and files")
    add_model_flags(files)
    add_flag(files, "--out", type=path, metavar="FILE", help="the concept's file (outputs/IMAGE-METHOD.safetensors)")
    add_flag(files, "--force", action="store_true", help="overwrite the file if it is there")
    help_mask = "write also where a word of the prompt is: FILE-WORD-foreground.png and -background.png"
    add_flag(files, "--mask", action="append", default=[], metavar="WORD", help=help_mask)
    add_flag(files, "--debug", action="store_true", help="show the whole trace of an error")
    return parser


def run(docstring: str | None, argv: Sequence[str] | None = None, prog: str | None = None) -> list[Path]:
    """Invert the image; returns the files written."""
    parser = build_parser(docstring, prog)
    options = parser.parse_strictly(argv)
    log_to_terminal(talkative=[__name__])
    with parser.sentences(options.debug):
        return _invert(options)


def _invert(options: argparse.Namespace) -> list[Path]:
    check_prompt(options.prompt)
    check_words_in(options.mask, [options.prompt], "--mask")
    check_paths({"IMAGE": [options.image], "--clip": [options.clip], "--features": [options.features]})
    check_weights(model_setup(options, {})["ckpt"])
    out = options.out or Path("outputs", f"{options.image.stem}-{options.method}.safetensors")
    out = check_new_file(out, options.force, [options.image])
    check_writable(out.parent, "--out")
    for file in chain.from_iterable(mask_files(out, word) for word in options.mask):
        check_new_file(file, options.force, [options.image], ".png")
    model = load_model(options)
    concept = invert_options(model, options.image, options.prompt, options, out)
    logger.info(
        "reconstruction %s dB, the autoencoder's own %s dB",
        *(concept.metadata[f"inversion.{key}psnr"] for key in ("", "autoencoder_")),
    )
    from ldm.embeddings import save_new_concept

    save_new_concept(concept, out, force=options.force)
    unfinished(out).unlink(missing_ok=True)
    return [out, *_masks(model, concept, options.prompt, options.mask, out)]


def inversion_options(options: argparse.Namespace, scale: float) -> InversionOptions:
    """Return how to invert; the guidance is StyleDiffusion's 7.5, or less where a model's own is less."""
    given = {f.name: value for f in fields(InversionOptions) if (value := getattr(options, f.name, None)) is not None}
    return InversionOptions(**({"guidance_scale": min(7.5, scale)} | given))


def unfinished(out: Path) -> Path:
    """Return the file that keeps what is finished of a concept."""
    return out.with_suffix(UNFINISHED + out.suffix)


def invert_options(model: Any, image: Path, prompt: str, options: argparse.Namespace, out: Path) -> Any:
    """Invert an image as flags say; Ctrl-C keeps what is finished."""
    from ldm.editing.invert import import_networks, invert_image

    how = inversion_options(options, model.facts.scale)
    clip = options.clip if options.features is None else _features(options.features)
    if options.source is not None:
        if clip is None:
            raise ValueError("--import needs what the networks read: --clip DIR, or --features FILE.")
        return import_networks(model, image, prompt, options.source, clip, guidance_scale=how.guidance_scale)
    size = (getattr(options, "height", None), getattr(options, "width", None))
    start: dict[str, Any] = {}
    if options.method == METHODS[0]:
        start = {"clip": clip, "value_mode": options.value_mode, "seed": options.start_seed}
    try:
        return invert_image(model, image, prompt, options.method, how, unfinished(out), size, **start)
    except KeyboardInterrupt as stop:
        kept = unfinished(out)
        if not kept.exists():
            raise
        raise KeyboardInterrupt(
            f"stopped by Ctrl-C; finished steps are kept in '{kept}': the same command goes on from there"
        ) from stop


def _features(file: Path) -> Any:
    from ldm.files.tensors import named_tensors, read_file

    found = list(named_tensors(file, read_file(file).content).values())
    if len(found) != 1:
        raise ValueError(f"'{file}' holds {len(found)} tensors; --features needs a file with one.")
    return found[0].float()


def _masks(model: Any, concept: Any, prompt: str, words: Sequence[str], out: Path) -> list[Path]:
    if not words:
        return []
    from ldm.editing.invert import word_masks
    from ldm.files.records import save_png

    written = []
    for word, images in word_masks(model, concept, words).items():
        for file, image in zip(mask_files(out, word), images, strict=True):
            save_png(image, file, {})
            written.append(file)
    return written


def mask_files(out: Path, word: str) -> list[Path]:
    """Return where the masks of a word are written: foreground, background."""
    return [out.with_name(f"{out.stem}-{slug(word)}-{part}.png") for part in ("foreground", "background")]
