"""Concepts: what is written comes back bit for bit, and every known kind of file is read."""

import base64
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from runs import call
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm.embeddings import Concept, EmbeddingError, load_concept, save_concept, save_new_concept, save_stages
from ldm.methods import METHODS
from ldm.methods.base import Method
from ldm.methods.prospect import GeneratorBlock

WIDTH = 16
VECTOR = torch.randn(WIDTH, generator=torch.Generator().manual_seed(0))


def error_of(path: Path, key: str | None = None) -> str:
    """The message of the refusal, which is one line that names the file and ends like a sentence."""
    with pytest.raises(EmbeddingError) as caught:
        load_concept(path, key)
    message = str(caught.value)
    assert f"'{path}" in message and "\n" not in message and message[-1] in ".?"
    return message


# Our own files


@pytest.mark.parametrize("shape", [(10, 768), (1, 768), (3, 5)])
def test_a_saved_concept_comes_back_bit_for_bit(tmp_path: Path, shape: tuple[int, int]) -> None:
    vectors, path = torch.randn(shape), tmp_path / "embeddings.safetensors"
    save_concept(Concept(vectors, {"init_word": "teddy", "step": "600"}), path, "<teddy>")
    concept = load_concept(path)
    assert torch.equal(concept.vectors, vectors) and concept.vectors.dtype == torch.float32
    assert (concept.num_stages, concept.width) == shape
    assert concept.method == ("textual-inversion" if shape[0] == 1 else "prospect")
    assert concept.metadata["init_word"] == "teddy" and concept.metadata["placeholder"] == "<teddy>"
    save_concept(concept, path, "<teddy>")
    assert torch.equal(load_concept(path).vectors, vectors) and path.stat().st_size < 32_000
    assert os.listdir(tmp_path) == ["embeddings.safetensors"]


