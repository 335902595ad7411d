"""Base classes of the methods: what is learned for a placeholder, or of one image, and the concept it is saved as.

Shapes: N denoising steps, in their order; L tokens, D width of the text transformer; C H W of latents.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
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

START, FIRST = "x_T", "z_0"  # tensors of an inverted image: latents (1, C, H, W) of the noise, and of the image
TIMESTEPS = "inversion.timesteps"  # in its metadata, in the order of denoising


class Method(NamedTuple):
    """Functions of a method: check, load and learn.

    Args:
        check: raises `ValueError` unless the tensors are what the method learns; the sentence is read on after the
            file's name.
        load: checked tensors, metadata -> what prompts read, or a change of the context where it belongs to one image.
        learn: `Start` and the parameters of a configuration -> the module to be trained.
    """

    check: Callable[[Tensors], None]
    load: Callable[[Tensors, Metadata], LearnedTokens | LearnedPrefix | StepChange]
    learn: Callable[..., LearnedModule]


# --- learned for a placeholder ---------------------------------------------------------------------------------


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


class LearnedModule(nn.Module, ABC):
    """Base of what is learned; a subclass also is a `LearnedTokens` or a `LearnedPrefix`."""

    method: str  # the name in a concept's metadata

    @abstractmethod
    def to_concept(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the tensors and the metadata that a concept keeps; without dropout or any other randomness."""

    def start_from(self, tensors: Tensors, metadata: Metadata) -> None:
        """Continue from a concept's tensors, which this method's `check` has seen.

        Raises:
            ValueError: they do not fit this module.
        """
        raise ValueError(f"the method '{self.method}' cannot start from another concept; omit embedding_manager_ckpt.")


# --- learned of one image --------------------------------------------------------------------------------------


class StepChange(ABC):
    """A change of the context for each denoising step, learned of one image.

    Args:
        values: one entry for each of N steps.
        timesteps: of the steps.
    """

    method: str  # the name in a concept's metadata
    tensor: str  # of a concept: `values`, (N, L, D)
    branch: Branch  # which rows read it: source and edit, both unconditional ones, or the source alone

    def __init__(self, values: Tensor, timesteps: tuple[int, ...]) -> None:
        self.values, self.timesteps = values, timesteps

    def of_step(self, t: int) -> Tensor:
        """Return what was learned for timestep t."""
        return self.values[self.timesteps.index(t)]

    @abstractmethod
    def __call__(self, context: Context, t: int) -> Context:
        """Return the context that is read at timestep t, one of `timesteps`."""

    def to(self, device: torch.device | str) -> StepChange:
        return type(self)(self.values.to(device), self.timesteps)

    @classmethod
    def check(cls, tensors: Tensors) -> None:
        """Raise `ValueError` unless tensors are what was learned of an image, beside both latents."""
        dims = {name: x.ndim for name, x in tensors.items()}
        if dims != {cls.tensor: 3, START: 4, FIRST: 4}:
            raise ValueError(f"its tensors ({', '.join(tensors) or 'none'}) are no inversion ({cls.method}).")

    @classmethod
    def load(cls, tensors: Tensors, metadata: Metadata) -> StepChange:
        """Return the change that a concept is.

        Raises:
            ValueError: its timesteps are missing or do not fit.
        """
        try:
            timesteps = tuple(int(t) for t in metadata[TIMESTEPS].split(","))
        except (KeyError, ValueError) as error:
            raise ValueError(f"it does not say its timesteps ({TIMESTEPS}).") from error
        steps = len(tensors[cls.tensor])
        if timesteps[-1] < 0 or list(timesteps) != sorted(set(timesteps), reverse=True) or len(timesteps) != steps:
            raise ValueError(f"its timesteps ({TIMESTEPS}) do not go down to the image in {steps} steps.")
        return cls(tensors[cls.tensor], timesteps)


class Learner(nn.Module, ABC):
    """Parameters that are optimised step by step so that denoising follows an image's own path back."""

    kind: type[StepChange]  # what they are read as
    reads_maps = False  # whether the loss compares attention maps, too

    @abstractmethod
    def begin(self, step: int, first_time: bool) -> list[nn.Parameter]:
        """Return the parameters of a step; the first time they start from the step before."""

    @abstractmethod
    def values(self, step: int) -> Tensor:
        """Return what a step has learned, as it is kept in a concept, with gradients."""
