"""What the tests of wrong input share: files that a user may hand in by mistake, and how a refusal looks.

`write_all(folder)` makes every file that the tables of `test_bad_input*.py` name as `{bad}/…`.
"""

from __future__ import annotations

import contextlib
import pickle
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file

from ldm.embeddings import Concept, save_concept

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "models/demo/model.safetensors"
CONFIG = ROOT / "configs/demo/finetune.yaml"
STAR = ROOT / "models/demo/references/dotted-star/dotted-star.png"
UNET = "model.diffusion_model."
KEYS = UNET + "middle_block.1.transformer_blocks.0.attn2.to_k.weight"

Cases = list[tuple[str, str]]  # (flags, part of the sentence)


def write_all(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for part in (models, concepts, pictures, configurations, records):
        part(folder)
    return folder


def cut(source: Path, target: Path, share: float) -> None:
    """The beginning of a file."""
    content = source.read_bytes()
    target.write_bytes(content[: int(share * len(content))])


def models(folder: Path) -> None:
    state = load_file(MODEL)
    torch.save({"state_dict": state}, folder / "whole.ckpt")
    torch.save(state, folder / "whole-old.ckpt", _use_new_zipfile_serialization=False)
    cut(folder / "whole.ckpt", folder / "cut-middle.ckpt", 0.5)
    cut(MODEL, folder / "cut-middle.safetensors", 0.5)
    key = UNET + "out.0.bias"
    bias = state[key].float()
    changes = {
        "whole": {},
        "nan": {key: torch.full_like(bias, torch.nan)},
        "infinite": {key: torch.full_like(bias, torch.inf)},
        "beyond-half": {key: torch.full_like(bias, 1e6)},
        "integers": {key: torch.ones_like(bias, dtype=torch.int8)},
        "shapes": {key: torch.zeros(7)},
        "lacking": {key: None},
        "more": {UNET + "label_emb.weight": torch.zeros(2)},
    }
    for name, change in changes.items():
        new = {key: tensor for key, tensor in (state | change).items() if tensor is not None}
        save_file(new, folder / f"{name}.safetensors")
    others = {
        "sd2": {KEYS: torch.zeros(4, 1024), "cond_stage_model.model.ln_final.weight": torch.zeros(4)},
        "sdxl": {KEYS: torch.zeros(4, 2048), "conditioner.embedders.0.transformer.w": torch.zeros(4)},
        "lora": {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.zeros(4, 4)},
        "vae": {"encoder.conv_in.weight": torch.zeros(4, 3, 3, 3), "decoder.conv_in.weight": torch.zeros(4, 4, 3, 3)},
        "inversion": {"<teddy>": torch.zeros(1, 768)},
    }
    for name, tensors in others.items():
        save_file(tensors, folder / f"{name}.safetensors")
    (folder / "empty.ckpt").touch()
    (folder / "text.ckpt").write_text("not a model\n")
    (folder / "page.ckpt").write_text("<!DOCTYPE html><html>Sign in</html>")
    (folder / "pickle.ckpt").write_bytes(pickle.dumps(Path("/"), protocol=2))
    (folder / "folder.ckpt").mkdir()
    (folder / "zip.ckpt").write_bytes(b"PK\x05\x06" + bytes(18))


def concepts(folder: Path) -> None:
    stages = torch.randn(10, 128, generator=torch.Generator().manual_seed(1))
    good = folder / "good.safetensors"
    save_concept(Concept(stages), good)
    save_concept(Concept(torch.zeros(10, 768)), folder / "wide.safetensors")
    origin = {"base_model": "sd-v1-4.ckpt", "base_model_sha256": "0" * 64}
    save_concept(Concept(stages, origin), folder / "other-base.safetensors")
    described = {"format": "pt", "prospect.version": "1", "prospect.num_stages": "10"}
    others = {
        "several": {"<a>": stages, "<b>": stages.clone()},
        "nan-concept": {"*": torch.full((10, 128), torch.nan)},
        "none": {},
    }
    for name, tensors in others.items():
        save_file(tensors, folder / f"{name}.safetensors", described)
    cut(good, folder / "cut-middle-concept.safetensors", 0.5)
    torch.save({"string_to_param": {"*": torch.zeros(1, 128)}}, folder / "inversion.pt")
    cut(folder / "inversion.pt", folder / "cut.pt", 0.7)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header promises so many pixels and that holds hardly any."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    data = png_chunk(b"IDAT", zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + header + data + png_chunk(b"IEND", b"")


def pictures(folder: Path) -> None:
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8))
    for suffix in ("png", "webp"):
        noise.save(folder / f"noise.{suffix}")
    for suffix in ("png", "webp"):
        cut(folder / f"noise.{suffix}", folder / f"cut-middle.{suffix}", 0.5)
    damaged = bytearray((folder / "noise.png").read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF
    (folder / "checksum.png").write_bytes(damaged)
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("not a picture")
    (folder / "bomb.png").write_bytes(png_of_size(100_000, 100_000))
    (folder / "x.png").mkdir()
    (folder / "broken-link.png").symlink_to(folder / "nowhere.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    Image.new("F", (8, 8)).save(folder / "float.tiff")
    Image.new("RGB", (30_000, 1), "red").save(folder / "line.png")
    noise.save(folder / "really-a-png.jpg", format="PNG")
    for name in ("only-text", "one-broken"):
        (folder / name).mkdir()
    (folder / "only-text/a.txt").write_text("no picture")
    noise.save(folder / "one-broken/a.png")
    cut(folder / "noise.png", folder / "one-broken/b.png", 0.5)
    (folder / "no-pictures").mkdir()


def configurations(folder: Path) -> None:
    texts = {
        "empty": "",
        "scalar": "a star\n",
        "list": "- model\n- data\n",
        "tabs": "model:\n\tparams: 1\n",
        "twice": "model: 1\nmodel: 2\n",
        "unknown": "modle:\n  target: x\n",
        "no-data": "model: {target: ldm.models.diffusion.ddpm.LatentDiffusion, base_learning_rate: 1, params: {}}\n",
        "object": "model: !!python/object/apply:os.getcwd []\n",
        "no-model": "data: {target: main.DataModuleFromConfig, params: {train: {}}}\n",
        "deep": "model: " + "[" * 3000 + "]" * 3000,
        "laughs": laughs("model"),
        "interpolation": "data: {params: {batch_size: '${nowhere.at.all}'}}\n",
        "allowing": "allow_targets: [os]\n",
        "star": "- * star\n",
        "words-unknown": "sead: 3\n",
        "words-typed": "{prompt: a, ddim_steps: few}\n",
        "words-laughs": laughs("concepts"),
        "words-nine": "prospect_words: [a, a, a, a, a, a, a, a, a]\n",
    }
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")


def laughs(key: str, levels: int = 12) -> str:
    """Few lines whose aliases stand for 10^levels entries."""
    lines = ["a0: &a0 [ha, ha, ha, ha, ha, ha, ha, ha, ha, ha]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, levels)]
    return "\n".join([*lines, f"{key}: *a{levels - 1}"]) + "\n"


RECORDS = {
    "foreign": '{"prompt": "a", "base_model": "sd-v1-4.ckpt"}',
    "edited": '{"prompt": "a", "content_dir": "a.png", "base_model": "model.safetensors"}',
    "deep-json": "[" * 100_000,
    "config-typed": '{"prompt": "a", "config": {"a": 1}, "ckpt": "models/demo/model.safetensors"}',
    "steps-typed": '{"prompt": "a", "ddim_steps": "many", "base_model": "model.safetensors"}',
}


def records(folder: Path) -> None:
    """PNG files with what the program writes into its own, made by someone else."""
    for name, record in RECORDS.items():
        info = PngInfo()
        info.add_itxt("prospect", record)
        Image.new("RGB", (8, 8)).save(folder / f"record-{name}.png", pnginfo=info)


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
