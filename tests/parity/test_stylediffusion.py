"""StyleDiffusion, its baselines and masks against numbers recorded from the running reference.

tests/golden/stylediffusion/README.md says what was recorded; chains are compared step by step from recorded states.
"""

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from evaluation.metrics.ns_lpips import mask_tensor, masked_pair, ns_lpips
from ldm.conditioning.context import Context, as_conditioning
from ldm.config import instantiate_from_config, load_config
from ldm.editing import alignment, blend, control
from ldm.editing.alignment import PromptTokens
from ldm.editing.control import AttentionControl, MapStore, Rules, edit_attention
from ldm.editing.edit import Branches, Plan, denoise_pair
from ldm.editing.image import clip_input, image_latents, tower_features
from ldm.editing.inversion import (
    Progress,
    Sweep,
    Trajectory,
    inversion_timesteps,
    layers_of,
    learn_path,
    move,
    predict,
    record,
    step_of,
)
from ldm.editing.masks import average_maps, mask_of
from ldm.editing.request import InversionOptions
from ldm.files.embedding_formats import read_modules
from ldm.files.images import fit, to_pil
from ldm.methods.base import StepChange
from ldm.methods.null_text import NullContexts, NullText, TextContexts, TextInversion
from ldm.methods.stylediffusion import MappingNetwork, StyleDiffusion, inner_iterations, modulate, networks_from
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.sampling import draw_noise, guided, seeded_generators
from ldm.modules.attention import Site

FOLDER = Path(tiny.GOLDEN) / "stylediffusion"
META: dict[str, Any] = json.loads((FOLDER / "meta.json").read_text(encoding="utf-8"))
TOKENS: dict[str, list[tuple[int, str]]] = json.loads((FOLDER / "words.json").read_text(encoding="utf-8"))
SEED, N = META["weight_seed"], META["N"]
BLEND = META["attention"]


def golden(name: str) -> dict[str, Tensor]:
    return load_file(FOLDER / f"{name}.safetensors")


def uniform24(key: str, *shape: int) -> Tensor:
    return torch.from_numpy(tiny.uniform(key, math.prod(shape), SEED)).view(shape)


def close(found: Tensor, expected: Tensor, relative: float = 1e-4) -> None:
    """Within a part of the largest value."""
    torch.testing.assert_close(found.float(), expected.float(), rtol=0, atol=relative * float(expected.abs().max()))


def tokens_of(text: str, compat: bool = True) -> PromptTokens:
    pairs = [(word, TOKENS[word]) for word in text.split(" ")]
    if not compat:
        return PromptTokens.of([(word, [i for i, _ in tokens]) for word, tokens in pairs], (49406, 49407))
    spelled = {i: spelling for _, tokens in pairs for i, spelling in tokens}
    ids = [49406, *(i for _, tokens in pairs for i, _ in tokens), 49407]
    return PromptTokens.by_length(text, ids, spelled.__getitem__)


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    config = load_config(FOLDER / "tiny-sd-a.yaml")
    params = config.model.params
    params.cond_stage_config.params.tokenizer = str(tiny.TOKENIZER)
    model = instantiate_from_config(config.model)
    tiny.fill(model.model.diffusion_model, tiny.UNET, SEED)
    tiny.fill(model.first_stage_model, tiny.FIRST_STAGE, SEED)
    tiny.fill(model.cond_stage_model.transformer.text_model, tiny.TEXT, SEED)
    with torch.no_grad():
        for name, parameter in model.model.named_parameters():
            if name.endswith("attn2.to_q.weight"):
                parameter *= META["attn2_to_q_gain"]
    return model.eval().requires_grad_(False)


@torch.no_grad()
def context_of(model: LatentDiffusion, text: str) -> Context:
    ids = [i for word in text.split(" ") if text for i, _ in TOKENS[word]]
    slots = [49406, *ids, 49407] + [49407] * (75 - len(ids))
    return model.cond_stage_model.encode(torch.tensor([slots]))


def mapping(step: int) -> MappingNetwork:
    network = MappingNetwork()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(tiny.tiny_tensor(f"mapping.{step}.{name}", tuple(parameter.shape), SEED))
    return network


def features() -> Tensor:
    return uniform24("features.image", 1, 197, 768) * np.float32(math.sqrt(3))


# Alignment


def test_timesteps_and_schedule(model: LatentDiffusion) -> None:
    for steps, entry in META["alignment"]["schedule"].items():
        assert inversion_timesteps(int(steps)).tolist() == entry["timesteps"][::-1]
    recorded = golden("alignment")["schedule.alphas_cumprod.every1"]
    np.testing.assert_allclose(model.host_alphas_cumprod, recorded.double().numpy(), rtol=1e-6)
    assert math.isclose(model.host_alphas_cumprod[0], META["alignment"]["final_alpha_cumprod"], rel_tol=1e-6)


