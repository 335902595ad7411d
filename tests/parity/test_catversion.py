"""CatVersion against numbers recorded from the running reference (tests/golden/catversion).

Its two trained files, in `shipped/`, are MIT licensed, Copyright (c) 2023 RoyZhao926 (`shipped/LICENSE`).
"""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from evaluation.metrics.alignment import alignment, cut_out, geometric_mean, masked_alignment
from evaluation.metrics.backbones import Backbone, clip_pixels
from ldm.conditioning.learned import Learned
from ldm.config import instantiate_from_config, load_config
from ldm.data.personalized import PersonalizedBase
from ldm.embeddings import load_concept
from ldm.generate import generate_image
from ldm.methods.catversion import CatVersionPrefix, from_adapter, load_prefix
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.request import Request

FOLDER = Path(tiny.GOLDEN) / "catversion"
META: dict[str, Any] = json.loads((FOLDER / "meta.json").read_text(encoding="utf-8"))
NAMES = ("prefix", "text", "attention", "train", "sample", "shipped", "metric")
PREFIX, TEXT, ATTENTION, TRAIN, SAMPLE, SHIPPED, METRIC = (load_file(FOLDER / f"{name}.safetensors") for name in NAMES)
SEED = META["weight_seed"]
PROMPTS = {name: record["prompt"] for name, record in META["text"].items()}
CONTEXT, SCORE = {"rtol": 0, "atol": 1e-4}, {"rtol": 0, "atol": 1e-5}


def prefix_of(name: str, bias: float = 1.0) -> CatVersionPrefix:
    """A recorded prefix, read as a released file is."""
    tensors, metadata = from_adapter(PREFIX[name])
    prefix = load_prefix(tensors, metadata)
    prefix.logit_bias = bias
    return prefix


class RecordedTokenizer:
    """CLIP's ids, for the texts of the records only."""

    bos_token_id, eos_token_id = 49406, 49407

    def __init__(self) -> None:
        self.ids = {}
        for name, prompt in PROMPTS.items():
            tokens = TEXT[f"{name}.input_ids"][0].tolist()
            self.ids[prompt] = tokens[1 : tokens.index(self.eos_token_id)] if self.eos_token_id in tokens else []
        sentence = self.ids[PROMPTS["sentence"]]
        self.ids |= {"teddybear": self.ids[PROMPTS["beach"]][:-3], "a photo of a teddybear": sentence[:6]}

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": self.ids.get(text, [self.eos_token_id])}  # single words are counted


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    config = load_config(FOLDER / "tiny-cat.yaml")
    params = config.model.params
    sizes = tiny.TEXT_CONFIG | {"num_hidden_layers": 12, "intermediate_size": 64}
    params.cond_stage_config.params.update(text_config=sizes, tokenizer=str(tiny.TOKENIZER))
    params.personalization_config.params.method = "catversion"
    model = instantiate_from_config(config.model)
    tiny.fill(model.model.diffusion_model, tiny.UNET, SEED)
    tiny.fill(model.first_stage_model, tiny.FIRST_STAGE, SEED)
    tiny.fill(model.cond_stage_model.transformer.text_model, tiny.TEXT, SEED)
    model.cond_stage_model.tokenizer = RecordedTokenizer()
    return model.eval()


@pytest.fixture
def learning(model: LatentDiffusion) -> LatentDiffusion:
    """The model, learning from the recorded prefix on, in training mode."""
    learned: Any = model.learned
    with torch.no_grad():
        learned.prefix.copy_(prefix_of("prefix").prefix)
    learned.logit_bias = 1.0
    model.zero_grad()
    return model.train()


def flat(values: Tensor) -> Tensor:
    """The reference's layout of a prefix (layers, 2, P, heads, d)."""
    return values.permute(2, 0, 1, 3, 4).flatten()


@torch.no_grad()
def encoded(model: LatentDiffusion, ids: Tensor, *prefixes: CatVersionPrefix) -> Tensor:
    return model.encode_slots(ids, torch.zeros(1, dtype=torch.long), Learned((), prefixes)).k


