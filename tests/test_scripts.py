"""`scripts/txt2img.py` and `scripts/img2img.py`: what they write, repeat, and refuse."""

import ast
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import ldm.generate
from ldm.cli import sample as commands
from ldm.cli import train as cli
from ldm.conditioning.presets import preset, presets_beside
from ldm.embeddings import Concept, load_concept, save_concept, save_stages
from ldm.generate import read_parameters
from ldm.models.diffusion.ddpm import LatentDiffusion
from scripts import demo

ROOT = Path(__file__).parents[1]
CONTENT = "models/demo/references/dotted-star/dotted-star.png"
SMALL = ["--steps", "3", "--height", "32", "--width", "32", "--device", "cpu"]


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default configuration and checkpoint are found from there."""
    monkeypatch.chdir(ROOT)


@pytest.fixture
def concept_file(tmp_path: Path) -> Path:
    path = tmp_path / "concept.safetensors"
    save_concept(Concept(torch.randn(10, 128, generator=torch.Generator().manual_seed(1))), path)
    return path


def program(script: str, *flags: str, python: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run a script the way a user does."""
    command = [sys.executable, *python, f"scripts/{script}.py", *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, check=False, timeout=120)


def txt2img(*flags: object) -> list[Path]:
    return commands.run("Generate.", argv=[*SMALL, *map(str, flags)])


def img2img(*flags: object) -> list[Path]:
    return commands.run("Edit.", editing=True, argv=[*SMALL, *map(str, flags)])


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path), np.int64)


# As programs


@pytest.mark.parametrize("script", ["txt2img", "img2img"])
def test_help_imports_nothing_heavy(script: str) -> None:
    result = program(script, "--help", python=("-X", "importtime"))
    assert result.returncode == 0
    assert "ldm.prompts.joint" in result.stdout
    assert "--words FILE" in result.stdout and f"python scripts/{script}.py --" in result.stdout
    assert ("--strength" in result.stdout) == (script == "img2img")
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "ldm.cli.sample" in imported
    assert not imported & {"torch", "numpy", "omegaconf", "PIL", "transformers", "pytorch_lightning"}


@pytest.mark.parametrize("script", ["txt2img", "img2img"])
def test_the_scripts_are_short(script: str) -> None:
    assert len((ROOT / f"scripts/{script}.py").read_text(encoding="utf-8").splitlines()) < 100


@pytest.mark.parametrize("script", ["txt2img", "img2img"])
def test_the_examples_name_files_that_ship(script: str) -> None:
    examples = ast.get_docstring(ast.parse((ROOT / f"scripts/{script}.py").read_text(encoding="utf-8")))
    named = re.findall(r"--(?:concept|content) (\S+)", examples)
    assert named and all((ROOT / path).is_file() for path in named)


def test_txt2img_as_a_program(tmp_path: Path) -> None:
    result = program("txt2img", "--prompt", "a red star", "--steps", "3", "--outdir", str(tmp_path / "out"))
    assert (result.returncode, result.stdout) == (0, f"{tmp_path / 'out' / 'a-red-star-42.png'}\n")
    assert Image.open(result.stdout.strip()).size == (128, 128)  # what the small model was trained at
    assert read_parameters(result.stdout.strip())["scale"] == 2.5  # what its configuration samples with


def test_img2img_as_a_program_and_a_mistake(tmp_path: Path) -> None:
    flags = [*SMALL, "--content", CONTENT, "--prompt", "a heart", "--outdir", str(tmp_path), "--strength", "0.7"]
    result = program("img2img", *flags)
    assert (result.returncode, result.stdout) == (0, f"{tmp_path / 'a-heart-42.png'}\n")
    result = program("img2img", "--contents", CONTENT)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "img2img.py: error: unknown argument '--contents'; did you mean --content?\n"


# What is written


