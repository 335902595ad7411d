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
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `evaluation` is not installed

from ldm.cli.flags import Parser, path, positive, say
from ldm.files.texts import read_text

SECTIONS = ("parity", "learn", "train", "methods", "sample", "profile", "tests")
MARKS = "<!-- gpu report -->", "<!-- end of gpu report -->"


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--device", metavar="NAME", help="cuda, cuda:1 or cpu (the fastest there is)")
    parser.add_argument("--size", choices=("demo", "sd-v1"), help="(sd-v1 on CUDA, demo elsewhere)")
    only: dict[str, Any] = {"nargs": "+", "choices": SECTIONS, "default": list(SECTIONS), "metavar": "SECTION"}
    parser.add_argument("--only", help=f"some of {', '.join(SECTIONS)}", **only)
    parser.add_argument("--no_compile", action="store_true", help="leave out the rows that compile for minutes")
    parser.add_argument("--repeats", type=positive, default=10, metavar="N", help="timed runs of each row (10)")
    default = Path("outputs/gpu_report")
    parser.add_argument("--out", type=path, default=default, metavar="DIR", help="(outputs/gpu_report)")
    parser.add_argument("--into", type=path, metavar="FILE", help="Markdown file whose marked block the tables replace")
    options = parser.parse_strictly(argv)
    with parser.sentences():
        from evaluation.benchmark.gpu_report import GpuReport
        from ldm.files.writing import check_writable, replace_text
        from ldm.util import pick_device

        if options.into is not None:
            around_tables(options.into)
        check_writable(options.out, "--out")
        device = pick_device(options.device)
        size = options.size or ("sd-v1" if device.type == "cuda" else "demo")
        report = GpuReport(options.out, device, size, not options.no_compile, options.repeats, say)
        options.out.mkdir(parents=True, exist_ok=True)
        report.run(options.only)
        say(report.markdown())
        if options.into is not None:
            before, after = around_tables(options.into)
            replace_text(options.into, f"{before}{MARKS[0]}\n{report.markdown()}{MARKS[1]}{after}")


def around_tables(file: Path) -> tuple[str, str]:
    """Return what stands before and behind the marked block of a Markdown file."""
    before, _, rest = read_text(file, "--into").partition(MARKS[0])
    _, found, after = rest.partition(MARKS[1])
    if not found:
        raise ValueError(f"'{file}' has no block from '{MARKS[0]}' to '{MARKS[1]}'; add these two lines.")
    return before, after


if __name__ == "__main__":
    main()
