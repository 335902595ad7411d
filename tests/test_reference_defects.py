"""Defects of the reference, and contracts with its users, that no other test holds.

Most of the reference's defects have their test beside the part that mends them; those here cross parts.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import tiny
import torch
from omegaconf import OmegaConf
from PIL import Image
from runs import CONFIG, MODEL, PICTURES, ROOT
from torch import Tensor

import main
from ldm.checkpoint import save_state_dict
from ldm.cli import train as cli
from ldm.conditioning.context import Context
from ldm.config import load_config
from ldm.embeddings import load_concept
from ldm.generate import load_model_from_config
from ldm.generate import main as generate
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.training.runs import open_run
from ldm.training.setup import build_config
from ldm.training.trainer import build_trainer, choose_devices
from ldm.util import instantiate_from_config

THEIRS = ROOT / "tests/golden/reference-v1-finetune.yaml"
SET_UP = ["--base", str(CONFIG), "--actual_resume", str(MODEL)]
SET_UP += ["--data_root", str(PICTURES), "--enable_progress_bar", "false"]


def build(seed: int = 0, **params: object) -> LatentDiffusion:
    """The small model with a concept to learn."""
    config = load_config(CONFIG)
    config.model.params.update({"ckpt_path": str(MODEL), **params})
    torch.manual_seed(seed)
    return instantiate_from_config(config.model)


def calls_of_the_unet(model: LatentDiffusion) -> list[tuple[int, Tensor]]:
    """Filled with the timestep of the first sample and the prompts (B, L, D) of each call."""
    calls: list[tuple[int, Tensor]] = []

    def record(_: object, arguments: tuple[Tensor, Tensor, Context]) -> None:
        calls.append((int(arguments[1][0]), arguments[2].k))

    model.model.diffusion_model.register_forward_pre_hook(record)
    return calls


# Generating


def test_pictures_logged_without_guidance_read_the_prompt_of_their_stage() -> None:
    """Without guidance the reference joins the prompts of all stages to one of 770 tokens, in logged samples too.

    It also logs square pictures of one sample only.
    """
    model = build().eval()
    calls = calls_of_the_unet(model)
    batch = {"image": torch.rand(2, 64, 32, 3) * 2 - 1, "caption": ["*", "a * star"]}
    pictures = model.log_images(batch, ddim_steps=10)
    assert {key: tuple(value.shape) for key, value in pictures.items()} == dict.fromkeys(
        ("inputs", "reconstruction", "samples", "samples_scaled"), (2, 3, 64, 32)
    )
    prompt = model.get_learned_conditioning(batch["caption"])
    plain, scaled = calls[:10], calls[10:]
    assert len(plain) == len(scaled) == 10
    with torch.no_grad():
        for (t, alone), (_, doubled) in zip(plain, scaled, strict=True):
            assert alone.shape == (2, 32, 128)
            torch.testing.assert_close(alone, prompt.at(t).k)
            torch.testing.assert_close(doubled[2:], prompt.at(t).k)
        assert not torch.allclose(prompt.at(901).k, prompt.at(1).k, atol=1e-2), "the stages differ"


@pytest.mark.parametrize(("timesteps", "stages"), [(1000, 5), (1000, 20), (500, 10), (250, 1)])
def test_every_stage_is_read_whatever_the_numbers_of_timesteps_and_stages(timesteps: int, stages: int) -> None:
    """The reference divides by 1000 and takes ten for granted: five stages use half the list, twenty fail."""
    model = build(timesteps=timesteps, prospect_stages=stages).eval()
    colours = ["red", "blue", "green", "yellow"]
    words = [f"{colours[s % 4]} {s % 4}" * (1 + s // 4) for s in range(stages)]  # all different
    cond = model.get_learned_conditioning(["a * star"], words)
    with torch.no_grad():  # in training another attention kernel rounds otherwise
        contexts = cond.stages()
    calls = calls_of_the_unet(model)
    DDIMSampler(model).sample(2 * stages, 1, (4, 4, 4), cond)
    read = [[s for s in range(stages) if torch.equal(contexts[s], k)] for _, k in calls]
    assert read == [[s] for s in reversed(range(stages)) for _ in range(2)]


def test_an_edited_picture_shows_its_content_in_the_size_asked_for(demo_model: LatentDiffusion, tmp_path: Path) -> None:
    """The reference squashes any content to a square, and txt2img with a content picture ignores what it shows."""
    thirds = Image.new("RGB", (192, 96), (40, 40, 60))
    thirds.paste((220, 220, 200), (0, 0, 64, 96))  # a bright third on the left
    thirds.save(tmp_path / "left.png")
    thirds.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "right.png")
    arguments = {"ddim_steps": 4, "strength": 0.25, "scale": 1.0, "height": 32, "width": 64, "progress": False}
    for name, expected in (("left.png", [True, False, False]), ("right.png", [False, False, True])):
        edited = generate("a star", content_dir=tmp_path / name, model=demo_model, **arguments)
        assert edited.size == (64, 32)
        columns = np.asarray(edited.convert("L"), float).mean(axis=0)
        assert [bool(columns[x] > columns.mean()) for x in (10, 32, 53)] == expected


def test_the_references_configuration_for_generating_needs_no_learned_word(
    tiny_config: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`v1-inference.yaml` has no initial word, other keys of a batch, and a scheduler: there every prompt fails."""
    config = load_config(tiny_config)
    params, ckpt = config.model.params, config.model.params.pop("ckpt_path")
    del params.embedding_reg_weight, params.personalization_config.params.initializer_words
    params.update({"first_stage_key": "jpg", "cond_stage_key": "txt", "cond_stage_trainable": False})
    params.scheduler_config = {
        "target": "ldm.lr_scheduler.LambdaLinearScheduler",
        "params": {"warm_up_steps": [10000], "cycle_lengths": [10000000000000], "f_start": [1.0e-6]},
    }
    with caplog.at_level(logging.INFO):
        model = load_model_from_config(OmegaConf.create({"model": config.model}), ckpt, device="cpu")
        star = model.get_learned_conditioning(["a *"], ["a dog"] * 10).at(500).k
    assert [record.message for record in caplog.records if "'scheduler_config'" in record.message]
    assert not any("Nothing is learned" in record.message for record in caplog.records), "no star is left"
    assert torch.equal(star, model.get_learned_conditioning(["a a dog"]).at(500).k)
    with caplog.at_level(logging.WARNING):
        model.get_learned_conditioning(["a *"]).at(500)
    assert "Nothing is learned or loaded for '*'" in caplog.text


