"""Learn a concept from each of many folders of images, on all cores, on all GPUs, or on a Ray cluster.

    python scripts/learn_many.py PICTURES --out CONCEPTS
    python scripts/learn_many.py concepts.csv --out CONCEPTS --workers 4 --max_steps 75
    python scripts/learn_many.py PICTURES --out CONCEPTS --cluster auto

PICTURES is a folder in which each sub-folder (or, if there is none, each image) is a concept, or a CSV with the columns
image, name, init_word, method, steps, of which only image is needed. The same command again does what is left.
CONCEPTS then holds a file for each concept, concepts.csv, and the contact sheet concepts.png.
"""

from __future__ import annotations

import argparse

from ldm.cli.flags import path, positive, printable, say, script_parser


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("pictures", type=path, metavar="PICTURES", help="a folder of folders with images, or a CSV")
    parser.add_argument("--out", type=path, required=True, metavar="CONCEPTS", help="folder of the results")
    parser.add_argument("--base", type=path, nargs="+", default=[path("configs/demo/finetune.yaml")], metavar="YAML")
    parser.add_argument("--ckpt", type=path, default=path("models/demo/model.safetensors"), help="base model")
    parser.add_argument("--method", metavar="NAME", help="what is learned, where the CSV does not say it")
    parser.add_argument("--init_word", metavar="WORD", help="word that the learning starts from, likewise")
    parser.add_argument("--max_steps", type=positive, metavar="N", help="training steps, likewise")
    parser.add_argument("--workers", type=positive, metavar="N", help="processes (one a GPU, else one a core)")
    parser.add_argument("--cluster", metavar="ADDRESS", help="learn on a Ray cluster: local, auto or HOST:PORT")
    parser.add_argument("--gpu_share", type=float, default=1.0, metavar="X", help="of a GPU, for a concept there (1.0)")
    parser.add_argument("--no_sheet", action="store_true", help="make no contact sheet")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="values of the configuration")
    args = parser.parse_strictly()
    with parser.sentences():
        parser.exit(learn(args))


def learn(args: argparse.Namespace) -> int:
    """Learn what is left, and say what came of each concept; returns the exit code."""
    from tqdm import tqdm

    from ldm.training.contact_sheet import write_sheet
    from ldm.training.jobs import Setting, finished, read_jobs, unfinished
    from ldm.training.many import learn_many, write_table

    given = {"init_word": args.init_word, "method": args.method, "steps": args.max_steps}
    for file in (*args.base, args.ckpt):
        if not file.exists():
            raise ValueError(f"There is no '{file}'; give the configuration with --base, the base model with --ckpt.")
    jobs = read_jobs(args.pictures, {name: value for name, value in given.items() if value})
    setting = Setting(tuple(file.absolute() for file in args.base), args.ckpt.absolute(), tuple(args.overrides))
    left, results = unfinished(jobs, setting, args.out), []
    if len(left) < len(jobs):
        say(f"{len(jobs) - len(left)} of {len(jobs)} concepts are there already.")
    try:
        for learned in tqdm(
            learn_many(left, setting, args.out, args.workers, args.cluster, args.gpu_share), "learning", len(left)
        ):
            results.append(learned)
            if learned.error:
                tqdm.write(printable(f"{learned.job.name}: {learned.error}"))
    except KeyboardInterrupt:
        done = sum(finished(args.out, job).is_file() for job in jobs)
        raise KeyboardInterrupt(f"{done} of {len(jobs)} concepts are learned; the same command goes on") from None
    table = write_table(jobs, results, args.out)
    if not args.no_sheet:
        write_sheet([job for job in jobs if finished(args.out, job).is_file()], setting, args.out)
    say(table)
    failed = [learned.job.name for learned in results if learned.error]
    say(
        f"{len(jobs) - len(failed)} of {len(jobs)} concepts: {args.out}"
        + (f"; failed: {', '.join(failed)}" * bool(failed))
    )
    return 1 if failed else 0


if __name__ == "__main__":
    main()
