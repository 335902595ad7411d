"""Edit an image by exchanging attention: one that was inverted, one that is generated, or a list of them.

python scripts/edit.py dog.safetensors --target "a tiger on the grass" --blend dog:tiger --weight tiger=2
python scripts/edit.py dog.safetensors --target "a tiger on the grass" --tau_v .2 .5 --tau_u 0 .5
python scripts/edit.py --prompt "a red heart" --target "a blue heart" --seed 7
python scripts/edit.py --csv edits.csv --outdir outputs/edits
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.cli.flags import (
    Parser,
    add_field_flag,
    arguments_of,
    check_paths,
    input_path,
    natural,
    path,
    say,
    script_parser,
)
from ldm.cli.images import new_file
from ldm.cli.invert import add_inversion_flags, invert_options
from ldm.cli.models import add_model_flags, load_model, read_setup
from ldm.cli.prompts import concept_files, read_stages
from ldm.editing.request import TAUS, Edit, grid_of
from ldm.editing.table import Row, read_rows
from ldm.files.texts import slug
from ldm.files.writing import check_writable
from ldm.request import PLACEHOLDER, Request, model_facts

PNG_KEY = "prospect-edit"  # name of the text chunk that says what an image was edited by


def build_parser(prog: str | None) -> Parser:
    parser = script_parser(__doc__, prog)
    parser.add_argument("inverted", nargs="?", type=input_path, metavar="CONCEPT", help="of scripts/invert.py")
    what = parser.add_argument_group("what to edit")
    what.add_argument("--prompt", metavar="TEXT", help="of a generated image; or that of CONCEPT, to be checked")
    what.add_argument("--image", type=input_path, metavar="FILE", help="the image of CONCEPT, to be checked and shown")
    what.add_argument("--seed", type=natural, default=42, metavar="N", help="of a generated image (42)")
    help_csv = "edits with the columns of StyleDiffusion's files; images are inverted where that is not done yet"
    what.add_argument("--csv", type=input_path, metavar="FILE", help=help_csv)
    what.add_argument("--from_case", type=natural, metavar="N", help="first row")
    what.add_argument("--end_case", type=natural, metavar="N", help="the row behind the last")
    how = parser.add_argument_group("how to edit")
    add_field_flag(how, Edit, "target", metavar="TEXT")
    add_field_flag(how, Edit, "kind", metavar="HOW")
    for name in TAUS:
        help_tau = (
            f"{arguments_of(Edit)[name]} ({getattr(Edit, name)}); START:END is a part, several values make a grid"
        )
        add_field_flag(how, Edit, name, nargs="+", type=span, metavar="X", help=help_tau)
    help_word = "WORD=X: tau_c of one target word"
    how.add_argument("--word_tau", action="append", default=[], type=_assigned(span), metavar="WORD=X", help=help_word)
    for name in ("blend", "subtract"):
        add_field_flag(how, Edit, name, type=pair, metavar="OLD:NEW")
    help_weight = "factor of a target word's attention, also negative; several times"
    how.add_argument("--weight", action="append", default=[], type=_assigned(float), metavar="WORD=X", help=help_weight)
    add_field_flag(how, Edit, "threshold")
    add_field_flag(how, Edit, "compat")
    help_stages = "RANGE=TEXT …: what takes the place of * in the target in these stages, the end of sampling first"
    how.add_argument("--stages", nargs="+", metavar="RANGE=TEXT", help=help_stages)
    help_concept = "learned embedding for * in the target; several: '<vase>=FILE'"
    how.add_argument("--concept", action="append", default=[], metavar="[NAME=]FILE", help=help_concept)
    how.add_argument("--any_base", action="store_true", help="also concepts of other base models")
    add_inversion_flags(parser.add_argument_group("how to invert (--csv), or to generate (--steps, --scale)"))
    parser.set_defaults(height=None, width=None, networks=None)  # flags of scripts/invert.py alone
    files = parser.add_argument_group("model and files")
    add_model_flags(files)
    files.add_argument("--outdir", type=path, default=Path("outputs"), metavar="DIR", help="for the images (outputs)")
    files.add_argument("--debug", action="store_true", help="show the whole trace of an error")
    return parser


def span(text: str) -> float | tuple[float, ...]:
    """A share of the steps, or two of them: .6, or .2:.8."""
    try:
        ends = tuple(float(end) for end in text.split(":"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is neither a number nor START:END") from None
    return ends if len(ends) > 1 else ends[0]


def pair(text: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Words of both prompts: dog:tiger, or cat,chair:cat,chair."""
    source, _, target = text.partition(":")
    if not source or not target:
        raise argparse.ArgumentTypeError(f"'{text}' must be OLD:NEW, as in dog:tiger, several words with commas")
    return tuple(source.split(",")), tuple(target.split(","))


