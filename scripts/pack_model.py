"""Pack a model trained from scratch into one file, with averaged weights where the run averaged them.

python scripts/pack_model.py logs/…_small models/demo/model.safetensors --force
python scripts/pack_model.py logs/…_classifier models/demo/classifier.safetensors --force
python scripts/pack_model.py logs/…_text models/demo/clip.safetensors --force
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from ldm.checkpoint import save_state_dict
from ldm.cli.flags import path, script_parser
from ldm.files.tensors import read_checkpoint
from ldm.files.writing import check_new_file

PARTS = ("model.", "first_stage_model.", "cond_stage_model.")
CLASSIFIER = ("features.", "heads.")
TOWERS = ("image_tower.", "text_projection.", "log_scale")


def main(argv: Sequence[str] | None = None) -> None:
    parser = script_parser(__doc__)
    parser.add_argument("run", type=path, help="log folder of the run: a diffusion model, the classifier or the towers")
    parser.add_argument("out", type=path, help="the .safetensors file to write")
    parser.add_argument("--dtype", choices=["float16", "float32"], default="float16", help="(float16)")
    parser.add_argument("--force", action="store_true", help="overwrite the file")
    parser.add_argument("--debug", action="store_true", help="show the whole trace of an error")
    parser.run(pack, argv)


def pack(options: argparse.Namespace) -> list[str]:
    check_new_file(options.out, options.force, inputs=[options.run])
    file = options.run / "checkpoints" / "last.ckpt"
    checkpoint = read_checkpoint(file, ["state_dict", "global_step"])
    saved = checkpoint["state_dict"]
    if not any(key.startswith((PARTS[0], CLASSIFIER[0], TOWERS[0])) for key in saved):
        raise ValueError(
            f"'{file}' holds no whole model; give the log folder of a run of configs/demo/diffusion.yaml, "
            "classifier.yaml or text.yaml."
        )
    dtype = getattr(torch, options.dtype)
    # the text transformer of the towers is that of the diffusion model
    kept = TOWERS if any(key.startswith(TOWERS) for key in saved) else (*PARTS, *CLASSIFIER)
    state = {key: value.to(dtype) for key, value in saved.items() if key.startswith(kept)}
    save_state_dict(state, options.out, {"format": "pt", "step": str(checkpoint["global_step"])})
    size = options.out.stat().st_size / 1e6
    return [f"{options.out}: {len(state)} tensors, {size:.1f} MB, step {checkpoint['global_step']}"]


if __name__ == "__main__":
    main()
