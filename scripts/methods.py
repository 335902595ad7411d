"""Learn one image by every method with the small model, and show them beside each other.

    python scripts/methods.py                                  # 15 minutes on two cores; resumes where it was stopped
    python scripts/methods.py --reference striped-heart --out outputs/methods.png

Rows are methods, columns the reference, a plain prompt, a new background and a changed attribute; all images have one
seed. Runs stay in --logs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # `evaluation` is not installed

from ldm.cli.flags import natural, path, positive, say, script_parser

CONFIG, CKPT, REFERENCES = "configs/demo/finetune.yaml", "models/demo/model.safetensors", "models/demo/references"
CLASS = "thing"  # CatVersion's; the others begin with the word of finetune.yaml
METHODS = {"ProSpect": "", "Textual Inversion": "ti", "P+ (XTI)": "xti", "NeTI": "neti", "CatVersion": "catversion"}
SIZE = 128  # pixels a side
PROMPTS = ["a {}", "a {} on a navy background", "a blue {}"]


def main() -> None:
    parser = script_parser(__doc__)
    references = sorted(folder.name for folder in (ROOT / REFERENCES).iterdir())
    parser.add_argument("--reference", default="dotted-star", choices=references, help="what is learned (dotted-star)")
    parser.add_argument("--logs", type=path, default=path("logs/methods"), metavar="DIR", help="for the runs")
    parser.add_argument("--seed", type=natural, default=42, help="of the images (42)")
    parser.add_argument("--steps", type=positive, default=50, help="DDIM steps (50)")
    parser.add_argument("--out", type=path, default=path("docs/images/methods.png"), metavar="PNG")
    args = parser.parse_strictly()
    with parser.sentences():
        draw(args)


def draw(args: argparse.Namespace) -> None:
    from ldm.files.images import label_grid, open_image
    from ldm.files.records import save_png
    from ldm.files.writing import check_writable
    from ldm.generate import load_model_from_config
    from ldm.generate import main as generate

    check_writable(args.out.parent, "--out")
    concepts = {method: learn(method, args) for method in METHODS}
    model = load_model_from_config(CONFIG, CKPT)
    reference = open_image(next((ROOT / REFERENCES / args.reference).iterdir())).resize((SIZE, SIZE))
    rows = []
    for method, concept in concepts.items():
        name = CLASS if method == "CatVersion" else "*"
        made = {"ddim_steps": args.steps, "seed": args.seed, "model": model, "concepts": {"*": concept}}
        rows.append([reference, *(generate(prompt.format(name), **made) for prompt in PROMPTS)])
    heads = ["reference", *(prompt.format("*") for prompt in PROMPTS)]
    labels = [f"{method} (* is '{CLASS}')" if method == "CatVersion" else method for method in METHODS]
    save_png(label_grid(rows, labels, heads, size=10), args.out, {})
    say(args.out)


def learn(method: str, args: argparse.Namespace) -> Path:
    """Learn by `main.py`, or resume; a run that has ended is left as it is. Returns the concept.

    ProSpect's ships.
    """
    if not METHODS[method]:
        return ROOT / f"models/demo/concepts/{args.reference}.safetensors"
    run = args.logs / f"{args.reference}-{METHODS[method]}"
    command = ["main.py", "-t", "-r", str(run)]
    if not (run / "checkpoints/last.ckpt").is_file():
        command = ["main.py", "--base", CONFIG, f"configs/demo/{METHODS[method]}.yaml", "-t", "-p", str(run)]
        command += ["--actual_resume", CKPT, "--data_root", f"{REFERENCES}/{args.reference}"]
        command += ["--caption", f"a {CLASS}"] if method == "CatVersion" else []
    say(f"{method}: python {' '.join(command)}")
    if subprocess.run([sys.executable, *command], cwd=ROOT, check=False).returncode:
        raise ValueError(f"{method} was not learned; see above.")
    return run / "checkpoints/embeddings.safetensors"


if __name__ == "__main__":
    main()
