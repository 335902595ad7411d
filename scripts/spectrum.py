"""Measure what a model decides in which stage, and which stages a learned concept should stand in.

    python scripts/spectrum.py                                   # the small model, with known attributes
    python scripts/spectrum.py --write-presets models/demo/presets.yaml
    python scripts/spectrum.py --config configs/stable-diffusion/v1-inference.yaml --ckpt models/sd/sd-v1-4.ckpt \\
        --size 512 --prompt 'a mug' --add 'a blue mug' --switch 'a bowl' --concept teddy.safetensors='a * mug'

Without --prompt, captions of the rendered world are drawn and attributes read by the classifier; with it, your
prompts, judged by colour and structure, and by CLIP and LPIPS where you have their weights. Pictures, figures and
spectrum.csv go to --outdir, where an interrupted run goes on (with other code, take another folder).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `evaluation` is not installed

from ldm.cli.flags import Parser, natural, positive


def build_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/demo/finetune.yaml")
    parser.add_argument("--ckpt", default="models/demo/model.safetensors")
    parser.add_argument("--classifier", default="models/demo/classifier.safetensors")
    parser.add_argument("--count", type=positive, default=96, help="captions, or seeds of your prompt (96)")
    help_concepts = "concepts to learn on the rendered world, 0 for none (8)"
    parser.add_argument("--concepts", type=natural, default=8, help=help_concepts)
    parser.add_argument("--width", type=positive, default=3, help="stages in a window (3)")
    parser.add_argument("--steps", type=positive, default=20, help="DDIM steps (20: two for each stage)")
    parser.add_argument("--scale", type=float, default=2.5, help="guidance scale (2.5)")
    parser.add_argument("--size", type=positive, default=128, help="pixels a side of your prompt's pictures (128)")
    parser.add_argument("--batch", type=positive, default=64, help="pictures at a time (64)")
    parser.add_argument("--prompt", help="judge your own prompt instead of the rendered world's")
    parser.add_argument("--add", metavar="TEXT", help="the prompt with one more word")
    parser.add_argument("--switch", metavar="TEXT", help="another prompt to switch to")
    parser.add_argument("--concept", metavar="FILE=PROMPT", help="a learned concept and a prompt with its *")
    parser.add_argument("--clip", metavar="FOLDER", help="judge with this CLIP model, too")
    parser.add_argument("--lpips", action="store_true", help="judge with LPIPS, too")
    parser.add_argument("--write-presets", type=Path, metavar="YAML", help="write the best windows of the presets")
    parser.add_argument("--workers", type=positive, metavar="N", help="processes (one for each core)")
    parser.add_argument("--outdir", type=Path, default=Path("outputs/spectrum"))
    return parser


def main() -> None:
    parser = build_parser()
    args = parser.parse_strictly()
    refuse_misuse(parser, args)
    with parser.sentences():
        measure(args)


def refuse_misuse(parser: Parser, args: argparse.Namespace) -> None:
    """End with a sentence where flags do not go together."""
    if args.width > 10:
        parser.error(f"--width must be in 1..10, not {args.width}")
    if args.prompt is None:
        for name in ("add", "switch", "concept", "clip", "lpips"):
            if getattr(args, name) not in (None, False):
                parser.error(f"--{name} goes with --prompt; the rendered world has its own prompts and judge")
        if args.size != parser.get_default("size"):
            parser.error(f"the rendered world's pictures have 128 pixels a side, not {args.size}; leave --size away")
    if args.concept is not None and "*" not in args.concept.partition("=")[2]:
        parser.error("--concept takes FILE=PROMPT with a * in the prompt, such as teddy.safetensors='a * mug'")
    if args.write_presets and (args.prompt is not None or not args.concepts):
        parser.error("--write-presets needs concepts of the rendered world: leave --prompt away, --concepts at least 1")
    if args.write_presets and args.write_presets.is_dir():
        parser.error(f"--write-presets takes a file, not the folder '{args.write_presets}'")


def measure(args: argparse.Namespace) -> None:
    """Draw, judge and write."""
    import yaml

    from evaluation import spectrum, world_spectrum
    from evaluation.judges import AttributeJudge, DistanceJudge
    from evaluation.pictures import check
    from evaluation.plots import plot_spectrum
    from ldm.files.writing import check_writable, replace_text, writing_to

    file, _, text = (args.concept or "").partition("=")
    check(args.config, args.ckpt, args.steps, args.scale, args.size, {"*": file} if args.concept else None)
    check_writable(args.outdir, "--outdir")
    if args.write_presets:
        check_writable(args.write_presets.parent, "--write-presets")
    place = {"config": args.config, "ckpt": args.ckpt}
    if args.prompt is None:
        judge = AttributeJudge(args.classifier)
        experiments = world_spectrum.caption_experiments(args.count, args.width)
        if args.concepts:
            concepts = world_spectrum.learn_concepts(
                **place, count=args.concepts, folder=args.outdir, workers=args.workers
            )
            experiments |= world_spectrum.concept_experiments(concepts)
    else:
        judge = DistanceJudge(args.clip, args.lpips)
        seeds, prompts = list(range(args.count)), [args.prompt] * args.count
        experiments = {"withhold": spectrum.withhold(prompts, seeds, args.width)}
        if args.add is not None:
            experiments["add"] = spectrum.add(prompts, [args.add] * args.count, seeds, args.width)
        if args.switch is not None:
            experiments["switch"] = spectrum.switch(prompts, [args.switch] * args.count, seeds)
        if args.concept:
            windows = spectrum.sliding(args.width)
            experiments["concept"] = spectrum.place([text] * args.count, seeds, windows, {"*": file})
    options = {"steps": args.steps, "scale": args.scale, "size": args.size, "batch_size": args.batch}
    found = spectrum.run(experiments, judge, **place, folder=args.outdir, options=options, workers=args.workers)
    if "switch" in found:
        places = spectrum.half_way(found["switch"], judge).items()
        print("half of the pictures follow A at stage " + ", ".join(f"{stage:.1f} ({name})" for name, stage in places))
    figures = plot_spectrum(found, experiments, judge, args.outdir)
    if args.write_presets:
        windows = world_spectrum.best_windows(found)
        comment = (
            f"# Stages in which a learned * brings one attribute, measured by scripts/spectrum.py on {args.ckpt}.\n"
        )
        content = comment + yaml.safe_dump(windows, default_flow_style=None, sort_keys=False)
        with writing_to(args.write_presets.parent):
            args.write_presets.parent.mkdir(parents=True, exist_ok=True)
            replace_text(args.write_presets, content)
        print(f"{args.write_presets}: {windows}")
    print(f"{args.outdir}: spectrum.csv, {', '.join(figures)}")


if __name__ == "__main__":
    main()
