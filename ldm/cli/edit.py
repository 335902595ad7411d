"""Edit an image by exchanging attention: one that was inverted, one that is generated, or a list of them.

python scripts/edit.py dog.safetensors --target "a tiger on the grass" --blend dog:tiger --weight tiger=2
python scripts/edit.py dog.safetensors --target "a tiger on the grass" --tau_v .2 .5 --tau_u 0 .5
python scripts/edit.py --prompt "a red heart" --target "a blue heart" --seed 7
python scripts/edit.py --csv edits.csv --outdir outputs/edits
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.cli.flags import (
    Parser,
    add_field_flag,
    add_flag,
    arguments_of,
    check_paths,
    input_path,
    log_to_terminal,
    natural,
    path,
    say,
    script_parser,
)
from ldm.cli.images import new_file
from ldm.cli.invert import add_inversion_flags, invert_options
from ldm.cli.models import add_model_flags, check_weights, load_model, model_setup
from ldm.cli.prompts import concept_files, read_stages
from ldm.editing.request import TAUS, Edit, Span, grid_of
from ldm.editing.table import Row, read_rows
from ldm.files.texts import slug
from ldm.files.writing import check_writable

PNG_KEY = "prospect-edit"  # name of the text chunk that says what an image was edited by


def build_parser(docstring: str | None, prog: str | None = None) -> Parser:
    parser = script_parser(docstring, prog)
    parser.add_argument("inverted", nargs="?", type=input_path, metavar="CONCEPT", help="of scripts/invert.py")
    what = parser.add_argument_group("what to edit")
    add_flag(what, "--prompt", metavar="TEXT", help="of an image that is generated; or that of CONCEPT, to be checked")
    add_flag(what, "--image", type=input_path, metavar="FILE", help="the image of CONCEPT, to be checked and shown")
    add_flag(what, "--seed", type=natural, default=42, metavar="N", help="of a generated image (42)")
    help_csv = "edits with the columns of StyleDiffusion's files; images are inverted where that is not done yet"
    add_flag(what, "--csv", type=input_path, metavar="FILE", help=help_csv)
    add_flag(what, "--from_case", type=natural, metavar="N", help="first row")
    add_flag(what, "--end_case", type=natural, metavar="N", help="the row behind the last")
    how = parser.add_argument_group("how to edit")
    add_field_flag(how, Edit, "target")
    add_field_flag(how, Edit, "kind", metavar="HOW")
    for name in TAUS:
        help_tau = f"{' '.join(_help(name).split())}; START:END is a part, several values make a grid"
        add_flag(how, f"--{name}", nargs="+", type=span, metavar="X", help=help_tau)
    help_word = "WORD=X: tau_c of one target word"
    add_flag(how, "--word_tau", action="append", default=[], type=_assigned(span), metavar="WORD=X", help=help_word)
    for name in ("blend", "subtract"):
        add_field_flag(how, Edit, name, type=pair, metavar="OLD:NEW")
    help_weight = "factor of a target word's attention, also negative; several times"
    add_flag(how, "--weight", action="append", default=[], type=_assigned(float), metavar="WORD=X", help=help_weight)
    add_field_flag(how, Edit, "threshold")
    add_field_flag(how, Edit, "compat")
    help_stages = "RANGE=TEXT …: what takes the place of * in the target in these stages, the end of sampling first"
    add_flag(how, "--stages", nargs="+", metavar="RANGE=TEXT", help=help_stages)
    help_concept = "learned embedding for * in the target; several: '<vase>=FILE'"
    add_flag(how, "--concept", action="append", default=[], metavar="[NAME=]FILE", help=help_concept)
    add_flag(how, "--any_base", action="store_true", help="also concepts of other base models")
    inversion = parser.add_argument_group("how to invert (--csv), or to generate (--steps, --scale)")
    add_inversion_flags(inversion)
    files = parser.add_argument_group("model and files")
    add_model_flags(files)
    add_flag(files, "--outdir", type=path, default=Path("outputs"), metavar="DIR", help="for the images (outputs)")
    add_flag(files, "--debug", action="store_true", help="show the whole trace of an error")
    parser.set_defaults(source=None)
    return parser


def _help(name: str) -> str:
    default = next(f.default for f in Edit.__dataclass_fields__.values() if f.name == name)
    return f"{arguments_of(Edit)[name]} ({default})"


def span(text: str) -> float | tuple[float, ...]:
    """A share of the steps, or two of them: .6, or .2:.8."""
    try:
        ends = tuple(float(end) for end in text.split(":"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is neither a number nor START:END") from None
    return ends if len(ends) > 1 else ends[0]


def pair(text: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Words of both prompts: dog:tiger, or cat,chair:cat,chair."""
    source, sign, target = text.partition(":")
    if not sign or not source or not target:
        raise argparse.ArgumentTypeError(f"'{text}' must be OLD:NEW, as in dog:tiger, several words with commas")
    return tuple(source.split(",")), tuple(target.split(","))


