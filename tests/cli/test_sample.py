"""`scripts/txt2img.py` and `scripts/img2img.py`: what they write, repeat, and refuse."""

import ast
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from bad_files import ROOT, STAR, Cases, cases, refused, words
from PIL import Image
from safetensors.torch import save_file

import ldm.generate
from ldm import checkpoint
from ldm.cli import sample
from ldm.cli.export import run as export
from ldm.cli.sample import build_parser, run
from ldm.conditioning.presets import load_presets, preset, presets_beside
from ldm.embeddings import Concept, load_concept, save_concept
from ldm.files import tensors
from ldm.generate import load_model_from_config, main, read_parameters
from ldm.methods.neti import NeTIMapper, NeTISettings
from ldm.models.diffusion.latent_diffusion import DiffusionModel
from ldm.request import Request

CONTENT = "models/demo/references/dotted-star/dotted-star.png"
DOTTED, MODEL = "models/demo/concepts/dotted-star.safetensors", "models/demo/model.safetensors"
WINDOWS, CONFIG = "models/demo/presets.yaml", "configs/demo/finetune.yaml"
SMALL = ["--steps", "3", "--height", "32", "--width", "32", "--device", "cpu"]
HEART = "a large * heart on black"


@pytest.fixture(autouse=True)
def each_model_is_loaded_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(config: object, *arguments: object, **options: object) -> DiffusionModel:
        key = repr((config, arguments, options))
        if key not in LOADED:
            LOADED[key] = load_model_from_config(config, *arguments, **options)
        return LOADED[key]

    if "loads_its_own" not in request.keywords:
        monkeypatch.setattr(ldm.generate, "load_model_from_config", load)


LOADED: dict[str, DiffusionModel] = {}


@pytest.fixture
def concept_file(tmp_path: Path) -> Path:
    path = tmp_path / "concept.safetensors"
    save_concept(Concept(torch.randn(10, 128, generator=torch.Generator().manual_seed(1))), path)
    return path


@pytest.fixture
def mapper_file(tmp_path: Path) -> Path:
    """A NeTI concept of the small model."""
    torch.manual_seed(0)
    tensors, metadata = NeTIMapper(NeTISettings(num_layers=7, width=128, target_norm=1.0, num_anchors=2)).to_concept()
    save_concept(Concept(tensors, metadata, "neti"), tmp_path / "mapper.safetensors", "<thing>")
    return tmp_path / "mapper.safetensors"


def txt2img(*flags: object) -> list[Path]:
    return run([*SMALL, *map(str, flags)], editing=False)


def img2img(*flags: object) -> list[Path]:
    return run([*SMALL, *map(str, flags)], editing=True)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path), np.int64)


# As programs


def test_the_examples_name_files_that_ship() -> None:
    script = ast.get_docstring(ast.parse((ROOT / "scripts/img2img.py").read_text(encoding="utf-8")))
    for examples in (sample.__doc__, script):
        named = re.findall(r"--(?:concept|content) (\S+)", examples)
        assert named and all((ROOT / path).is_file() for path in named)


def test_an_image_from_any_folder_on_any_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.chdir(tmp_path)
    config, tokenizer = (ROOT / "configs/demo/finetune.yaml").read_text(), "models/demo/tokenizer"
    shutil.copytree(ROOT / tokenizer, tmp_path / "vocabulary")  # named relative to the configuration
    (tmp_path / "config.yaml").write_text(config.replace(tokenizer, "vocabulary"))
    (path,) = run(["--config", "config.yaml", "--prompt", "größe 日本", "--steps", "1", "--outdir", str(tmp_path)])
    assert path == tmp_path / "größe-日本-42.png"
    assert screen.buffer.getvalue().decode() == f"{tmp_path}/gr\\xf6\\xdfe-\\u65e5\\u672c-42.png\n"
    assert read_parameters(path)["scale"] == 2.5 and Image.open(path).size == (128, 128)  # the small model's own