def _assigned(kind: Callable[[str], Any]) -> Callable[[str], tuple[str, Any]]:
    """Return the type of a flag WORD=X."""

    def read(text: str) -> tuple[str, Any]:
        word, _, value = text.rpartition("=")
        try:
            return word, kind(value if word else "")
        except (ValueError, argparse.ArgumentTypeError):
            raise argparse.ArgumentTypeError(f"'{text}' must be WORD=X, as in tiger=2") from None

    return read


def run(argv: Sequence[str] | None = None, prog: str | None = None) -> list[Path]:
    """Edit what the flags ask for; returns the files written."""
    return build_parser(prog).run(_edit, argv)


def _edit(options: argparse.Namespace) -> list[Path]:
    check_writable(options.outdir, "--outdir")
    setup, config = read_setup(options)
    load = functools.cache(lambda: load_model(options, setup, config))
    if options.csv is not None:
        return _edit_rows(options, load)
    if options.target is None or (options.inverted is None and options.prompt is None):
        raise ValueError("Say what to edit, CONCEPT or --prompt TEXT, and --target TEXT; or give --csv FILE.")
    check_paths({"CONCEPT": [options.inverted], "--image": [options.image]})
    facts = model_facts(config)
    edits = _edits(options, facts.num_stages)
    files = concept_files(options.concept, facts.placeholder or PLACEHOLDER)
    if files:
        Request(concepts=files, ddim_steps=1).for_model(facts)  # which checks them
    source, concept = options.prompt, None
    if options.inverted is not None:
        from ldm.editing.invert import PROMPT, change_of
        from ldm.embeddings import load_concept

        concept = load_concept(options.inverted)
        change_of(concept)
        source = concept.metadata[PROMPT]
    for edit in edits:
        edit.check(source, len(edit.prospect_words or [None]))
    model = load()
    if model.embedding_manager is not None and files:
        model.embedding_manager.load(files, options.any_base)
    stem = options.outdir / slug(edits[0].target)
    if concept is None:
        from ldm.editing.edit import edit_generated

        how = (options.seed, 50 if options.steps is None else options.steps, options.guidance_scale)
        return write_edits(edits, (edit_generated(model, source, edit, *how) for edit in edits), stem)
    from ldm.editing.invert import check_belongs

    check_belongs(concept, model, options.image, options.prompt, options.steps, options.any_base)
    return edit_inverted(model, concept, edits, stem, options.image, any_base=options.any_base)


def _edits(options: argparse.Namespace, num_stages: int) -> list[Edit]:
    """Return an edit for each combination of taus."""
    names = ("kind", "blend", "subtract", "threshold", "compat", *TAUS)
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    if options.stages:
        given |= read_stages(options.stages, num_stages)
        if "preset" in given:
            raise ValueError(f"--stages {options.stages[0]} is for generating; here it is RANGE=TEXT.")
    return grid_of(options.target, weights=dict(options.weight), word_taus=dict(options.word_tau), **given)


def edit_inverted(
    model: Any,
    concept: Any,
    edits: Sequence[Edit],
    stem: Path,
    image: Path | None = None,
    report: Callable[[int, Any], None] | None = None,
    any_base: bool = False,
) -> list[Path]:
    """Edit an inverted image; the grid shows it, as the autoencoder and the inversion see it, and the edits.

    Args:
        stem: what the files' names begin with.
        report: called after each step of an edit, in place of a bar.
    """
    from ldm.editing.invert import edit_image, original, rebuilt

    before = {} if image is None else {"image": original(concept, image)}
    before["autoencoder"] = rebuilt(model, concept)
    how: dict[str, Any] = {"progress": report is None, "report": report, "any_base": any_base}
    made = (edit_image(model, concept, edit, **how) for edit in edits)
    return write_edits(edits, made, stem, before)


