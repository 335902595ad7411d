"""Pictures in, pictures out: `ldm.generate` with the small model that ships. Nothing depends on how well it draws."""

import inspect
import json
import logging
import math
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import Tensor

from ldm.embeddings import Concept, load_concept, save_concept
from ldm.files.images import fit, open_image, to_pil, to_tensor
from ldm.generate import Interrupted, load_model_from_config, main, read_parameters, save_picture
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.native import Native, native

ROOT = Path(__file__).parents[1]
CKPT = ROOT / "models/demo/model.safetensors"
SIZE = 32  # pixels; half of what the model was trained at takes a quarter of the time
PROMPT = "a large striped red star on the left on a navy background"
Draw = Callable[..., Image.Image]


@pytest.fixture(scope="module")
def config() -> DictConfig:
    config = OmegaConf.load(ROOT / "configs/demo/finetune.yaml")
    config.model.params.cond_stage_config.params.tokenizer = str(ROOT / "models/demo/tokenizer")
    return config


@pytest.fixture(scope="module")
def shared_model(config: DictConfig) -> LatentDiffusion:
    return load_model_from_config(config, CKPT, device="cpu")


@pytest.fixture
def model(shared_model: LatentDiffusion) -> LatentDiffusion:
    """The model with nothing loaded."""
    shared_model.embedding_manager.loaded.clear()
    shared_model.embedding_manager.sources.clear()
    return shared_model


@pytest.fixture
def draw(model: LatentDiffusion) -> Draw:
    """`main` with few steps and a small picture."""

    def draw(prompt: str = PROMPT, **arguments: object) -> Image.Image:
        small = {"ddim_steps": 3, "height": SIZE, "width": SIZE, "scale": 3.0, "progress": False}
        return main(prompt, model=model, **(small | arguments))

    return draw


@pytest.fixture
def concept_file(tmp_path: Path) -> Path:
    path = tmp_path / "concept.safetensors"
    save_concept(Concept(torch.randn(10, 128, generator=torch.Generator().manual_seed(1))), path)
    return path


@pytest.fixture
def content(tmp_path: Path) -> Path:
    """A picture twice as wide as high, with something else in every corner."""
    columns, rows = np.meshgrid(np.linspace(0, 255, 96), np.linspace(0, 255, 48))
    path = tmp_path / "content.png"
    Image.fromarray(np.stack([columns, rows, 255 - columns], axis=2).astype(np.uint8)).save(path)
    return path


def difference(a: Image.Image, b: Image.Image) -> int:
    """The largest difference of two pictures, in 1/255."""
    assert a.size == b.size
    return int(np.abs(np.asarray(a, np.int64) - np.asarray(b, np.int64)).max())


def latents(draw: Draw, *prompt: str, **arguments: object) -> Tensor:
    """The latents (steps, B, C, H, W) after each step; they show what a picture's 256 values may not."""
    seen: list[Tensor] = []
    draw(*prompt, **arguments, callback=lambda step, t, x, x_0: seen.append(x))
    return torch.stack(seen)


def tile(grid: Image.Image, row: int, column: int) -> Image.Image:
    return grid.crop((column * SIZE, row * SIZE, (column + 1) * SIZE, (row + 1) * SIZE))


# What is asked for comes


def test_the_contract_of_the_signature() -> None:
    parameters = inspect.signature(main).parameters.values()
    positional = {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}
    assert list(positional.items()) == [
        ("prompt", ""),
        ("content_dir", None),
        ("ddim_steps", 50),
        ("strength", 0.5),
        ("ddim_eta", 0.0),
        ("n_iter", 1),
        ("C", 4),
        ("f", 8),
        ("n_rows", 0),
        ("scale", None),
        ("model", None),
        ("seed", 42),
        ("prospect_words", None),
        ("n_samples", 1),
        ("height", None),
        ("width", None),
    ]


def test_a_picture_has_the_size_asked_for(draw: Draw) -> None:
    picture = draw(width=96)
    assert (picture.mode, picture.size) == ("RGB", (96, SIZE))
    assert difference(picture, draw(width=96)) == 0
    assert difference(picture, draw(width=96, seed=43)) > 1


def test_the_models_own_size_and_guidance(model: LatentDiffusion) -> None:
    picture = main(PROMPT, model=model, ddim_steps=2, progress=False)
    record = json.loads(picture.info["prospect"])
    assert picture.size == (128, 128)
    assert (record["height"], record["width"], record["scale"]) == (128, 128, 2.5)
    explicit = main(PROMPT, model=model, ddim_steps=2, height=128, width=128, scale=2.5, progress=False)
    assert difference(picture, explicit) == 0
    assert main(PROMPT, model=model, ddim_steps=1, width=32, progress=False).size == (32, 128)