@pytest.mark.loads_its_own
def test_one_run_builds_one_model_and_reads_each_file_once(
    tmp_path: Path, concept_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def counted(place: object, name: str, what: str) -> None:
        original = getattr(place, name)

        def call(first: object, *arguments: object, **options: object) -> object:
            seen.append(what or str(first))
            return original(first, *arguments, **options)

        monkeypatch.setattr(place, name, call)

    counted(ldm.generate, "instantiate_from_config", "built")
    counted(checkpoint, "fingerprint", "hashed")
    counted(tensors, "safe_open", "")
    names = {"content.png": CONTENT, "model.safetensors": MODEL, "presets.yaml": WINDOWS, "config.yaml": CONFIG}
    content, model, presets, config = (shutil.copy(file, tmp_path / name) for name, file in names.items())
    flags = ("--content", content, "--concept", concept_file, "--config", config, "--ckpt", model)
    OPENED[:] = [""]  # from here on
    img2img(*flags, "--prompt", "a *", "--preset", "material", "--outdir", tmp_path / "out")
    opened = [OPENED.count(str(file)) for file in (content, presets, config, model, concept_file)]
    OPENED.clear()
    assert sorted(seen) == sorted(["built", "hashed", str(model), str(concept_file)])
    assert opened == [1, 1, 1, 1, 2]  # the concept's head says how it is called


OPENED: list[str] = []  # files that Python opens for reading, once it is not empty; other languages' are not seen


def watch(event: str, arguments: tuple) -> None:
    if event == "open" and OPENED and isinstance(arguments[0], (str, Path)):
        OPENED.append("" if arguments[2] & (os.O_WRONLY | os.O_RDWR) else os.fspath(arguments[0]))


sys.addaudithook(watch)


# What is written


def test_several_images_come_as_a_grid_and_alone_and_overwrite_nothing(tmp_path: Path) -> None:
    flags = ("--prompt", "a star", "--seed", 7, "--n_samples", 2, "--n-iter", 2, "--outdir", tmp_path)
    paths = txt2img(*flags)
    assert [path.name for path in paths] == ["a-star-7-grid.png", *(f"a-star-{seed}.png" for seed in (7, 8, 9, 10))]
    grid, *alone = map(pixels, paths)
    assert (grid == np.block([[[alone[0]], [alone[1]]], [[alone[2]], [alone[3]]]])).all()
    (again,) = txt2img("--from", paths[3], "--outdir", tmp_path)
    assert np.abs(pixels(again) - alone[2]).max() <= 1 < np.abs(alone[2] - alone[0]).max()
    row = txt2img(*flags, "--n_rows", 1)[0]
    assert read_parameters(row)["n_rows"] == 1 and (pixels(row) == np.concatenate(alone)).all()
    assert (again.name, row.name) == ("a-star-9-2.png", "a-star-7-grid-2.png") and (pixels(paths[0]) == grid).all()


# Ctrl-C


def stop_after(batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Press Ctrl-C when so many batches are finished."""
    decode, calls = DiffusionModel.decode_first_stage, iter(range(batches))

    def stop_or_decode(model: DiffusionModel, latents: torch.Tensor) -> torch.Tensor:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return decode(model, latents)

    monkeypatch.setattr(DiffusionModel, "decode_first_stage", stop_or_decode)


@pytest.mark.parametrize(
    ("batches", "samples", "files", "said"),
    [
        (2, 2, 5, "what was finished, '{}', and the 4 images in it are kept"),
        (1, 1, 1, "what was finished, '{}', is kept"),
        (0, 1, 0, ": stopped by Ctrl-C"),
    ],
)
def test_ctrl_c_keeps_the_batches_that_are_finished(
    batches: int, samples: int, files: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--prompt", "a star", "--n_samples", samples, "--n_iter", 5, "--outdir", tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        stop_after(batches, patch)
        txt2img(*flags)
    first = tmp_path / "out" / ("a-star-42-grid.png" if files > 1 else "a-star-42.png")
    assert ended.value.code == 130 and len(list(tmp_path.glob("out/*"))) == files
    assert capsys.readouterr().err.splitlines()[-1].endswith(said.format(first))
    if files > 1:
        assert read_parameters(first)["n_iter"] == batches
        assert (pixels(txt2img("--from", first, "--outdir", tmp_path)[0]) == pixels(first)).all()


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGINT for one process")
def test_ctrl_c_as_a_user_presses_it(tmp_path: Path) -> None:
    command = [sys.executable, "scripts/txt2img.py", "--prompt", "a star", *SMALL, "--n_iter", "100000"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    started = subprocess.Popen(
        [*command, "--outdir", str(tmp_path)], stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )
    seen = b""
    while b"| 7" not in seen and started.poll() is None:  # steps of three batches
        seen += started.stderr.read1(4096)
    started.send_signal(signal.SIGINT)
    output, errors = started.communicate(timeout=60)
    last = errors.decode().split("\r")[-1].strip()
    assert (started.returncode, output) == (130, b"") and "Traceback" not in errors.decode()
    assert last.startswith("txt2img.py: stopped by Ctrl-C; what was finished, ")
    finished = read_parameters(tmp_path / "a-star-42-grid.png")["n_iter"]
    assert 2 <= finished == len(list(tmp_path.iterdir())) - 1


# What is repeated


@pytest.mark.parametrize("editing", [False, True])
def test_from_repeats_an_image(tmp_path: Path, concept_file: Path, editing: bool) -> None:
    make = img2img if editing else txt2img
    flags = ["--content", CONTENT, "--strength", 0.8, "--resize", "pad"] if editing else ["--n_samples", 2]
    flags += ["--concept", f"<it>={concept_file}", "--preset", "layout", "--prompt", "a <it> star", "--seed", 3]
    first = make(*flags, "--eta", 0.5, "--scale", 1.5, "--dtype", "bfloat16", "--outdir", tmp_path / "a")
    again = run(["--from", str(first[0]), "--outdir", str(tmp_path / "b")], editing=editing)
    assert len(again) == len(first) == (1 if editing else 3)
    for old, new in zip(first, again, strict=True):
        assert (pixels(old) == pixels(new)).all()
        assert read_parameters(old) == read_parameters(new) and old.name == new.name
    other = make("--from", first[0], "--seed", 5, "--outdir", tmp_path)[0]
    old, new = read_parameters(first[0]), read_parameters(other)
    assert {key for key in old if old[key] != new[key]} == {"seed"} and (pixels(first[0]) != pixels(other)).any()


def test_what_a_preset_made_changes_as_a_whole(
    tmp_path: Path, concept_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--concept", concept_file, "--preset", "material", "--prompt", HEART, "--outdir", tmp_path)
    (material,) = txt2img(*flags)
    assert material.name == "a-large-heart-on-black-material-42.png"
    capsys.readouterr()
    for flags in (["--prompt", "a * star"], ["--preset", "layout"]):
        with refused(capsys, "was made with a preset; to change it, give --prompt and --preset"):
            txt2img("--from", material, *flags)
    both = ("--prompt", "a * star", "--preset", "layout")
    record = read_parameters(txt2img("--from", material, *both, "--outdir", tmp_path)[0])
    assert record["prospect_words"] == preset("layout", "a * star", windows=presets_beside(ROOT / MODEL))
    assert (record["preset"], record["preset_prompt"]) == ("layout", "a * star")
    flags = ("--stages", "0=dotted", "1-=*")
    record = read_parameters(txt2img("--from", material, *flags, "--outdir", tmp_path)[0])
    assert record["prospect_words"] == ["dotted", *"*********"] and "preset" not in record
    old = without_preset(material)
    record = read_parameters(txt2img("--from", old, "--prompt", "two *", "--outdir", tmp_path)[0])
    assert (record["prompt"], record["prospect_words"]) == ("two *", read_parameters(material)["prospect_words"])


def without_preset(image: Path) -> Path:
    """The image with a record that names no preset, as of `main` with `prospect_words`."""
    record = {key: value for key, value in read_parameters(image).items() if key != "preset"}
    with Image.open(image) as opened:
        other = opened.copy()
    other.info = {ldm.generate.PNG_KEY: json.dumps(record | {"prompt": "one *"})}
    ldm.generate.save_picture(other, image.with_name("other.png"))
    return image.with_name("other.png")


def test_from_says_where_a_file_is_another_now(
    tmp_path: Path, concept_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = tmp_path / "content.png"
    Image.new("RGB", (64, 64), "red").save(content)
    flags = ("--prompt", "a *", "--content", content, "--concept", concept_file, "--outdir", tmp_path)
    (first,) = img2img(*flags)
    Image.open(content).save(content, compress_level=0)  # other bytes, the same pixels
    img2img("--from", first, "--outdir", tmp_path)
    assert caplog.messages == []
    save_concept(Concept(torch.ones(10, 128)), concept_file)
    Image.new("RGB", (64, 64), "blue").save(content)
    img2img("--from", first, "--outdir", tmp_path)
    assert caplog.messages == [
        f"The concept '*' ({concept_file}) is another file than the one that the image was made with.",
        f"The content image '{content}' is another than the one that was edited.",
    ]
    caplog.clear()
    shutil.copy(concept_file, tmp_path / "other.safetensors")
    others = ("--concept", tmp_path / "other.safetensors", "--content", CONTENT, "--outdir", tmp_path)
    img2img("--from", first, *others)
    assert caplog.messages == []


def test_any_base_is_said_once_and_repeated(tmp_path: Path) -> None:
    other = Concept(torch.zeros(10, 128), {"base_model": "sd-v1-4.ckpt", "base_model_sha256": "0" * 64})
    save_concept(other, tmp_path / "other.safetensors")
    flags = ["--prompt", "a *", "--concept", tmp_path / "other.safetensors", "--outdir", tmp_path]
    first = txt2img(*flags, "--any-base")[0]
    again = txt2img("--from", first, "--outdir", tmp_path)[0]
    assert read_parameters(again)["any_base"] is True and (pixels(first) == pixels(again)).all()


# Concepts and words


def test_a_concept_in_the_home_folder(tmp_path: Path, concept_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    flags = ("--concept", f"<v>=~/{concept_file.name}", "--outdir=~/new", "--config=configs/demo/finetune.yaml")
    image = txt2img("--prompt", "a <v>", *flags)[0]
    assert image == tmp_path / "new" / "a-v-42.png"
    assert read_parameters(image)["concepts"] == {"<v>": str(concept_file)}


def test_stages(tmp_path: Path) -> None:
    flags = ("--stages", "0=a dotted star", "1=3", "3=", "4-7=*", "--stages", "8-=a mug", "--outdir", tmp_path)
    path = txt2img(*flags)[0]
    words = ["a dotted star", 3, None, "", "*", "*", "*", "*", "a mug", "a mug"]
    assert (path.name, read_parameters(path)["prospect_words"]) == ("a-dotted-star-42.png", words)
    assert read_parameters(txt2img("--prompt", "on white *", *flags)[0])["prompt"] == "on white *"
    flags = ("--prompt", HEART, "--outdir", tmp_path)
    one, other = (txt2img(*flags, *preset)[0] for preset in (("--stages", "preset:style"), ("--preset", "style")))
    assert read_parameters(one) == read_parameters(other)


def test_a_file_of_prompts(tmp_path: Path, concept_file: Path) -> None:
    """Lines, or YAML that gives any argument; flags win."""
    (tmp_path / "two.txt").write_text("# stars\na star\n\na heart\n", encoding="utf-8")
    paths = txt2img("--prompts", tmp_path / "two.txt", "--outdir", tmp_path)
    assert [path.name for path in paths] == ["a-star-prompts.png", "a-star-42.png", "a-heart-42.png"]
    (tmp_path / "all.yaml").write_text(
        f"- prompt: a * star\n  ddim_steps: 2\n  seed: 5\n  scale: 3\n  concepts: {{'*': '{concept_file}'}}\n"
        "- stages: [7-9=a mug, 0-6=a blue mug]\n  ddim_steps: 1\n- {prompt: a heart, ddim_steps: 1}\n",
        encoding="utf-8",
    )
    flags = ["--height", "32", "--width", "32", "--outdir", f"{tmp_path}", "--seed", "6", "--device", "cpu"]
    records = [read_parameters(path) for path in run(["--prompts", f"{tmp_path}/all.yaml", *flags])[1:]]
    expected = {"prompt": "a * star", "ddim_steps": 2, "seed": 6, "scale": 3, "concepts": {"*": str(concept_file)}}
    assert {name: records[0][name] for name in expected} == expected
    assert records[1]["prospect_words"] == ["a blue mug"] * 7 + ["a mug"] * 3
    assert (records[2]["prompt"], records[2]["concepts"]) == ("a heart", {})


def test_prompts_and_seeds_come_as_a_labelled_grid(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--prompt", "a star", "--prompt", "a heart", "--seed", "7", "3-4", "--outdir", tmp_path)
    grid, *alone = txt2img(*flags)
    names = [f"a-{shape}-{seed}.png" for shape in ("star", "heart") for seed in (7, 3, 4)]
    assert [path.name for path in (grid, *alone)] == ["a-star-prompts.png", *names]
    assert read_parameters(grid) == {"cells": [names[:3], names[3:]]}
    sheet, side = np.asarray(Image.open(grid), np.int64), 32
    left = sheet.shape[1] - 3 * (side + 7)
    for i, path in enumerate(alone):
        x, y = left + i % 3 * (side + 7), 28 + i // 3 * (side + 7)
        assert (sheet[y : y + side, x : x + side] == pixels(path)).all()
    assert (sheet[:, :left] < 128).any()  # labels
    (single,) = txt2img("--prompt", "a heart", "--seed", 3, "--outdir", tmp_path / "b")
    assert (pixels(single) == pixels(alone[4])).all()
    capsys.readouterr()
    with refused(capsys, "shows images of several commands; repeat one of its single images"):
        txt2img("--from", grid)
    stop_after(4, monkeypatch)
    with pytest.raises(SystemExit):
        txt2img(*flags[:-1], tmp_path / "stopped")
    assert f"stopped by Ctrl-C; 4 images in '{tmp_path / 'stopped'}' are kept" in capsys.readouterr().err


def test_a_concept_is_called_what_its_file_says(tmp_path: Path, concept_file: Path) -> None:
    named = tmp_path / "named.safetensors"
    save_concept(load_concept(concept_file), named, "<toy>")
    save_file({"<cat>": torch.ones(1, 128)}, tmp_path / "foreign.safetensors")
    for prompt, files, names in (
        ("a <toy>", [named], ["<toy>"]),
        ("a *", [named], ["*"]),
        ("a * <toy>", [named, concept_file], ["*", "<toy>"]),
        ("a <it>", [f"<it>={named}"], ["<it>"]),
        ("a *", [tmp_path / "foreign.safetensors"], ["*"]),
    ):
        flags = [flag for file in files for flag in ("--concept", file)]
        record = read_parameters(txt2img("--prompt", prompt, *flags, "--steps", 1, "--outdir", tmp_path)[0])
        assert sorted(record["concepts"]) == names


def test_guidance_by_stage(tmp_path: Path) -> None:
    """From a flag, repeated from the image, and from YAML."""
    scales = [1.0, 1.0, *[2.5] * 7, 4.0]
    (tmp_path / "all.yaml").write_text(f"- {{prompt: a star, scale: {scales}, rescale: 0.5}}\n")
    first = txt2img("--prompt", "a star", "--scale", "2.5,0-1:1,9:4", "--rescale", "0.5", "--outdir", tmp_path)[0]
    again = txt2img("--from", first, "--outdir", tmp_path)[0]
    yaml = txt2img("--prompts", tmp_path / "all.yaml", "--outdir", tmp_path)[0]
    assert [read_parameters(path)["scale"] for path in (first, again, yaml)] == [scales] * 3
    assert (pixels(first) == pixels(again)).all() and (pixels(first) == pixels(yaml)).all()
    plain = txt2img("--from", first, "--scale", "2.5", "--outdir", tmp_path)[0]
    assert read_parameters(plain)["scale"] == 2.5 and (pixels(first) != pixels(plain)).any()


def test_fast_is_a_name_for_a_sampler_and_its_steps(tmp_path: Path) -> None:
    slow = txt2img("--prompt", "a star", "--config", "demo", "--outdir", tmp_path)[0]
    fast = read_parameters(run(["--from", str(slow), "--fast", "--outdir", str(tmp_path)])[0])
    assert fast["spacing"] == "trailing" and {name: fast[name] for name in ldm.generate.FAST} == ldm.generate.FAST
    fewer = read_parameters(txt2img("--prompt", "a star", "--fast", "--outdir", tmp_path)[0])
    assert (fewer["sampler"], fewer["ddim_steps"]) == ("dpmpp_2m", 3)
    assert (fast["config"], fast["ckpt"]) == ("configs/demo/finetune.yaml", MODEL)


def test_a_preset_means_the_same_stages_wherever_it_is_asked_for(tmp_path: Path) -> None:
    """Command line, `main`, `preset` with the model's windows, and exports, for a concept of the small model."""
    model = ldm.generate.load_model_from_config("configs/demo/finetune.yaml", MODEL, device="cpu")
    measured = load_presets(WINDOWS)
    for attribute in ("layout", "material"):
        expected = preset(attribute, HEART, windows=model.presets)
        assert [("*" in word) for word in expected] == [stage in measured[attribute] for stage in range(10)]
        flags = ("--concept", DOTTED, "--preset", attribute, "--prompt", HEART, "--outdir", tmp_path)
        record = read_parameters(txt2img(*flags, "--steps", 1)[0])
        assert (record["prospect_words"], record["preset_windows"]) == (expected, WINDOWS)
        image = main(HEART, preset=attribute, model=model, concepts={"*": DOTTED}, ddim_steps=1, progress=False)
        assert json.loads(image.info["prospect"])["prospect_words"] == expected
        exported = export([DOTTED, "--name", "star", "--to", "diffusers", *map(str, flags[2:]), "--force"])[-1]
        texts = re.search(r"^PROMPTS: .*? = (\[.*?^\])", exported.read_text(), re.MULTILINE | re.DOTALL)[1]
        star = [word.replace("*", f"star-{stage}") for stage, word in enumerate(expected)]
        assert ast.literal_eval(texts) == star
    # a concept of an unknown base model gets the paper's stages, and with --ckpt those of this model
    save_concept(Concept(load_concept(DOTTED).vectors), tmp_path / "other.safetensors")
    flags = (f"{tmp_path}/other.safetensors", "--name", "s", "--to", "comfyui", "--outdir", f"{tmp_path}", "--force")
    for more, windows in (((), None), (("--ckpt", MODEL), measured), (("--presets", WINDOWS), measured)):
        workflow = export([*flags, "--preset", "layout", "--prompt", "a *", *more])[-1].read_text()
        stages = {int(stage) for stage in re.findall(r"embedding:s-(\d)", workflow)}
        assert stages == set((windows or load_presets(None))["layout"])


# Other methods


def test_an_image_for_each_prompt_truncation_and_seed(
    tmp_path: Path, mapper_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "prompts.txt").write_text("a {} on black\n\n{}\n", encoding="utf-8")
    flags = ("--prompts", tmp_path / "prompts.txt", "--concept", f"<thing>={mapper_file}", "--outdir", tmp_path)
    grid, *paths = txt2img(*flags, "--truncation", 2, 64, "--seed", 5, 9)
    records = [read_parameters(path) for path in paths]
    assert [tuple(record[name] for name in ("prompt", "truncation", "seed")) for record in records] == list(
        itertools.product(["a <thing> on black", "<thing>"], [2, 64], [5, 9])
    )
    assert grid.name == "a-thing-on-black-truncation-2-prompts.png"
    assert paths[0].name == "a-thing-on-black-truncation-2-5.png" and len(set(paths)) == 8
    assert len({Image.open(path).tobytes() for path in paths}) == 8
    again = run(["--from", str(paths[2]), "--outdir", str(tmp_path / "again")])[0]
    assert Image.open(again).tobytes() == Image.open(paths[2]).tobytes() and not caplog.records
    txt2img("--prompt", "a star", "--truncation", 3, "--outdir", tmp_path)
    assert "truncation has no effect: no concept of NeTI" in caplog.text


def test_folders_and_grids_as_neti_leaves_them(tmp_path: Path, mapper_file: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a {} on black\nA/{}\n", encoding="utf-8")
    flags = ("--prompts", tmp_path / "prompts.txt", "--concept", f"<thing>={mapper_file}", "--outdir", tmp_path / "out")
    paths = txt2img(*flags, "--truncation", 2, 64, "--seed", 5, 9, 11, "--layout", "neti", "--steps", 1)
    names = [path.relative_to(tmp_path / "out").as_posix() for path in paths]
    prompts = [f"{name}{{}}_truncation_{k}.png" for name in ("a <thing> on black", "A-<thing>") for k in (2, 64)]
    assert names[:4] == [prompt.format("") for prompt in prompts]
    assert names[4:] == [prompt.format(f"/{seed}") for prompt in prompts for seed in (5, 9, 11)]
    assert Image.open(paths[0]).size == (64, 64) and read_parameters(paths[5])["seed"] == 9
    plain = txt2img("--prompt", "a star", "--layout", "neti", "--outdir", tmp_path / "out")
    assert [path.relative_to(tmp_path / "out").as_posix() for path in plain] == ["a star.png", "a star/42.png"]


def test_a_text_for_each_layer(tmp_path: Path, mapper_file: Path) -> None:
    """Numbers are the learned token of that layer; with each layer its own, it is the plain prompt."""
    flags = ("--concept", mapper_file, "--prompt", "a * on black", "--outdir", tmp_path)
    plain, own, other, text = (
        txt2img(*flags, *(("--layer_words", *words) if words else ()))[0]
        for words in ((), (0, 1, 2, 3, 4, 5, 6), (6, 5, 4, 3, 2, 1, 0), (0, 1, 2, "red star", "heart", 5, 6))
    )
    assert (pixels(own) == pixels(plain)).all()
    assert len({Image.open(path).tobytes() for path in (plain, other, text)}) == 3
    assert read_parameters(text)["layer_words"] == [0, 1, 2, "red star", "heart", 5, 6]
    again = run(["--from", str(text), "--outdir", str(tmp_path / "again")])[0]
    assert (pixels(again) == pixels(text)).all()


def test_every_flag_of_a_request_is_a_field_of_it() -> None:
    """A flag whose `dest` is none would silently do nothing; and each field has a flag."""
    own = {"help", "stages", "prompts", "concept", "source", "config", "ckpt", "dtype", "device", "outdir", "debug"}
    own |= {"allow_targets", "allow_resolvers", "layout", "fast"}
    dests = {action.dest for action in build_parser("", editing=True)._actions}
    assert dests - own == {field.name for field in fields(Request)} - {"concepts", "prospect_words"}


# What is refused, in one sentence; values of a request are in test_request.py, what needs no model in test_main.py

MAKE = "--steps 1 --height 32 --width 32 --device cpu --prompt *"
EDIT = f"{MAKE} --strength 1 --content "
CONCEPT = f"{MAKE} --concept {{bad}}/"
GENERATING: dict[str, Cases] = {
    "flags": [
        (f"{MAKE} --strength 0.5", "unknown argument '--strength'"),
        (f"{MAKE} stray", "unknown argument 'stray'; see --help"),
        (f"{MAKE} configs", "unknown argument 'configs', which is a file: put the prompt in quotes"),
        ("--steps 1", "Say what to show: --prompt TEXT, or --prompts FILE."),
        (f"{MAKE} --preset style --stages 0=b", "not allowed with argument"),
        (f"{MAKE} --prompts x.txt", "not allowed with argument --prompt"),
        (f"{MAKE} --stages preset:style 0=b", "'preset:style' must be RANGE=TEXT, of the stages 0"),
        (f"{MAKE} --stages 1-3=a 3-=b", "gives stage 3 twice; let '3-=b' leave it out"),
        (f"{MAKE} --stages 3-1=a", "'3-1=a' must be RANGE=TEXT, of the stages 0 (the end of sampling) to 9"),
        (f"{MAKE} --stages 0=10", "a stage number in 0..9, or None, not 10"),
        (f"{MAKE} --seed 1-", "'1-' is neither a seed (42) nor a range of up to 1000 (42-45)"),
        (f"{MAKE} --seed 1-600 1-600", "1200 images are too many for one command"),
        (f"{MAKE} --seed 9223372036854775808", "seed must be in 0.."),
        (f"{MAKE} --scale 2.5,10:1", "scale has no stages 10; they are 0..9"),
        (f"{MAKE} --layer_words 0 1 2 3 4 5 7", "layer_words[6] must be a text, a layer number in 0..6"),
        (f"{MAKE} --truncation 129", "truncation must be in 0..128, not 129."),
        (f"{MAKE} --device tpu", "'tpu' is none of cpu, mps, cuda"),
        (f"{MAKE} --device cuda:7", "is not usable here; usable:"),
        (f"{MAKE} --outdir {{bad}}/text.png/below", "is a file; give a folder with --outdir"),
        (f"{MAKE} --outdir {{bad}}/{'x' * 256}/below", "xxx…': the name is too long; shorten it."),
        (f"{MAKE} --config {{bad}}/allowing.yaml", "Unknown section 'allow_targets'"),
        (f"{MAKE} --config configs/demo/text.yaml", "makes no images from text"),
        (f"{MAKE} --ckpt {{bad}}/cut-middle.ckpt", "; download it again"),
    ],
    "prompts": [
        (f"--prompts {{bad}}/{file}", sentence)
        for file, sentence in {
            "nowhere.txt": "check the path given with --prompts",
            "noise.png": "is not UTF-8 text (line 1); save it as UTF-8.",
            "star.yaml": "a text that begins with * needs quotes",
            "words-laughs.yaml": "aliases",
            "scalar.yaml": "holds no prompts; write one in each line, or a YAML list of prompts",
            "words-unknown.yaml": "there is no argument 'sead'; did you mean 'seed'?",
            "words-typed.yaml": "ddim_steps must be a whole number, not 'few'",
            "words-nine.yaml": "has 9 entries, but this model has 10 stages",
        }.items()
    ],
    "concepts": [
        (f"{CONCEPT}x.png", "is a folder; it must have the stage files"),
        (f"{CONCEPT}wide.safetensors", "has width 768 (base model: unknown), but this model's text encoder has width"),
        (f"{CONCEPT}several.safetensors", "the file holds 2 embeddings (<a>, <b>); use a file with one, or of several"),
        (f"{CONCEPT}other-base.safetensors", "'sd-v1-4.ckpt'"),
        (f"{MAKE} --concept a=b --concept a=c", "give every concept a name of its own"),
        (f"{MAKE} --concept a=", "The concept 'a' has no file here"),
        (f"{CONCEPT}good.safetensors --config configs/demo/diffusion.yaml", "no personalization_config"),
    ],
    "--from": [
        (f"--from {{bad}}/{file}.png", sentence)
        for file, sentence in {
            "noise": "has no ProSpect parameters",
            "record-foreign": "was made with the model 'sd-v1-4.ckpt'; give it with --ckpt",
            "record-edited": "scripts/img2img.py edits an image",
            "record-deep-json": "has no readable ProSpect parameters",
            "record-config-typed": "has no readable config (a dict); give it with --config",
            "record-steps-typed": "ddim_steps must be a whole number, not 'many'",
        }.items()
    ],
}
EDITING: Cases = [
    (MAKE, "scripts/img2img.py edits an image, --content FILE"),
    (f"{EDIT}{STAR} --strength 1.01", "strength must be in 0..1, not 1.01"),
    (f"{EDIT}{STAR} --resize fit", "Unknown resize 'fit'"),
    (f"{EDIT}{{bad}}/loop.png", "There is no file"),
    (f"{EDIT}{{bad}}/checksum.png", "checksum.png' cannot be read"),
    (f"{EDIT}{{bad}}/float.tiff", "floating point numbers"),
]


@pytest.mark.parametrize(("flags", "sentence"), cases(GENERATING | {"img2img": EDITING}))
def test_refused(flags: str, sentence: str, bad: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv, editing = words(flags, bad), (flags, sentence) in EDITING
    with refused(capsys, sentence.replace("{bad}", str(bad)), tmp_path):
        run(argv if "--outdir" in argv else [*argv, "--outdir", str(tmp_path / "out")], editing=editing)


def test_debug_shows_the_trace() -> None:
    with pytest.raises(ValueError, match=r"ddim_steps must be in 1\.\.1000, not 0\."):
        run(["--prompt", "a", "--steps", "0", "--debug"])


ACCEPTED: list[tuple[bool, str]] = [
    (False, f"{MAKE} --scale 0 --eta 1 --seed 9223372036854775807"),
    (False, f"{MAKE} --ckpt {{bad}}/whole-old.ckpt"),
    (True, f"{EDIT}{STAR} --strength 0"),
    (True, f"{EDIT}{{bad}}/really-a-png.jpg"),
    (True, f"{EDIT}{{bad}}/line.png --resize pad"),
]


@pytest.mark.parametrize(("editing", "flags"), ACCEPTED)
def test_what_is_taken_though_it_looks_odd(editing: bool, flags: str, bad: Path, tmp_path: Path) -> None:
    paths = run([*words(flags, bad), "--outdir", str(tmp_path)], editing=editing)
    with Image.open(paths[0]) as image:
        assert image.size == (32, 32)
