"""Wrong input on the command lines: one sentence with the remedy, exit code 2, no trace, and nothing left behind."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import bad_files
import pytest

import main
from ldm import commands

ROOT = Path(__file__).parents[1]

QUICK = "-t --base configs/demo/finetune.yaml --max_steps 1 --enable_progress_bar false"
MODEL = " --actual_resume models/demo/model.safetensors"
PICTURES = " --data_root models/demo/references/dotted-star"
LEARN = QUICK + MODEL + PICTURES
BASE = f"{QUICK}{PICTURES} --actual_resume {{bad}}/"
DATA = f"{QUICK}{MODEL} --data_root {{bad}}/"
MAKE = "--steps 1 --height 16 --width 16 --device cpu --prompt *"
EDIT = f"{MAKE} --strength 1 --content "
STAR = "models/demo/references/dotted-star/dotted-star.png"


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bad_files.write_all(tmp_path_factory.mktemp("bad"))


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """The configurations name their files relative to it."""
    monkeypatch.chdir(ROOT)


# (flags, part of the sentence)
Cases = list[tuple[str, str]]

LEARNING: dict[str, Cases] = {
    "flags": [
        ("", "a configuration is needed: --base"),
        (f"{LEARN} --max_stepz 3", "unknown argument '--max_stepz'; did you mean --max_steps?"),
        (f"{LEARN} --frobnicate", "unknown argument '--frobnicate'; see --help"),
        (f"{LEARN} stray", "unknown argument 'stray'"),
        (f"{LEARN} -t maybe", "'maybe' is neither true nor false"),
        (f"{LEARN} --max_steps many", "invalid int value: 'many'"),
        (f"{LEARN} --max_steps -5", "max_steps"),
        (f"{LEARN} --max_steps", "expected one argument"),
        (f"{LEARN} --devices x", "--devices: 'x' must be"),
        (f"{LEARN} --devices 0", "--devices: '0' must be"),
        (f"{LEARN} --devices -3", "--devices: '-3' must be"),
        (f"{LEARN} lightning.trainer.devices=x", "devices"),
        (f"{LEARN} --gpus zero", "--gpus takes device numbers"),
        (f"{LEARN} --gpus 0.5,", "--gpus takes device numbers"),
        (f"{LEARN} --accelerator quantum", "quantum"),
        (f"{LEARN} --strategy telepathy", "telepathy"),
        (f"{LEARN} --precision 7", "precision"),
        (f"{LEARN} --profiler stopwatch", "profiler"),
        (f"{LEARN} --max_time soon", "'soon'"),
        (f"{LEARN} --num_nodes 0", "num_nodes"),
        (f"{LEARN} --limit_val_batches 1.5", "limit_val_batches"),
        (f"{LEARN} --limit_val_batches -1", "limit_val_batches"),
        (f"{LEARN} --limit_train_batches some", "limit_train_batches"),
        (f"{LEARN} --accumulate_grad_batches 0", "at least 1"),
        (f"{LEARN} --gradient_clip_val -1", "gradient_clip_val"),
        (f"{LEARN} --log_every_n_steps -1", "log_every_n_steps"),
        (f"{LEARN} -s -1", "is not a whole number from 0 to 4294967295"),
        (f"{LEARN} -s 4294967296", "is not a whole number from 0 to 4294967295"),
        (f"{LEARN} -r logs/x -n y", "-n/--name and -r/--resume exclude each other"),
        (f"{LEARN} -n ../../x", "must be a name, not a path"),
        (f"{LEARN} -f /x", "must be a name, not a path"),
        (f"{LEARN} -n {'x' * 300}", "too long"),
        (f"{LEARN} -p {{bad}}/empty.ckpt/x", "is a file"),
        (f"{LEARN} -l {{bad}}/empty.ckpt", "is a file"),
        (f"{LEARN} --init_word {{nothing}}", "has no token"),
        (f"{LEARN} --placeholder_tokens {{nothing}}", "A placeholder must be a visible text"),
        ("-r {bad}/nowhere -t", "Nothing to resume"),
        ("-r {bad}/whole.ckpt -t", "is no run of main.py"),
        ("-r {bad}/good.safetensors -t", "Nothing to resume"),
    ],
    "overrides": [
        (f"{LEARN} model.params.prospect_stage=3", "did you mean 'prospect_stages'?"),
        (f"{LEARN} modl.x=1", "Unknown section 'modl' in the configuration; did you mean 'model'?"),
        (f"{LEARN} model.params.prospect_stages=0", "at least 1"),
        (f"{LEARN} model.params.prospect_stages=2.5", "whole number"),
        (f"{LEARN} model.params.prospect_stages=ten", "whole number"),
        (f"{LEARN} model.params.timesteps=0", "timesteps"),
        (f"{LEARN} model.params.unet_config=5", "must be a section"),
        (f"{LEARN} model.params=5", "must be a section"),
        (f"{LEARN} model=5", "must be a section"),
        (f"{LEARN} data=[1]", "must be a section"),
        (f"{LEARN} lightning=5", "must be a section"),
        (f"{LEARN} lightning.trainer=5", "must be a section"),
        (f"{LEARN} lightning.callbacks=5", "must be a section"),
        (f"{LEARN} lightning.callbacks.image_logger=5", "must be a section"),
        (f"{LEARN} lightning.modelcheckpoint=5", "must be a section"),
        (f"{LEARN} data.params.train=5", "must be a section"),
        (f"{LEARN} model.params.unet_config.params.model_channels=0", "does not fit this model"),
        (f"{LEARN} model.params.unet_config.params.channel_mult=[]", "does not fit this model"),
        (f"{LEARN} model.params.unet_config.params.num_heads=0", "UNetModel"),
        (f"{LEARN} model.params.first_stage_config.params.ddconfig.ch=-1", "norm_num_groups"),
        (f"{LEARN} model.params.first_stage_config.params.ddconfig=null", "AutoencoderKL"),
        (f"{LEARN} model.params.cond_stage_config.params.text_config.hidden_size=x", "FrozenCLIPEmbedder"),
        (f"{LEARN} model.params.cond_stage_config.params.tokenizer={{bad}}", "no CLIP vocabulary"),
        (f"{LEARN} model.base_learning_rate=-1", "base_learning_rate must be"),
        (f"{LEARN} model.base_learning_rate=.nan", "base_learning_rate must be"),
        (f"{LEARN} model.target=os.system", "outside the packages a configuration may name"),
        (f"{LEARN} model._target_=os.system", "Unknown key '_target_'"),
        (f"{LEARN} model.params.unet_config.target=subprocess.Popen", "outside the packages"),
        (f"{LEARN} lightning.callbacks.x.target=builtins.exec", "outside the packages"),
        (f"{LEARN} data.params.batch_size=0", "batch_size must be"),
        (f"{LEARN} data.params.batch_size=2.5", "batch_size must be"),
        (f"{LEARN} data.params.num_workers=-1", "num_workers must be"),
        (f"{LEARN} data.params.train.params.size=0", "at least 1 x 1 pixels"),
        (f"{LEARN} data.params.train.params.size=-64", "at least 1 x 1 pixels"),
        (f"{LEARN} data.params.train.params.size=60", "must be a multiple of 16; nearest: 64"),
        (f"{LEARN} data.params.train.params.size=99968", "memory"),
        (f"{LEARN} data.params.train.params.repeats=0", "repeats must be at least 1"),
        (f"{LEARN} data.params.train.params.flip_p=2", "flip_p is a probability"),
        (f"{LEARN} lightning.trainer.max_step=3", "did you mean 'max_steps'?"),
        (f"{LEARN} lightning.callbacks.image_logger.params.log_images_kwargs.stepz=2", "stepz"),
        (f"{LEARN} lightning.callbacks.image_logger.params.log_images_kwargs.ddim_steps=0", "ddim_steps must be"),
        (f"{LEARN} lightning.callbacks.image_logger.params.log_images_kwargs.scale=x", "scale must be"),
        (f"{LEARN} lightning.callbacks.image_logger.params.batch_frequency=x", "batch_frequency must be"),
    ],
    "YAML": [
        ("-t --base {bad}/nowhere.yaml", "There is no configuration file"),
        ("-t --base {bad}/folder.yaml", "is a folder and no configuration"),
        ("-t --base {bad}/binary.yaml", "is not a readable YAML file"),
        ("-t --base {bad}/empty.yaml", "does not say 'model:'"),
        ("-t --base {bad}/scalar.yaml", "Unknown section 'a star'"),
        ("-t --base {bad}/list.yaml", "must hold a YAML mapping"),
        ("-t --base {bad}/tabs.yaml", "is not a readable YAML file"),
        ("-t --base {bad}/twice.yaml", "is not a readable YAML file"),
        ("-t --base {bad}/unknown.yaml", "Unknown section 'modle'"),
        ("-t --base {bad}/no-data.yaml", "does not say 'data:'"),
        ("-t --base {bad}/no-model.yaml", "does not say 'model:'"),
        ("-t --base {bad}/object.yaml", "is not a readable YAML file"),
        ("-t --base {bad}/deep.yaml", "is nested too deeply"),
        ("-t --base {bad}/laughs.yaml", "aliases"),
        ("-t --base {bad}/allowing.yaml", "--allow_targets"),
        (f"{LEARN} --base {{bad}}/interpolation.yaml", "nowhere"),
    ],
    "base models": [
        (f"{BASE}nowhere.ckpt", "There is no file"),
        (f"{BASE}empty.ckpt", "is empty; download it again"),
        (f"{BASE}text.ckpt", "is a text file; use a .ckpt"),
        (f"{BASE}page.ckpt", "is a web page"),
        (f"{BASE}pickle.ckpt", "could run code and is not loaded; use a .safetensors version"),
        (f"{BASE}folder.ckpt", "without model_index.json; use"),
        (f"{BASE}zip.ckpt", "; "),
        *(
            (f"{BASE}cut-{where}.{kind}", "; ")
            for where in ("header", "middle", "end")
            for kind in ("ckpt", "safetensors")
        ),
        *((f"{BASE}cut-{where}-old.ckpt", "; ") for where in ("header", "middle", "end")),
        (f"{BASE}sd2.safetensors", "holds Stable Diffusion 2 (context width 1024)"),
        (f"{BASE}sdxl.safetensors", "holds Stable Diffusion XL (context width 2048)"),
        (f"{BASE}lora.safetensors", "holds a LoRA"),
        (f"{BASE}vae.safetensors", "holds a VAE"),
        (f"{BASE}inversion.safetensors", "holds a textual inversion embedding"),
        (f"{BASE}shapes.safetensors", "1 misshapen: model.diffusion_model.out.0.bias (7,) instead of (64,)"),
        (f"{BASE}lacking.safetensors", "1 missing: model.diffusion_model.out.0.bias"),
        (f"{BASE}more.safetensors", "1 unexpected: model.diffusion_model.label_emb.weight"),
        (f"{BASE}nan.safetensors", "model.diffusion_model.out.0.bias has values that are not finite; download"),
        (f"{BASE}infinite.safetensors", "not finite; download"),
        (f"{BASE}beyond-half.safetensors model.params.frozen_dtype=float16", "not finite in float16; use"),
        (f"{BASE}integers.safetensors", "whole numbers"),
        (QUICK + PICTURES, "Say which base model to learn against: --actual_resume FILE"),
    ],
    "pictures": [
        (f"{DATA}nowhere", "There is no data_root"),
        (f"{DATA}no-pictures", "There is no picture in data_root"),
        (f"{DATA}only-text", "(only a.txt); put PNG or JPEG files there"),
        (f"{DATA}one-broken", "one-broken/b.png' cannot be read"),
        (f"{DATA}x.png", "it is empty"),
        (f"{DATA}broken-link.png", "broken-link.png"),
        (f"{DATA}empty.png", "no picture that Pillow can read"),
        (f"{DATA}text.png", "no picture that Pillow can read"),
        (f"{DATA}cut-middle.png", "cut-middle.png' cannot be read"),
        (f"{DATA}bomb.png", "has too many pixels"),
    ],
    "concepts": [
        (f"{LEARN} --embedding_manager_ckpt {{bad}}/nowhere.pt", "there is no such file"),
        (f"{LEARN} --embedding_manager_ckpt {{bad}}/wide.safetensors", "10 stages of width 768; this run"),
        (f"{LEARN} --embedding_manager_ckpt {{bad}}/inversion.pt", "1 stages of width 128; this run"),
        (f"{LEARN} --embedding_manager_ckpt {{bad}}/several.safetensors", "holds 2 embeddings (<a>, <b>)"),
        (f"{LEARN} --embedding_manager_ckpt {{bad}}/cut-middle-concept.safetensors", "damaged"),
    ],
}

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
        (f"{MAKE} --ckpt {{bad}}/nan.safetensors", "not finite; download"),
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
        (f"{MAKE} --height 0", "height must be a multiple of 16"),
        (f"{MAKE} --height -64", "height must be a multiple of 16"),
        (f"{MAKE} --width 65", "width must be a multiple of 16 for this model, not 65; nearest: 64"),
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
        (f"{CONCEPT}wide.safetensors", "has width 768, but this model's text encoder has width 128"),
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
        (f"{EDIT}{{bad}}/cut-header.png", "is no picture that Pillow can read"),
        (f"{EDIT}{{bad}}/cut-middle.png", "cut-middle.png' cannot be read"),
        (f"{EDIT}{{bad}}/cut-end.png", "cut-end.png' cannot be read"),
        (f"{EDIT}{{bad}}/checksum.png", "checksum.png' cannot be read"),
        (f"{EDIT}{{bad}}/cut-middle.jpg", "cut-middle.jpg' cannot be read"),
        (f"{EDIT}{{bad}}/cut-middle.webp", "cut-middle.webp"),
        (f"{EDIT}{{bad}}/bomb.png", "has too many pixels; scale it down first"),
        (f"{EDIT}{{bad}}/float.tiff", "floating point numbers"),
    ],
}


def cases(table: dict[str, Cases]) -> list:
    return [pytest.param(*case, id=f"{theme}: {case[0][-60:]}") for theme, rows in table.items() for case in rows]


def words(flags: str, bad: Path) -> list[str]:
    return [word.replace("{bad}", str(bad)).replace("{nothing}", "") for word in flags.split()]


@contextlib.contextmanager
def refused(capsys: pytest.CaptureFixture[str], sentence: str, *folders: Path) -> Iterator[None]:
    """What runs inside must end with code 2 and one line that has `sentence`, and leave no file in `folders`."""
    with pytest.raises(SystemExit) as ended:
        yield
    output = capsys.readouterr()
    errors = [line for line in output.err.splitlines() if ": error: " in line]
    assert ended.value.code == 2
    assert len(errors) == 1 and sentence in errors[0], output.err
    assert "Traceback" not in output.err and output.out == ""
    assert errors[0].isprintable() and len(errors[0]) < 1500
    assert not [path for folder in folders for path in folder.rglob("*")]


@pytest.mark.parametrize(("flags", "sentence"), cases(LEARNING))
def test_learning(flags: str, sentence: str, bad: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = words(flags, bad)
    with refused(capsys, sentence, tmp_path):
        sys.exit(main.main(argv if {"-p", "-l"} & set(argv) else [*argv, "-l", str(tmp_path / "logs")]))


@pytest.mark.parametrize(("flags", "sentence"), cases(GENERATING))
def test_generating(flags: str, sentence: str, bad: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = words(flags, bad)
    with refused(capsys, sentence, tmp_path):
        commands.run("Try.", argv=argv if "--outdir" in argv else [*argv, "--outdir", str(tmp_path / "out")])


@pytest.mark.parametrize(("flags", "sentence"), cases(EDITING))
def test_editing(flags: str, sentence: str, bad: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with refused(capsys, sentence, tmp_path):
        commands.run("Try.", editing=True, argv=[*words(flags, bad), "--outdir", str(tmp_path / "out")])
