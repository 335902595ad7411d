"""Score generated images against references and prompts: CLIP image and text alignment, whole and masked.

    python scripts/evaluate.py --references data/teddy --generated outputs/teddy --prompt 'a photo of *'
    python scripts/evaluate.py --references data/teddy --generated outputs --prompts prompts.txt \\
        --clip models/clip-vit-base-patch32
    python scripts/evaluate.py --references models/demo/references/dotted-star \\
        --concept models/demo/concepts/dotted-star.safetensors --prompts configs/evidence/prompts.txt

In prompts, * or {} stands for the concept. With --prompts, the images of a prompt lie in a folder of --generated that
is called as the prompt, or with dashes for its spaces; with --concept they are made. Scores are cosines, with mean,
spread and count, in OUTDIR/scores.csv and scores.json.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `evaluation` is not installed

from ldm.cli.flags import Parser, log_to_terminal, natural, path, positive, say, script_parser
from ldm.cli.prompts import read_prompts
from ldm.files.shipped import shipped
from ldm.files.texts import file_name
from ldm.request import PLACEHOLDER, check_prompt

if TYPE_CHECKING:
    from evaluation.metrics.report import Case

logger = logging.getLogger("evaluation")


def build_parser() -> Parser:
    parser = script_parser(__doc__)
    parser.add_argument("--references", type=path, required=True, metavar="DIR", help="images of the concept")
    images = parser.add_mutually_exclusive_group(required=True)
    images.add_argument("--generated", type=path, metavar="DIR", help="images to be scored")
    images.add_argument("--concept", metavar="FILE", help="make images with this concept, and score them")
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", metavar="TEXT", help="what all images should show")
    prompts.add_argument("--prompts", type=path, metavar="FILE", help="text file with one prompt in a line")
    parser.add_argument("--placeholder", metavar="TEXT", help="of the concept in prompts (its own name, or '*')")
    parser.add_argument("--reference_masks", type=path, metavar="DIR", help="masks of the references, by their names")
    parser.add_argument("--generated_masks", type=path, metavar="DIR", help="the same for the generated images")
    parser.add_argument("--background", choices=["black", "mean"], default="black", help="outside of masks (black)")
    parser.add_argument("--clip", type=path, metavar="FOLDER", help="transformers' CLIP with its tokenizer")
    parser.add_argument("--no_antialias", action="store_true", help="resize as Textual Inversion's evaluator did")
    parser.add_argument("--keep_blanks", action="store_true", help="keep blanks beside a removed * as it does")
    parser.add_argument("--count", type=positive, default=8, help="images of a prompt (8)")
    parser.add_argument("--seed", type=natural, default=0, help="of the first of them (0)")
    parser.add_argument("--batch", type=positive, default=8, help="images at a time (8)")
    parser.add_argument("--config", type=shipped, default="configs/demo/finetune.yaml")
    parser.add_argument("--ckpt", type=shipped, default="models/demo/model.safetensors")
    parser.add_argument("--steps", type=positive, default=50, help="DDIM steps (50)")
    parser.add_argument("--scale", type=float, help="guidance scale (the model's)")
    parser.add_argument("--outdir", type=path, default=path("outputs/evaluation"), metavar="DIR")
    return parser


def main() -> None:
    parser = build_parser()
    args = parser.parse_strictly()
    if (args.reference_masks is None) != (args.generated_masks is None):
        parser.error("a masked score needs --reference_masks and --generated_masks")
    if args.concept is not None and args.generated_masks is not None:
        parser.error("images of a concept have no masks yet; make them, and give both with --generated")
    log_to_terminal(talkative=["evaluation"])
    with parser.sentences():
        evaluate(args)


def evaluate(args: argparse.Namespace) -> None:
    """Read or make the images, score, print and write."""
    from evaluation.metrics.backbones import clip_backbone, small_backbone
    from evaluation.metrics.report import aggregate, score, write
    from ldm.files.writing import check_writable

    check_writable(args.outdir, "--outdir")
    prompts = [args.prompt]
    if args.prompts is not None:
        prompts = [row.get("prompt") for row in read_prompts(args.prompts, ["prompt"], 1)]
    for prompt in prompts:
        check_prompt(prompt)
    backbone = small_backbone() if args.clip is None else clip_backbone(args.clip, not args.no_antialias)
    if args.clip is None:
        logger.warning("No CLIP is given (--clip FOLDER): images are scored by %s.", backbone.name)
    cases = folder_cases(args, prompts) if args.concept is None else concept_cases(args, prompts)
    rows = [row for case in cases for row in score(backbone, case, args.background)]
    overall = aggregate(rows)
    shown, counted = (rows, "values") if len(cases) == 1 else (overall, "prompts")
    for row in shown:
        spread = "" if row.std is None else f" ± {row.std:.4f}"
        say(f"{row.metric:22} {'none' if row.mean is None else f'{row.mean:.4f}'}{spread}  ({row.count} {counted})")
    files = write([*rows, *overall], args.outdir)
    say(f"{args.outdir}: {', '.join(file.name for file in files)}; {backbone.name}; {backbone.preprocessing}")


def folder_cases(args: argparse.Namespace, prompts: list[str]) -> list[Case]:
    """Return a case for each prompt, of images that lie in folders."""
    from evaluation.metrics.alignment import without_placeholder
    from evaluation.metrics.report import Case, read_images, read_masks

    references, cases = read_images(args.references, args.background), []
    for prompt in prompts:
        folder = args.generated if args.prompts is None else folder_of(args.generated, prompt)
        generated, masks = read_images(folder, args.background), {}
        if args.generated_masks is not None:
            own = args.generated_masks if args.prompts is None else folder_of(args.generated_masks, prompt)
            masks = read_masks("reference", args.reference_masks, references)
            masks |= read_masks("generated", own, generated)
            if not masks:
                raise ValueError(f"None of the masks in '{own}' is called as an image; name them alike.")
        text = without_placeholder(prompt, args.placeholder or PLACEHOLDER, args.keep_blanks)
        cases.append(Case(args.generated.name, prompt, text, references, generated, masks))
    return cases


def folder_of(parent: Path, prompt: str) -> Path:
    """Return the folder of a prompt's images: called as the prompt, or with dashes for its spaces."""
    dashed = parent / prompt.replace(" ", "-")
    folder = next(filter(Path.is_dir, (parent / prompt, dashed)), None)
    if folder is None:
        raise ValueError(f"There is no folder '{dashed}' with the images of '{prompt}'.")
    return folder


def concept_cases(args: argparse.Namespace, prompts: list[str]) -> list[Case]:
    """Return a case for each prompt, of images made with the concept."""
    from evaluation.metrics.alignment import without_placeholder
    from evaluation.metrics.report import Case, concept_images, filled, read_images
    from ldm.embeddings import load_concept
    from ldm.generate import load_model_from_config

    concept, references = load_concept(shipped(args.concept)), read_images(args.references, args.background)
    name = args.placeholder or concept.metadata.get("placeholder", PLACEHOLDER)
    written = {prompt: filled(prompt, concept, name) for prompt in prompts}
    model = load_model_from_config(args.config, args.ckpt, lightning=False)
    settings = {"ddim_steps": args.steps, "scale": args.scale, "seed": args.seed, "concepts": {name: concept}}
    cases = []
    for prompt, complete in written.items():
        folder = args.outdir / "images" / file_name(prompt)
        images = concept_images(model, settings | {"prompt": complete}, args.count, args.batch, folder)
        text = without_placeholder(prompt, name, args.keep_blanks)
        cases.append(Case(Path(args.concept).name, prompt, text, references, images, {}))
    return cases


if __name__ == "__main__":
    main()
