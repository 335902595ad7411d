"""The learned vectors: the generator block, the table, initial words, and what changes with training."""

import contextlib
from pathlib import Path

import pytest
import tiny
import torch

from ldm.embeddings import Concept, load_concept
from ldm.methods.prospect import GeneratorBlock
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.embedding_manager import EmbeddingManager
from ldm.modules.encoders.modules import FrozenCLIPEmbedder


def small_embedder(width: int = 128) -> FrozenCLIPEmbedder:
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "num_attention_heads": 4, "intermediate_size": 16, "num_hidden_layers": 1}
    return FrozenCLIPEmbedder("small", text_config=sizes, tokenizer=str(tiny.TOKENIZER))


@pytest.fixture(scope="module")
def embedder() -> FrozenCLIPEmbedder:
    return small_embedder()


@torch.no_grad()
def test_dropout_only_while_training(trainable: LatentDiffusion) -> None:
    manager = trainable.embedding_manager
    for mode in (False, True):
        trainable.train(mode)
        first, second = manager.embeddings(), manager.embeddings()
        assert torch.equal(first, second) != mode
    rates = [m.p for m in manager.attention.modules() if isinstance(m, torch.nn.Dropout)]
    assert rates == [0.1] * 3


@pytest.mark.parametrize("stages", [1, 4, 10, 50])
@pytest.mark.parametrize("generator", ["block", "table"])
def test_any_number_of_stages_and_width_128(embedder: FrozenCLIPEmbedder, generator: str, stages: int) -> None:
    manager = EmbeddingManager(embedder, "*", "teddy", num_stages=stages, generator=generator).eval()
    vectors = manager.embeddings()
    assert vectors.shape == (stages, 128) and vectors.dtype == torch.float32
    assert manager.rows() == {"*": [[row] for row in range(stages)]}
    assert torch.equal(manager.vectors(), vectors)
    vectors.sum().backward()
    assert any(p.grad.abs().max() > 0 for p in manager.embedding_parameters())
    assert not manager.initial_embeddings.requires_grad


def test_the_reference_size_of_the_generator_block() -> None:
    with torch.device("meta"):
        block = GeneratorBlock(768, 10)
    assert sum(p.numel() for p in block.parameters()) == 31_477_248


def test_a_table_starts_around_the_initial_embedding(embedder: FrozenCLIPEmbedder) -> None:
    torch.manual_seed(0)
    single = EmbeddingManager(embedder, "*", "teddy", num_stages=1, generator="table")
    assert torch.equal(single.embeddings(), single.initial_embeddings), "Textual Inversion starts at the word itself"
    for spread in (0.0, 1.0, 3.0):
        manager = EmbeddingManager(embedder, "*", "teddy", num_stages=50, generator="table", initial_spread=spread)
        distance = (manager.embeddings() - manager.initial_embeddings).std() / manager.initial_embeddings.std()
        assert distance.item() == pytest.approx(spread, rel=0.05, abs=1e-6)
    assert [name for name, _ in manager.named_parameters()] == ["learned.table"]


@pytest.mark.parametrize(
    ("words", "text", "ids"),
    [
        ("teddy", "teddy", [11798]),
        (["teddy"], "teddy", [11798]),
        ("blue dog", "blue dog", [1746, 1929]),
        (["a", "cat"], "a cat", [320, 2368]),
    ],
)
def test_initial_words_are_averaged_over_their_tokens(
    embedder: FrozenCLIPEmbedder, words: str | list[str], text: str, ids: list[int]
) -> None:
    manager = EmbeddingManager(embedder, "*", words)
    expected = embedder.token_table[ids].mean(dim=0, keepdim=True)
    torch.testing.assert_close(manager.initial_embeddings, expected, rtol=0, atol=1e-7)
    assert manager.initial_word == text