def _assigned(kind: Callable[[str], Any]) -> Callable[[str], tuple[str, Any]]:
    """Return the type of a flag WORD=X."""

    def read(text: str) -> tuple[str, Any]:
        word, sign, value = text.rpartition("=")
        if not sign or not word:
            raise argparse.ArgumentTypeError(f"'{text}' must be WORD=X, as in tiger=2")
        try:
            return word, kind(value)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{value}' in '{text}' is no number") from None

    return read


def run(docstring: str | None, argv: Sequence[str] | None = None, prog: str | None = None) -> list[Path]:
    """Edit what the flags ask for; returns the files written."""
    parser = build_parser(docstring, prog)
    options = parser.parse_strictly(argv)
    log_to_terminal(talkative=["ldm.cli.invert"])
    with parser.sentences(options.debug):
        check_writable(options.outdir, "--outdir")
        return edit_rows(options) if options.csv is not None else _edit(options)


def _edit(options: argparse.Namespace) -> list[Path]:
    if options.inverted is None and options.prompt is None:
        raise ValueError("Say what to edit: CONCEPT (scripts/invert.py makes it), --prompt TEXT to generate, or --csv.")
    if options.target is None:
        raise ValueError("Give the prompt of the edited image: --target TEXT.")
    check_paths({"CONCEPT": [options.inverted], "--image": [options.image]})
    check_weights(model_setup(options, {})["ckpt"])
    edits = edits_of(options)
    concept = None
    if options.inverted is not None:
        from ldm.editing.invert import PROMPT, change_of
        from ldm.embeddings import load_concept

        concept = load_concept(options.inverted)
        change_of(concept)
    source = options.prompt if concept is None else concept.metadata[PROMPT]
    for edit in edits:
        edit.check(source, len(edit.prospect_words or [None]))
    model = load_model(options)
    _load_concepts(model, options)
    sheet = Edits(model, options.outdir, slug(edits[0].target))
    if concept is None:
        steps = 50 if options.steps is None else options.steps
        return sheet.generated(source, edits, options.seed, steps, options.guidance_scale)
    from ldm.editing.invert import check_belongs

    check_belongs(concept, model, options.image, options.prompt, options.steps, options.any_base)
    return sheet.inverted(concept, edits, options.image)


def edits_of(options: argparse.Namespace) -> list[Edit]:
    """Return an edit for each combination of taus.

    Raises:
        ValueError: something that cannot be used.
    """
    names = ("kind", "blend", "subtract", "threshold", "compat", *TAUS)
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    if options.stages:
        if options.stages[0].startswith("preset:"):
            raise ValueError(f"--stages {options.stages[0]} is for generating; here it is RANGE=TEXT.")
        given |= read_stages(options.stages, 10)
    return grid_of(options.target, weights=dict(options.weight), word_taus=dict(options.word_tau), **given)


def _load_concepts(model: Any, options: argparse.Namespace) -> None:
    if options.concept:
        if model.embedding_manager is None:
            raise ValueError("This model has no personalization_config, so concepts cannot be loaded into it.")
        files = concept_files(options.concept, model.facts.placeholder)
        model.embedding_manager.load(files, options.any_base)


class Edits:
    """Makes the edits of one image, and writes each beside a grid of all.

    Args:
        report: called after each step of an edit of an inverted image, in place of a bar.
    """

    def __init__(self, model: Any, folder: Path, stem: str, report: Callable[[int, Any], None] | None = None) -> None:
        self.model, self.folder, self.stem, self.report = model, folder, stem, report

    def inverted(self, concept: Any, edits: Sequence[Edit], image: Path | None) -> list[Path]:
        """Edit an inverted image; the grid shows it, as the autoencoder and the inversion see it, and the edits."""
        from ldm.editing.invert import edit_image, original, rebuilt

        before = {} if image is None else {"image": original(concept, image)}
        before["autoencoder"] = rebuilt(self.model, concept)
        made = (edit_image(self.model, concept, e, progress=self.report is None, report=self.report) for e in edits)
        return self._write(edits, made, before)

    def generated(self, prompt: str, edits: Sequence[Edit], seed: int, steps: int, scale: float | None) -> list[Path]:
        """Edit an image that is generated."""
        from ldm.editing.edit import edit_generated

        made = (edit_generated(self.model, prompt, edit, seed, steps, scale) for edit in edits)
        return self._write(edits, made, {})

    def _write(self, edits: Sequence[Edit], made: Iterable[Any], before: Mapping[str, Any]) -> list[Path]:
        """Write the edits as they come; after Ctrl-C those that are finished are in the grid."""
        from ldm.files.images import label_grid
        from ldm.files.records import save_png

        written, rows, labels = [], [], []
        try:
            for edit, found in zip(edits, made, strict=True):
                written.append(new_file(self.folder / f"{self.stem}-{tau_name(edit)}"))
                save_png(found.image, written[-1], {PNG_KEY: json.dumps(_records(edit)[0])})
                rows.append([*before.values(), found.source, found.image])
                labels.append(tau_name(edit).replace("-", " "))
        finally:
            if rows:
                grid = new_file(self.folder / f"{self.stem}-grid")
                shown = json.dumps(_records(*edits[: len(rows)]))
                save_png(label_grid(rows, labels, [*before, "source", "edit"]), grid, {PNG_KEY: shown})
                written.append(grid)
        return written


