"""diffusers' networks and scheduler on the same weights: what a user of that library would run.

The training step is that of its textual-inversion example: the image is encoded in every step, the text
transformer keeps float32 weights and runs under autocast, and AdamW moves the whole token table, of which all rows but
the new ones are put back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaluation.benchmark.measure import Contender
from evaluation.benchmark.models import convert, dtype_of
from evaluation.benchmark.ours import RandomImages, Sampling, mix
from evaluation.benchmark.switches import Work
from ldm.conditioning.stages import stage_of
from ldm.export.diffusers_networks import build_networks
from ldm.files.diffusers_layout import to_compvis
from ldm.models.diffusion.sampling import draw_noise, seeded_generators

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion


class Peer:
    """`unet`, `vae` and `text_encoder` of diffusers and transformers, with the weights of `base`."""

    def __init__(self, base: LatentDiffusion, switches: frozenset[str], compiled: bool) -> None:
        self.base, self.dtype = base, dtype_of(switches)
        sizes: Any = base.unet_sizes
        with torch.device("meta"):
            parts: dict[str, Any] = build_networks(base, sizes, resolution=512)
        _share_weights(parts, base)
        self.text_encoder = parts["text_encoder"]
        _number_positions(self.text_encoder, base.device)
        self.unet, self.vae = (parts[name].requires_grad_(False).eval() for name in ("unet", "vae"))
        for part in (self.unet, self.vae):
            convert(part, self.dtype, "channels_last" in switches)
        if compiled:
            self.unet = torch.compile(self.unet, fullgraph=True)
            self.vae.decoder = torch.compile(self.vae.decoder, fullgraph=True)

    def scheduler(self) -> Any:
        from diffusers import DDIMScheduler

        return DDIMScheduler(
            self.base.num_timesteps,
            trained_betas=torch.as_tensor(self.base.betas).cpu().numpy(),
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            prediction_type={"eps": "epsilon", "v": "v_prediction"}[self.base.parameterization],
        )


def _share_weights(parts: dict[str, nn.Module], base: LatentDiffusion) -> None:
    """Give every parameter the tensor that has its place in the CompVis layout."""
    theirs = {part: network.state_dict() for part, network in parts.items()}
    ours = base.state_dict()
    names = iter(to_compvis(theirs))  # in the order of their keys
    for part, state in theirs.items():
        shared = {key: ours[next(names)].view(tensor.shape) for key, tensor in state.items()}
        parts[part].load_state_dict(shared, assign=True)


def _number_positions(text_encoder: nn.Module, device: torch.device) -> None:
    """Make the buffers that are not in a state dict, position numbers, which were made without memory."""
    for module in text_encoder.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.arange(buffer.shape[-1], device=device).expand(buffer.shape)


class PeerTraining:
    """diffusers' textual inversion. The new tokens, one for each stage, begin as our learned vectors."""

    def __init__(self, peer: Peer, work: Work) -> None:
        base = peer.base
        self.peer, self.base = peer, base
        batch = RandomImages(work).batch(range(work.batch), with_images=True)
        self.images = batch["image"].permute(0, 3, 1, 2).to(base.device, peer.dtype)
        self.draw = {name: values.to(base.device) for name, values in base._draw(batch, "train").items()}
        self.scheduler = peer.scheduler()
        encoder = peer.text_encoder.requires_grad_(False).train()
        manager: Any = base.embedding_manager
        vectors = manager.vectors().detach()
        table = torch.cat([base.cond_stage_model.token_table, vectors.to(base.device)])
        encoder.set_input_embeddings(nn.Embedding.from_pretrained(table, freeze=False))
        self.table = encoder.get_input_embeddings().weight
        self.original = self.table.detach().clone()
        self.words = len(table) - len(vectors)  # the tokens after these are new
        cond: Any = base.get_learned_conditioning(batch["caption"])
        slots = cond.rows(self.draw["t"])
        self.ids = torch.where(slots < 0, self.words - 1 - slots, slots)
        self.optimizer = torch.optim.AdamW([self.table], lr=base.learning_rate)

    def loss(self) -> Tensor:
        peer, draw = self.peer, self.draw
        with torch.no_grad():
            posterior = peer.vae.encode(self.images).latent_dist
            z = posterior.mean + posterior.std * draw["posterior_noise"].to(peer.dtype)
            z = z * self.base.scale_factor
        noise, t = draw["noise"].to(peer.dtype), draw["t"]
        half = peer.dtype if peer.dtype != torch.float32 else None
        with torch.autocast(self.ids.device.type, half, enabled=half is not None):
            context = peer.text_encoder(self.ids).last_hidden_state.to(peer.dtype)
        prediction = peer.unet(self.scheduler.add_noise(z, noise, t), t, context).sample
        target = noise if self.base.parameterization == "eps" else self.scheduler.get_velocity(z, noise, t)
        return F.mse_loss(prediction.float(), target.float())

    def run(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            self.table[: self.words] = self.original[: self.words]

    def result(self) -> Tensor:
        return self.loss().detach().view(1)


class PeerSampling:
    """The loop of diffusers' pipeline; its contexts are made as ours are, and change with the stage."""

    def __init__(self, peer: Peer, work: Work) -> None:
        self.peer, self.work = peer, work
        text = frozenset({"text_batch", str(peer.dtype).removeprefix("torch.")}) - {"float32"}
        self.ours = Sampling(peer.base, text, work)

    @torch.no_grad()
    def run(self) -> Tensor:
        peer, base, scheduler = self.peer, self.peer.base, self.peer.scheduler()
        scheduler.set_timesteps(self.work.steps, device=base.device)
        parts = self.ours.conditionings(self.work.batch)
        stages = [
            torch.cat([part.at(s * base.num_timesteps // base.num_stages).k for part in parts]).to(peer.dtype)
            for s in range(base.num_stages)
        ]
        shape = (self.work.batch, *self.ours.shape)
        x = draw_noise(seeded_generators(range(self.work.batch)), shape, base.device).to(peer.dtype)
        for t, on_host in zip(scheduler.timesteps, scheduler.timesteps.tolist(), strict=True):
            context = stages[stage_of(on_host, base.num_stages, base.num_timesteps)]
            prediction = peer.unet(torch.cat([x, x]), t, context).sample
            x = scheduler.step(mix(*prediction.chunk(2)), on_host, x).prev_sample
        return peer.vae.decode(x / base.scale_factor).sample.float()


def contender(base: LatentDiffusion, work: Work, switches: frozenset[str], name: str) -> Contender:
    """Return the way of `diffusers`(`-compiled`); of the switches, float16, bfloat16 and channels_last count."""
    if work.what not in ("train", "sample", "vae"):
        raise ValueError(f"There is no comparison with {name} for '{work.what}'; it can be train, sample or vae.")
    compiled = name.endswith("compiled")
    peer = Peer(base, switches, compiled)
    if work.what == "train":
        training = PeerTraining(peer, work)
        return Contender(name, training.run, training.result, peer.dtype, work.batch, compiled)
    images = RandomImages(work).all().to(base.device, peer.dtype)

    @torch.no_grad()
    def code() -> Tensor:
        return peer.vae.decode(peer.vae.encode(images).latent_dist.mean).sample.float()

    run = PeerSampling(peer, work).run if work.what == "sample" else code
    return Contender(name, run, run, peer.dtype, work.batch, compiled)
