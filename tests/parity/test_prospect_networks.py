"""ProSpect's networks and prompts against numbers recorded from the running reference (tests/golden)."""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTokenizer

from ldm.conditioning.context import Context
from ldm.conditioning.prompts import PromptReader
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.diffusionmodules.util import timestep_embedding

VAE, UNET, VECTORS, TEXT = (tiny.golden(name) for name in ("vae", "unet", "embedding_manager", "text"))
PROMPTS = tiny.META["prompts"]
COMPLETE = [name for name in PROMPTS if name != "short_list"]
HOOK = "hook.t250."  # the U-Net's parts


def close(ours: Tensor, recorded: Tensor) -> None:
    """Equal up to 1e-4, absolute."""
    torch.testing.assert_close(ours, recorded, rtol=0, atol=1e-4)


@contextlib.contextmanager
def outputs_of(network: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Filled with what the parts called `names` give when the network is called."""
    outputs: dict[str, Tensor] = {}
    with contextlib.ExitStack() as handles:
        for name in names:
            handles.enter_context(
                network.get_submodule(name).register_forward_hook(
                    lambda module, args, output, name=name: outputs.__setitem__(name, output)
                )
            )
        yield outputs


# The model of the records


def test_the_whole_model_is_built_from_its_checkpoint(tiny_model: LatentDiffusion) -> None:
    """Nothing is left without memory or in training mode, and the base model is known by its file."""
    assert not any(x.is_meta for x in [*tiny_model.parameters(), *tiny_model.buffers()])
    assert not any(module.training for module in tiny_model.modules())
    assert tiny_model.base_model["base_model"] == "tiny-a.safetensors"
    for name, values in tiny.golden("schedule").items():
        if "." not in name:
            torch.testing.assert_close(tiny_model.get_buffer(name), values, rtol=1e-6, atol=0)


def test_the_weights_of_the_records(tiny_model: LatentDiffusion) -> None:
    parts = {
        "unet": (tiny_model.model.diffusion_model, tiny.UNET),
        "vae": (tiny_model.first_stage_model, tiny.FIRST_STAGE),
        "clip": (tiny_model.cond_stage_model.transformer.text_model, tiny.TEXT),
    }
    for name, (module, prefix) in parts.items():
        assert tiny.checksum(module, prefix)["sha256"] == tiny.META["checksums"][name]["sha256"], name


def test_the_model_of_the_records_is_built_from_its_configuration(tiny_model: LatentDiffusion) -> None:
    manager = tiny_model.embedding_manager
    assert [name for name, _ in manager.attention.named_parameters()] == tiny.META["emb_param_names"]
    found = tiny.checksum(manager.attention, tiny.ATTENTION)
    assert {k: found[k] for k in ("sha256", "numel")} == {
        k: tiny.META["checksums"]["emb"][k] for k in ("sha256", "numel")
    }
    # "teddy" is one word here: the reference takes its first letter
    assert torch.equal(manager.initial_embeddings, tiny.token_rows([tiny.META["initializer_token_id"]]))


# Prompts and their contexts


@pytest.mark.parametrize("name", PROMPTS)
def test_recorded_token_ids(tokenizer: CLIPTokenizer, name: str) -> None:
    ids = tokenizer(PROMPTS[name]["prompt"], padding="max_length", max_length=77)["input_ids"]
    assert ids == TEXT[f"{name}.input_ids"][0].tolist()


@pytest.mark.parametrize("name", COMPLETE)
@pytest.mark.parametrize(("legacy", "record"), [(False, "plain_slots"), (True, "slots")])
def test_recorded_slots(reader: PromptReader, name: str, legacy: bool, record: str) -> None:
    prompt = PROMPTS[name]
    slots = reader.read([prompt["prompt"]], prompt["prospect_words"], legacy)
    assert slots.shape == (10, 1, 77) and slots.dtype == torch.int64
    assert torch.equal(slots[:, 0], TEXT[f"{name}.{record}"].long())


def contexts(model: LatentDiffusion, name: str, legacy: bool) -> Tensor:
    """(10, 77, 768), read stage by stage as a sampler would."""
    prompt = PROMPTS[name]
    with torch.no_grad():
        cond = model.get_learned_conditioning([prompt["prompt"]], prompt["prospect_words"], legacy)
        return torch.cat([cond.at(100 * stage + 50).k for stage in range(10)])


@pytest.mark.parametrize("name", COMPLETE)
def test_contexts_by_the_references_rule(tiny_model: LatentDiffusion, name: str) -> None:
    found = contexts(tiny_model, name, legacy=True)
    close(found[:, :, ::48], TEXT[f"{name}.cond_every48"])
    close(found.norm(dim=-1), TEXT[f"{name}.cond_l2_per_token"])


@pytest.mark.parametrize("name", COMPLETE)
def test_contexts_of_the_plain_reading(tiny_model: LatentDiffusion, name: str) -> None:
    found = contexts(tiny_model, name, legacy=False)[:, :, ::48]
    agrees = PROMPTS[name]["upstream_equals_plain_reading"]
    record = f"{name}.cond_every48" if all(agrees) else f"{name}.plain_cond_every48"
    close(found, TEXT[record])
    for stage, first in enumerate(PROMPTS[name]["equal_stage_classes"]):
        if agrees[stage] and agrees[first]:
            assert torch.equal(found[stage], found[first]), "equal prompts give equal contexts, bit for bit"


def test_complete_contexts(tiny_model: LatentDiffusion) -> None:
    found = contexts(tiny_model, "photo_star", legacy=False)
    close(found[[0, 4, 9]], TEXT["photo_star.cond_full_stages_0_4_9"])


# The learned vectors


@torch.no_grad()
def test_the_generator_block(tiny_model: LatentDiffusion) -> None:
    manager = tiny_model.embedding_manager
    block = manager.attention
    e = manager.initial_embeddings.unsqueeze(0)
    first = block.attn1(block.norm1(e))
    close(first, VECTORS["attn1_out"])
    x = first + e
    close(x, VECTORS["after_attn1"])
    second = block.attn2(block.norm2(x), e)
    close(second, VECTORS["attn2_out"])
    close(second + x, VECTORS["after_attn2"])
    close(manager.embeddings(), VECTORS["placeholder_embeddings"])


def test_saving_while_training_writes_the_vectors_without_dropout(trainable: LatentDiffusion, tmp_path: Path) -> None:
    manager = trainable.train().embedding_manager
    manager.save(tmp_path / "e.safetensors", step="600")
    close(load_file(tmp_path / "e.safetensors")["*"], VECTORS["placeholder_embeddings"])
    assert manager.training and manager.attention.training


# The U-Net


def run(unet: UNetModel, t: int, name: str = "unet") -> Tensor:
    return unet(UNET["x"], torch.tensor([t]), Context.of(tiny.context(name)))


@pytest.mark.parametrize("t", [0, 1, 250, 981, 999])
@torch.no_grad()
def test_output(unet: UNetModel, t: int) -> None:
    close(run(unet, t), UNET[f"out.t{t}"])


@torch.no_grad()
def test_each_sample_has_its_own_timestep_and_context(unet: UNetModel) -> None:
    context = Context.of(torch.cat([tiny.context("unet"), tiny.context("unet2")]))
    out = unet(UNET["x_batch2"], torch.tensor([700, 3]), context)
    close(out, UNET["out_batch2.t700_3"])


@torch.no_grad()
def test_every_recorded_part(unet: UNetModel) -> None:
    names = [key.removeprefix(HOOK) for key in UNET if key.startswith(HOOK)]
    assert len(names) == 24
    with outputs_of(unet, names) as outputs:
        run(unet, 250)
    for name in names:
        close(outputs[name], UNET[HOOK + name])


def test_timestep_embedding() -> None:
    embedding = timestep_embedding(torch.tensor([0, 1, 250, 999]), 32)
    close(embedding, UNET["timestep_embedding.t_0_1_250_999"])
    assert timestep_embedding(torch.tensor([5]), 33).shape == (1, 33)


@torch.no_grad()
def test_half_precision_weights_give_float32_and_are_close(unet: UNetModel) -> None:
    half = copy.deepcopy(unet).to(torch.bfloat16)
    out, expected = run(half, 250), UNET["out.t250"]
    assert out.dtype == torch.float32
    assert (out - expected).norm() / expected.norm() < 0.03


# The first stage


@torch.no_grad()
def test_encoder_inside_and_out(tiny_model: LatentDiffusion) -> None:
    first_stage = tiny_model.first_stage_model
    names = [key.removeprefix("hook.") for key in VAE if key.startswith("hook.")]
    with outputs_of(first_stage, names) as outputs:
        encoded = first_stage.encoder(VAE["image"])
    close(encoded, VAE["encoder_out"])
    assert len(names) == 3
    for name in names:
        recorded = VAE[f"hook.{name}"]
        close(outputs[name][:, : recorded.shape[1]], recorded)


def test_posterior(tiny_model: LatentDiffusion) -> None:
    posterior = tiny_model.encode_first_stage(VAE["image"])
    close(posterior.parameters, VAE["moments"])
    for name in ("mean", "logvar", "std"):
        close(getattr(posterior, name), VAE[name])
    close(posterior.sample(VAE["posterior_noise"]), VAE["posterior_sample"])
    assert torch.equal(posterior.mode(), posterior.mean)


def test_scaled_latents_and_their_picture(tiny_model: LatentDiffusion) -> None:
    posterior = tiny_model.encode_first_stage(VAE["image"])
    mode = tiny_model.get_first_stage_encoding(posterior.mode())
    close(mode, VAE["mode_times_scale_factor"])
    close(tiny_model.decode_first_stage(mode), VAE["decode_first_stage_of_that"])
    sample = tiny_model.get_first_stage_encoding(posterior, VAE["posterior_noise"])
    close(sample, 0.18215 * VAE["posterior_sample"])


@torch.no_grad()
def test_decoder(tiny_model: LatentDiffusion) -> None:
    decoded = tiny_model.first_stage_model.decode(VAE["z_random"])
    close(decoded, VAE["first_stage_decode_of_z_random"])
    assert tiny_model.first_stage_model.downsampling == 8
