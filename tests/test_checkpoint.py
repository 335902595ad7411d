"""Checkpoint files: the same tensors from every format, strict loading, and no code from any file."""

import hashlib
import importlib.util
import json
import logging
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm.checkpoint import (
    SCHEDULE_BUFFERS,
    CheckpointError,
    file_hash,
    identify,
    load_weights,
    read_state_dict,
    refuse_other_families,
    save_state_dict,
)
from ldm.files.diffusers_layout import to_compvis
from ldm.models.diffusion.schedule import make_betas, schedule_buffers

ROOT = Path(__file__).resolve().parents[1]
LAYOUT = json.loads((ROOT / "tests" / "golden" / "sd_v1_state_dict.json").read_text())["state_dict"]
WEIGHTS = {key: entry for key, entry in LAYOUT.items() if entry["kind"] == "param"}
UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.text_model."

# diffusers' key, CompVis' key: worked out by hand for two levels of one ResNet block each (`folder` below)
BY_HAND = {
    "unet": """
        conv_in.weight input_blocks.0.0.weight
        time_embedding.linear_2.bias time_embed.2.bias
        down_blocks.0.resnets.0.conv1.weight input_blocks.1.0.in_layers.2.weight
        down_blocks.0.resnets.0.norm2.weight input_blocks.1.0.out_layers.0.weight
        down_blocks.0.attentions.0.proj_in.weight input_blocks.1.1.proj_in.weight
        down_blocks.0.downsamplers.0.conv.bias input_blocks.2.0.op.bias
        down_blocks.1.resnets.0.conv_shortcut.weight input_blocks.3.0.skip_connection.weight
        mid_block.resnets.0.time_emb_proj.weight middle_block.0.emb_layers.1.weight
        mid_block.resnets.1.conv2.bias middle_block.2.out_layers.3.bias
        up_blocks.0.resnets.1.norm1.weight output_blocks.1.0.in_layers.0.weight
        up_blocks.0.upsamplers.0.conv.weight output_blocks.1.1.conv.weight
        up_blocks.1.resnets.0.conv1.bias output_blocks.2.0.in_layers.2.bias
        up_blocks.1.attentions.1.norm.bias output_blocks.3.1.norm.bias
        conv_norm_out.weight out.0.weight
    """,
    "vae": """
        encoder.down_blocks.0.downsamplers.0.conv.weight encoder.down.0.downsample.conv.weight
        encoder.down_blocks.1.resnets.0.conv_shortcut.bias encoder.down.1.block.0.nin_shortcut.bias
        encoder.mid_block.attentions.0.group_norm.weight encoder.mid.attn_1.norm.weight
        encoder.mid_block.attentions.0.to_k.weight encoder.mid.attn_1.k.weight
        decoder.mid_block.attentions.0.to_out.0.weight decoder.mid.attn_1.proj_out.weight
        decoder.up_blocks.0.resnets.1.conv2.weight decoder.up.1.block.1.conv2.weight
        decoder.up_blocks.0.upsamplers.0.conv.weight decoder.up.1.upsample.conv.weight
        decoder.up_blocks.1.resnets.0.conv1.bias decoder.up.0.block.0.conv1.bias
        decoder.conv_norm_out.bias decoder.norm_out.bias
        quant_conv.weight quant_conv.weight
    """,
    "text_encoder": """
        embeddings.token_embedding.weight embeddings.token_embedding.weight
        encoder.layers.1.self_attn.q_proj.bias encoder.layers.1.self_attn.q_proj.bias
    """,
}
PREFIXES = {"unet": UNET, "vae": VAE, "text_encoder": TEXT}


