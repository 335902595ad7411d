"""A concept for another base model is refused with both named; hashes of large files are remembered."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch

from ldm.checkpoint import CheckpointError, file_hash
from ldm.embeddings import Concept, load_concept, save_concept
from ldm.files import base_model
from ldm.files.base_model import base_hash, refuse_other_base
from ldm.modules.embedding_manager import EmbeddingManager
from ldm.modules.encoders.modules import FrozenCLIPEmbedder

ROOT = Path(__file__).parents[1]
OWN = hashlib.sha256(b"weights").hexdigest()[:10]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.ckpt"
    path.write_bytes(b"weights")
    return path


def origin(name: str, content: bytes) -> dict[str, str]:
    return {"base_model": name, "base_model_sha256": hashlib.sha256(content).hexdigest()}


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"step": "3"},
        {"base_model": "base.ckpt"},
        origin("base.ckpt", b"weights"),
        origin("renamed.safetensors", b"weights"),
        {"base_model_sha256": hashlib.sha256(b"weights").hexdigest()},
    ],
)
def test_what_fits(base: Path, metadata: dict[str, str]) -> None:
    refuse_other_base(metadata, base, "It")


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"base_model": "sd.ckpt"}, ["'sd.ckpt'", "'base.ckpt'"]),
        (origin("sd.ckpt", b"other"), ["'sd.ckpt' (SHA-256 d9298a10d1…)", f"'base.ckpt' ({OWN}…)"]),
        (origin("base.ckpt", b"other"), ["d9298a10d1", OWN, "any_base=True (--any_base)"]),
    ],
)
def test_what_does_not(base: Path, metadata: dict[str, str], words: list[str]) -> None:
    with pytest.raises(ValueError, match="It was learned for the base model") as caught:
        refuse_other_base(metadata, base, "It")
    assert all(word in str(caught.value) for word in words)


def test_a_base_model_that_is_gone_is_not_asked(tmp_path: Path) -> None:
    refuse_other_base(origin("sd.ckpt", b"other"), tmp_path / "gone.ckpt", "It")


def test_the_manager_refuses_whole_and_takes_any_base(base: Path) -> None:
    sizes = {"vocab_size": 8, "hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 8}
    text = sizes | {"num_hidden_layers": 1, "max_position_embeddings": 8}
    manager = EmbeddingManager(FrozenCLIPEmbedder("small", 8, text))
    fits, other = Concept(torch.zeros(10, 8)), Concept(torch.ones(10, 8), origin("sd.ckpt", b"other"))
    manager.load({"<b>": other})  # nothing is known of the model's origin
    manager.loaded.clear()
    manager.base_path = base
    with pytest.raises(ValueError, match="embedding for '<b>' was learned for the base model 'sd.ckpt'"):
        manager.load({"*": fits, "<b>": other})
    assert manager.loaded == {}
    manager.load({"*": fits, "<b>": other}, any_base=True)
    assert list(manager.loaded) == ["*", "<b>"]
    with pytest.raises(ValueError, match=r"width 4 \(base model: sd2.ckpt\).* width 8 \(base model: base.ckpt\)"):
        manager.load(Concept(torch.zeros(1, 4), {"base_model": "sd2.ckpt"}), any_base=True)


# Remembered hashes


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(base_model, "REMEMBERED_FROM", 4)
    return tmp_path / "cache" / "prospect-ldm" / "sha256.json"


def test_a_large_file_is_hashed_once_until_it_changes(base: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[Path] = []
    monkeypatch.setattr(base_model, "file_hash", lambda path: counted.append(path) or file_hash(path))
    assert base_hash(base) == base_hash(base) == file_hash(base)
    assert len(counted) == 1 and store.is_file()
    base.write_bytes(b"changed")
    os.utime(base, ns=(1, 1))
    assert base_hash(base) == file_hash(base)
    assert len(counted) == 2 and len(json.loads(store.read_text())) == 1


@pytest.mark.parametrize("content", ["", "[]", "{", '{"x": 3}', "\x00"])
def test_a_damaged_store_is_made_anew(base: Path, store: Path, content: str) -> None:
    store.parent.mkdir(parents=True)
    store.write_text(content.replace('"x"', json.dumps(str(base))))
    assert base_hash(base) == file_hash(base)
    assert json.loads(store.read_text())[str(base)][1] == file_hash(base)


def test_a_store_that_cannot_be_written_only_costs_time(base: Path, store: Path) -> None:
    store.parent.parent.write_text("a file where the folder should be")
    assert base_hash(base) == file_hash(base)


def test_small_files_are_not_remembered(base: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_model, "REMEMBERED_FROM", 100)
    assert base_hash(base) == file_hash(base) and not store.exists()


def test_a_missing_base_model_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.ckpt"):
        base_hash(tmp_path / "none.ckpt")


# The concepts that ship


def test_the_concepts_that_ship_are_for_the_model_that_ships() -> None:
    """`make concepts` learns them again after the model has changed."""
    concepts = sorted((ROOT / "models/demo/concepts").iterdir())
    references = sorted(path.name for path in (ROOT / "models/demo/references").iterdir())
    assert [path.stem for path in concepts] == references
    for path in concepts:
        concept = load_concept(path)
        assert tuple(concept.vectors.shape) == (10, 128) and path.stat().st_size < 6500
        refuse_other_base(concept.metadata, ROOT / "models/demo/model.safetensors", path.name)
        assert "base_model_sha256" in concept.metadata


def test_a_concept_says_its_base_model_through_saving(tmp_path: Path) -> None:
    save_concept(Concept(torch.zeros(1, 4), origin("sd.ckpt", b"other")), tmp_path / "c.safetensors")
    assert load_concept(tmp_path / "c.safetensors").metadata.items() >= origin("sd.ckpt", b"other").items()
