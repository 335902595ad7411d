"""The first stages: their distributions, shapes and training."""

from collections.abc import Callable

import pytest
import torch

from ldm.models.autoencoder import AutoencoderKL, DiagonalGaussianDistribution, FirstStage, VQModelInterface
from ldm.models.diffusion.ddpm import LatentDiffusion

SMALL = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 16,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 8,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [8],
    "norm_num_groups": 4,
}


def test_the_posterior_of_extreme_moments() -> None:
    posterior = DiagonalGaussianDistribution(torch.tensor([0.0, 1.0, -100.0, 100.0]).view(1, 4, 1, 1))
    assert posterior.logvar.flatten().tolist() == [-30, 20]
    posterior = DiagonalGaussianDistribution(torch.randn(2, 8, 4, 4))
    standard = torch.distributions.Normal(torch.zeros(()), torch.ones(()))
    kl = torch.distributions.kl_divergence(torch.distributions.Normal(posterior.mean, posterior.std), standard)
    torch.testing.assert_close(posterior.kl(), kl.sum(dim=(1, 2, 3)))


def test_samples_have_the_posteriors_spread() -> None:
    moments = torch.cat([torch.full((1, 1, 100, 100), 3.0), torch.full((1, 1, 100, 100), 4.0).log()], dim=1)
    sample = DiagonalGaussianDistribution(moments).sample()
    assert sample.mean() == pytest.approx(3, abs=0.1) and sample.std() == pytest.approx(2, abs=0.1)


def small_kl() -> FirstStage:
    return AutoencoderKL(SMALL, embed_dim=4)


def small_vq() -> FirstStage:
    return VQModelInterface({**SMALL, "double_z": False}, n_embed=32, embed_dim=4)


@pytest.mark.parametrize("build", [small_kl, small_vq])
def test_training_lowers_the_loss_and_reaches_every_weight(build: Callable[[], FirstStage]) -> None:
    torch.manual_seed(0)
    model = build().train()
    model.log = lambda *args, **kwargs: None  # there is no trainer to log to
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batch = {"image": torch.rand(2, 16, 16, 3) * 2 - 1}
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model.training_step(batch, 0)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert losses[-1] < 0.9 * losses[0]


@torch.no_grad()
def test_shapes_of_a_kl_first_stage() -> None:
    model = small_kl().eval()
    images = torch.rand(2, 3, 16, 24)
    decoded, posterior = model(images, sample_posterior=False)
    assert posterior.mean.shape == (2, 4, 8, 12) and decoded.shape == images.shape
    assert torch.equal(decoded, model.decode(posterior.mode()))
    noisy = model(images)[0]
    assert not torch.equal(noisy, decoded), "a sample was asked for"


@torch.no_grad()
def test_a_vq_first_stage_decodes_entries_of_its_codebook() -> None:
    model = small_vq().eval()
    images = torch.rand(2, 3, 16, 24)
    z = model.encode(images)
    assert z.shape == (2, 4, 8, 12)
    assert model.decode(z).shape == images.shape
    codebook = model.quantize.embedding.weight
    assert codebook.shape == (32, 4)
    nearest = codebook[torch.cdist(z.permute(0, 2, 3, 1).reshape(-1, 4), codebook).argmin(dim=1)]
    expected = model.decoder(model.post_quant_conv(nearest.view(2, 8, 12, 4).permute(0, 3, 1, 2)))
    torch.testing.assert_close(model.decode(z), expected, rtol=1e-4, atol=1e-5)


def test_a_vq_first_stage_serves_latent_diffusion(tiny_model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiny_model._modules, "first_stage_model", small_vq().eval())
    images = torch.rand(1, 3, 16, 16)
    latents = tiny_model.get_first_stage_encoding(tiny_model.encode_first_stage(images))
    assert latents.shape == (1, 4, 8, 8)
    assert tiny_model.decode_first_stage(latents).shape == images.shape


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="must be divisible by num_groups"):
        AutoencoderKL({**SMALL, "norm_num_groups": 3}, embed_dim=4)
    with pytest.raises(TypeError, match="unexpected keyword argument 'blocks'"):
        AutoencoderKL({**SMALL, "blocks": 3}, embed_dim=4)