def test_the_file_holds_one_tensor_and_describes_itself(tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    save_concept(Concept(torch.zeros(10, 8), {"prospect.num_stages": "99", "step": 7}), path)
    with safe_open(path, "pt") as file:
        assert list(file.keys()) == ["*"]
        assert file.metadata() == {
            "format": "pt",
            "prospect.version": "1",
            "prospect.num_stages": "10",
            "prospect.num_timesteps": "1000",
            "prospect.order": "0 = low noise (end of generation), S-1 = high noise (start)",
            "placeholder": "*",
            "step": "7",
        }


def test_a_concept_is_a_float32_copy_without_gradient() -> None:
    for dtype in (torch.float16, torch.float32, torch.float64):
        source = nn.Parameter(torch.ones(2, 3, dtype=dtype))
        concept = Concept(source)
        source.data.zero_()
        assert concept.vectors.dtype == torch.float32 and not concept.vectors.requires_grad
        assert concept.vectors.eq(1).all()


def test_loaded_vectors_do_not_change_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    save_concept(Concept(torch.ones(2, 1024)), path)
    concept = load_concept(path)
    with path.open("r+b") as stream:  # in place: the reader maps the file
        stream.seek(-4096, 2)
        stream.write(bytes(4096))
    assert concept.vectors.eq(1).all() and not load_file(path)["*"].eq(1).all()


def test_a_concept_refuses_what_is_no_finite_matrix() -> None:
    for vectors, words in (
        (torch.tensor([[1.0, float("nan")]]), "NaN"),
        (torch.tensor([[float("inf"), 1.0]]), "infinite"),
        (torch.zeros(8), r"of \(8,\)"),
        (torch.zeros(1, 2, 8), r"of \(1, 2, 8\)"),
        (torch.zeros(0, 8), r"of \(0, 8\)"),
        (torch.zeros(2, 8, dtype=torch.int64), "int64"),
        ({"a": torch.zeros(2, 8)}, "one tensor of floats .stages, width., not a"),
    ):
        with pytest.raises(EmbeddingError, match=words):
            Concept(vectors, method="prospect")


def test_metadata_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    for metadata, words in (
        ({"prospect.num_stages": "9"}, "10 vectors for 9 stages"),
        ({"prospect.num_stages": "ten"}, "10 vectors for ten stages"),
        ({"prospect.num_stages": "10", "prospect.version": "2"}, "version 2, not 1"),
        ({"prospect.method": "telepathy"}, "'telepathy', which is unknown here; known: prospect, textual-inversion"),
    ):
        save_file({"*": torch.zeros(10, 8)}, tmp_path / "e.safetensors", metadata)
        assert words in error_of(tmp_path / "e.safetensors")


# Other methods


@pytest.fixture
def mapper(monkeypatch: pytest.MonkeyPatch) -> Concept:
    """A concept of a method that learns several tensors."""

    def check(tensors: Mapping[str, Tensor]) -> None:
        if set(tensors) != {"net.weight", "net.bias", "layers"}:
            raise ValueError(f"a mapper has a net and layers, not {', '.join(tensors)}.")

    monkeypatch.setitem(METHODS, "mapper", Method(check, lambda tensors, metadata: None, lambda start: None))
    tensors = {"net.weight": torch.randn(3, 2).half(), "net.bias": torch.randn(3), "layers": torch.arange(4)}
    return Concept(tensors, {"step": "3"}, method="mapper")


def test_a_concept_of_several_tensors_comes_back_whole(tmp_path: Path, mapper: Concept) -> None:
    save_concept(mapper, tmp_path / "m.safetensors", "<m>")
    loaded = load_concept(tmp_path / "m.safetensors")
    assert (loaded.method, loaded.metadata["step"], loaded.metadata["placeholder"]) == ("mapper", "3", "<m>")
    assert loaded.tensors.keys() == mapper.tensors.keys() and loaded.identity == mapper.identity
    for name, tensor in mapper.tensors.items():
        assert torch.equal(loaded.tensors[name], tensor) and loaded.tensors[name].dtype == tensor.dtype
    assert loaded.tensors["layers"].dtype == torch.int64 and loaded.tensors["net.weight"].dtype == torch.float32


def test_a_concept_of_another_method_is_never_taken_for_stages(tmp_path: Path, mapper: Concept) -> None:
    for use in (lambda: mapper.vectors, lambda: mapper.rows_for(10), lambda: save_stages(mapper, tmp_path / "x", "m")):
        with pytest.raises(EmbeddingError, match="of the method 'mapper' has no stage vectors"):
            use()
    assert not (tmp_path / "x").exists()
    save_file({"*": torch.zeros(2, 8)}, tmp_path / "m.safetensors", {"prospect.method": "mapper"})
    assert "a mapper has a net and layers, not *." in error_of(tmp_path / "m.safetensors")


# Other programs' files of one vector


Writer = Callable[[Tensor, Path], None]
A1111 = {"string_to_token": {"*": 265}, "name": "cat", "step": 1000, "sd_checkpoint": "abc", "sd_checkpoint_name": None}


def write_png(chunk: str, path: Path) -> None:
    """As A1111 stores an embedding in an image."""
    info = PngInfo()
    info.add_text("sd-ti-embedding", chunk)
    Image.new("RGB", (8, 8)).save(path, format="PNG", pnginfo=info)


def base64_json(content: object) -> str:
    return base64.b64encode(json.dumps(content).encode()).decode()


def rinongal(x: Tensor) -> dict[str, object]:
    return {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": nn.ParameterDict({"*": nn.Parameter(x)})}


FORMATS: dict[str, Writer] = {
    "safetensors": lambda x, path: save_file({"<cat>": x}, path, {"format": "pt"}),
    "bin": lambda x, path: torch.save({"<cat>": x}, path),
    "a1111": lambda x, path: torch.save(A1111 | {"string_to_param": {"*": x}}, path),
    "old": lambda x, path: torch.save({"string_to_param": {"*": x}}, path, _use_new_zipfile_serialization=False),
    "rinongal": lambda x, path: torch.save(rinongal(x), path),
    "png": lambda x, path: write_png(base64_json({"string_to_param": {"*": {"TORCHTENSOR": x.tolist()}}}), path),
}
WRITERS = [pytest.param(write, id=name) for name, write in FORMATS.items()]


@pytest.mark.parametrize("write", WRITERS)
def test_one_vector_of_another_program_is_one_stage(tmp_path: Path, write: Writer) -> None:
    path = tmp_path / "file"  # no suffix: the content decides
    for vectors in (VECTOR, VECTOR[None].half()):
        write(vectors, path)
        for key in (None, "*", "<cat>", "<dog>"):
            assert torch.equal(load_concept(path, key).vectors, vectors.float().reshape(1, WIDTH))
    for vectors, words in (
        (torch.zeros(1, 1, WIDTH), "(1, 1, 16)"),
        (torch.tensor(1.0), "of ()"),
        (torch.zeros(1, 0), "(1, 0)"),
        (torch.full((1, WIDTH), float("nan")), "NaN"),
    ):
        write(vectors, path)
        assert words in error_of(path)


@pytest.mark.parametrize("write", WRITERS)
def test_several_vectors_are_consecutive_tokens_or_stages_where_that_is_said(tmp_path: Path, write: Writer) -> None:
    vectors = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1))
    write(vectors, tmp_path / "file")
    tokens, stages = load_concept(tmp_path / "file"), load_concept(tmp_path / "file", rows_are_stages=True)
    assert tokens.method == "table" and torch.equal(tokens.table, vectors[None, None])
    assert stages.method == "prospect" and torch.equal(stages.vectors, vectors)
    for concept in (tokens, stages):
        save_concept(concept, tmp_path / "own")
        assert load_concept(tmp_path / "own").identity == concept.identity


