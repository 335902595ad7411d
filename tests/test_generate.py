"""Images in, images out: `ldm.generate` with the small model that ships. Nothing depends on how well it draws."""

import inspect
import io
import itertools
import json
import logging
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from pytorch_lightning import LightningModule
from runs import CONFIG, ROOT
from runs import MODEL as CKPT
from torch import Tensor

from ldm.conditioning.presets import preset
from ldm.embeddings import Concept, load_concept, save_concept
from ldm.files.images import fit, open_image, to_pil, to_tensor
from ldm.generate import Interrupted, load_model_from_config, main, read_parameters, save_picture
from ldm.models.diffusion.ddpm import LatentDiffusion

SIZE = 32  # pixels; half of what the model was trained at takes a quarter of the time
PROMPT = "a large striped red star on the left on a navy background"
Draw = Callable[..., Image.Image]


@pytest.fixture
def config() -> DictConfig:
    return OmegaConf.load(CONFIG)


@pytest.fixture
def model(demo_model: LatentDiffusion) -> Iterator[LatentDiffusion]:
    """The model with nothing loaded."""
    with demo_model.embedding_manager.keeping():
        yield demo_model


@pytest.fixture
def draw(model: LatentDiffusion) -> Draw:
    """`main` with few steps and a small image."""

    def draw(prompt: str = PROMPT, **arguments: object) -> Image.Image:
        small = {"ddim_steps": 3, "height": SIZE, "width": SIZE, "scale": 3.0, "progress": False}
        return main(prompt, **({"model": model} | small | arguments))

    return draw


@pytest.fixture
def concept_file(tmp_path: Path) -> Path:
    path = tmp_path / "concept.safetensors"
    save_concept(Concept(torch.randn(10, 128, generator=torch.Generator().manual_seed(1))), path)
    return path


@pytest.fixture
def content(tmp_path: Path) -> Path:
    """An image twice as wide as high, with something else in every corner."""
    columns, rows = np.meshgrid(np.linspace(0, 255, 96), np.linspace(0, 255, 48))
    path = tmp_path / "content.png"
    Image.fromarray(np.stack([columns, rows, 255 - columns], axis=2).astype(np.uint8)).save(path)
    return path


def difference(a: Image.Image, b: Image.Image) -> int:
    """The largest difference of two images, in 1/255."""
    assert a.size == b.size
    return int(np.abs(np.asarray(a, np.int64) - np.asarray(b, np.int64)).max())


def latents(draw: Draw, *prompt: str, **arguments: object) -> Tensor:
    """The latents (steps, B, C, H, W) after each step; they show what an image's 256 values may not."""
    seen: list[Tensor] = []
    draw(*prompt, **arguments, callback=lambda step, t, x, x_0: seen.append(x))
    return torch.stack(seen)


def tile(grid: Image.Image, row: int, column: int) -> Image.Image:
    return grid.crop((column * SIZE, row * SIZE, (column + 1) * SIZE, (row + 1) * SIZE))


# What is asked for comes


def test_without_lightning_it_is_the_same_model(model: LatentDiffusion, config: DictConfig, draw: Draw) -> None:
    lean = load_model_from_config(config, CKPT, device="cpu", lightning=False)
    assert type(model) is LatentDiffusion and not isinstance(lean, LightningModule)
    assert lean.state_dict().keys() == model.state_dict().keys()
    assert draw(model=lean).tobytes() == draw().tobytes()


