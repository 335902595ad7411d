"""The learned vectors: the generator block, the table, initial words, and what changes with training."""

import contextlib
import itertools
from pathlib import Path

import pytest
import tiny
import torch

from ldm.embeddings import Concept, load_concept
from ldm.methods.prospect import GeneratorBlock
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.embedding_manager import EmbeddingManager
from ldm.modules.encoders.modules import FrozenCLIPEmbedder


@pytest.fixture(scope="module")
def embedder() -> FrozenCLIPEmbedder:
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 16, "num_hidden_layers": 1}
    return FrozenCLIPEmbedder("small", text_config=sizes, tokenizer=str(tiny.TOKENIZER))


@torch.no_grad()
def test_dropout_only_while_training(trainable: LatentDiffusion) -> None:
    manager = trainable.embedding_manager
    for mode in (False, True):
        trainable.train(mode)
        first, second = manager.embeddings(), manager.embeddings()
        assert torch.equal(first, second) != mode
    rates = [m.p for m in manager.attention.modules() if isinstance(m, torch.nn.Dropout)]
    assert rates == [0.1] * 3


@pytest.mark.parametrize("stages", [1, 10])
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
    manager = EmbeddingManager(embedder, "*", "teddy", num_stages=50, generator="table")
    distance = (manager.embeddings() - manager.initial_embeddings).std() / manager.initial_embeddings.std()
    assert distance.item() == pytest.approx(1.0, rel=0.05)
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


@pytest.mark.parametrize(
    ("words", "wrong", "message"),
    [
        ("", {}, "no token"),
        (["", " "], {}, "no token"),
        ("teddy", {"generator": "blok"}, "'block' or 'table', not 'blok'"),
        ("teddy", {"norm": "fixed"}, "'free' or 'word', not 'fixed'"),
        ("teddy", {"method": "neti", "generator": "table"}, "generator has no effect with the method 'neti'"),
        ("teddy", {"method": "neti", "dropout": 0.0}, "dropout has no effect with the method 'neti'"),
        ("teddy", {"method": "neti", "norm": "word"}, "norm has no effect with the method 'neti'"),
    ],
)
def test_wrong_parameters_are_refused(
    embedder: FrozenCLIPEmbedder, words: str | list[str], wrong: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        EmbeddingManager(embedder, "*", words, **wrong)


def test_settings_of_prospect_do_not_matter_for_generating(embedder: FrozenCLIPEmbedder) -> None:
    assert EmbeddingManager(embedder, "*", method="neti", generator="table", norm="word").learned is None


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


def test_what_is_learned_stays_apart_from_what_is_loaded(embedder: FrozenCLIPEmbedder, tmp_path: Path) -> None:
    """A concept for the first placeholder is what `embeddings` returns, and not what is saved."""
    manager = EmbeddingManager(embedder, ["*", "<same>"], "teddy", num_stages=4, generator="table")
    concept, table = Concept(torch.randn(2, 128)), manager.learned.table[:, 0]
    manager.load(concept)
    assert torch.equal(manager.embeddings(), concept.vectors)
    assert manager.rows() == {"<same>": [[0], [1], [2], [3]], "*": [[4], [4], [5], [5]]}
    assert torch.equal(manager.vectors(), torch.cat([table, concept.vectors]))
    manager.save(tmp_path / "learned.safetensors")
    assert torch.equal(load_concept(tmp_path / "learned.safetensors").vectors, table.detach())


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


def test_learning_starts_from_a_concept_of_its_method_only(embedder: FrozenCLIPEmbedder, tmp_path: Path) -> None:
    names = ("prospect", "textual-inversion", "xti", "table", "neti", "catversion")
    managers = {name: EmbeddingManager(embedder, "*", "teddy", method=name, num_layers=7) for name in names}
    for name, manager in managers.items():
        manager.save(tmp_path / f"{name}.safetensors")
    for method, other in itertools.product(names, names):
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
    with pytest.raises(ValueError, match="Nothing is learned here"):
        manager.start_from(Concept(torch.zeros(10, 128)))
    manager.unload()
    assert manager.rows() == {} and manager.vectors() is None
