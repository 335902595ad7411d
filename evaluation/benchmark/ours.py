"""Training steps, images from noise, text passes and the first stage: ours, with any switch turned.

With all of them off it is what the reference does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.benchmark.measure import Contender
from evaluation.benchmark.models import dtype_of, variant
from evaluation.benchmark.switches import OPAQUE, OTHER_IMAGES, Work
from evaluation.images import encode
from ldm.conditioning.context import Conditioning, Context, as_conditioning
from ldm.conditioning.learned import TokenVectors
from ldm.methods.neti import BYPASS_STRENGTH
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.sampling import Denoiser, draw_noise, guided, seeded_generators
from ldm.models.diffusion.schedule import ddim_timesteps

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion

SCALE = 5.0


class RandomImages:
    """Images (3, R, R) of noise in [-1, 1], which cost what others do; a data set of training."""

    flips = False

    def __init__(self, work: Work, caption: str = "*") -> None:
        self.num_images, self.resolution, self.caption = work.batch, work.resolution, caption
        self.with_images = True

    def image(self, i: int, flipped: bool = False) -> Tensor:
        generator = torch.Generator().manual_seed(i)
        return torch.rand(3, self.resolution, self.resolution, generator=generator) * 2 - 1

    def all(self) -> Tensor:
        return torch.stack([self.image(i) for i in range(self.num_images)])

    def batch(self, numbers: range, with_images: bool) -> dict[str, Any]:
        """Return what a data loader gives for the samples of these numbers; sample n shows image n."""
        ids, flipped = torch.tensor(numbers), torch.zeros(len(numbers), dtype=torch.bool)
        batch = {"caption": [self.caption] * len(numbers), "image_number": ids, "flipped": flipped, "sample": ids}
        if with_images:
            batch["image"] = torch.stack([self.image(i) for i in numbers]).permute(0, 2, 3, 1).contiguous()
        return batch


def groups(switches: frozenset[str], count: int) -> list[range]:
    """Return the numbers of the samples that go through together: without the switch `batch`, each alone."""
    return [range(count)] if "batch" in switches else [range(i, i + 1) for i in range(count)]


class TrainingStep:
    """A model with its optimizer and its batches, whose gradients are accumulated."""

    def __init__(self, base: LatentDiffusion, switches: frozenset[str], work: Work) -> None:
        self.model = variant(base, switches)
        self.model.train()
        self.switches = switches
        images = RandomImages(work, "a photo of a *" if num_layers(base) > 1 else "*")
        cached = "latents" in switches
        self.batches = [images.batch(some, with_images=not cached) for some in groups(switches, work.batch)]
        if cached:
            self.model.cache_latents(images)
        self.optimizer: Any = self.model.configure_optimizers()

    def loss(self, batch: dict[str, Any]) -> Tensor:
        model = self.model
        layered = num_layers(model) > 1
        if ("layers" if layered else "stages") in self.switches:
            return model.shared_step(batch, "train")[0]
        draw = {name: values.to(model.device) for name, values in model._draw(batch, "train").items()}
        z = model.get_first_stage_encoding(model.posterior(batch), draw["posterior_noise"])
        every = every_layer(model, batch["caption"], draw["t"]) if layered else every_stage(model, batch["caption"])
        return model.p_losses(z, every, draw["t"], draw["noise"])[0]

    def backward(self) -> Tensor:
        losses = []
        for batch in self.batches:
            loss = self.loss(batch) / len(self.batches)
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def run(self) -> None:
        self.backward()
        self.optimizer.step()
        self.model.zero_grad()

    def result(self) -> Tensor:
        """Return the loss, then its gradient by everything that is learned."""
        loss = self.backward()
        gradients = [p.grad.flatten() for p in self.model.trainable_parameters() if p.grad is not None]
        values = torch.cat([loss.view(1), *gradients]).clone()
        self.model.zero_grad()
        return values


def every_stage(model: LatentDiffusion, prompts: list[str], words: list[str] | None = None) -> list[Tensor]:
    """Return the contexts of all S stages, each in a text pass of its own, as the reference makes them."""
    cond: Any = model.get_learned_conditioning(prompts, words)
    manager: Any = model.embedding_manager
    slots, vectors = cond.slots.expand(model.num_stages, -1, -1), manager.vectors()
    return [model.cond_stage_model(stage, vectors) for stage in slots]


def num_layers(model: LatentDiffusion) -> int:
    """Return how many U-Net layers have contexts of their own."""
    manager: Any = model.embedding_manager
    return manager.learned_now().num_layers


def every_layer(model: LatentDiffusion, prompts: list[str], t: Tensor) -> Context:
    """Return the contexts of all U-Net layers at timesteps t, each in a text pass of its own, as NeTI makes them."""
    manager: Any = model.embedding_manager
    slots = model.get_learned_conditioning(prompts).rows(0)
    mapper, parts = manager.learned, []
    for layer in range(mapper.num_layers):
        y = mapper(t, torch.full_like(t, layer)).view(1, len(t), 1, -1)
        e, r = y.split(mapper.width, dim=-1)
        parts.append(model.cond_stage_model.encode(slots, TokenVectors(e, BYPASS_STRENGTH * F.normalize(r, dim=-1))))
    return Context(torch.stack([part.k for part in parts]), torch.stack([part.v for part in parts]))


class Sampling:
    """DDIM with guidance from noise to images; `details` has the number of prompts that `result` encoded."""

    def __init__(self, base: LatentDiffusion, switches: frozenset[str], work: Work) -> None:
        self.model = variant(base, switches).eval()
        self.switches, self.batch = switches, work.batch
        side = work.resolution // self.model.first_stage_model.downsampling
        self.shape = (self.model.channels, side, side)
        self.sampler = (DPMSolverSampler if "fast" in switches else DDIMSampler)(self.model)
        self.steps = round(0.4 * work.steps) if "fast" in switches else work.steps
        self.sampler.make_schedule(self.steps)
        self.scale: Any = [1.0] * 5 + [SCALE] * 5 if "half_guided" in switches else SCALE
        self.text_rows, self.details = 0, {"text_rows": 0}
        encoder: Any = self.model.cond_stage_model
        encoder.transformer.text_model.register_forward_hook(self._count)

    def _count(self, _: object, inputs: tuple[Tensor, ...], __: object) -> None:
        self.text_rows += len(inputs[0])

    def conditionings(self, count: int) -> list[Conditioning]:
        """Return the unconditional prompts, and prompts with the learned token in the first half of the stages."""
        model, half = self.model, self.model.num_stages // 2
        words = ["a *"] * half + ["a thing"] * (model.num_stages - half)
        prompts = [([""] * count, None), (["*"] * count, words)]
        if "text_batch" in self.switches:
            return [model.get_learned_conditioning(*prompt) for prompt in prompts]
        return [as_conditioning(every_stage(model, *prompt), model.num_timesteps) for prompt in prompts]

    def denoiser(self, count: int) -> Denoiser:
        uncond, cond = self.conditionings(count)
        model, kv, together = self.model, "kv" in self.switches, "guidance_batch" in self.switches

        def predict(x: Tensor, t: int, context: Context) -> Tensor:
            timesteps = torch.full((len(x),), t, device=x.device)
            return model.to_eps(model.apply_model(x, timesteps, context), x, timesteps)

        if kv and together:
            return guided(model, cond, uncond, self.scale)
        if together:
            return lambda x, t: mix(*predict(torch.cat([x, x]), t, Context.cat(uncond.at(t), cond.at(t))).chunk(2))
        if kv:
            one, two = guided(model, uncond), guided(model, cond)
            return lambda x, t: mix(one(x, t), two(x, t))
        return lambda x, t: mix(predict(x, t, uncond.at(t)), predict(x, t, cond.at(t)))

    @torch.no_grad()
    def run(self) -> Tensor:
        """Return images (B, 3, R, R)."""
        images = []
        for seeds in groups(self.switches, self.batch):
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


def all_contexts(base: LatentDiffusion, switches: frozenset[str], work: Work) -> Contender:
    """Encode all contexts that an image needs, with those of the unconditional prompt where there are few."""
    sampling = Sampling(base, switches, work._replace(steps=1))

    @torch.no_grad()
    def run() -> Tensor:
        parts = sampling.conditionings(work.batch)
        stages = range(sampling.model.num_stages)
        return torch.cat([part.at(s * part.num_timesteps // len(stages)).k.float() for part in parts for s in stages])

    return Contender("", run, run)


def all_layered_contexts(base: LatentDiffusion, switches: frozenset[str], work: Work) -> Contender:
    """Encode the contexts of all U-Net layers, at all timesteps of an image (NeTI)."""
    model = variant(base, switches).eval()
    prompts, times = ["a photo of a *"] * work.batch, ddim_timesteps(work.steps, model.num_timesteps)

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

    return Contender("", run, result)


def coding(base: LatentDiffusion, switches: frozenset[str], work: Work) -> Contender:
    """Encode and decode images."""
    model = variant(base, switches).eval()
    images = RandomImages(work).all().to(model.device)

    def run() -> Tensor:
        return model.decode_first_stage(model.scale_factor * encode(model, images))

    return Contender("", run, run)


def contender(base: LatentDiffusion, work: Work, switches: frozenset[str], name: str = "ours") -> Contender:
    """Return our way to do the work."""
    if work.what == "train":
        step = TrainingStep(base, switches, work)
        way = Contender(name, step.run, step.result)
    elif work.what == "sample":
        images = Sampling(base, switches, work)
        way = Contender(name, images.run, images.result, details=images.details)
    elif work.what == "vae":
        way = coding(base, switches, work)
    else:
        way = (all_layered_contexts if num_layers(base) > 1 else all_contexts)(base, switches, work)
    opaque, others = bool(switches & OPAQUE), bool(switches & OTHER_IMAGES)
    return replace(way, name=name, dtype=dtype_of(switches), samples=work.batch, opaque=opaque, other_images=others)