def test_an_image_without_an_embedding(tmp_path: Path) -> None:
    for chunk in ("", "e30=", "!", base64_json({"string_to_param": 3})):
        write_png(chunk, tmp_path / "a.png")
        assert "is an image without a readable embedding in it; use a" in error_of(tmp_path / "a.png")


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_file_of_several_embeddings_needs_a_name(tmp_path: Path, suffix: str) -> None:
    path, tensors = tmp_path / f"e.{suffix}", {"<a>": VECTOR, "<b>": VECTOR + 1}
    save_file(tensors, path) if suffix == "safetensors" else torch.save(tensors, path)
    for key in (None, "*"):
        assert "2 embeddings (<a>, <b>)" in error_of(path, key)
    assert torch.equal(load_concept(path, "<b>").vectors, tensors["<b>"].unsqueeze(0))


def test_other_contents_are_refused(tmp_path: Path) -> None:
    xl = {"clip_l": torch.zeros(1, 768), "clip_g": torch.zeros(1, 1280)}
    for content, key, words in (
        ({}, None, "no embedding"),
        ([VECTOR], None, "no embedding"),
        (VECTOR, None, "no embedding"),
        ({"string_to_param": None}, None, "no embedding"),
        ({"string_to_param": nn.Linear(1, 1)}, None, "2 embeddings (weight, bias)"),
        ({"*": "text"}, None, "no embedding"),
        ({"*": torch.zeros(1, WIDTH, dtype=torch.int64)}, None, "int64"),
        (xl, None, "Stable Diffusion XL (clip_l and clip_g)"),
        (xl, "clip_l", "Stable Diffusion XL (clip_l and clip_g)"),
    ):
        torch.save(content, tmp_path / "e.pt")
        assert words in error_of(tmp_path / "e.pt", key)


# A file for each stage


