"""Convert a .ckpt file or a diffusers folder to one .safetensors file in the CompVis layout.

python scripts/convert_checkpoint.py sd-v1-4.ckpt sd-v1-4.safetensors --half
"""

from __future__ import annotations

from pathlib import Path

import torch

from ldm.checkpoint import file_hash, identify, read_state_dict, save_state_dict
from ldm.cli.flags import Parser


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("source", type=Path, help=".ckpt or .safetensors file, or diffusers folder")
    parser.add_argument("target", type=Path, help="the .safetensors file to write")
    parser.add_argument("--half", action="store_true", help="store the weights as float16 (half the size)")
    parser.add_argument("--force", action="store_true", help="overwrite the target")
    parser.add_argument("--debug", action="store_true", help="show the whole trace of an error")
    options = parser.parse_strictly(argv)
    if options.target.suffix != ".safetensors":
        parser.error(f"the target must end in .safetensors, not '{options.target.suffix}'")
    if options.target.resolve() == options.source.resolve():
        parser.error(f"'{options.target}' is the source; name another file")
    if options.target.exists() and not options.force:
        parser.error(f"'{options.target}' is there already; say --force to overwrite it, or name another file")
    with parser.sentences(options.debug):
        state = read_state_dict(options.source, torch.float16 if options.half else None)
        metadata = {"source": options.source.name, "source_sha256": file_hash(options.source)}
        save_state_dict(state, options.target, metadata)
    print(f"{options.target}: {identify(state)}, {len(state)} tensors")


if __name__ == "__main__":
    main()
