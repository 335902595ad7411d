"""Measure training steps, sampling, text passes, the first stage, or loading, in several ways side by side.

  python scripts/benchmark.py --what train --mode reference
  python scripts/benchmark.py --what sample --off kv text_batch --peer diffusers
  python scripts/benchmark.py --size sd-v1 --device cuda --on float16 channels_last cuda_graph --peer diffusers-compiled

All rows work on the same weights and inputs. Their results are compared first (deviation: relative distance to the
first row's), then they are timed in turns, A B A B. Exit code 1 says that results differ by more than their
precision explains.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `evaluation` is not installed

from evaluation.benchmark.switches import (
    DEFAULTS,
    NETI_REFERENCE,
    PEERS,
    REFERENCE,
    SWITCHES,
    WHATS,
    Work,
    describe,
    dtype_name,
    with_stages,
)
from ldm.cli.flags import Parser, path, positive, say
from ldm.files.writing import check_new_file, check_writable

if TYPE_CHECKING:
    import torch

    from evaluation.benchmark.measure import Contender

# Relative distance (of norms) up to which two results count as the same, by the coarser precision of the two.
TOLERANCES = {"float32": 1e-3, "float16": 5e-2, "bfloat16": 2e-1}
RESOLUTIONS = {"demo": 128, "sd-v1": 512}
PRECISIONS = frozenset({"float16", "bfloat16"})


def build_parser() -> Parser:
    parser = Parser(
        description=__doc__,
        epilog=describe(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--what", choices=WHATS, default="train", help="the work that is measured (train)")
    parser.add_argument("--size", choices=tuple(RESOLUTIONS), default="demo", help="sd-v1: random weights (demo)")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda or mps (the fastest there is)")
    parser.add_argument("--mode", choices=("ours", "reference"), default="ours", help="reference: beside what it does")
    parser.add_argument("--peer", choices=PEERS, nargs="+", default=[], metavar="NAME", help=" or ".join(PEERS))
    names: dict[str, Any] = {"nargs": "+", "choices": tuple(SWITCHES), "default": [], "metavar": "NAME"}
    parser.add_argument("--on", help="switches to turn on everywhere but in the reference", **names)
    parser.add_argument("--off", help="a row without this switch, for each of these", **names)
    parser.add_argument("--also", help="a row with this switch and those named before it, for each of these", **names)
    parser.add_argument(
        "--stages", type=positive, nargs="+", metavar="S", help="train: a row for each number of stages"
    )
    parser.add_argument("--batch", type=positive, default=1, metavar="N", help="images, or samples of a step (1)")
    parser.add_argument("--steps", type=positive, default=10, metavar="N", help="sampling steps (10)")
    parser.add_argument("--resolution", type=positive, metavar="PIXELS", help="(128 for demo, 512 for sd-v1)")
    parser.add_argument("--repeats", type=positive, default=10, metavar="N", help="timed runs of each row (10)")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: processor time, where others work"
    )
    parser.add_argument("--ckpt", type=path, metavar="FILE", help="load: the file to open")
    parser.add_argument("--figure", type=path, metavar="PNG", help="scaling: draw it there")
    parser.add_argument("--json", type=path, metavar="FILE", help="write the numbers there")
    parser.add_argument("--force", action="store_true", help="overwrite the files of --json and --figure")
    return parser


def main(argv: Sequence[str] | None = None) -> bool:
    """Print the table; return whether all results agree. Ends with code 2 and one sentence on bad input."""
    parser = build_parser()
    options, rest = parser.parse_known_args(argv)
    for text in rest:
        if text.startswith("-") or "=" not in text:
            parser.refuse(text)
    for name in dict.fromkeys([*options.on, *options.off, *options.also]):
        whats = SWITCHES[name][1] + (("load",) if name in PRECISIONS else ())
        if options.what not in (*whats, "scaling"):
            parser.error(f"'{name}' makes no difference to --what {options.what}, only to {', '.join(whats)}")
    if set(options.on) >= PRECISIONS:
        parser.error(f"--on takes one precision, not {' and '.join(sorted(PRECISIONS))}")
    options.overrides = rest
    with parser.sentences():
        for flag, file, suffix in (("--json", options.json, ".json"), ("--figure", options.figure, ".png")):
            if file is not None:
                check_writable(file.parent, flag)
                check_new_file(file, options.force, [options.ckpt] if options.ckpt else [], suffix)
        return run(options, list(sys.argv[1:] if argv is None else argv))


def run(options: argparse.Namespace, argv: Sequence[str]) -> bool:
    """Compare, time, print and write."""
    import json

    import torch

    from evaluation.benchmark import load, measure, scaling
    from ldm.files.writing import replace_text
    from ldm.util import pick_device

    device = pick_device(options.device)
    if "cuda_graph" in options.on and device.type != "cuda":
        raise ValueError(f"cuda_graph needs a CUDA device, and this is {device}.")
    timing = (device, options.repeats, options.clock if device.type == "cpu" else "wall")
    about: dict[str, object] = {
        "device": measure.device_name(device),
        "torch": torch.__version__,
        "command": " ".join(["scripts/benchmark.py", *argv]),
        "clock": timing[-1],
    }
    agree, resolution = True, options.resolution or RESOLUTIONS[options.size]
    if options.what == "load":
        if options.ckpt is None or not options.ckpt.is_file():
            remedy = "scripts/make_random_sd_v1.py writes one of the public shape"
            raise ValueError(f"--what load needs --ckpt FILE; {remedy}.")
        names = ["reference", "ours"] if options.mode == "reference" else ["ours"]
        rows = load.measure_loads(
            names, options.size, options.ckpt.resolve(), dtype_name(frozenset(options.on)), *timing
        )
    elif options.what == "scaling":
        switches = DEFAULTS | frozenset(options.on)
        axes = scaling.axes(options.size, device, switches, resolution, options.overrides)
        rows = [row for axis in axes for row in measure.measure(axis, *timing)]
        if options.figure is not None:
            scaling.plot(rows, options.figure)
    else:
        contenders = contenders_of(options, device, resolution)
        ceilings = {dtype: measure.matmul_ceiling(device, dtype) for dtype in {c.dtype for c in contenders}}
        rows = measure.measure(contenders, *timing, ceilings)
        bounds = [TOLERANCES[dtype_text(c.dtype)] for c in contenders]
        agree = all((row["deviation"] or 0) <= max(x, bounds[0]) for row, x in zip(rows, bounds, strict=True))
        about["ceiling_gflop_per_s"] = {dtype_text(dtype): ceiling / 1e6 for dtype, ceiling in ceilings.items()}
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        replace_text(options.json, json.dumps({**about, "rows": rows}, indent=1) + "\n")
    say("\n".join(f"{key}: {value}" for key, value in about.items()) + f"\n\n{measure.table(rows)}")
    return agree


def dtype_text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def contenders_of(options: argparse.Namespace, device: torch.device, resolution: int) -> list[Contender]:
    """Return the ways to do the work; the others are compared with the first."""
    from evaluation.benchmark import ours, peer
    from evaluation.benchmark.models import build_model

    work = Work(options.what, options.batch, resolution, options.steps)
    chosen = DEFAULTS | frozenset(options.on)
    if options.stages:  # with other numbers of stages other things are learned: nothing to compare
        bases = {s: build_model(options.size, device, with_stages(options.overrides, s)) for s in options.stages}
        return [replace(ours.contender(x, work, chosen, f"ours, S = {s}"), result=None) for s, x in bases.items()]
    neti = any(text.endswith(".method=neti") for text in options.overrides)
    ways = {"reference": NETI_REFERENCE if neti else REFERENCE} if options.mode == "reference" else {}
    ways |= {"ours": chosen, **{f"ours without {name}": chosen - {name} for name in options.off}}
    for i in range(len(options.also)):
        added = options.also[: i + 1]
        ways[f"ours with {', '.join(added)}"] = chosen | frozenset(added)
    base = build_model(options.size, device, options.overrides)
    if resolution % base.size_unit:
        raise ValueError(f"--resolution must be a multiple of {base.size_unit} for this model, not {resolution}.")
    contenders = [ours.contender(base, work, switches, name) for name, switches in ways.items()]
    return contenders + [peer.contender(base, work, chosen, name) for name in options.peer]


if __name__ == "__main__":
    if not main():
        sys.exit("The results differ by more than their precision explains: these times mean nothing.")