def write_edits(
    edits: Sequence[Edit], made: Iterable[Any], stem: Path, before: Mapping[str, Any] | None = None
) -> list[Path]:
    """Write edits as they come, then a grid of all; after Ctrl-C, of those that are finished."""
    from ldm.files.images import label_grid
    from ldm.files.records import save_png

    def write(image: Any, name: str, record: object) -> None:
        written.append(new_file(stem.with_name(f"{stem.name}-{name}")))
        save_png(image, written[-1], {PNG_KEY: json.dumps(record)})

    written: list[Path] = []
    rows, labels = [], []
    shown = before or {}
    try:
        for edit, found in zip(edits, made, strict=True):
            write(found.image, tau_name(edit), _records(edit)[0])
            rows.append([*shown.values(), found.source, found.image])
            labels.append(tau_name(edit).replace("-", " "))
    finally:
        if rows:
            write(label_grid(rows, labels, [*shown, "source", "edit"]), "grid", _records(*edits[: len(rows)]))
    return written


def tau_name(edit: Edit) -> str:
    """Return the taus as part of a file's name: v0.5-c0.6-s0.2to0.6-u0."""
    taus = {name[-1]: tau if isinstance(tau := getattr(edit, name), tuple) else (tau,) for name in TAUS}
    return "-".join(name + "to".join(f"{end:g}" for end in ends) for name, ends in taus.items())


# --- lists of edits --------------------------------------------------------------------------------------------


def _edit_rows(options: argparse.Namespace, load: Callable[[], Any]) -> list[Path]:
    """Edit the rows of a file and log what came of each: one that fails stops no other, existing images are kept.

    Raises:
        ValueError: no row could be edited.
    """
    rows = read_rows(options.csv, options.from_case, options.end_case)
    written: list[Path] = []
    failed = 0
    for row in rows:
        try:
            found = _edit_row(row, options.outdir / options.csv.stem, options, load)
            said = f"{len(found) - 1} edits of '{row.prompt}', {found[-1]}" if found else "there already"
            written += found
        except Exception as error:  # whatever is wrong with one row
            failed += 1
            said = str(error) or type(error).__name__
        say(f"case {row.case}: {said}")
    if failed == len(rows):
        raise ValueError(f"No row of '{options.csv}' could be edited; see above, or name other cases.")
    return written


def _edit_row(row: Row, folder: Path, options: argparse.Namespace, load: Callable[[], Any]) -> list[Path]:
    """Invert a row's image, where that is not done yet, and edit it; returns the files written, none if all are there.

    Raises:
        ValueError: what is there is of other settings, of another image, or not of this program.
    """
    edits = row.edits()
    for edit in edits:
        edit.check(row.prompt)
    stem = folder / f"{row.case}-{slug(row.cells.get('target') or row.prompt)}"
    file = folder / "concepts" / f"{row.case}.safetensors"
    records = {f"{stem}-{tau_name(edit)}.png": _records(edit) for edit in edits}
    records |= {f"{stem}-grid.png": _records(*edits)} if edits else {}
    check_paths({"image_path": [row.image]})
    from ldm.editing.invert import check_belongs, refuse_changed
    from ldm.embeddings import load_concept, save_new_concept

    if is_inverted := file.exists():
        refuse_changed(file, row.image, row.prompt, vars(options))
    there = {image: _shows(Path(image)) for image in records if Path(image).exists()}
    for image, shows in there.items():
        if not shows or shows != records[image][: len(shows)]:
            raise ValueError(f"'{image}' is there and shows something else; move it away, or use another --outdir.")
    if there == records and (edits or is_inverted):
        return []
    model = load()
    if is_inverted:
        concept = load_concept(file)
        check_belongs(concept, model, row.image, row.prompt, options.steps)
    else:
        concept = invert_options(model, row.image, row.prompt, options, file)
        save_new_concept(concept, file)
    for image in there:  # of a row that was stopped
        Path(image).unlink()
    return edit_inverted(model, concept, edits, stem, row.image) if edits else [file]


def _records(*edits: Edit) -> list[Any]:
    return [json.loads(json.dumps(vars(edit), default=str)) for edit in edits]


def _shows(file: Path) -> list[Any]:
    """The records of edits in an image; those of a grid are a list, which is shorter where it was stopped."""
    from ldm.files.images import image_info

    try:
        found = json.loads(image_info(file).get(PNG_KEY, "[]"))
    except (TypeError, ValueError, RecursionError):
        return []
    return found if isinstance(found, list) else [found]
