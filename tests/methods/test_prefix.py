"""CatVersion's concepts: refused files, two at once, the class word, and files as the reference names them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image
from torch import Tensor

from ldm.cli.importing import run as import_embedding
from ldm.cli.sample import run
from ldm.embeddings import Concept, EmbeddingError, load_concept, save_concept
from ldm.generate import load_model_from_config
from ldm.models.diffusion.ddpm import LatentDiffusion

CONFIG, CKPT = "configs/demo/finetune.yaml", "models/demo/model.safetensors"
SHIPPED = tiny.GOLDEN / "catversion/shipped/teddybear"
LAYERS, BIAS = "catversion.text_layers", "catversion.logit_bias"
ENDING = "self_attn.prefix_tuning.pool.prefix_tunings.prefix_tuning1.clip_text_model_self_prefix.control_trans"


def small(seed: int = 0, **metadata: str) -> Concept:
    """A prefix that fits the small model."""
    values = torch.randn(2, 2, 1, 4, 32, generator=torch.Generator().manual_seed(seed))
    return Concept({"prefix": values}, {LAYERS: "1,2", BIAS: "1.0", **metadata}, "catversion")


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return load_model_from_config(CONFIG, CKPT, device="cpu")


def adapter(values: Callable[[int], Tensor] = lambda _: torch.zeros(4608), layers: int = 9) -> dict[str, Tensor]:
    return {f"text_model.encoder.layers.{layers + i}.{ENDING}": values(i) for i in range(3)}


REFUSED = {
    "copies": (
        adapter(lambda i: torch.full((4608,), float(i))),
        "is no prefix of CatVersion, the same for the text layers 9",
    ),
    "layers": (adapter(layers=20), "is no prefix of CatVersion"),
    "width": (adapter(lambda _: torch.zeros(6144)), "it is for another text transformer than that of"),
    "empty": (adapter(lambda _: torch.zeros(0)), "it is for another text transformer than that of"),
    "nan": ({f"layers.9.{ENDING}": torch.full((4608,), torch.nan)}, "infinite or NaN values"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_adapters_that_are_refused(name: str, tmp_path: Path) -> None:
    content, message = REFUSED[name]
    torch.save(content, tmp_path / "pytorch_adapter.bin")
    for place in (tmp_path, tmp_path / "pytorch_adapter.bin"):
        with pytest.raises(EmbeddingError, match=message) as error:
            load_concept(place)
        assert str(place) in str(error.value) and "\n" not in str(error.value)


def test_one_key_of_an_adapter_is_enough(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_adapter.bin"
    for key, values in adapter(lambda i: torch.arange(4608.0)).items():
        torch.save({key: values}, file)
        assert load_concept(tmp_path).tensors["prefix"][0, 0, 0, 0, 1] == 1
    file.write_bytes((SHIPPED / file.name).read_bytes()[:9000])
    with pytest.raises(EmbeddingError, match="cut off"):
        load_concept(tmp_path)
    with pytest.raises(EmbeddingError, match="are no CatVersion prefix"):
        Concept({"table": torch.zeros(1, 7, 1, 128)}, {}, "catversion")


@pytest.mark.parametrize(
    ("metadata", "shape", "message"),
    [
        ({}, (2, 2, 1, 4, 32), "does not say its text layers and logit bias"),
        ({LAYERS: "2", BIAS: "1.0"}, (2, 2, 1, 4, 32), "does not say .* those of 2 layers"),
        ({LAYERS: "1,1", BIAS: "1.0"}, (2, 2, 1, 4, 32), "does not say .* those of 2 layers"),
        ({LAYERS: "9,10", BIAS: "1.0"}, (2, 2, 1, 4, 32), "for text layers 9, 10 of 4 heads, but this model has 3"),
        ({LAYERS: "1,2", BIAS: "1.0"}, (2, 2, 1, 2, 64), "for text layers 1, 2 of 2 heads"),
        ({LAYERS: "1,2", BIAS: "1.0"}, (2, 2, 1, 12, 64), "has width 768, but this model's text encoder has 128"),
    ],
)
def test_prefixes_that_do_not_fit_the_model(
    metadata: dict[str, str], shape: tuple[int, ...], message: str, model: LatentDiffusion
) -> None:
    concept = Concept({"prefix": torch.zeros(shape)}, metadata, "catversion")
    with pytest.raises(ValueError, match=message):
        model.embedding_manager.load(concept)
    assert not model.embedding_manager.loaded


def test_the_class_word_is_kept_by_an_import(tmp_path: Path) -> None:
    out = tmp_path / "teddy.safetensors"
    flags = [str(SHIPPED), "--caption", "teddybear", "--out", str(out)]
    import_embedding(flags)
    concept = load_concept(out)
    assert concept.metadata["captions"] == "teddybear" and out.stat().st_size < 20_000
    assert torch.equal(concept.tensors["prefix"], load_concept(SHIPPED).tensors["prefix"])


@pytest.mark.parametrize(
    ("captions", "prompt", "warned"),
    [
        ("a thing", "a large Thing on the left", False),
        ("a thing", "things", True),
        ("thing\na photo of a thing", "thing", False),
        ("a photo of a thing\na thing", "a star", True),
        ("", "a star", False),  # an imported adapter may not say its class
    ],
)
def test_a_prompt_without_the_class_word_is_reported(
    captions: str, prompt: str, warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_concept(small(captions=captions), tmp_path / "c.safetensors")
    run(["--prompt", prompt, "--concept", str(tmp_path / "c.safetensors"), "--steps", "1", "--outdir",
                  str(tmp_path)])  # fmt: skip
    assert [record.message for record in caplog.records if "effect" in record.message] == []
    assert any("means, which the prompt does not name" in record.message for record in caplog.records) is warned


def test_a_preset_needs_a_placeholder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_concept(small(captions="a thing"), tmp_path / "c.safetensors")
    flags = ["--prompt", "a thing", "--concept", str(tmp_path / "c.safetensors"), "--preset", "style"]
    with pytest.raises(SystemExit):
        run([*flags, "--outdir", str(tmp_path / "out")])
    assert "'*' (catversion) has none: it changes every prompt" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_two_concepts_at_once(model: LatentDiffusion, tmp_path: Path) -> None:
    """Their prefixes are stacked, in any order, beside each other and not in each other's place."""

    @torch.no_grad()
    def context(*names: str) -> Tensor:
        model.embedding_manager.unload()
        model.embedding_manager.load({name: small(int(name)) for name in names})
        return model.get_learned_conditioning(["a thing"]).at(0).k

    both = context("1", "2")
    torch.testing.assert_close(context("2", "1"), both, rtol=0, atol=1e-5)
    assert all((context(name) - both).abs().max() > 0.1 for name in "12")
    model.embedding_manager.unload()


