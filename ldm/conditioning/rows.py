"""Batches whose rows are told different things: a source beside its edit, one of them with learned values.

Shapes: B rows, L tokens, D width of the text transformer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from torch import Tensor

from ldm.conditioning.context import Conditioning, Context
from ldm.conditioning.encoding import encode_together
from ldm.conditioning.learned import ValueModulation


class Rows(Conditioning):
    """Several prompts as one batch, in their order."""

    def __init__(self, parts: Sequence[Conditioning]) -> None:
        super().__init__(None, sum(part.batch_size for part in parts), 1, parts[0].num_timesteps)
        self.parts = parts
        self._latest: tuple[list[Context], Context] | None = None

    def at(self, t: int | Tensor) -> Context:
        """Return the context at timestep t; the same object as before while no row's context changes."""
        encode_together(*self.parts)
        contexts = [part.at(t) for part in self.parts]
        if self._latest is None or any(new is not old for new, old in zip(contexts, self._latest[0], strict=True)):
            self._latest = contexts, contexts[0] if len(contexts) == 1 else Context.cat(*contexts)
        return self._latest[1]


class Modulated(Conditioning):
    """A prompt as a learned change leaves it.

    Args:
        change: of its context.
        timesteps: at which it is changed; None: always.
    """

    def __init__(self, cond: Conditioning, change: ValueModulation, timesteps: Collection[int] | None = None) -> None:
        super().__init__(None, cond.batch_size, 1, cond.num_timesteps)
        self.cond, self.change = cond, change
        self.when: Callable[[int], bool] = (lambda t: True) if timesteps is None else set(timesteps).__contains__
        self._latest: tuple[int, Context] | None = None

    def at(self, t: int | Tensor) -> Context:
        t = int(t[0]) if isinstance(t, Tensor) else t  # all rows of an edit are at one timestep
        if not self.when(t):
            return self.cond.at(t)
        if self._latest is None or self._latest[0] != t:
            self._latest = t, self.change(self.cond.at(t), t)
        return self._latest[1]
