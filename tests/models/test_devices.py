"""What a GPU would refuse, shown without one: the `meta` device mixes with no other and cannot be read.

Learning, sampling and editing run there at the small model's and at Stable Diffusion's real size, in every precision;
in the fast suite the real size in float16 alone, and each method at the small one.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from evaluation.benchmark.memory import editing_peak, inversion_peak, learning_peak, sampling_peak
from evaluation.benchmark.models import meta_model
from evaluation.benchmark.switches import DEFAULTS
from ldm.editing.inversion import record
from ldm.models.autoencoder import FirstStage
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.latents import LatentCache
from ldm.models.diffusion.plms import PLMSSampler
from ldm.models.diffusion.sampling import Sampler, seeded_generators
from ldm.modules.attention import Site

SIZES = {"demo": 16, "sd-v1": 64}  # latent height and width
DTYPES = ("float32", "float16", "bfloat16")
WORDS = ["a * thing"] * 5 + [None] * 4 + ["a thing"]


CASES = [("demo", "float32"), ("demo", "float16"), ("sd-v1", "float16")]
SLOW = [pytest.param(case, marks=pytest.mark.slow) for case in itertools.product(SIZES, DTYPES) if case not in CASES]


@pytest.fixture(scope="module", params=[*CASES, *SLOW], ids="-".join)
def case(request: pytest.FixtureRequest) -> tuple[LatentDiffusion, int]:
    size, dtype = request.param
    return meta_model(size, frozen_dtype=dtype, embedding_reg_weight=0.1, balanced_loss=True), SIZES[size]


@pytest.fixture(autouse=True)
def _unread_first_stage(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without the one question that float16 asks of the first stage: whether its values are finite."""

    def in_range(self: FirstStage, function: Callable[[Tensor], Any], x: Tensor) -> Any:
        return function(x.to(next(self.parameters()).dtype)).float()

    monkeypatch.setattr(FirstStage, "in_range", in_range)
    yield


def test_everything_moves_with_the_model(case: tuple[LatentDiffusion, int]) -> None:
    model, _ = case
    assert all(x.is_meta for x in (*model.parameters(), *model.buffers()))


def test_a_learning_step_asks_the_device_nothing(case: tuple[LatentDiffusion, int]) -> None:
    learn(*case)


METHODS = ("textual-inversion", "xti", "table", "neti", "catversion")