@pytest.mark.parametrize(
    "path", ["configs/stable-diffusion/v1-inference.yaml", "configs/stable-diffusion/v1-finetune.yaml"]
)
def test_stable_diffusions_own_size_and_guidance(path: str) -> None:
    config = OmegaConf.load(ROOT / path)
    assert native(config) == Native() == (512, 512, 10.0)
    config.model.params.first_stage_config.params.ddconfig.resolution = 256  # as in CompVis' own files
    assert native(config) == (512, 512, 10.0)
    assert native(OmegaConf.create({"model": {"target": "a", "params": {}}})) == (512, 512, 10.0)


@pytest.mark.parametrize("editing", [False, True])
def test_a_picture_of_a_batch_is_the_picture_alone(draw: Draw, content: Path, editing: bool) -> None:
    arguments = {"ddim_eta": 1.0, "content_dir": content if editing else None}
    alone = [draw(seed=seed, **arguments) for seed in (5, 6, 7, 8)]
    assert min(difference(alone[0], other) for other in alone[1:]) > 1
    grid = draw(seed=5, n_iter=2, n_samples=2, **arguments)
    assert grid.size == (2 * SIZE, 2 * SIZE)
    assert max(difference(tile(grid, *divmod(i, 2)), alone[i]) for i in range(4)) <= 1


@pytest.mark.parametrize(
    ("n_iter", "n_samples", "n_rows", "columns", "rows"), [(1, 3, 0, 2, 2), (3, 1, 3, 3, 1), (2, 1, 1, 1, 2)]
)
def test_the_grid(draw: Draw, n_iter: int, n_samples: int, n_rows: int, columns: int, rows: int) -> None:
    grid = draw(n_iter=n_iter, n_samples=n_samples, n_rows=n_rows)
    assert grid.size == (columns * SIZE, rows * SIZE)
    last = n_iter * n_samples - 1
    assert difference(tile(grid, *divmod(last, columns)), draw(seed=42 + last)) <= 1


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
    prompts: list[str] = []
    encode = model.get_learned_conditioning
    monkeypatch.setattr(
        model, "get_learned_conditioning", lambda texts, *rest: (prompts.extend(texts), encode(texts, *rest))[1]
    )
    alone = latents(draw, scale=1.0)
    assert prompts == [PROMPT]
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


def test_plms_makes_one_call_more_than_steps(draw: Draw, model: LatentDiffusion) -> None:
    calls: list[int] = []
    hook = model.model.diffusion_model.register_forward_hook(lambda *_: calls.append(1))
    try:
        picture = draw(sampler="plms", ddim_steps=4)
    finally:
        hook.remove()
    assert len(calls) == 5
    assert difference(picture, draw(sampler="ddim", ddim_steps=4)) > 1


