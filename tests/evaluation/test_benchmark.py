"""scripts/benchmark.py: all ways to do the work give the same results, and the numbers are what they say."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from evaluation.benchmark import load, models, ours, peer, scaling
from evaluation.benchmark import measure as measuring
from evaluation.benchmark.measure import Contender, count_flop, deviations, matmul_ceiling, measure
from evaluation.benchmark.switches import DEFAULTS, NETI_REFERENCE, OPAQUE, OTHER_IMAGES, REFERENCE, SWITCHES, Work
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from scripts import benchmark

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
# Opaque ones are shown in tests/models/test_acceleration.py; two are slow on the CPU.
ELSEWHERE = {("sample", "float16"), ("vae", "float16")}
TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 1e-1}


@pytest.fixture(scope="module")
def base() -> LatentDiffusion:
    return models.build_model("demo", CPU)


def make(base: LatentDiffusion, what: str, switches: frozenset[str]) -> Contender:
    return ours.contender(base, Work(what, 2, 64, 4), switches)


@pytest.fixture(scope="module")
def reference(base: LatentDiffusion) -> dict[str, torch.Tensor]:
    return {what: make(base, what, REFERENCE).result() for what in ("train", "sample", "text", "vae")}


@pytest.mark.parametrize(
    ("what", "switch"),
    [
        (what, name)
        for name, (_, whats, _) in SWITCHES.items()
        for what in whats
        if name not in OPAQUE | OTHER_IMAGES and (what, name) not in ELSEWHERE
    ],
)
def test_every_switch_computes_the_same(
    base: LatentDiffusion, reference: dict[str, torch.Tensor], what: str, switch: str
) -> None:
    """Against the reference's way, with the switch turned, in every work where it matters."""
    contender = make(base, what, DEFAULTS ^ {switch})
    found = {"reference": reference[what], "ours": contender.result()}
    assert found["ours"].shape == found["reference"].shape and found["ours"].isfinite().all()
    assert found["reference"].std() > 0
    tolerance = TOLERANCES[str(contender.dtype).removeprefix("torch.")]
    assert deviations(found)["ours"] < tolerance


