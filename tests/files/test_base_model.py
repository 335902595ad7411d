"""A model has a fingerprint, and a concept for another base model is refused with both named."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ldm.checkpoint import CheckpointError, base_model_of, read_base_model, read_state_dict
from ldm.embeddings import Concept, load_concept
from ldm.files.base_model import fingerprint, refuse_other_base, same_base
from ldm.modules.embedding_manager import EmbeddingManager
from ldm.modules.encoders.modules import FrozenCLIPEmbedder

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models/demo/model.safetensors"
OURS = {"base_model": "base.ckpt", "base_model_fingerprint": "a" * 16}
OTHER = {"base_model": "sd.ckpt", "base_model_fingerprint": "b" * 16}


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return {key: tensor.float() for key, tensor in read_state_dict(MODEL).items()}


def test_copies_of_a_model_have_its_fingerprint(tmp_path: Path, state: dict[str, Tensor]) -> None:
    ours = fingerprint(state)
    torch.save({"state_dict": {f"module.{key}": tensor.half() for key, tensor in state.items()}}, tmp_path / "a.ckpt")
    assert base_model_of(tmp_path / "a.ckpt") == {"base_model": "a.ckpt", "base_model_fingerprint": ours}
    save_file(state, tmp_path / "b.safetensors")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        read, base = read_base_model(tmp_path / "b.safetensors", dtype)
        assert base["base_model_fingerprint"] == ours
        assert fingerprint(read) == ours or dtype == torch.bfloat16
    with pytest.raises(CheckpointError, match=r"none\.ckpt"):
        base_model_of(tmp_path / "none.ckpt")


def test_a_change_of_any_part_changes_the_fingerprint(state: dict[str, Tensor]) -> None:
    parts = ("middle_block.1.", "attn2.to_v.weight", "text_model.encoder.layers.0.mlp.fc1.weight", "first_stage_model.")
    for part in parts:
        changed = next(key for key in state if part in key)
        is_same = fingerprint(state | {changed: state[changed] * 1.01}) == fingerprint(state)
        assert is_same == (part == "first_stage_model.")


SAME = [
    ({}, OURS, None),
    (OURS, {}, None),
    (OURS, OURS, True),
    (OURS | {"base_model": "renamed.safetensors"}, OURS, True),
    (OTHER | {"base_model": "base.ckpt"}, OURS, False),
    ({"base_model": "sd.ckpt"}, OURS, False),
    ({"base_model": "base.safetensors", "base_model_sha256": "0" * 64}, OURS, True),
]


@pytest.mark.parametrize(("metadata", "base", "same"), SAME)
def test_which_base_models_are_the_same(
    metadata: dict[str, str], base: dict[str, str], same: bool | None, caplog: pytest.LogCaptureFixture
) -> None:
    assert same_base(metadata, base) is same_base(base, metadata) is same
    if same is False:
        with pytest.raises(ValueError, match=r"It was learned for the base model '.*any_base=True \(--any_base\)"):
            refuse_other_base(metadata, base, "It")
    else:
        refuse_other_base(metadata, base, "It")
    only_name = same is True and "base_model_fingerprint" not in metadata
    assert ("It does not identify its base model; only the name was compared." in caplog.text) == only_name


def test_the_manager_refuses_whole_and_takes_any_base() -> None:
    sizes = {"vocab_size": 8, "hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 8}
    text = sizes | {"num_hidden_layers": 1, "max_position_embeddings": 8}
    manager = EmbeddingManager(FrozenCLIPEmbedder("small", 8, text))
    fits, other = Concept(torch.zeros(10, 8)), Concept(torch.ones(10, 8), OTHER)
    manager.load({"<b>": other})  # nothing is known of the model's origin
    manager.loaded.clear()
    manager.base_model = OURS
    words = (
        r"embedding for '<b>' was learned for the base model 'sd.ckpt' \(fingerprint b{16}\), but this is 'base.ckpt'"
    )
    with pytest.raises(ValueError, match=words):
        manager.load({"*": fits, "<b>": other})
    assert manager.loaded == {}
    manager.load({"*": fits, "<b>": other}, any_base=True)
    assert list(manager.loaded) == ["*", "<b>"]
    with pytest.raises(ValueError, match=r"width 4 \(base model: sd2.ckpt\).* width 8 \(base model: base.ckpt\)"):
        manager.load(Concept(torch.zeros(1, 4), {"base_model": "sd2.ckpt"}), any_base=True)


def test_the_concepts_that_ship_are_for_the_model_that_ships(caplog: pytest.LogCaptureFixture) -> None:
    """`make concepts` learns them again after the model has changed."""
    concepts = sorted((ROOT / "models/demo/concepts").iterdir())
    references = sorted(path.name for path in (ROOT / "models/demo/references").iterdir())
    assert [path.stem for path in concepts] == references
    for path in concepts:
        concept = load_concept(path)
        assert tuple(concept.vectors.shape) == (10, 128) and path.stat().st_size < 6500
        refuse_other_base(concept.metadata, base_model_of(MODEL), path.name)
    assert not caplog.records