def test_it_loads_without_lightning_and_without_the_compiler() -> None:
    """They take longer to import than all the rest."""
    code = f"""
import sys
from ldm.generate import load_model_from_config, main
model = load_model_from_config("{CONFIG}", "{CKPT}", device="cpu", lightning=False)
main("a star", ddim_steps=1, height=32, width=32, model=model, progress=False)
print(*({{"pytorch_lightning", "torch._dynamo"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_the_contract_of_the_signature() -> None:
    parameters = inspect.signature(main).parameters.values()
    positional = {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}
    expected = "prompt='' content_dir=None ddim_steps=50 strength=0.5 ddim_eta=0.0 n_iter=1 C=4 f=8 n_rows=0 scale=None"
    expected += " model=None seed=42 prospect_words=None n_samples=1 height=None width=None"
    assert " ".join(f"{name}={default!r}" for name, default in positional.items()) == expected


def test_an_image_has_the_size_asked_for(draw: Draw) -> None:
    image = draw(width=96)
    assert (image.mode, image.size) == ("RGB", (96, SIZE))
    assert difference(image, draw(width=96)) == 0
    assert difference(image, draw(width=96, seed=43)) > 1


def test_the_models_own_size_and_guidance(model: LatentDiffusion) -> None:
    image = main(PROMPT, model=model, ddim_steps=2, progress=False)
    record = json.loads(image.info["prospect"])
    assert image.size == (128, 128)
    assert (record["height"], record["width"], record["scale"]) == (128, 128, 2.5)
    explicit = main(PROMPT, model=model, ddim_steps=2, height=128, width=128, scale=2.5, progress=False)
    assert difference(image, explicit) == 0
    assert main(PROMPT, model=model, ddim_steps=1, width=32, progress=False).size == (32, 128)


@pytest.mark.parametrize(
    ("n_iter", "n_samples", "n_rows", "columns", "editing"),
    [(1, 3, 0, 2, False), (3, 1, 3, 3, False), (2, 1, 1, 1, False), (2, 2, 0, 2, True)],
)
def test_each_image_of_a_grid_is_the_image_alone(
    draw: Draw, content: Path, n_iter: int, n_samples: int, n_rows: int, columns: int, editing: bool
) -> None:
    arguments = {"ddim_eta": 1.0, "content_dir": content if editing else None}
    alone = [draw(seed=42 + i, **arguments) for i in range(n_iter * n_samples)]
    assert min(difference(alone[0], other) for other in alone[1:]) > 1
    grid = draw(n_iter=n_iter, n_samples=n_samples, n_rows=n_rows, **arguments)
    assert grid.size == (columns * SIZE, math.ceil(len(alone) / columns) * SIZE)
    assert max(difference(tile(grid, *divmod(i, columns)), image) for i, image in enumerate(alone)) <= 1


def test_entry_0_is_the_end_of_generation(draw: Draw) -> None:
    other = "a small plain green circle on a white background"

    plain, end, start = (
        latents(draw, "*", prospect_words=words, ddim_steps=10)
        for words in ([PROMPT] * 10, [other] + [PROMPT] * 9, [PROMPT] * 9 + [other])
    )
    assert [torch.equal(a, b) for a, b in zip(plain, end, strict=True)] == [True] * 9 + [False]
    assert [torch.equal(a, b) for a, b in zip(plain, start, strict=True)] == [False] * 10
    assert difference(draw("*", prospect_words=[PROMPT] * 10), draw(PROMPT)) <= 1


def test_scale_1_is_the_prompt_alone(draw: Draw, model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    nearly, guided = latents(draw, scale=1.00001), latents(draw, scale=3.0)
    monkeypatch.setattr(model, "get_unconditional", lambda *_: pytest.fail("nothing leads away"))
    alone = latents(draw, scale=1.0)
    torch.testing.assert_close(alone, nearly, rtol=0, atol=1e-4)
    assert not torch.equal(alone, guided)


def test_the_negative_prompt_takes_the_place_of_the_empty_one(
    draw: Draw, model: LatentDiffusion, caplog: pytest.LogCaptureFixture
) -> None:
    """Guidance with it is (1 - scale) times its own prediction and scale times the prompt's."""
    blue = "a small plain blue circle"
    plain, away = latents(draw, ddim_steps=1), latents(draw, ddim_steps=1, negative_prompt=blue)
    only, other, empty = (latents(draw, text, ddim_steps=1, scale=1.0) for text in (PROMPT, blue, ""))
    torch.testing.assert_close(away, other + 3.0 * (only - other), rtol=0, atol=1e-4)
    torch.testing.assert_close(plain, empty + 3.0 * (only - empty), rtol=0, atol=1e-4)
    assert (plain - away).abs().max() > 1e-3
    assert torch.equal(plain, latents(draw, ddim_steps=1, negative_prompt=""))
    assert caplog.messages == []
    assert torch.equal(latents(draw, ddim_steps=1, scale=1.0, negative_prompt=blue), only)
    assert caplog.messages == ["negative_prompt has no effect with guidance scale 1; use a larger one."]


