"""Learn a concept from each of many folders of images, on all cores, on all GPUs, or on a Ray cluster.

python scripts/learn_many.py IMAGES --out CONCEPTS
python scripts/learn_many.py concepts.csv --out CONCEPTS --workers 4 --max_steps 75
python scripts/learn_many.py IMAGES --out CONCEPTS --base sd --ckpt sd-v1-4.ckpt --cluster auto

IMAGES is a folder in which each sub-folder (or, if there is none, each image) is a concept, or a CSV with the columns
image, name, init_word, method, steps, of which only image is needed. The same command again does what is left.
CONCEPTS then holds a file for each concept, concepts.csv, and the contact sheet concepts.png.
"""

from __future__ import annotations

import argparse
import re
import signal
from collections.abc import Sequence

from ldm.cli.flags import Parser, check_paths, input_path, path, positive, printable, say, script_parser
from ldm.cli.models import check_weights, configuration
from ldm.files.shipped import MODELS, shipped
from ldm.files.writing import check_writable


def build_parser(prog: str | None = None) -> Parser:
    parser = script_parser(__doc__, prog)
    help_images = "a folder with a folder of images (or an image) for each concept, or a CSV"
    parser.add_argument("images", type=input_path, metavar="IMAGES", help=help_images)
    parser.add_argument("--out", type=path, required=True, metavar="CONCEPTS", help="folder of the results")
    help_base = "configurations: demo, sd or files (demo)"
    parser.add_argument("--base", nargs="+", default=["demo"], metavar="NAME|YAML", help=help_base)
    parser.add_argument("--ckpt", metavar="FILE", help="base model (that of --base demo or sd)")
    parser.add_argument("--method", metavar="NAME", help="what is learned, where the CSV does not say it")
    parser.add_argument("--init_word", metavar="WORD", help="what learning starts from, likewise")
    parser.add_argument("--max_steps", type=positive, metavar="N", help="training steps, likewise")
    parser.add_argument(
        "--workers", type=positive, metavar="N", help="processes (one for each GPU, else for each core)"
    )
    help_cluster = "learn on a Ray cluster: local, auto or HOST:PORT"
    parser.add_argument("--cluster", type=address, metavar="ADDRESS", help=help_cluster)
    help_share = "of a GPU of the cluster, for each concept (1.0)"
    parser.add_argument("--gpu_share", type=float, default=1.0, metavar="X", help=help_share)
    parser.add_argument("--no_sheet", action="store_true", help="make no contact sheet")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="values of the configuration")
    return parser


def address(text: str) -> str:
    """Where a Ray cluster is."""
    if text not in ("local", "auto") and not re.search(r":\d+$", text):
        raise argparse.ArgumentTypeError(f"'{text}' is neither local nor auto nor HOST:PORT")
    return text


def run(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Learn what is left, and say what came of each concept; returns the exit code."""
    parser = build_parser(prog)
    options = parser.parse_strictly(argv)
    with parser.sentences():
        if options.ckpt is None:
            known = next((MODELS[name].ckpt for name in options.base if name in MODELS), None)
            if known is None:
                raise ValueError("Say which base model to learn against: --ckpt FILE.")
            options.ckpt = known
        options.base, options.ckpt = (
            [configuration(name, learning=True) for name in options.base],
            shipped(options.ckpt),
        )
        if options.out.resolve().is_relative_to(options.images.resolve()):
            raise ValueError(f"--out '{options.out}' is part of IMAGES; give a folder of its own.")
        check_paths({"IMAGES": [options.images], "--base": options.base})
        check_weights(options.ckpt)
        return _learn(options)


def _learn(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from ldm.many.contact_sheet import write_sheet, write_table
    from ldm.many.jobs import Setting, finished, read_jobs, unfinished
    from ldm.many.learn import learn_many

    given = {"init_word": options.init_word, "method": options.method, "steps": options.max_steps}
    jobs = read_jobs(options.images.absolute(), {name: value for name, value in given.items() if value})
    setting = Setting(
        tuple(path(file).absolute() for file in options.base), path(options.ckpt).absolute(), tuple(options.set)
    )
    out = options.out.absolute()
    check_writable(out, "--out")
    left, results = unfinished(jobs, setting, out), []
    if len(left) < len(jobs):
        say(f"{len(jobs) - len(left)} of {len(jobs)} concepts are there already.")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it ends as Ctrl-C does, and no process is left behind
    learning = learn_many(left, setting, out, options.workers, options.cluster, options.gpu_share)
    try:
        for learned in tqdm(learning, "learning", len(left), disable=not left):
            results.append(learned)
            if learned.error:
                tqdm.write(printable(f"{learned.job.name}: {learned.error}"))
    except KeyboardInterrupt:
        done = sum(finished(out, job).is_file() for job in jobs)
        raise KeyboardInterrupt(f"{done} of {len(jobs)} concepts are learned; the same command resumes") from None
    table = write_table(jobs, results, out)
    if not options.no_sheet:
        write_sheet([job for job in jobs if finished(out, job).is_file()], setting, out)
    failed = [learned.job.name for learned in results if learned.error]
    say(f"{table}\n{len(jobs) - len(failed)} of {len(jobs)} concepts are in {options.out}.")
    return 1 if failed else 0