def diffusers_parts(widths: tuple[int, ...], attention: tuple[bool, ...], blocks: int, text: dict, vae: tuple):
    """The three networks as diffusers and transformers build them."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    down = tuple("CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attention)
    up = tuple("CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attention))
    ids = {"bos_token_id": 0, "eos_token_id": 1}
    return {
        "unet": UNet2DConditionModel(
            block_out_channels=widths,
            layers_per_block=blocks,
            down_block_types=down,
            up_block_types=up,
            cross_attention_dim=text["hidden_size"],
            attention_head_dim=8,
            norm_num_groups=min(32, widths[0]),
        ),
        "vae": AutoencoderKL(
            block_out_channels=vae,
            layers_per_block=blocks,
            latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * len(vae),
            up_block_types=("UpDecoderBlock2D",) * len(vae),
            norm_num_groups=min(32, vae[0]),
        ),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**text, **ids)),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of a tiny model, written by the libraries themselves; every tensor is different."""
    text = {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2}
    parts = diffusers_parts((8, 16), (True, False), 1, {**text, "num_attention_heads": 2}, (8, 16))
    path = tmp_path_factory.mktemp("diffusers")
    generator = torch.Generator().manual_seed(0)
    for name, module in parts.items():
        for parameter in module.parameters():
            parameter.data.normal_(generator=generator)
        module.save_pretrained(path / name)
    (path / "model_index.json").write_text("{}")
    return path


@pytest.fixture(scope="module")
def state(folder: Path) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in read_state_dict(folder).items()}


def stored(folder: Path, part: str) -> dict[str, Tensor]:
    return load_file(next((folder / part).glob("*.safetensors")))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


class TinyModel(nn.Module):
    """A module with the keys and shapes of a state dict, and the extras a real model has beside the weights."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        for key, tensor in state.items():
            self._put(key, nn.Parameter(torch.zeros(tensor.shape), requires_grad=False))
        self.register_buffer("betas", torch.full((1000,), 0.5))
        self._put("embedding_manager.initial_embeddings", nn.Parameter(torch.ones(1, 4)))

    def _put(self, key: str, parameter: nn.Parameter) -> None:
        module: nn.Module = self
        *path, name = key.split(".")
        for step in path:
            if not hasattr(module, step):
                module.add_module(step, nn.Module())
            module = getattr(module, step)
        module.register_parameter(name, parameter)


def load_script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_python(code: str, *arguments: object) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["MALLOC_MMAP_THRESHOLD_"] = "1000000"  # glibc gives freed tensors back at once: memory is countable
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


# --- the formats -------------------------------------------------------------------------------------------------


def test_public_size_gives_the_public_names_and_shapes():
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    with torch.device("meta"):
        text = {**text, "vocab_size": 49408}
        attention = (True, True, True, False)
        parts = diffusers_parts((320, 640, 1280, 1280), attention, 2, text, (128, 256, 512, 512))
    mapped = to_compvis({name: module.state_dict() for name, module in parts.items()})
    assert {key: list(tensor.shape) for key, tensor in mapped.items()} == {
        key: entry["shape"] for key, entry in WEIGHTS.items()
    }


@pytest.mark.parametrize("part", BY_HAND)
def test_folder_gives_each_tensor_its_name(folder: Path, state: dict[str, Tensor], part: str):
    for theirs, ours in (line.split() for line in BY_HAND[part].strip().splitlines()):
        source = stored(folder, part)[theirs]
        assert torch.equal(state[PREFIXES[part] + ours].flatten(), source.flatten()), ours
    attention = [key for key in state if re.search(r"mid\.attn_1\.(q|k|v|proj_out)\.weight", key)]
    assert len(attention) == 8
    assert all(state[key].shape == (16, 16, 1, 1) for key in attention)


def test_folder_loses_and_invents_nothing(folder: Path, state: dict[str, Tensor]):
    def fingerprints(tensors):
        return sorted(hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for tensor in tensors)

    parts = [tensor for part in BY_HAND for tensor in stored(folder, part).values()]
    assert fingerprints(parts) == fingerprints(state.values())
    assert len(set(fingerprints(parts))) == len(parts)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_ckpt_gives_the_same_tensors(tmp_path: Path, state: dict[str, Tensor], wrapped: bool, legacy: bool):
    path = tmp_path / "model.ckpt"
    content = {"state_dict": {**state, "note": "text", "count": 3}, "global_step": np.int64(470000)}
    torch.save(content if wrapped else state, path, _use_new_zipfile_serialization=not legacy)
    assert same(read_state_dict(path), state)
    save_state_dict(state, path)  # of another kind than its name says
    assert same(read_state_dict(path), state)


def test_folder_of_older_libraries(tmp_path: Path, folder: Path, state: dict[str, Tensor]):
    """Pickled .bin files, the autoencoder's old attention names, `text_model.` and position_ids."""
    (tmp_path / "model_index.json").write_text("{}")
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    parts = {part: stored(folder, part) for part in BY_HAND}
    for new, old in old_names.items():
        parts["vae"] = {key.replace(f".{new}.", f".{old}."): t for key, t in parts["vae"].items()}
    parts["text_encoder"] = {f"text_model.{key}": tensor for key, tensor in parts["text_encoder"].items()}
    position_ids = torch.arange(77)[None]
    parts["text_encoder"]["text_model.embeddings.position_ids"] = position_ids
    for part, tensors in parts.items():
        (tmp_path / part).mkdir()
        stem = "pytorch_model" if part == "text_encoder" else "diffusion_pytorch_model"
        torch.save(tensors, tmp_path / part / f"{stem}.bin")
    assert same(read_state_dict(tmp_path), {**state, TEXT + "embeddings.position_ids": position_ids})