def test_pictures_in_a_row(tmp_path: Path) -> None:
    paths = txt2img("--prompt", "a star", "--n_samples", 3, "--n_rows", 1, "--outdir", tmp_path)
    assert Image.open(paths[0]).size == (32, 96) and read_parameters(paths[0])["n_rows"] == 1
    assert (pixels(paths[0]) == np.concatenate([pixels(path) for path in paths[1:]])).all()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    first = txt2img("--prompt", "a star", "--seed", 7, "--outdir", tmp_path)
    before = first[0].read_bytes()
    second = txt2img("--prompt", "a star", "--seed", 7, "--outdir", tmp_path, "--steps", 2)
    assert [path.name for path in first + second] == ["a-star-7.png", "a-star-7-2.png"]
    assert first[0].read_bytes() == before != second[0].read_bytes()


def test_several_pictures_come_as_a_grid_and_alone(tmp_path: Path) -> None:
    flags = ("--prompt", "a star", "--seed", 7, "--n_samples", 2, "--n-iter", 2, "--outdir", tmp_path)
    paths = txt2img(*flags)
    assert [path.name for path in paths] == ["a-star-7-grid.png", *(f"a-star-{seed}.png" for seed in (7, 8, 9, 10))]
    grid, *alone = map(pixels, paths)
    assert (grid == np.block([[[alone[0]], [alone[1]]], [[alone[2]], [alone[3]]]])).all()
    again = txt2img("--from", paths[3], "--outdir", tmp_path)
    assert np.abs(pixels(again[0]) - alone[2]).max() <= 1 < np.abs(alone[2] - alone[0]).max()


