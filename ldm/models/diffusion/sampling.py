"""Base of the samplers: guidance, noise for each image, and the LDM-named methods of their classes.

A sampler proper is a pure function of a denoiser, a start, and a schedule. Which stage's prompt is read is
decided here, in the closure around the model, by the timestep of the call.

Shapes: B batch, C latent channels, H W latent height and width, S steps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.conditioning.context import Cond, Context, Projected, as_conditioning
from ldm.conditioning.encoding import encode_together
from ldm.conditioning.stages import at_stage
from ldm.models.diffusion.latent_diffusion import DiffusionModel
from ldm.models.diffusion.schedule import ddim_parameters, ddim_timesteps
from ldm.modules.attention import AttentionHook, Site, is_wanted
from ldm.request import SPACINGS
from ldm.util import mix_seed

Denoiser = Callable[[Tensor, int], Tensor]  # latents (B, C, H, W), raw timestep -> predicted noise (B, C, H, W)
Schedule = Sequence[float] | np.ndarray  # S entries, increasing in time
GuidanceScale = float | Sequence[float]  # for all timesteps, or for each stage, entry 0 = end of sampling
NoiseSource = Callable[[], Tensor]  # the next standard normal (B, C, H, W)
# step, timestep, x (after the step), predicted x_0; a tensor that is returned takes the place of x
Callback = Callable[[int, int, Tensor, Tensor], "Tensor | None"]


class Guided:
    """The model's noise prediction under classifier-free guidance (Ho and Salimans 2022, eq. 6, with w + 1).

    Both predictions are made in one batch of 2B, the unconditional one first; where the scale is 1 only the conditional
    one is made. All prompts are encoded in one batch, and the keys and values of cross-attention are kept while the
    context stays the same.

    Args:
        hook: called in every attention of the U-Net, with the timestep in its site.
        rescale: φ of Lin et al. 2024 (section 3.4, eq. 15 and 16), 0 to 1.

    Raises:
        ValueError: guidance without an unconditional prompt.
    """

    def __init__(
        self,
        model: DiffusionModel,
        cond: Cond,
        uncond: Cond | None = None,
        guidance_scale: GuidanceScale = 1.0,
        hook: AttentionHook | None = None,
        rescale: float = 0.0,
    ) -> None:
        self.model, self.hook, self.rescale = model, hook, rescale
        self.scales = guidance_scale if isinstance(guidance_scale, Sequence) else (guidance_scale,)
        self.prompts = [as_conditioning(cond, model.num_timesteps)]
        if any(scale != 1.0 for scale in self.scales):
            if uncond is None:
                raise ValueError(f"A guidance scale of {guidance_scale} needs unconditional_conditioning (prompt '').")
            self.prompts.insert(0, as_conditioning(uncond, model.num_timesteps))
        self._kept: tuple[list[Context], Projected] | None = None

    def scale(self, t: int) -> float:
        """Return the guidance scale at timestep t."""
        return at_stage(self.scales, t, self.model.num_timesteps)

    def differs(self, t: int, other: int) -> list[bool]:
        """Return for each image whether it has another prompt or another scale at timestep t than at the other one."""
        scale_differs = self.scale(t) != self.scale(other)
        found = zip(*(prompt.differs(t, other) for prompt in self.prompts), strict=True)
        return [scale_differs or any(prompts) for prompts in found]

    def _projected(self, contexts: list[Context]) -> Projected:
        if self._kept is None or [*map(id, self._kept[0])] != [*map(id, contexts)]:
            self._kept = contexts, self.model.model.diffusion_model.project(Context.cat(*contexts))
        return self._kept[1]

    @torch.no_grad()
    def __call__(self, x: Tensor, t: int) -> Tensor:
        scale, model = self.scale(t), self.model
        encode_together(*self.prompts)
        prompts = self.prompts if scale != 1.0 else self.prompts[-1:]
        batch = torch.cat([x] * len(prompts))
        timesteps = torch.full((len(batch),), t, device=x.device)
        context = self._projected([prompt.at(t) for prompt in prompts])
        prediction = model.apply_model(batch, timesteps, context, self.hook and AtTimestep(self.hook, t))
        if scale == 1.0 or not self.rescale:
            prediction = model.to_eps(prediction, batch, timesteps)  # which is linear, so that it may come first
        if scale == 1.0:
            return prediction
        uncond, cond = prediction.chunk(2)
        led = uncond + scale * (cond - uncond)
        if not self.rescale:
            return led
        deviation = cond.std((1, 2, 3), keepdim=True) / led.std((1, 2, 3), keepdim=True)
        return model.to_eps(led * (1 - self.rescale + self.rescale * deviation), x, timesteps[: len(x)])


guided = Guided


@dataclass(frozen=True)
class AtTimestep:
    """A hook with the timestep written into its sites."""

    hook: AttentionHook
    t: int

    def __call__(self, probabilities: Tensor, site: Site) -> Tensor:
        return self.hook(probabilities, site._replace(t=self.t))

    def wants(self, site: Site, queries: int) -> bool:
        return is_wanted(self.hook, site._replace(t=self.t), queries)


def seeded_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """Return one generator on the CPU for each image, which depends neither on its batch nor on the device.

    PyTorch's CPU generator reads the low 32 bits of a seed, so longer seeds are mixed first.
    """
    return [torch.Generator("cpu").manual_seed(seed if seed < 2**32 else mix_seed(seed)) for seed in seeds]


def draw_noise(
    generators: Sequence[torch.Generator] | None, shape: Sequence[int], device: torch.device | str
) -> Tensor:
    """Return standard normal noise (B, C, H, W) in float32, sample i from generator i; None: from the global state."""
    if generators is None:
        return torch.randn(tuple(shape), device=device, dtype=torch.float32)
    options: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}  # whatever PyTorch's defaults are
    return torch.stack([torch.randn(tuple(shape[1:]), generator=g, **options) for g in generators]).to(device)


class Sampler(ABC):
    """The attributes and methods of LDM's sampler classes, over the pure functions.

    After `make_schedule`: `ddim_timesteps` (S,) int, and `ddim_alphas`, `ddim_alphas_prev`, `ddim_sigmas`,
    `ddim_sqrt_one_minus_alphas`, each (S,) float64 on the host.
    """

    spacing = "leading"  # where none is asked for
    largest_eta = 1.0  # above 1 a step would have to add more noise than is left after it

    def __init__(self, model: DiffusionModel, schedule: str = "linear") -> None:
        self.model = model
        self.ddpm_num_timesteps = model.num_timesteps

    def make_schedule(
        self, ddim_num_steps: int, ddim_discretize: str | None = None, ddim_eta: float = 0.0, verbose: bool = True
    ) -> None:
        """Evenly spaced timesteps; raises `ValueError` for a number of steps, a spacing or an eta out of range.

        Args:
            ddim_discretize: `leading`, which LDM calls `uniform`, or `trailing`; by default the sampler's own.
        """
        spacing = {None: self.spacing, "uniform": "leading"}.get(ddim_discretize, ddim_discretize)
        if spacing not in SPACINGS:
            raise ValueError(f"Timesteps are spaced {', '.join(SPACINGS)} (uniform) here, not '{ddim_discretize}'.")
        if not 0 <= ddim_eta <= self.largest_eta:
            raise ValueError(f"ddim_eta must be in 0..{self.largest_eta:g} for {type(self).__name__}, not {ddim_eta}.")
        self.ddim_timesteps = ddim_timesteps(ddim_num_steps, self.ddpm_num_timesteps, spacing)
        alphas, alphas_prev, sigmas = ddim_parameters(self.model.host_alphas_cumprod, self.ddim_timesteps, ddim_eta)
        self.ddim_alphas, self.ddim_alphas_prev, self.ddim_sigmas = alphas, alphas_prev, sigmas
        self.ddim_sqrt_one_minus_alphas = np.sqrt(1.0 - alphas)

    @abstractmethod
    def run(self, denoise: Denoiser, x: Tensor, steps: int, noise: NoiseSource, callback: Callback | None) -> Tensor:
        """Denoise x through the first `steps` entries of the schedule, from entry steps - 1 down to 0."""

    @torch.no_grad()
    def sample(
        self,
        S: int,
        batch_size: int,
        shape: Sequence[int],
        conditioning: Cond,
        callback: Callable[[int], Any] | None = None,
        img_callback: Callable[[Tensor, int], Any] | None = None,
        eta: float = 0.0,
        verbose: bool = True,
        x_T: Tensor | None = None,
        log_every_t: int = 100,
        unconditional_guidance_scale: GuidanceScale = 1.0,
        unconditional_conditioning: Cond | None = None,
        generators: Sequence[torch.Generator] | None = None,
        step_callback: Callback | None = None,
        guidance_rescale: float = 0.0,
        spacing: str | None = None,
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Return latents (B, C, H, W) after S steps, and the intermediate ones as LDM returns them.

        Args:
            shape: (C, H, W).
            callback, img_callback: LDM's hooks, called with the step, and with (predicted x_0, step).
            x_T: start, standard normal (B, C, H, W); drawn from `generators` if None.
            generators: one for each sample.
        """
        self.make_schedule(S, spacing, eta, verbose)
        start = draw_noise(generators, (batch_size, *shape), self.model.device) if x_T is None else x_T
        start = start.to(self.model.device)
        intermediates: dict[str, list[Tensor]] = {"x_inter": [start], "pred_x0": [start]}

        def hooks(step: int, t: int, x: Tensor, x_0: Tensor) -> Tensor | None:
            index = S - 1 - step
            if index % log_every_t == 0 or index == S - 1:
                intermediates["x_inter"].append(x)
                intermediates["pred_x0"].append(x_0)
            if callback is not None:
                callback(step)
            if img_callback is not None:
                img_callback(x_0, step)
            return None if step_callback is None else step_callback(step, t, x, x_0)

        guidance = unconditional_guidance_scale, unconditional_conditioning
        return self.decode(start, conditioning, S, *guidance, generators, hooks, guidance_rescale), intermediates

    @torch.no_grad()
    def stochastic_encode(
        self, x0: Tensor, t: Tensor, use_original_steps: bool = False, noise: Tensor | None = None
    ) -> Tensor:
        """Noise latents x0 (B, C, H, W) to the level of entries t (B,) of the schedule.

        With `use_original_steps`, t are raw timesteps. An index past the last entry means the last.
        """
        noise = torch.randn_like(x0) if noise is None else noise.to(x0)
        if not use_original_steps:
            timesteps = torch.as_tensor(self.ddim_timesteps, device=t.device)
            t = timesteps[t.clamp(max=len(timesteps) - 1)]
        return self.model.q_sample(x0, t.to(x0.device), noise)

    @torch.no_grad()
    def decode(
        self,
        x_latent: Tensor,
        cond: Cond,
        t_start: int,
        unconditional_guidance_scale: GuidanceScale = 1.0,
        unconditional_conditioning: Cond | None = None,
        generators: Sequence[torch.Generator] | None = None,
        step_callback: Callback | None = None,
        guidance_rescale: float = 0.0,
    ) -> Tensor:
        """Denoise through the first `t_start` entries of the schedule, from entry t_start - 1 down to 0.

        As in the reference, latents noised to entry t_start (`stochastic_encode`) are denoised from the entry
        below it. `t_start` 0 returns them as they are.
        """
        guidance = unconditional_conditioning, unconditional_guidance_scale
        denoise = Guided(self.model, cond, *guidance, rescale=guidance_rescale)
        noise = lambda: draw_noise(generators, x_latent.shape, x_latent.device)  # noqa: E731
        return self.run(denoise, x_latent, min(int(t_start), len(self.ddim_timesteps)), noise, step_callback)