# Saving and loading


def test_a_trained_models_whole_state_loads_into_a_fresh_one() -> None:
    """In the reference the first forward pass replaces a parameter by one of another shape: nothing fits again."""
    trained, fresh = build(seed=0).eval(), build(seed=1).eval()
    trained.get_learned_conditioning(["*"]).at(5).k.sum().backward()
    with torch.no_grad():
        for parameter in trained.embedding_manager.embedding_parameters():
            parameter.add_(0.1)
        assert not torch.allclose(fresh.embedding_manager.embeddings(), trained.embedding_manager.embeddings())
        fresh.load_state_dict(trained.state_dict(), strict=True)
        assert torch.equal(fresh.embedding_manager.embeddings(), trained.embedding_manager.embeddings())


# The reference's configuration and flags


TINY = [
    "model.params.unet_config.params.model_channels=32",
    "model.params.unet_config.params.num_res_blocks=1",
    "model.params.unet_config.params.num_heads=4",
    "model.params.first_stage_config.params.ddconfig.ch=32",
    "model.params.first_stage_config.params.ddconfig.num_res_blocks=1",
    f"model.params.cond_stage_config.params.tokenizer={ROOT / 'tests/golden/tokenizer'}",
    "model.params.cond_stage_config.params.version=tiny",
    "model.params.cond_stage_config.params.text_config.num_hidden_layers=1",
    "model.params.cond_stage_config.params.text_config.intermediate_size=64",
    "data.params.train.params.size=64",
    "data.params.validation.params.size=64",
]