@pytest.mark.parametrize("what", ["train", "text"])
def test_every_switch_of_neti_computes_the_same(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against its code's order of work: a text pass for each layer, one by one."""
    monkeypatch.setattr(FrozenCLIPEmbedder, "share_rows_from", 0)
    key = "model.params.personalization_config.params.method"
    base = models.build_model("demo", CPU, [f"{key}=neti", f"{key}_params.nested_dropout=null"])
    found = {"reference": make(base, what, NETI_REFERENCE).result()}
    assert found["reference"].std() > 0
    for switch in [name for name, (_, whats, text) in SWITCHES.items() if text.startswith("NeTI") and what in whats]:
        found[switch] = make(base, what, DEFAULTS - {switch}).result()
    found["ours"] = make(base, what, DEFAULTS).result()
    assert len(found) > 3 and max(deviations(found).values()) < 1e-5


@pytest.mark.parametrize("what", ["train", "sample", "vae"])
def test_diffusers_computes_the_same(base: LatentDiffusion, reference: dict[str, torch.Tensor], what: str) -> None:
    contender = peer.contender(base, Work(what, 2, 64, 4), DEFAULTS, "diffusers")
    result = contender.result()
    assert deviations({"ours": reference[what], "theirs": result})["theirs"] < 1e-4
    contender.run()
    if what == "train":
        assert contender.result() != result, "a step was made"


def test_text_passes_of_an_image(base: LatentDiffusion) -> None:
    """Distinct stage prompts (five learned, one text) and the unconditional one; the reference's, twice S."""
    rows = {}
    for name, switches in {"ours": DEFAULTS, "reference": REFERENCE}.items():
        contender = ours.contender(base, Work("sample", 1, 64, 2), switches)
        contender.result()
        rows[name] = contender.details["text_rows"]
    assert rows == {"ours": 5 + 1 + 1, "reference": 20}


def test_variants_leave_the_base_alone(base: LatentDiffusion) -> None:
    """Weights are shared where they can be, and what is learned never is."""
    same, other = models.variant(base, DEFAULTS), models.variant(base, DEFAULTS | {"bfloat16", "channels_last"})
    weight = next(base.model.parameters())
    assert next(same.model.parameters()).data_ptr() == weight.data_ptr()
    assert next(other.model.parameters()).dtype == torch.bfloat16 and weight.dtype == torch.float32
    pairs = zip(base.embedding_manager.parameters(), same.embedding_manager.parameters(), strict=True)
    assert all(a.data_ptr() != b.data_ptr() for a, b in pairs)


# Measuring


def test_operations_are_counted_with_attention_on_the_cpu() -> None:
    q = torch.randn(1, 2, 16, 8, requires_grad=True)
    assert count_flop(lambda: torch.randn(3, 5) @ torch.randn(5, 7)) == 2 * 3 * 5 * 7
    forward = 2 * 2 * (2 * 16 * 16 * 8)  # two products of two heads
    assert count_flop(lambda: F.scaled_dot_product_attention(q, q, q)) == forward
    both = count_flop(lambda: F.scaled_dot_product_attention(q, q, q).sum().backward())
    assert both == pytest.approx(3.5 * forward)  # the backward pass makes the scores again


def test_contenders_take_turns() -> None:
    order: list[str] = []

    def named(name: str, seconds: float) -> Contender:
        return Contender(name, lambda: (order.append(name), time.sleep(seconds)), lambda: torch.zeros(1))

    ways = [named("a", 0.001), named("b", 0.02)]
    ways[1].samples = 4
    a, b = measure(ways, CPU, repeats=3)
    assert order[-6:] == ["a", "b"] * 3
    assert 1 <= a["ms_from"] <= a["ms"] <= a["ms_to"] and a["ms"] < 20 <= b["ms"]
    assert a["peak_mb"] > 10 and a["deviation"] == b["deviation"] == 0
    assert b["per_second"] == pytest.approx(4000 / b["ms"]) and b["times_first"] < 1
    assert measure(ways[1:], CPU, 1, "cpu")[0]["ms"] < 20, "sleeping is no work"


def test_ceiling_and_deviation() -> None:
    assert matmul_ceiling(CPU, torch.float32, repeats=2) > 1e5  # 0.1 GFLOP per second
    results = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([3.0, 4.5]), "c": torch.tensor([3.0])}
    assert deviations(results) == {"a": 0, "b": pytest.approx(0.1), "c": 0}


# The command


def test_the_command_writes_table_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.json"
    arguments = f"--what train --mode reference --off stages --repeats 2 --clock cpu --device cpu --json {path}"
    assert benchmark.main(arguments.split())
    text = capsys.readouterr().out
    content = json.loads(path.read_text())
    assert [row["name"] for row in content["rows"]] == ["reference", "ours", "ours without stages"]
    assert content["clock"] == "cpu" and content["ceiling_gflop_per_s"]["float32"] > 0
    first, ours, without = content["rows"]
    assert ours["gflop"] < without["gflop"] < first["gflop"], "less arithmetic for the same result"
    assert all(row["deviation"] < 1e-4 and row["ms"] > 0 and row["peak_mb"] > 1 for row in content["rows"])
    lines = text.splitlines()[-4:]
    assert "times first" in lines[0] and len({len(line) for line in lines}) == 1, "aligned"


