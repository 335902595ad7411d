"""Null-text inversion (Mokady et al. 2022) and its conditional twin: a context of its own for each denoising step.

Shapes: N denoising steps, L tokens, D width of the text transformer.
"""

from __future__ import annotations

from torch import Tensor, nn

from ldm.conditioning.context import Context
from ldm.methods.base import Branch, Metadata, StepChange, Tensors
from ldm.methods.inversion import Learner, check_inversion, read_timesteps

CONTEXTS = "contexts"  # the tensor of a concept, (N, L, D)


class StepContexts(StepChange):
    """A learned context (N, L, D) in place of the prompt's."""

    def __call__(self, context: Context, t: int) -> Context:
        return Context.of(self.of_step(t).to(context.k)[None])


class NullContexts(StepContexts):
    branch = "unconditional"


class TextContexts(StepContexts):
    branch = "source"


class NullText(Learner):
    """The unconditional contexts of an image.

    Args:
        start: the context of "" (1, L, D).
    """

    method, learned = "null-text", CONTEXTS
    branch: Branch = "unconditional"
    kind: type[StepContexts] = NullContexts

    def __init__(self, steps: int, start: Tensor) -> None:
        super().__init__()
        self.contexts = nn.ParameterList(nn.Parameter(start[0].clone(), requires_grad=False) for _ in range(steps))

    def begin(self, step: int, first_time: bool) -> list[nn.Parameter]:
        context = self.contexts[step]
        if step and first_time:
            context.data.copy_(self.contexts[step - 1].data)
        return [context.requires_grad_(True)]

    def values(self, step: int) -> Tensor:
        return self.contexts[step]

    def change(self, values: Tensor, timesteps: tuple[int, ...]) -> StepContexts:
        return self.kind(values, timesteps)


class TextInversion(NullText):
    """The conditional contexts of an image, from the prompt's own on."""

    method, kind = "text-inversion", TextContexts
    branch = "source"


def check_contexts(tensors: Tensors) -> None:
    """Raise `ValueError` unless a concept holds `contexts` (N, L, D) and latents."""
    check_inversion(tensors, CONTEXTS, "inversion")


def load_null(tensors: Tensors, metadata: Metadata) -> StepContexts:
    """Return the unconditional contexts of a concept; raises `ValueError` if its timesteps do not fit."""
    return NullContexts(tensors[CONTEXTS], read_timesteps(tensors, metadata, CONTEXTS))


def load_text(tensors: Tensors, metadata: Metadata) -> StepContexts:
    """Return the conditional contexts of a concept; raises `ValueError` if its timesteps do not fit."""
    return TextContexts(tensors[CONTEXTS], read_timesteps(tensors, metadata, CONTEXTS))