@pytest.mark.parametrize("steps", META["alignment"]["thresholds"])
def test_thresholds(steps: str) -> None:
    n, target = int(steps), tokens_of("a dog")
    for tau, cross, own, uncond, value in META["alignment"]["thresholds"][steps]:
        assert int(alignment.cross_schedule(target, n, tau)[:, 0].sum()) == cross
        assert len(alignment.self_steps(n, tau)) == own == uncond
        assert len(alignment.value_steps(n, tau)) == value


def test_inner_iterations() -> None:
    for name, entry in META["inner_iterations"].items():
        inner = int(name.partition("inner")[2])
        assert [inner_iterations(i, inner) for i in range(len(entry["n"]))] == entry["n"]
    assert sum(inner_iterations(i) for i in range(30)) == 1015


@pytest.mark.parametrize("k", range(len(META["alignment"]["replace"])))
def test_replacement(k: int) -> None:
    entry, recorded = META["alignment"]["replace"][k], golden("alignment")
    source, target = tokens_of(entry["src"]), tokens_of(entry["tgt"])
    assert list(source.ids) == entry["src_ids"] and list(target.ids) == entry["tgt_ids"]
    expected = torch.zeros(77, 77)
    expected[tuple(recorded[f"replace.{k}.nonzero_ij"].long().T)] = recorded[f"replace.{k}.values"]
    assert torch.equal(alignment.replacement_mapper(source, target, compat=True), expected)
    right = alignment.replacement_mapper(tokens_of(entry["src"], False), tokens_of(entry["tgt"], False))
    if len(source.ids) == len(target.ids):
        assert torch.equal(right, expected)
    assert (right.sum(dim=0) > 0).all()  # no column is left empty


@pytest.mark.parametrize("k", range(len(META["alignment"]["refine"])))
def test_refinement(k: int) -> None:
    entry, recorded = META["alignment"]["refine"][k], golden("alignment")
    index, aligned = alignment.refinement_mapper(tokens_of(entry["src"]), tokens_of(entry["tgt"]))
    assert torch.equal(index, recorded[f"refine.{k}.map"]) and torch.equal(aligned, recorded[f"refine.{k}.alphas"])


@pytest.mark.parametrize(("text", "word", "places"), META["alignment"]["word_inds"])
def test_word_places(text: str, word: str, places: list[int]) -> None:
    assert tokens_of(text).places_of(word) == places
    right = tokens_of(text, compat=False).places_of(word)
    # double and leading blanks shift the reference's count; words are found all the same
    assert right == places or (places == [] and "  " in f" {text}" and right)


def test_equalizers_and_schedules() -> None:
    recorded = golden("alignment")
    for k, entry in enumerate(META["alignment"]["equalizers"]):
        words = [entry["words"]] if isinstance(entry["words"], str) else entry["words"]
        weights = dict(zip(words, entry["values"], strict=False))
        assert torch.equal(alignment.equalizer(tokens_of(entry["text"]), weights), recorded[f"equalizer.{k}"][0])
    for k, entry in enumerate(META["alignment"]["alpha"]):
        tau = entry["cross_replace_steps"]
        words = {w: tuple(s) if isinstance(s, list) else s for w, s in tau.items()} if isinstance(tau, dict) else {}
        default = words.pop("default_", 1.0) if words or isinstance(tau, dict) else tau
        default = tuple(default) if isinstance(default, list) else default
        found = alignment.cross_schedule(tokens_of(entry["tgt"]), entry["N"], default, words)
        assert torch.equal(found, recorded[f"alpha.{k}"].float())


# Attention, without a network


def rules_of(run: dict[str, Any], steps: int, weighted: bool = True, tau: Any = None, words: Any = None) -> Rules:
    source, target = map(tokens_of, run["prompts"])
    if run["type"] == "Refinement":
        edit = control.refine(*alignment.refinement_mapper(source, target))
    else:
        edit = control.replace(alignment.replacement_mapper(source, target, compat=True))
    if weighted and run["eq"]:
        edit = control.reweight(edit, alignment.equalizer(target, dict(zip(*run["eq"], strict=False))))
    return Rules(
        edit,
        alignment.cross_schedule(target, steps, run["tau_c"] if tau is None else tau, words),
        alignment.self_steps(steps, run["tau_s"]),
        alignment.self_steps(steps, run["tau_u"]),
    )


CROSS, SELF = ((uniform24(f"unit.{kind}", 4, 256, size) + 1) / 2 for kind, size in (("cross", 77), ("self", 256)))
UNITS = [
    (run, name.removeprefix(f"attn.{run}."), entry)
    for run in ("replace", "replace_tokens", "refine", "reweight")
    for name, entry in META["attention"].items()
    if name.startswith(f"attn.{run}.")
]


