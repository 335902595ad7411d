"""What holds for every method: equal where they should be, alone or in a batch, saved and loaded, in every use."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldm.cli.export import run as export
from ldm.conditioning.context import Context
from ldm.embeddings import Concept, load_concept, save_concept
from ldm.generate import PNG_KEY, load_model_from_config
from ldm.generate import main as generate
from ldm.methods.neti import NeTIMapper, NeTISettings
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.sampling import guided
from ldm.modules.embedding_manager import EmbeddingManager

CONFIG, CKPT = "configs/demo/finetune.yaml", "models/demo/model.safetensors"
LAYERS, WIDTH = 7, 128
CONTENT = "models/demo/references/dotted-star/dotted-star.png"
SMALL = {"ddim_steps": 4, "height": 64, "width": 64, "progress": False}


@torch.no_grad()
def mapper(seed: int = 0, **settings: object) -> Concept:
    torch.manual_seed(seed)
    tensors, metadata = NeTIMapper(NeTISettings(num_layers=LAYERS, width=WIDTH, num_anchors=2, **settings)).to_concept()
    return Concept(tensors, metadata, "neti")


def drawn(*shape: int, method: str = "", name: str = "table") -> Concept:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    described = {"catversion.text_layers": "1,2", "catversion.logit_bias": "1.0"} if name == "prefix" else {}
    return Concept({name: values} if method else values, described, method)


CONCEPTS = {
    "textual-inversion": drawn(1, WIDTH),
    "prospect": drawn(10, WIDTH),
    "xti": drawn(1, LAYERS, 1, WIDTH, method="xti"),
    "stages and layers": drawn(10, LAYERS, 1, WIDTH, method="table"),
    "three tokens": drawn(1, 1, 3, WIDTH, method="table"),
    "neti": mapper(target_norm=10.0),
    "catversion": drawn(2, 2, 1, 4, 32, method="catversion", name="prefix"),
}
TOKENS = [name for name in CONCEPTS if name != "catversion"]
LEARNERS = {"textual-inversion": {}, "prospect": {}, "xti": {}, "table": {"layers": True, "tokens": 2}}
LEARNERS |= {"neti": {"num_anchors": 2}, "catversion": {"layers": 2}}
LATENTS = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def shared() -> LatentDiffusion:
    return load_model_from_config(CONFIG, CKPT, device="cpu")


@pytest.fixture
def model(shared: LatentDiffusion) -> Iterator[LatentDiffusion]:
    manager = shared.embedding_manager
    yield shared
    shared.embedding_manager = manager
    manager.unload()
    shared.eval()


def context(model: LatentDiffusion, concept: Concept, t: int | Tensor = 500, prompt: str = "a * on black") -> Context:
    model.embedding_manager.load({"*": concept})
    with torch.no_grad():
        return model.get_learned_conditioning([prompt] * (len(t) if isinstance(t, Tensor) else 1)).at(t)


def same(found: Context, expected: Context) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other.expand_as(one), rtol=0, atol=1e-5)


# Equal where they should be


def test_methods_with_equal_vectors_are_textual_inversion(model: LatentDiffusion) -> None:
    word = CONCEPTS["textual-inversion"].vectors
    expected = context(model, CONCEPTS["textual-inversion"])
    constant = mapper(output_bypass=False, nested_dropout=None)
    tensors = constant.tensors | {
        "output_layer.0.weight": torch.zeros(WIDTH, 128),
        "output_layer.0.bias": word[0],
    }
    equal = {
        "prospect": Concept(word.repeat(10, 1)),
        "xti": Concept({"table": word.repeat(LAYERS, 1)[None, :, None]}, method="xti"),
        "stages and layers": Concept({"table": word.repeat(10, LAYERS, 1, 1)}, method="table"),
        "neti": Concept(tensors, constant.metadata, "neti"),
    }
    for name, concept in equal.items():
        found = context(model, concept)
        same(found, expected)
        assert (found.k.ndim == 4) is (name != "prospect")


def test_a_prompt_without_the_concept_is_the_plain_one(model: LatentDiffusion) -> None:
    plain = model.get_unconditional("a red star").at(500)
    for name in TOKENS:
        same(context(model, CONCEPTS[name], prompt="a red star"), plain)


# Batches, guidance, files


@torch.no_grad()
@pytest.mark.parametrize("name", CONCEPTS)
def test_a_batch_of_timesteps_is_each_sample_alone(model: LatentDiffusion, name: str) -> None:
    t = torch.tensor([3, 420, 999])
    together = model.apply_model(LATENTS, t, context(model, CONCEPTS[name], t))
    for i in range(3):
        alone = model.apply_model(LATENTS[i : i + 1], t[i : i + 1], context(model, CONCEPTS[name], int(t[i])))
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", CONCEPTS)
def test_guidance_of_1_is_the_conditional_prediction(model: LatentDiffusion, name: str) -> None:
    model.embedding_manager.load({"*": CONCEPTS[name]})
    cond, uncond = model.get_learned_conditioning(["a *"]), model.get_unconditional()
    assert len(cond.stages()) == cond.num_buckets
    x, t = LATENTS[:1], 421
    alone = model.to_eps(model.apply_model(x, torch.tensor([t]), cond), x, torch.tensor([t]))
    torch.testing.assert_close(guided(model, cond, uncond, 1.0)(x, t), alone, rtol=0, atol=1e-5)
    assert not torch.allclose(guided(model, cond, uncond, 3.0)(x, t), alone, atol=1e-3)


@pytest.mark.parametrize("name", CONCEPTS)
def test_a_saved_concept_says_the_same(model: LatentDiffusion, name: str, tmp_path: Path) -> None:
    concept = CONCEPTS[name]
    save_concept(concept, tmp_path / "concept.safetensors", "<thing>")
    read = load_concept(tmp_path / "concept.safetensors")
    assert (read.method, read.identity) == (concept.method, concept.identity)
    for one, other in zip(context(model, read), context(model, concept), strict=True):
        assert torch.equal(one, other)
    foreign = Concept(concept.tensors, concept.metadata | {"base_model_fingerprint": "ab" * 8}, concept.method)
    with pytest.raises(ValueError, match="base model"):
        model.embedding_manager.load(foreign)
    model.embedding_manager.load(foreign, any_base=True)


# Learning


def learner(model: LatentDiffusion, method: str) -> EmbeddingManager:
    torch.manual_seed(0)
    model.embedding_manager = EmbeddingManager(
        model.cond_stage_model, "*", "thing", 10, LAYERS, method=method, method_params=LEARNERS[method]
    )
    model.embedding_manager.requires_grad_(True)
    return model.embedding_manager


def loss_of(model: LatentDiffusion, prompts: list[str]) -> Tensor:
    x, noise = torch.randn(2, 2, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    torch.manual_seed(3)
    return model.p_losses(x, model.get_learned_conditioning(prompts), torch.tensor([900, 40]), noise)[0]


@pytest.mark.parametrize("method", LEARNERS)
def test_only_what_is_learned_has_gradients(model: LatentDiffusion, method: str) -> None:
    """And recomputed activations give the same ones."""
    manager, frozen = learner(model, method), {name: x.clone() for name, x in model.state_dict().items()}
    optimizer = model.configure_optimizers()
    blocks = [part for part in model.modules() if hasattr(part, "use_checkpoint")]
    found = []
    for recompute in (True, False):
        for block in blocks:
            block.use_checkpoint = recompute
        model.zero_grad()
        loss_of(model, ["a *", "a * on black"]).backward()
        for name, parameter in model.named_parameters():
            moves = name.startswith("embedding_manager.learned.")
            assert parameter.requires_grad is moves and (parameter.grad is None or moves), name
        found.append([p.grad.clone() for p in manager.learned.parameters() if p.grad is not None])
    assert blocks and found[0] and max(float(grad.abs().max()) for grad in found[0]) > 0
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
    optimizer.step()
    moved = [name for name, x in model.state_dict().items() if not torch.equal(x, frozen[name])]
    assert moved and all(name.startswith("embedding_manager.learned.") for name in moved)


@pytest.mark.parametrize("method", LEARNERS)
def test_previews_while_learning(model: LatentDiffusion, method: str) -> None:
    learner(model, method)
    model.eval()
    batch = {"caption": ["a *"] * 2, "image": torch.zeros(2, 64, 64, 3), "sample": torch.arange(2)}
    images = model.log_images(batch, N=2, ddim_steps=2)
    assert images["samples_scaled"].shape == (2, 3, 64, 64) and all(x.isfinite().all() for x in images.values())


# Everything that a ProSpect concept can do


def made(model: LatentDiffusion, concept: Concept, prompt: str = "a * on black", **options: object) -> tuple:
    image = generate(prompt, model=model, concepts={"*": concept}, **SMALL, **options)
    return image.tobytes(), json.loads(image.info[PNG_KEY])


@pytest.fixture(scope="module")
def plain(shared: LatentDiffusion) -> bytes:
    return generate("a thing on black", model=shared, **SMALL).tobytes()


@pytest.mark.parametrize("name", TOKENS)
def test_presets_and_stage_prompts(model: LatentDiffusion, plain: bytes, name: str) -> None:
    """In stages without the token, the text is the plain one: a preset of no such stage would be the plain image."""
    concept = CONCEPTS[name]
    preset, record = made(model, concept, preset="style")
    assert record["preset"] == "style" and record["concept_hashes"] == {"*": concept.identity}
    all_stages, _ = made(model, concept, prospect_words=["*"] * 10)
    assert len({preset, all_stages, plain}) == 3
    assert made(model, concept, prospect_words=["thing"] * 10)[0] == plain


@pytest.mark.parametrize("name", CONCEPTS)
def test_editing_an_image_and_repeating_its_record(model: LatentDiffusion, name: str) -> None:
    edited, record = made(model, CONCEPTS[name], content_dir=CONTENT, strength=0.5)
    kept = {key: record[key] for key in ("seed", "strength", "scale", "sampler", "negative_prompt", "truncation")}
    assert made(model, CONCEPTS[name], record["prompt"], content_dir=record["content_dir"], **kept)[0] == edited


@pytest.mark.parametrize(("name", "other"), [*zip(TOKENS, [*TOKENS[1:], TOKENS[0]], strict=True)])
def test_two_methods_in_one_prompt(model: LatentDiffusion, name: str, other: str) -> None:
    """Each token of a prompt is the method's own, and stages may name one or the other."""
    loaded = {"<a>": CONCEPTS[name], "<b>": CONCEPTS[other]}
    words = ["<a>"] * 5 + ["<b>"] * 5
    prompts = {"a <a> on <b>": None, "a <a> on black": None, "a thing on <b>": None, "a * on black": words}
    images = {
        generate(prompt, model=model, concepts=loaded, prospect_words=words, **SMALL | {"ddim_steps": 2}).tobytes()
        for prompt, words in prompts.items()
    }
    assert len(images) == 4


