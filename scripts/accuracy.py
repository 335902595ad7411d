"""Count how often the small model draws what its captions say, on combinations that training never showed.

    python scripts/accuracy.py                                 # the model that ships
    python scripts/accuracy.py --ckpt logs/model.safetensors --count 100

Images and counts stay in --outdir, where an interrupted run resumes.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `evaluation` is not installed

from evaluation.command_line import add_job_flags, add_model_flags
from ldm.cli.flags import positive, say, script_parser


def main() -> None:
    parser = script_parser(__doc__)
    add_model_flags(parser, steps=50)
    parser.add_argument("--count", type=positive, default=500, help="captions (500)")
    parser.add_argument("--seen", action="store_true", help="combinations that training showed, instead")
    add_job_flags(parser, "outputs/accuracy")
    args = parser.parse_strictly()
    with parser.sentences():
        count(args)


def count(args: argparse.Namespace) -> None:
    """Draw, count, print and write."""
    import numpy as np
    from PIL import Image

    from evaluation.captions import follow_captions, judge_itself
    from evaluation.images import Sampling, check
    from evaluation.jobs import run_jobs
    from evaluation.judges import load_judge
    from evaluation.statistics import wilson
    from evaluation.world.attributes import FACTORS
    from ldm.files.images import make_grid
    from ldm.files.writing import check_writable, replace_text

    sampling = Sampling(args.steps, args.scale)
    check(args.config, args.ckpt, sampling)
    check_writable(args.outdir, "--outdir")
    load_judge(args.classifier)
    shared = {"config": args.config, "ckpt": args.ckpt, "classifier": args.classifier, "held_out": not args.seen}
    chunks = {
        start: shared | {"sampling": sampling, "seed": 1000 + start, "count": min(50, args.count - start)}
        for start in range(0, args.count, 50)
    }
    results = run_jobs(follow_captions, chunks, args.outdir / "jobs", args.workers, "drawing captions").values()
    itself = run_jobs(judge_itself, {"judge": shared | {"seed": 999, "count": 500}}, args.outdir / "jobs", 1)["judge"]

    correct = np.concatenate([result["correct"] for result in results])
    table = {"captions": len(correct), "steps": args.steps, "scale": args.scale, "held_out": not args.seen}
    say(f"{'':12} {'follows its caption':>24}   classifier on rendered / reconstructed images")
    for column, name in enumerate(FACTORS):
        low, high = wilson(correct[:, column].sum(), len(correct))
        share = float(correct[:, column].mean())
        own = [float(itself[kind][:, column].mean()) for kind in ("rendered", "reconstructed")]
        table[name] = {"share": share, "low": low, "high": high, "rendered": own[0], "reconstructed": own[1]}
        say(f"{name:12} {share:8.3f} ({low:.3f} to {high:.3f})   {own[0]:.3f} / {own[1]:.3f}")
    replace_text(args.outdir / "accuracy.json", json.dumps(table, indent=2) + "\n")
    images = np.concatenate([result["images"] for result in results])[:64]
    make_grid([Image.fromarray(image) for image in images], 8).save(args.outdir / "images.png")
    say(f"{args.outdir}: accuracy.json, images.png (the first {len(images)})")


if __name__ == "__main__":
    main()
