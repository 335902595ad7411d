"""Compare quality and time of samplers, numbers of steps and guidance by stage, counted on known attributes.

    python scripts/steps.py configs/evidence/steps.yaml --outdir outputs/steps

Every image set stays in --outdir, where an interrupted run resumes (with other code, use another folder). The table and
the figure go to --outdir/steps.{md,json,png}.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `evaluation` is not installed

from evaluation.command_line import add_job_flags
from ldm.cli.flags import path, say, script_parser


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("yaml", type=path, help="the samplers")
    add_job_flags(parser, "outputs/steps")
    args = parser.parse_strictly()
    with parser.sentences():
        from evaluation.steps import Steps
        from ldm.files.writing import check_writable

        steps = Steps.read(args.yaml)
        check_writable(args.outdir, "--outdir")
        say(steps.compare(*steps.measure(args.outdir, args.workers), args.outdir))
        say(f"{args.outdir}: steps.md, steps.json, steps.png")


if __name__ == "__main__":
    main()