@pytest.mark.parametrize("program", ["diffusers", "a1111", "comfyui", "kohya"])
@pytest.mark.parametrize("name", CONCEPTS)
def test_export_where_a_program_has_the_form(
    name: str, program: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And what is written is read again as what it was; elsewhere one sentence says why not, and nothing is left."""
    concept, out = CONCEPTS[name], tmp_path / "out"
    save_concept(concept, tmp_path / "concept.safetensors")
    flags = [str(tmp_path / "concept.safetensors"), "--name", "thing", "--to", program, "--outdir", str(out)]
    refusal = f"a concept of the method '{name}' has no stage vectors" if name in ("neti", "catversion") else None
    if name in ("xti", "stages and layers") and program in ("a1111", "comfyui"):
        refusal = f"A vector for each U-Net layer has no form in {program}; use --to diffusers, or kohya."
    if program == "kohya":  # whose files are for Stable Diffusion's 16 layers
        refusal = refusal or "kohya's XTI files have a vector for each of 16 U-Net layers and none for stages"
    if refusal is None:
        export(flags)
        again = load_concept(out)
        assert (again.method, again.identity) == (concept.method, concept.identity)
        return
    with pytest.raises(SystemExit):
        export(flags)
    assert refusal in capsys.readouterr().err
    assert not out.exists()


def test_a_concept_of_another_width_is_refused_by_name(model: LatentDiffusion) -> None:
    before = copy.copy(model.embedding_manager.loaded)
    for concept, what in {
        Concept({"table": torch.zeros(1, 16, 1, WIDTH)}, method="xti"): "is for 16 cross-attention layers",
        Concept({"table": torch.zeros(1, LAYERS, 1, 768)}, method="xti"): "has width 768",
        Concept(torch.zeros(10, 768)): "has width 768",
    }.items():
        with pytest.raises(ValueError, match=what):
            model.embedding_manager.load(concept)
    assert model.embedding_manager.loaded == before
