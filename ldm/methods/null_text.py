"""Null-text inversion (Mokady et al. 2022) and its conditional twin: a context of its own for each denoising step.

Shapes: N denoising steps, L tokens, D width of the text transformer.
"""

from __future__ import annotations

from torch import Tensor, nn

from ldm.conditioning.context import Context
from ldm.methods.base import Branch, Learner, StepChange


class NullContexts(StepChange):
    """Learned contexts (N, L, D) in place of the unconditional one."""

    method, tensor = "null-text", "contexts"
    branch: Branch = "unconditional"

    def __call__(self, context: Context, t: int) -> Context:
        return Context.of(self.of_step(t).to(context.k)[None])


class TextContexts(NullContexts):
    """Learned contexts (N, L, D) in place of the prompt's."""

    method = "text-inversion"
    branch = "source"


class NullText(Learner):
    """The unconditional contexts of an image.

    Args:
        steps: N.
        start: the context of "" (1, L, D).
    """

    kind: type[NullContexts] = NullContexts

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


class TextInversion(NullText):
    """The conditional contexts of an image, from the prompt's own on."""

    kind = TextContexts