@pytest.mark.parametrize("size", ["demo", pytest.param("sd-v1", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_and_samples_there(method: str, size: str) -> None:
    params: dict[str, Any] = {"method": method}
    if method == "neti":  # whose norm is that of a token embedding, read when the model is built
        params["method_params"] = {"normalize": None}
    model = meta_model(size, **{f"personalization_config.params.{key}": value for key, value in params.items()})
    learn(model, SIZES[size])
    sample(model, SIZES[size], DDIMSampler)


def learn(model: LatentDiffusion, side: int) -> None:
    """A step from cached latents."""
    model.train()
    model._latents = LatentCache.__new__(LatentCache)
    model._latents.flips = True
    model._latents.moments = torch.empty(4, 2 * model.channels, side, side, device="meta")
    batch = {
        "caption": ["*", "*"],
        "image_number": torch.tensor([0, 1]),
        "flipped": torch.tensor([False, True]),
        "sample": torch.tensor([0, 1]),
    }
    loss, parts = model.shared_step(batch, "train")
    loss.backward()
    model.configure_optimizers().step()
    with pytest.raises(RuntimeError, match="meta"):
        loss.item()
    assert loss.is_meta and all(part.is_meta for part in parts.values())
    learned = model.trainable_parameters()
    assert any(p.grad is not None for p in learned) and all(p.grad is None or p.grad.is_meta for p in learned)
    assert all(p.grad is None for p in model.model.parameters())
    model.zero_grad()


@pytest.mark.parametrize("sampler", [DDIMSampler, PLMSSampler])
def test_sampling_asks_the_device_nothing(case: tuple[LatentDiffusion, int], sampler: type[Sampler]) -> None:
    sample(*case, sampler)


@torch.no_grad()
def sample(model: LatentDiffusion, side: int, sampler: type[Sampler]) -> None:
    """Two guided steps with a prompt for each stage, and decoding."""
    model.eval()
    seen: list[tuple[int, Tensor]] = []
    latents, _ = sampler(model).sample(
        S=2,
        batch_size=2,
        shape=(model.channels, side, side),
        conditioning=model.get_learned_conditioning(["*", "a *"], WORDS),
        eta=0.5 if sampler is DDIMSampler else 0.0,
        unconditional_guidance_scale=5.0,
        unconditional_conditioning=model.get_unconditional("a thing", 2),
        generators=seeded_generators([0, 1]),
        step_callback=lambda step, t, x, x_0: seen.append((t, x)),
    )
    assert latents.is_meta and all(isinstance(t, int) and x.is_meta for t, x in seen) and len(seen) == 2
    assert model.decode_first_stage(latents).is_meta


@torch.no_grad()
def test_editing_asks_the_device_nothing(case: tuple[LatentDiffusion, int]) -> None:
    model, side = case
    model.eval()
    pixels = side * model.first_stage_model.downsampling
    posterior = model.encode_first_stage(torch.empty(1, 3, pixels, pixels))
    z = model.get_first_stage_encoding(posterior, torch.randn(1, model.channels, side, side))
    sampler = DDIMSampler(model)
    sampler.make_schedule(4)
    x = sampler.stochastic_encode(z, torch.tensor([2]), noise=torch.randn(1, model.channels, side, side))
    sites: list[Site] = []

    def hook(probabilities: Tensor, site: Site) -> Tensor:
        sites.append(site)
        return probabilities * 1.0

    cond = model.get_learned_conditioning(["*"], WORDS)
    assert sampler.decode(x, cond, 2, 5.0, model.get_unconditional()).is_meta
    t = torch.full((1,), 500, device="meta")
    assert model.apply_model(x, t, cond.at(500), hook).is_meta
    assert len(sites) == 2 * model.model.diffusion_model.num_attention_layers


def test_inversion_asks_the_device_nothing(case: tuple[LatentDiffusion, int]) -> None:
    """The path with its maps, and a step of what is learned of it, in any precision."""
    model, side = case
    model.eval()
    resolution = side * model.first_stage_model.downsampling
    if model.model.diffusion_model.dtype == torch.float32:
        assert inversion_peak(model, resolution, steps=2) > editing_peak(model, resolution) / 20
    else:
        cond, z = model.get_unconditional("a thing"), torch.empty(1, model.channels, side, side, device="meta")
        way = record(model, z, cond, 2, maps=True)
        assert way.path[-1].is_meta and all(m.is_meta for maps in way.maps for m in maps)
        assert editing_peak(model, resolution) > 0


def test_counted_memory() -> None:
    """Learning at 512² in half precision fits into 6 GB."""
    full, half = meta_model(), DEFAULTS | {"bfloat16"}
    weights = sum(p.nbytes for p in full.parameters()) // 2
    assert weights < learning_peak(full, 512, 1, half) < 6e9 and weights < sampling_peak(full, 512, 1, half) < 6e9


def test_counted_memory_of_a_switch() -> None:
    small = meta_model("demo")
    learning, sampling = learning_peak(small, 256, 4), sampling_peak(small, 256, 4)
    assert learning_peak(small, 256, 4, DEFAULTS - {"attention"}) > learning  # the probabilities are kept
    assert learning_peak(small, 256, 4, DEFAULTS - {"frozen"}) > learning  # gradients of all weights
    assert sampling_peak(small, 256, 4, DEFAULTS | {"decode_slices"}) < sampling
    checkpointed = meta_model("demo", **{"unet_config.params.use_checkpoint": True})
    assert learning_peak(checkpointed, 256, 4) < learning