def test_folder_prefers_full_precision_and_accepts_fp16(tmp_path: Path, folder: Path, state: dict[str, Tensor]):
    (tmp_path / "model_index.json").write_text("{}")
    for part in BY_HAND:
        (tmp_path / part).mkdir()
        stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        half = {key: tensor.half() for key, tensor in stored(folder, part).items()}
        save_file(half, tmp_path / part / f"{stem}.fp16.safetensors")
    assert same(read_state_dict(tmp_path), {key: tensor.half() for key, tensor in state.items()})
    save_file(stored(folder, "unet"), tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    assert read_state_dict(tmp_path)[UNET + "out.2.weight"].dtype == torch.float32


def test_dtype_casts_floating_tensors_but_not_the_schedule(tmp_path: Path, state: dict[str, Tensor]):
    extra = {"betas": torch.rand(1000), TEXT + "embeddings.position_ids": torch.arange(77)[None]}
    for name in ("model.ckpt", "model.safetensors"):
        path = tmp_path / name
        torch.save({**state, **extra}, path) if path.suffix == ".ckpt" else save_state_dict({**state, **extra}, path)
        half = {key: tensor.half() for key, tensor in state.items()}
        assert same(read_state_dict(path, torch.float16), {**half, **extra})
        assert same(read_state_dict(path), {**state, **extra})  # the file is as it was


def test_lightning_class_needs_no_lightning(tmp_path: Path):
    layout = {"state_dict": {key: {**e, "shape": [min(n, 4) for n in e["shape"]]} for key, e in LAYOUT.items()}}
    (tmp_path / "layout.json").write_text(json.dumps(layout))
    script = load_script("make_random_sd_v1")
    path = tmp_path / "sd-v1-4.ckpt"
    script.main(["--out", str(path), "--dtype", "float16", "--layout", str(tmp_path / "layout.json")])
    with pytest.raises(pickle.UnpicklingError, match="ModelCheckpoint"):
        torch.load(path, weights_only=True)
    code = """
import sys
from ldm.checkpoint import identify, read_state_dict
state = read_state_dict(sys.argv[1])
print(len(state), identify(state), any("lightning" in name for name in sys.modules))
"""
    assert run_python(code, path).split() == ["1143", "Stable", "Diffusion", "v1", "False"]
    state = read_state_dict(path)
    assert state["betas"].dtype == torch.float32
    assert all(state[key].dtype == torch.float16 for key in WEIGHTS)
    assert torch.equal(state[UNET + "out.0.weight"], torch.ones(4, dtype=torch.float16))


def test_levels_of_other_programs(tmp_path: Path, state: dict[str, Tensor]):
    """DistributedDataParallel, torch.compile and transformers 5 write other names of the same tensors."""
    names = {
        "parallel": lambda key: f"module.{key}",
        "compiled": lambda key: key.replace(".diffusion_model.", ".diffusion_model._orig_mod."),
        "both": lambda key: f"module._orig_mod.{key}",
        "transformers": lambda key: key.replace("transformer.text_model.", "transformer."),
    }
    for rename in names.values():
        torch.save({"state_dict": {rename(key): tensor for key, tensor in state.items()}}, tmp_path / "a.ckpt")
        assert same(read_state_dict(tmp_path / "a.ckpt"), state)


def test_folders_that_are_no_whole_stable_diffusion_v1(tmp_path: Path, folder: Path):
    def folder_of(name: str, *parts: str) -> Path:
        (tmp_path / name).mkdir()
        for part in (*parts, "model_index.json"):
            (tmp_path / name / part).symlink_to(folder / part)
        return tmp_path / name

    foreign, xl = folder_of("foreign", "vae", "text_encoder"), folder_of("xl", "unet", "vae", "text_encoder")
    (foreign / "unet").mkdir()
    tensors = {**stored(folder, "unet"), "add_embedding.linear_1.weight": torch.ones(2)}
    save_file(tensors, foreign / "unet" / "diffusion_pytorch_model.safetensors")
    (xl / "text_encoder_2").mkdir()
    for path, sentence in (
        (folder_of("part", "unet"), "has no vae/diffusion_pytorch_model.safetensors"),
        (xl, r"holds Stable Diffusion XL .*; use .*Stable Diffusion v1"),
    ):
        with pytest.raises(CheckpointError, match=sentence):
            read_state_dict(path)
    state = read_state_dict(foreign)
    with pytest.raises(CheckpointError, match=r"1 unexpected: model\.diffusion_model\.add_embedding\.linear_1\.weight"):
        load_weights(TinyModel(read_state_dict(folder)), state, foreign)


# --- into a model ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_load_weights_copies_and_keeps_what_is_the_models_own(state: dict[str, Tensor], dtype: torch.dtype):
    model = TinyModel(state)
    before = {key: tensor.data_ptr() for key, tensor in model.state_dict().items()}
    given = {key: tensor.to(dtype) for key, tensor in state.items()}
    load_weights(model, {**given, "betas": torch.zeros(1000, dtype=torch.float16)}, "x.ckpt")
    own = model.state_dict()
    assert all(torch.equal(own[key], given[key].float()) for key in state)
    assert {key: tensor.data_ptr() for key, tensor in own.items()} == before
    assert own["betas"].eq(0.5).all()
    assert own["embedding_manager.initial_embeddings"].eq(1).all()


@pytest.mark.parametrize("name", ["model.ckpt", "model.safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("portion", [2**28, 1000])
def test_load_weights_into_a_meta_model(
    tmp_path: Path, state: dict[str, Tensor], name: str, dtype: torch.dtype, portion: int, monkeypatch
):
    monkeypatch.setattr("ldm.checkpoint._PORTION", portion)
    path = tmp_path / name
    torch.save(state, path) if path.suffix == ".ckpt" else save_state_dict(state, path)
    with torch.device("meta"):
        model = TinyModel(state)
    read = read_state_dict(path, dtype)
    load_weights(model, read, path)
    expected = {key: tensor.to(dtype) for key, tensor in state.items()}
    assert same(read, expected)
    path.write_bytes(bytes(path.stat().st_size))  # the model does not depend on the file any more
    own = dict(model.named_parameters())
    assert all(own[key].dtype == expected[key].dtype and torch.equal(own[key], expected[key]) for key in state)
    assert not any(own[key].requires_grad for key in state)
    assert own["embedding_manager.initial_embeddings"].is_meta


def test_harmless_extras_are_ignored_silently(state: dict[str, Tensor], caplog: pytest.LogCaptureFixture):
    extras = [
        *SCHEDULE_BUFFERS,
        TEXT + "embeddings.position_ids",
        "model_ema.decay",
        "model_ema.diffusion_modelout2weight",
        "logvar",
        "embedding_manager.attention.to_q.weight",
        "loss.logvar",
        "first_stage_model.loss.discriminator.main.0.weight",
    ]
    assert schedule_buffers(make_betas(0.00085, 0.012)).keys() == SCHEDULE_BUFFERS
    with caplog.at_level(logging.INFO):
        load_weights(TinyModel(state), {**state, **dict.fromkeys(extras, torch.zeros(3))}, "x.ckpt")
    assert [record.getMessage() for record in caplog.records] == [f"x.ckpt: {len(state)} tensors loaded"]


def test_misfits_are_listed_together(state: dict[str, Tensor]):
    model = TinyModel(state)
    wrong = dict(state)
    missing = [key for key in state if "middle_block.0" in key]
    for key in missing:
        del wrong[key]
    wrong["model.diffusion_model.label_emb.weight"] = torch.zeros(1)
    wrong[UNET + "input_blocks.0.0.weight"] = torch.zeros(8, 9, 3, 3)  # an inpainting model's
    with pytest.raises(CheckpointError) as caught:
        load_weights(model, wrong, "x.ckpt")
    message = str(caught.value)
    assert message.startswith(f"'x.ckpt' does not fit this model ({len(missing)} missing: {missing[0]}, ")
    assert sum(key in message for key in missing) == 8
    assert ", …; 1 unexpected: model.diffusion_model.label_emb.weight; 1 misshapen: " in message
    assert f"{UNET}input_blocks.0.0.weight (8, 9, 3, 3) instead of (8, 4, 3, 3)" in message
    assert "\n" not in message and ". " not in message and message.endswith(".")
    assert all(not tensor.any() for key, tensor in model.state_dict().items() if key in state)  # nothing was done


# --- other families ----------------------------------------------------------------------------------------------


def of_width(width: int, prefix: str = UNET) -> dict[str, Tensor]:
    return {f"{prefix}middle_block.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(4, width)}


V1 = {**of_width(768), TEXT + "final_layer_norm.weight": torch.zeros(4)}
FAMILIES = [
    ("Stable Diffusion v1", V1),
    ("Stable Diffusion 2", of_width(1024) | {"cond_stage_model.model.ln_final.weight": torch.zeros(4)}),
    ("Stable Diffusion XL", of_width(2048) | {"conditioner.embedders.0.logit_scale": torch.zeros(4)}),
    ("a LoRA", {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.zeros(4, 4)}),
    ("a LoRA", {"unet.mid_block.attentions.0.attn2.processor.to_k_lora.down.weight": torch.zeros(4, 4)}),
    ("a LoRA", {"base_model.model.text_model.encoder.q_proj.lora_A.weight": torch.zeros(4, 4)}),
    ("a VAE", {"encoder.conv_in.weight": torch.zeros(4, 3, 3, 3), "decoder.conv_in.weight": torch.zeros(4, 4, 3, 3)}),
    ("a textual inversion embedding", {"<teddy>": torch.zeros(2, 768)}),
    ("a textual inversion embedding", {"string_to_param.*": torch.zeros(2, 768), "other": torch.zeros(1)}),
    ("a textual inversion embedding", {"clip_l": torch.zeros(1, 768), "clip_g": torch.zeros(1, 1280)}),
    ("unknown", {"backbone.layer1.weight": torch.zeros(2), "backbone.layer2.weight": torch.zeros(2)}),
]


@pytest.mark.parametrize(("family", "state"), FAMILIES)
def test_families_are_identified_and_refused(family: str, state: dict[str, Tensor]):
    assert identify(state) == family
    model = TinyModel(V1)
    if family in ("Stable Diffusion v1", "unknown"):
        refuse_other_families(state, model, "x.ckpt")
        return
    with pytest.raises(CheckpointError) as caught:
        load_weights(model, state, "x.ckpt")
    assert str(caught.value).startswith(f"'x.ckpt' holds {family}")
    assert re.search(
        "but this configuration is for Stable Diffusion v1 .context width 768.; use a full", str(caught.value)
    )


def test_a_model_and_the_configuration_of_another_are_named_in_one_sentence() -> None:
    small = {**of_width(128), TEXT + "final_layer_norm.weight": torch.zeros(4)}
    for state, own, sentence in (
        (small, V1, "holds the small model (context width 128), but this configuration is for Stable Diffusion v1"),
        (
            small,
            V1,
            "use --config demo (in main.py: --base demo), or a full checkpoint of Stable Diffusion v1, such as",
        ),
        (V1, small, "holds Stable Diffusion v1 (context width 768), but this configuration is for the small model"),
        (V1, small, "use --config sd (in main.py: --base sd), or a full checkpoint of the small model."),
        (of_width(64), small, "holds a model (context width 64), but"),
    ):
        with pytest.raises(CheckpointError, match=re.escape(sentence)):
            load_weights(TinyModel(own), state, "x.ckpt")


@pytest.mark.parametrize("width", [32, 128, 1024, 2048])
def test_a_small_model_may_have_any_context_width(width: int):
    state = {**of_width(width), TEXT + "final_layer_norm.weight": torch.zeros(4)}
    load_weights(TinyModel(state), state, "tiny.ckpt")


# --- writing, hashing, memory, scripts ---------------------------------------------------------------------------


def test_save_is_atomic_and_carries_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.safetensors"
    shared = torch.arange(6.0)
    save_state_dict({"a": shared, "b": shared, "t": shared.reshape(2, 3).T}, path, {"stages": "10"})
    assert same(load_file(path), {"a": shared, "b": shared, "t": shared.reshape(2, 3).T})
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "stages": "10"}
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    (tmp_path / "plain").unlink()

    before = path.read_bytes()
    monkeypatch.setattr("ldm.files.writing.os.replace", lambda *_: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception):
        save_state_dict({"a": torch.zeros(2)}, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


MEASURE = """
import gc, json, sys
from pathlib import Path
import torch
from ldm import checkpoint
from ldm.checkpoint import read_state_dict

checkpoint._PORTION = 2**25

def resident(field):
    return int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0]) * 1024

def measure(work):
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = resident("VmRSS")
    result = work()
    return (resident("VmHWM") - before) / Path(path).stat().st_size

peaks = {}
for path in sys.argv[1:]:
    read_state_dict(path, torch.float16)  # imports and the like
    peaks[path] = {
        "open": measure(lambda: read_state_dict(path)),
        "float32": measure(lambda: read_state_dict(path, torch.float32)),
        "float16": measure(lambda: read_state_dict(path, torch.float16)),
    }
print(json.dumps(peaks))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's memory accounts")
def test_peak_memory(tmp_path: Path):
    """Resident memory above the process's own, mapped pages counted, in file sizes (288 MB)."""
    weights = {f"w{i}": torch.full((1024, 1024), float(i)) for i in range(72)}
    torch.save({"state_dict": weights}, tmp_path / "a.ckpt")
    save_state_dict(weights, tmp_path / "a.safetensors")
    del weights
    for name, peak in json.loads(run_python(MEASURE, *sorted(tmp_path.iterdir()))).items():
        assert peak["open"] < 0.6, (name, peak)  # the system may map 2 MB around each byte that is looked at
        assert 0.95 < peak["float32"] < 1.2, (name, peak)
        assert 0.45 < peak["float16"] < 0.7, (name, peak)


@pytest.mark.parametrize("half", [False, True])
def test_convert_script(tmp_path: Path, folder: Path, state: dict[str, Tensor], half: bool):
    script = load_script("convert_checkpoint")
    torch.save({"state_dict": state}, tmp_path / "a.ckpt")
    expected = {key: tensor.half() for key, tensor in state.items()} if half else state
    for source in (tmp_path / "a.ckpt", folder):
        target = tmp_path / f"{source.stem}.safetensors"
        script.main([str(source), str(target), *["--half"] * half])
        assert same(load_file(target), expected)
        with safe_open(target, framework="pt") as file:
            assert file.metadata()["source_sha256"] == file_hash(source)
    assert file_hash(tmp_path / "a.ckpt") == hashlib.sha256((tmp_path / "a.ckpt").read_bytes()).hexdigest()
    for source, target in (("b/a.ckpt", "c.safetensors"), ("a.ckpt", "a.safetensors"), ("a.ckpt", "a.ckpt")):
        with pytest.raises(SystemExit, match="2"):
            script.main([str(tmp_path / source), str(tmp_path / target)])


def test_random_weights_are_not_taken_for_the_public_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    script = load_script("make_random_sd_v1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "layout.json").write_text(json.dumps({"state_dict": {"w.bias": {"shape": [2], "kind": "param"}}}))
    for kind in ("ckpt", "safetensors"):
        script.main(["--layout", "layout.json", "--format", kind])
        assert same(read_state_dict(tmp_path / f"random-sd-v1.{kind}"), {"w.bias": torch.zeros(2)})


def test_random_weights_are_sane_and_repeatable():
    script = load_script("make_random_sd_v1")
    layout = {key: e for key, e in LAYOUT.items() if len(e["shape"]) != 4 and np.prod(e["shape"]) < 1_000_000}
    layout[UNET + "out.2.weight"] = LAYOUT[UNET + "out.2.weight"]
    one, two = (script.random_weights(layout, torch.float32, seed=1) for _ in range(2))
    assert list(one) == list(layout)
    assert same(one, two)
    assert all(list(one[key].shape) == entry["shape"] for key, entry in layout.items())
    deviation = one[UNET + "out.2.weight"].std().item()
    assert deviation == pytest.approx((320 * 9) ** -0.5, rel=0.05)
    assert one["alphas_cumprod"][-1].item() == pytest.approx(0.0047, abs=1e-4)