def test_the_callback_sees_every_step(draw: Draw, model: LatentDiffusion) -> None:
    seen: list[tuple[int, int, Tensor, Tensor]] = []
    picture = draw(ddim_steps=4, callback=lambda *step: seen.append(step))
    assert [(step, t) for step, t, _, _ in seen] == [(0, 751), (1, 501), (2, 251), (3, 1)]
    assert all(x.shape == x_0.shape == (1, 4, SIZE // 8, SIZE // 8) for _, _, x, x_0 in seen)
    assert difference(to_pil(model.decode_first_stage(seen[-1][2])[0]), picture) == 0
    preview = to_pil(model.decode_first_stage(seen[0][3])[0])
    assert preview.size == picture.size and difference(preview, picture) > 1


def test_an_interrupt_brings_what_is_finished(draw: Draw) -> None:
    def stop(step: int, t: int, x: Tensor, x_0: Tensor) -> None:
        seen.append(step)
        if len(seen) == 8:
            raise KeyboardInterrupt

    seen: list[int] = []
    with pytest.raises(Interrupted) as stopped:
        draw(n_iter=4, callback=stop)
    expected = draw(n_iter=2)
    assert difference(stopped.value.picture, expected) == 0 and stopped.value.picture.info == expected.info
    seen = [0] * 7
    with pytest.raises(KeyboardInterrupt) as stopped:
        draw(n_iter=4, callback=stop)
    assert stopped.type is KeyboardInterrupt


# Editing


def test_strength_0_gives_the_autoencoder_s_reconstruction(draw: Draw, model: LatentDiffusion, content: Path) -> None:
    image = to_tensor(fit(Image.open(content), SIZE, SIZE, "crop")).unsqueeze(0)
    posterior = model.encode_first_stage(image)
    noise = torch.randn(posterior.mean.shape[1:], generator=torch.Generator().manual_seed(42))
    expected = to_pil(model.decode_first_stage(model.get_first_stage_encoding(posterior, noise))[0])
    steps: list[int] = []
    picture = draw(content_dir=content, strength=0.0, callback=lambda step, *_: steps.append(step))
    assert difference(picture, expected) <= 1
    assert steps == []


def test_strength_says_where_denoising_begins(draw: Draw, content: Path) -> None:
    def timesteps(strength: float) -> list[int]:
        seen: list[int] = []
        draw(content_dir=content, strength=strength, ddim_steps=4, callback=lambda step, t, *_: seen.append(t))
        return seen

    assert timesteps(0.5) == [251, 1]
    assert timesteps(0.99) == [501, 251, 1]
    assert timesteps(1.0) == [751, 501, 251, 1]


def test_the_strength_of_one_step_is_said(draw: Draw, content: Path, caplog: pytest.LogCaptureFixture) -> None:
    draw(content_dir=content, strength=0.001, ddim_steps=200)
    assert caplog.messages[0].endswith("; 0.005 makes one.")


@pytest.mark.parametrize("steps", [3, 10])
def test_a_strength_of_less_than_a_step_is_said(
    draw: Draw, content: Path, caplog: pytest.LogCaptureFixture, steps: int
) -> None:
    unchanged = draw(content_dir=content, strength=0.0, ddim_steps=steps)
    assert caplog.messages == []
    assert difference(draw(content_dir=content, strength=0.05, ddim_steps=steps), unchanged) == 0
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(
        f"strength 0.05 of {steps} steps is less than one, so the content picture stays"
    )
    enough = float(caplog.messages[0].split()[-3])
    assert difference(draw(content_dir=content, strength=enough, ddim_steps=steps), unchanged) > 0
    assert len(caplog.messages) == 1


def test_strength_1_still_gives_a_picture(draw: Draw, content: Path) -> None:
    edited = draw(content_dir=content, strength=1.0)
    assert edited.size == (SIZE, SIZE)
    assert difference(edited, draw(content_dir=content, strength=0.0)) > 1


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
    pictures = {}
    for resize in ("crop", "pad", "squash"):
        pictures[resize] = draw(content_dir=content, resize=resize)
        assert difference(pictures[resize], draw(content_dir=fit(Image.open(content), SIZE, SIZE, resize))) == 0
    assert difference(pictures["crop"], pictures["pad"]) > 1
    assert difference(pictures["crop"], pictures["squash"]) > 1
    assert difference(draw(content_dir=content), pictures["crop"]) == 0


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
    with pytest.raises(ValueError, match=r"'sd-v1-4.ckpt' \(SHA-256 0000000000…\), but this is 'model.safetensors'"):
        draw(**words, concepts=concepts)
    picture = draw(**words, concepts=concepts, any_base=True)
    assert json.loads(picture.info["prospect"])["any_base"] is True
    same = draw(**words, concepts={"*": concept_file, "<b>": load_concept(concept_file)})
    assert difference(picture, same) == 0


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


def test_concepts_need_a_manager(draw: Draw, model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(model._modules, "embedding_manager", None)
    with pytest.raises(ValueError, match="personalization_config"):
        draw(concepts={"*": "concept.safetensors"})


# What a picture says of itself


@pytest.mark.parametrize("editing", [False, True])
def test_a_picture_can_be_made_again(
    draw: Draw, model: LatentDiffusion, tmp_path: Path, content: Path, concept_file: Path, editing: bool
) -> None:
    picture = draw(
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
    save_picture(picture, tmp_path / "new folder" / "picture.png")
    parameters = read_parameters(tmp_path / "new folder" / "picture.png")
    assert parameters["concepts"] == {"*": str(concept_file)}
    assert parameters.pop("base_model") == "model.safetensors"
    assert parameters.pop("concept_hashes") == {"*": sha256(concept_file.read_bytes()).hexdigest()[:12]}
    assert (parameters.pop("dtype"), parameters.pop("num_stages")) == ("float32", model.num_stages)
    hashed = parameters.pop("content_hash")
    assert hashed == (sha256(open_image(content).tobytes()).hexdigest()[:10] if editing else None)
    model.embedding_manager.loaded.clear()
    again = main(model=model, progress=False, **parameters)
    assert difference(again, picture) == 0
    assert difference(Image.open(tmp_path / "new folder" / "picture.png"), picture) == 0
    assert again.info == picture.info


def test_content_that_is_no_file_is_recorded_as_such(draw: Draw, tmp_path: Path, content: Path) -> None:
    for source, recorded in ((Image.open(content), str(content)), (Image.new("RGB", (40, 40)), "")):
        save_picture(draw(content_dir=source), tmp_path / "edited.png")
        assert read_parameters(tmp_path / "edited.png")["content_dir"] == recorded
        assert len(read_parameters(tmp_path / "edited.png")["content_hash"]) == 10


@pytest.mark.parametrize("name", ["mug.jpg", "mug"])
def test_only_png_keeps_what_repeats_a_picture(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must end in \.png"):
        save_picture(Image.new("RGB", (8, 8)), tmp_path / "new" / name)
    assert not list(tmp_path.iterdir())


def test_a_picture_from_elsewhere_has_no_parameters(content: Path) -> None:
    with pytest.raises(ValueError, match="content.png' has no ProSpect parameters"):
        read_parameters(content)


# What cannot be done is said before anything is done


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"ddim_steps": 0}, "ddim_steps must be in 1..1000, not 0."),
        ({"ddim_steps": 1001}, "ddim_steps must be in 1..1000, not 1001."),
        ({"ddim_steps": 20.0}, "ddim_steps must be a whole number, not 20.0."),
        ({"strength": 1.1}, "strength must be in 0..1, not 1.1"),
        ({"strength": "much"}, "strength must be a number, not 'much'."),
        ({"ddim_eta": -0.5}, "ddim_eta must not be negative, but is -0.5."),
        ({"ddim_eta": 0.5, "sampler": "plms"}, "ddim_eta must be 0, not 0.5"),
        ({"n_iter": 0}, "n_iter and n_samples must be at least 1, not 0 and 1."),
        ({"n_samples": -1}, "n_iter and n_samples must be at least 1, not 1 and -1."),
        ({"n_rows": -1}, "n_rows must be at least 1, or 0"),
        ({"scale": -1.0}, "scale must be in 0..1000, not -1.0"),
        ({"scale": math.nan}, "scale must be in 0..1000, not nan"),
        ({"scale": math.inf}, "scale must be in 0..1000, not inf"),
        ({"seed": -1}, "seed must be in 0.."),
        ({"seed": 2**63}, "seed must be in 0.."),
        ({"height": 70}, "height must be a multiple of 32 for this model, not 70; nearest: 64."),
        ({"width": 0}, "width must be a multiple of 32 for this model, not 0; nearest: 32."),
        ({"sampler": "euler"}, "Unknown sampler 'euler'; there are ddim, plms."),
        ({"resize": "stretch"}, "Unknown resize 'stretch'"),
        ({"prospect_words": ["a"] * 9}, "prospect_words has 9 entries, but this model has 10 stages"),
        ({"prospect_words": "a star"}, "prospect_words must be a list of 10 entries, not a str."),
        ({"prospect_words": ["a"] * 9 + [10]}, r"prospect_words[9] = 10: a stage number must be in 0..9."),
        ({"prompt": ["a star", "a heart"]}, "A prompt must be a text, not a list."),
        ({"content_dir": "nowhere.png"}, "There is no file 'nowhere.png'; check the path."),
        ({"concepts": {"*": "nowhere.pt"}}, "'nowhere.pt': there is no such file; check the path."),
        ({"negative_prompt": "a *"}, "negative_prompt has the placeholder '*'; it must be plain text"),
        ({"negative_prompt": 3}, "negative_prompt must be a text, not a int."),
        ({"model": None}, "main() needs model="),
    ],
)
def test_bad_arguments(model: LatentDiffusion, arguments: dict[str, object], sentence: str) -> None:
    drawn: list[int] = []
    usual = {"model": model, "height": SIZE, "width": SIZE, "callback": lambda *_: drawn.append(1)}
    with pytest.raises(ValueError) as caught:
        main(**({"prompt": PROMPT} | usual | arguments))
    assert sentence in str(caught.value) and "\n" not in str(caught.value)
    assert drawn == []


# The model


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_convolutions_are_tf32_only_where_products_are(
    config: DictConfig, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", precision == "highest")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
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
    picture = main(PROMPT, model=loaded, ddim_steps=2, scale=2.0, height=SIZE, width=SIZE, progress=False)
    assert np.asarray(picture).std() > 0


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
