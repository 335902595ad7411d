"""Measure what a model decides in which stage, and which stages a learned concept should stand in.

    python scripts/spectrum.py                                   # the small model, with known attributes
    python scripts/spectrum.py --write-presets models/demo/presets.yaml --force
    python scripts/spectrum.py --config configs/stable-diffusion/v1-inference.yaml --ckpt models/sd/sd-v1-4.ckpt \\
        --size 512 --prompt 'a mug' --add 'a blue mug' --switch 'a bowl' --concept teddy.safetensors='a * mug'

Without --prompt, captions of the rendered world are drawn and attributes read by the classifier; with it, your
prompts, judged by colour and structure, and by CLIP and LPIPS where you have their weights. Figures, spectrum.csv and
all that was drawn stay in --outdir, where an interrupted run resumes (with other code, use another folder).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `evaluation` is not installed

from evaluation.command_line import add_job_flags, add_model_flags
from ldm.cli.flags import Parser, natural, path, positive, say, script_parser

if TYPE_CHECKING:
    from evaluation.spectrum import Experiment

SIZE = 128  # pixels a side


def build_parser() -> Parser:
    parser = script_parser(__doc__)
    add_model_flags(parser, steps=20)  # two for each stage
    parser.add_argument("--count", type=positive, default=96, help="captions, or seeds of your prompt (96)")
    help_concepts = "concepts to learn on the rendered world, 0 for none (8)"
    parser.add_argument("--concepts", type=natural, default=8, help=help_concepts)
    parser.add_argument("--width", type=positive, default=3, help="stages in a window (3)")
    parser.add_argument("--size", type=positive, default=SIZE, help=f"pixels a side of your prompt's images ({SIZE})")
    parser.add_argument("--batch", type=positive, default=64, help="images at a time (64)")
    parser.add_argument("--prompt", help="judge your own prompt instead of the rendered world's")
    parser.add_argument("--add", metavar="TEXT", help="the prompt with one more word")
    parser.add_argument("--switch", metavar="TEXT", help="another prompt to switch to")
    parser.add_argument("--concept", metavar="FILE=PROMPT", help="a learned concept and a prompt with its *")
    parser.add_argument("--clip", metavar="FOLDER", help="judge with this CLIP model, too")
    parser.add_argument("--lpips", action="store_true", help="judge with LPIPS, too")
    parser.add_argument("--write-presets", type=path, metavar="YAML", help="write the best windows of the presets")
    parser.add_argument("--force", action="store_true", help="replace the presets that are there")
    add_job_flags(parser, "outputs/spectrum")
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
        if args.size != SIZE:
            parser.error(f"the rendered world's images have {SIZE} pixels a side, not {args.size}; omit --size")
    if args.concept is not None and "*" not in args.concept.partition("=")[2]:
        parser.error("--concept takes FILE=PROMPT with a * in the prompt, such as teddy.safetensors='a * mug'")
    if args.write_presets and (args.prompt is not None or not args.concepts):
        parser.error("--write-presets needs concepts of the rendered world: omit --prompt, --concepts at least 1")


def measure(args: argparse.Namespace) -> None:
    """Draw, judge and write."""
    from evaluation import spectrum
    from evaluation.images import Sampling, check
    from evaluation.judges import AttributeJudge, DistanceJudge
    from evaluation.plots import plot_spectrum
    from ldm.files.writing import check_writable

    concepts = {"*": args.concept.partition("=")[0]} if args.concept else None
    check(args.config, args.ckpt, Sampling(args.steps, args.scale), args.size, concepts)
    check_writable(args.outdir, "--outdir")
    if args.write_presets:
        check_presets_file(args.write_presets, args.force)
    judge = AttributeJudge(args.classifier) if args.prompt is None else DistanceJudge(args.clip, args.lpips)
    if args.prompt is not None:
        experiments = own_experiments(args)
    else:
        experiments = spectrum.caption_experiments(args.count, spectrum.sliding(args.width))
        if args.concepts:
            learned = spectrum.learn_concepts(args.config, args.ckpt, args.concepts, args.outdir, args.workers)
            experiments |= spectrum.concept_experiments(learned)
    options = {"steps": args.steps, "scale": args.scale, "size": args.size, "batch_size": args.batch}
    found = spectrum.run(experiments, judge, args.config, args.ckpt, args.outdir, options, args.workers)
    if "switch" in found.scores:
        places = spectrum.half_way(found.scores["switch"], judge).items()
        say("half of the images follow A at stage " + ", ".join(f"{stage:.1f} ({name})" for name, stage in places))
    figures = plot_spectrum(found, experiments, judge, args.outdir)
    if args.write_presets:
        write_presets(args.write_presets, spectrum.best_windows(found.scores), args.ckpt)
    say(f"{args.outdir}: spectrum.csv, {', '.join(figures)}")


def own_experiments(args: argparse.Namespace) -> dict[str, Experiment]:
    from evaluation import spectrum

    seeds, prompts = list(range(args.count)), [args.prompt] * args.count
    windows = spectrum.sliding(args.width)
    experiments = {"withhold": spectrum.withhold(prompts, seeds, windows)}
    if args.add is not None:
        experiments["add"] = spectrum.add(prompts, [args.add] * args.count, seeds, windows)
    if args.switch is not None:
        experiments["switch"] = spectrum.switch(prompts, [args.switch] * args.count, seeds)
    if args.concept:
        file, _, text = args.concept.partition("=")
        experiments["concept"] = spectrum.place([text] * args.count, seeds, windows, {"*": file})
    return experiments


def check_presets_file(file: Path, force: bool) -> None:
    """Raise an error where the windows could not be written, or would take the place of another kind of file."""
    from ldm.conditioning.presets import load_presets
    from ldm.files.writing import check_new_file, check_writable

    check_writable(file.parent, "--write-presets")
    if file.is_file():
        try:
            load_presets(file)
        except ValueError as error:
            raise ValueError(f"'{file}' does not hold presets, and would be lost; name another file.") from error
    check_new_file(file, force, suffix=file.suffix)


def write_presets(file: Path, windows: Mapping[str, list[int]], ckpt: str) -> None:
    import yaml

    from ldm.files.writing import replace_text

    comment = f"# Stages in which a learned * brings one attribute, measured by scripts/spectrum.py on {ckpt}.\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_text(file, comment + yaml.safe_dump(windows, default_flow_style=None, sort_keys=False))
    say(f"{file}: {windows}")


if __name__ == "__main__":
    main()
