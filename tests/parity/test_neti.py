"""NeTI against numbers recorded from the running reference (tests/golden/neti), from the mapper to sampled latents."""

import copy
import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ldm.cli.export import run as export
from ldm.conditioning.context import Context
from ldm.conditioning.encoding import PromptConditioning, SlotEncoder
from ldm.conditioning.learned import TokenVectors
from ldm.config import instantiate_from_config, load_config
from ldm.embeddings import Concept, EmbeddingError, load_concept, save_concept
from ldm.files.tensors import StandIn
from ldm.methods.base import Start
from ldm.methods.neti import HIDDEN, NeTIMapper, NeTISettings, learn_mapper, load_mapper
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.dpm_solver import dpmpp_2m
from ldm.models.diffusion.sampling import guided

FOLDER = Path(tiny.GOLDEN) / "neti"
META: dict[str, Any] = json.loads((FOLDER / "meta.json").read_text(encoding="utf-8"))
MAPPER, TEXT, UNET, TRAIN, SAMPLE, IMPORT = (
    load_file(FOLDER / f"{name}.safetensors") for name in ("mapper", "text", "unet", "train", "sample", "import")
)
SEED = META["weight_seed"]
TOLERANCE = {"rtol": 0, "atol": 1e-4}


def settings_of(variant: str) -> NeTISettings:
    """The settings that a variant was recorded with."""
    entry = META["variants"][variant]
    said = entry["settings"]
    sigmas = said.get("pe_sigmas") or {"sigma_t": 0.03, "sigma_l": 2.0}
    return NeTISettings(
        target_norm=entry["target_norm"],
        output_bypass=said["output_bypass"],
        positional_encoding=said["use_positional_encoding"],
        num_anchors=said.get("num_pe_time_anchors") or 10,
        nested_dropout=said["nested_dropout_prob"] if said["use_nested_dropout"] else None,
        **sigmas,
    )


@torch.no_grad()
def mapper_of(variant: str) -> NeTIMapper:
    """A variant's mapper, with the weights that its names stand for."""
    mapper = NeTIMapper(settings_of(variant)).eval()
    if f"{variant}.w" in MAPPER:
        mapper.w.copy_(MAPPER[f"{variant}.w"])
    for name, parameter in mapper.named_parameters():
        bound, offset = tiny.bound_and_offset(name, tuple(parameter.shape))
        bound = np.float32(1) if name == "input_layer.weight" else bound
        values = tiny.uniform(f"neti.mapper.{name}", parameter.numel(), SEED) * bound + offset
        parameter.copy_(torch.from_numpy(values).view(parameter.shape))
    return mapper


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    config = load_config(FOLDER / "tiny-neti.yaml")
    config.model.target = "ldm.models.diffusion.ddpm.LatentDiffusion"
    config.model.params.cond_stage_config.params.tokenizer = str(tiny.TOKENIZER)
    config.model.params.personalization_config = {"target": "ldm.modules.embedding_manager.EmbeddingManager"}
    model = instantiate_from_config(config.model)
    tiny.fill(model.model.diffusion_model, tiny.UNET, SEED)
    tiny.fill(model.cond_stage_model.transformer.text_model, tiny.TEXT, SEED)
    return model.eval()


def slots_of(input_ids: Tensor) -> Tensor:
    """Token slots (N, L): the recorded ids, with the learned row in the placeholder's place."""
    return torch.where(input_ids == META["placeholder_id"], -1, input_ids).reshape(-1, 77)


