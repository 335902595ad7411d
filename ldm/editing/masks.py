"""The place of a word in an image: soft masks from attention, as NS-LPIPS uses them.

Shapes: H W latents, f how much smaller maps are, L tokens, N steps.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.conditioning.context import Conditioning
from ldm.editing.alignment import PromptTokens
from ldm.editing.control import MapStore, layers_of
from ldm.editing.inversion import ddim_invert, inversion_timesteps
from ldm.editing.request import check_words_in
from ldm.models.diffusion.latent_diffusion import DiffusionModel
from ldm.models.diffusion.sampling import guided

MASK_SIDE = 256  # pixels


def average_maps(
    model: DiffusionModel, z_0: Tensor, cond: Conditioning, steps: int = 50, compat: bool = False
) -> Tensor:
    """Return the mean attention to each token while latents z_0 (1, C, H, W) are inverted: (H/f, W/f, L).

    Args:
        compat: as the reference's code, which loses the lower half of the heads.
    """
    store = MapStore(layers_of(model, z_0))
    timesteps = inversion_timesteps(steps, model.num_timesteps)
    ddim_invert(guided(model, cond, hook=store), z_0, timesteps, model.host_alphas_cumprod)
    maps = torch.cat([m[:, m.shape[1] // 2 :] if compat else m for m in store.at()], dim=1) / steps
    mean = maps.mean(dim=(0, 1))  # (Q, L)
    factor = round((z_0.shape[-2] * z_0.shape[-1] / len(mean)) ** 0.5)
    return mean.unflatten(0, (z_0.shape[-2] // factor, z_0.shape[-1] // factor))


def mask_of(average: Tensor, tokens: PromptTokens, word: str, compat: bool = False) -> Image.Image:
    """Return where a word is, 256 x 256 pixels, grey, 255 where attention is largest.

    Args:
        average: from `average_maps`.
        compat: only the token at the word's number, as if all words were one token.

    Raises:
        ValueError: the word is not in the prompt, or nothing attends to it.
    """
    check_words_in([word], [" ".join(tokens.words)], "The mask")
    places = [tokens.words.index(word) + 1] if compat else tokens.places_of(word)
    strength = average[..., places].sum(dim=-1).cpu()
    if not strength.max() > 0:
        raise ValueError(f"The mask of '{word}' is empty: nothing attends to it; name another word.")
    grey = (255 * strength / strength.max()).numpy().astype(np.uint8)
    return Image.fromarray(grey).resize((MASK_SIDE, MASK_SIDE), Image.Resampling.BICUBIC)
