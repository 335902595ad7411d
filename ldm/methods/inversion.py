"""Base of the concepts that invert one image: latents, and one learned context change for each denoising step.

Shapes: N denoising steps, in their order; C H W of latents.
"""

from __future__ import annotations

from torch import Tensor, nn

from ldm.methods.base import Branch, Metadata, StepChange, Tensors

START, FIRST = "x_T", "z_0"  # tensors of a concept: latents (1, C, H, W) of the noise, and of the image
TIMESTEPS = "inversion.timesteps"  # in its metadata, in the order of denoising


class Learner(nn.Module):
    """Parameters that are optimised step by step so that denoising follows an image's own path back.

    Args:
        steps: N.
    """

    method: str
    branch: Branch
    reads_maps = False  # whether the loss compares attention maps, too
    learned: str  # the tensor of a concept

    def begin(self, step: int, first_time: bool) -> list[nn.Parameter]:
        """Return the parameters of a step; the first time they start from the step before."""
        raise NotImplementedError

    def values(self, step: int) -> Tensor:
        """Return what a step has learned, as it is kept in a concept, with gradients."""
        raise NotImplementedError

    def change(self, values: Tensor, timesteps: tuple[int, ...]) -> StepChange:
        """Return the change of the context that such values (N, ...) are."""
        raise NotImplementedError


def check_inversion(tensors: Tensors, learned: str, what: str) -> None:
    """Raise `ValueError` unless tensors are those of an inversion: `learned` (N, L, D) beside both latents."""
    names = {learned, START, FIRST}
    if set(tensors) != names or tensors[learned].ndim != 3 or any(tensors[x].ndim != 4 for x in (START, FIRST)):
        raise ValueError(f"its tensors ({', '.join(tensors) or 'none'}) are no {what}.")


def read_timesteps(tensors: Tensors, metadata: Metadata, learned: str) -> tuple[int, ...]:
    """Return the timesteps of a concept.

    Raises:
        ValueError: they are missing, or are not as many as was learned.
    """
    text = metadata.get(TIMESTEPS, "")
    try:
        timesteps = tuple(int(t) for t in text.split(","))
    except ValueError as error:
        raise ValueError(f"it does not say its timesteps ({TIMESTEPS}).") from error
    if min(timesteps) < 0 or list(timesteps) != sorted(set(timesteps), reverse=True):
        raise ValueError(f"its timesteps ({TIMESTEPS}) do not go down to the image.")
    if len(timesteps) != len(tensors[learned]):
        raise ValueError(f"it has {len(tensors[learned])} steps, but names {len(timesteps)} timesteps.")
    return timesteps