def sampled(tensor: Tensor) -> Tensor:
    """The values of a tensor that were recorded."""
    return tensor.detach().flatten()[:: max(1, tensor.numel() // 64)][:64]


# The mapper


@pytest.mark.parametrize("variant", META["variants"])
def test_names_and_sizes(variant: str) -> None:
    mapper, entry = mapper_of(variant), META["variants"][variant]
    assert set(mapper.state_dict()) - {"w"} == set(entry["state_dict_keys"])
    assert sum(p.numel() for p in mapper.parameters()) == entry["trainable"]


def test_features() -> None:
    t, layer = MAPPER["features_tl"].long().T
    features = mapper_of("A").features(t, layer)
    torch.testing.assert_close(features, MAPPER["A.features"], rtol=0, atol=1e-6)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(len(t)))


@pytest.mark.parametrize("variant", ["A", "B", "C", "E"])
def test_anchors_at_the_start(variant: str) -> None:
    mapper = NeTIMapper(settings_of(variant))
    mapper.w.copy_(MAPPER[f"{variant}.w"])
    mapper._centre_anchors(mapper.input_layer)
    found = mapper.input_layer.weight[:, ::128]
    torch.testing.assert_close(found, MAPPER[f"{variant}.init.input_layer.weight_every128"], rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("variant", META["variants"])
def test_outputs_and_truncation(variant: str) -> None:
    mapper = mapper_of(variant)
    t, layer = MAPPER["grid"].long().T
    for k in META["mapper"]["truncations"]:
        if (name := f"{variant}.trunc{k}.every12") not in MAPPER:
            continue
        drops = k is not None and mapper.settings.nested_dropout is not None
        kept = torch.full_like(t, k) if drops else None
        torch.testing.assert_close(mapper(t, layer, kept)[:, ::12], MAPPER[name], **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["A", "B"])
def test_nested_dropout_drops_the_tail(variant: str) -> None:
    """The recorded calls, with the numbers that the reference drew."""
    mapper = mapper_of(variant)
    grid = MAPPER["grid"].long()
    calls = zip(MAPPER[f"{variant}.train.grid_rows"], MAPPER[f"{variant}.train.k"], strict=True)
    for (rows, k), expected in zip(calls, MAPPER[f"{variant}.train.every12"], strict=True):
        t, layer = grid[rows.long()].T
        torch.testing.assert_close(mapper(t, layer, k.long())[:, ::12], expected, **TOLERANCE)


def test_nested_dropout_draws() -> None:
    mapper = NeTIMapper(NeTISettings())
    torch.manual_seed(0)
    kept = torch.cat([mapper.draw_kept(3) for _ in range(250)])
    whole = (kept == HIDDEN).all(dim=1)
    assert abs(whole.float().mean() - 0.5) < 0.04 and kept.min() == 0 and kept[~whole].float().mean() < 70
    assert (kept[~whole][:, 0] != kept[~whole][:, 1]).float().mean() > 0.9
    assert mapper.vectors(torch.tensor([5]), truncation=-1).e.shape == (16, 1, 1, 768)


# Contexts


def contexts(model: LatentDiffusion, variant: str, slots: Tensor, t: int, truncation: int | None = None) -> Context:
    """The context of one prompt at one timestep, with a layer axis."""
    vectors = mapper_of(variant).vectors(torch.tensor([t]), truncation)
    return model.cond_stage_model.encode(slots, vectors)


@torch.no_grad()
@pytest.mark.parametrize("name", META["text"]["prompts"])
def test_contexts(model: LatentDiffusion, name: str) -> None:
    entry, variant = META["text"]["prompts"][name], name.partition(".")[0]
    slots, p = slots_of(TEXT[f"{name}.input_ids"]), entry["placeholder_position"]
    assert (slots[0] == -1).nonzero().tolist() == [[p]]
    for i, (t, layer) in enumerate(entry["tl"]):
        context = contexts(model, variant, slots, t, entry["truncation"])
        k, v = (x[0] for x in context.layer(layer))
        torch.testing.assert_close(k[:, ::96], TEXT[f"{name}.k_every96"][i], **TOLERANCE)
        torch.testing.assert_close(k[p, ::2], TEXT[f"{name}.k_row_p_every2"][i], **TOLERANCE)
        row = TEXT[f"{name}.{'v' if entry['split'] else 'k'}_row_p_every2"]  # without a bypass v is k
        torch.testing.assert_close(v[p, ::2], row[i], **TOLERANCE)
        others = torch.arange(77) != p
        assert torch.equal(k[others], v[others]) and (context.k is context.v) is not entry["split"]


@torch.no_grad()
def test_contexts_of_all_layers(model: LatentDiffusion) -> None:
    slots = slots_of(TEXT["A.photo.input_ids"])[:1]
    context = contexts(model, "A", slots, *META["text"]["all_layers"]["t"])
    p, rows = META["text"]["prompts"]["A.photo"]["placeholder_position"], META["text"]["l5_rows"]
    torch.testing.assert_close(context.k[:, 0, :, ::96], TEXT["A.all_layers.k_every96"][0], **TOLERANCE)
    torch.testing.assert_close(context.v[:, 0, p, ::8], TEXT["A.all_layers.v_row_p_every8"][0], **TOLERANCE)
    for part in "kv":
        found = getattr(context, part)[5, 0, rows]
        torch.testing.assert_close(found, TEXT[f"A.all_layers.l5_{part}_rows"].view_as(found), **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("name", META["text"]["plain"])
def test_plain_prompts(model: LatentDiffusion, name: str) -> None:
    found = model.cond_stage_model(TEXT[f"plain.{name}.input_ids"].view(1, 77).long())[0]
    for part, values in {"every48": found[:, ::48], "rows_0_4_76": found[[0, 4, 76]]}.items():
        torch.testing.assert_close(values, TEXT[f"plain.{name}.{part}"].view_as(values), **TOLERANCE)


@torch.no_grad()
def test_a_batch_of_timesteps_is_what_each_is_alone(model: LatentDiffusion) -> None:
    slots = slots_of(TEXT["A.photo.input_ids"])[:1].repeat(2, 1)
    t = torch.tensor([700, 3])
    together = model.cond_stage_model.encode(slots, mapper_of("A").vectors(t))
    for i, timestep in enumerate(t.tolist()):
        alone = contexts(model, "A", slots[:1], timestep)
        torch.testing.assert_close(together.k[:, i], alone.k[:, 0], rtol=0, atol=1e-5)
        torch.testing.assert_close(together.v[:, i], alone.v[:, 0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_unet_reads_them_layer_by_layer(model: LatentDiffusion) -> None:
    slots = slots_of(TEXT["A.photo.input_ids"])[:1]
    for name in (name for name in UNET if name.startswith("out.t")):
        t = int(name.removeprefix("out.t"))
        found = model.apply_model(UNET["x"], torch.tensor([t]), contexts(model, "A", slots, t))
        torch.testing.assert_close(found, UNET[name], **TOLERANCE)


@torch.no_grad()
def test_the_output_of_every_cross_attention(model: LatentDiffusion) -> None:
    t, found = META["unet"]["hook_t"], []
    sites = [model.model.diffusion_model.get_submodule(name) for name in META["cross_attention_sites"]]
    hooks = [site.register_forward_hook(lambda _, __, out: found.append(sampled(out))) for site in sites]
    model.apply_model(UNET["x"], torch.tensor([t]), contexts(model, "A", slots_of(TEXT["A.photo.input_ids"])[:1], t))
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(torch.stack(found), UNET[f"attn2.t{t}"], **TOLERANCE)


@torch.no_grad()
def test_a_batch_of_timesteps_and_prompts_in_the_unet(model: LatentDiffusion) -> None:
    slots = torch.cat([slots_of(TEXT[f"A.{name}.input_ids"])[:1] for name in ("photo", "long")])
    t = torch.tensor(META["unet"]["batch2"]["t"])
    context = model.cond_stage_model.encode(slots, mapper_of("A").vectors(t))
    torch.testing.assert_close(model.apply_model(UNET["x_batch2"], t, context), UNET["out_batch2"], **TOLERANCE)


@torch.no_grad()
def test_keys_and_values_differ_in_the_unet(model: LatentDiffusion) -> None:
    """Synthetic contexts, for which neither mapper nor text transformer is needed."""

    def synthetic(part: str) -> Tensor:
        layers = [tiny.uniform(f"context.l{layer}.{part}", 77 * 768, SEED) for layer in range(16)]
        return torch.from_numpy(np.stack(layers) * np.float32(3**0.5)).view(16, 1, 77, 768)

    k, v = synthetic("k"), synthetic("v")
    for name in (name for name in UNET if name.startswith("synthetic")):
        t = int(name.rpartition(".t")[2])
        context = Context(k, k if "k_only" in name else v)
        torch.testing.assert_close(model.apply_model(UNET["x"], torch.tensor([t]), context), UNET[name], **TOLERANCE)


def test_vectors_without_a_bypass_have_no_residual() -> None:
    vectors = mapper_of("B").vectors(torch.tensor([1, 2, 3]))
    assert vectors.e.shape == (16, 3, 1, 768) and vectors.residual is None
    joined = TokenVectors.cat([vectors, TokenVectors(torch.zeros(1, 1, 10, 768))])
    assert joined.e.shape == (16, 3, 11, 768)


# Training


def learner(model: LatentDiffusion, variant: str) -> NeTIMapper:
    """What a configuration with `method: neti` makes, with the weights of a variant."""
    said = META["variants"][variant]["settings"]
    word = model.cond_stage_model.token_table[META["super_category_id"]][None]
    options = {"output_bypass": said["output_bypass"], "positional_encoding": said["use_positional_encoding"]}
    mapper = learn_mapper(Start(word, 1, num_stages=10, num_layers=16), **options)
    assert mapper.settings.target_norm == pytest.approx(META["target_norm"], rel=1e-6)
    mapper.load_state_dict(mapper_of(variant).state_dict())
    return mapper.train()


def conditioning(model: LatentDiffusion, input_ids: Tensor, truncation: int | None = None) -> PromptConditioning:
    """What `get_learned_conditioning` returns, for recorded ids: CLIP's whole vocabulary is not here."""
    slots = slots_of(input_ids.long())[None]
    return PromptConditioning(slots, SlotEncoder(model.encode_slots, model.embedding_manager.learned_now(truncation)))


def close(found: Tensor, recorded: Tensor, tolerance: float = 1e-4) -> None:
    """Equal up to a share of the largest value."""
    torch.testing.assert_close(found, recorded, rtol=0, atol=tolerance * recorded.abs().max().item())


@pytest.mark.parametrize("run", META["train"])
def test_training(model: LatentDiffusion, run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses, gradients and weights of AdamW's steps, by the recorded images, noises, timesteps, captions and drops."""
    entry = META["train"][run]
    learned = learner(model, entry["variant"])
    model.embedding_manager.learned = learned
    monkeypatch.setattr(model, "learning_rate", entry["lr"])
    optimizer = model.configure_optimizers()
    start = {name: p.detach().clone() for name, p in learned.named_parameters()}
    assert list(start) == entry["parameters"]
    for step in range(entry["steps"]):
        x0, noise, t = (TRAIN[f"{run}.micro{step}.{name}"] for name in ("x0", "noise", "t"))
        kept = TRAIN.get(f"{run}.micro{step}.nested_k", torch.full((16, 2), HIDDEN))
        monkeypatch.setattr(learned, "draw_kept", lambda _, kept=kept: kept.long())
        cond = conditioning(model, TRAIN[f"{run}.micro{step}.input_ids"])
        loss, _ = model.p_losses(x0, cond, t.long(), noise)
        close(loss.detach(), TRAIN[f"{run}.micro{step}.loss"])
        loss.backward()
        norms = torch.stack([p.grad.norm() for p in learned.parameters()])
        close(norms, TRAIN[f"{run}.step{step}.grad_l2"], 1e-4 if step == 0 else 1e-3)
        for name, p in learned.named_parameters() if step == 0 else ():
            close(sampled(p.grad), TRAIN[f"{run}.step0.grad.{name}"])
        optimizer.step()
        optimizer.zero_grad()
        close(torch.stack([p.detach().norm() for p in learned.parameters()]), TRAIN[f"{run}.step{step}.param_l2"])
    for name, p in learned.named_parameters():
        close(sampled(p), TRAIN[f"{run}.final.{name}"], 1e-3)
    assert all(p.grad is None for part in (model.model, model.cond_stage_model) for p in part.parameters())
    with torch.no_grad():
        t, layer = MAPPER["grid"].long().T
        close(learned.eval()(t, layer)[:, ::12], TRAIN[f"{run}.final.mapper_every12"], 1e-3)
    model.embedding_manager.learned = None


# Sampling


@pytest.fixture(scope="module")
def loaded(model: LatentDiffusion) -> LatentDiffusion:
    """The model with the recorded concept loaded, as a file of it would be."""
    tensors, metadata = mapper_of("A").to_concept()
    model.embedding_manager.load({META["placeholder"]: Concept(tensors, metadata, "neti")})
    return model


def prompts_of(model: LatentDiffusion, name: str) -> tuple[PromptConditioning, PromptConditioning]:
    """What a recorded run shows, and what guidance leads away from."""
    truncation = 16 if name.endswith("trunc16") else None
    plain = "negative" if name.endswith("negative") else "empty"
    cond = conditioning(model, TEXT["A.comma.input_ids"], truncation)
    return cond, conditioning(model, TEXT[f"plain.{plain}.input_ids"])


def check_run(name: str, latents: Tensor, trajectory: list[Tensor]) -> None:
    for found, recorded in zip(trajectory, SAMPLE.get(f"{name}.trajectory", trajectory), strict=True):
        close(found.view_as(recorded), recorded)
    close(latents, SAMPLE[f"{name}.latent"])


@pytest.mark.parametrize("name", ["ddim.S10.truncNone", "ddim.S10.trunc16"])
def test_sampling_with_ddim(loaded: LatentDiffusion, name: str) -> None:
    trajectory: list[Tensor] = []
    cond, uncond = prompts_of(loaded, name)
    latents, _ = DDIMSampler(loaded).sample(
        S=10, batch_size=1, shape=(4, 16, 16), x_T=SAMPLE["x_T"], conditioning=cond,
        unconditional_conditioning=uncond, unconditional_guidance_scale=META["sample"]["guidance_scale"],
        step_callback=lambda step, t, x, x_0: trajectory.append(x),
    )  # fmt: skip
    check_run(name, latents, trajectory)


RUNS = [n.removesuffix(".latent") for n in SAMPLE if n.startswith("dpm") and n.endswith(".latent")]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (".S50." in n)) for n in RUNS])
def test_sampling_with_its_own_solver(loaded: LatentDiffusion, name: str) -> None:
    """DPM-Solver++(2M) as its pipeline sets it up: to timestep 0, of first order at the end below 15 steps only."""
    cond, uncond = prompts_of(loaded, name)
    denoise = guided(loaded, cond, uncond, META["sample"]["guidance_scale"])
    steps = len(SAMPLE[f"{name}.timesteps"])
    times = np.linspace(0, 999, steps + 1).round().astype(int)
    assert times[:0:-1].tolist() == SAMPLE[f"{name}.timesteps"].tolist()
    alphas, trajectory = loaded.host_alphas_cumprod[times], []
    x = dpmpp_2m(
        denoise, SAMPLE["x_T"], times[1:], alphas[1:], alphas[:-1], [[steps < 15], *[[False]] * steps],
        callback=lambda step, t, x, x_0: trajectory.append(x),
    )  # fmt: skip
    check_run(name, x, trajectory)
    assert denoise.differs(20, 999) == [False], "vectors that move with the timestep are one prompt"


# Its files


def released(name: str) -> tuple[Path, dict[str, Any]]:
    return FOLDER / name, META["import"][name]


@torch.no_grad()
@pytest.mark.parametrize("name", META["import"])
def test_its_files_are_read(model: LatentDiffusion, name: str) -> None:
    path, entry = released(name)
    concept = load_concept(path)
    assert concept.method == "neti" and concept.metadata["placeholder"] == META["placeholder"]
    mapper = load_mapper(concept.tensors, concept.metadata)
    t, layer = MAPPER["grid"].long().T
    close(mapper(t, layer)[:, ::12], IMPORT[f"{name}.mapper_every12"])
    close(mapper(t, layer, torch.full_like(t, 16))[:, ::12], IMPORT[f"{name}.mapper_trunc16_every12"])
    model.embedding_manager.load({META["placeholder"]: concept})
    cond, p = (
        conditioning(model, TEXT["A.photo.input_ids"][:1]),
        META["text"]["prompts"]["A.photo"]["placeholder_position"],
    )
    for i, (t, layer) in enumerate(entry["tl"]):
        k, v = (x[0] for x in cond.at(t).layer(layer))
        close(k[:, ::96], IMPORT[f"{name}.k_every96"][i])
        if (row := f"{name}.v_row_p_every4") in IMPORT:
            close(v[p, ::4], IMPORT[row][i])
    model.embedding_manager.unload()


def hashed(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.numpy().astype("<f4").tobytes()).hexdigest()


def test_nothing_of_a_file_is_lost(tmp_path: Path) -> None:
    for name in META["import"]:
        path, entry = released(name)
        concept = load_concept([path, path.with_name(entry["learned_embeds"])])
        save_concept(concept, tmp_path / "own.safetensors")
        own = load_concept(tmp_path / "own.safetensors")
        assert own.identity == concept.identity and own.metadata["neti.settings"] == concept.metadata["neti.settings"]
        saved = {n: x["sha256"] for n, x in entry["state_dict"].items() if not n.startswith("net.0.")}
        assert {n: hashed(x) for n, x in own.tensors.items() if n != "w"} == saved
        word = load_concept(path.with_name(entry["learned_embeds"])).vectors[0]
        assert hashed(word) == entry["vector"]["sha256"]


class Encoding(nn.Module):
    """Stands for NeTI's positional encoding in files that are made here."""


Encoding.__module__, Encoding.__qualname__ = "models.positional_encoding", "NeTIPositionalEncoding"
CHANGES = {  # of what a mapper's file holds -> what is said of it
    "no norm": (lambda f: f["cfg"]["model"].update(target_norm=None), "has no target_norm"),
    "no configuration": (lambda f: f["cfg"].pop("model"), "KeyError 'model'"),
    "no w": (lambda f: f["encoder"].__dict__.pop("w"), "use another copy of the file"),
    "another w": (lambda f: setattr(f["encoder"], "w", torch.zeros(3, 2)), "size mismatch for w"),
    "a layer less": (lambda f: f["state_dict"].pop("net.4.weight"), "net.4.weight"),
    "a wrong norm": (lambda f: f["cfg"]["model"].update(target_norm=[1]), "TypeError"),
    "anchors": (lambda f: f["cfg"]["model"].update(num_pe_time_anchors=7), "must divide 1000"),
}


@pytest.fixture
def rewritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Any], object]], Path]:
    """Write mapper-steps-2.pt anew, after a change of what it holds."""
    module = ModuleType("models.positional_encoding")
    module.NeTIPositionalEncoding = Encoding
    monkeypatch.setitem(sys.modules, "models", ModuleType("models"))
    monkeypatch.setitem(sys.modules, "models.positional_encoding", module)

    def write(change: Callable[[Any], object]) -> Path:
        concept = load_concept(FOLDER / "mapper-steps-2.pt")
        encoder = Encoding()
        encoder.w = concept.tensors["w"].clone()
        state = {name: x for name, x in concept.tensors.items() if name != "w"}
        cfg = copy.deepcopy(META["import"]["mapper-steps-2.pt"]["cfg"])
        content = {"state_dict": state, "cfg": cfg, "encoder": encoder}
        change(content)
        torch.save(content, tmp_path / "mapper-steps-9.pt")
        return tmp_path / "mapper-steps-9.pt"

    return write


