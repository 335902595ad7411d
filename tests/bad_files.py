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


def cut(source: Path, target: Path, length: float) -> None:
    """The beginning of a file: `length` bytes, a share of it, or (negative) all but so many bytes."""
    content = source.read_bytes()
    target.write_bytes(content[: int(length * len(content)) if 0 < length < 1 else int(length)])


def models(folder: Path) -> None:
    state = load_file(MODEL)
    torch.save({"state_dict": state}, folder / "whole.ckpt")
    torch.save(state, folder / "whole-old.ckpt", _use_new_zipfile_serialization=False)
    for name, length in {"header": 9, "middle": 0.5, "end": -1}.items():
        cut(MODEL, folder / f"cut-{name}.safetensors", length)
        cut(folder / "whole.ckpt", folder / f"cut-{name}.ckpt", length)
        cut(folder / "whole-old.ckpt", folder / f"cut-{name}-old.ckpt", length)

    def changed(name: str, change: dict[str, torch.Tensor | None]) -> None:
        new = {key: tensor for key, tensor in (state | change).items() if tensor is not None}
        save_file(new, folder / f"{name}.safetensors")

    bias = UNET + "out.0.bias"
    changed("whole", {})
    changed("nan", {bias: torch.full_like(state[bias], torch.nan)})
    changed("infinite", {bias: torch.full_like(state[bias].float(), torch.inf)})
    changed("beyond-half", {bias: torch.full_like(state[bias].float(), 1e6)})
    changed("integers", {bias: torch.ones_like(state[bias], dtype=torch.int8)})
    changed("shapes", {bias: torch.zeros(7)})
    changed("lacking", {bias: None})
    changed("more", {UNET + "label_emb.weight": torch.zeros(2)})
    other = {
        "sd2": {KEYS: torch.zeros(4, 1024), "cond_stage_model.model.ln_final.weight": torch.zeros(4)},
        "sdxl": {KEYS: torch.zeros(4, 2048), "conditioner.embedders.0.transformer.w": torch.zeros(4)},
        "lora": {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.zeros(4, 4)},
        "vae": {"encoder.conv_in.weight": torch.zeros(4, 3, 3, 3), "decoder.conv_in.weight": torch.zeros(4, 4, 3, 3)},
        "inversion": {"<teddy>": torch.zeros(1, 768)},
    }
    for name, tensors in other.items():
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
    (folder / "one-run/checkpoints").mkdir(parents=True)
    save_concept(Concept(stages), folder / "one-run/checkpoints/embeddings.safetensors")
    torch.save({"state_dict": {}}, folder / "one-run/checkpoints/last.ckpt")
    described = {"format": "pt", "prospect.version": "1", "prospect.num_stages": "10"}

    def written(name: str, tensors: dict[str, torch.Tensor], **metadata: str) -> None:
        save_file(tensors, folder / f"{name}.safetensors", described | metadata)

    written("several", {"<a>": stages, "<b>": stages.clone()})
    written("stages", {"*": stages[:7].clone()})
    written("nan-concept", {"*": torch.full((10, 128), torch.nan)})
    written("cube", {"*": torch.zeros(2, 10, 128)})
    written("whole-numbers", {"*": torch.zeros(10, 128, dtype=torch.int64)})
    written("version", {"*": stages}, **{"prospect.version": "9"})
    save_file({"clip_l": torch.zeros(1, 768), "clip_g": torch.zeros(1, 1280)}, folder / "xl-concept.safetensors")
    save_file({}, folder / "none.safetensors")
    for name, length in {"header": 9, "middle": 0.5, "end": -1}.items():
        cut(good, folder / f"cut-{name}-concept.safetensors", length)
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
    for suffix in ("png", "jpg", "webp"):
        noise.save(folder / f"noise.{suffix}")
    for name, length in {"signature": 6, "header": 24, "middle": 0.5, "end": 0.97}.items():
        cut(folder / "noise.png", folder / f"cut-{name}.png", length)
    cut(folder / "noise.jpg", folder / "cut-middle.jpg", 0.5)
    cut(folder / "noise.webp", folder / "cut-middle.webp", 0.5)
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