def test_trailing_samplers_from_noise_and_from_an_image(
    draw: Draw, content: Path, model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    noised: list[int] = []
    q_sample = model.q_sample
    monkeypatch.setattr(model, "q_sample", lambda x, t, noise: (noised.append(int(t)), q_sample(x, t, noise))[1])
    images = []
    for sampler, steps in itertools.product(
        ({"sampler": "dpmpp_2m"}, {"spacing": "trailing"}), ({}, {"strength": 0.5})
    ):
        calls: list[int] = []
        edited = {"content_dir": content} | steps if steps else {}
        images.append(draw(ddim_steps=4, **sampler, **edited, callback=lambda step, t, *_, c=calls: c.append(t)))
        assert calls == ([499, 249] if edited else [999, 749, 499, 249])
        assert json.loads(images[-1].info["prospect"])["spacing"] == "trailing"
    assert noised == [499, 499], "the level that is denoised first"
    assert all(difference(a, b) > 1 for a, b in itertools.combinations(images, 2))


def test_plms_is_another_sampler(draw: Draw) -> None:
    assert difference(draw(sampler="plms", ddim_steps=4), draw(sampler="ddim", ddim_steps=4)) > 1


def test_the_callback_sees_every_step(draw: Draw, model: LatentDiffusion) -> None:
    seen: list[tuple[int, int, Tensor, Tensor]] = []
    image = draw(ddim_steps=4, callback=lambda *step: seen.append(step))
    assert [(step, t) for step, t, _, _ in seen] == [(0, 751), (1, 501), (2, 251), (3, 1)]
    assert all(x.shape == x_0.shape == (1, 4, SIZE // 8, SIZE // 8) for _, _, x, x_0 in seen)
    assert difference(to_pil(model.decode_first_stage(seen[-1][2])[0]), image) == 0
    preview = to_pil(model.decode_first_stage(seen[0][3])[0])
    assert preview.size == image.size and difference(preview, image) > 1


def test_an_interrupt_brings_what_is_finished(draw: Draw) -> None:
    def stop(step: int, t: int, x: Tensor, x_0: Tensor) -> None:
        seen.append(step)
        if len(seen) == 8:
            raise KeyboardInterrupt

    seen: list[int] = []
    with pytest.raises(Interrupted) as stopped:
        draw(n_iter=4, callback=stop)
    expected = draw(n_iter=2)
    assert difference(stopped.value.image, expected) == 0 and stopped.value.image.info == expected.info
    seen = [0] * 7
    with pytest.raises(KeyboardInterrupt) as stopped:
        draw(n_iter=4, callback=stop)
    assert stopped.type is KeyboardInterrupt


def test_long_seeds_differ(draw: Draw) -> None:
    border = 2**32
    alone = [draw(seed=seed) for seed in (0, border - 1, border, border + 1, 2**63 - 1)]
    assert len({image.tobytes() for image in alone}) == len(alone)
    grid = draw(seed=border - 1, n_samples=2)
    assert [difference(tile(grid, 0, i), alone[1 + i]) <= 1 for i in range(2)] == [True, True]


@pytest.mark.parametrize("place", [None, "meta"])
def test_pytorchs_defaults_change_nothing(
    draw: Draw, config: DictConfig, content: Path, concept_file: Path, place: str | None
) -> None:
    arguments = {"content_dir": content, "ddim_eta": 0.5, "concepts": {"*": concept_file}}
    expected = draw("a *", **arguments)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device(place)  # where nothing can be computed
    try:
        model = load_model_from_config(config, CKPT, device="cpu")
        assert difference(draw("a *", **arguments), expected) == 0
        assert difference(draw("a *", **arguments, model=model), expected) == 0
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


TAKEN: dict[str, tuple[str, list | None, str]] = {
    # prompt, words, part of the warning ('' for none)
    "only spaces": ("  \t \n ", None, ""),
    "emoji": ("a 🌟 star 👩‍👩‍👧", None, ""),
    "right to left": ("نجمة \u202eabc\u202c של", None, ""),
    "control characters": ("a\x00\x07\x1b[31m star\x7f\u200b", None, ""),
    "other planes": ("\U0001f600\U00020000\ufeff\uffff", None, ""),
    "one word of 100,000 letters": ("a" * 100_000, None, "longer than 30 tokens; cut off"),
    "a thousand stars": ("*" * 1000, None, "longer than 30 tokens"),
    "no placeholder": ("a star", ["a"] * 10, "prospect_words has no effect: the prompt 'a star' has no '*'"),
    "unlearned": ("a <vase> star", None, ""),
    "empty": ("*", [""] * 10, ""),
    "None": ("*", [None] * 10, ""),
    "numpy's numbers": ("*", list(np.arange(10)), ""),
}


@pytest.mark.parametrize("name", TAKEN)
def test_odd_texts_are_taken(
    draw: Draw, model: LatentDiffusion, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They give an image, and the record in it gives the same prompt back."""
    prompt, words, warning = TAKEN[name]
    model.embedding_manager.load(Concept(torch.ones(10, 128)))
    image = draw(prompt, prospect_words=words, ddim_steps=1)
    messages = [message for message in caplog.messages if not message.startswith("This model does not know")]
    assert [warning in message for message in messages] == [True] * bool(warning)
    save_picture(image, tmp_path / "a.png")
    assert read_parameters(tmp_path / "a.png")["prompt"] == prompt
    draw(prompt, prospect_words=words, ddim_steps=1, scale=1.0, legacy_word_tokens=True)


# Editing


def test_strength_0_gives_the_autoencoder_s_reconstruction(draw: Draw, model: LatentDiffusion, content: Path) -> None:
    pixels = to_tensor(fit(Image.open(content), SIZE, SIZE, "crop")).unsqueeze(0)
    posterior = model.encode_first_stage(pixels)
    noise = torch.randn(posterior.mean.shape[1:], generator=torch.Generator().manual_seed(42))
    expected = to_pil(model.decode_first_stage(model.get_first_stage_encoding(posterior, noise))[0])
    steps: list[int] = []
    image = draw(content_dir=content, strength=0.0, callback=lambda step, *_: steps.append(step))
    assert difference(image, expected) <= 1
    assert steps == []


def test_strength_says_where_denoising_begins(draw: Draw, content: Path) -> None:
    def timesteps(strength: float) -> list[int]:
        seen: list[int] = []
        draw(content_dir=content, strength=strength, ddim_steps=4, callback=lambda step, t, *_: seen.append(t))
        return seen

    assert timesteps(0.5) == [251, 1]
    assert timesteps(0.99) == [501, 251, 1]
    assert timesteps(1.0) == [751, 501, 251, 1]


@pytest.mark.parametrize(("steps", "enough"), [(3, 0.3334), (200, 0.005)])
def test_a_strength_of_less_than_a_step_is_said(
    draw: Draw, content: Path, caplog: pytest.LogCaptureFixture, steps: int, enough: float
) -> None:
    unchanged = draw(content_dir=content, strength=0.0, ddim_steps=steps)
    assert caplog.messages == []
    assert difference(draw(content_dir=content, strength=0.001, ddim_steps=steps), unchanged) == 0
    expected = (
        f"strength 0.001 of {steps} steps is less than one, so the content image stays as it is; {enough} makes one."
    )
    assert caplog.messages == [expected]
    assert difference(draw(content_dir=content, strength=enough, ddim_steps=steps), unchanged) > 0
    assert len(caplog.messages) == 1


def test_content_from_a_file_and_from_pillow(draw: Draw, tmp_path: Path, content: Path) -> None:
    transparent = Image.open(content).convert("RGBA")
    transparent.putalpha(Image.linear_gradient("L").resize(transparent.size))
    transparent.save(tmp_path / "transparent.png")
    orientation = Image.Exif()
    orientation[0x0112] = 6  # a camera held upright
    Image.open(content).save(tmp_path / "turned.jpg", exif=orientation)
    Image.open(content).convert("P").save(tmp_path / "palette.png")
    for name in ("content.png", "transparent.png", "turned.jpg", "palette.png"):
        path = tmp_path / name
        assert difference(draw(content_dir=path), draw(content_dir=Image.open(path))) == 0, name


def test_resize_is_what_fit_does(draw: Draw, content: Path) -> None:
    images = {}
    for resize in ("crop", "pad", "squash"):
        images[resize] = draw(content_dir=content, resize=resize)
        assert difference(images[resize], draw(content_dir=fit(Image.open(content), SIZE, SIZE, resize))) == 0
    assert difference(images["crop"], images["pad"]) > 1
    assert difference(images["crop"], images["squash"]) > 1
    assert difference(draw(content_dir=content), images["crop"]) == 0


# Concepts


def test_concepts_are_loaded_by_name(draw: Draw, concept_file: Path) -> None:
    plain = latents(draw, "a <vase> on a white background")
    named = latents(draw, "a <vase> on a white background", concepts={"<vase>": concept_file})
    assert not torch.equal(named, plain)
    star = latents(draw, "a * on a white background", concepts={"*": concept_file})
    torch.testing.assert_close(named, star, rtol=0, atol=1e-4)


def test_a_concept_for_another_base_model_is_refused_and_can_be_used_all_the_same(
    draw: Draw, concept_file: Path, tmp_path: Path
) -> None:
    origin = {"base_model": "sd-v1-4.ckpt", "base_model_sha256": "0" * 64}
    save_concept(Concept(load_concept(concept_file).vectors, origin), tmp_path / "other.safetensors")
    words = {"prospect_words": ["<b><b> and <b>, *"] * 5 + [9] * 5, "prompt": "*"}
    concepts = {"*": concept_file, "<b>": tmp_path / "other.safetensors"}
    with pytest.raises(ValueError, match=r"learned for the base model 'sd-v1-4.ckpt', but this is 'model.safetensors'"):
        draw(**words, concepts=concepts)
    image = draw(**words, concepts=concepts, any_base=True)
    assert json.loads(image.info["prospect"])["any_base"] is True
    same = draw(**words, concepts={"*": concept_file, "<b>": load_concept(concept_file)})
    assert difference(image, same) == 0


def test_an_unlearned_star_warns(draw: Draw, concept_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        draw("a * on a white background", concepts={"<vase>": concept_file})
    assert ["loaded for '*'" in caplog.messages[0], "<vase>' has no effect" in caplog.messages[1]] == [True, True]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        draw("a * on a white background", concepts={"*": concept_file})
    assert caplog.messages == []


@pytest.mark.parametrize("words", [None, ["a <face>"] * 10])
def test_a_concept_that_is_called_what_it_was_learned_as(
    draw: Draw, model: LatentDiffusion, concept_file: Path, caplog: pytest.LogCaptureFixture, words: list[str] | None
) -> None:
    learned = concept_file.with_name("face.safetensors")
    save_concept(load_concept(concept_file), learned, "<face>")
    arguments = {"prompt": "a <face>", "prospect_words": None} if words is None else {"prospect_words": words}
    draw(**({"prompt": "*"} | arguments), concepts={"*": learned})
    model.embedding_manager.load(learned)
    draw(**({"prompt": "*"} | arguments))
    sentence = (
        "The concept '*' has no effect: the text says <face>, as it was learned; write *, or load it by that name "
        "(--concept '<face>=FILE', load({'<face>': FILE}))."
    )
    assert caplog.messages == [sentence, sentence]
    caplog.clear()
    draw("a * <face>")  # both are meant
    draw("a red star")  # nothing is
    model.embedding_manager.load({"<face>": learned})
    draw(**({"prompt": "*"} | arguments))
    assert caplog.messages == []


def test_concepts_of_a_call_are_for_this_call(draw: Draw, model: LatentDiffusion, concept_file: Path) -> None:
    kept = Concept(torch.ones(10, 128))
    model.embedding_manager.load({"*": kept})
    before = draw("a *", seed=3)
    record = json.loads(draw("a *", seed=3, concepts={"*": concept_file, "<b>": concept_file}).info["prospect"])
    assert record["concepts"] == {"*": str(concept_file), "<b>": str(concept_file)}
    with pytest.raises(ValueError, match="nowhere"):
        draw("a *", concepts={"*": concept_file, "<b>": "nowhere.pt"})
    assert model.embedding_manager.loaded == {"*": kept}
    after = draw("a *", seed=3)
    assert difference(before, after) == 0 and after.info == before.info


def test_a_preset_takes_the_models_windows(
    draw: Draw, model: LatentDiffusion, concept_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ldm.conditioning.presets")
    image = draw("a * star", preset="material", concepts={"*": concept_file})
    words = preset("material", "a * star", windows=model.presets)
    assert words != preset("material", "a * star")
    record = json.loads(image.info["prospect"])
    made_of = {"preset": "material", "preset_prompt": "a * star", "preset_windows": model.presets.source}
    assert {name: record.get(name) for name in made_of} == made_of
    assert (record["prompt"], record["prospect_words"]) == ("*", words)
    assert caplog.messages == [
        f"The preset 'material' is stages 3, 4, 5, 6, 7 of 10, from {CKPT.with_name('presets.yaml')}."
    ]
    assert difference(draw("*", prospect_words=words, concepts={"*": concept_file}), image) == 0


def test_the_record_says_how_many_words_were_read_and_stages_there_are(draw: Draw, concept_file: Path) -> None:
    """What was cut off stays out of the prompt for the web UI, which would read on."""
    long = "red " * 28 + "star * blue"  # room for 30 tokens
    image = draw(long, negative_prompt="red " * 31, concepts={"*": concept_file})
    assert json.loads(image.info["prospect"])["words_read"] == {"prompt": [30] * 10, "negative_prompt": 30}
    record = json.loads(draw("red " * 29 + "*", concepts={"*": Concept(torch.ones(4, 128))}).info["prospect"])
    assert "words_read" not in record and record["concept_stages"] == {"*": 4}


# What an image says of itself


@pytest.mark.parametrize("editing", [False, True])
def test_an_image_can_be_made_again(
    draw: Draw, model: LatentDiffusion, tmp_path: Path, content: Path, concept_file: Path, editing: bool
) -> None:
    image = draw(
        "ein *, größer — 日本",
        content_dir=content if editing else None,
        prospect_words=["a * star", 3, None, np.int64(9), "", "a", "a", "a", "a", "*"],
        concepts={"*": concept_file},
        ddim_eta=0.5,
        strength=0.7,
        seed=np.int64(3),
        scale=np.float32(2.5),
        n_samples=2,
        resize="pad",
        width=96,
        legacy_word_tokens=True,
        negative_prompt="größer (als)",
    )
    save_picture(image, tmp_path / "new folder" / "image.png")
    parameters = read_parameters(tmp_path / "new folder" / "image.png")
    assert parameters["concepts"] == {"*": str(concept_file)}
    assert parameters.pop("base_model") == "model.safetensors"
    assert parameters.pop("concept_hashes") == {"*": load_concept(concept_file).identity}
    assert (parameters.pop("dtype"), parameters.pop("num_stages")) == ("float32", model.num_stages)
    hashed = parameters.pop("content_hash")
    assert hashed == (sha256(open_image(content).tobytes()).hexdigest()[:10] if editing else None)
    again = main(model=model, progress=False, **parameters)
    assert difference(again, image) == 0
    assert difference(Image.open(tmp_path / "new folder" / "image.png"), image) == 0
    assert again.info == image.info


def test_content_that_is_no_file_is_recorded_as_such(draw: Draw, tmp_path: Path, content: Path) -> None:
    buffer = io.BytesIO(content.read_bytes())
    expected = draw(content_dir=content)
    for source, recorded in (
        (Image.open(content), str(content)),
        (content.open("rb"), str(content)),
        (Image.open(content).copy(), ""),
        (buffer, ""),
    ):
        image = draw(content_dir=source)
        save_picture(image, tmp_path / "edited.png")
        record = read_parameters(tmp_path / "edited.png")
        assert record["content_dir"] == recorded and len(record["content_hash"]) == 10
        assert difference(image, expected) == 0
        text = Image.open(tmp_path / "edited.png").info["parameters"]
        assert "Denoising strength: 0.5" in text and "object at" not in text


def test_only_png_keeps_what_repeats_an_image(content: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must end in \.png"):
        save_picture(Image.new("RGB", (8, 8)), tmp_path / "new/mug.jpg")
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="content.png' has no ProSpect parameters"):
        read_parameters(content)


# What only the model can tell


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"content_dir": "nowhere.png"}, "There is no file 'nowhere.png'; check the path."),
        ({"concepts": {"*": "nowhere.pt"}}, "There is no file 'nowhere.pt'; check the path"),
        ({"negative_prompt": "a <b>"}, "negative_prompt has the placeholder '<b>'; it must be plain text"),
        ({"model": None}, "main() needs model="),
    ],
)
def test_bad_arguments(model: LatentDiffusion, arguments: dict[str, object], sentence: str) -> None:
    model.embedding_manager.load({"<b>": Concept(torch.zeros(10, 128))})
    drawn: list[int] = []
    usual = {"model": model, "height": SIZE, "width": SIZE, "callback": lambda *_: drawn.append(1)}
    with pytest.raises(ValueError) as caught:
        main(**({"prompt": PROMPT} | usual | arguments))
    assert sentence in str(caught.value) and "\n" not in str(caught.value)
    assert drawn == []


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 400000000000000 bytes."),
        MemoryError(),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),  # another: it stays
    ],
)
def test_too_little_memory_names_the_switches(
    draw: Draw, model: LatentDiffusion, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(model, "apply_model", fail)
    switches = "memory of 'cpu' .* 2 x 32x32 pixels; .*n_samples, .*float16, .*decode_batch"
    with pytest.raises((ValueError, RuntimeError), match=str(error) if "mat1" in str(error) else switches):
        draw(n_samples=2)


# The model


def test_convolutions_are_tf32_only_where_products_are(
    config: DictConfig, model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ldm.generate.instantiate_from_config", lambda section: model)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            load_model_from_config(config, CKPT, device="cpu")
            assert torch.backends.cudnn.allow_tf32 is (precision == "high")
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_loaded_model_is_frozen_and_the_configuration_left_alone(config: DictConfig, model: LatentDiffusion) -> None:
    before = OmegaConf.to_yaml(config)
    loaded = load_model_from_config(config, CKPT, verbose=True, device="cpu", dtype="bfloat16")
    assert OmegaConf.to_yaml(config) == before
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    image = main(PROMPT, model=loaded, ddim_steps=2, scale=2.0, height=SIZE, width=SIZE, progress=False)
    assert np.asarray(image).std() > 0


def test_any_kind_of_configuration_is_taken(
    config: DictConfig, model: LatentDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.model.params.channels = "${model.params.unet_config.params.in_channels}"
    named = tmp_path / "${x}.safetensors"
    named.symlink_to(CKPT)
    loaded = load_model_from_config(config, named, device="cpu")
    assert loaded.channels == 4 and loaded.base_model["base_model"] == "${x}.safetensors"
    sections: list[dict] = []
    monkeypatch.setattr(model, "presets", model.presets)  # put back: there are none beside `named`
    monkeypatch.setattr("ldm.generate.instantiate_from_config", lambda section: (sections.append(section), model)[1])
    for given in (config, OmegaConf.to_container(config), OmegaConf.create(config, flags={"readonly": True})):
        load_model_from_config(given, named, device="cpu")
    OmegaConf.set_struct(config, True)
    load_model_from_config(config, named, device="cpu")
    assert sections == sections[:1] * 4 and sections[0]["params"]["channels"] == 4


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"ckpt": "nowhere.ckpt"}, "nowhere.ckpt"),
        ({"dtype": "int8"}, "frozen_dtype must be one of float32, float16, bfloat16, not 'int8'."),
        ({"config": "nowhere.yaml"}, "There is no configuration file 'nowhere.yaml'"),
    ],
)
def test_a_model_that_cannot_be_loaded(config: DictConfig, arguments: dict[str, str], sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        load_model_from_config(**({"config": config, "ckpt": CKPT} | arguments))
    assert sentence in str(caught.value) and "\n" not in str(caught.value)