@pytest.mark.parametrize("write", WRITERS[:-1])
def test_stage_files_of_other_programs(tmp_path: Path, write: Writer) -> None:
    """Twelve, so that the order of their names is not the order of their numbers."""
    vectors = torch.randn(12, WIDTH, generator=torch.Generator().manual_seed(1))
    paths = [tmp_path / f"a-cat-{stage}.pt" for stage in range(12)]
    for vector, path in zip(vectors, paths, strict=True):
        write(vector, path)
    (tmp_path / "notes.txt").touch()
    for source in (tmp_path, str(tmp_path), paths, sorted(paths), tuple(map(str, paths[::-1]))):
        assert torch.equal(load_concept(source).vectors, vectors)
    assert load_concept(paths[3]).num_stages == 1  # it does not say that it is one of several
    named = [path.rename(tmp_path / name) for path, name in zip(paths, "bcadefghijkl", strict=True)]
    assert torch.equal(load_concept(named).vectors, vectors)  # without numbers, as they come


def test_one_of_two_series_is_read_by_its_name(tmp_path: Path) -> None:
    for value, name in enumerate(("cat", "dog")):
        save_stages(Concept(torch.full((2, 3), float(value))), tmp_path, name)
    assert "has those of cat, dog" in error_of(tmp_path)
    assert load_concept(tmp_path, "dog").vectors.unique().tolist() == [1.0]
    assert load_concept(tmp_path / "cat-1.safetensors").vectors.unique().tolist() == [0.0]


def test_stage_files_that_do_not_belong_together(tmp_path: Path) -> None:
    paths = save_stages(Concept(torch.zeros(4, 3)), tmp_path, "cat")
    other = save_stages(Concept(torch.ones(4, 3), {"step": "1"}), tmp_path / "..", "other")
    wide = save_stages(Concept(torch.ones(4, 5)), tmp_path / "..", "wide")
    whole = tmp_path / "whole.safetensors"
    save_concept(Concept(torch.zeros(4, 3)), whole)

    def refusal(*sources: Path) -> str:
        with pytest.raises(EmbeddingError) as caught:
            load_concept(sources)
        return str(caught.value)

    assert "list of stage files is empty" in refusal()
    assert "those of stages 0, 2, 3 are here" in refusal(paths[0], paths[2], paths[3])
    assert "those of stages 0, 1, 2, 2 are here" in refusal(*paths[:3], paths[2])
    twin = save_stages(Concept(torch.ones(4, 3)), tmp_path / "..", "twin")  # says nothing else about itself
    for foreign in (other, twin, wide):
        words = f"{foreign[3].name}': this and 'cat-0.safetensors' are of different concepts"
        assert words in refusal(*paths[:3], foreign[3])
    assert "holds all stages of a concept" in refusal(*paths[:3], whole)
    assert "There is no file" in refusal(*paths[:3], tmp_path / "cat-9.safetensors")
    paths[1].unlink()
    assert "of 'cat' there are only the stage files 0, 2, 3" in error_of(tmp_path)
    lone = paths[0].rename(tmp_path / "lone.safetensors")
    assert "is one stage of a concept; its folder must have the stage files" in error_of(lone)


def test_a_huge_number_in_a_name_takes_no_memory(tmp_path: Path) -> None:
    save_concept(Concept(torch.zeros(1, 3)), tmp_path / "cat-999999999999999.safetensors")
    assert "only the stage files 999999999999999" in error_of(tmp_path)


# Between two concepts


def test_lerp_goes_from_one_to_the_other_and_keeps_the_length() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (
        Concept(torch.randn(10, 64, generator=generator)),
        Concept(3 * torch.randn(10, 64, generator=generator)),
    )
    assert torch.equal(first.lerp(second, 0).vectors, first.vectors)
    torch.testing.assert_close(first.lerp(second, 1).vectors, second.vectors)
    for weight in (0.25, 0.5, 0.9):
        mixed = first.lerp(second, weight).vectors
        length = (1 - weight) * first.vectors.norm(dim=1) + weight * second.vectors.norm(dim=1)
        torch.testing.assert_close(mixed.norm(dim=1), length)
        plain = (1 - weight) * first.vectors + weight * second.vectors
        torch.testing.assert_close(torch.cosine_similarity(mixed, plain), torch.ones(10))
        assert (mixed.norm(dim=1) > 1.02 * plain.norm(dim=1)).all()  # which the plain mean is short of
        torch.testing.assert_close(second.lerp(first, 1 - weight).vectors, mixed)