def check_context(context: Tensor, record: dict[str, Tensor], name: str, rows: list[int]) -> None:
    torch.testing.assert_close(context[..., ::48], record[f"{name}_every48"], **CONTEXT)
    if f"{name}_rows" in record:
        torch.testing.assert_close(context[:, rows], record[f"{name}_rows"], **CONTEXT)


# Files and layout


def test_layout_of_the_flat_vector() -> None:
    assert torch.equal(prefix_of("prefix").prefix, PREFIX["key_values"])
    assert torch.equal(prefix_of("prefix2").prefix, PREFIX["key_values2"])
    assert torch.equal(flat(PREFIX["key_values2"]), PREFIX["prefix2"])


@pytest.mark.parametrize("place", ["adapter", "adapter/pytorch_adapter.bin"])
def test_adapter_as_the_reference_writes_it(place: str) -> None:
    concept = load_concept(FOLDER / place)
    assert concept.method == "catversion" and torch.equal(concept.tensors["prefix"], PREFIX["key_values"])
    assert concept.metadata == {"catversion.text_layers": "9,10,11", "catversion.logit_bias": "1.0"}


@pytest.mark.parametrize("name", META["shipped"])
def test_trained_adapters_of_its_repository(name: str, model: LatentDiffusion) -> None:
    expected = META["shipped"][name]
    file = FOLDER / "shipped" / name / "pytorch_adapter.bin"
    assert hashlib.sha256(file.read_bytes()).hexdigest() == expected["sha256"]
    concept = load_concept(file.parent)
    values = concept.tensors["prefix"]
    torch.testing.assert_close(flat(values)[:4], torch.tensor(expected["first_values"]), rtol=0, atol=0)
    for (layer, kind), block in {(i, j): values[i, j] for i in range(3) for j in range(2)}.items():
        said = expected["blocks"][f"layer{9 + layer}.{'kv'[kind]}"]
        assert block.norm().item() == pytest.approx(said["norm"], rel=1e-5)
    prefix = load_prefix(concept.tensors, concept.metadata)
    for prompt in ("beach", "teapot"):
        context = encoded(model, SHIPPED[f"{name}.{prompt}.input_ids"], prefix)
        check_context(context, SHIPPED, f"{name}.{prompt}.on", META["text"][prompt]["rows"])


def test_the_weights_are_the_recorded_ones(model: LatentDiffusion) -> None:
    parts = {"unet": (model.model.diffusion_model, tiny.UNET), "vae": (model.first_stage_model, tiny.FIRST_STAGE)}
    parts["clip"] = model.cond_stage_model.transformer.text_model, tiny.TEXT
    for name, (module, prefix) in parts.items():
        assert tiny.checksum(module, prefix)["sha256"] == META["checksums"][name]["sha256"], name


# Contexts


@pytest.mark.parametrize("name", PROMPTS)
def test_contexts(model: LatentDiffusion, name: str) -> None:
    ids, rows = TEXT[f"{name}.input_ids"], META["text"][name]["rows"]
    on = encoded(model, ids, prefix_of("prefix"))
    check_context(on, TEXT, f"{name}.on", rows)
    torch.testing.assert_close(on.norm(dim=-1)[0], TEXT[f"{name}.on_l2_per_token"], **CONTEXT)
    check_context(encoded(model, ids), TEXT, f"{name}.off", rows)
    if f"{name}.on_bias0_every48" in TEXT:
        check_context(encoded(model, ids, prefix_of("prefix", bias=0.0)), TEXT, f"{name}.on_bias0", rows)


def test_a_batch(model: LatentDiffusion) -> None:
    ids = torch.cat([TEXT["beach.input_ids"], TEXT["empty.input_ids"]])
    check_context(encoded(model, ids, prefix_of("prefix")), TEXT, "batch2.on", [])
    check_context(encoded(model, ids), TEXT, "batch2.off", [])


