"""Learn concepts in several ways, on pictures whose attributes are known, and count what they bring.

    python scripts/ablate.py configs/evidence/ablation.yaml --outdir outputs/ablation
    python scripts/ablate.py configs/evidence/ablation.yaml --only prospect textual-inversion --limit 4

Every learned concept and every count stays in --outdir, where an interrupted run goes on (with other code, take
another folder). `--limit` and `--only` take part of the YAML; run again without them for the rest. The tables go to
--outdir/ablation.{md,json}.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `evaluation` is not installed

from ldm.cli.flags import Parser, positive


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("yaml", type=Path, help="the variants")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="these variants only")
    parser.add_argument("--limit", type=positive, metavar="N", help="at most so many concepts of each variant")
    parser.add_argument("--workers", type=positive, metavar="N", help="processes (one for each core)")
    parser.add_argument(
        "--presets", type=Path, help="YAML of windows (presets.yaml beside the checkpoint, or the paper's)"
    )
    parser.add_argument("--outdir", type=Path, default=Path("outputs/ablation"))
    args = parser.parse_strictly()
    with parser.sentences():
        compare(args)


def compare(args: argparse.Namespace) -> None:
    """Learn, count, print and write."""
    from evaluation.ablation import Ablation
    from evaluation.captions import load, load_judge
    from evaluation.comparison import tables
    from ldm.conditioning.presets import load_presets, presets_beside

    ablation = Ablation.read(args.yaml, args.only, args.limit)
    windows = load_presets(args.presets) if args.presets else presets_beside(ablation.ckpt)
    ablation.check()
    load(ablation.config, ablation.ckpt)  # what is missing or does not fit is found before hours of learning
    load_judge(ablation.classifier)
    learned = ablation.learn(args.outdir, args.workers)
    measured = ablation.measure(args.outdir, learned, windows, args.workers)
    text = tables(ablation, measured, learned, windows, args.outdir)
    print(text)
    print(f"{args.outdir}: ablation.md, ablation.json, transfer.png, variants.png")


if __name__ == "__main__":
    main()