def test_concepts_of_other_stages_are_mixed_by_time() -> None:
    ten = Concept(torch.eye(10))
    two = Concept(torch.stack([torch.full((10,), 2.0), torch.full((10,), 4.0)]))
    assert torch.equal(ten.lerp(two, 1).vectors[:, 0], torch.tensor([2.0] * 5 + [4.0] * 5))
    assert torch.equal(two.lerp(ten, 1).vectors, torch.eye(10))
    assert two.lerp(Concept(torch.ones(1, 10)), 0.5).num_stages == 2


def test_rows_of_two_learnings_are_joined(tmp_path: Path) -> None:
    one, other = (Concept(torch.randn(10, 8, generator=torch.Generator().manual_seed(i))) for i in (0, 1))
    for name, concept in {"one": one, "other": other}.items():
        save_concept(concept, tmp_path / f"{name}.safetensors")
    files = [str(tmp_path / f"{name}.safetensors") for name in ("one", "other", "both")]
    made = call("scripts/mix_concepts.py", *files[:2], "--stages", "0-3", "9", "--out", files[2])
    assert made.returncode == 0, made.stderr
    both = load_concept(files[2])
    taken = torch.tensor([stage < 4 or stage == 9 for stage in range(10)])
    assert torch.equal(both.vectors[taken], other.vectors[taken])
    assert torch.equal(both.vectors[~taken], one.vectors[~taken])
    assert both.metadata["mixed"] == "one.safetensors; of stages 0, 1, 2, 3, 9 other.safetensors"


def test_concepts_that_ship_are_mixed_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = [f"models/demo/concepts/{name}.safetensors" for name in ("dotted-star", "striped-heart")]
    made = call("scripts/mix_concepts.py", *names, "--out", "mixed.safetensors")
    assert made.returncode == 0, made.stderr


def test_what_cannot_be_mixed() -> None:
    first = Concept(torch.ones(2, 4), {"base_model": "sd1.ckpt", "step": "1"})
    with pytest.raises(EmbeddingError, match=r"width 4 .*'sd1.ckpt'.* of width 8 .*'sd2.ckpt'.* cannot be mixed"):
        first.lerp(Concept(torch.ones(2, 8), {"base_model": "sd2.ckpt"}), 0.5)
    other = Concept(torch.ones(2, 4), {"base_model": "sd2.ckpt"})
    with pytest.raises(EmbeddingError, match=r"different base models: the first for 'sd1.ckpt', the second for 'sd2"):
        first.lerp(other, 0.5)
    with pytest.raises(EmbeddingError, match=r"must be in 0\.\.1, or 3 such numbers, not \[0, 1\]"):
        Concept(torch.ones(3, 4)).lerp(Concept(torch.ones(3, 4)), [0, 1])

    assert first.lerp(other, 0.5, any_base=True).metadata == {}
    for weight in (-0.1, 1.1, float("nan")):
        with pytest.raises(EmbeddingError, match="must be in 0..1"):
            first.lerp(first, weight)
    opposite = first.lerp(Concept(-first.vectors), 0.5)  # no direction is left, and no NaN comes
    assert opposite.vectors.eq(0).all()
    assert first.lerp(Concept(torch.ones(2, 4), {"base_model": "sd1.ckpt"}), 0.5).metadata == {"base_model": "sd1.ckpt"}