def test_a_file_saved_after_a_warm_start(rewritten: Callable[..., Path]) -> None:
    """Its own code cannot read it: the frequencies are a parameter, and in the state dict once more."""

    def warm(content: Any) -> None:
        w = content["encoder"].__dict__.pop("w")
        content["encoder"].w = nn.Parameter(w)
        content["state_dict"]["encoder.w"] = w

    assert load_concept(rewritten(warm)).identity == load_concept(FOLDER / "mapper-steps-2.pt").identity


@pytest.mark.parametrize("change", CHANGES)
def test_files_that_cannot_be_used(change: str, rewritten: Callable[..., Path]) -> None:
    path = rewritten(CHANGES[change][0])
    with pytest.raises(EmbeddingError, match=r"mapper-steps-9\.pt") as refusal:
        load_concept(path)
    assert CHANGES[change][1] in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_cut_off_files(share: float, tmp_path: Path) -> None:
    whole = (FOLDER / "mapper-steps-2.pt").read_bytes()
    (tmp_path / "mapper-steps-2.pt").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(EmbeddingError, match=r"mapper-steps-2\.pt"):
        load_concept(tmp_path / "mapper-steps-2.pt")


def test_hostile_files(rewritten: Callable[..., Path], tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "harm"),)

    with pytest.raises(EmbeddingError, match="could run code"):
        load_concept(rewritten(lambda content: content.update(encoder=Harm())))
    assert not (tmp_path / "harm").exists()


