"""A training step: ours with any switch turned, down to what the reference does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.benchmark.measure import Contender
from evaluation.benchmark.models import dtype_of, variant
from evaluation.benchmark.switches import is_opaque
from ldm.conditioning.context import Context
from ldm.conditioning.learned import TokenVectors
from ldm.methods.neti import BYPASS_STRENGTH

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion


class RandomImages:
    """Images (3, R, R) of noise in [-1, 1], which cost what others do."""

    flips = False

    def __init__(self, count: int, resolution: int, caption: str = "*") -> None:
        self.num_images, self.resolution, self.caption = count, resolution, caption
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


class TrainingStep:
    """A model with its optimizer and its batches; `run` is a step, `result` its losses and gradients.

    Without the switch `batch`, the samples go through one by one, and their gradients are accumulated.
    """

    def __init__(self, base: LatentDiffusion, switches: frozenset[str], batch: int, resolution: int) -> None:
        self.model = variant(base, switches)
        self.model.train()
        self.switches = switches
        images = RandomImages(batch, resolution, "a photo of a *" if num_layers(base) > 1 else "*")
        cached = "latents" in switches
        ranges = [range(batch)] if "batch" in switches else [range(i, i + 1) for i in range(batch)]
        self.batches = [images.batch(numbers, with_images=not cached) for numbers in ranges]
        if cached:
            self.model.cache_latents(images)
        self.optimizer: Any = self.model.configure_optimizers()

    def loss(self, batch: dict[str, Any]) -> Tensor:
        model = self.model
        layered = num_layers(model) > 1
        if ("layers" if layered else "stages") in self.switches:
            return model.shared_step(batch, "train")[0]
        draw = model._draw(batch, "train")
        draw = {name: values.to(model.device) for name, values in draw.items()}
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


def contender(base: LatentDiffusion, name: str, switches: frozenset[str], batch: int, resolution: int) -> Contender:
    step = TrainingStep(base, switches, batch, resolution)
    return Contender(name, step.run, step.result, dtype_of(switches), batch, is_opaque(switches))