@pytest.mark.parametrize(
    ("deviating", "agree"), [({"bfloat16"}, True), ({"bfloat16", "float32"}, False), ({"float32"}, False)]
)
def test_a_wrong_result_is_no_result(
    base: LatentDiffusion, deviating: set[str], agree: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results that are 5 % off are near enough in bfloat16, and in nothing else beside it."""

    def result(step: ours.TrainingStep) -> torch.Tensor:
        dtype = "bfloat16" if "bfloat16" in step.switches else "float32" if "stages" in step.switches else "reference"
        return torch.tensor([1.05 if dtype in deviating else 1.0])

    monkeypatch.setattr(models, "build_model", lambda *_: base)
    monkeypatch.setattr(ours.TrainingStep, "result", result)
    monkeypatch.setattr(ours.TrainingStep, "run", lambda step: step.model.zero_grad())
    monkeypatch.setattr(measuring, "matmul_ceiling", lambda *_: 1.0)
    arguments = "--mode reference --on bfloat16 --off bfloat16 --repeats 1 --device cpu"
    assert benchmark.main(arguments.split()) is agree


def test_stages_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--stages 1 2 --repeats 1 --device cpu model.params.personalization_config.params.generator=table"
    assert benchmark.main(arguments.split())
    text = capsys.readouterr().out
    assert "ours, S = 1 " in text and "ours, S = 2" in text


def test_loading_is_measured_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = ROOT / models.DEMO_WEIGHTS
    (row,) = load.measure_loads(["ours"], "demo", checkpoint, "float16", CPU, 1, "wall")
    assert 0 < row["ms"] < 60_000 and row["details"]["peak / file"] > 1
    monkeypatch.setattr(load, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))  # no second process here
    with pytest.raises(ValueError, match="the way of 'reference': KeyError"):
        load.measure_loads(["reference"], "demo", checkpoint, "float32", CPU, 1, "wall")


def test_fewer_and_cheaper_calls_are_rows_beside_the_usual_ones(capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--what sample --also fast half_guided --steps 10 --resolution 64 --device cpu --repeats 1"
    assert benchmark.main(flags.split())
    rows = [re.split(r"  +", line) for line in capsys.readouterr().out.splitlines() if line.startswith("ours")]
    assert [row[0] for row in rows] == ["ours", "ours with fast", "ours with fast, half_guided"]
    assert [row[-2] for row in rows] == ["0.0e+00", "-", "-"]  # the images are others
    work = [float(row[6]) for row in rows]  # GFLOP
    assert work[0] > 2 * work[1] and work[1] > 1.15 * work[2]


def test_how_cost_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slept(n: int) -> Contender:
        return Contender(f"calls: {n}", lambda: time.sleep(0.01 * n), details={"axis": "calls", "n": n})

    monkeypatch.setattr(scaling, "axes", lambda *_: [[slept(n) for n in (1, 2, 4)]])
    flags = ["--what", "scaling", "--repeats", "1", "--device", "cpu", "--figure", str(tmp_path / "a.png")]
    assert benchmark.main([*flags, "--json", str(tmp_path / "a.json")])
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["calls: 1", "calls: 2", "calls: 4"]
    assert 0.15 < rows[-1]["times_first"] < 0.4 and Image.open(tmp_path / "a.png").width > 300
    x = np.array([1, 2, 4, 8])
    assert scaling.exponent(x, 5 * x**1.5) == pytest.approx(1.5)


@pytest.mark.slow
def test_everything_that_grows_can_be_run() -> None:
    found = scaling.axes("demo", torch.device("cpu"), DEFAULTS, 64, [])
    for axis in found:
        amounts = [way.details["n"] for way in axis]
        assert amounts == sorted(set(amounts))
        axis[0].run()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ("--of kv", "did you mean --off?"),
        ("--repeats 0", "--repeats: '0' must be a whole number of at least 1"),
        ("--json model.safetensors", "must end in .json"),
        ("--resolution 60 --device cpu", "must be a multiple of 32"),
        ("--what load", "--what load needs --ckpt FILE"),
        ("--off kv", "'kv' makes no difference to --what train, only to sample"),
        ("--on float16 bfloat16", "--on takes one precision, not bfloat16 and float16"),
        ("--on cuda_graph --device cpu", "cuda_graph needs a CUDA device"),
        ("--what text --peer diffusers --device cpu", "it can be train, sample or vae"),
        ("model.params.nothing=1 --device cpu", "nothing"),
    ],
)
def test_bad_input_gets_one_sentence(arguments: str, part: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        benchmark.main(arguments.split())
    error = capsys.readouterr().err
    assert ended.value.code == 2 and part in error and error.count("\n") == 1


def test_help_is_quick() -> None:
    begin = time.perf_counter()
    out = subprocess.run(
        [sys.executable, "scripts/benchmark.py", "--help"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    assert time.perf_counter() - begin < 2  # 0.2 s on a free machine
    assert all(name in out for name in SWITCHES)