def stop_after(batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Press Ctrl-C when so many batches are finished."""
    decode, calls = LatentDiffusion.decode_first_stage, iter(range(batches))

    def stop_or_decode(model: LatentDiffusion, latents: torch.Tensor) -> torch.Tensor:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return decode(model, latents)

    monkeypatch.setattr(LatentDiffusion, "decode_first_stage", stop_or_decode)


@pytest.mark.parametrize(("samples", "kept"), [(2, "and the 4 pictures in it are kept"), (1, "the 2 pictures")])
def test_ctrl_c_keeps_the_batches_that_are_finished(
    samples: int, kept: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--prompt", "a star", "--n_samples", samples, "--n_iter", 5, "--outdir", tmp_path)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        stop_after(2, patch)
        txt2img(*flags)
    grid = tmp_path / "a-star-42-grid.png"
    said = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 130 and f"stopped by Ctrl-C; what was finished, '{grid}', " in said and kept in said
    assert len(list(tmp_path.iterdir())) == 1 + 2 * samples
    assert read_parameters(grid)["n_iter"] == 2
    again = txt2img("--from", grid, "--outdir", tmp_path / "again")
    assert [(tmp_path / path.name).read_bytes() for path in again] == [path.read_bytes() for path in again]


def test_ctrl_c_after_one_picture_keeps_it_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stop_after(1, monkeypatch)
    with pytest.raises(SystemExit):
        txt2img("--prompt", "a star", "--n_iter", 5, "--outdir", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a-star-42.png"]
    assert (
        capsys.readouterr().err.splitlines()[-1].endswith(f"what was finished, '{tmp_path / 'a-star-42.png'}', is kept")
    )


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGINT for one process")
def test_ctrl_c_as_a_user_presses_it(tmp_path: Path) -> None:
    command = [sys.executable, "scripts/txt2img.py", "--prompt", "a star", *SMALL, "--n_iter", "100000"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    started = subprocess.Popen(
        [*command, "--outdir", str(tmp_path)], stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )
    seen = b""
    while b"| 7" not in seen and started.poll() is None:  # steps of three batches
        seen += started.stderr.read(1)
    started.send_signal(signal.SIGINT)
    output, errors = started.communicate(timeout=60)
    last = errors.decode().split("\r")[-1].strip()
    assert (started.returncode, output) == (130, b"") and "Traceback" not in errors.decode()
    assert last.startswith("txt2img.py: stopped by Ctrl-C; what was finished, ")
    finished = read_parameters(tmp_path / "a-star-42-grid.png")["n_iter"]
    assert 2 <= finished == len(list(tmp_path.iterdir())) - 1


def test_ctrl_c_before_anything_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stop_after(0, monkeypatch)
    with pytest.raises(SystemExit) as ended:
        txt2img("--prompt", "a star", "--outdir", tmp_path / "out")
    assert ended.value.code == 130 and not (tmp_path / "out").exists()
    assert capsys.readouterr().err.splitlines()[-1].endswith(": stopped by Ctrl-C")


@pytest.mark.parametrize("editing", [False, True])
def test_from_repeats_a_picture(tmp_path: Path, concept_file: Path, editing: bool) -> None:
    run = img2img if editing else txt2img
    flags = ["--content", CONTENT, "--strength", 0.8, "--resize", "pad"] if editing else ["--n_samples", 2]
    flags += ["--concept", f"<it>={concept_file}", "--preset", "layout", "--prompt", "a <it> star", "--seed", 3]
    first = run(*flags, "--eta", 0.5, "--scale", 1.5, "--dtype", "bfloat16", "--outdir", tmp_path / "a")
    script = commands.run("Again.", editing=editing, argv=["--from", str(first[0]), "--outdir", str(tmp_path / "b")])
    assert len(script) == len(first) == (1 if editing else 3)
    for old, new in zip(first, script, strict=True):
        assert (pixels(old) == pixels(new)).all()
        assert read_parameters(old) == read_parameters(new)
    words = read_parameters(first[0])["prospect_words"]
    measured = presets_beside(ROOT / "models/demo/model.safetensors")["layout"]
    assert words == ["a <it> star" if stage in measured else "a star" for stage in range(10)]


def test_flags_change_what_from_repeats(tmp_path: Path) -> None:
    first = txt2img("--prompt", "a star", "--outdir", tmp_path)[0]
    other = txt2img("--from", first, "--seed", 5, "--outdir", tmp_path)[0]
    old, new = read_parameters(first), read_parameters(other)
    assert {key for key in old if old[key] != new[key]} == {"seed"}
    assert np.abs(pixels(first) - pixels(other)).max() > 1


HEART = "a large * heart on black"


@pytest.fixture
def material(tmp_path: Path, concept_file: Path) -> Path:
    """A picture made with a concept, a preset and a prompt."""
    flags = ("--concept", concept_file, "--preset", "material", "--prompt", HEART, "--outdir", tmp_path)
    return txt2img(*flags)[0]


def wanted_words(attribute: str, prompt: str) -> list[str]:
    return preset(attribute, prompt, windows=presets_beside(ROOT / "models/demo/model.safetensors"))


def test_a_preset_is_for_one_concept(tmp_path: Path, concept_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    flags = ["--concept", f"<a>={concept_file}", "--concept", f"<b>={concept_file}", "--preset", "layout"]
    record = read_parameters(txt2img(*flags, "--prompt", "a <b> star", "--outdir", tmp_path)[0])
    assert record["prospect_words"] == [word.replace("*", "<b>") for word in wanted_words("layout", "a * star")]
    assert [message.partition(";")[0] for message in caplog.messages] == [
        "--preset takes layout from '<b>' alone",
        "The concept '<a>' has no effect: write <a> into the prompt where it belongs.",
    ]


def test_a_preset_is_in_the_file_name(tmp_path: Path, material: Path) -> None:
    other = txt2img("--from", material, "--preset", "layout", "--outdir", tmp_path)[0]
    again = txt2img("--from", material, "--outdir", tmp_path)[0]
    assert material.name == "a-large-heart-on-black-material-42.png"
    assert other.name == "a-large-heart-on-black-layout-42.png"
    assert again.name == "a-large-heart-on-black-material-42-2.png"
    strange = older(material, preset="../up", preset_prompt=HEART)
    assert txt2img("--from", strange, "--outdir", tmp_path)[0].name == "a-large-heart-on-black--up-42.png"
    unreadable = older(material, preset=[1])
    assert txt2img("--from", unreadable, "--outdir", tmp_path)[0].name == "a-large-heart-on-black-42.png"


def test_from_with_another_preset_keeps_the_prompt(tmp_path: Path, material: Path) -> None:
    other = read_parameters(txt2img("--from", material, "--preset", "layout", "--outdir", tmp_path)[0])
    assert (other["prompt"], other["prospect_words"]) == ("*", wanted_words("layout", HEART))
    assert (other["preset"], other["preset_prompt"]) == ("layout", HEART)


def test_from_with_another_prompt_keeps_the_preset(tmp_path: Path, material: Path) -> None:
    other = txt2img("--from", material, "--prompt", "a small * star", "--outdir", tmp_path)[0]
    record = read_parameters(other)
    assert (record["prompt"], record["prospect_words"]) == ("*", wanted_words("material", "a small * star"))
    again = txt2img("--from", other, "--outdir", tmp_path)[0]
    assert read_parameters(again) == record and (pixels(again) == pixels(other)).all()
    (tmp_path / "prompt.yaml").write_text("prompt: a plain * ring\n")
    record = read_parameters(txt2img("--from", other, "--words", tmp_path / "prompt.yaml", "--outdir", tmp_path)[0])
    assert record["prospect_words"] == wanted_words("material", "a plain * ring")


def test_from_with_words_takes_the_place_of_the_preset(tmp_path: Path, material: Path) -> None:
    flags = [flag for word in ["dotted", *"*********"] for flag in ("--word", word)]
    record = read_parameters(txt2img("--from", material, *flags, "--outdir", tmp_path)[0])
    assert (record["prompt"], record["prospect_words"]) == (HEART, ["dotted", *"*********"])
    assert not {"preset", "preset_prompt"} & record.keys()


def older(picture: Path, **changes: object) -> Path:
    """The picture with the record of an older version."""
    new = ("preset", "preset_prompt", "concept_hashes")
    record = {key: value for key, value in read_parameters(picture).items() if key not in new} | changes
    with Image.open(picture) as opened:
        old = opened.copy()
    old.info = {ldm.generate.PNG_KEY: json.dumps(record)}
    ldm.generate.save_picture(old, picture.with_name("old.png"))
    return picture.with_name("old.png")


def test_an_older_record_repeats_and_is_not_mixed(
    tmp_path: Path, material: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = older(material)
    assert (pixels(txt2img("--from", old, "--outdir", tmp_path)[0]) == pixels(material)).all()
    for flags in (["--prompt", "a * star"], ["--preset", "layout"]):
        sentence = refusal(False, [*SMALL, "--from", str(old), *flags], capsys)
        assert "does not say what its words were made of" in sentence and "give --prompt with --preset" in sentence
    both = ("--prompt", "a * star", "--preset", "layout")
    record = read_parameters(txt2img("--from", old, *both, "--outdir", tmp_path)[0])
    assert record["prospect_words"] == wanted_words("layout", "a * star")
    # words that stand inside a prompt of their own can stand in another one
    old = older(material, prompt="one *")
    record = read_parameters(txt2img("--from", old, "--prompt", "two *", "--outdir", tmp_path)[0])
    assert (record["prompt"], record["prospect_words"]) == ("two *", wanted_words("material", HEART))


def test_a_record_whose_preset_is_no_text(material: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = older(material, preset=["layout"], preset_prompt=3)
    assert "has no readable preset" in refusal(False, ["--from", str(changed), "--prompt", "a * star"], capsys)


def test_from_says_where_a_concept_is_another_file_now(
    tmp_path: Path, material: Path, concept_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = older(material)
    txt2img("--from", material, "--outdir", tmp_path)
    assert caplog.messages == []
    save_concept(Concept(torch.ones(10, 128)), concept_file)
    changed = txt2img("--from", material, "--outdir", tmp_path)[0]
    sentence = f"The concept '*' ({concept_file}) is another file than the one that the picture was made with."
    assert caplog.messages == [sentence]
    caplog.clear()
    txt2img("--from", changed, "--outdir", tmp_path)
    txt2img("--from", old, "--outdir", tmp_path)
    shutil.copy(concept_file, tmp_path / "other.safetensors")
    txt2img("--from", material, "--concept", tmp_path / "other.safetensors", "--outdir", tmp_path)
    assert caplog.messages == []


def test_from_says_where_the_content_shows_something_else_now(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = tmp_path / "content.png"
    Image.new("RGB", (64, 64), "red").save(content)
    (edited,) = img2img("--prompt", "a star", "--content", content, "--outdir", tmp_path)
    Image.open(content).save(content, compress_level=0)  # other bytes, the same pixels
    img2img("--from", edited, "--outdir", tmp_path)
    assert caplog.messages == []
    Image.new("RGB", (64, 64), "blue").save(content)
    img2img("--from", edited, "--outdir", tmp_path)
    assert caplog.messages == [f"The content picture '{content}' is another than the one that was edited."]
    caplog.clear()
    img2img("--from", edited, "--content", tmp_path / edited.name, "--outdir", tmp_path)
    assert caplog.messages == []


def test_any_base_is_said_once_and_repeated(tmp_path: Path) -> None:
    other = Concept(torch.zeros(10, 128), {"base_model": "sd-v1-4.ckpt", "base_model_sha256": "0" * 64})
    save_concept(other, tmp_path / "other.safetensors")
    flags = ["--prompt", "a *", "--concept", tmp_path / "other.safetensors", "--outdir", tmp_path]
    first = txt2img(*flags, "--any-base")[0]
    again = txt2img("--from", first, "--outdir", tmp_path)[0]
    assert read_parameters(again)["any_base"] is True and (pixels(first) == pixels(again)).all()


# Concepts as files


def test_a_concept_in_the_home_folder(tmp_path: Path, concept_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    picture = txt2img("--prompt", "a <v>", "--concept", f"<v>=~/{concept_file.name}", "--outdir", tmp_path)[0]
    assert read_parameters(picture)["concepts"] == {"<v>": str(concept_file)}


def test_a_folder_of_stage_files_is_a_concept(tmp_path: Path, concept_file: Path) -> None:
    save_stages(load_concept(concept_file), tmp_path, "star")
    files = [txt2img("--prompt", "a *", "--concept", f"*={c}", "--outdir", tmp_path) for c in (concept_file, tmp_path)]
    assert (pixels(files[0][0]) == pixels(files[1][0])).all()


def test_import_as_a_program_and_its_mistakes(tmp_path: Path, concept_file: Path) -> None:
    paths = save_stages(load_concept(concept_file), tmp_path, "star")
    out = tmp_path / "new" / "back.safetensors"
    result = program("import_embedding", *map(str, paths[::-1]), "--out", str(out))
    assert (result.returncode, result.stdout) == (0, f"{out}: 10 stages of width 128\n"), result.stderr
    back, original = load_concept(out), load_concept(concept_file)
    assert torch.equal(back.vectors, original.vectors) and back.metadata == original.metadata
    result = program("import_embedding", str(paths[0]), "--out", str(out))
    assert result.returncode == 2 and "is there already; name another file, or say --force" in result.stderr
    save_file({"<a>": torch.zeros(2, 4), "<b>": torch.ones(2, 4)}, tmp_path / "two.safetensors")
    flags = ["import_embedding", str(tmp_path / "two.safetensors"), "--out", str(out), "--force", "--rows_are_stages"]
    result = program(*flags)
    assert (result.returncode, result.stdout) == (2, "") and "holds 2 embeddings (<a>, <b>)" in result.stderr
    result = program(*flags, "--key", "<b>", "--placeholder", "<*>")
    assert result.returncode == 2 and "The placeholder '<*>' must not contain '*'" in result.stderr
    assert program(*flags, "--key", "<b>", "--placeholder", "<x>").returncode == 0
    assert load_concept(out).vectors.eq(1).all() and load_concept(out).metadata["placeholder"] == "<x>"


def test_mix_as_a_program(tmp_path: Path, concept_file: Path) -> None:
    save_concept(Concept(torch.ones(1, 128)), tmp_path / "one.safetensors")
    flags = [
        "mix_concepts",
        str(concept_file),
        str(tmp_path / "one.safetensors"),
        "--out",
        str(tmp_path / "m.safetensors"),
    ]
    assert program(*flags, "--weight", "0.25").stdout == f"{flags[-1]}: 10 stages of width 128\n"
    mixed = load_concept(flags[-1])
    expected = load_concept(concept_file).lerp(load_concept(tmp_path / "one.safetensors"), 0.25)
    assert torch.equal(mixed.vectors, expected.vectors)
    assert mixed.metadata["mixed"] == "0.75 concept.safetensors + 0.25 one.safetensors"
    result = program(*flags, "--weight", "2", "--force")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1) and "must be in 0..1, not 2.0" in result.stderr


def test_the_diffusers_folder_is_not_overwritten(tmp_path: Path) -> None:
    result = program("make_diffusers_folder", str(tmp_path))
    assert (result.returncode, result.stderr.count("\n")) == (2, 1) and "is there already" in result.stderr


# Where the words come from


def test_words_from_a_list(tmp_path: Path) -> None:
    (tmp_path / "words.yaml").write_text("- a dotted star\n- 3\n- null\n" + "- '*'\n" * 7, encoding="utf-8")
    path = txt2img("--words", tmp_path / "words.yaml", "--outdir", tmp_path)[0]
    parameters = read_parameters(path)
    assert path.name == "a-dotted-star-42.png"
    assert parameters["prompt"] == "*"
    assert parameters["prospect_words"] == ["a dotted star", 3, None] + ["*"] * 7


def test_words_from_repeated_flags(tmp_path: Path) -> None:
    flags = [flag for word in ["a star", "9", "", *"*******"] for flag in ("--word", word)]
    parameters = read_parameters(txt2img("--prompt", "on white *", *flags, "--outdir", tmp_path)[0])
    assert parameters["prompt"] == "on white *"
    assert parameters["prospect_words"] == ["a star", 9, ""] + ["*"] * 7


def test_a_mapping_gives_any_argument_and_flags_win(tmp_path: Path, concept_file: Path) -> None:
    (tmp_path / "all.yaml").write_text(
        f"prompt: a * star\nddim_steps: 2\nseed: 5\nscale: 3\nconcepts: {{'*': '{concept_file}'}}\n", encoding="utf-8"
    )
    argv = ["--words", str(tmp_path / "all.yaml"), "--seed", "6", "--outdir", str(tmp_path)]
    parameters = read_parameters(commands.run("", argv=argv)[0])
    expected = {"prompt": "a * star", "ddim_steps": 2, "seed": 6, "scale": 3, "concepts": {"*": str(concept_file)}}
    assert {name: parameters[name] for name in expected} == expected


# What is refused, in one sentence and before the weights are read

REFUSED: list[tuple[bool, str, str]] = [
    # (editing, flags with {tmp} for a folder, part of the sentence)
    (False, "--prompt a --stepz 3", "unknown argument '--stepz'; did you mean --steps?"),
    (False, "--prompt a --strength 0.5", "unknown argument '--strength'"),
    (False, "--prompt a LICENSE Makefile dog", "unknown argument 'LICENSE', which is a file: put the prompt in quotes"),
    (False, "--prompt a configs", "put the prompt in quotes"),  # though --config is like it
    (False, "LICENSE", "unknown argument 'LICENSE'; see --help"),
    (
        False,
        "--prompt a --concept {tmp}/run",
        "run': this is the folder of a run; its concept is '{tmp}/run/checkpoints/embeddings.safetensors'.",
    ),
    (False, "--prompt a --concept {tmp}/run/checkpoints", "'{tmp}/run/checkpoints/embeddings.safetensors'."),
    (False, "--prompt a --concept {tmp}/run/checkpoints/last.ckpt", "'{tmp}/run/checkpoints/embeddings.safetensors'."),
    (False, "--prompt a --concept {tmp}/run/configs", "this is a folder; it must have the stage files"),
    (False, "--prompt a stray", "unknown argument 'stray'"),
    (False, "", "Say what to show: --prompt TEXT, or --words FILE."),
    (False, "--prompt a --prompt b", "--prompt is given twice; for other pictures run the command again"),
    (False, "--prompt a --n_rows -1", "n_rows must be at least 1, or 0 for as square as possible, not -1."),
    (False, "--prompt a --steps 0", "ddim_steps must be in 1..1000, not 0."),
    (False, "--prompt a --steps many", "argument --steps: invalid int value: 'many'"),
    (False, "--prompt a --width 100", "width must be a multiple of 32 for this model, not 100; nearest: 96."),
    (False, "--prompt a --eta -1", "ddim_eta must not be negative, but is -1.0."),
    (False, "--prompt a --eta 1 --sampler plms", "PLMS is deterministic"),
    (False, "--prompt a --sampler euler", "Unknown sampler 'euler'; there are ddim, plms."),
    (False, "--prompt a --preset mood", "Unknown preset 'mood'; there are content, layout, material, style."),
    (False, "--prompt a --preset style --word b", "not allowed with argument"),
    (False, "--word a --word b", "prospect_words has 2 entries, but this model has 10 stages"),
    (False, "--words {tmp}/none.yaml", "none.yaml'; check the path given with --words."),
    (False, "--words {tmp}/star.yaml", "an entry that begins with * needs quotes."),
    (False, "--words {tmp}/unknown.yaml", "main has no argument 'sead'; did you mean 'seed'?"),
    (False, "--words {tmp}/scalar.yaml", "must hold a YAML list with one entry for each stage"),
    (False, "--words {tmp}/typed.yaml", "ddim_steps must be a whole number, not 'few'."),
    (False, "--words {tmp}/prompt.yaml", "prompt must be a text, not 3; in YAML, put it in quotes."),
    (False, "--words {tmp}/concepts.yaml", "concepts must be {name: file}, not ['x']"),
    (False, "--prompt a --concept {tmp}/none.pt", "none.pt': there is no such file"),
    (False, "--prompt a --concept b=c --concept b=d", "give every concept a name of its own"),
    (False, "--prompt a --concept {tmp}/wide.safetensors", "was learned for another base model."),
    (
        False,
        "--prompt a --concept {tmp}/other.safetensors",
        "'sd-v1-4.ckpt' (SHA-256 0000000000…), but this is 'model.",
    ),
    (False, "--prompt a --negative_prompt * --steps 1", "negative_prompt has the placeholder '*'"),
    (False, "--prompt a --negative_prompt <b> --concept <b>=models/demo/concepts/dotted-star.safetensors", "'<b>'"),
    (False, "--prompt a --config none.yaml", "'none.yaml'; check the path given with --config."),
    (False, "--prompt a --dtype int8", "frozen_dtype must be one of float32, float16, bfloat16, not 'int8'."),
    (False, "--prompt a --device tpu", "'tpu' is none of cpu, mps, cuda"),
    (False, "--prompt a --outdir {tmp}/star.yaml", "star.yaml' is a file; give a folder with --outdir."),
    (False, "--from {tmp}/none.png", "none.png'; check the path given with --from."),
    (False, "--from models/demo/references/dotted-star/dotted-star.png", "has no ProSpect parameters"),
    (False, "--from {tmp}/edited.png", "use scripts/img2img.py"),
    (False, "--from {tmp}/foreign.png", "was made with the model 'sd-v1-4.ckpt'; give it with --ckpt and --config."),
    (True, "--prompt a", "Give the picture to edit with --content FILE"),
    (True, "--content {tmp}/none.png", "There is no file"),
    (True, "--content {tmp}/star.yaml", "is no picture that Pillow can read"),
    (True, "--content models/demo/references/dotted-star/dotted-star.png --strength 2", "strength must be in 0..1"),
    (True, "--content models/demo/references/dotted-star/dotted-star.png --resize fit", "Unknown resize 'fit'"),
]


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    texts = {
        "star": "- * star\n",
        "unknown": "sead: 3\n",
        "scalar": "a star\n",
        "typed": "{prompt: a, ddim_steps: few}\n",
        "prompt": "prompt: 3\n",
        "concepts": "{prompt: a, concepts: [x]}\n",
    }
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    save_concept(Concept(torch.zeros(10, 768)), folder / "wide.safetensors")
    for part in ("checkpoints", "configs"):
        (folder / "run" / part).mkdir(parents=True)
    for name in ("embeddings", "embeddings_gs-100"):
        save_concept(Concept(torch.zeros(10, 128)), folder / "run/checkpoints" / f"{name}.safetensors")
    torch.save({"state_dict": {}}, folder / "run/checkpoints/last.ckpt")
    origin = {"base_model": "sd-v1-4.ckpt", "base_model_sha256": "0" * 64}
    save_concept(Concept(torch.zeros(10, 128), origin), folder / "other.safetensors")
    for name, record in {
        "edited": '{"prompt": "a", "content_dir": "a.png", "base_model": "model.safetensors"}',
        "foreign": '{"prompt": "a", "base_model": "sd-v1-4.ckpt"}',
    }.items():
        picture = Image.new("RGB", (8, 8))
        picture.info[ldm.generate.PNG_KEY] = record
        ldm.generate.save_picture(picture, folder / f"{name}.png")
    return folder


def refusal(editing: bool, flags: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The sentence on standard error with which the program ends."""
    with pytest.raises(SystemExit) as ended:
        commands.run("Try.", editing=editing, argv=flags)
    output = capsys.readouterr()
    assert (ended.value.code, output.out) == (2, "")
    assert output.err.count("\n") == 1 and ": error: " in output.err
    return output.err


@pytest.mark.parametrize(("editing", "flags", "sentence"), REFUSED, ids=[flags for _, flags, _ in REFUSED])
def test_refused(
    bad_files: Path,
    editing: bool,
    flags: str,
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ldm.generate, "load_model_from_config", lambda *_, **__: pytest.fail("the weights were read"))
    assert sentence.replace("{tmp}", str(bad_files)) in refusal(editing, flags.format(tmp=bad_files).split(), capsys)


def test_a_missing_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "none.ckpt" in refusal(False, ["--prompt", "a", "--ckpt", str(tmp_path / "none.ckpt")], capsys)


def test_debug_shows_the_trace() -> None:
    with pytest.raises(ValueError, match="ddim_steps must be in 1..1000, not 0."):
        commands.run("", argv=["--prompt", "a", "--steps", "0", "--debug"])


def test_every_flag_of_main_is_an_argument_of_main() -> None:
    """A flag whose `dest` is no argument of `main` would silently do nothing."""
    own = {"help", "words", "preset", "concept", "source", "config", "ckpt", "dtype", "device", "outdir", "debug"}
    own |= {"allow_targets"}
    dests = {action.dest for action in commands.build_parser("", editing=True)._actions}
    assert dests - own <= set(inspect.signature(ldm.generate.main).parameters)
    assert own <= dests


def test_the_demo_calls_main_with_flags_and_files_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []

    def record(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        called.append(command)
        return subprocess.CompletedProcess(command, returncode=0)

    monkeypatch.setattr(demo.subprocess, "run", record)
    learned = [demo.learn(concept) for concept in demo.CONCEPTS]
    for (python, script, *flags), embedding in zip(called, learned, strict=True):
        assert (python, script) == (sys.executable, "main.py")
        options = cli.parse(flags)
        assert options.train and Path(options.project) == embedding.parents[1]
        assert all(Path(path).exists() for path in (*options.base, options.actual_resume, options.data_root))


def test_make_concepts_learns_every_reference(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("dotted-star", "striped-heart"):
        (tmp_path / "logs" / name).mkdir(parents=True)
        (tmp_path / "logs" / name / "e.safetensors").write_text(name)
        (tmp_path / demo.REFERENCES / name).mkdir(parents=True)
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    monkeypatch.setattr(demo, "learn", lambda concept: Path("logs") / concept / "e.safetensors")
    monkeypatch.setattr(sys, "argv", ["demo.py", "--concepts"])
    demo.main()
    shipped = {path.name: path.read_text() for path in (tmp_path / demo.SHIPPED).iterdir()}
    assert shipped == {f"{name}.safetensors": name for name in ("dotted-star", "striped-heart")}


def test_the_demo_ends_with_the_exit_code_of_main(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 3))
    with pytest.raises(SystemExit) as ended:
        demo.learn("dotted-star")
    assert ended.value.code == 3
