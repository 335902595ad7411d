"""NeTI against numbers recorded from the running reference (tests/golden/neti): mapper, contexts, U-Net, one step."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import Tensor

from ldm.conditioning.context import Context
from ldm.conditioning.learned import TokenVectors
from ldm.config import instantiate_from_config, load_config
from ldm.methods.neti import HIDDEN, NeTIMapper, NeTISettings
from ldm.models.diffusion.ddpm import LatentDiffusion

FOLDER = Path(tiny.GOLDEN) / "neti"
META: dict[str, Any] = json.loads((FOLDER / "meta.json").read_text(encoding="utf-8"))
MAPPER, TEXT, UNET = (load_file(FOLDER / f"{name}.safetensors") for name in ("mapper", "text", "unet"))
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
    model = instantiate_from_config(config.model)
    tiny.fill(model.model.diffusion_model, tiny.UNET, SEED)
    tiny.fill(model.cond_stage_model.transformer.text_model, tiny.TEXT, SEED)
    return model.eval()


def slots_of(input_ids: Tensor) -> Tensor:
    """Token slots (N, L): the recorded ids, with the learned row in the placeholder's place."""
    return torch.where(input_ids == META["placeholder_id"], -1, input_ids).reshape(-1, 77)


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
    mapper = NeTIMapper(NeTISettings(num_layers=4000))
    torch.manual_seed(0)
    kept = mapper.draw_kept(3)
    whole = (kept == HIDDEN).all(dim=1)
    assert abs(whole.float().mean() - 0.5) < 0.04 and kept.min() == 0 and kept[~whole].float().mean() < 70
    assert (kept[~whole][:, 0] != kept[~whole][:, 1]).float().mean() > 0.9
    assert mapper.vectors(torch.tensor([5]), truncation=-1).e.shape == (4000, 1, 1, 768)


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
