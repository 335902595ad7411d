"""The samplers: diffusers' schedulers as an oracle, and what LDM code expects of the classes."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import tiny
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, PNDMScheduler
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from tiny import Recorder, close
from torch import Tensor

from ldm.conditioning.context import Conditioning
from ldm.models.diffusion.ddim import DDIMSampler, ddim
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.plms import PLMSSampler, plms
from ldm.models.diffusion.sampling import Sampler, guided, seeded_generators
from ldm.models.diffusion.schedule import ddim_parameters, ddim_timesteps

X_T = tiny.golden("sample")["x_T"]
DIFFUSERS = {"beta_start": 0.00085, "beta_end": 0.0120, "beta_schedule": "scaled_linear", "steps_offset": 1}


# diffusers as an oracle


@pytest.fixture
def predict(tiny_model: LatentDiffusion) -> Callable[[Tensor, int], Tensor]:
    """What the tiny U-Net says with the context of each stage."""
    contexts = tiny.stage_contexts()
    return lambda x, t: tiny_model.apply_model(x, torch.tensor([t]), contexts)


@torch.no_grad()
def theirs(scheduler: DDIMScheduler | PNDMScheduler, predict: Callable[[Tensor, int], Tensor], steps: int) -> Tensor:
    scheduler.set_timesteps(steps)
    x = X_T
    for t in scheduler.timesteps:
        x = scheduler.step(predict(x, int(t)), t, x).prev_sample
    return x


def our_schedule(steps: int, spacing: str = "leading") -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    timesteps = ddim_timesteps(steps, spacing=spacing)
    alphas_cumprod = DDIMScheduler(1000, **DIFFUSERS).alphas_cumprod.double().numpy()
    return timesteps, *ddim_parameters(alphas_cumprod, timesteps, eta=0.0)


# diffusers spaces timesteps by floor(1000 / S), so the numbers of steps are divisors of 1000
@pytest.mark.parametrize("steps", [1, 5, 20])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddim_is_that_of_diffusers(predict: Callable[[Tensor, int], Tensor], steps: int, spacing: str) -> None:
    options = {"clip_sample": False, "set_alpha_to_one": False, "timestep_spacing": spacing}
    scheduler = DDIMScheduler(1000, **DIFFUSERS, **options)
    close(ddim(predict, X_T, *our_schedule(steps, spacing)), theirs(scheduler, predict, steps))


class ForEachPrompt(DPMSolverMultistepScheduler):
    """diffusers' solver, told to forget the earlier prediction where another of the S prompts is read."""

    prompts = 1

    def step(self, model_output: Tensor, timestep: Tensor, *rest: object, **others: object) -> object:
        if (
            self.step_index
            and len({int(t) * self.prompts // 1000 for t in self.timesteps[self.step_index - 1 :][:2]}) > 1
        ):
            self.lower_order_nums = 0
        return super().step(model_output, timestep, *rest, **others)


# the number of steps need not divide 1000
@pytest.mark.parametrize("steps", [1, 2, 12])
@pytest.mark.parametrize("prompts", [1, 4, 10])
def test_dpmpp_2m_is_that_of_diffusers(tiny_model: LatentDiffusion, steps: int, prompts: int) -> None:
    """Second order within a prompt, first order at the first and the last step and where the prompt changes."""
    contexts = [tiny.context(f"stage{i}") for i in range(prompts)]
    scheduler = ForEachPrompt(1000, **DIFFUSERS, timestep_spacing="trailing")
    scheduler.prompts = prompts
    calls: list[int] = []

    def predict(x: Tensor, t: int) -> Tensor:
        calls.append(t)
        return tiny_model.apply_model(x, torch.tensor([t]), contexts)

    expected, recorder = theirs(scheduler, predict, steps), Recorder()
    found, _ = DPMSolverSampler(tiny_model).sample(steps, 1, (4, 8, 8), contexts, x_T=X_T, step_callback=recorder)
    close(found, expected)
    assert [t for _, t in recorder.steps] == calls == ddim_timesteps(steps, spacing="trailing")[::-1].tolist()


def test_the_solver_restarts_where_guidance_changes(tiny_model: LatentDiffusion) -> None:
    cond, uncond = tiny.context("stage0"), tiny.context("uncond")
    changing = guided(tiny_model, cond, uncond, [1.0, 1.0, 5.0, 5.0, 5.0])
    assert [changing.differs(t, t + 200) for t in (100, 300, 500, 700)] == [[False], [True], [False], [False]]
    same = tiny.context("stage1")
    words = guided(tiny_model, [same, same, cond])
    assert [words.differs(t, 700) for t in (100, 400, 699)] == [[True], [True], [False]]
    assert words.differs(100, 400) == [False], "two stages with one prompt are one prompt"
    both = guided(tiny_model, [torch.cat([same, same]), torch.cat([same, cond])])
    assert both.differs(100, 700) == [False, True], "each image of a batch has its own prompt"


def test_trailing_timesteps_share_the_stages_equally() -> None:
    for steps in (10, 20, 30, 50):
        timesteps = ddim_timesteps(steps, spacing="trailing")
        assert timesteps[-1] == 999 and np.bincount(timesteps // 100).tolist() == [steps // 10] * 10


@pytest.mark.parametrize(("kind", "first"), [(DDIMSampler, 981), (PLMSSampler, 981), (DPMSolverSampler, 999)])
def test_every_sampler_has_a_spacing_of_its_own(tiny_model: LatentDiffusion, kind: type[Sampler], first: int) -> None:
    sampler = kind(tiny_model)
    for spacing, expected in {None: first, "uniform": 981, "leading": 981, "trailing": 999}.items():
        sampler.make_schedule(50, spacing)
        assert sampler.ddim_timesteps[-1] == expected


@pytest.mark.parametrize("steps", [2, 4, 10])
def test_plms_is_that_of_diffusers(predict: Callable[[Tensor, int], Tensor], steps: int) -> None:
    """The prompt of a call is that of its own timestep, in the second call of the first step too."""
    scheduler = PNDMScheduler(1000, **DIFFUSERS, skip_prk_steps=True, set_alpha_to_one=False)
    calls: list[int] = []

    def counted(x: Tensor, t: int) -> Tensor:
        calls.append(t)
        return predict(x, t)

    expected = theirs(scheduler, counted, steps)
    their_calls = calls.copy()
    calls.clear()
    close(plms(counted, X_T, *our_schedule(steps)[:3]), expected)
    assert calls == their_calls and len(calls) == steps + 1


def test_v_prediction_is_that_of_diffusers(
    tiny_model: LatentDiffusion, predict: Callable[[Tensor, int], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"clip_sample": False, "set_alpha_to_one": False, "prediction_type": "v_prediction"}
    expected = theirs(DDIMScheduler(1000, **DIFFUSERS, **options), predict, 10)
    monkeypatch.setattr(tiny_model, "parameterization", "v")
    denoise = guided(tiny_model, tiny.stage_contexts())
    close(ddim(denoise, X_T, *our_schedule(10)), expected)


def test_guided_v_prediction(tiny_model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guidance is linear, so it may be applied to v or to the noise."""
    monkeypatch.setattr(tiny_model, "parameterization", "v")
    cond, uncond, x, t = tiny.context("stage0"), tiny.context("uncond"), X_T, torch.tensor([500])
    with torch.no_grad():
        v, v_uncond = (tiny_model.apply_model(x, t, context) for context in (cond, uncond))
        expected = tiny_model.to_eps(v_uncond + 5 * (v - v_uncond), x, t)
        close(guided(tiny_model, cond, uncond, 5.0)(x, 500), expected)


# Guidance by stage


@contextlib.contextmanager
def counted_rows(model: LatentDiffusion) -> Iterator[list[int]]:
    """The batch of every call of the U-Net."""
    rows: list[int] = []
    handle = model.model.diffusion_model.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    yield rows
    handle.remove()


def led(model: LatentDiffusion, scale: float | list[float], **options: object) -> Tensor:
    cond, uncond = tiny.stage_contexts(), tiny.context("uncond")
    denoise = guided(model, cond, uncond, scale, **options)
    return ddim(denoise, X_T, *our_schedule(10))


def test_a_constant_list_of_scales_is_one_scale(tiny_model: LatentDiffusion) -> None:
    for scale in (7.5, 1.0):
        assert torch.equal(led(tiny_model, [scale] * 10), led(tiny_model, scale))
    assert torch.equal(led(tiny_model, [7.5] * 3), led(tiny_model, 7.5))


def test_a_stage_without_guidance_makes_one_prediction(tiny_model: LatentDiffusion) -> None:
    with counted_rows(tiny_model) as rows:
        led(tiny_model, [1, 1, 7.5, 7.5, 1, 3, 7.5, 7.5, 7.5, 7.5])
    assert rows == [2] * 5 + [1] + [2] * 2 + [1] * 2  # a call for each stage, from the last one down


def test_the_scale_of_a_call_is_that_of_its_stage(tiny_model: LatentDiffusion) -> None:
    cond, uncond, x = tiny.context("stage0"), tiny.context("uncond"), X_T
    by_stage = guided(tiny_model, cond, uncond, [float(stage) for stage in range(10)])
    for t in (0, 99, 100, 350, 999):
        assert torch.equal(by_stage(x, t), guided(tiny_model, cond, uncond, float(t // 100))(x, t))


def test_rescaled_guidance_is_that_of_diffusers(tiny_model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    cond, uncond, x, t = tiny.context("stage0"), tiny.context("uncond"), X_T, torch.tensor([500])
    with torch.no_grad():
        text, empty = (tiny_model.apply_model(x, t, context) for context in (cond, uncond))
        expected = rescale_noise_cfg(empty + 9 * (text - empty), text, 0.7)
        close(guided(tiny_model, cond, uncond, 9.0, rescale=0.7)(x, 500), expected)
        monkeypatch.setattr(tiny_model, "parameterization", "v")  # what the network predicts is rescaled
        close(guided(tiny_model, cond, uncond, 9.0, rescale=0.7)(x, 500), tiny_model.to_eps(expected, x, t))
        assert torch.equal(led(tiny_model, 1.0, rescale=0.7), led(tiny_model, 1.0))


# Batches and seeds

SAMPLERS = [(DDIMSampler, 0.0), (DDIMSampler, 0.5), (PLMSSampler, 0.0), (DPMSolverSampler, 0.0)]


def sample(
    model: LatentDiffusion, kind: type[Sampler], eta: float, seeds: Sequence[int], prompts: Sequence[str]
) -> Tensor:
    latents, _ = kind(model).sample(
        S=5,
        batch_size=len(seeds),
        shape=(4, 8, 8),
        conditioning=model.get_learned_conditioning(prompts),
        eta=eta,
        unconditional_guidance_scale=5.0,
        unconditional_conditioning=model.get_learned_conditioning([""] * len(seeds)),
        generators=seeded_generators(seeds),
    )
    return latents


@pytest.mark.parametrize(("kind", "eta"), SAMPLERS)
def test_a_picture_does_not_depend_on_its_batch(tiny_model: LatentDiffusion, kind: type[Sampler], eta: float) -> None:
    prompts = ["a *", "a dog"]
    together = sample(tiny_model, kind, eta, [1, 2], prompts)
    for i in range(2):
        close(sample(tiny_model, kind, eta, [1 + i], prompts[i : i + 1]), together[i : i + 1])
    assert (together[0] - together[1]).abs().max() > 0.1
    assert torch.equal(sample(tiny_model, kind, eta, [1, 2], prompts), together)


def test_without_generators_the_global_seed_decides(tiny_model: LatentDiffusion) -> None:
    def run() -> Tensor:
        return DDIMSampler(tiny_model).sample(2, 1, (4, 8, 8), tiny.context("stage0"), eta=1.0)[0]

    torch.manual_seed(5)
    first = run()
    assert not torch.equal(run(), first)
    torch.manual_seed(5)
    assert torch.equal(run(), first)


@pytest.mark.parametrize("shape", [(4, 8, 12), (4, 16, 8)])
def test_other_shapes(tiny_model: LatentDiffusion, shape: tuple[int, ...]) -> None:
    latents, _ = DDIMSampler(tiny_model).sample(2, 1, shape, tiny.context("stage0"))
    assert latents.shape == (1, *shape)
    assert tiny_model.decode_first_stage(latents).shape == (1, 3, 8 * shape[1], 8 * shape[2])


# The classes, as LDM code uses them


@pytest.mark.parametrize("kind", [DDIMSampler, PLMSSampler])
def test_callbacks_and_intermediates(tiny_model: LatentDiffusion, kind: type[Sampler]) -> None:
    steps: list[int] = []
    predictions: list[tuple[int, Tensor]] = []
    recorder = Recorder()
    latents, intermediates = kind(tiny_model).sample(
        7,
        1,
        (4, 8, 8),
        tiny.context("stage0"),
        x_T=X_T,
        callback=steps.append,
        img_callback=lambda x_0, step: predictions.append((step, x_0)),
        log_every_t=3,
        step_callback=recorder,
    )
    assert steps == list(range(7)) == [step for step, _ in predictions]
    assert recorder.steps == list(enumerate([858, 715, 572, 429, 286, 143, 1]))
    assert torch.equal(recorder.pairs[-1][:1], latents)
    assert all(torch.equal(x_0, pair[1:]) for (_, x_0), pair in zip(predictions, recorder.pairs, strict=True))
    kept = [recorder.pairs[i] for i in (0, 3, 6)]  # the first step, and every third counted from the end
    expected = {"x_inter": [X_T, *(pair[:1] for pair in kept)]}
    expected["pred_x0"] = [X_T, *(pair[1:] for pair in kept)]
    assert set(intermediates) == set(expected)
    for name, tensors in expected.items():
        assert torch.equal(torch.stack(intermediates[name]), torch.stack(tensors))


def test_noising_to_an_entry_or_to_a_timestep(tiny_model: LatentDiffusion) -> None:
    sampler = DDIMSampler(tiny_model)
    sampler.make_schedule(20)
    x0, noise = X_T.repeat(2, 1, 1, 1), torch.randn(2, 4, 8, 8)
    entries = torch.tensor([3, 20])  # the second is one past the end: all the way to the last entry
    expected = tiny_model.q_sample(x0, torch.tensor([151, 951]), noise)
    assert torch.equal(sampler.stochastic_encode(x0, entries, noise=noise), expected)
    raw = sampler.stochastic_encode(x0, torch.tensor([151, 951]), use_original_steps=True, noise=noise)
    assert torch.equal(raw, expected)


@pytest.mark.parametrize("kind", [DDIMSampler, PLMSSampler])
@pytest.mark.parametrize(
    ("t_start", "calls"), [(0, []), (2, [101, 1]), (10, range(901, 0, -100)), (11, range(901, 0, -100))]
)
def test_decoding_from_any_strength(
    tiny_model: LatentDiffusion, kind: type[Sampler], t_start: int, calls: Sequence[int]
) -> None:
    sampler, recorder = kind(tiny_model), Recorder()
    sampler.make_schedule(10)
    x = X_T
    latents = sampler.decode(x, tiny.context("stage0"), t_start, step_callback=recorder)
    assert [t for _, t in recorder.steps] == list(calls)
    assert torch.equal(latents, x) == (t_start == 0)
    if t_start >= 10:
        assert torch.equal(latents, sampler.sample(10, 1, (4, 8, 8), tiny.context("stage0"), x_T=x)[0])


def test_sampling_changes_no_start_and_leaves_no_graph(
    tiny_model: LatentDiffusion, teddy: Conditioning, empty: Conditioning
) -> None:
    start = X_T.clone()
    latents, _ = PLMSSampler(tiny_model).sample(
        2, 1, (4, 8, 8), teddy, x_T=start, unconditional_guidance_scale=3.0, unconditional_conditioning=empty
    )
    assert torch.equal(start, X_T)
    assert not latents.requires_grad and not tiny_model.decode_first_stage(latents).requires_grad


def test_guidance_needs_an_unconditional_prompt(tiny_model: LatentDiffusion) -> None:
    with pytest.raises(ValueError, match="scale of 5.0 needs unconditional_conditioning"):
        DDIMSampler(tiny_model).sample(2, 1, (4, 8, 8), tiny.context("stage0"), unconditional_guidance_scale=5.0)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (DDIMSampler, {"ddim_num_steps": 0}, "1..1000, not 0"),
        (DDIMSampler, {"ddim_num_steps": 1001}, "1..1000, not 1001"),
        (DDIMSampler, {"ddim_num_steps": 10, "ddim_eta": -0.1}, "must be in 0..1 .*, not -0.1"),
        (DDIMSampler, {"ddim_num_steps": 10, "ddim_eta": float("nan")}, "must be in 0..1"),
        (DDIMSampler, {"ddim_num_steps": 10, "ddim_eta": 1.05}, "must be in 0..1 .*, not 1.05"),
        (DDIMSampler, {"ddim_num_steps": 10, "ddim_discretize": "quad"}, "not 'quad'"),
        (PLMSSampler, {"ddim_num_steps": 10, "ddim_eta": 0.5}, "ddim_eta must be in 0..0 for PLMSSampler, not 0.5"),
    ],
)
def test_wrong_settings_are_refused(
    tiny_model: LatentDiffusion, kind: type[Sampler], arguments: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        kind(tiny_model).make_schedule(**arguments)
