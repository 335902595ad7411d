"""Write random weights in the layout of the public Stable Diffusion v1.4 file, for tests and timings.

python scripts/make_random_sd_v1.py --out random-sd-v1.ckpt --dtype float16
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from torch import Tensor

from ldm.checkpoint import save_state_dict
from ldm.cli.flags import one_line, path, script_parser
from ldm.files.texts import read_text
from ldm.files.writing import check_new_file, replacing
from ldm.models.diffusion.schedule import make_betas, schedule_buffers
from ldm.request import shown

LAYOUT = Path(__file__).resolve().parents[1] / "tests" / "golden" / "sd_v1_state_dict.json"


def random_weights(layout: dict[str, dict], dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """Return a tensor for each key of `layout` ({key: {"shape", "kind"}}): weights in `dtype`, buffers as they are.

    Biases are 0 and norm gains 1; the others are normal with deviation min(0.02, 1/sqrt(fan-in)), so that no
    layer amplifies and activations stay finite in half precision.
    """
    generator = torch.Generator().manual_seed(seed)
    state = schedule_buffers(make_betas(0.00085, 0.0120))
    for key, entry in layout.items():
        shape = entry["shape"]
        if key.endswith("position_ids"):
            state[key] = torch.arange(shape[-1]).expand(shape).clone()
        elif key.endswith(".bias"):
            state[key] = torch.zeros(shape, dtype=dtype)
        elif len(shape) == 1 and entry["kind"] == "param":
            state[key] = torch.ones(shape, dtype=dtype)
        elif entry["kind"] == "param":
            deviation = min(0.02, 1 / math.sqrt(math.prod(shape[1:])))
            state[key] = torch.empty(shape).normal_(0.0, deviation, generator=generator).to(dtype)
    return {key: state[key] for key in layout}


def main(argv: list[str] | None = None) -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--out", type=path, help="(random-sd-v1.ckpt, or .safetensors)")
    parser.add_argument("--force", action="store_true", help="overwrite the file if it is there")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    parser.add_argument("--format", choices=("ckpt", "safetensors"), default="ckpt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layout", type=path, default=LAYOUT, help="JSON with the keys, shapes and kinds")
    parser.run(write, argv)


def write(options: argparse.Namespace) -> list[str]:
    """Draw the weights, and save them as a flag says."""
    out = options.out or Path(f"random-sd-v1.{options.format}")
    check_new_file(out, options.force, [options.layout], f".{options.format}")
    if not 0 <= options.seed < 2**32:
        raise ValueError(f"--seed must be in 0..2^32 - 1, not {shown(options.seed)}.")
    try:
        layout = json.loads(read_text(options.layout, "--layout"))["state_dict"]
        state = random_weights(layout, getattr(torch, options.dtype), options.seed)
    except (json.JSONDecodeError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"'{options.layout}' is no layout such as '{LAYOUT}' ({one_line(error):.80}).") from error
    if options.format == "safetensors":
        save_state_dict(state, out)
    else:  # pickled as the public file is, with a class of Lightning's beside the weights
        from pytorch_lightning.callbacks.model_checkpoint import ModelCheckpoint

        callback = {"monitor": "val/loss_simple_ema", "best_model_score": torch.tensor(0.0)}
        content = {"epoch": 0, "global_step": 470000, "pytorch-lightning_version": "1.4.2"}
        with replacing(out) as temporary:
            torch.save({**content, "callbacks": {ModelCheckpoint: callback}, "state_dict": state}, temporary)
    return [f"{out}: {len(state)} tensors, {out.stat().st_size / 1e9:.3f} GB"]


if __name__ == "__main__":
    main()
