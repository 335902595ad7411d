"""Edit rendered images by every method, and count what arrives and what stays.

    python scripts/compare_edits.py --outdir outputs/edits
    python scripts/compare_edits.py --count 4 --seed 5 --steps 10

Finished images stay in --outdir, where an interrupted run resumes (with other code, use another folder). The tables go
to --outdir/edits.md, some images to --outdir/editing.png.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `evaluation` is not installed

from evaluation.command_line import add_job_flags, add_model_flags
from ldm.cli.flags import natural, positive, say, script_parser


def main() -> None:
    parser = script_parser(__doc__)
    add_model_flags(parser, steps=20)
    parser.add_argument("--count", type=positive, default=24, metavar="N", help="images (24)")
    parser.add_argument("--seed", type=natural, default=1717, metavar="N", help="of the images (1717)")
    add_job_flags(parser, "outputs/edits")
    args = parser.parse_strictly()
    with parser.sentences():
        from evaluation.editing import EditStudy, plot_sheet, summary
        from ldm.files.writing import replace_text

        fields = ("config", "ckpt", "classifier", "count", "seed", "steps", "scale")
        results = EditStudy(**{name: getattr(args, name) for name in fields}).measure(args.outdir, args.workers)
        replace_text(args.outdir / "edits.md", summary(results))
        plot_sheet(results, args.outdir / "editing.png")
        say(summary(results))
        say(f"{args.outdir}: edits.md, editing.png")


if __name__ == "__main__":
    main()
