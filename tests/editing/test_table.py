"""Lists of edits, and the two commands."""

import json
from pathlib import Path

import pytest
from editing_cases import PROMPT, STAR
from PIL import Image

from ldm.cli import edit, invert
from ldm.editing.table import Row, read_rows
from ldm.embeddings import load_concept

HEADER = ",case_number,prompt,image_path,url,target,blend_word,eq_params,tau_v,tau_c,tau_s,tau_u,edit_type"
BOAT = (
    """0,21,a boat on a lake,boat.jpg,,a canoe on a lake,"[('boat',),('canoe',)]","[('canoe',),(3,)]","[.5,.7,]","""
    """"[.6,]","[.8,]","[.0,.5,]",Replacement"""
)
FAST = ["--steps", "2", "--inner_steps", "1", "--scale", "2.5", "--device", "cpu"]


def row(**cells: str) -> str:
    names = HEADER.split(",")
    return ",".join(f'"{cells[n]}"' if n in cells else "" for n in names)


def write(folder: Path, *lines: str) -> Path:
    file = folder / "edits.csv"
    file.write_text("\n".join((HEADER, *lines)) + "\n", encoding="utf-8")
    return file


def test_cells_of_the_reference(tmp_path: Path) -> None:
    (only,) = read_rows(write(tmp_path, BOAT))
    edits = only.edits()
    assert [(e.tau_v, e.tau_u) for e in edits] == [(0.5, 0.0), (0.5, 0.5), (0.7, 0.0), (0.7, 0.5)]
    first = edits[0]
    assert (first.tau_c, first.tau_s, first.kind) == (0.6, 0.8, "replace")
    assert first.blend == (("boat",), ("canoe",)) and first.weights == {"canoe": 3}
    assert Row(1, "a", Path("x"), {}).edits() == []  # a list for training


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"tau_v": "__import__('os')"}, "tau_v must be a Python literal such as"),
        ({"edit_type": "Swap"}, "kind must be one of replace, refine, not 'Swap'"),
        ({"eq_params": "[('a','b'),(1,)]"}, "eq_params must be"),
        ({"eq_params": "5"}, "eq_params must be"),
        ({"eq_params": "[([1],),(2,)]"}, "eq_params must be"),
        ({"eq_params": "[('dog',),(True,)]"}, "The weight of 'dog' must be a number, not True"),
        ({"tau_c": "9" * 400}, "tau_c must be in 0..1"),
        ({"tau_c": "[" * 5000}, "tau_c must be a Python literal such as .*, not '.{60}…'"),
        ({"tau_c": "-" * 50_000 + "1"}, "tau_c must be a Python literal"),
        ({"tau_c": "[]"}, "a grid of 0 edits; give 1 to 1000"),
        (dict.fromkeys(("tau_v", "tau_c", "tau_s", "tau_u"), str([0.1] * 300)), "a grid of 8100000000 edits"),
        ({"blend_word": "[1,2]"}, "blend must be words of the source and words of the target, not 1, 2"),
    ],
)
def test_bad_cells(cells: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Row(1, "a cat", Path("x"), {"target": "a dog"} | cells).edits()


def test_ranges_and_missing_columns(tmp_path: Path) -> None:
    lines = [row(case_number=str(n), prompt="a", image_path="x.png") for n in (3, 1, 2)]
    file = write(tmp_path, *lines)
    assert [r.case for r in read_rows(file, 1, 3)] == [1, 2]
    file.write_text("prompt\na\n", encoding="utf-8")
    with pytest.raises(ValueError, match="has no column case_number, image_path"):
        read_rows(file)
    for cells, message in (
        ({"case_number": "9" * 5000, "image_path": "x"}, "line 2: case_number must be a whole number, .* not '9{60}…'"),
        ({"case_number": "1"}, "line 2: .* image_path an image's, not '1' and ''"),
    ):
        with pytest.raises(ValueError, match=message):
            read_rows(write(tmp_path, row(**cells)))


def test_rows_are_isolated_and_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edits = {"prompt": PROMPT, "image_path": str(STAR), "tau_v": "[.2,.5]", "tau_c": "[1]"}
    file = write(
        tmp_path,
        row(case_number="1", target="a dotted blue star", **edits),
        row(case_number="2", target="a star", **edits),
        row(case_number="3", target="a dotted red heart", **(edits | {"image_path": "missing.png"})),
        row(case_number="4", target="a dotted red heart's", **edits),
    )
    argv = ["--csv", str(file), "--outdir", str(tmp_path), *FAST]
    edit.run(argv)
    said = capsys.readouterr().out.splitlines()  # the files follow
    assert (
        said[4] == str(tmp_path / "edits/1-a-dotted-blue-star-v0.2-c1-s0.6-u0.png")
        and said[0].startswith("case 1: 2 edits")
        and said[3].startswith("case 4: 2 edits")
    )
    assert "as many words" in said[1] and "missing.png" in said[2]
    made = sorted((tmp_path / "edits").glob("*.png"))
    assert len(made) == 6 and (tmp_path / "edits/concepts/1.safetensors").exists()
    stamps = [path.stat().st_mtime_ns for path in made]
    edit.run(argv)
    assert capsys.readouterr().out.splitlines()[0] == "case 1: there already"
    assert stamps == [path.stat().st_mtime_ns for path in made]
    for change, message in (
        (["--inner_steps", "2"], "concepts/1.safetensors' was inverted with another inner_steps (1, not 2); use "),
        (["--method", "null-text"], "was inverted with another method"),
    ):
        with pytest.raises(SystemExit):
            edit.run([*argv, "--end_case", "2", *change])
        assert message in capsys.readouterr().out
    file.write_text(file.read_text("utf-8").replace("[.2,.5]", "[.2]"), encoding="utf-8")
    (tmp_path / "edits/1-a-dotted-blue-star-mine.png").write_text("mine")
    with pytest.raises(SystemExit):
        edit.run([*argv, "--end_case", "2"])
    assert "1-a-dotted-blue-star-grid.png' is there and shows something else" in capsys.readouterr().out
    assert (tmp_path / "edits/1-a-dotted-blue-star-mine.png").read_text() == "mine"


def test_a_row_without_an_image_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = {"case_number": "1", "prompt": PROMPT, "target": "a dotted blue star", "image_path": __file__}
    argv = ["--csv", str(write(tmp_path, row(**cells))), "--outdir", str(tmp_path / "out"), *FAST]
    with pytest.raises(SystemExit):
        edit.run(argv)
    assert " could be edited; see above" in capsys.readouterr().err and not (tmp_path / "out").exists()


MASK = ["--mask", "star"]


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    concept = tmp_path / "star.safetensors"
    files = invert.run([str(STAR), "--prompt", PROMPT, "--out", str(concept), "--mask", "star", *FAST])
    (tmp_path / "star.unmade-star-background.png").write_text("mine")
    assert files == [concept, tmp_path / "star-star-foreground.png", tmp_path / "star-star-background.png"]
    assert load_concept(concept).metadata["inversion.prompt"] == PROMPT
    with pytest.raises(SystemExit):
        invert.run([str(STAR), "--prompt", PROMPT, "--out", str(tmp_path / "star.unmade.safetensors"), *MASK])
    assert "star.unmade-star-background.png' is there already; use --force" in capsys.readouterr().err
    argv = [str(concept), "--target", "a dotted blue star", "--tau_v", ".2", ".1:.5", "--weight", "blue=2"]
    argv += ["--blend", "star:star", "--word_tau", "blue=.2", "--image", str(STAR)]
    first, second, grid = edit.run([*argv, "--outdir", str(tmp_path), "--device", "cpu"])
    with Image.open(second) as image:
        said = json.loads(image.text["prospect-edit"])
    assert said["tau_v"] == [0.1, 0.5] and said["weights"] == {"blue": 2.0}
    assert Image.open(grid).width > 4 * 128 and Image.open(first).size == (128, 128)
    generated = ["--prompt", "a red heart", "--target", "a blue heart", "--outdir", str(tmp_path), *FAST]
    assert len(edit.run(generated)) == 2
    capsys.readouterr()


CONCEPT = "models/demo/concepts/dotted-star.safetensors"
REFUSED = [
    (edit, "", "Say what to edit, CONCEPT"),
    (edit, "--prompt a", "Say what to edit, CONCEPT"),
    (edit, "missing.safetensors --target a", "There is no file 'missing.safetensors', given with CONCEPT"),
    (edit, "--prompt a --target b --tau_c x", "neither a number nor START:END"),
    (edit, "--prompt a --target b --word_tau =.2", "'=.2' must be WORD=X"),
    (edit, "--prompt a --target b --blend dog", "must be OLD:NEW"),
    (edit, "--prompt a --target b --weight dog", "must be WORD=X"),
    (edit, "--prompt a --target b --weight dog=2", "'dog' is no word of the prompt 'b'"),
    (edit, f"{CONCEPT} --target a", "edits no image; make one: scripts/invert.py"),
    (edit, "--csv missing.csv", "There is no CSV file 'missing.csv'"),
    (invert, "missing.png --prompt a", "There is no file 'missing.png'"),
    (invert, f"{STAR} --prompt a --mask dog", "--mask: 'dog' is no word"),
    (invert, f"{STAR} --prompt a --out x.png", "must end in .safetensors"),
    (invert, f"{STAR} --prompt a --import x.pth", "--import needs what the networks read"),
    (invert, f"{STAR} --prompt a --import {CONCEPT} --clip models", "star.safetensors': it holds no mapping networks"),
    (invert, f"{STAR} --prompt a --method ddim", "invalid choice: 'ddim'"),
]


@pytest.mark.parametrize(("command", "flags", "message"), REFUSED)
def test_refused(command: object, flags: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        command.run(flags.split())  # type: ignore[attr-defined]
    said = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and message in said.splitlines()[-1]
