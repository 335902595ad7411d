"""The text transformer equals transformers' CLIPTextModel; damaged tokenizers are refused."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import CLIPTextConfig as TheirConfig
from transformers import CLIPTextModel as TheirModel

from ldm.conditioning.learned import TokenVectors
from ldm.modules.encoders.clip import CLIPTextConfig, CLIPTextModel
from ldm.modules.encoders.modules import FrozenCLIPEmbedder, hub_folder, open_tokenizer

SMALL = {
    "vocab_size": 50,
    "hidden_size": 24,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "max_position_embeddings": 16,
}


@pytest.mark.parametrize(("act", "width"), [("quick_gelu", 24), ("gelu", 48)])
@torch.no_grad()
def test_equal_to_transformers(act: str, width: int) -> None:
    torch.manual_seed(0)
    sizes = {**SMALL, "hidden_size": width, "hidden_act": act, "layer_norm_eps": 1e-3}
    theirs = TheirModel(TheirConfig(**sizes, bos_token_id=0, eos_token_id=1, pad_token_id=1)).eval()
    for parameter in theirs.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.3)
    ours = CLIPTextModel(CLIPTextConfig(**sizes))
    state = theirs.state_dict()
    ours.text_model.load_state_dict({key.removeprefix("text_model."): value for key, value in state.items()})
    for length in (16, 5):
        ids = torch.randint(50, (3, length))
        expected = theirs(input_ids=ids).last_hidden_state
        found = ours.text_model.final_layer_norm(ours.text_model(ours.text_model.token_table[ids]))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def small_embedder(**changes: object) -> FrozenCLIPEmbedder:
    torch.manual_seed(0)
    return FrozenCLIPEmbedder("small", max_length=8, text_config={**SMALL, **changes})


@torch.no_grad()
def test_learned_vectors_take_the_place_of_negative_slots() -> None:
    embedder, vectors = small_embedder(), torch.randn(3, 24)
    slots = torch.tensor([[0, 5, -1, -3], [7, -2, -2, 9]])
    table = embedder.token_table
    expected = torch.stack(
        [
            torch.stack([table[0], table[5], vectors[0], vectors[2]]),
            torch.stack([table[7], vectors[1], vectors[1], table[9]]),
        ]
    )
    assert torch.equal(embedder.embed(slots, vectors[None, None]).squeeze(0), expected)
    text = embedder.transformer.text_model
    assert torch.equal(embedder(slots, vectors), text.final_layer_norm(text(expected)))
    positive = slots.clamp(min=0)
    assert torch.equal(embedder.embed(positive).squeeze(0), table[positive])


def test_gradients_reach_the_learned_vectors_that_occur() -> None:
    embedder, vectors = small_embedder().requires_grad_(False), torch.randn(3, 24, requires_grad=True)
    embedder(torch.tensor([[0, -1, 5, -3]]), vectors).square().sum().backward()
    assert (vectors.grad.abs().sum(dim=1) > 0).tolist() == [True, False, True]


def test_tokens_that_layers_share_are_computed_once() -> None:
    """The contexts of all layers, and their gradients, are the same; the shared tokens enter once."""
    embedder, rows = small_embedder(), []
    embedder.transformer.text_model.encoder.layers[1].mlp.register_forward_hook(lambda _, x, __: rows.append(x[0]))
    slots = torch.tensor([[1, 2, 3, -1, 5, -2], [1, 4, 4, -2, 6, 7]])
    generator = torch.Generator().manual_seed(0)
    e, residual = torch.randn(2, 5, 2, 2, 24, generator=generator)  # a table of two rows for 5 layers and each prompt
    found = {}
    for least in (None, 0):
        embedder.share_rows_from, vectors = least, e.clone().requires_grad_()
        rows.clear()
        context = embedder.encode(slots, TokenVectors(vectors, residual), shared=3)
        (context.k.square() * torch.arange(24)).sum().backward()
        found[least] = context.k, context.v, vectors.grad
        assert sum(x.numel() // 24 for x in rows) == (2 * 5 * 6 if least is None else 2 * 3 + 2 * 5 * 3)
    for shared, alone in zip(found[0], found[None], strict=True):
        torch.testing.assert_close(shared, alone, rtol=1e-5, atol=1e-5)
    assert found[0][0].shape == (5, 2, 6, 24) and not torch.equal(found[0][0], found[0][1])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden_act": "relu"}, "'quick_gelu' or 'gelu', not 'relu'"),
        ({"max_position_embeddings": 7}, "max_length 8 exceeds the 7 positions"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_embedder(**sizes)


def test_an_unknown_version_is_refused() -> None:
    with pytest.raises(ValueError, match="did you mean 'openai/clip-vit-large-patch14'"):
        FrozenCLIPEmbedder("openai/clip-vit-large-patch41")


DEMO = Path(__file__).parents[2] / "models/demo/tokenizer"
GOLDEN = Path(__file__).parents[1] / "golden/tokenizer"


def first_half(content: bytes) -> bytes:
    return b"\n".join(content.splitlines()[: content.count(b"\n") // 2])


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("tokenizer_config.json", lambda content: content.replace(b"32", b'"x"'), "cannot be read (.*not supported"),
        ("merges.txt", lambda _: b"#version: 0.2\n", "merges.txt lacks what makes 189 tokens of vocab.json, such as"),
        ("merges.txt", first_half, "merges.txt lacks what makes 95 tokens"),
        ("merges.txt", lambda _: (GOLDEN / "merges.txt").read_bytes(), "cannot be read (.*out of vocabulary"),
        ("merges.txt", lambda content: b"\xef\xbb\xbf" + content, "cannot be read (.*out of vocabulary"),
        ("merges.txt", None, "cannot be read (.*merges"),
        ("vocab.json", lambda content: content[:3000], "cannot be read (.*EOF"),
        ("vocab.json", lambda content: b"\xef\xbb\xbf" + content, "cannot be read (.*line 1 column 1"),
        ("vocab.json", lambda _: (GOLDEN / "vocab.json").read_bytes(), "cannot be read|no CLIP vocabulary"),
        ("vocab.json", None, "cannot be read (.*vocab"),
        ("tokenizer_config.json", lambda _: b'{"a":', "cannot be read (.*line 1 column 6"),
        ("tokenizer_config.json", lambda _: b"[]", "cannot be read"),
        ("tokenizer_config.json", lambda content: content.replace(b"<|endoftext|>", b"in"), "no CLIP vocabulary"),
        ("tokenizer_config.json", None, ""),
    ],
)
def test_damaged_tokenizers_are_refused(tmp_path: Path, name: str, change, words: str) -> None:
    """Most of these would otherwise give other tokens, and so other images, without a word."""
    shutil.copytree(DEMO, tmp_path, dirs_exist_ok=True)
    content = (DEMO / name).read_bytes()
    (tmp_path / name).unlink() if change is None else (tmp_path / name).write_bytes(change(content))
    if not words:
        assert open_tokenizer(tmp_path, 703)("a star")["input_ids"] == open_tokenizer(DEMO, 703)("a star")["input_ids"]
        return
    with pytest.raises(OSError, match=words.replace("(", r"\(")) as caught:
        open_tokenizer(tmp_path, 703)
    assert f"'{tmp_path}'" in str(caught.value) and "\n" not in str(caught.value)


def test_a_list_of_words_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_bytes(b"star\n\xa1")
    embedder = FrozenCLIPEmbedder("small", max_length=8, text_config=SMALL, tokenizer=str(tmp_path))
    with pytest.raises(ValueError, match="words.txt' is not UTF-8 text"):
        _ = embedder.known_words


@pytest.mark.parametrize("folder", [".", "nowhere"])
def test_a_folder_without_a_vocabulary_is_refused(tmp_path: Path, folder: str) -> None:
    """transformers 5 makes a tokenizer of two tokens out of nothing; prompts would turn into end marks."""
    embedder = FrozenCLIPEmbedder("small", max_length=8, text_config=SMALL, tokenizer=str(tmp_path / folder))
    with pytest.raises(OSError, match="no CLIP vocabulary .* in|cannot be read"):
        _ = embedder.tokenizer
    with pytest.raises(OSError, match=r"no CLIP vocabulary \(vocab.json, merges.txt\) of 704 tokens"):
        open_tokenizer(DEMO, 704)


def test_the_hubs_cache_is_used_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files in the cache are found; nothing is asked of the network."""
    repository = tmp_path / "models--openai--clip-vit-large-patch14"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (snapshot / name).write_text("{}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the hub was asked"))
    assert hub_folder("openai/clip-vit-large-patch14") == snapshot
