"""Measure everything that waits for a GPU, in one run that can be interrupted and resumed.

  python scripts/gpu_report.py                                # about 20 minutes on one H100 or RTX 4090
  python scripts/gpu_report.py --only parity learn train      # some sections
  python scripts/gpu_report.py --device cpu                   # the same logic on the small model, two minutes

Results lie in --out: report.json, to which a section is added as soon as it is complete, and report.md with the tables
and the goals. --into docs/benchmarks.md puts the tables between the marks of that file.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `evaluation` is not installed

from ldm.cli.flags import Parser, add_flag

SECTIONS = ("parity", "learn", "train", "methods", "sample", "profile", "tests")
MARKS = "<!-- gpu report -->", "<!-- end of gpu report -->"


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add_flag(parser, "--device", metavar="NAME", help="cuda, cuda:1 or cpu (the fastest there is)")
    add_flag(parser, "--size", choices=("demo", "sd-v1"), help="(sd-v1 on CUDA, demo elsewhere)")
    only = {"nargs": "+", "choices": SECTIONS, "default": list(SECTIONS), "metavar": "SECTION"}
    add_flag(parser, "--only", help=f"some of {', '.join(SECTIONS)}", **only)
    add_flag(parser, "--no_compile", action="store_true", help="leave out the rows that compile for minutes")
    add_flag(parser, "--repeats", type=int, default=10, metavar="N", help="timed runs of each row (10)")
    add_flag(parser, "--out", type=Path, default=Path("outputs/gpu_report"), metavar="DIR", help="(outputs/gpu_report)")
    add_flag(parser, "--into", type=Path, metavar="FILE", help="Markdown file whose marked block the tables replace")
    options = parser.parse_strictly(argv)
    with parser.sentences():
        report(options)


def report(options: argparse.Namespace) -> None:
    from evaluation.benchmark.gpu_report import GpuReport
    from ldm.util import pick_device

    device = pick_device(options.device)
    size = options.size or ("sd-v1" if device.type == "cuda" else "demo")
    options.out.mkdir(parents=True, exist_ok=True)
    run = GpuReport(options.out, device, size, not options.no_compile, options.repeats)
    run.run(options.only, lambda line: print(line, flush=True))
    print(run.markdown())
    if options.into is not None:
        text = options.into.read_text(encoding="utf-8")
        before, _, rest = text.partition(MARKS[0])
        _, found, after = rest.partition(MARKS[1])
        if not found:
            raise ValueError(f"'{options.into}' has no block from '{MARKS[0]}' to '{MARKS[1]}'; add these two lines.")
        options.into.write_text(f"{before}{MARKS[0]}\n{run.markdown()}{MARKS[1]}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
