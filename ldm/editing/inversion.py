"""Find what reconstructs an image: its own DDIM path back, and step by step what makes guided denoising follow it.

Shapes: C H W latents, N denoising steps. Step i of denoising is at timestep τ_i, decreasing; path[j] is the latent
after j steps of inversion, so that step i goes from path[N - i] to path[N - 1 - i].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from ldm.conditioning.context import Conditioning, Context
from ldm.editing.control import MapStore, layers_of
from ldm.editing.request import InversionOptions
from ldm.methods.base import Learner
from ldm.methods.stylediffusion import inner_iterations
from ldm.models.diffusion.latent_diffusion import DiffusionModel
from ldm.models.diffusion.sampling import AtTimestep, Denoiser, guided
from ldm.modules.attention import AttentionHook

# --- the path --------------------------------------------------------------------------------------------------


def inversion_timesteps(steps: int, num_timesteps: int = 1000) -> np.ndarray:
    """Return N increasing timesteps, 1, 1 + r, 1 + 2 r, … with r = T // N: diffusers' with an offset of 1."""
    return np.arange(steps) * (num_timesteps // steps) + 1


def levels(timesteps: Sequence[int] | np.ndarray, alphas_cumprod: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return ᾱ at increasing timesteps and one step below each, (N,); the first one leads to that of timestep 0."""
    at = alphas_cumprod[np.asarray(timesteps)]
    return at, np.concatenate([alphas_cumprod[:1], at[:-1]])


def move(x: Tensor, eps: Tensor, level: float, to: float) -> Tensor:
    """Move latents between two noise levels ᾱ along predicted noise (Song et al. 2021, eq. 12 with σ = 0)."""
    x_0 = (x - (1 - level) ** 0.5 * eps) / level**0.5
    return to**0.5 * x_0 + (1 - to) ** 0.5 * eps


@torch.no_grad()
def ddim_invert(
    denoise: Denoiser, x_0: Tensor, timesteps: Sequence[int] | np.ndarray, alphas_cumprod: np.ndarray
) -> list[Tensor]:
    """Return the path from latents x_0 (B, C, H, W) to noise: N + 1 latents, x_0 first.

    The network is called at the timestep that a step leads to.

    Args:
        timesteps: increasing.
        alphas_cumprod: ᾱ of all timesteps.
    """
    path = [x_0]
    for t, level, below in zip(timesteps, *levels(timesteps, alphas_cumprod), strict=True):
        path.append(move(path[-1], denoise(path[-1], int(t)), below, level))
    return path


class Trajectory(NamedTuple):
    """An image's way to noise.

    Args:
        path: latents (1, C, H, W), N + 1 of them, the image's first.
        timesteps: increasing.
        maps: attention maps of words, of each of N steps of inversion; empty where none are needed.
    """

    path: list[Tensor]
    timesteps: np.ndarray
    maps: list[list[Tensor]]


def record(
    model: DiffusionModel,
    z_0: Tensor,
    cond: Conditioning,
    steps: int,
    maps: bool = False,
    half_maps: bool = False,
) -> Trajectory:
    """Invert latents z_0 (1, C, H, W) without guidance, and record cross-attention's maps if they are wanted."""
    timesteps = inversion_timesteps(steps, model.num_timesteps)
    store = MapStore(layers_of(model, z_0), keep=True, dtype=torch.float16 if half_maps else None) if maps else None
    denoise = guided(model, cond, hook=store)
    path = ddim_invert(denoise, z_0, timesteps, model.host_alphas_cumprod)
    return Trajectory(path, timesteps, [store.at(int(t)) for t in timesteps] if store else [])


# --- one denoising step ----------------------------------------------------------------------------------------


class Step(NamedTuple):
    """A denoising step that is to be learned.

    Args:
        number: i.
        t: its timestep.
        z, target: latents (1, C, H, W) before it, and of the image's path behind it.
        level, below: ᾱ before and behind it.
        maps: of the image's path.
    """

    number: int
    t: int
    z: Tensor
    target: Tensor
    level: float
    below: float
    maps: list[Tensor]


class Loss(NamedTuple):
    """The loss of a step, and its parts."""

    total: Tensor
    latent: Tensor
    attention: Tensor


def step_of(model: DiffusionModel, way: Trajectory, index: int, z: Tensor) -> Step:
    """Return denoising step i from latents z. Its maps are those of path[N - i], for i = 0 those of path[N - 1]."""
    steps = len(way.timesteps)
    j = steps - 1 - index
    at, below = levels(way.timesteps, model.host_alphas_cumprod)
    maps = way.maps[min(j + 1, steps - 1)] if way.maps else []
    return Step(index, int(way.timesteps[j]), z, way.path[j], float(at[j]), float(below[j]), maps)


def predict(model: DiffusionModel, z: Tensor, t: int, context: Context, hook: AttentionHook | None = None) -> Tensor:
    """Return the predicted noise (1, C, H, W) for one context, with gradients where they are wanted."""
    timesteps = torch.full((len(z),), t, device=z.device)
    return model.to_eps(model.apply_model(z, timesteps, context, hook and AtTimestep(hook, t)), z, timesteps)


class Sweep:
    """The optimisation of a learner along an image's path.

    Args:
        cond, uncond: contexts of the prompt and of "".
    """

    def __init__(
        self, model: DiffusionModel, way: Trajectory, learner: Learner, cond: Context, uncond: Context,
        options: InversionOptions,
    ) -> None:  # fmt: skip
        self.model, self.way, self.learner, self.options = model, way, learner, options
        self.cond, self.uncond = cond, uncond
        self.is_uncond = learner.kind.branch == "unconditional"  # what is learned
        self.layers = layers_of(model, way.path[0]) if options.attention_loss and learner.reads_maps else ()

    def fixed(self, step: Step) -> Tensor | None:
        """Return the prediction of the branch that is not learned, made once for a step; None without guidance."""
        if self.options.guidance_scale == 1 and not self.is_uncond:
            return None
        with torch.no_grad():
            return predict(self.model, step.z, step.t, self.cond if self.is_uncond else self.uncond)

    def behind(self, step: Step, fixed: Tensor | None, hook: AttentionHook | None = None) -> Tensor:
        """Return the latents (1, C, H, W) behind a step, with what is learned now."""
        change = self.learner.kind(self.learner.values(step.number)[None], (step.t,))
        eps = predict(self.model, step.z, step.t, change(self.cond, step.t), hook)
        if fixed is not None:
            uncond, cond = (eps, fixed) if self.is_uncond else (fixed, eps)
            eps = uncond + self.options.guidance_scale * (cond - uncond)
        return move(step.z, eps, step.level, step.below)

    def loss(self, step: Step, fixed: Tensor | None) -> Loss:
        """Return the loss: squared distance to the image's path, and to its maps where they are compared."""
        store = MapStore(self.layers) if self.layers and step.maps else None
        latent = F.mse_loss(self.behind(step, fixed, store), step.target)
        attention = torch.zeros_like(latent)
        if store is not None:
            for own, other in zip(store.at(), step.maps, strict=True):
                attention = attention + F.mse_loss(own, other.to(own))
        return Loss(latent + attention, latent, attention)

    def learn(self, step: Step, first_time: bool, report: Callable[[int, int, Loss], None] | None = None) -> Tensor:
        """Optimise a step; return the latents behind it. `report` is given (step, iteration, loss before it)."""
        i, options = step.number, self.options
        parameters = self.learner.begin(i, first_time)
        adam = torch.optim.Adam(parameters, lr=0.01 * (1 - i / 100))
        fixed = self.fixed(step)
        decays = self.learner.reads_maps  # StyleDiffusion's; the others make as many in every step
        for iteration in range(inner_iterations(i, options.inner_steps) if decays else options.inner_steps):
            loss = self.loss(step, fixed)
            adam.zero_grad()
            loss.total.backward()
            adam.step()
            if report is not None:
                report(i, iteration, loss)
            if loss.total.item() < options.epsilon + 2e-5 * i:
                break
        for parameter in parameters:
            parameter.grad = None
            parameter.requires_grad_(False)
        with torch.no_grad():
            return self.behind(step, fixed)


class Progress(NamedTuple):
    """The progress of a sweep: finished (epoch, step), latents behind it."""

    epoch: int
    step: int
    z: Tensor


def learn_path(
    sweep: Sweep,
    start: Progress | None = None,
    report: Callable[[int, int, Loss], None] | None = None,
    finished: Callable[[Progress], None] | None = None,
    progress: bool = True,
) -> Tensor:
    """Learn all steps; return the reconstructed latents (1, C, H, W).

    Args:
        start: of a learner that was loaded; None starts from noise.
        finished: called after each step.
    """
    steps, epochs = len(sweep.way.timesteps), sweep.options.epochs
    done = -1 if start is None else start.epoch * steps + start.step
    z = sweep.way.path[-1] if start is None else start.z
    with tqdm(total=epochs * steps, initial=done + 1, desc="inverting", disable=not progress) as bar:

        def show(i: int, iteration: int, loss: Loss) -> None:
            if progress and iteration % 10 == 0:
                bar.set_postfix(iteration=iteration, loss=f"{loss.total.item():.2e}")
            if report is not None:
                report(i, iteration, loss)

        for number in range(done + 1, epochs * steps):
            epoch, i = divmod(number, steps)
            z = sweep.way.path[-1] if i == 0 else z
            z = sweep.learn(step_of(sweep.model, sweep.way, i, z), epoch == 0, show)
            bar.update()
            if finished is not None:
                finished(Progress(epoch, i, z))
    return z


@torch.no_grad()
def follow(sweep: Sweep) -> Tensor:
    """Return the latents (1, C, H, W) that denoising with everything learned ends at; nothing is optimised."""
    z = sweep.way.path[-1]
    for i in range(len(sweep.way.timesteps)):
        step = step_of(sweep.model, sweep.way, i, z)
        z = sweep.behind(step, sweep.fixed(step))
    return z
