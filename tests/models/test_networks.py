"""The networks' names and shapes are Stable Diffusion v1's, and their outputs are those of diffusers' own networks."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import AutoencoderKL as TheirAutoencoder
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from ldm.checkpoint import load_weights, read_state_dict
from ldm.conditioning.context import Context
from ldm.config import load_config
from ldm.models.autoencoder import AutoencoderKL
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.util import instantiate_from_config

CONFIGS = Path(__file__).parents[2] / "configs" / "stable-diffusion"
PUBLIC: dict[str, dict[str, Any]] = json.loads((tiny.GOLDEN / "sd_v1_state_dict.json").read_text())["state_dict"]
POSITION_IDS = "cond_stage_model.transformer.text_model.embeddings.position_ids"


def test_the_full_size_model_has_the_public_files_keys_and_shapes() -> None:
    with torch.device("meta"):
        model = instantiate_from_config(load_config(CONFIGS / "v1-inference.yaml").model)
    found = {k: v for k, v in model.state_dict().items() if not k.startswith("embedding_manager.")}
    # position_ids are no weights: the numbers 0..76, which newer files leave out
    expected = {key: entry for key, entry in PUBLIC.items() if key != POSITION_IDS}
    assert len(expected) == 1142 and set(found) == set(expected)
    numbers: Counter[str] = Counter()
    for key, tensor in found.items():
        assert list(tensor.shape) == expected[key]["shape"], key
        assert str(tensor.dtype) == f"torch.{expected[key]['dtype']}", key
        numbers[key.split(".")[0]] += tensor.numel()
    public = {"model": 859_520_964, "first_stage_model": 83_653_863, "cond_stage_model": 123_060_480}
    assert {name: numbers[name] for name in public} == public


# diffusers as an oracle

HEADS = 4


def unet_pair(attends: tuple[bool, ...], blocks: int) -> tuple[UNet2DConditionModel, UNetModel]:
    """diffusers' U-Net and ours with attention on the given levels."""
    widths = tuple(32 * (i + 1) for i in range(len(attends)))
    theirs = UNet2DConditionModel(
        in_channels=4,
        out_channels=4,
        block_out_channels=widths,
        layers_per_block=blocks,
        cross_attention_dim=48,
        attention_head_dim=HEADS,  # its name notwithstanding, the number of heads
        down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
    )
    ours = UNetModel(
        in_channels=4,
        out_channels=4,
        model_channels=32,
        num_res_blocks=blocks,
        attention_resolutions=[2**i for i, a in enumerate(attends) if a],
        channel_mult=list(range(1, len(attends) + 1)),
        context_dim=48,
        num_heads=HEADS,
    )
    return theirs, ours


def autoencoder_pair(levels: int, blocks: int) -> tuple[TheirAutoencoder, AutoencoderKL]:
    widths = tuple(32 * (i + 1) for i in range(levels))
    theirs = TheirAutoencoder(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=widths,
        layers_per_block=blocks,
        latent_channels=4,
    )
    sizes = {"z_channels": 4, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 32, "double_z": True}
    sizes |= {"ch_mult": list(range(1, levels + 1)), "num_res_blocks": blocks, "attn_resolutions": []}
    return theirs, AutoencoderKL(sizes, embed_dim=4)


TEXT = {
    "vocab_size": 60,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "max_position_embeddings": 16,
    "hidden_act": "quick_gelu",
}


@torch.no_grad()
def randomize(module: nn.Module) -> None:
    """Also what starts as zero or one, so that no layer can be left out unnoticed."""
    for parameter in module.parameters():
        if parameter.ndim > 1:
            parameter.copy_(torch.randn_like(parameter) * parameter[0].numel() ** -0.5)
        else:
            parameter.add_(torch.randn_like(parameter) * 0.1)


def norms(module: nn.Module) -> Counter[str]:
    """The normalisation layers with their eps, which ordinary inputs hardly show."""
    return Counter(str(m) for m in module.modules() if isinstance(m, (nn.GroupNorm, nn.LayerNorm)))


@pytest.mark.parametrize(("attends", "blocks"), [((True, True, False), 2), ((True, False), 1)])
@torch.no_grad()
def test_a_diffusers_folder_computes_the_same(tmp_path: Path, attends: tuple[bool, ...], blocks: int) -> None:
    torch.manual_seed(0)
    their_unet, our_unet = unet_pair(attends, blocks)
    their_vae, our_vae = autoencoder_pair(len(attends), blocks)
    their_text = CLIPTextModel(CLIPTextConfig(**TEXT, bos_token_id=0, eos_token_id=1, pad_token_id=1))
    our_text = FrozenCLIPEmbedder("small", max_length=16, text_config=TEXT)
    for ours, theirs in ((our_unet, their_unet), (our_vae, their_vae), (our_text, their_text)):
        assert norms(ours) == norms(theirs)
    for name, module in {"unet": their_unet, "vae": their_vae, "text_encoder": their_text}.items():
        randomize(module)
        module.eval().save_pretrained(tmp_path / name)
    (tmp_path / "model_index.json").write_text("{}")

    state = read_state_dict(tmp_path)
    parts = {tiny.UNET: our_unet, tiny.FIRST_STAGE: our_vae, "cond_stage_model.": our_text}
    for prefix, module in parts.items():
        own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        load_weights(module, own, tmp_path)
        module.eval()

    def close(found: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)

    x, t, context = torch.randn(2, 4, 8, 12), torch.tensor([3, 700]), torch.randn(2, 16, 48)
    close(our_unet(x, t, Context.of(context)), their_unet(x, t, context).sample)
    images, z = torch.rand(1, 3, 32, 48) * 2 - 1, torch.randn(1, 4, 8, 4)
    close(our_vae.encode(images).parameters, their_vae.encode(images).latent_dist.parameters)
    close(our_vae.decode(z), their_vae.decode(z).sample)
    ids = torch.randint(60, (2, 16))
    close(our_text(ids), their_text(input_ids=ids).last_hidden_state)
