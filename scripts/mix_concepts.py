"""Interpolate two concepts, stage by stage, or join the stages of both.

python scripts/mix_concepts.py models/demo/concepts/dotted-star.safetensors \\
    models/demo/concepts/striped-heart.safetensors --weight 0.3 --out outputs/star-heart.safetensors
python scripts/mix_concepts.py star.safetensors star-in-a-caption.safetensors --stages 0-6 --out both.safetensors
"""

from __future__ import annotations

import argparse
from itertools import chain

from ldm.cli.flags import input_path, path, script_parser
from ldm.cli.prompts import seeds


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("first", type=input_path, help="the concept that weight 0 is")
    parser.add_argument("second", type=input_path, help="the concept that weight 1 is")
    help_stages = "take these whole from the second and the others from the first, as in 0-6"
    parser.add_argument("--stages", nargs="+", type=seeds, metavar="RANGE", help=help_stages)
    parser.add_argument("--weight", type=float, default=0.5, metavar="X", help="of the second, 0 to 1 (0.5)")
    parser.add_argument("--out", type=path, required=True, metavar="FILE", help="the .safetensors file to write")
    parser.add_argument("--any_base", action="store_true", help="mix also concepts of different base models")
    parser.add_argument("--force", action="store_true", help="overwrite the file if it is there")
    parser.run(mix, None)


def mix(options: argparse.Namespace) -> list[str]:
    from ldm.embeddings import load_concept, save_new_concept

    first, second = load_concept(options.first), load_concept(options.second)
    weight, mixed_of = options.weight, f"{1 - options.weight:g} {options.first.name} + {options.weight:g} "
    if options.stages is not None:
        taken, count = set(chain(*options.stages)), max(first.num_stages, second.num_stages)
        if max(taken) >= count:
            raise ValueError(f"--stages names {max(taken)}, but the concepts have the stages 0..{count - 1}.")
        weight = [float(stage in taken) for stage in range(count)]
        mixed_of = f"{options.first.name}; of stages {', '.join(map(str, sorted(taken)))} "
    mixed = first.lerp(second, weight, options.any_base)
    mixed.metadata["mixed"] = f"{mixed_of}{options.second.name}"
    save_new_concept(mixed, options.out, force=options.force, inputs=[options.first, options.second])
    return [f"{options.out}: {mixed.num_stages} stages of width {mixed.width}"]


if __name__ == "__main__":
    main()
