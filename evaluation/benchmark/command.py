"""The command line of `scripts/benchmark.py`: flags to contenders, their comparison, and the report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from evaluation.benchmark.switches import DEFAULTS, PEERS, REFERENCE, SWITCHES, WHATS, describe, dtype_name
from ldm.cli.flags import Parser, add_flag

if TYPE_CHECKING:
    from evaluation.benchmark.measure import Contender
    from evaluation.benchmark.report import Row

# Relative distance (of norms) up to which two results count as the same, by the coarser precision of the two.
TOLERANCES = {"float32": 1e-3, "float16": 5e-2, "bfloat16": 2e-1}
RESOLUTIONS = {"demo": 128, "sd-v1": 512}
PRECISIONS = frozenset({"float16", "bfloat16"})


def build_parser(description: str) -> Parser:
    parser = Parser(
        description=description,
        epilog=describe(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_flag(parser, "--what", choices=WHATS, default="train", help="the work that is measured (train)")
    add_flag(parser, "--size", choices=tuple(RESOLUTIONS), default="demo", help="sd-v1: random weights (demo)")
    add_flag(parser, "--device", metavar="NAME", help="cpu, cuda or mps (the fastest there is)")
    add_flag(parser, "--mode", choices=("ours", "reference"), default="ours", help="reference: beside what it does")
    add_flag(parser, "--peer", choices=PEERS, nargs="+", default=[], metavar="NAME", help=" or ".join(PEERS))
    names = {"nargs": "+", "choices": tuple(SWITCHES), "default": [], "metavar": "NAME"}
    add_flag(parser, "--on", help="switches to turn on everywhere but in the reference", **names)
    add_flag(parser, "--off", help="a row without this switch, for each of these", **names)
    add_flag(parser, "--stages", type=int, nargs="+", metavar="S", help="train: a row for each number of stages")
    add_flag(parser, "--batch", type=int, default=1, metavar="N", help="pictures, or samples of a step (1)")
    add_flag(parser, "--steps", type=int, default=10, metavar="N", help="sampling steps (10)")
    add_flag(parser, "--resolution", type=int, metavar="PIXELS", help="(128 for demo, 512 for sd-v1)")
    add_flag(parser, "--repeats", type=int, default=10, metavar="N", help="timed runs of each row (10)")
    add_flag(parser, "--clock", choices=("wall", "cpu"), default="wall", help="cpu: processor time, where others work")
    add_flag(parser, "--ckpt", type=Path, metavar="FILE", help="load: the file to open")
    add_flag(parser, "--json", type=Path, metavar="FILE", help="write the numbers there")
    return parser


def main(description: str, argv: Sequence[str] | None = None) -> tuple[str, bool]:
    """Returns the table, and whether all results agree. Ends with code 2 and one sentence on bad input."""
    parser = build_parser(description)
    options, rest = parser.parse_known_args(argv)
    for text in rest:
        if text.startswith("-") or "=" not in text:
            parser.refuse(text)
    for name in ("batch", "steps", "repeats"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(options, name)}")
    for name in dict.fromkeys([*options.on, *options.off]):
        whats = SWITCHES[name][1] + (("load",) if name in PRECISIONS else ())
        if options.what not in whats:
            parser.error(f"'{name}' makes no difference to --what {options.what}, only to {', '.join(whats)}")
    if set(options.on) >= PRECISIONS:
        parser.error(f"--on takes one precision, not {' and '.join(sorted(PRECISIONS))}")
    options.overrides = rest
    options.argv = list(sys.argv[1:] if argv is None else argv)
    with parser.sentences():
        return _measure(options)


def _measure(options: argparse.Namespace) -> tuple[str, bool]:
    import torch

    from evaluation.benchmark import report
    from evaluation.benchmark.measure import device_name, matmul_ceiling
    from ldm.util import pick_device

    device = pick_device(options.device)
    if "cuda_graph" in options.on and device.type != "cuda":
        raise ValueError(f"cuda_graph needs a CUDA device, and this is {device}.")
    about = {
        "device": device_name(device),
        "torch": torch.__version__,
        "command": " ".join(["scripts/benchmark.py", *options.argv]),
        "clock": options.clock if device.type != "cuda" else "device events",
    }
    if device.type == "cuda":
        options.clock = "wall"
    if options.what == "load":
        rows, agree = _loads(options, device), True
    else:
        contenders, oracle = _contenders(options, device)
        dtypes = {contender.dtype for contender in contenders}
        ceilings = {dtype: matmul_ceiling(device, dtype) for dtype in dtypes}
        about["ceiling_gflop_per_s"] = {str(dtype).removeprefix("torch."): c / 1e6 for dtype, c in ceilings.items()}
        rows, agree = _rows(options, contenders, oracle, ceilings, device)
    if options.json is not None:
        report.write_json(options.json, rows, about)
    head = "\n".join(f"{key}: {value}" for key, value in about.items())
    return f"{head}\n\n{report.table(rows)}", agree


def _contenders(options: argparse.Namespace, device: object) -> tuple[list[Contender], str]:
    """The ways to do the work, the first of which the others are held against, and the oracle's name."""
    from evaluation.benchmark import models, peer, sample, train

    resolution = options.resolution or RESOLUTIONS[options.size]
    ours = DEFAULTS | frozenset(options.on)
    plain = {"reference": REFERENCE} if options.mode == "reference" else {}
    ways = {**plain, "ours": ours, **{f"ours without {name}": ours - {name} for name in options.off}}
    make = {
        "train": lambda base, name, on: train.contender(base, name, on, options.batch, resolution),
        "sample": lambda *way: sample.sampling_contender(*way, options.batch, resolution, options.steps),
        "text": lambda *way: sample.text_contender(*way, options.batch, resolution, options.steps),
        "vae": lambda *way: sample.vae_contender(*way, options.batch, resolution, options.steps),
    }[options.what]
    if options.stages:
        bases = {s: models.build_model(options.size, device, options.overrides, s) for s in options.stages}
        contenders = [make(base, f"ours, S = {s}", ours) for s, base in bases.items()]
        return contenders, contenders[0].name
    base = models.build_model(options.size, device, options.overrides)
    if resolution % base.size_unit:
        raise ValueError(f"--resolution must be a multiple of {base.size_unit} for this model, not {resolution}.")
    contenders = [make(base, name, switches) for name, switches in ways.items()]
    for name in options.peer:
        contenders.append(peer.peer_contender(base, name, options.what, ours, options.batch, resolution, options.steps))
    return contenders, contenders[0].name


