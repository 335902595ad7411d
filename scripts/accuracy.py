"""How often the small model draws what its captions say, on combinations that training never showed.

    python scripts/accuracy.py                                 # the model that ships
    python scripts/accuracy.py --ckpt logs/model.safetensors --count 100

Pictures and counts stay in --outdir, where an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `evaluation` is not installed

from ldm.cli.flags import Parser, positive


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/demo/finetune.yaml")
    parser.add_argument("--ckpt", default="models/demo/model.safetensors")
    parser.add_argument("--classifier", default="models/demo/classifier.safetensors")
    parser.add_argument("--count", type=positive, default=500, help="captions (500)")
    parser.add_argument("--steps", type=positive, default=50, help="DDIM steps (50)")
    parser.add_argument("--scale", type=float, default=2.5, help="guidance scale (2.5)")
    parser.add_argument("--seen", action="store_true", help="combinations that training showed, instead")
    parser.add_argument("--workers", type=positive, metavar="N", help="processes (one for each core)")
    parser.add_argument("--outdir", type=Path, default=Path("outputs/accuracy"))
    args = parser.parse_strictly()
    with parser.sentences():
        count(args)


def count(args: argparse.Namespace) -> None:
    """Draw, count, print and write."""
    from evaluation.captions import follow_captions, judge_itself, load_judge
    from evaluation.jobs import run_jobs
    from evaluation.pictures import check
    from evaluation.statistics import wilson
    from evaluation.world.rendered import FACTORS
    from ldm.files.images import make_grid
    from ldm.files.writing import check_writable, replace_text

    check(args.config, args.ckpt, args.steps, args.scale)
    check_writable(args.outdir, "--outdir")
    load_judge(args.classifier)
    shared = {"config": args.config, "ckpt": args.ckpt, "classifier": args.classifier, "held_out": not args.seen}
    settings = shared | {"steps": args.steps, "scale": args.scale}
    chunks = {
        f"captions-{start:04d}": settings | {"seed": 1000 + start, "count": min(50, args.count - start)}
        for start in range(0, args.count, 50)
    }
    results = run_jobs(follow_captions, chunks, args.outdir / "jobs", args.workers, "drawing captions")
    itself = run_jobs(judge_itself, {"judge": shared | {"seed": 999, "count": 500}}, args.outdir / "jobs", 1)["judge"]

    correct = np.concatenate([result["correct"] for result in results.values()])
    table = {"captions": len(correct), "steps": args.steps, "scale": args.scale, "held_out": not args.seen}
    print(f"{'':12} {'follows its caption':>24}   classifier on rendered / reconstructed pictures")
    for column, name in enumerate(FACTORS):
        low, high = wilson(correct[:, column].sum(), len(correct))
        share = correct[:, column].mean()
        own = [float(itself[kind][:, column].mean()) for kind in ("rendered", "reconstructed")]
        table[name] = {"share": float(share), "low": low, "high": high, "rendered": own[0], "reconstructed": own[1]}
        print(f"{name:12} {share:8.3f} ({low:.3f} to {high:.3f})   {own[0]:.3f} / {own[1]:.3f}")
    replace_text(args.outdir / "accuracy.json", json.dumps(table, indent=2) + "\n")

    from PIL import Image

    pictures = np.concatenate([result["pictures"] for result in results.values()])[:64]
    make_grid([Image.fromarray(picture) for picture in pictures], 8).save(args.outdir / "pictures.png")
    print(f"{args.outdir}: accuracy.json, pictures.png (the first {len(pictures)})")


if __name__ == "__main__":
    main()