@pytest.mark.parametrize("words", ["", " ", ["", " "]])
def test_an_initial_word_without_tokens_is_refused(embedder: FrozenCLIPEmbedder, words: str | list[str]) -> None:
    with pytest.raises(ValueError, match="no token"):
        EmbeddingManager(embedder, "*", words)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"generator": "blok"}, "'block' or 'table', not 'blok'")],
)
def test_wrong_parameters_are_refused(embedder: FrozenCLIPEmbedder, wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EmbeddingManager(embedder, "*", "teddy", **wrong)


def test_nothing_learned_and_nothing_loaded(embedder: FrozenCLIPEmbedder) -> None:
    manager = EmbeddingManager(embedder)
    assert manager.rows() == {} and manager.vectors() is None and manager.embedding_parameters() == []
    with pytest.raises(ValueError, match="call embedding_manager.load"):
        manager.embeddings()


def test_loaded_concepts_stand_beside_the_learned_one(embedder: FrozenCLIPEmbedder) -> None:
    manager = EmbeddingManager(embedder, ["*", "<same>"], "teddy", num_stages=4, generator="table")
    manager.load({"<cat>": Concept(torch.randn(2, 128)), "<one>": Concept(torch.randn(1, 128))})
    assert manager.rows() == {
        "*": [[0], [1], [2], [3]],
        "<same>": [[0], [1], [2], [3]],
        "<cat>": [[4], [4], [5], [5]],
        "<one>": [[6]] * 4,
    }
    vectors = manager.vectors()
    assert torch.equal(vectors[:4], manager.embeddings())
    assert torch.equal(vectors[4:6], manager.loaded["<cat>"].vectors)
    assert torch.equal(vectors[6:], manager.loaded["<one>"].vectors)


def test_a_loaded_concept_takes_the_first_placeholder(embedder: FrozenCLIPEmbedder) -> None:
    manager = EmbeddingManager(embedder, "*", "teddy", num_stages=10)
    concept = Concept(torch.randn(10, 128))
    manager.load(concept)
    assert torch.equal(manager.embeddings(), concept.vectors)
    assert manager.rows() == {"*": [[row] for row in range(10)]} and len(manager.vectors()) == 10


def test_what_is_learned_stays_apart_from_what_is_loaded(embedder: FrozenCLIPEmbedder, tmp_path: Path) -> None:
    manager = EmbeddingManager(embedder, ["*", "<same>"], "teddy", num_stages=4, generator="table")
    manager.load({"*": Concept(torch.randn(2, 128))})
    assert manager.rows() == {"<same>": [[0], [1], [2], [3]], "*": [[4], [4], [5], [5]]}
    assert torch.equal(manager.vectors(), torch.cat([manager.table[:, 0], manager.loaded["*"].vectors]))
    manager.save(tmp_path / "learned.safetensors")
    assert torch.equal(load_concept(tmp_path / "learned.safetensors").vectors, manager.table[:, 0].detach())


@pytest.mark.parametrize("generator", ["block", "table"])
def test_learning_starts_from_vectors_whose_length_is_kept(embedder: FrozenCLIPEmbedder, generator: str) -> None:
    manager = EmbeddingManager(embedder, "*", "teddy", num_stages=4, generator=generator, norm="word").eval()
    vectors = torch.nn.functional.normalize(torch.randn(4, 128), dim=-1) * manager.initial_embeddings.norm()
    manager.start_from(Concept(vectors))
    torch.testing.assert_close(manager.embeddings(), vectors, rtol=1e-4, atol=1e-5)


def test_more_tokens_than_a_prompt_has_are_refused(embedder: FrozenCLIPEmbedder) -> None:
    room = embedder.max_length - 2
    manager = EmbeddingManager(embedder)
    manager.load(Concept({"table": torch.zeros(1, 1, room, 128)}, method="table"))
    with pytest.raises(ValueError, match=f"has 100000 tokens, and a prompt of this model has room for {room}"):
        manager.load(Concept({"table": torch.zeros(1, 1, 100_000, 128)}, method="table"))


@pytest.mark.parametrize("asked", [{"generator": "table"}, {"dropout": 0.0}, {"norm": "word"}, {"initial_spread": 2.0}])
def test_settings_of_prospect_are_refused_with_another_method(embedder: FrozenCLIPEmbedder, asked: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(asked))} has no effect with the method 'neti'"):
        EmbeddingManager(embedder, "*", "teddy", method="neti", **asked)
    assert EmbeddingManager(embedder, "*", method="neti", **asked).learned is None  # to generate with


METHODS = ("prospect", "textual-inversion", "xti", "table", "neti", "catversion")


@pytest.mark.parametrize("method", METHODS)
def test_learning_starts_from_a_concept_of_its_method_only(
    embedder: FrozenCLIPEmbedder, method: str, tmp_path: Path
) -> None:
    managers = {name: EmbeddingManager(embedder, "*", "teddy", method=name, num_layers=7) for name in METHODS}
    for other, manager in managers.items():
        manager.save(tmp_path / f"{other}.safetensors")
        start = load_concept(tmp_path / f"{other}.safetensors")
        alike = other == method or {other, method} == {"prospect", "table"}
        with contextlib.nullcontext() if alike else pytest.raises(ValueError, match="cannot be used: ") as caught:
            managers[method].start_from(start)
        assert alike or "another copy" not in str(caught.value)


@pytest.mark.parametrize(
    ("stages", "rows"), [(1, [0] * 5), (5, [0, 1, 2, 3, 4]), (10, [1, 3, 5, 7, 9]), (2, [0, 0, 1, 1, 1])]
)
def test_a_concept_with_other_stages_is_read_by_time(
    embedder: FrozenCLIPEmbedder, stages: int, rows: list[int]
) -> None:
    manager = EmbeddingManager(embedder, num_stages=5)
    manager.load(Concept(torch.zeros(stages, 128)))
    assert manager.rows() == {"*": [[row] for row in rows]}


def test_concepts_can_be_unloaded(embedder: FrozenCLIPEmbedder) -> None:
    manager = EmbeddingManager(embedder)
    manager.load({"<a>": Concept(torch.randn(2, 128)), "<b>": Concept(torch.randn(1, 128))})
    manager.unload("<a>")
    assert list(manager.rows()) == ["<b>"] and len(manager.vectors()) == 1
    with pytest.raises(ValueError, match="'<a>'; loaded: <b>"):
        manager.unload("<a>")
    manager.unload()
    assert manager.rows() == {} and manager.vectors() is None


def test_a_concept_for_another_model_is_refused_whole(embedder: FrozenCLIPEmbedder) -> None:
    manager = EmbeddingManager(embedder, "*", "teddy")
    with pytest.raises(ValueError, match="width 768.*width 128.*another base model"):
        manager.load({"<cat>": Concept(torch.zeros(1, 128)), "*": Concept(torch.zeros(10, 768))})
    assert manager.loaded == {}


def test_distance_to_the_initial_word(embedder: FrozenCLIPEmbedder) -> None:
    manager = EmbeddingManager(embedder, "*", "teddy", num_stages=3, generator="table")
    with torch.no_grad():
        manager.table[:, 0].copy_(manager.initial_embeddings + torch.tensor([[0.0], [1.0], [2.0]]))
    assert manager.distance_to_initial().item() == pytest.approx((0 + 1 + 4) * 128 / 3, rel=1e-4)
