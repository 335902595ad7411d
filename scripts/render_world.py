"""Render images of the demo's world, with captions.csv beside them.

    python scripts/render_world.py --out /tmp/world --count 16 --held-out
    python scripts/render_world.py --out /tmp/star --count 1 --caption-like large,dotted,red,star,centre,white

The images and captions.csv are one set: they appear together, and all of them carry the set's identity.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `evaluation` is not installed

from ldm.cli.flags import path, script_parser
from ldm.files.texts import read_table
from ldm.files.writing import check_writable, replacing_set, writing_to

if TYPE_CHECKING:
    from PIL import Image

CAPTIONS = "captions.csv"


def main(argv: Sequence[str] | None = None) -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--out", type=path, required=True, help="folder")
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resolution", type=int, default=128, help="pixels a side (128)")
    parser.add_argument("--held-out", action="store_true", help="only combinations kept out of training")
    parser.add_argument("--caption-like", metavar="WORDS", help="one word of every factor, with commas between")
    parser.add_argument("--force", action="store_true", help="replace the rendered set in the folder")
    args = parser.parse_strictly(argv)
    with parser.sentences():
        write(args)


def write(args: argparse.Namespace) -> None:
    from evaluation.world.attributes import attributes_from_words, caption, random_attributes
    from evaluation.world.rendered import render
    from ldm.files.images import LARGEST, to_pil

    if not (1 <= args.count <= 10**6 and 1 <= args.resolution <= LARGEST and 0 <= args.seed < 2**62):
        raise ValueError(f"--count must be in 1..10^6, --resolution in 1..{LARGEST}, --seed in 0..2^62.")
    if args.caption_like and args.held_out:
        raise ValueError("--caption-like names the combination: omit --held-out.")
    check_writable(args.out, "--out")
    if members(aside := set_aside(args.out)) and not args.out.exists():  # killed before the new set was in its place
        aside.rename(args.out)
    check_replaceable(args.out, args.force)
    if args.caption_like:
        attributes = attributes_from_words(args.caption_like.split(",")).expand(args.count, -1)
    else:
        attributes = random_attributes(args.count, args.seed, args.held_out)
    images = render(attributes, range(args.seed, args.seed + args.count), args.resolution)
    named = {f"{number:05d}.png": to_pil(image) for number, image in enumerate(images)}
    save_set(args.out, named, [caption(row) for row in attributes])


def check_replaceable(folder: Path, force: bool) -> None:
    """Raise `ValueError` unless `folder` is new, empty, or with `force` a rendered set and nothing else."""
    held = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if held and not force:
        raise ValueError(f"'{folder}' is not empty; use --force to replace a rendered set, or name another folder.")
    if held and folder.samefile("."):
        raise ValueError(f"'{folder}' is the current folder, and a set is replaced as a whole; start it from another.")
    if strangers := held - members(folder):
        raise ValueError(f"'{folder}' holds '{min(strangers)}', which is not of a rendered set; name another folder.")


def set_aside(folder: Path) -> Path:
    """Return where the old set lies for the moment in which the new one takes its place."""
    folder = folder.absolute()
    return folder.with_name(f"{folder.name}.prospect-replaced")


def members(folder: Path) -> set[str]:
    """Return the names of the files of a rendered set."""
    try:
        rows = read_table(folder / CAPTIONS, "--out", ("file", "set"))
    except ValueError:
        return set()
    return {CAPTIONS, *(row["file"] for _, row in rows if row["set"])}


def save_set(folder: Path, images: Mapping[str, Image.Image], captions: Sequence[str]) -> None:
    """Write images and their captions beside `folder`, then let them take its place together."""
    from PIL.PngImagePlugin import PngInfo

    identity = hashlib.sha256(b"".join(image.tobytes() for image in images.values())).hexdigest()[:16]
    info = PngInfo()
    info.add_text("set", identity)
    with writing_to(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".rendered-", dir=folder.parent) as beside:
            is_new = not folder.is_dir() or not any(folder.iterdir())
            new, old = folder if is_new else Path(beside, "new"), set_aside(folder)
            with replacing_set(new) as place:
                for name, image in images.items():
                    image.save(place / name, pnginfo=info)
                with (place / CAPTIONS).open("w", newline="", encoding="utf-8") as file:
                    rows = [(name, text, identity) for name, text in zip(images, captions, strict=True)]
                    csv.writer(file, lineterminator="\n").writerows([("file", "caption", "set"), *rows])
            if is_new:
                return
            check_replaceable(old, force=True)
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
            try:
                new.rename(folder)
            except BaseException:
                old.rename(folder)
                raise
            shutil.rmtree(old, ignore_errors=True)


if __name__ == "__main__":
    main()
