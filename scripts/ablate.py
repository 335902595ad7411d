"""Learn concepts with several training variants, on images whose attributes are known, and count what they transfer.

    python scripts/ablate.py configs/evidence/ablation.yaml --outdir outputs/ablation
    python scripts/ablate.py configs/evidence/ablation.yaml --only prospect textual-inversion --limit 4

Every learned concept and every count stays in --outdir, where an interrupted run resumes (with other code, use another
folder). `--limit` and `--only` take part of the YAML; run again without them for the rest. The tables go to
--outdir/ablation.{md,json}.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `evaluation` is not installed

from evaluation.command_line import add_job_flags
from ldm.cli.flags import path, positive, say, script_parser


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("yaml", type=path, help="the variants")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="these variants only")
    parser.add_argument("--limit", type=positive, metavar="N", help="at most so many concepts of each variant")
    parser.add_argument("--presets", type=path, help="YAML of windows (presets.yaml beside the checkpoint)")
    add_job_flags(parser, "outputs/ablation")
    args = parser.parse_strictly()
    with parser.sentences():
        from evaluation.ablation import Ablation
        from evaluation.judges import load_judge
        from ldm.conditioning.presets import load_presets, presets_beside

        ablation = Ablation.read(args.yaml, args.only, args.limit)
        windows = load_presets(args.presets) if args.presets else presets_beside(ablation.ckpt)
        ablation.check()
        load_judge(ablation.classifier)
        learned = ablation.learn(args.outdir, args.workers)
        measured = ablation.measure(args.outdir, learned, windows, args.workers)
        say(ablation.compare(measured, learned, windows, args.outdir))
        say(f"{args.outdir}: ablation.md, ablation.json, transfer.png, variants.png")


if __name__ == "__main__":
    main()
