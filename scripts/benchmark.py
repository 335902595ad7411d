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
    describe,
    dtype_name,
)
from ldm.cli.flags import Parser, path, positive, say
from ldm.files.writing import check_new_file, check_writable

if TYPE_CHECKING:
    import torch

    from evaluation.benchmark.measure import Contender
    from evaluation.benchmark.report import Row
    from ldm.models.diffusion.ddpm import LatentDiffusion

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
    if options.json is not None and options.json.suffix != ".json":
        parser.error(f"--json takes a file that ends in .json, not '{options.json}'")
    options.overrides = rest
    with parser.sentences():
        for file, suffix in ((options.json, ".json"), (options.figure, ".png")):
            if file is not None:
                check_writable(file.parent, f"--{'json' if suffix == '.json' else 'figure'}")
                check_new_file(file, options.force, [options.ckpt] if options.ckpt else [], suffix)
        return measure(options, list(sys.argv[1:] if argv is None else argv))


def measure(options: argparse.Namespace, argv: Sequence[str]) -> bool:
    """Compare, time, print and write."""
    import torch

    from evaluation.benchmark import report
    from evaluation.benchmark.measure import device_name
    from ldm.util import pick_device

    device = pick_device(options.device)
    if "cuda_graph" in options.on and device.type != "cuda":
        raise ValueError(f"cuda_graph needs a CUDA device, and this is {device}.")
    if device.type != "cpu":
        options.clock = "wall"
    about: dict[str, object] = {
        "device": device_name(device),
        "torch": torch.__version__,
        "command": " ".join(["scripts/benchmark.py", *argv]),
        "clock": options.clock,
    }
    if options.what == "load":
        rows, agree = loads(options, device), True
    elif options.what == "scaling":
        rows, agree = scalings(options, device), True
    else:
        rows, agree, ceilings = timed(options, contenders_of(options, device), device)
        about["ceiling_gflop_per_s"] = {name: ceiling / 1e6 for name, ceiling in ceilings.items()}
    if options.json is not None:
        report.write_json(options.json, rows, about)
    say("\n".join(f"{key}: {value}" for key, value in about.items()) + f"\n\n{report.table(rows)}")
    return agree


def scalings(options: argparse.Namespace, device: torch.device) -> list[Row]:
    """Measure how cost grows, and draw it."""
    from evaluation.benchmark import scaling

    resolution, switches = options.resolution or RESOLUTIONS[options.size], DEFAULTS | frozenset(options.on)
    found = scaling.axes(options.size, device, switches, resolution, options.overrides)
    rows = scaling.measure(found, device, options.repeats, options.clock)
    if options.figure is not None:
        scaling.plot(rows, options.figure)
    return rows


def contenders_of(options: argparse.Namespace, device: torch.device) -> list[Contender]:
    """Return the ways to do the work; the others are compared with the first."""
    from evaluation.benchmark import models, peer, sample, train

    resolution = options.resolution or RESOLUTIONS[options.size]
    ours = DEFAULTS | frozenset(options.on)
    neti = any(text.endswith(".method=neti") for text in options.overrides)
    ways = {"reference": NETI_REFERENCE if neti else REFERENCE} if options.mode == "reference" else {}
    ways |= {"ours": ours, **{f"ours without {name}": ours - {name} for name in options.off}}
    added = [options.also[: i + 1] for i in range(len(options.also))]
    ways |= {f"ours with {', '.join(names)}": ours | frozenset(names) for names in added}
    kinds = {"sample": sample.sampling_contender, "text": sample.text_contender, "vae": sample.vae_contender}

    def make(base: LatentDiffusion, name: str, switches: frozenset[str]) -> Contender:
        if options.what == "train":
            return train.contender(base, name, switches, options.batch, resolution)
        return kinds[options.what](base, name, switches, options.batch, resolution, options.steps)

    if options.stages:
        bases = {s: models.build_model(options.size, device, options.overrides, s) for s in options.stages}
        return [make(base, f"ours, S = {s}", ours) for s, base in bases.items()]
    base = models.build_model(options.size, device, options.overrides)
    if resolution % base.size_unit:
        raise ValueError(f"--resolution must be a multiple of {base.size_unit} for this model, not {resolution}.")
    contenders = [make(base, name, switches) for name, switches in ways.items()]
    for name in options.peer:
        contenders.append(peer.peer_contender(base, name, options.what, ours, options.batch, resolution, options.steps))
    return contenders


def timed(
    options: argparse.Namespace, contenders: list[Contender], device: torch.device
) -> tuple[list[Row], bool, dict[str, float]]:
    """Return the rows, whether results agree, and what the device reaches in each precision, in FLOP per ms."""
    from evaluation.benchmark.measure import alternate, deviations, matmul_ceiling
    from evaluation.benchmark.report import make_row

    oracle = contenders[0].name
    precisions = {c.name: str(c.dtype).removeprefix("torch.") for c in contenders}
    ceilings = {
        str(dtype).removeprefix("torch."): matmul_ceiling(device, dtype) for dtype in {c.dtype for c in contenders}
    }
    # with other numbers of stages other things are learned: nothing to compare
    alike = [c for c in contenders if c.other_images == contenders[0].other_images]
    distances = {} if options.stages else deviations({c.name: c.result() for c in alike}, oracle)
    tolerances = {name: TOLERANCES[precision] for name, precision in precisions.items()}
    agree = all(distance <= max(tolerances[name], tolerances[oracle]) for name, distance in distances.items())
    found = alternate(contenders, device, options.repeats)
    rows = []
    for c in contenders:
        ceiling, distance = ceilings[precisions[c.name]], distances.get(c.name)
        first = found[oracle]
        rows.append(make_row(c.name, found[c.name], first, options.clock, c.samples, ceiling, distance, c.details))
    return rows, agree, ceilings


def loads(options: argparse.Namespace, device: torch.device) -> list[Row]:
    """Measure opening a checkpoint."""
    from evaluation.benchmark.load import alternate_loads
    from evaluation.benchmark.report import make_row

    if options.ckpt is None or not options.ckpt.is_file():
        raise ValueError("--what load needs --ckpt FILE; scripts/make_random_sd_v1.py writes one of the public shape.")
    names = ["reference", "ours"] if options.mode == "reference" else ["ours"]
    dtype = dtype_name(frozenset(options.on))
    found = alternate_loads(names, options.size, options.ckpt.resolve(), dtype, options.repeats, str(device))
    size = options.ckpt.stat().st_size
    rows = []
    for name, measurement in found.items():
        details = {"peak / file": (measurement.peak_bytes or 0) / size}
        rows.append(make_row(name, measurement, found[names[0]], options.clock, details=details))
    return rows


if __name__ == "__main__":
    if not main():
        sys.exit("The results differ by more than their precision explains: these times mean nothing.")
