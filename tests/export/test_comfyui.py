"""The workflow for ComfyUI, run by a few lines that map percentages to noise levels as ComfyUI does."""

import functools
import re

import pytest
import torch

from ldm.export.comfyui import escape, sampling, workflow
from ldm.export.texts import written
from ldm.export.webui import name_of

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
LEVELS = ((1 - (1 - BETAS).cumprod(0)) / (1 - BETAS).cumprod(0)).sqrt().float().log()  # log sigma of t = 0 … 999


def sigma(t: torch.Tensor) -> torch.Tensor:
    """Noise level of a timestep between 0 and 999, whole or not: interpolated in its logarithm, in float32."""
    t = t.float()
    low, part = t.floor().long(), t.frac()
    return ((1 - part) * LEVELS[low] + part * LEVELS[t.ceil().long()]).exp()


@functools.cache
def from_percent(percent: float) -> float:
    if percent <= 0:
        return float("inf")
    return 0.0 if percent >= 1 else sigma(torch.tensor((1 - percent) * 999)).item()


def active(nodes: dict, level: float, node: str | None = None) -> list[str]:
    """The texts that the sampler's positive input reads at a noise level."""
    if node is None:
        sampler = next(n for n in nodes.values() if n["class_type"] == "KSampler")
        return active(nodes, level, sampler["inputs"]["positive"][0])
    kind, inputs = nodes[node]["class_type"], nodes[node]["inputs"]
    if kind == "ConditioningCombine":
        return [x for name in ("conditioning_1", "conditioning_2") for x in active(nodes, level, inputs[name][0])]
    if kind == "ConditioningSetTimestepRange":
        inside = from_percent(inputs["end"]) <= level <= from_percent(inputs["start"])
        return active(nodes, level, inputs["conditioning"][0]) if inside else []
    assert kind == "CLIPTextEncode"
    return [inputs["text"]]


def ranges(nodes: dict) -> list[dict]:
    return [node["inputs"] for node in nodes.values() if node["class_type"] == "ConditioningSetTimestepRange"]


@pytest.mark.parametrize("stages", [1, 2, 3, 7, 10, 20, 64])
@pytest.mark.parametrize("digits", [7, 3])  # a slider of ComfyUI rounds to three
def test_every_timestep_reads_its_stage(stages: int, digits: int) -> None:
    nodes = workflow([f"t{stage}" for stage in range(stages)], "model.ckpt", sampling())
    for inputs in ranges(nodes):
        inputs |= {name: round(inputs[name], digits) for name in ("start", "end")}
    levels = sigma(torch.arange(1000)).tolist()
    assert [active(nodes, level) for level in levels] == [[f"t{t * stages // 1000}"] for t in range(1000)]


def test_levels_between_timesteps_read_the_stage_of_the_nearest() -> None:
    """Other schedules use levels that are no timestep's; the U-Net gets the nearest one."""
    nodes = workflow([f"t{stage}" for stage in range(10)], "model.ckpt", sampling())
    t = torch.cat([torch.rand(2000, generator=torch.Generator().manual_seed(0)) * 999, torch.arange(90, 999, 0.13)])
    levels = sigma(t[(t.frac() - 0.5).abs() > 0.001])
    nearest = (LEVELS - levels.log()[:, None]).abs().argmin(dim=1).tolist()
    assert [active(nodes, level) for level in levels.tolist()] == [[f"t{found // 100}"] for found in nearest]


def test_the_graph_is_whole() -> None:
    """Every link leads to a node, every node but the last is used, and the settings are where they belong."""
    nodes = workflow(["a", "b", "b"], "m.ckpt", sampling("DPM++ 2M Karras", 7, 3.0, 5), width=8, height=16)
    links = [value for node in nodes.values() for value in node["inputs"].values() if isinstance(value, list)]
    assert {target for target, _ in links} == set(nodes) - {max(nodes, key=int)}
    assert nodes["1"]["inputs"] == {"ckpt_name": "m.ckpt"}
    sampler = next(node["inputs"] for node in nodes.values() if node["class_type"] == "KSampler")
    wanted = {"seed": 5, "steps": 7, "cfg": 3.0, "sampler_name": "dpmpp_2m", "scheduler": "karras", "denoise": 1.0}
    assert sampler.items() >= wanted.items()
    latent = next(node["inputs"] for node in nodes.values() if node["class_type"] == "EmptyLatentImage")
    assert latent == {"width": 8, "height": 16, "batch_size": 1}
    nodes = workflow(["late"] * 5 + ["early"] * 5, "model.ckpt", sampling())  # neighbours with one text share a range
    assert [(r["start"], r["end"]) for r in ranges(nodes)] == [(0.0, 0.5), (0.5, 1.0)]


@pytest.mark.parametrize(
    ("sampler", "names"),
    [
        ("ddim", ("ddim", "ddim_uniform")),
        ("plms", ("ddim", "ddim_uniform")),
        ("Euler a", ("euler_ancestral", "normal")),
        ("Euler Karras", ("euler", "karras")),
        (name_of("dpmpp_2m"), ("dpmpp_2m", "sgm_uniform")),
        (name_of("ddim", "trailing"), ("euler", "sgm_uniform")),
        ("unheard of", ("ddim", "ddim_uniform")),
    ],
)
def test_samplers_have_comfyuis_names(sampler: str, names: tuple[str, str]) -> None:
    assert (sampling(sampler)["sampler_name"], sampling(sampler)["scheduler"]) == names


def page(text: str) -> str:
    """A text as ComfyUI's page hands it on: without comments, and with the first of each {choice|choice}."""
    text, out, depth, i = re.sub(r"/\*[\s\S]*?\*/|//.*", "", text), "", 0, 0
    while i < len(text):
        if text[i] == "\\":
            out += text[i : i + 2] if i + 1 < len(text) else "\\undefined"
            i += 2
            continue
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        assert depth == 0, f"a choice in {text}"
        out, i = out + text[i], i + 1
    return re.sub(r"\\([{}|])", r"\1", out)


def program(text: str) -> str:
    """A text as the tokenizer gets it, if no weight is in it."""
    assert not re.search(r"(?<!\\)[()]", text), f"a weight in {text}"
    return re.sub(r"\\([()])", r"\1", text)


def test_a_text_stays_itself() -> None:
    for text in ("(a:1.3) b", "{a|b}", "a {b", "}", "c:\\dir \\ (x)", "|a| \\\\", "a / b", "\\(a\\)", "a\\"):
        assert program(page(written(text.split(), escape))).split() == text.split()
    for text, becomes in (("http://x y", "http:/ /x y"), ("a///b", "a/ / /b"), ("\\{a", "\\ {a")):
        assert program(page(written(text.split(), escape))) == becomes  # what cannot be escaped keeps the rest