def test_files_as_the_reference_names_them(tmp_path: Path) -> None:
    save_concept(small(captions="a thing"), tmp_path / "c.safetensors")
    flags = ["--prompt", "a thing on the left", "--concept", str(tmp_path / "c.safetensors"), "--steps", "1"]
    flags += ["--seed", "78", "--outdir", str(tmp_path)]
    files = run([*flags, "--n_iter", "2", "--layout", "catversion"])
    folder = tmp_path / "a-thing-on-the-left"
    names = ["a-thing-on-the-left.jpg", "a-thing-on-the-left_78.jpg", "a-thing-on-the-left_79.jpg"]
    assert files == [folder / name for name in names]
    with Image.open(files[0]) as grid, Image.open(files[2]) as single:
        assert (grid.format, single.format, single.size) == ("JPEG", "JPEG", (128, 128))
    alone = run([*flags, "--layout", "catversion"])
    assert [file.name for file in alone] == ["a-thing-on-the-left-2.jpg", "a-thing-on-the-left_78-2.jpg"]


def test_a_prompt_names_no_place_outside_the_folder(tmp_path: Path) -> None:
    flags = ["--prompt", "../a/thing", "--steps", "1", "--outdir", str(tmp_path / "out"), "--layout", "catversion"]
    assert all(file.parent == tmp_path / "out/-a-thing" for file in run(flags))