def test_a_mix_is_not_written_onto_what_it_is_made_of(tmp_path: Path) -> None:
    save_concept(Concept(torch.ones(2, 4)), path := tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="is, or is part of, what is read"):
        save_new_concept(load_concept(path), path, force=True, inputs=[path])
    save_new_concept(load_concept(path), tmp_path / "new/b.safetensors", inputs=[path])
    assert load_concept(tmp_path / "new/b.safetensors").identity == load_concept(path).identity


# The reference's pickled generator


class TransformerBlock(GeneratorBlock):
    """Under the reference's name, in a module of this package that has no such class when the file is read."""


TransformerBlock.__module__ = "ldm.modules.embedding_manager"


def generator_file(path: Path, stages: int = 2, change: Callable[[dict], object] = lambda content: None) -> Path:
    """A file as the reference writes it, in training mode."""
    torch.manual_seed(0)
    content = {"attention": TransformerBlock(WIDTH, stages), "initial_embeddings": nn.Parameter(VECTOR[None])}
    change(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ldm.modules.embedding_manager.TransformerBlock", TransformerBlock, raising=False)
        torch.save(content, path)
    return path


@pytest.mark.parametrize("stages", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_references_file_gives_its_vectors_without_dropout(tmp_path: Path, stages: int, dtype: torch.dtype) -> None:
    path = generator_file(tmp_path / "e.pt", stages, lambda content: content["attention"].to(dtype))
    torch.manual_seed(0)
    block = GeneratorBlock(WIDTH, stages).to(dtype).float()
    with torch.no_grad():
        dropped, expected = block(VECTOR[None]), block.eval()(VECTOR[None])
    assert (dropped - expected).abs().max() > 0.01
    for key in (None, "<any>"):
        torch.testing.assert_close(load_concept(path, key).vectors, expected, rtol=1e-5, atol=1e-6)
    save_concept(load_concept(path), tmp_path / "e.safetensors")
    assert torch.equal(load_concept(tmp_path / "e.safetensors").vectors, load_concept(path).vectors)
    allowed = [entry[1] for entry in torch.serialization.get_safe_globals() if isinstance(entry, tuple)]
    assert not [name for name in allowed if name.startswith(("ldm.", "torch.nn."))]  # reading leaves none


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["attention"].attn1._modules.pop("to_k"), 'Missing key(s) in state_dict: "attn1.to_k.weight"'),
        (lambda c: c.pop("initial_embeddings"), "initial_embeddings is missing"),
        (lambda c: c.update(initial_embeddings=None), "initial_embeddings is missing"),
        (lambda c: c.update(initial_embeddings=torch.zeros(10, WIDTH)), "(10, 16), not (1, width)"),
        (lambda c: c.update(initial_embeddings=torch.zeros(1, 0)), "not ProSpect's generator"),
        (lambda c: c.update(initial_embeddings=torch.zeros(1, WIDTH + 1)), "not ProSpect's generator"),
        (lambda c: c.update(attention=None), "not ProSpect's generator"),
        (lambda c: c.update(attention=VECTOR), "not ProSpect's generator"),
        (lambda c: c.update(attention=nn.Linear(4, 4)), "not ProSpect's generator"),
        (
            lambda c: setattr(c["attention"], "extra", nn.Linear(2, 3)),
            'Unexpected key(s) in state_dict: "extra.weight", "extra.bias"',
        ),
        (lambda c: setattr(c["attention"], "norm3", c["attention"].norm2), "not ProSpect's generator"),
        (lambda c: setattr(c["attention"].norm1, "weight", nn.Parameter(torch.zeros(()))), "norm1.weight"),
        (lambda c: setattr(c["attention"].attn1.to_q, "weight", nn.Parameter(VECTOR[0])), "to_q.weight"),
        (lambda c: c["attention"].norm3.weight.data.fill_(float("nan")), "NaN"),
    ],
)
def test_another_network_is_refused(tmp_path: Path, change: Callable[[dict], object], words: str) -> None:
    assert words in error_of(generator_file(tmp_path / "e.pt", change=change))
