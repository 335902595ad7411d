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

from ldm.cli.flags import Parser, add_field_flag, check_paths, input_path, natural, path, script_parser
from ldm.cli.models import add_model_flags, load_model, read_setup
from ldm.editing.request import InversionOptions, check_words_in
from ldm.files.texts import slug
from ldm.files.writing import check_new_file, check_writable
from ldm.request import check_prompt

logger = logging.getLogger(__name__)

METHODS = ("stylediffusion", "null-text", "text")


def add_inversion_flags(group: argparse._ActionsContainer) -> None:
    """Add what says how an image is inverted."""
    help_method = "stylediffusion (learned values), null-text, or text (learned contexts) (stylediffusion)"
    group.add_argument("--method", choices=METHODS, default=METHODS[0], metavar="NAME", help=help_method)
    for name, flag in (("steps", ""), ("inner_steps", ""), ("guidance_scale", "--scale"), ("epochs", "")):
        add_field_flag(group, InversionOptions, name, flag)
    add_field_flag(group, InversionOptions, "half_maps")
    add_field_flag(
        group, InversionOptions, "attention_loss", "--no_attention_loss", const=False, help="do not compare maps"
    )
    help_clip = "folder of transformers' CLIP ViT-B/16, which sees the image (its patches, without weights)"
    group.add_argument("--clip", type=input_path, metavar="DIR", help=help_clip)
    help_mode = "affine (c * gamma + beta, the released code) or replace (the paper's formula) (affine)"
    group.add_argument("--value_mode", choices=("affine", "replace"), default="affine", metavar="HOW", help=help_mode)
    group.add_argument("--start_seed", type=natural, default=0, metavar="N", help="of the networks' first weights (0)")


def build_parser(prog: str | None) -> Parser:
    parser = script_parser(__doc__, prog)
    parser.add_argument("image", type=input_path, metavar="IMAGE", help="the image; the middle of it is used")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what is in the image")
    how = parser.add_argument_group("how")
    add_inversion_flags(how)
    how.add_argument("--height", type=natural, metavar="N", help="in pixels (the model's own)")
    how.add_argument("--width", type=natural, metavar="N", help="in pixels (the model's own)")
    help_import = "take what StyleDiffusion's own code learned of the image: its .pth file"
    how.add_argument("--import", dest="networks", type=path, metavar="FILE", help=help_import)
    files = parser.add_argument_group("model and files")
    add_model_flags(files)
    files.add_argument("--out", type=path, metavar="FILE", help="the concept's file (outputs/IMAGE-METHOD.safetensors)")
    files.add_argument("--force", action="store_true", help="overwrite the file if it is there")
    help_mask = "write also where a word of the prompt is: FILE-WORD-foreground.png and -background.png"
    files.add_argument("--mask", action="append", default=[], metavar="WORD", help=help_mask)
    files.add_argument("--debug", action="store_true", help="show the whole trace of an error")
    return parser


def run(argv: Sequence[str] | None = None, prog: str | None = None) -> list[Path]:
    """Invert the image; returns the files written."""
    return build_parser(prog).run(_invert, argv)


def _invert(options: argparse.Namespace) -> list[Path]:
    check_prompt(options.prompt)
    check_words_in(options.mask, [options.prompt], "--mask")
    if options.networks is not None and options.clip is None:
        raise ValueError("--import needs what the networks read: --clip DIR.")
    check_paths({"IMAGE": [options.image], "--clip": [options.clip], "--import": [options.networks]})
    setup, config = read_setup(options)
    out = options.out or Path("outputs", f"{options.image.stem}-{options.method}.safetensors")
    out = check_new_file(out, options.force, [options.image])
    check_writable(out.parent, "--out")
    parts = ("foreground", "background")
    masks = {word: [out.with_name(f"{out.stem}-{slug(word)}-{part}.png") for part in parts] for word in options.mask}
    for file in chain.from_iterable(masks.values()):
        check_new_file(file, options.force, [options.image], ".png")
    model = load_model(options, setup, config)
    concept = invert_options(model, options.image, options.prompt, options, out)
    logger.info(
        "reconstruction %s dB, the autoencoder's own %s dB",
        *(concept.metadata[f"inversion.{key}psnr"] for key in ("", "autoencoder_")),
    )
    from ldm.editing.invert import word_masks
    from ldm.embeddings import save_new_concept
    from ldm.files.records import save_png

    save_new_concept(concept, out, force=options.force)
    unfinished(out).unlink(missing_ok=True)
    for word, images in (word_masks(model, concept, options.mask) if masks else {}).items():
        for file, image in zip(masks[word], images, strict=True):
            save_png(image, file, {})
    return [out, *chain.from_iterable(masks.values())]


def unfinished(out: Path) -> Path:
    """Return the file that keeps what is finished of a concept."""
    return out.with_suffix(".unfinished" + out.suffix)


def invert_options(model: Any, image: Path, prompt: str, options: argparse.Namespace, out: Path) -> Any:
    """Invert an image as flags say; Ctrl-C keeps what is finished."""
    from ldm.editing.invert import import_networks, invert_image

    given = {f.name: value for f in fields(InversionOptions) if (value := getattr(options, f.name, None)) is not None}
    how = InversionOptions(**({"guidance_scale": min(7.5, model.facts.scale)} | given))  # 7.5 is StyleDiffusion's
    scale, kept, size = how.guidance_scale, unfinished(out), (options.height, options.width)
    if options.networks is not None:
        return import_networks(model, image, prompt, options.networks, options.clip, guidance_scale=scale)
    start = {"clip": options.clip, "value_mode": options.value_mode, "seed": options.start_seed}
    try:
        of_method = start if options.method == "stylediffusion" else {}
        return invert_image(model, image, prompt, options.method, how, kept, size, **of_method)
    except KeyboardInterrupt as stop:
        if not kept.exists():
            raise
        said = f"stopped by Ctrl-C; finished steps are kept in '{kept}': the same command goes on from there"
        raise KeyboardInterrupt(said) from stop
