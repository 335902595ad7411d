"""Base classes of the methods: a module that is learned, and the concept that it is saved as."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ldm.conditioning.context import Context
from ldm.conditioning.learned import LearnedPrefix, LearnedTokens

Tensors = Mapping[str, Tensor]
Metadata = Mapping[str, str]
Branch = Literal["values", "unconditional", "source"]


@dataclass(frozen=True)
class Start:
    """Starting point of learning: the initial word, and sizes of the frozen model.

    Args:
        word: mean token embedding of the initial word or words (1, D), float32.
        num_word_tokens: how many tokens these were.
        num_stages: S.
        num_layers: cross-attention layers of the U-Net.
        text_layers, heads: of the text transformer.
    """

    word: Tensor
    num_word_tokens: int
    num_stages: int
    num_layers: int
    text_layers: int = 12
    heads: int = 12


class LearnedModule(nn.Module):
    """Base of what is learned; a subclass also is a `LearnedTokens` or a `LearnedPrefix`."""

    method: str  # the name in a concept's metadata

    def to_concept(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the tensors and the metadata that a concept keeps; without dropout or any other randomness."""
        raise NotImplementedError

    def start_from(self, tensors: Tensors, metadata: Metadata) -> None:
        """Continue from a concept's tensors.

        Raises:
            ValueError: they do not fit this module.
        """
        raise ValueError(f"the method '{self.method}' cannot start from another concept; omit embedding_manager_ckpt.")


class StepChange:
    """A change of the context for each denoising step; a `ValueModulation`.

    Args:
        values: learned, one entry for each of N steps.
        timesteps: of the steps.
    """

    branch: Branch  # which rows read it: source and edit, both unconditional ones, or the source alone

    def __init__(self, values: Tensor, timesteps: tuple[int, ...]) -> None:
        self.values, self.timesteps = values, timesteps

    def of_step(self, t: int) -> Tensor:
        """Return what was learned for timestep t.

        Raises:
            ValueError: nothing was.
        """
        if t not in self.timesteps:
            raise ValueError(f"nothing was learned for timestep {t}; sample with the concept's own {self.timesteps}.")
        return self.values[self.timesteps.index(t)]

    def __call__(self, context: Context, t: int) -> Context:
        raise NotImplementedError

    def to(self, device: torch.device | str) -> StepChange:
        self.values = self.values.to(device)
        return self


class Method(NamedTuple):
    """Functions of a method: check, load and learn.

    Args:
        check: raises `ValueError` unless the tensors are what the method learns; the sentence is read on after the
            file's name.
        load: tensors, metadata -> what prompts read, or a change of the context where it belongs to one image.
        learn: `Start` and the parameters of a configuration -> the module to be trained.
    """

    check: Callable[[Tensors], None]
    load: Callable[[Tensors, Metadata], LearnedTokens | LearnedPrefix | StepChange]
    learn: Callable[..., LearnedModule]
