"""Wrong input for sampling: one sentence with the remedy, exit code 2, no trace, and nothing left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
from bad_files import ROOT, Cases, cases, refused, words
from PIL import Image

from ldm.cli import sample as commands

MAKE = "--steps 1 --height 32 --width 32 --device cpu --prompt *"
EDIT = f"{MAKE} --strength 1 --content "
STAR = "models/demo/references/dotted-star/dotted-star.png"


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """The configurations name their files relative to it."""
    monkeypatch.chdir(ROOT)


CONCEPT = f"{MAKE} --concept {{bad}}/"
GENERATING: dict[str, Cases] = {
    "flags": [
        (f"{MAKE} --stepz 3", "unknown argument '--stepz'; did you mean --steps?"),
        (f"{MAKE} --strength 0.5", "unknown argument '--strength'"),
        (f"{MAKE} stray", "unknown argument 'stray'"),
        ("--steps 1", "Say what to show: --prompt TEXT"),
        (f"{MAKE} --preset style --word b", "not allowed with argument"),
        (f"{MAKE} --preset mood", "Unknown preset 'mood'"),
        (f"{MAKE} --sampler euler", "Unknown sampler 'euler'"),
        (f"{MAKE} --dtype int8", "frozen_dtype must be one of"),
        (f"{MAKE} --device tpu", "'tpu' is none of cpu, mps, cuda"),
        (f"{MAKE} --device cuda:7", "is not usable here; usable:"),
        (f"{MAKE} --outdir {{bad}}/text.png", "is a file; give a folder with --outdir"),
        (f"{MAKE} --outdir {{bad}}/text.png/below", "is a file; give a folder with --outdir"),
        (f"{MAKE} --config {{bad}}/nowhere.yaml", "check the path given with --config"),
        (f"{MAKE} --config {{bad}}/folder.yaml", "is a folder"),
        (f"{MAKE} --config {{bad}}/empty.yaml", "does not say 'model:'"),
        (f"{MAKE} --config {{bad}}/allowing.yaml", "--allow_targets"),
        (f"{MAKE} --config configs/demo/autoencoder.yaml", "makes no pictures from text"),
        (f"{MAKE} --config configs/demo/text.yaml", "makes no pictures from text"),
        (f"{MAKE} --ckpt {{bad}}/nan.safetensors", "not finite in float32; download"),
        (f"{MAKE} --ckpt {{bad}}/cut-middle.ckpt", "; download it again"),
        (f"{MAKE} --ckpt {{bad}}/sd2.safetensors", "holds Stable Diffusion 2"),
    ],
    "numbers": [
        (f"{MAKE} --steps 0", "ddim_steps must be in 1..1000, not 0"),
        (f"{MAKE} --steps -1", "ddim_steps must be in 1..1000, not -1"),
        (f"{MAKE} --steps 1001", "ddim_steps must be in 1..1000, not 1001"),
        (f"{MAKE} --steps 2.5", "invalid int value: '2.5'"),
        (f"{MAKE} --scale -0.1", "scale must be in 0..1000"),
        (f"{MAKE} --scale nan", "scale must be in 0..1000"),
        (f"{MAKE} --scale inf", "scale must be in 0..1000"),
        (f"{MAKE} --scale 1e30", "scale must be in 0..1000"),
        (f"{MAKE} --eta -0.1", "ddim_eta must not be negative"),
        (f"{MAKE} --eta 1.1", "ddim_eta must be at most 1"),
        (f"{MAKE} --eta nan", "ddim_eta must not be negative"),
        (f"{MAKE} --seed -1", "seed must be in 0.."),
        (f"{MAKE} --seed 9223372036854775808", "seed must be in 0.."),
        (f"{MAKE} --seed 9223372036854775807 --n_samples 2", "seed must be in 0.."),
        (f"{MAKE} --n_samples 0", "n_iter and n_samples must be at least 1"),
        (f"{MAKE} --n_iter -1", "n_iter and n_samples must be at least 1"),
        (f"{MAKE} --height 0", "height must be a multiple of 32"),
        (f"{MAKE} --height -64", "height must be a multiple of 32"),
        (f"{MAKE} --width 65", "width must be a multiple of 32 for this model, not 65; nearest: 64"),
        (f"{MAKE} --height 160000 --width 160000", "memory"),
        (f"{MAKE} --n_samples 100000000", "memory"),
        (f"{MAKE} --n_iter 100000000000", "memory"),
    ],
    "words": [
        (f"{MAKE} --word a --word b", "prospect_words has 2 entries, but this model has 10 stages"),
        (MAKE + " --word 10" * 10, "a stage number must be in 0..9"),
        (f"{MAKE} --words {{bad}}/nowhere.yaml", "check the path given with --words"),
        (f"{MAKE} --words {{bad}}/folder.yaml", "is a folder"),
        (f"{MAKE} --words {{bad}}/binary.yaml", "is not a readable YAML file"),
        (f"{MAKE} --words {{bad}}/star.yaml", "an entry that begins with * needs quotes"),
        (f"{MAKE} --words {{bad}}/deep.yaml", "is nested too deeply"),
        (f"{MAKE} --words {{bad}}/words-laughs.yaml", "aliases"),
        (f"{MAKE} --words {{bad}}/object.yaml", "is not a readable YAML file"),
        (f"{MAKE} --words {{bad}}/scalar.yaml", "must hold a YAML list with one entry for each stage"),
        (f"{MAKE} --words {{bad}}/words-unknown.yaml", "main has no argument 'sead'; did you mean 'seed'?"),
        ("--words {bad}/words-typed.yaml", "ddim_steps must be a whole number, not 'few'"),
        ("--words {bad}/words-prompt.yaml", "prompt must be a text, not 3; in YAML, put it in quotes"),
        (f"{MAKE} --words {{bad}}/words-concepts.yaml", "concepts must be {name: file}, not ['x']"),
        (f"{MAKE} --words {{bad}}/words-concept-types.yaml", "concepts must be {name: file}"),
        (f"{MAKE} --words {{bad}}/words-nine.yaml", "has 9 entries, but this model has 10 stages"),
        (f"{MAKE} --words {{bad}}/words-bool.yaml", "prospect_words[0] is a bool"),
        (f"{MAKE} --words {{bad}}/words-float.yaml", "prospect_words[0] is a float"),
        (f"{MAKE} --words {{bad}}/words-out.yaml", "prospect_words[0] = 10"),
        (f"{MAKE} --words {{bad}}/words-list.yaml", "prospect_words[0] is a list"),
        (f"{MAKE} --words {{bad}}/words-bytes.yaml", "prospect_words[0] is a bytes"),
    ],
    "concepts": [
        (f"{CONCEPT}nowhere.pt", "there is no such file"),
        (f"{CONCEPT}x.png", "this is a folder"),
        (f"{CONCEPT}empty.ckpt", "the file is empty"),
        (f"{CONCEPT}text.ckpt", "holds no embedding; use"),
        (
            f"{CONCEPT}wide.safetensors",
            "has width 768 (base model: unknown), but this model's text encoder has width 128",
        ),
        (f"{CONCEPT}several.safetensors", "the file holds 2 embeddings (<a>, <b>); give the name of one"),
        (f"{CONCEPT}stages.safetensors", "there are 7 vectors for 10 stages"),
        (f"{CONCEPT}tokens.safetensors", "its 10 vectors are for 10 consecutive tokens"),
        (f"{CONCEPT}nan-concept.safetensors", "infinite or NaN values"),
        (f"{CONCEPT}cube.safetensors", "this is no embedding but"),
        (f"{CONCEPT}whole-numbers.safetensors", "this is no embedding but"),
        (f"{CONCEPT}timesteps.safetensors", "learned for 4000 timesteps"),
        (f"{CONCEPT}order.safetensors", "in another order"),
        (f"{CONCEPT}version.safetensors", "format version 9, not 1; update this program"),
        (f"{CONCEPT}xl-concept.safetensors", "it is for Stable Diffusion XL"),
        (f"{CONCEPT}none.safetensors", "holds no embedding"),
        (f"{CONCEPT}cut-header-concept.safetensors", "damaged"),
        (f"{CONCEPT}cut-middle-concept.safetensors", "damaged"),
        (f"{CONCEPT}cut-end-concept.safetensors", "damaged"),
        (f"{CONCEPT}cut.pt", "cut off"),
        (f"{CONCEPT}whole.safetensors", "embeddings ("),
        (f"{CONCEPT}lora.safetensors", "consecutive tokens"),
        (f"{MAKE} --concept a=b --concept a=c", "give every concept a name of its own"),
        (f"{MAKE} --concept a=", "concepts must be {name: file}"),
        (f"{MAKE} --concept <*>={{bad}}/good.safetensors", "The placeholder '<*>' must not contain '*'"),
        (
            f"{MAKE} --config configs/demo/diffusion.yaml --concept {{bad}}/good.safetensors",
            "no personalization_config",
        ),
    ],
    "--from": [
        ("--from {bad}/nowhere.png", "check the path given with --from"),
        ("--from {bad}/noise.png", "has no ProSpect parameters"),
        ("--from {bad}/text.png", "is no picture that Pillow can read"),
        ("--from {bad}/empty.png", "is no picture that Pillow can read"),
        ("--from {bad}/bomb.png", "has too many pixels"),
        ("--from {bad}/x.png", "is a folder"),
        ("--from {bad}/record-foreign.png", "was made with the model 'sd-v1-4.ckpt'; give it with --ckpt"),
        ("--from {bad}/record-edited.png", "use scripts/img2img.py"),
        ("--from {bad}/record-no-json.png", "has no readable ProSpect parameters"),
        ("--from {bad}/record-no-mapping.png", "has no readable ProSpect parameters"),
        ("--from {bad}/record-deep-json.png", "has no readable ProSpect parameters"),
        ("--from {bad}/record-typed.png", "ckpt"),
        ("--from {bad}/record-config-typed.png", "config"),
        ("--from {bad}/record-steps-typed.png", "ddim_steps must be a whole number, not 'many'"),
        ("--from {bad}/record-scale-nan.png", "scale must be in 0..1000"),
        ("--from {bad}/record-endless.png", "memory"),
    ],
}

EDITING: dict[str, Cases] = {
    "flags": [
        (MAKE, "Give the picture to edit with --content FILE"),
        (f"{EDIT}{STAR} --strength -0.1", "strength must be in 0..1, not -0.1"),
        (f"{EDIT}{STAR} --strength 1.01", "strength must be in 0..1, not 1.01"),
        (f"{EDIT}{STAR} --strength nan", "strength must be in 0..1, not nan"),
        (f"{EDIT}{STAR} --strength half", "invalid float value: 'half'"),
        (f"{EDIT}{STAR} --resize fit", "Unknown resize 'fit'"),
    ],
    "pictures": [
        (f"{EDIT}{{bad}}/nowhere.png", "There is no file"),
        (f"{EDIT}{{bad}}/x.png", "is a folder"),
        (f"{EDIT}{{bad}}/broken-link.png", "There is no file"),
        (f"{EDIT}{{bad}}/loop.png", "loop.png' cannot be read"),
        (f"{EDIT}{{bad}}/empty.png", "is no picture that Pillow can read"),
        (f"{EDIT}{{bad}}/text.png", "is no picture that Pillow can read"),
        (f"{EDIT}{{bad}}/cut-signature.png", "is no picture that Pillow can read"),
        (f"{EDIT}{{bad}}/cut-header.png", "cut-header.png' cannot be read"),
        (f"{EDIT}{{bad}}/cut-middle.png", "cut-middle.png' cannot be read"),
        (f"{EDIT}{{bad}}/cut-end.png", "cut-end.png' cannot be read"),
        (f"{EDIT}{{bad}}/checksum.png", "checksum.png' cannot be read"),
        (f"{EDIT}{{bad}}/cut-middle.jpg", "cut-middle.jpg' cannot be read"),
        (f"{EDIT}{{bad}}/cut-middle.webp", "cut-middle.webp"),
        (f"{EDIT}{{bad}}/bomb.png", "has too many pixels; scale it down first"),
        (f"{EDIT}{{bad}}/float.tiff", "floating point numbers"),
    ],
}


@pytest.mark.parametrize(("flags", "sentence"), cases(GENERATING))
def test_generating(flags: str, sentence: str, bad: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = words(flags, bad)
    with refused(capsys, sentence, tmp_path):
        commands.run("Try.", argv=argv if "--outdir" in argv else [*argv, "--outdir", str(tmp_path / "out")])


@pytest.mark.parametrize(("flags", "sentence"), cases(EDITING))
def test_editing(flags: str, sentence: str, bad: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with refused(capsys, sentence, tmp_path):
        commands.run("Try.", editing=True, argv=[*words(flags, bad), "--outdir", str(tmp_path / "out")])


# What is taken though it looks odd

ACCEPTED: list[tuple[bool, str]] = [
    (False, f"{MAKE} --steps 1000 --scale 0 --seed 0"),
    (False, f"{MAKE} --scale 1000 --eta 1 --seed 9223372036854775807"),
    (False, f"{MAKE} --ckpt {{bad}}/whole.safetensors --dtype float16"),
    (False, f"{MAKE} --ckpt {{bad}}/whole.ckpt"),
    (False, f"{MAKE} --ckpt {{bad}}/whole-old.ckpt"),
    (False, f"{MAKE} --config configs/demo/diffusion.yaml"),
    (False, f"{CONCEPT}good.safetensors"),
    (False, f"{CONCEPT}inversion.pt"),
    (True, f"{EDIT}{STAR} --strength 0"),
    (True, f"{EDIT}{{bad}}/pixel.png"),
    (True, f"{EDIT}{{bad}}/line.png"),
    (True, f"{EDIT}{{bad}}/line.png --resize pad"),
    (True, f"{EDIT}{{bad}}/line.png --resize squash"),
    (True, f"{EDIT}{{bad}}/animated.gif"),
    (True, f"{EDIT}{{bad}}/really-a-png.jpg"),
    (True, f"{EDIT}{{bad}}/noise.tiff"),
]


@pytest.mark.parametrize(("editing", "flags"), ACCEPTED)
def test_accepted(editing: bool, flags: str, bad: Path, tmp_path: Path) -> None:
    paths = commands.run("", editing=editing, argv=[*words(flags, bad), "--outdir", str(tmp_path)])
    with Image.open(paths[0]) as picture:
        assert picture.size == (32, 32)


@pytest.mark.parametrize(("flags", "warned"), [("star", 1), ("*", 0), ("* --word *" + 9 * " --word a", 0)])
def test_a_concept_that_no_text_names(
    flags: str, warned: int, bad: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    argv = words(f"{MAKE.removesuffix('*')}{flags} --concept {{bad}}/good.safetensors", bad)
    commands.run("", argv=[*argv, "--outdir", str(tmp_path)])
    assert [message.startswith("The concept '*' has no effect") for message in caplog.messages] == [True] * warned
