"""Wrong input for learning and the scripts: one sentence, exit code 2, no trace, and nothing left behind."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from bad_files import Cases, cases, refused, words
from runs import call

import main
from ldm.checkpoint import read_state_dict
from ldm.data.personalized import PersonalizedBase, find_images
from ldm.embeddings import load_concept
from ldm.files.images import open_image

ROOT = Path(__file__).parents[1]

QUICK = "-t --base configs/demo/finetune.yaml --max_steps 1 --enable_progress_bar false"
MODEL = " --actual_resume models/demo/model.safetensors"
PICTURES = " --data_root models/demo/references/dotted-star"
LEARN = QUICK + MODEL + PICTURES
BASE = f"{QUICK}{PICTURES} --actual_resume {{bad}}/"
DATA = f"{QUICK}{MODEL} --data_root {{bad}}/"
LOGGER = "lightning.callbacks.image_logger.params"
MANAGER = "model.params.personalization_config.params"
MAKE = "--steps 1 --height 32 --width 32 --device cpu --prompt *"
EDIT = f"{MAKE} --strength 1 --content "


LEARNING: dict[str, Cases] = {
    "flags": [
        ("", "a configuration is needed: --base"),
        (f"{QUICK}{MODEL}", "Say which images to learn from: --data_root"),
        ("--base x.yaml -r logs/x -n y", "-n/--name and -r/--resume exclude each other"),
        (f"{LEARN} --max_stepz 3", "unknown argument '--max_stepz'; did you mean --max_steps?"),
        (f"{LEARN} --frobnicate", "unknown argument '--frobnicate'; see --help"),
        (f"{LEARN} stray", "unknown argument 'stray'"),
        (f"{LEARN} -t maybe", "'maybe' is neither true nor false"),
        (f"{LEARN} --max_steps many", "invalid int value: 'many'"),
        (f"{LEARN} --max_steps", "expected one argument"),
        (f"{LEARN} --devices x", "devices"),
        (f"{LEARN} --accelerator quantum", "quantum"),
        (f"{LEARN} --precision bf16-true", "'bf16-true' would round the noise schedule"),
        (f"{LEARN} --precision 16-true", "use model.params.frozen_dtype=float16"),
        (f"{LEARN} -s -1", "must be a whole number from 0 to 4294967295, not '-1'"),
        (f"{LEARN} -n ../../x", "must be a name, not a path"),
        (f"{LEARN} -p {{bad}}/empty.ckpt/x", "is a file"),
        (f"{LEARN} -l {{bad}}/empty.ckpt", "is a file"),
        (f"{LEARN} --init_word {{nothing}}", "has no token"),
        (f"{LEARN} --placeholder_tokens {{nothing}}", "A placeholder must be a visible text"),
        (f"{LEARN} {MANAGER}.placeholder_strings=[<x>]", "which is called '<x>'"),
        (f"{LEARN} {MANAGER}.method=xti {MANAGER}.norm=word", "norm has no effect with the method 'xti'"),
        (f"{LEARN} --placeholder_tokens <*>", "The placeholder '<*>' must not contain '*'"),
        (f"{LEARN} --init_word a\udcffb", "initializer_words: 'a\\xffb' is not UTF-8"),
        ("-r {bad}/nowhere -t", "given with -r; check the path"),
        ("-r {bad}/whole.ckpt -t", "is no checkpoint of a training run (it holds no optimizer_states, global_step)"),
        ("-r {bad}/good.safetensors -t", "Nothing to resume"),
    ],
    "overrides": [
        (f"{LEARN} model.params.prospect_stage=3", "did you mean 'prospect_stages'?"),
        (f"{LEARN} modl.x=1", "Unknown section 'modl' in the configuration; did you mean 'model'?"),
        (f"{LEARN} model.prospect_stages=4", "Unknown key 'prospect_stages' beside"),
        (f"{LEARN} lightning.trainr.max_steps=3", "did you mean 'trainer'?"),
        (f"{LEARN} model.params.prospect_stages=0", "at least 1"),
        (f"{LEARN} model.params.prospect_stages=ten", "whole number"),
        (f"{LEARN} model.params.timesteps=0", "timesteps"),
        (f"{LEARN} model.params.channels=8", "the U-Net takes 4"),
        (f"{LEARN} model.params.channels=[1", "'model.params.channels=[1' cannot be read as key=value"),
        (f"{LEARN} model.params.unet_config=5", "A `target:` is missing in 5"),
        (f"{LEARN} model.params=5", "must be a section"),
        (f"{LEARN} data=[1]", "cannot be merged"),
        (f"{LEARN} data.params.train=null", "does not say 'data.params.train:'"),
        (f"{LEARN} lightning.callbacks.image_logger=5", "A `target:` is missing in 5"),
        (f"{LEARN} lightning.callbacks.x.target=ldm.models.autoencoder.AutoencoderKL", "AutoencoderKL"),
        (f"{LEARN} lightning.callbacks.x.target=torch.nn.Identity", "is no Lightning callback"),
        (f"{LEARN} lightning.scale_lr=x", "scale_lr must be true or false"),
        (f"{LEARN} model.params.unet_config.params.model_channels=0", "does not fit this model"),
        (f"{LEARN} model.params.first_stage_config.params.ddconfig.ch=-1", "AutoencoderKL cannot be built"),
        (f"{LEARN} model.params.cond_stage_config.params.text_config.hidden_size=x", "FrozenCLIPEmbedder"),
        (f"{LEARN} model.params.cond_stage_config.params.tokenizer={{bad}}", "no CLIP vocabulary"),
        (f"{LEARN} model.base_learning_rate=null", "does not say 'model.base_learning_rate:'"),
        (f"{LEARN} model.base_learning_rate=fast", "base_learning_rate must be a number"),
        (f"{LEARN} model.target=os.system", "outside the packages a configuration may name"),
        (f"{LEARN} model._target_=os.system", "Unknown key '_target_'"),
        (f"{LEARN} model.params.unet_config.target=subprocess.Popen", "outside the packages"),
        (f"{LEARN} lightning.callbacks.x.target=builtins.exec", "outside the packages"),
        (f"{LEARN} data.batch_size=4", "Unknown key 'batch_size' beside"),
        (f"{LEARN} data.params.batch_size=2.5", "batch_size must be"),
        (f"{LEARN} data.params.train.params.size=0", "at least 1 x 1 pixels"),
        (f"{LEARN} data.params.train.params.size=60", "must be a multiple of 32; nearest: 64"),
        (f"{LEARN} data.params.train.params.size=null", "size is needed"),
        (f"{LEARN} data.params.train.params.repeats=0", "repeats must be at least 1"),
        (f"{LEARN} data.params.train.params.flip_p=2", "flip_p 0 to 1 (a probability)"),
        (f"{LEARN} lightning.modelcheckpoint.params.every_n_train_step=2", "did you mean 'every_n_train_steps'?"),
        (f"{LEARN} lightning.modelcheckpoint.params.every_n_train_steps=0", "at least 1"),
        (f"{LEARN} lightning.logger.params.name=x", "A `target:` is missing"),
        (f"{LEARN} lightning.logger.target=ldm.training.callbacks.ConfiguredRate", "is no logger"),
        (
            f"{LEARN} lightning.logger.target=pytorch_lightning.loggers.CSVLogger lightning.logger.params.nam=x",
            "'name'?",
        ),
        (f"{LEARN} lightning.logger.target=os.system", "outside the packages"),
        (f"{LEARN} {LOGGER}.log_images_kwargs.stepz=2", "stepz"),
        (f"{LEARN} {LOGGER}.batch_frequency=x", "batch_frequency must be"),
    ],
    "asked for and not done": [
        (f"{LEARN} model.params.unfreeze_model=true", "unfreeze_model: True is not supported: only the embedding"),
        (f"{LEARN} model.params.scheduler_config.target=x", "the rate is constant for embeddings"),
        (f"{LEARN} model.params.num_timesteps_cond=2", "num_timesteps_cond: 2 is not supported"),
        (f"{LEARN} model.params.conditioning_key=concat", "conditioning is always cross-attention"),
        (f"{LEARN} {MANAGER}.num_vectors_per_token=6", "one vector for each of its prospect_stages"),
        (f"{LEARN} {MANAGER}.per_image_tokens=true", "one placeholder is learned from all images"),
        (f"{LEARN} model.params.use_ema=true {MANAGER}=null {MANAGER[:-7]}=null", "AveragedWeights"),
        ("-t --base configs/demo/autoencoder.yaml model.params.lossconfig.target=x", "the loss is kl_weight"),
    ],
    "YAML": [
        ("-t --base {bad}/nowhere.yaml", "nowhere.yaml', given with --base"),
        ("-t --base {bad}/empty.yaml", "does not say 'model:'"),
        ("-t --base {bad}/scalar.yaml", "Unknown section 'a star'"),
        ("-t --base {bad}/no-data.yaml", "does not say 'data:'"),
        ("-t --base {bad}/deep.yaml", "is nested too deeply"),
        ("-t --base {bad}/laughs.yaml", "aliases"),
        ("-t --base {bad}/allowing.yaml", "Unknown section 'allow_targets'"),
        (f"{LEARN} --base {{bad}}/interpolation.yaml", "nowhere"),
    ],
    "base models": [
        (f"{BASE}nowhere.ckpt", "There is no file"),
        (f"{BASE}empty.ckpt", "is empty; download it again"),
        (f"{BASE}text.ckpt", "is a text file; use a .safetensors"),
        (f"{BASE}page.ckpt", "is a web page"),
        (f"{BASE}pickle.ckpt", "could run code and is not loaded; use a .safetensors version"),
        (f"{BASE}folder.ckpt", "folder.ckpt' has no unet/diffusion_pytorch_model.safetensors (nor a .bin"),
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
        (
            f"{BASE}nan.safetensors",
            "model.diffusion_model.out.0.bias has values that are not finite in float32; download",
        ),
        (f"{BASE}infinite.safetensors", "not finite in float32; download"),
        (
            f"{BASE}beyond-half.safetensors model.params.frozen_dtype=float16",
            "not finite in float16; download it again, or use float32",
        ),
        (f"{BASE}integers.safetensors", "holds torch.int8; use a file"),
        (QUICK + PICTURES, "learn against: --actual_resume FILE, or model.params.ckpt_path=null"),
    ],
    "images": [
        (f"{DATA}nowhere", "nowhere', given with --data_root; check the path"),
        (f"{DATA}no-pictures", "There is no image in data_root"),
        (f"{DATA}only-text", "(only a.txt); put PNG or JPEG files there"),
        (f"{DATA}one-broken", "one-broken/b.png' cannot be read"),
        (f"{DATA}x.png", "it is empty"),
        (f"{DATA}broken-link.png", "broken-link.png"),
        (f"{DATA}empty.png", "is empty; download it again"),
        (f"{DATA}text.png", "no image that Pillow can read"),
        (f"{DATA}cut-middle.png", "cut-middle.png' cannot be read"),
        (f"{DATA}bomb.png", "has too many pixels"),
    ],
    "concepts": [
        (f"{LEARN} --embedding_manager_ckpt {{bad}}/nowhere.pt", "There is no file"),
        (f"{LEARN} --embedding_manager_ckpt {{bad}}/wide.safetensors", "10 stages of width 768; this run"),
        (f"{LEARN} --embedding_manager_ckpt {{bad}}/inversion.pt", "1 stages of width 128; this run"),
        (f"{LEARN} --embedding_manager_ckpt {{bad}}/several.safetensors", "holds 2 embeddings (<a>, <b>)"),
        (f"{LEARN} --embedding_manager_ckpt {{bad}}/cut-middle-concept.safetensors", "damaged"),
    ],
}


@pytest.mark.parametrize(("flags", "sentence"), cases(LEARNING))
def test_learning(flags: str, sentence: str, bad: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = words(flags, bad)
    with refused(capsys, sentence, tmp_path):
        sys.exit(main.main(argv if {"-p", "-l"} & set(argv) else [*argv, "-l", str(tmp_path / "logs")]))


# The other scripts

SCRIPTS: list[tuple[str, str, str]] = [
    ("convert_checkpoint", "{bad}/nowhere.ckpt {out}/a.safetensors", "There is no file"),
    ("convert_checkpoint", "{bad}/cut-middle.ckpt {out}/a.safetensors", "download it again"),
    ("convert_checkpoint", "{bad}/pickle.ckpt {out}/a.safetensors", "could run code and is not loaded"),
    ("convert_checkpoint", "{bad}/whole.ckpt {out}/a.ckpt", "the file to write must end in .safetensors"),
    ("convert_checkpoint", "{bad}/whole.ckpt {bad}/good.safetensors", "is there already; use --force"),
    (
        "convert_checkpoint",
        "{bad}/good.safetensors {bad}/good.safetensors --force",
        "is, or is part of, what is read; name another",
    ),
    ("pack_model", "{bad}/run {bad}/good.safetensors", "is there already; use --force"),
    ("convert_checkpoint", "{bad}/whole.ckpt {out}/a.safetensors --haf", "did you mean --half?"),
    ("pack_model", "{bad}/nowhere {out}/a.safetensors", "There is no file"),
    ("pack_model", "{bad}/run {out}/a.safetensors", "holds no whole model; give the log folder"),
    ("render_world", "--out {out} --count 0", "--count must be in 1..10^6"),
    ("render_world", "--out {out} --count 99999999999", "--count must be in 1..10^6"),
    ("render_world", "--out {out} --resolution 99999", "--resolution in 1..16384"),
    ("make_random_sd_v1", "--out {out}/a.ckpt --layout {bad}/nowhere.json", "There is no file"),
    ("make_random_sd_v1", "--out {out}/a.ckpt --layout {bad}/text.ckpt", "is no layout such as"),
    ("make_random_sd_v1", "--out {out}/a.ckpt --layout {bad}/good.safetensors", "is not UTF-8 text"),
    ("make_random_sd_v1", "--out {out}/a.ckpt --seed 99999999999", "--seed must be in 0..2^32 - 1"),
    ("make_random_sd_v1", "--out {bad}/good.safetensors --format safetensors", "is there already; use --force"),
    ("render_world", "--out {out} --seed -1", "--seed in 0..2^62"),
    ("render_world", "--out {bad}/text.png", "is a file; give a folder with --out"),
    ("render_world", "--out {out} --caption-like large,green", "need one word of every factor"),
    ("benchmark", "--json models/demo/tokenizer/vocab.json", "is there already; use --force"),
    ("benchmark", "--what scaling --figure {bad}/text.png", "is there already; use --force"),
    ("benchmark", "--what load --ckpt {bad}/text.png --figure {bad}/text.png --force", "is part of, what is read"),
    ("benchmark", "--json {bad}/text.png/a.json", "is a file; give a folder with --json"),
    ("gpu_report", "--into README.md --out {out}/report", "'README.md' has no block from '<!-- gpu report -->'"),
    ("gpu_report", "--into {out}/none.md --out {out}/report", "There is no file"),
    ("gpu_report", "--out {bad}/text.png", "is a file; give a folder with --out"),
    ("gpu_report", "--repeats 0 --out {out}/report", "must be a whole number of at least 1"),
    ("render_world", "--out {out} --caption-like enormous", "need one word of every factor, got ['enormous']"),
]


@pytest.mark.parametrize(("script", "flags", "sentence"), SCRIPTS)
def test_scripts(
    script: str, flags: str, sentence: str, bad: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location(script, ROOT / "scripts" / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with refused(capsys, sentence, tmp_path):
        module.main([word.format(bad=bad, out=tmp_path) for word in flags.split()])


@pytest.fixture(scope="module")
def run(bad: Path) -> Path:
    """A run of one step; tests that damage it take a copy."""
    assert main.main([*LEARN.split(), "-p", str(bad / "run")]) == 0
    return bad / "run"


# Traces, permissions, and what is taken though it looks odd


@pytest.mark.parametrize(
    "command",
    [
        f"main.py {LEARN} --data_root {{bad}}/cut-middle.png",
        f"scripts/txt2img.py {MAKE} --concept {{bad}}/cut.pt",
    ],
)
def test_as_programs_with_a_trace_on_request(command: str, bad: Path, tmp_path: Path) -> None:
    script, *flags = (word.replace("{bad}", str(bad)).replace("{out}", str(tmp_path)) for word in command.split())
    plain = call(script, *flags)
    assert (plain.returncode, plain.stdout) == (2, "")
    assert plain.stderr.splitlines()[-1].startswith(f"{Path(script).name}: error: ") and "Traceback" not in plain.stderr
    debugged = call(script, *flags, "--debug")
    assert debugged.returncode == 1 and "Traceback (most recent call last)" in debugged.stderr
    sentence = plain.stderr.splitlines()[-1].partition(": error: ")[2]
    assert sentence in debugged.stderr and 'File "' in debugged.stderr
    assert not list(tmp_path.iterdir())


@contextlib.contextmanager
def without_the_rights_of_root() -> Iterator[None]:
    """Root may read any file: for a moment this thread gives that up (the capabilities 1 and 2 of Linux)."""
    libc = ctypes.CDLL(None, use_errno=True)
    kind = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this thread
    held = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice
    assert libc.capget(kind, held) == 0
    less = (ctypes.c_uint32 * 6)(*held)
    less[0] &= ~0b110
    assert libc.capset(kind, less) == 0
    try:
        yield
    finally:
        assert libc.capset(kind, held) == 0


@pytest.fixture
def unreadable(bad: Path, tmp_path: Path) -> Iterator[Path]:
    """A folder of files that nobody may read."""
    for name in ("noise.png", "good.safetensors", "whole.safetensors"):
        shutil.copy(bad / name, tmp_path / name)
        (tmp_path / name).chmod(0)
    with without_the_rights_of_root():
        yield tmp_path


@pytest.mark.skipif(sys.platform != "linux", reason="gives up the rights of root as Linux knows them")
def test_files_that_may_not_be_read(unreadable: Path) -> None:
    reads = {
        "noise.png": (open_image, find_images, lambda path: PersonalizedBase(path.parent, size=64)),
        "good.safetensors": (load_concept,),
        "whole.safetensors": (read_state_dict,),
    }
    for name, readers in reads.items():
        for read in readers:
            with pytest.raises(ValueError, match="be read.*Permission denied") as caught:
                found = read(unreadable / name)
                open_image(found[0])  # `find_images` leaves it in, so that it is not passed over
            assert "\n" not in str(caught.value)