def test_the_references_command_line_trains(tmp_path: Path) -> None:
    config = load_config(THEIRS, overrides=TINY)
    torch.manual_seed(0)
    state = instantiate_from_config(config.model).state_dict()
    weights = {key: value for key, value in state.items() if not key.startswith("embedding_manager.")}
    save_state_dict(weights, tmp_path / "tiny.safetensors", {})

    command = f"--base {THEIRS} -t --actual_resume {tmp_path}/tiny.safetensors -n run --gpus 0, "
    command += f"--data_root {PICTURES} -l {tmp_path}/logs --no-test --max_steps 2 --enable_progress_bar false"
    assert main.main([*command.split(), *TINY]) == 0
    (run,) = (tmp_path / "logs").iterdir()
    concept = load_concept(run / "checkpoints" / "embeddings.safetensors")
    assert concept.vectors.shape == (10, 768)
    assert concept.metadata["init_word"] == "teddy"  # the reference took its first letter


def test_our_configuration_means_the_same() -> None:
    """What ships under configs/ builds the same model as the reference's file."""
    theirs = load_config(THEIRS)
    ours = load_config(ROOT / "configs/stable-diffusion/v1-finetune.yaml")
    for part in ("unet_config", "first_stage_config"):
        shapes = []
        for config in (theirs, ours):
            with torch.device("meta"):
                module = instantiate_from_config(config.model.params[part])
            shapes.append({key: tuple(value.shape) for key, value in module.state_dict().items()})
        assert shapes[0] == shapes[1]
    inference = load_config(ROOT / "configs/stable-diffusion/v1-inference.yaml")
    for part in ("unet_config", "first_stage_config", "cond_stage_config"):
        mine = OmegaConf.to_container(ours.model.params[part])
        mine.get("params", {}).pop("use_checkpoint", None)
        assert OmegaConf.to_container(inference.model.params[part]) == mine


def test_each_key_of_the_reference_that_lost_its_meaning_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    config = load_config(THEIRS)
    config.model.params.cond_stage_config.params = {"tokenizer": str(tiny.TOKENIZER)}
    for split in ("train", "validation"):
        config.data.params[split].params.update({"data_root": str(PICTURES), "size": 32})
    with caplog.at_level(logging.INFO), torch.device("meta"):
        instantiate_from_config(config.model)
    with caplog.at_level(logging.INFO):
        instantiate_from_config(config.data)
        for callback in config.lightning.callbacks.values():
            instantiate_from_config(callback)
    found = [re.match(r"(\w+): '(\w+)' is accepted and not used: \w+", line) for line in caplog.messages]
    assert sorted(match.groups() for match in found if match) == [
        ("AutoencoderKL", "lossconfig"),
        ("AutoencoderKL", "monitor"),
        ("DataModuleFromConfig", "wrap"),
        ("EmbeddingManager", "num_vectors_per_token"),
        ("EmbeddingManager", "per_image_tokens"),
        ("EmbeddingManager", "progressive_words"),
        ("LatentDiffusion", "conditioning_key"),
        ("LatentDiffusion", "image_size"),
        ("LatentDiffusion", "log_every_t"),
        ("LatentDiffusion", "model_lr"),
        ("LatentDiffusion", "monitor"),
        ("LatentDiffusion", "num_timesteps_cond"),
        ("LatentDiffusion", "unfreeze_model"),
        ("LatentDiffusion", "use_ema"),
        *2 * [("PersonalizedBase", "per_image_tokens")],  # training and validation set
        ("UNetModel", "image_size"),
        ("UNetModel", "legacy"),
        ("UNetModel", "use_spatial_transformer"),
    ]


def test_the_initial_word_is_set_where_the_file_has_a_plain_text(tmp_path: Path) -> None:
    """`--init_word` with the reference's own YAML: `initializer_words: 'teddy'` is a text, and setting it fails."""
    flags = f"--base {THEIRS} --placeholder_tokens <x> --data_root x --actual_resume x.ckpt"
    options = cli.parse([*flags.split(), "--init_word", "blue dog"])
    config = build_config(options, open_run(options))
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 1}
    embedder = FrozenCLIPEmbedder("small", text_config=sizes, tokenizer=str(tiny.TOKENIZER))
    manager = instantiate_from_config(config.model.params.personalization_config, embedder=embedder, num_stages=2)
    assert manager.initial_word == "blue dog" and manager.placeholder_strings == ["<x>"]
    expected = embedder.token_table[[1746, 1929]].mean(dim=0, keepdim=True)
    torch.testing.assert_close(manager.initial_embeddings, expected)