def test_two_positions_and_two_concepts(model: LatentDiffusion) -> None:
    ids, rows = TEXT["beach.input_ids"], META["text"]["beach"]["rows"]
    check_context(encoded(model, ids, prefix_of("prefix2")), TEXT, "beach.on_two_positions", rows)
    both = encoded(model, ids, prefix_of("prefix"), prefix_of("second"))
    check_context(both, TEXT, "beach.on_stacked", rows)
    torch.testing.assert_close(encoded(model, ids, prefix_of("second"), prefix_of("prefix")), both, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("bias", [1, 0])
def test_attention_of_a_prefixed_layer(model: LatentDiffusion, bias: int) -> None:
    """Layer 9 and the residual stream behind it; the output is a + pi (v_p - a), of the plain one a."""
    text: Any = model.cond_stage_model.transformer.text_model
    key_values = prefix_of("prefix").key_values()
    x = text.run_layers(text.enter(text.token_table[TEXT["beach.input_ids"]]), 0, 9)
    torch.testing.assert_close(x[..., ::48], ATTENTION["after_layer8_every48"], **CONTEXT)
    layer = text.encoder.layers[9]
    normed, seen = layer.layer_norm1(x), []
    torch.testing.assert_close(normed[..., ::48], ATTENTION["layer_input_normed_every48"], **CONTEXT)
    with layer.self_attn.out_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])):
        out = layer.self_attn(normed, key_values[9], float(bias))
        layer.self_attn(normed)
    record = {name.partition(".")[2]: x for name, x in ATTENTION.items() if name.startswith(f"bias{bias}.")}
    torch.testing.assert_close(out[..., ::48], record["post_out_proj_every48"], **CONTEXT)
    found, plain = seen
    torch.testing.assert_close(found[..., ::48], record["pre_out_proj_every48"], **CONTEXT)
    pi = record["prefix_probability"].T[None, ..., None]  # (1, 77, 12, 1)
    a = plain.unflatten(-1, (12, 64))
    torch.testing.assert_close((a + pi * (key_values[9][1][0] - a)).flatten(-2), found, **CONTEXT)
    for index in (9, 10, 11):
        after = text.run_layers(x, 9, index + 1, key_values, float(bias))
        torch.testing.assert_close(after[..., ::48], record[f"after_layer{index}_every48"], **CONTEXT)