def _rows(
    options: argparse.Namespace, contenders: list[Contender], oracle: str, ceilings: dict, device: object
) -> tuple[list[Row], bool]:
    """Compare, then time."""
    from evaluation.benchmark.measure import alternate, deviations
    from evaluation.benchmark.report import make_row

    # with other numbers of stages other things are learned: nothing to compare
    distances = {} if options.stages else deviations({c.name: c.result() for c in contenders}, oracle)
    tolerances = {c.name: TOLERANCES[str(c.dtype).removeprefix("torch.")] for c in contenders}
    agree = all(distance <= max(tolerances[name], tolerances[oracle]) for name, distance in distances.items())
    found = alternate(contenders, device, options.repeats)
    first = found[oracle]
    rows = [
        make_row(
            c.name,
            found[c.name],
            first,
            options.clock,
            c.samples,
            ceilings[c.dtype],
            distances.get(c.name),
            c.details,
        )
        for c in contenders
    ]
    return rows, agree


def _loads(options: argparse.Namespace, device: object) -> list[Row]:
    from evaluation.benchmark.load import alternate_loads
    from evaluation.benchmark.report import make_row

    if options.ckpt is None or not options.ckpt.is_file():
        raise ValueError("--what load needs --ckpt FILE; scripts/make_random_sd_v1.py writes one of the public shape.")
    names = ["reference", "ours"] if options.mode == "reference" else ["ours"]
    dtype = dtype_name(frozenset(options.on))
    checkpoint = options.ckpt.resolve()
    found = alternate_loads(names, options.size, checkpoint, dtype, options.repeats, str(device))
    size = checkpoint.stat().st_size
    rows = []
    for name, measurement in found.items():
        share = (measurement.peak_bytes or 0) / size
        rows.append(make_row(name, measurement, found[names[0]], options.clock, details={"peak / file": share}))
    return rows
