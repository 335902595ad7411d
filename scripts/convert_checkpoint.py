"""Convert a .ckpt file or a diffusers folder to one .safetensors file in the CompVis layout.

python scripts/convert_checkpoint.py sd-v1-4.ckpt sd-v1-4.safetensors --half
"""

from __future__ import annotations

import argparse

import torch

from ldm.checkpoint import file_hash, identify, read_state_dict, save_state_dict
from ldm.cli.flags import path, script_parser
from ldm.files.writing import check_new_file


def main(argv: list[str] | None = None) -> None:
    parser = script_parser(__doc__)
    parser.add_argument("source", type=path, help=".ckpt or .safetensors file, or diffusers folder")
    parser.add_argument("target", type=path, help="the .safetensors file to write")
    parser.add_argument("--half", action="store_true", help="store the weights as float16 (half the size)")
    parser.add_argument("--force", action="store_true", help="overwrite the target")
    parser.add_argument("--debug", action="store_true", help="show the whole trace of an error")
    parser.run(convert, argv)


def convert(options: argparse.Namespace) -> list[str]:
    check_new_file(options.target, options.force, inputs=[options.source])
    state = read_state_dict(options.source, torch.float16 if options.half else None)
    metadata = {"source": options.source.name, "source_sha256": file_hash(options.source)}
    save_state_dict(state, options.target, metadata)
    return [f"{options.target}: {identify(state)}, {len(state)} tensors"]


if __name__ == "__main__":
    main()