def test_the_word_of_another_mapper(tmp_path: Path) -> None:
    torch.save({"<other>": torch.zeros(768)}, tmp_path / "learned_embeds-steps-2.bin")
    with pytest.raises(EmbeddingError, match="names <other>, but the mapper was learned as <colorful-teapot>"):
        load_concept([tmp_path / "learned_embeds-steps-2.bin", FOLDER / "mapper-steps-2.pt"])
    with pytest.raises(EmbeddingError, match="folder of a NeTI run"):
        load_concept(FOLDER)


def test_a_concept_without_its_settings(tmp_path: Path) -> None:
    tensors, metadata = mapper_of("A").to_concept()
    settings = json.loads(metadata["neti.settings"])
    del settings["target_norm"]
    save_concept(Concept(tensors, {"neti.settings": json.dumps(settings)}, "neti"), tmp_path / "own.safetensors")
    with pytest.raises(EmbeddingError, match="settings lack target_norm"):
        load_concept(tmp_path / "own.safetensors")


def test_its_own_files_are_written(tmp_path: Path) -> None:
    """What its loader looks at, read back as the same concept; nothing else is named in the pickle."""
    for name in META["import"]:
        concept = load_concept(FOLDER / name)
        save_concept(concept, tmp_path / "own.safetensors")
        flags = [f"<new>={tmp_path / 'own.safetensors'}", "--name", "new", "--to", "neti", "--outdir", str(tmp_path)]
        mapper, word = export([*flags, "--force"])
        again = load_concept([mapper, word])
        assert again.identity == concept.identity and again.metadata["placeholder"] == "<new>"
        assert again.metadata["neti.settings"] == concept.metadata["neti.settings"]
        entry = META["import"][name]
        named = set(torch.serialization.get_unsafe_globals_in_checkpoint(mapper))
        assert named == {entry["encoder_class"]}
        with torch.serialization.safe_globals([(StandIn, entry["encoder_class"])]):
            content = torch.load(mapper, weights_only=True)
        assert list(content["state_dict"]) == list(entry["state_dict"])
        assert content["encoder"].state.keys() >= {*entry["encoder_attributes"], *entry["encoder_tensors"]}
        for section, fields in content["cfg"].items():
            assert fields.keys() <= entry["cfg"][section].keys()
    assert "models" not in sys.modules


@pytest.mark.parametrize(
    ("concept", "message"),
    [
        (Concept(torch.ones(10, 768)), "it holds no mapper of NeTI"),
        (Concept(*NeTIMapper(NeTISettings(num_layers=7, width=128)).to_concept(), "neti"), "for Stable Diffusion v1"),
        (Concept(*NeTIMapper(NeTISettings(target_norm=1.0, normalize="token")).to_concept(), "neti"), "joint"),
    ],
)
def test_what_its_files_cannot_hold(
    concept: Concept, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_concept(concept, tmp_path / "own.safetensors")
    with pytest.raises(SystemExit):
        export([str(tmp_path / "own.safetensors"), "--name", "a", "--to", "neti", "--outdir", str(tmp_path / "out")])
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