def test_concepts_of_different_logit_bias(model: LatentDiffusion) -> None:
    """Each column has its own: one of -10000 is not read at all."""
    ids, first, second = TEXT["beach.input_ids"], prefix_of("prefix"), prefix_of("second")
    alone = encoded(model, ids, first)
    second.logit_bias = -1e4
    for order in ((first, second), (second, first)):
        torch.testing.assert_close(encoded(model, ids, *order), alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(encoded(model, ids, second), encoded(model, ids), rtol=0, atol=1e-5)


# Learning


def loss_of(model: LatentDiffusion, captions: list[str], t: Tensor, name: str = "") -> dict[str, Tensor]:
    """Make the gradients of the loss of a record's latents and noise; returns what is logged."""
    rows = len(captions)
    cond = model.get_learned_conditioning(captions)
    loss, parts = model.p_losses(TRAIN[f"{name}x0"][:rows], cond, t, TRAIN[f"{name}noise"][:rows])
    loss.backward()
    return parts


def check_losses(found: dict[str, Tensor], expected: Tensor) -> None:
    got = torch.stack([found["train/loss"], found["train/loss_simple"], found["train/loss_vlb"]])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def check_gradient(model: LatentDiffusion, expected: Tensor) -> None:
    learned: Any = model.learned
    bound = 1e-3 * expected.abs().max().item()
    torch.testing.assert_close(flat(learned.prefix.grad), expected, rtol=0, atol=bound)
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["embedding_manager.learned.prefix"]


@pytest.mark.parametrize("i", range(len(TRAIN["losses.t"])))
def test_losses(learning: LatentDiffusion, i: int) -> None:
    t = TRAIN["losses.t"][i : i + 1]
    check_losses(loss_of(learning, [META["training"]["cap1"]], t), TRAIN["losses.loss_simple_vlb"][i])


@pytest.mark.parametrize(("name", "t", "bias"), [("grad.t99", 99, 1.0), ("grad.t500", 500, 1.0), ("bias0", 99, 0.0)])
def test_gradients(learning: LatentDiffusion, name: str, t: int, bias: float) -> None:
    learned: Any = learning.learned
    learned.logit_bias = bias
    check_losses(loss_of(learning, [META["training"]["cap1"]], torch.tensor([t])), TRAIN[f"{name}.loss"])
    check_gradient(learning, TRAIN[f"{name}.grad"])


@pytest.mark.parametrize(("name", "captions"), [("batch2", META["training"]["cap2"]), ("empty", ["", ""])])
def test_gradients_of_a_batch(learning: LatentDiffusion, name: str, captions: list[str]) -> None:
    check_losses(loss_of(learning, captions, TRAIN[f"{name}.t"]), TRAIN[f"{name}.loss"])
    check_gradient(learning, TRAIN[f"{name}.grad"])


def test_a_whole_step_from_images(learning: LatentDiffusion) -> None:
    """From images through the first stage, with the recorded draws in the reference's order."""
    torch.manual_seed(META["training"]["full_seed"])
    posterior_noise, t, noise = torch.randn(2, 4, 8, 8), torch.randint(0, 1000, (2,)), torch.randn(2, 4, 8, 8)
    draw = {"posterior_noise": posterior_noise, "t": t, "noise": noise}
    for name, values in draw.items():
        assert torch.equal(values, TRAIN[f"full.{name}"])
    batch = {"image": TRAIN["full.image"], "caption": META["training"]["full_cap"], "draw": draw}
    loss, parts = learning.shared_step(batch, "train")
    loss.backward()
    check_losses(parts, TRAIN["full.loss"])
    check_gradient(learning, TRAIN["full.grad"])


def test_images_are_read_as_the_reference_reads_them(tmp_path: Path) -> None:
    Image.fromarray(TRAIN["data.picture"].numpy()).save(tmp_path / "picture.png")
    data = PersonalizedBase(tmp_path, size=META["data"]["size"], flip_p=0.0)
    assert len(data) == META["data"]["length"]
    torch.testing.assert_close(data[0]["image"], TRAIN["data.example"], rtol=0, atol=1e-6)


def test_three_steps_of_adamw(learning: LatentDiffusion) -> None:
    learning.learning_rate = 2 * 5e-3
    optimizer = learning.configure_optimizers()
    settings = META["adamw"]
    assert {key: optimizer.defaults[key] for key in ("lr", "eps", "weight_decay", "amsgrad")} == {
        key: settings[key] for key in ("lr", "eps", "weight_decay", "amsgrad")
    }
    learned: Any = learning.learned
    for step in range(3):
        optimizer.zero_grad()
        found = loss_of(learning, META["training"]["adam_cap"], TRAIN["adam.t"][step], f"adam.step{step}.")
        check_losses(found, TRAIN["adam.losses"][step])
        norm = TRAIN[f"adam.step{step}.grad_l2"]
        torch.testing.assert_close(learned.prefix.grad.norm(), norm, rtol=1e-3, atol=0)
        optimizer.step()
        torch.testing.assert_close(flat(learned.prefix), TRAIN[f"adam.step{step}.prefix"], rtol=0, atol=1e-3)
    context = encoded(learning, TEXT["beach.input_ids"], learned)
    torch.testing.assert_close(context[..., ::48], TRAIN["adam.final_context_every48"], rtol=0, atol=2e-3)


def test_text_layers_below_the_prefix_run_once_for_a_caption(
    learning: LatentDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exact: the same loss and gradient as by the whole text transformer, which runs in every step otherwise."""
    text: Any = learning.cond_stage_model.transformer.text_model
    learning._read_below.clear()
    rows = dict.fromkeys((0, 8, 9, 11), 0)

    def count(layer: int, inputs: Tensor) -> None:
        rows[layer] += len(inputs)

    learned: Any = learning.learned
    batch = {"image": TRAIN["full.image"], "caption": META["training"]["cap2"]}
    batch["draw"] = {name: TRAIN[f"full.{name}"] for name in ("posterior_noise", "t", "noise")}
    found = {}
    hooks = [
        text.encoder.layers[layer].register_forward_pre_hook(lambda _, inputs, layer=layer: count(layer, inputs[0]))
        for layer in rows
    ]
    for caches in (True, True, False):
        learning.zero_grad()
        monkeypatch.setattr(learning, "options", replace(learning.options, cache_text=caches))
        loss, _ = learning.shared_step(batch, "train")
        loss.backward()
        found[caches] = loss.detach(), learned.prefix.grad.clone()
    for hook in hooks:
        hook.remove()
    assert rows == {0: 2 + 2, 8: 2 + 2, 9: 6, 11: 6}
    for cached, whole in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(cached, whole, rtol=1e-6, atol=1e-6 * whole.abs().max().item())


# Sampling


@torch.no_grad()
def sampled(model: LatentDiffusion, steps: int, scale: float, seed: int) -> tuple[list[Tensor], list[Tensor], Any]:
    """The latents and the predicted ones of each step, and the image, of a request."""
    states: list[Tensor] = []
    predicted: list[Tensor] = []

    def keep(_: int, __: int, x: Tensor, x_0: Tensor) -> None:
        states.append(x[0].clone())
        predicted.append(x_0[0].clone())

    request = Request(
        prompt=META["sampling"]["prompt"], seed=seed, ddim_steps=steps, scale=scale,
        height=META["sampling"]["H"], width=META["sampling"]["W"], concepts={"*": load_concept(FOLDER / "adapter")},
    )  # fmt: skip
    image = generate_image(request, model, keep, progress=False)
    return states, predicted, image


@torch.no_grad()
def test_contexts_of_sampling(model: LatentDiffusion) -> None:
    """The prefix reaches the prompt and not the unconditional one."""
    manager: Any = model.embedding_manager
    with manager.keeping():
        manager.load({"*": FOLDER / "adapter"})
        cond = model.get_learned_conditioning([META["sampling"]["prompt"]]).at(500).k
        torch.testing.assert_close(cond, SAMPLE["cond"], **CONTEXT)
        torch.testing.assert_close(model.get_unconditional().at(500).k, SAMPLE["uncond"], **CONTEXT)


@pytest.mark.parametrize("run", META["sampling"]["runs"], ids=lambda run: run["prefix"])
def test_sampling(model: LatentDiffusion, run: dict[str, Any]) -> None:
    name = run["prefix"]
    states, predicted, image = sampled(model, run["steps"], run["scale"], run["seed"])
    bound = 1e-4 * SAMPLE[f"{name}latent"].abs().max().item()
    torch.testing.assert_close(states[-1], SAMPLE[f"{name}latent"][0], rtol=0, atol=bound)
    kept = SAMPLE.get(f"{name}steps_kept", torch.arange(run["steps"])).tolist()
    for part, found in (("x_prev", states), ("pred_x0", predicted)):
        if (expected := SAMPLE.get(f"{name}{part}")) is not None:
            bound = 1e-4 * expected.abs().max().item()
            torch.testing.assert_close(torch.stack([found[i] for i in kept]), expected, rtol=0, atol=bound)
    picture = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(64, 64, 3)
    assert (picture.int() - SAMPLE[f"{name}picture_uint8"].int()).abs().max() <= 1
    assert torch.equal(torch.randn(1, 4, 8, 8, generator=torch.manual_seed(run["seed"])), SAMPLE[f"{name}x_T"])


def test_without_guidance_only_the_prompt_is_read(model: LatentDiffusion) -> None:
    expected = SAMPLE["S10.scale1.0.latent"][0]
    bound = 1e-4 * expected.abs().max().item()
    torch.testing.assert_close(sampled(model, 10, 1.0, 78)[0][-1], expected, rtol=0, atol=bound)


def test_mistakes_would_show(model: LatentDiffusion) -> None:
    """What the records tell apart: another bias, and keys and values exchanged."""
    ids = TEXT["beach.input_ids"]
    right, swapped = prefix_of("prefix"), prefix_of("prefix")
    swapped.prefix.copy_(right.prefix.flip(1))
    for wrong in (prefix_of("prefix", bias=0.0), swapped):
        assert (encoded(model, ids, wrong) - encoded(model, ids, right)).abs().max() > 0.3


# Scores


def recorded(name: str) -> tuple[Image.Image, Image.Image]:
    """A recorded image and its mask."""
    return Image.fromarray(METRIC[f"image.{name}"].numpy()), Image.fromarray(METRIC[f"mask.{name}"].numpy())


@pytest.fixture(scope="module")
def stub() -> Backbone:
    """The recorded stub encoders, behind CLIP's preprocessing."""
    image = torch.from_numpy(tiny.uniform("clip_stub.image", 150528 * 16, SEED)).view(150528, 16)
    text = torch.from_numpy(tiny.uniform("clip_stub.text", 49408 * 16, SEED)).view(49408, 16)
    ids = METRIC["text.ids"][METRIC["text.ids"] != 0]
    return Backbone(
        "stub",
        "as CLIP's",
        clip_pixels,
        # in float64: float32 sums of 150,528 products differ between processors, the record's from this one by 2e-5
        lambda pixels: (pixels.flatten(1).double() @ image.double()).float() / 224 + 1.5,
        lambda texts: (text[ids].sum(0) / 4 + 1.5).expand(len(texts), -1),
    )


@pytest.mark.parametrize("name", ["ref0", "ref1", "ref2", "gen0", "gen1"])
def test_what_clip_reads(stub: Backbone, name: str) -> None:
    plain, mask = recorded(name)
    for kind, image in {"plain": plain, "masked": cut_out(plain, mask)}.items():
        pixels = clip_pixels(image)
        record = {key.rpartition(".")[2]: x for key, x in METRIC.items() if key.startswith(f"{kind}.{name}.")}
        torch.testing.assert_close(pixels[:, ::14, ::14], record["pixels_every14"], **SCORE)
        features = stub.image_features([image])
        torch.testing.assert_close(features[0], record["encode_image"], rtol=1e-5, atol=5e-5)
        torch.testing.assert_close(torch.nn.functional.normalize(features)[0], record["feature"], **SCORE)


@pytest.mark.parametrize("name", ["ref0", "ref2"])
def test_transparency_is_dropped_after_the_resize(name: str) -> None:
    """So transparent parts become black where there is a resize, and show what is under them where there is none."""
    image, mask = recorded(name)
    image.putalpha(mask)
    torch.testing.assert_close(clip_pixels(image)[:, ::14, ::14], METRIC[f"rgba.{name}.pixels_every14"], **SCORE)


def test_scores(stub: Backbone) -> None:
    text = META["metric"]["prompt"]
    torch.testing.assert_close(stub.encode_text([text]), METRIC["text.encode_text"], rtol=1e-5, atol=1e-5)
    references, generated = (
        {n: recorded(n)[0] for n in names} for names in (("ref0", "ref1", "ref2"), ("gen0", "gen1"))
    )
    masks = {name: recorded(name)[1] for name in (*references, *generated)}
    whole = alignment(stub, [*references.values()], [*generated.values()], text)
    masked = masked_alignment(stub, references, generated, masks, text)
    for kind, found in {"plain": whole, "masked": masked}.items():
        torch.testing.assert_close(found["image"], METRIC[f"scores.{kind}_image_pairs"], **SCORE)
        torch.testing.assert_close(found["text"], METRIC[f"scores.{kind}_text"], **SCORE)
        said = META["metric"][f"geometric_script_on_{kind}"]
        means = [found[name].mean().item() for name in ("text", "image")]
        assert [*means, geometric_mean(*means)] == pytest.approx(list(said.values())[:3], abs=1e-5)
    wrong = METRIC["scores.upstream_wo_mask_pairs"]  # of the last masked reference, whatever the reference
    assert torch.equal(wrong, wrong[:1].expand(3, 2)) and abs(wrong.mean() - whole["image"].mean()) > 0.05
