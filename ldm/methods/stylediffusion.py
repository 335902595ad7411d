"""StyleDiffusion: values of cross-attention learned for one image and each denoising step (Li et al. 2023).

Shapes: N denoising steps, T tokens of an image's features, L tokens, D width of the text transformer.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ldm.conditioning.context import Context
from ldm.methods.base import Learner, StepChange

FEATURE_TOKENS = 197  # of CLIP's ViT-B/16 at 224 pixels: 14² patches and the class
VALUE_MODES = ("affine", "replace")


class MappingNetwork(nn.Module):
    """M: features (1, T, D) -> (1, rows, D), their tokens as channels; names as in the reference's files.

    The normalisation always is over the one image's own values, so training and evaluation agree.
    """

    def __init__(self, tokens: int = FEATURE_TOKENS, rows: int = 154) -> None:
        super().__init__()
        block = nn.Sequential(
            nn.Conv1d(rows, rows, 1), nn.BatchNorm1d(rows, track_running_stats=False), nn.LeakyReLU(0.01)
        )
        self.conv_start = nn.Conv1d(tokens, rows, 1)
        self.conv_block = nn.Sequential(block)
        self.conv_end = nn.Conv1d(rows, rows, 1)

    def forward(self, features: Tensor) -> Tensor:
        return self.conv_end(self.conv_block(self.conv_start(features)))


class LearnedValues(StepChange):
    """Values c · γ + β in place of c, for each step (N, 2 L, D): γ, then β."""

    method, tensor, branch = "stylediffusion", "gamma_beta", "values"

    def __call__(self, context: Context, t: int) -> Context:
        return modulate(context, self.of_step(t))


def modulate(context: Context, gamma_beta: Tensor) -> Context:
    """Return the context with its values scaled by γ and shifted by β, stacked in (2 L, D)."""
    gamma, beta = gamma_beta.to(context.v).chunk(2)
    return Context(context.k, context.v * gamma + beta)


class StyleDiffusion(Learner):
    """The mapping networks M_0 … M_{N-1} of an image, one for each denoising step.

    Args:
        steps: N.
        features: E(x), of the image (1, T, D).
        length: L.
        value_mode: `affine`, the released code: values c · γ + β; or `replace`, the paper's formula: M(E(x)) alone.
        start: M_0 before training; None draws it.
    """

    kind, reads_maps = LearnedValues, True

    def __init__(
        self,
        steps: int,
        features: Tensor,
        length: int = 77,
        value_mode: str = "affine",
        start: MappingNetwork | None = None,
    ) -> None:
        super().__init__()
        if value_mode not in VALUE_MODES:
            raise ValueError(f"value_mode must be one of {', '.join(VALUE_MODES)}, not '{value_mode}'.")
        self.value_mode = value_mode
        rows = 2 * length if value_mode == "affine" else length
        first = MappingNetwork(features.shape[1], rows) if start is None else start
        self.networks = nn.ModuleList([first, *(copy.deepcopy(first) for _ in range(1, steps))])
        self.requires_grad_(False)
        self.register_buffer("features", features.float(), persistent=False)
        self.features: Tensor

    def begin(self, step: int, first_time: bool) -> list[nn.Parameter]:
        network = self.networks[step]
        if step and first_time:
            network.load_state_dict(self.networks[step - 1].state_dict())
        self.networks.requires_grad_(False)
        return list(network.requires_grad_(True).parameters())

    def values(self, step: int) -> Tensor:
        found = self.networks[step](self.features)[0]
        return found if self.value_mode == "affine" else torch.cat([torch.zeros_like(found), found])


def inner_iterations(step: int, first: int = 100) -> int:
    """Return how often step i is optimised: ceil(100 · exp(-0.1 i))."""
    return math.ceil(first * math.exp(-0.1 * step))


def networks_from(states: Sequence[Mapping[str, Tensor]]) -> list[MappingNetwork]:
    """Return the networks whose state dicts a file of the reference holds; statistics in it are never read.

    Raises:
        ValueError: other tensors than those of a mapping network.
    """
    networks = []
    for state in states:
        kept = {k: v for k, v in state.items() if "running" not in k and not k.endswith("num_batches_tracked")}
        try:
            rows, tokens = kept["conv_start.weight"].shape[:2]
            network = MappingNetwork(tokens, rows)
            network.load_state_dict(kept)
        except (KeyError, ValueError, RuntimeError) as error:
            raise ValueError("it holds no mapping networks of StyleDiffusion; use its .pth file.") from error
        networks.append(network.requires_grad_(False))
    return networks
