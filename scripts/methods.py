"""Learn one image by every method with the small model, or in several captions, and show them beside each other.

    python scripts/methods.py                                   # 6 minutes; resumes where it was stopped
    python scripts/methods.py --captions --out outputs/captions.png           # 3 minutes
    python scripts/methods.py --reference striped-heart --out outputs/striped-heart.png

Rows are methods (or captions), columns the reference and prompts; all images have one seed. Runs stay in --logs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # `evaluation` is not installed

from ldm.cli.flags import natural, path, positive, say, script_parser

CONFIG, CKPT, REFERENCES = "configs/demo/finetune.yaml", "models/demo/model.safetensors", "models/demo/references"
CLASS = "thing"  # CatVersion's; the others begin with the word of finetune.yaml
SIZE = 128  # pixels a side


class Row(NamedTuple):
    """What is learned, and how.

    Args:
        run: its folder in --logs; without one, it is the concept that ships.
        config: of the method, beside finetune.yaml.
        caption: what the token is learned in, if not alone.
    """

    label: str
    run: str = ""
    config: str = ""
    caption: str = ""


METHODS = [
    Row("ProSpect"),
    Row("Textual Inversion", "ti", "ti"),
    Row("P+ (XTI)", "xti", "xti"),
    Row("NeTI", "neti", "neti"),
    Row(f"CatVersion (* is '{CLASS}')", "catversion", "catversion", f"a {CLASS}"),
]
PROMPTS = ["a *", "a * on a navy background", "a blue *"]
# What a caption names is not learned: colour and texture are left by the first, colour by the second.
REST = "a large * star in the middle on a white background"
COLOUR = REST.replace("*", "dotted *")
CAPTIONS = [
    Row("learned as '*'"),
    Row(f"learned in '{REST}'", "caption-rest", caption=REST),
    Row(f"learned in '{COLOUR}'", "caption-colour", caption=COLOUR),
]
OTHER_OBJECTS = ["a large * heart", "a small * circle", "a * cross on the left"]


def main() -> None:
    parser = script_parser(__doc__)
    references = sorted(folder.name for folder in (ROOT / REFERENCES).iterdir())
    parser.add_argument("--captions", action="store_true", help="ProSpect in several captions, of dotted-star")
    parser.add_argument("--reference", default="dotted-star", choices=references, help="what is learned (dotted-star)")
    parser.add_argument("--logs", type=path, default=path("logs/methods"), metavar="DIR", help="for the runs")
    parser.add_argument("--seed", type=natural, default=42, help="of the images (42)")
    parser.add_argument("--steps", type=positive, default=50, help="DDIM steps (50)")
    parser.add_argument("--out", type=path, default=path("outputs/methods.png"), metavar="PNG")
    parser.add_argument("--force", action="store_true", help="overwrite the sheet if it is there")
    args = parser.parse_strictly()
    with parser.sentences():
        if args.captions and args.reference != "dotted-star":
            raise ValueError("--captions are of dotted-star; omit --reference.")
        draw(args, *((CAPTIONS, OTHER_OBJECTS) if args.captions else (METHODS, PROMPTS)))


def draw(args: argparse.Namespace, learned: list[Row], prompts: list[str]) -> None:
    from ldm.files.images import label_grid, open_image
    from ldm.files.records import save_png
    from ldm.files.writing import check_new_file, check_writable
    from ldm.generate import load_model_from_config
    from ldm.generate import main as generate

    check_writable(args.out.parent, "--out")
    check_new_file(args.out, args.force, [ROOT / REFERENCES, args.logs], ".png")
    concepts = [learn(row, args) for row in learned]
    model = load_model_from_config(CONFIG, CKPT)
    reference = open_image(next((ROOT / REFERENCES / args.reference).iterdir())).resize((SIZE, SIZE))
    rows = []
    for row, concept in zip(learned, concepts, strict=True):
        name = CLASS if row.config == "catversion" else "*"
        made = {"ddim_steps": args.steps, "seed": args.seed, "model": model, "concepts": {"*": concept}}
        rows.append([reference, *(generate(prompt.replace("*", name), **made) for prompt in prompts)])
    save_png(label_grid(rows, [row.label for row in learned], ["reference", *prompts], size=10), args.out, {})
    say(args.out)


def learn(row: Row, args: argparse.Namespace) -> Path:
    """Learn by `main.py`, or resume; a run that has ended is left as it is. Returns the concept."""
    if not row.run:
        return ROOT / f"models/demo/concepts/{args.reference}.safetensors"
    run = args.logs / f"{args.reference}-{row.run}"
    command = ["main.py", "-t", "-r", str(run)]
    if not (run / "checkpoints/last.ckpt").is_file():
        configs = [CONFIG, *([f"configs/demo/{row.config}.yaml"] if row.config else [])]
        command = ["main.py", "--base", *configs, "-t", "-p", str(run), "--actual_resume", CKPT]
        command += ["--data_root", f"{REFERENCES}/{args.reference}"]
        command += ["--caption", row.caption] if row.caption else []
    say(f"{row.label}: python {' '.join(command)}")
    if subprocess.run([sys.executable, *command], cwd=ROOT, check=False).returncode:
        raise ValueError(f"'{row.label}' was not learned; see above.")
    return run / "checkpoints/embeddings.safetensors"


if __name__ == "__main__":
    main()
