"""The reader of foreign tensors: one sentence for everything that is not what was wanted, through both entry points."""

import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file
from torch import nn

from ldm.checkpoint import CheckpointError, read_state_dict
from ldm.embeddings import EmbeddingError, load_concept
from ldm.files.tensors import TensorFileError, named_tensors, read_checkpoint, read_file
from ldm.methods.prospect import GeneratorBlock

Read = Callable[[Path], object]
READERS = (read_state_dict, load_concept)
TENSORS = {"w": torch.randn(100, 100), "v": torch.ones(3)}


def refusal(read: Read, path: Path) -> str:
    """The message, which is one line that names the file and ends like a sentence."""
    with pytest.raises((CheckpointError, EmbeddingError)) as caught:
        read(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and message[-1] in ".?" and len(message) < 600
    return message


def torch_bytes(content: object, path: Path, legacy: bool = False) -> bytes:
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path.read_bytes()


CONTENTS = {
    "is empty; download it again": b"",
    "is a text file; use a .safetensors, .ckpt, .pt or .bin file": b"not a model\n",
    "is a web page, perhaps of a login; log in": b"\n<!DOCTYPE html><html><body>Sign in</body></html>",
    "is a web page": b"<HTML>Sign in</HTML>",
    "is a git-lfs pointer and not the file itself; run `git lfs pull`": b"version https://git-lfs.github.com/spec/v1\n",
    "image": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    "of an unknown format": bytes(range(200, 240)) + bytes(100),
    "of an unknown format; ": "Zugriff nicht möglich".encode(),
    "more than tensors": b"\x80\x02garbage",
    "cut off (the download was not finished)": b"PK\x03\x04" + bytes(100),
    "damaged or incomplete": (1 << 40).to_bytes(8, "little") + b"{" + bytes(100),
    "damaged": (2**62).to_bytes(8, "little") + b"{}",
    "holds no": (2).to_bytes(8, "little") + b"{}",
}


@pytest.mark.parametrize("read", READERS)
def test_contents_of_other_kinds(tmp_path: Path, read: Read) -> None:
    path = tmp_path / "model.ckpt"
    for words, content in CONTENTS.items():
        path.write_bytes(content)
        assert words in refusal(read, path)
    for content in ({}, {"state_dict": {}}, [1, 2], {"a": "text"}):
        torch.save(content, path)
        assert "holds" in refusal(read, path)


@pytest.mark.parametrize("read", READERS)
def test_damaged_files(tmp_path: Path, read: Read) -> None:
    path = tmp_path / "file"
    whole = {legacy: torch_bytes(TENSORS, path, legacy) for legacy in (False, True)}
    cut = {
        "cut off": whole[False][:-1000],
        "damaged or incomplete": whole[True][: len(whole[True]) // 2],
        "damaged or incomplete (": whole[False].replace(b"PK\x01\x02", b"PK\0\0"),
        "incomplete": save(TENSORS)[:-1],
    }
    for words, content in cut.items():
        path.write_bytes(content)
        assert words in refusal(read, path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "damaged or incomplete" in refusal(read, path)


@pytest.mark.parametrize("read", READERS)
def test_files_that_are_not_there(tmp_path: Path, read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sd-v1-4.ckpt").touch()
    (tmp_path / "broken-link").symlink_to(tmp_path / "nowhere")
    assert f"did you mean '{tmp_path}/sd-v1-4.ckpt'?" in refusal(read, tmp_path / "sd-v1.4.ckpt")
    assert refusal(read, tmp_path / "q").endswith("check the path (model files in its folder: sd-v1-4.ckpt).")
    assert "nor its folder" in refusal(read, tmp_path / "no" / "folder.pt")
    assert "check the path" in refusal(read, tmp_path / "broken-link")
    assert refusal(read, Path("/dev/zero")) == "'/dev/zero' is a device and no file; check the path."
    assert "folder" in refusal(read, tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    save_file({"w": torch.ones(1, 4)}, tmp_path / "a.safetensors")
    assert read("~/a.safetensors")
    if os.name == "posix":  # elsewhere names are text
        path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/na\xffme.pt"))
        torch.save({"w": torch.ones(1, 4)}, path.open("wb"))
        with pytest.raises(TensorFileError, match=r"na\?me\.pt': its name is not UTF-8; rename the file or its fold"):
            read(path)


NOT_WHOLE = {
    "repeated without end": lambda: torch.ones(1).expand(2**40),
    "repeated 2^62 times": lambda: torch.ones(1).expand(2**62),
    "overlapping": lambda: torch.as_strided(torch.ones(4), (2**31, 2**31), (0, 0)),
    "sparse": lambda: torch.sparse_coo_tensor(torch.tensor([[0]]), torch.ones(1), (2**40,)),
    "without a storage": lambda: torch.empty(2**40, device="meta"),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)]),
    "jagged": lambda: torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)], layout=torch.jagged),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
}


