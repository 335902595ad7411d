"""Render pictures of the demo's world, with captions.csv beside them.

python scripts/render_world.py --out /tmp/world --count 16 --held-out
python scripts/render_world.py --out /tmp/star --count 1 --caption-like large,dotted,red,star,centre,white
"""

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `evaluation` is not installed

from evaluation.world.rendered import RESOLUTION, attributes_from_words, caption, random_attributes, render
from ldm.cli.flags import Parser
from ldm.files.writing import check_writable


def save_picture(picture: Tensor, path: Path) -> None:
    """Write one picture, float (3, R, R) in [-1, 1]."""
    pixels = ((picture + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0)
    Image.fromarray(pixels.numpy()).save(path)


def file_names(template: str, count: int) -> list[str]:
    """The pictures' names; `ValueError` where they are paths, the same twice, or cannot be formatted."""
    try:
        names = [template.format(number) + ".png" for number in range(count)]
    except (LookupError, AttributeError, ValueError) as error:
        raise ValueError(f"--name '{template}' cannot be filled in ({error}); write it like {{:05d}}.") from error
    if any(Path(name).name != name or "\\" in name for name in names):
        raise ValueError(f"--name '{template}' must be a name, not a path; the folder goes to --out.")
    if len(set(names)) != count:
        raise ValueError(f"--name {template} gives {count} pictures the same name: put {{}} in it.")
    return names


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder")
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resolution", type=int, default=RESOLUTION, help="pixels a side")
    parser.add_argument("--held-out", action="store_true", help="only combinations kept out of training")
    parser.add_argument("--caption-like", metavar="WORDS", help="one word of every factor, with commas between")
    parser.add_argument("--name", default="{:05d}", help="file name without ending, {} is the picture's number")
    parser.add_argument("--debug", action="store_true", help="show the whole trace of an error")
    args = parser.parse_strictly(argv)
    with parser.sentences(args.debug):
        write(args)


def write(args: argparse.Namespace) -> None:
    if min(args.count, args.resolution) < 1 or not 0 <= args.seed < 2**62:
        raise ValueError("--count and --resolution must be at least 1, and --seed in 0..2^62.")
    names = file_names(args.name, args.count)
    check_writable(args.out, "--out")
    if args.caption_like:
        if args.held_out:
            raise ValueError("--caption-like names the combination: leave --held-out away.")
        attributes = attributes_from_words(args.caption_like.split(",")).expand(args.count, -1)
    else:
        attributes = random_attributes(args.count, args.seed, args.held_out)
    pictures = render(attributes, range(args.seed, args.seed + args.count), args.resolution)

    args.out.mkdir(parents=True, exist_ok=True)
    for name, picture in zip(names, pictures, strict=True):
        save_picture(picture, args.out / name)
    with (args.out / "captions.csv").open("w", newline="", encoding="utf-8") as file:
        rows = zip(names, map(caption, attributes), strict=True)
        csv.writer(file, lineterminator="\n").writerows([("file", "caption"), *rows])


if __name__ == "__main__":
    main()