def test_the_references_trainer_flags_reach_the_trainer(tmp_path: Path) -> None:
    """There they are made by a function that newer versions of Lightning do not have."""
    flags = "--max_steps 7 --accumulate_grad_batches 3 --precision bf16-mixed --accelerator cpu --devices 2"
    flags += " --strategy ddp --num_nodes 1"
    options = cli.parse([*SET_UP, "-p", str(tmp_path / "run"), *flags.split()])
    run = open_run(options)
    config = build_config(options, run)
    given = {"max_steps": 7, "accumulate_grad_batches": 3, "precision": "bf16-mixed", "accelerator": "cpu"}
    given |= {"devices": "2", "strategy": "ddp", "num_nodes": 1}
    assert {name: config.lightning.trainer[name] for name in given} == given
    trainer = build_trainer(config, run, pl.LightningModule(), SimpleNamespace(batch_size=1))
    assert (trainer.max_steps, trainer.accumulate_grad_batches, trainer.precision) == (7, 3, "bf16-mixed")
    assert (trainer.num_devices, trainer.num_nodes) == (2, 1)
    assert type(trainer.strategy).__name__ == "DDPStrategy"


def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def test_without_a_usable_gpu_the_run_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """The reference has 'cuda' written into it."""
    without_gpu(monkeypatch)
    with caplog.at_level(logging.INFO):
        assert main.main([*SET_UP, "-p", str(tmp_path / "run"), "--gpus", "0,"]) == 0
    assert len([line for line in caplog.messages if "No usable GPU" in line and "CPU" in line]) == 1
    assert not (tmp_path / "run").exists(), "without -t only the set-up is checked"


def test_gpus_are_translated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_devices({"max_steps": 5, "gpus": "0,"}) == {"max_steps": 5, "accelerator": "gpu", "devices": "0,"}
    for gpus in ("0,1", "2", "-1"):  # which Lightning reads as the reference does
        assert choose_devices({"gpus": gpus}) == {"accelerator": "gpu", "devices": gpus}
    assert choose_devices({"gpus": 0}) == {"accelerator": "cpu", "devices": 1}
    assert choose_devices({"accelerator": "cpu", "gpus": "0,"}) == {"accelerator": "cpu"}
    assert choose_devices({"max_steps": 5}) == {"max_steps": 5}
    without_gpu(monkeypatch)
    assert choose_devices({"gpus": "0,1"}) == {"accelerator": "cpu", "devices": 1}
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_devices({"gpus": "0,"}) == {"accelerator": "mps", "devices": 1}


TIME = r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d"


@pytest.mark.parametrize(
    ("flags", "folder"),
    [
        ("-n run", rf"logs/teddies{TIME}_run"),
        ("-n run -f -b -l elsewhere", None),
        ("-n run --postfix=-b -l elsewhere", rf"elsewhere/teddies{TIME}_run-b"),
        ("--datadir_in_name false", rf"logs/{TIME}_v1-finetune"),
        ("--datadir-in-name=no -n run", rf"logs/{TIME}_run"),
        ("-p exactly/here -n run", "exactly/here"),
    ],
)
def test_the_name_of_the_log_folder(flags: str, folder: str | None) -> None:
    arguments = ["--base", "configs/stable-diffusion/v1-finetune.yaml", "--data_root", "some/teddies/", *flags.split()]
    if folder is None:  # a value that looks like a flag
        with pytest.raises(SystemExit):
            cli.parse(arguments)
        return
    assert re.fullmatch(folder, open_run(cli.parse(arguments)).folder.as_posix())


@pytest.mark.parametrize(("scale", "rate"), [("false", "3.00e-05"), ("true", "2.40e-04")])
def test_the_learning_rate_is_scaled_unless_told_not_to(
    scale: str, rate: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert main.main([*SET_UP, "-p", str(tmp_path / "run"), "--scale_lr", scale]) == 0
    assert [line.split()[2] for line in caplog.messages if line.startswith("Learning rate")] == [rate]