def tau_name(edit: Edit) -> str:
    """Return the taus as part of a file's name: v0.5-c0.6-s0.6-u0."""

    def shown(tau: Span) -> str:
        return "to".join(f"{end:g}" for end in (tau if isinstance(tau, tuple) else (tau,)))

    return "-".join(f"{name[-1]}{shown(getattr(edit, name))}" for name in TAUS)


# --- lists of edits --------------------------------------------------------------------------------------------


def edit_rows(options: argparse.Namespace) -> list[Path]:
    """Edit the rows of a file one after the other: one that fails stops no other, one that is finished is not repeated.

    A line tells the result of each.

    Raises:
        ValueError: no row could be edited.
    """
    rows = read_rows(options.csv, options.from_case, options.end_case)
    if not rows:
        raise ValueError(f"'{options.csv}' has no row in the cases asked for.")
    folder = options.outdir / options.csv.stem
    model: Any = None
    written: list[Path] = []
    failed = 0
    for row in rows:
        try:
            edits = row.edits()
            for edit in edits:
                edit.check(row.prompt)
            if is_finished(folder, row, edits, options):
                say(f"case {row.case}: there already")
                continue
            model = model or load_model(options)
            found = edit_row(model, row, edits, folder, options)
            written += found
            say(f"case {row.case}: {len(edits)} edits of '{row.prompt}', {found[-1]}")
        except Exception as error:  # whatever is wrong with one row
            failed += 1
            say(f"case {row.case}: {type(error).__name__ if not str(error) else error}")
    if failed == len(rows):
        raise ValueError("No row could be edited; see above.")
    return written


def is_finished(folder: Path, row: Row, edits: Sequence[Edit], options: argparse.Namespace) -> bool:
    """Return whether what comes of a row is there.

    Raises:
        ValueError: what is there is of other settings, of another image, or not of this program.
    """
    concept = concept_file(folder, row)
    if concept.exists():
        from ldm.editing.invert import refuse_changed

        refuse_changed(concept, row.image, row.prompt, vars(options))
    records = records_of(folder / row_stem(row), edits)
    there = {file: _shows(file) for file in records if file.exists()}
    for file, shows in there.items():
        if not shows or shows != records[file][: len(shows)]:
            raise ValueError(f"'{file}' is there and shows something else; move it away, or use another --outdir.")
    return there == records if edits else concept.exists()


def records_of(stem: Path, edits: Sequence[Edit]) -> dict[Path, list[Any]]:
    """Return the files of edits, with what they show; none without edits."""
    single = {stem.with_name(f"{stem.name}-{tau_name(edit)}.png"): _records(edit) for edit in edits}
    return single | ({stem.with_name(f"{stem.name}-grid.png"): _records(*edits)} if edits else {})


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


def row_stem(row: Row) -> str:
    """Return what the names of a row's images begin with."""
    return f"{row.case}-{slug(row.cells.get('target') or row.prompt)}"


def concept_file(folder: Path, row: Row) -> Path:
    """Return where the concept of a row's image is kept."""
    return folder / "concepts" / f"{row.case}.safetensors"


def edit_row(model: Any, row: Row, edits: Sequence[Edit], folder: Path, options: argparse.Namespace) -> list[Path]:
    """Invert a row's image, where that is not done yet, and edit it; returns the files written."""
    from ldm.editing.invert import check_belongs
    from ldm.embeddings import load_concept, save_new_concept

    check_paths({"image_path": [row.image]})
    file = concept_file(folder, row)
    if file.exists():
        concept = load_concept(file)
        check_belongs(concept, model, row.image, row.prompt, options.steps)
    else:
        concept = invert_options(model, row.image, row.prompt, options, file)
        save_new_concept(concept, file)
    for old in records_of(folder / row_stem(row), edits):  # of a row that was stopped
        old.unlink(missing_ok=True)
    return Edits(model, folder, row_stem(row)).inverted(concept, edits, row.image) if edits else [file]