@pytest.mark.parametrize(("run", "name", "entry"), UNITS)
def test_attention_is_edited(run: str, name: str, entry: dict[str, Any]) -> None:
    rules = rules_of(META["editing"][run], N, weighted="no_reweight" not in name)
    maps = (CROSS if entry["is_cross"] else SELF).clone().view(2, 2, 256, -1)
    # the branch that is not looked at has maps of its own
    other = torch.rand_like(maps)
    rows = torch.cat([maps, other] if entry["uncond"] else [other, maps])
    found = edit_attention(rules, rows, Site(4, entry["is_cross"]), entry["step"])
    found = (found[:2] if entry["uncond"] else found[2:]).reshape(4, 256, -1)
    close(found.flatten()[::89], golden("attention")[f"attn.{run}.{name}.every89"], 1e-6)
    assert torch.equal(found[2:], maps.reshape(4, 256, -1)[2:]) or not entry["tgt_rows_unchanged"]


def test_attention_schedules_of_words() -> None:
    said = META["attention"]["attn.per_word"]
    words = {said["word"]: tuple(said["cross_replace_steps"][said["word"]])}
    run = META["editing"]["replace"] | {"eq": [[said["word"]], [said["equalizer"]]]}
    rules = rules_of(run, N, tau=said["cross_replace_steps"]["default_"], words=words)
    for step in range(5):
        rows = torch.cat([torch.rand(2, 2, 256, 77), CROSS.clone().view(2, 2, 256, 77)])
        found = edit_attention(rules, rows, Site(4, True), step)[2:].reshape(4, 256, 77)
        close(found.flatten()[::89], golden("attention")[f"attn.per_word.step{step}.every89"], 1e-6)


def test_large_self_attention_stays() -> None:
    rules = rules_of(META["editing"]["replace"], N)
    assert rules.edits(Site(0, False), 0, 1024) and not rules.edits(Site(0, False), 0, 1025)


@pytest.mark.parametrize("name", [n.removeprefix("blend.") for n in META["attention"] if n.startswith("blend.")])
def test_local_blend(name: str) -> None:
    entry, recorded = META["attention"][f"blend.{name}"], golden("attention")
    prompts = [tokens_of(text) for text in META["editing"]["replace"]["prompts"]]

    def masks(words: Any) -> Tensor:
        rows = [[w] if isinstance(w, str) else w for w in words]
        return torch.stack([prompt.mask(row) for prompt, row in zip(prompts, rows, strict=True)])

    maps = []
    for layer in (4, 5, 7, 8, 9):
        unit = ((uniform24(f"unit.blend.l{layer}", 4, 256, 77).double() + 1) / 2) ** entry["power"]
        maps.append(unit.float().view(2, 2, 256, 77))
    x = uniform24("unit.blend.x", 2, 4, 64, 64) * np.float32(math.sqrt(3))
    subtract = [masks(entry["substruct"])] * 6 if entry["substruct"] else None
    local = blend.LocalBlend([masks(entry["words"])] * 6, subtract, entry["start_blend"], *entry["th"])
    found = local(x, maps, entry["counter_before"])
    close(found[..., ::3, ::3], recorded[f"blend.{name}.out.every3"], 1e-6)
    assert torch.equal(found[0], x[0])
    if entry["masks"]:
        mask = blend.word_mask(local.strengths[0], (64, 64), local.threshold, pool=True)[:, 0, ::4, ::4]
        assert torch.equal(mask[:1] | mask, recorded[f"blend.{name}.masks_16"][0].bool())


# The learned values


@torch.no_grad()
def test_mapping_networks(model: LatentDiffusion) -> None:
    recorded, source = golden("mapping"), context_of(model, META["prompt"])
    assert sum(p.numel() for p in MappingNetwork().parameters()) == META["mapping"]["params_per_step"]
    close(source.k[..., ::48], recorded["context.src.every48"], 1e-5)
    close(context_of(model, "").k[..., ::48], recorded["context.uncond.every48"], 1e-5)
    for i in range(N):
        found = mapping(i)(features())
        close(found.flatten()[::37], recorded[f"gamma_beta.i{i}.every37"], 1e-5)
        close(modulate(source, found[0]).v.flatten()[::19], recorded[f"ctilde.i{i}.every19"], 1e-5)
    assert torch.equal(mapping(0).eval()(features()), mapping(0).train()(features()))


