"""Images from noise, text passes, and the first stage: ours with any switch turned."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evaluation.benchmark.measure import Contender
from evaluation.benchmark.models import dtype_of, variant
from evaluation.benchmark.switches import OTHER_IMAGES, is_opaque
from evaluation.benchmark.train import RandomImages, every_layer, every_stage, num_layers
from evaluation.images import encode
from ldm.conditioning.context import Conditioning, Context, as_conditioning
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.sampling import Denoiser, draw_noise, guided, seeded_generators
from ldm.models.diffusion.schedule import ddim_timesteps

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion

PROMPT = "*"
SCALE = 5.0


def words(num_stages: int) -> list[str]:
    """Return the learned token for the first half of the stages, a plain text for the others."""
    half = num_stages // 2
    return ["a *"] * half + ["a thing"] * (num_stages - half)


class Sampling:
    """DDIM with guidance from noise to images; `details` has the number of prompts that `result` encoded."""

    def __init__(
        self, base: LatentDiffusion, switches: frozenset[str], batch: int, resolution: int, steps: int
    ) -> None:
        self.model = variant(base, switches).eval()
        self.switches, self.batch = switches, batch
        side = resolution // self.model.first_stage_model.downsampling
        self.shape = (self.model.channels, side, side)
        self.sampler = (DPMSolverSampler if "fast" in switches else DDIMSampler)(self.model)
        self.steps = round(0.4 * steps) if "fast" in switches else steps
        self.sampler.make_schedule(self.steps)
        self.scale: Any = [1.0] * 5 + [SCALE] * 5 if "half_guided" in switches else SCALE
        self.text_rows, self.details = 0, {"text_rows": 0}
        encoder: Any = self.model.cond_stage_model
        encoder.transformer.text_model.register_forward_hook(self._count)

    def _count(self, _: object, inputs: tuple[Tensor, ...], __: object) -> None:
        self.text_rows += len(inputs[0])

    def conditionings(self, count: int) -> list[Conditioning]:
        """Return the unconditional prompts and the prompts."""
        model = self.model
        prompts = [([""] * count, None), ([PROMPT] * count, words(model.num_stages))]
        if "text_batch" in self.switches:
            return [model.get_learned_conditioning(*prompt) for prompt in prompts]
        return [as_conditioning(every_stage(model, *prompt), model.num_timesteps) for prompt in prompts]

    def denoiser(self, count: int) -> Denoiser:
        uncond, cond = self.conditionings(count)
        model, kv = self.model, "kv" in self.switches

        def predict(x: Tensor, t: int, context: Context) -> Tensor:
            timesteps = torch.full((len(x),), t, device=x.device)
            return model.to_eps(model.apply_model(x, timesteps, context), x, timesteps)

        if "guidance_batch" in self.switches:
            if kv:
                return guided(model, cond, uncond, self.scale)
            return lambda x, t: mix(*predict(torch.cat([x, x]), t, Context.cat(uncond.at(t), cond.at(t))).chunk(2))
        if kv:
            one, two = guided(model, uncond), guided(model, cond)
            return lambda x, t: mix(one(x, t), two(x, t))
        return lambda x, t: mix(predict(x, t, uncond.at(t)), predict(x, t, cond.at(t)))

    @torch.no_grad()
    def run(self) -> Tensor:
        """Return images (B, 3, R, R)."""
        groups = [range(self.batch)] if "batch" in self.switches else [range(i, i + 1) for i in range(self.batch)]
        images = []
        for seeds in groups:
            x = draw_noise(seeded_generators(seeds), (len(seeds), *self.shape), self.model.device)
            latents = self.sampler.run(self.denoiser(len(seeds)), x, self.steps, no_noise, None)
            images.append(self.model.decode_first_stage(latents))
        return torch.cat(images)

    def result(self) -> Tensor:
        self.text_rows = 0
        images = self.run()
        self.details["text_rows"] = self.text_rows
        return images


def no_noise() -> Tensor:
    raise AssertionError("eta is 0")


def mix(eps_uncond: Tensor, eps_cond: Tensor) -> Tensor:
    return eps_uncond + SCALE * (eps_cond - eps_uncond)


def sampling_contender(
    base: LatentDiffusion, name: str, switches: frozenset[str], batch: int, resolution: int, steps: int
) -> Contender:
    x = Sampling(base, switches, batch, resolution, steps)
    others = bool(switches & OTHER_IMAGES)
    return Contender(name, x.run, x.result, dtype_of(switches), batch, is_opaque(switches), x.details, others)


def text_contender(
    base: LatentDiffusion, name: str, switches: frozenset[str], batch: int, resolution: int, steps: int
) -> Contender:
    """Encode all contexts that an image needs, with those of the unconditional prompt where there are few."""
    if num_layers(base) > 1:
        return layered_text_contender(base, name, switches, batch, steps)
    sampling = Sampling(base, switches, batch, resolution, 1)

    @torch.no_grad()
    def run() -> Tensor:
        parts = sampling.conditionings(batch)
        stages = range(sampling.model.num_stages)
        return torch.cat([part.at(s * part.num_timesteps // len(stages)).k.float() for part in parts for s in stages])

    return Contender(name, run, run, dtype_of(switches), batch)


def layered_text_contender(
    base: LatentDiffusion, name: str, switches: frozenset[str], batch: int, steps: int
) -> Contender:
    """Encode the contexts of all U-Net layers, at all timesteps of an image (NeTI)."""
    model = variant(base, switches).eval()
    prompts, times = ["a photo of a *"] * batch, ddim_timesteps(steps, model.num_timesteps)

    def contexts() -> Iterator[Context]:
        cond = model.get_learned_conditioning(prompts)
        for t in map(int, times):
            if "layers" in switches:
                yield cond.at(t)
            else:
                yield every_layer(model, prompts, torch.tensor([t], device=model.device))

    @torch.no_grad()
    def run() -> None:
        kept = [context for context in contexts() if "layers" not in switches]  # the reference keeps them all
        del kept

    @torch.no_grad()
    def result() -> Tensor:
        return torch.stack([torch.stack(context).float()[..., ::16] for context in contexts()])

    return Contender(name, run, result, dtype_of(switches), batch)


def vae_contender(
    base: LatentDiffusion, name: str, switches: frozenset[str], batch: int, resolution: int, steps: int
) -> Contender:
    """Encode and decode images."""
    model = variant(base, switches).eval()
    images = RandomImages(batch, resolution).all().to(model.device)

    def run() -> Tensor:
        return model.decode_first_stage(model.scale_factor * encode(model, images))

    return Contender(name, run, run, dtype_of(switches), batch)