@pytest.mark.parametrize("name", NOT_WHOLE)
@pytest.mark.parametrize("read", READERS)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_not_in_the_file(tmp_path: Path, read: Read, name: str) -> None:
    torch.save({"*": NOT_WHOLE[name]()}, tmp_path / "a.pt")
    assert "* claims more values than the file holds" in refusal(read, tmp_path / "a.pt")


def test_what_is_in_several_places_is_read_once(tmp_path: Path) -> None:
    """Written out, the dicts would have more names than there are atoms in the sun, and the module would be endless."""
    for levels in (18, 200):
        tree: dict = {"w": torch.ones(2)}
        for _ in range(levels):
            tree = {"a": tree, "b": tree}
        torch.save(tree, tmp_path / "a.ckpt")
        assert len(read_state_dict(tmp_path / "a.ckpt")) == 1
    block = nn.ModuleDict({"x": nn.Linear(2, 3)})
    block["x"].loop = block
    torch.save(block, tmp_path / "a.pt")
    assert named_tensors(tmp_path, read_file(tmp_path / "a.pt").content).keys() == {"x.weight", "x.bias"}


def test_compressed_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"w": torch.zeros(1, 2**22)}, tmp_path / "plain.ckpt")
    path = tmp_path / "small.ckpt"
    with zipfile.ZipFile(tmp_path / "plain.ckpt") as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    assert read_state_dict(path)["w"].shape == (1, 2**22) and load_concept(path).width == 2**22
    monkeypatch.setattr("ldm.files.tensors._UNPACKED", 2**22)
    assert all("GB when unpacked; use a .safetensors version" in refusal(read, path) for read in READERS)


def test_concepts_and_models_in_each_others_place(tmp_path: Path) -> None:
    unet = {"model.diffusion_model.middle_block.1.attn2.to_k.weight": torch.zeros(4, 768)}
    kinds = {
        "holds a LoRA": {f"lora_unet_a.lora_{way}.weight": torch.ones(4, 4) for way in ("down", "up")},
        "holds a base model (Stable Diffusion v1)": unet,
        "holds a VAE": {f"{part}.conv_in.weight": torch.ones(4, 3) for part in ("encoder", "decoder")},
    }
    for words, tensors in kinds.items():
        save_file(tensors, tmp_path / "a.safetensors")
        assert f"{words} and no embedding; use a learned" in refusal(load_concept, tmp_path / "a.safetensors")
    torch.save({"state_dict": {"w": torch.ones(2)}}, tmp_path / "last.ckpt")
    words = "holds a checkpoint and no embedding; use a learned concept (of a run: embeddings.safetensors)."
    assert words in refusal(load_concept, tmp_path / "last.ckpt")
    save_file({"*": torch.ones(2, 4)}, tmp_path / "a.safetensors", {"prospect.version": "1"})
    content = {"attention": GeneratorBlock(8, 2), "initial_embeddings": nn.Parameter(torch.ones(1, 8))}
    torch.save(content, tmp_path / "a.pt")
    for name in ("a.safetensors", "a.pt"):
        assert "is a learned concept, not a model" in refusal(read_state_dict, tmp_path / name)


def test_the_folder_of_a_run_is_its_concept(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    save_file({"*": torch.ones(2, 4)}, tmp_path / "checkpoints/embeddings.safetensors", {"prospect.num_stages": "2"})
    for place in (tmp_path, tmp_path / "checkpoints"):
        assert load_concept(place).num_stages == 2


def test_checkpoints_to_resume_from(tmp_path: Path) -> None:
    path, content = tmp_path / "last.ckpt", {"state_dict": TENSORS, "optimizer_states": [], "global_step": 3}
    whole = torch_bytes(content, path)
    assert read_checkpoint(path, content)["global_step"] == 3
    bad = {
        "(it holds no optimizer_states);": torch_bytes({"state_dict": TENSORS, "global_step": 3}, path),
        "holds no state_dict, optimizer_states, global_step": torch_bytes([1], path),
        "(it is in torch's old format); use its last.ckpt": torch_bytes(content, path, legacy=True),
        "is no checkpoint of a training run": save(TENSORS),
        "the checksum of": whole.replace(TENSORS["v"].numpy().tobytes(), bytes(12)),
    }
    for words, changed in bad.items():
        path.write_bytes(changed)
        assert words in refusal(lambda path: read_checkpoint(path, content), path)