@torch.no_grad()
def test_noise_with_learned_values(model: LatentDiffusion) -> None:
    recorded, source = golden("mapping"), context_of(model, META["prompt"])
    z, t = uniform24("latent.map", 1, 4, 64, 64) * np.float32(math.sqrt(3)), META["mapping"]["t"]
    for name, context in {
        "plain": source,
        "value_i0": modulate(source, mapping(0)(features())[0]),
        "value_i1": modulate(source, mapping(1)(features())[0]),
    }.items():
        store = control.MapStore(layers_of(model, z))
        found = predict(model, z, t, context, store)
        stored = recorded.get(f"e.{name}", recorded.get(f"e.{name}.every2"))
        close(found if found.shape == stored.shape else found[..., ::2, ::2], stored)
        for n, own in enumerate(store.at()):
            close(own.flatten()[::97], recorded[f"maps.{name}.n{n}.every97"])
    both = Context.cat(modulate(source, mapping(1)(features())[0]), source)
    close(predict(model, torch.cat([z, z]), t, both)[..., ::2, ::2], recorded["e.rows_i1_none.every2"])


# Inversion


@pytest.fixture(scope="module")
def way(model: LatentDiffusion) -> Trajectory:
    """The recorded path with maps made from each of its latents."""
    path, timesteps = [z[None] for z in golden("inversion")["zstar"]], inversion_timesteps(N)
    store = control.MapStore(layers_of(model, path[0]), keep=True)
    denoise = guided(model, as_conditioning(context_of(model, META["prompt"])), hook=store)
    for z, t in zip(path, timesteps, strict=False):
        denoise(z, int(t))
    return Trajectory(path, timesteps, [store.at(int(t)) for t in timesteps])


def test_image(model: LatentDiffusion) -> None:
    recorded = golden("inversion")
    image = fit(Image.fromarray(recorded["picture"].numpy()), 512, 512, "crop")
    assert np.asarray(image).astype(np.int64).sum() == META["inversion"]["image_512_sum"]
    z_0 = image_latents(model, image)
    close(z_0, golden("baselines")["zstar_0"])
    close(z_0, recorded["zstar"][:1])
    close(clip_input(image)[..., ::8, ::8], recorded["clip_input_every8"], 1e-5)
    rebuilt = np.asarray(to_pil(model.decode_first_stage(recorded["zstar"][:1])[0]))[::8, ::8]
    assert np.abs(rebuilt.astype(int) - recorded["image_rec_every8"].numpy()).max() <= 1


def test_inversion_step_by_step(model: LatentDiffusion, way: Trajectory) -> None:
    recorded, cond = golden("inversion"), as_conditioning(context_of(model, META["prompt"]))
    store = control.MapStore(layers_of(model, way.path[0]), keep=True)
    assert tuple(store.layers) == (4, 5, 7, 8, 9)
    timesteps = inversion_timesteps(N)
    alphas = model.host_alphas_cumprod
    whole = record(model, way.path[0], cond, N, maps=True)
    close(whole.path[-1], way.path[-1], 1e-3)
    close(whole.maps[-1][0], way.maps[-1][0], 1e-3)
    denoise = guided(model, cond, hook=store)
    for j, t in enumerate(timesteps):
        level, below = alphas[t], alphas[timesteps[j - 1]] if j else alphas[0]
        close(move(way.path[j], denoise(way.path[j], int(t)), below, level), way.path[j + 1])
        for layer, own in zip(store.layers, store.at(int(t)), strict=True):
            close(own.flatten()[::97], recorded[f"A.j{j}.l{layer}.every97"])
            close(own.mean(dim=(0, 1, 2)), recorded[f"A.j{j}.l{layer}.token_mean"])


@pytest.fixture(scope="module")
def contexts(model: LatentDiffusion) -> dict[str, Context]:
    return {text: context_of(model, text) for text in ("", META["prompt"])}


def sweep_of(
    model: LatentDiffusion, way: Trajectory, contexts: dict[str, Context], learner: Any, **options: Any
) -> Sweep:
    given = InversionOptions(**({"steps": len(way.timesteps)} | options))
    return Sweep(model, way, learner, contexts[META["prompt"]], contexts[""], given)


NAMES = META["inversion"]["param_names"]
COUNTED = [n for n, name in enumerate(NAMES) if name not in ("conv_start.bias", "conv_block.0.0.bias")]


