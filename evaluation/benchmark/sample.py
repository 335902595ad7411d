"""Pictures from noise, text passes, and the first stage: ours with any switch turned."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evaluation.benchmark.measure import Contender
from evaluation.benchmark.models import variant
from evaluation.benchmark.switches import dtype_name, is_opaque
from evaluation.benchmark.train import RandomPictures, every_stage
from ldm.conditioning.context import Conditioning, Context, as_conditioning
from ldm.models.diffusion.ddim import ddim
from ldm.models.diffusion.sampling import Denoiser, draw_noise, guided, seeded_generators
from ldm.models.diffusion.schedule import ddim_parameters, ddim_timesteps

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion

PROMPT = "*"
SCALE = 5.0


def words(num_stages: int) -> list[str]:
    """The learned token in the first half of the stages, a plain text in the others."""
    half = num_stages // 2
    return ["a *"] * half + ["a thing"] * (num_stages - half)


class Sampling:
    """DDIM with guidance from noise to pictures; `text_rows` counts the prompts that were encoded."""

    def __init__(
        self, base: LatentDiffusion, switches: frozenset[str], batch: int, resolution: int, steps: int
    ) -> None:
        self.model = variant(base, switches).eval()
        self.switches, self.batch = switches, batch
        side = resolution // self.model.first_stage_model.downsampling
        self.shape = (self.model.channels, side, side)
        timesteps = ddim_timesteps(steps, self.model.num_timesteps)
        alphas_cumprod = self.model.host_alphas_cumprod
        self.schedule = (timesteps, *ddim_parameters(alphas_cumprod, timesteps, 0.0))
        self.text_rows = 0
        text = self.model.cond_stage_model.transformer.text_model
        text.register_forward_hook(lambda _, inputs, __: self._count(len(inputs[0])))

    def _count(self, rows: int) -> None:
        self.text_rows += rows

    def conditionings(self, count: int) -> list[Conditioning]:
        """The unconditional prompts and the prompts."""
        model = self.model
        prompts = [([""] * count, None), ([PROMPT] * count, words(model.num_stages))]
        if "text_batch" in self.switches:
            return [model.get_learned_conditioning(*prompt) for prompt in prompts]
        return [as_conditioning(every_stage(model, *prompt), model.num_timesteps) for prompt in prompts]

    def denoiser(self, count: int) -> Denoiser:
        uncond, cond = self.conditionings(count)
        model = self.model
        if "guidance_batch" not in self.switches:
            one, two = (self._one(prompt) for prompt in (uncond, cond))
            return lambda x, t: mix(one(x, t), two(x, t))
        if "kv" in self.switches:
            return guided(model, cond, uncond, SCALE)

        def denoise(x: Tensor, t: int) -> Tensor:
            x = torch.cat([x, x])
            timesteps = torch.full((len(x),), t, device=x.device)
            prediction = model.apply_model(x, timesteps, Context.cat(uncond.at(t), cond.at(t)))
            return mix(*model.to_eps(prediction, x, timesteps).chunk(2))

        return denoise

    def _one(self, prompt: Conditioning) -> Denoiser:
        """The prediction for one of the two prompts alone."""
        if "kv" in self.switches:
            return guided(self.model, prompt)

        def denoise(x: Tensor, t: int) -> Tensor:
            timesteps = torch.full((len(x),), t, device=x.device)
            return self.model.to_eps(self.model.apply_model(x, timesteps, prompt.at(t)), x, timesteps)

        return denoise

    @torch.no_grad()
    def run(self) -> Tensor:
        """Pictures (B, 3, R, R)."""
        groups = [range(self.batch)] if "batch" in self.switches else [range(i, i + 1) for i in range(self.batch)]
        pictures = []
        for seeds in groups:
            x = draw_noise(seeded_generators(seeds), (len(seeds), *self.shape), self.model.device)
            latents = ddim(self.denoiser(len(seeds)), x, *self.schedule)
            pictures.append(self.model.decode_first_stage(latents))
        return torch.cat(pictures)

    def result(self) -> Tensor:
        self.text_rows = 0
        return self.run()


def mix(eps_uncond: Tensor, eps_cond: Tensor) -> Tensor:
    return eps_uncond + SCALE * (eps_cond - eps_uncond)


def sampling_contender(
    base: LatentDiffusion, name: str, switches: frozenset[str], batch: int, resolution: int, steps: int
) -> Contender:
    sampling = Sampling(base, switches, batch, resolution, steps)
    contender = Contender(
        name, sampling.run, sampling.result, getattr(torch, dtype_name(switches)), batch, is_opaque(switches)
    )

    def result() -> Tensor:
        pictures = sampling.result()
        contender.details["text_rows"] = sampling.text_rows
        return pictures

    contender.result = result
    return contender


def text_contender(
    base: LatentDiffusion, name: str, switches: frozenset[str], batch: int, resolution: int, steps: int
) -> Contender:
    """All contexts that a picture needs, with those of the unconditional prompt."""
    sampling = Sampling(base, switches, batch, resolution, 1)

    @torch.no_grad()
    def run() -> Tensor:
        parts = sampling.conditionings(batch)
        stages = range(sampling.model.num_stages)
        return torch.cat([part.at(s * part.num_timesteps // len(stages)).k.float() for part in parts for s in stages])

    return Contender(name, run, run, getattr(torch, dtype_name(switches)), batch)


def vae_contender(
    base: LatentDiffusion, name: str, switches: frozenset[str], batch: int, resolution: int, steps: int
) -> Contender:
    """Encoding and decoding."""
    model = variant(base, switches).eval()
    images = torch.stack([RandomPictures(batch, resolution).picture(i) for i in range(batch)]).to(model.device)

    def run() -> Tensor:
        posterior = model.encode_first_stage(images)
        return model.decode_first_stage(model.scale_factor * posterior.mode())

    return Contender(name, run, run, getattr(torch, dtype_name(switches)), batch)