def compare_gradients(network: MappingNetwork, recorded: dict[str, Tensor], prefix: str, l2: str = "l2") -> None:
    gradients = {name: p.grad for name, p in network.named_parameters()}
    norms = torch.stack([gradients[name].norm() for name in NAMES])
    torch.testing.assert_close(norms[COUNTED], recorded[f"{prefix}{l2}"][COUNTED], rtol=1e-3, atol=0)
    for n in COUNTED:
        sampled = recorded.get(f"{prefix}sample.{NAMES[n]}")
        if sampled is not None:
            flat = gradients[NAMES[n]].flatten()
            close(flat[:: max(1, flat.numel() // 64)][:64], sampled, 1e-3)


def test_losses_and_gradients(model: LatentDiffusion, way: Trajectory, contexts: dict[str, Context]) -> None:
    """The first iteration of step 0, from recorded latents; step 1 from the recorded M_0."""
    recorded = golden("inversion")
    sweep = sweep_of(model, way, contexts, StyleDiffusion(N, features(), start=mapping(0)), inner_steps=4)
    step = step_of(model, way, 0, way.path[-1])
    fixed = sweep.fixed(step)
    sweep.learner.begin(0, True)
    close(fixed[..., ::2, ::2], recorded["i0.e_u.every2"])
    close(sweep.behind(step, fixed).detach()[..., ::2, ::2], recorded["i0.it0.zhat.every2"])
    loss = sweep.loss(step, fixed)
    found = [loss.latent.item(), loss.attention.item(), loss.total.item()]
    np.testing.assert_allclose(found, recorded["loss.i0.latent_attn_total"][0], rtol=1e-5)
    loss.total.backward()
    compare_gradients(sweep.learner.networks[0], recorded, "grad.i0.it0.")
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is None for network in sweep.learner.networks[1:] for p in network.parameters())

    network = sweep.learner.networks[0]
    network.load_state_dict({name: recorded[f"trained.i0.{name}"] for name in NAMES})
    network.zero_grad()
    with torch.no_grad():
        z = sweep.behind(step, fixed)
    close(z[..., ::2, ::2], recorded["z_after.every2"][:1])
    step = step_of(model, way, 1, z)
    sweep.learner.begin(1, True)
    loss = sweep.loss(step, sweep.fixed(step))
    np.testing.assert_allclose(loss.total.item(), recorded["loss.i1.latent_attn_total"][0, 2], rtol=1e-4)
    loss.total.backward()
    compare_gradients(sweep.learner.networks[1], recorded, "grad.i1.it0.")
    close(sweep.learner.values(0).detach().flatten()[::149], recorded["trained.gamma_beta.i0.every149"])


@pytest.mark.slow
def test_a_whole_inversion(model: LatentDiffusion, way: Trajectory, contexts: dict[str, Context]) -> None:
    """Adam's first step is +-lr whatever the gradient, so whole runs agree in their losses to a hundredth only."""
    recorded, losses = golden("inversion"), {}
    sweep = sweep_of(model, way, contexts, StyleDiffusion(N, features(), start=mapping(0)), inner_steps=4)
    learn_path(sweep, report=lambda i, k, loss: losses.setdefault(i, []).append(loss.total.item()), progress=False)
    assert [len(losses[i]) for i in range(N)] == META["inversion"]["iterations"]
    for i in range(2):
        np.testing.assert_allclose(losses[i], recorded[f"loss.i{i}.latent_attn_total"][:, 2], rtol=2e-2)


@pytest.fixture(scope="module")
def short(model: LatentDiffusion, way: Trajectory, contexts: dict[str, Context]) -> Trajectory:
    """The path of all short runs."""
    return record(model, way.path[0], as_conditioning(contexts[META["prompt"]]), 2, maps=True)


SHORT = ["early", "guidance1", *(pytest.param(run, marks=pytest.mark.slow) for run in ("woattn", "epochs2"))]


@pytest.mark.parametrize("run", SHORT)
def test_short_runs(model: LatentDiffusion, short: Trajectory, contexts: dict[str, Context], run: str) -> None:
    entry, recorded = META["short_runs"][run], golden("short_runs")
    assert entry["N"] == len(short.timesteps)
    options = InversionOptions(
        entry["N"], entry.get("guidance_scale", 7.5), entry["num_inner_steps"], entry["num_epoch"],
        entry["w_attnloss"], entry["epsilon"],
    )  # fmt: skip
    learner = StyleDiffusion(entry["N"], features(), start=mapping(0))
    sweep = Sweep(model, short, learner, contexts[META["prompt"]], contexts[""], options)
    losses: list[list[float]] = []

    def report(i: int, iteration: int, loss: Any) -> None:
        if not losses:  # before it was changed by anything but rounding
            norm = learner.networks[0].conv_end.weight.grad.norm()
            np.testing.assert_allclose(norm, recorded[f"{run}.sweep0.grad_l2"][6], rtol=1e-3)
        losses.append([loss.latent.item(), loss.total.item()])

    learn_path(sweep, report=report, progress=False)
    expected = recorded[f"{run}.losses"]
    assert len(losses) == len(expected) == sum(n for _, n in entry["lr_and_iterations"])
    np.testing.assert_allclose(losses[0], expected[0, [0, 2]], rtol=1e-4)
    np.testing.assert_allclose([row[1] for row in losses], expected[:, 2], rtol=3e-2)


# Editing


class Seeded(StepChange):
    branch = "values"

    def __init__(self, timesteps: tuple[int, ...], networks: list[MappingNetwork]) -> None:
        with torch.no_grad():
            super().__init__(torch.cat([network(features()) for network in networks]), timesteps)

    def __call__(self, context: Context, t: int) -> Context:
        return modulate(context, self.of_step(t))


class Enough(Exception):
    """Ends a run before its last step."""


def denoise_golden(
    model: LatentDiffusion, run: dict[str, Any], x_T: Tensor, steps: int, change: StepChange | None, first: int = N
) -> tuple[list[Tensor], Plan]:
    """The latents of the `first` steps of a run, or of all."""
    timesteps = tuple(inversion_timesteps(steps)[::-1].tolist())
    source, target = map(tokens_of, run["prompts"])
    local = store = None
    if run["blend"]:
        places = torch.stack([p.mask(words) for p, words in zip((source, target), run["blend"], strict=True)])
        local = blend.LocalBlend([places] * steps, start=int(0.2 * steps))
        store = MapStore(layers_of(model, x_T), rows=2)
    plan = Plan(AttentionControl([rules_of(run, steps)] * steps, timesteps, store), local)
    source_context, target_context, uncond = (as_conditioning(context_of(model, t)) for t in (*run["prompts"], ""))
    branches = Branches(source_context, target_context, uncond)
    branches = branches.changed(change, alignment.value_steps(steps, run.get("tau_v", 0)))
    seen: list[Tensor] = []

    def report(step: int, x: Tensor) -> None:
        seen.append(x)
        if len(seen) == first:
            raise Enough

    with contextlib.suppress(Enough):
        denoise_pair(model, x_T, branches, plan, timesteps, META["guidance_scale"], False, report)
    return seen, plan


OTHERS = ("replace_tokens", "refine", "reweight")
WHOLE = [pytest.param(name, N, marks=pytest.mark.slow) for name in OTHERS]


@pytest.mark.parametrize(
    ("name", "first"), [("replace", N), ("refine", 1), ("replace_tokens", 1), ("reweight", 1), *WHOLE]
)
def test_editing(model: LatentDiffusion, name: str, first: int) -> None:
    """What changes from step to step is shown by one edit, and for each in `test_attention_is_edited`."""
    run, recorded = META["editing"][name], golden("editing")
    timesteps = tuple(inversion_timesteps(N)[::-1].tolist())
    change = Seeded(timesteps, [mapping(i) for i in range(N)])
    seen, plan = denoise_golden(model, run, recorded["x_T"], N, change, first)
    for found, expected in zip(seen, recorded[f"{name}.latents.every4"][:first], strict=True):
        close(found[..., ::4, ::4], expected, 1e-3)
    if first < N:
        return
    final = recorded.get(f"{name}.final", recorded.get(f"{name}.final.every2"))
    close(seen[-1] if seen[-1].shape == final.shape else seen[-1][..., ::2, ::2], final, 1e-3)
    if plan.blend is not None:
        mask = plan.blend.mask((64, 64))[:, 0, ::4, ::4]
        assert torch.equal(mask, recorded[f"{name}.masks_16"][-1].bool())
    if name == "replace":
        images = np.stack([np.asarray(to_pil(x))[::8, ::8] for x in model.decode_first_stage(seen[-1])])
        assert np.abs(images.astype(int) - recorded["replace.image_every8"].numpy()).max() <= 1


@pytest.mark.parametrize("name", ["null", "text"])
def test_given_contexts(model: LatentDiffusion, name: str) -> None:
    """Editing with contexts that can be rebuilt, without optimisation in between."""
    given, recorded = META["baselines"][name]["given"], golden("baselines")
    timesteps = tuple(inversion_timesteps(3)[::-1].tolist())
    values = torch.cat([uniform24(f"context.{name}.{i}", 1, 77, 768) for i in range(3)]) * np.float32(math.sqrt(3))
    change = (NullContexts if name == "null" else TextContexts)(values, timesteps)
    x_T = uniform24("latent.ctx", 1, 4, 64, 64) * np.float32(math.sqrt(3))
    seen, plan = denoise_golden(model, given, x_T, 3, change)
    for found, expected in zip(seen, recorded[f"{name}.given.latents.every4"], strict=True):
        close(found[..., ::4, ::4], expected, 1e-3)
    assert plan.blend is not None
    assert torch.equal(plan.blend.mask((64, 64))[:, 0, ::4, ::4], recorded[f"{name}.given.masks_16"][-1].bool())


@pytest.fixture(scope="module")
def plain_way(model: LatentDiffusion, contexts: dict[str, Context]) -> Trajectory:
    """The path of the baselines, which read no maps."""
    return record(model, golden("baselines")["zstar_0"], as_conditioning(contexts[META["prompt"]]), N)


@pytest.mark.parametrize("steps", [1, pytest.param(N, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["null", "text"])
def test_context_inversion(
    model: LatentDiffusion, plain_way: Trajectory, contexts: dict[str, Context], name: str, steps: int
) -> None:
    """The gradient of the first step, and the losses of the first steps of a run to a few hundredths."""
    recorded, entry = golden("baselines"), META["baselines"][name]
    way = plain_way
    close(torch.cat(way.path)[..., ::2, ::2], recorded["zstar.every2"], 1e-3)
    start = contexts["" if name == "null" else META["prompt"]].k
    close(start[..., ::48], recorded[f"{name}.start.every48"], 1e-5)
    learner = (NullText if name == "null" else TextInversion)(N, start)
    sweep = sweep_of(model, way, contexts, learner, inner_steps=entry["inner"])
    step = step_of(model, way, 0, way.path[-1])
    parameters = learner.begin(0, True)
    sweep.loss(step, sweep.fixed(step)).total.backward()
    close(parameters[0].grad[None, :, ::48], recorded[f"{name}.grad.i0.it0.every48"], 1e-3)
    parameters[0].grad = None
    losses: list[float] = []

    def finished(progress: Progress) -> None:
        if progress.step == steps - 1:
            raise Enough

    with contextlib.suppress(Enough):
        learn_path(sweep, None, lambda i, k, loss: losses.append(loss.total.item()), finished, progress=False)
    assert len(losses) == steps * entry["inner"]
    np.testing.assert_allclose(losses[0], recorded[f"{name}.losses"][0], rtol=1e-4)
    np.testing.assert_allclose(losses, recorded[f"{name}.losses"][: len(losses)], rtol=3e-2)
    moved = [(learner.values(i).detach() - start[0]).norm().item() for i in range(steps)]
    np.testing.assert_allclose(moved, [recorded[f"{name}.context.i{i}.l2_of_change"] for i in range(steps)], rtol=3e-2)


def test_a_generated_image(model: LatentDiffusion) -> None:
    """P2Plus starts from PyTorch's CPU generator, and without an edit generates the source twice."""
    recorded = golden("baselines")
    x_T = draw_noise(seeded_generators([2720]), (1, 4, 64, 64), "cpu")
    assert torch.equal(x_T.flatten()[:8], recorded["null.generated.x_T.first8"])
    run = META["editing"]["replace"] | {"blend": None, "eq": None, "tau_c": 0, "tau_s": 0, "tau_u": 0}
    seen, _ = denoise_golden(model, run, x_T, 2, None)
    close(seen[-1][..., ::2, ::2], recorded["null.generated.N2.plain.final.every2"], 1e-3)


# Files, features and masks


def test_import(model: LatentDiffusion, way: Trajectory) -> None:
    recorded, entry = golden("importer"), META["importer"]
    states = read_modules(FOLDER / "model-inner1-epoch1-learnv-[7].pth")
    networks = networks_from(states)
    assert len(networks) == entry["object"][1]
    for i, network in enumerate(networks):
        assert set(states[i]) == set(NAMES)
        for name, parameter in network.named_parameters():
            flat = parameter.flatten()
            assert torch.equal(flat[:: max(1, len(flat) // 16)][:16], recorded[f"pth.sample.i{i}.{name}"])
        close(network(features()).flatten()[::149], recorded[f"pth.gamma_beta.i{i}.every149"], 1e-5)
    args = entry["edit_args"]
    run = META["editing"]["replace"] | {f"tau_{x}": args[f"tau_{x}"][0] for x in "vcsu"}
    run |= {"blend": args["blend_word"], "eq": args["eq_params"]}
    cond = as_conditioning(context_of(model, args["prompt"]))
    path = record(model, way.path[0], cond, 3).path
    timesteps = tuple(inversion_timesteps(3)[::-1].tolist())
    seen, _ = denoise_golden(model, run, path[-1], 3, Seeded(timesteps, networks))
    for found, expected in zip(seen, recorded["pth.edit.latents.every4"], strict=True):
        close(found[..., ::4, ::4], expected, 1e-3)


@torch.no_grad()
def test_clip_features() -> None:
    recorded, entry = golden("clip_vision"), META["clip_vision"]
    config = CLIPVisionConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=1, num_attention_heads=entry["heads"],
        image_size=224, patch_size=16, hidden_act="quick_gelu",
    )  # fmt: skip
    weights = {}
    for name, shape in map(tuple, entry["keys"]):
        key, numel = f"visual.{name}", math.prod(shape)
        bound, offset = tiny.bound_and_offset(key, tuple(shape))
        if len(shape) == 1 and not name.endswith(".weight"):
            bound, offset = np.float32(0.1), np.float32(0)
        weights[name] = torch.from_numpy(tiny.uniform(key, numel, SEED) * bound + offset).view(shape)
    assert weights["class_embedding"][:4].tolist() == pytest.approx(entry["first4"]["class_embedding"], rel=1e-6)
    tower = CLIPVisionModel(config).eval()
    tower.load_state_dict(in_transformers_layout(weights, tower), strict=True)
    image = fit(Image.fromarray(golden("inversion")["picture"].numpy()), 512, 512, "crop")
    pixels = clip_input(image)
    close(pixels[..., ::8, ::8], recorded["preprocessed.every8"], 1e-5)
    found = tower_features(tower, pixels)
    close(found[0, 0], recorded["features.token0"])
    close(found[0].norm(dim=-1), recorded["features.l2_per_token"])
    close(found.flatten()[::151], recorded["features.every151"])


def in_transformers_layout(weights: dict[str, Tensor], tower: CLIPVisionModel) -> dict[str, Tensor]:
    """OpenAI's names as transformers'."""
    names = {
        "class_embedding": "embeddings.class_embedding",
        "positional_embedding": "embeddings.position_embedding.weight",
        "conv1.weight": "embeddings.patch_embedding.weight",
        "ln_pre": "pre_layrnorm",
        "ln_post": "post_layernorm",
    }
    layer = "transformer.resblocks.0."
    inner = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    inner["attn.out_proj"] = "self_attn.out_proj"
    found = {}
    for name, value in weights.items():
        if name == "proj":
            continue
        stem, _, kind = name.rpartition(".")
        if ".in_proj_" in name:
            for part, own in zip("qkv", value.chunk(3), strict=True):
                found[f"encoder.layers.0.self_attn.{part}_proj.{name.rpartition('_')[2]}"] = own
        elif name.startswith(layer):
            found[f"encoder.layers.0.{inner[stem.removeprefix(layer)]}.{kind}"] = value
        else:
            found[names[name] if name in names else f"{names[stem]}.{kind}"] = value
    prefix = "vision_model." if any(key.startswith("vision_model.") for key in tower.state_dict()) else ""
    return {prefix + name: value for name, value in found.items()}


def test_masks(model: LatentDiffusion) -> None:
    recorded, entry = golden("masks"), META["masks"]
    cond, tokens = as_conditioning(context_of(model, entry["prompt"])), tokens_of(entry["prompt"])
    z_0 = golden("baselines")["zstar_0"]
    for name, compat in (("upper_heads", True), ("all_heads", False)):
        average = average_maps(model, z_0, cond, N, compat)
        close(average[..., :9], recorded[f"{name}.average_16"], 1e-3)
        mask = np.asarray(mask_of(average, tokens, entry["word"], compat)).astype(int)
        assert abs(mask.mean() - entry[name]["mean"]) < 0.5
        assert tokens.words.index(entry["word"]) + 1 == entry["token_index"]
        if compat:
            assert np.abs(mask - recorded["upper_heads.foreground_256"].numpy()).max() <= 2


# NS-LPIPS, with a stub distance


def picture(name: str) -> Image.Image:
    """A recorded image; masks have three equal channels, of which the record's first one is meant."""
    values = golden("masks")[f"ns.{name}.small"]
    small = Image.fromarray((values[..., :1].expand(-1, -1, 3) if name.startswith("mask") else values).numpy())
    return small.resize(tuple(META["masks"][f"ns.{name}.size_wh"]), Image.Resampling.BICUBIC)


def test_ns_lpips_scores() -> None:
    recorded, said = golden("masks"), META["masks"]
    cases = {str(k): (picture(f"src{k}"), picture(f"edit{k}"), picture(f"mask{k}")) for k in range(2)}
    source, edit = masked_pair(*cases["0"])
    for found, name in ((source, "src"), (edit, "edit")):
        torch.testing.assert_close(found[..., ::8, ::8], recorded[f"ns.case0.{name}_bg.every8"], rtol=0, atol=1e-5)
    for k in range(2):
        mask = mask_tensor(cases[str(k)][2])
        torch.testing.assert_close(mask[..., ::8, ::8], recorded[f"ns.case{k}.mask.every8"], rtol=0, atol=1e-5)
    found = ns_lpips(cases, lambda a, b: (a - b).square().mean(dim=(1, 2, 3)))
    assert found.scores == pytest.approx({"0": said["ns.score_0"], "1": said["ns.score_1"]}, rel=1e-4)
    assert found.mean == pytest.approx(said["ns.score_all"], rel=1e-4)


def test_ns_lpips_of_white_and_grey_masks() -> None:
    white, grey = (mask_tensor(Image.new("RGB", (9, 9), (v, v, v))).max().item() for v in (255, 100))
    said = META["masks"]
    assert white == pytest.approx(said["ns.white_mask_value"]) and grey == pytest.approx(said["ns.grey100_mask_value"])
