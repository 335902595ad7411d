"""Everything that waits for a GPU, in one resumable run: parity, learning, sampling, tests and a profile.

Each section's results are kept in `report.json` as soon as they are there; a section that is there is not run again.
`report.md` has the tables, the goals with pass or miss, and the device's name. On the CPU the same sections run on the
small model, to test the report itself.
"""

from __future__ import annotations

import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import profiler

from evaluation.benchmark.editing import inversion_step
from evaluation.benchmark.measure import Contender, count_flop, device_name, matmul_ceiling, peak_memory, time_run
from evaluation.benchmark.models import ROOT, VOCABULARY, build_model, variant
from evaluation.benchmark.peer import peer_contender
from evaluation.benchmark.sample import Sampling, sampling_contender
from evaluation.benchmark.switches import DEFAULTS, REFERENCE
from evaluation.benchmark.train import TrainingStep
from evaluation.benchmark.train import contender as training_contender
from ldm.files.writing import replace_text
from ldm.models.diffusion.ddpm import LatentDiffusion

Row = dict[str, Any]

HALF = DEFAULTS | {"float16", "channels_last"}
# name -> switches; None: the peer of that name
TRAINING: dict[str, frozenset[str] | None] = {
    "reference": REFERENCE,
    "ours": HALF,
    "ours, captured": HALF | {"cuda_graph"},
    "ours, captured, bfloat16": DEFAULTS | {"bfloat16", "channels_last", "cuda_graph"},
    "diffusers": None,
    "ours, compiled": HALF | {"compile"},
    "diffusers-compiled": None,
}
SAMPLING: dict[str, frozenset[str] | None] = {
    "ours, captured": HALF | {"cuda_graph"},
    "diffusers": None,
    "ours, compiled": HALF | {"compile"},
    "diffusers-compiled": None,
    "ours": HALF,
    "ours, max-autotune": HALF | {"max_autotune"},
    "DPM++, two fifths of the steps, captured": HALF | {"cuda_graph", "fast"},
    "guidance in half of the stages, captured": HALF | {"cuda_graph", "half_guided"},
}
METHOD = "model.params.personalization_config.params.method"
METHODS = ("prospect", "textual-inversion", "xti", "table", "neti", "catversion")


class GpuReport:
    """The sections, each a method that returns JSON-able results.

    Args:
        folder: where `report.json` and `report.md` are kept.
        size: `sd-v1` (random weights at Stable Diffusion's size) or `demo`.
        compiled: also the rows that compile, which take a minute or more each.
    """

    def __init__(self, folder: Path, device: torch.device, size: str, compiled: bool = True, repeats: int = 10) -> None:
        self.folder, self.device, self.size = folder, device, size
        self.compiled, self.repeats = compiled, repeats
        self.resolution = 512 if size == "sd-v1" else 128
        self.steps = 50 if size == "sd-v1" else 10
        self._base: LatentDiffusion | None = None
        path = folder / "report.json"
        self.results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        self.results |= {"device": device_name(device), "torch": torch.__version__, "size": size}

    @property
    def base(self) -> LatentDiffusion:
        if self._base is None:
            self._base = build_model(self.size, self.device)
        return self._base

    def run(self, sections: Sequence[str], say: Callable[[str], None]) -> None:
        """Run the sections whose results are missing, and keep each as soon as it is complete."""
        for name in sections:
            if name in self.results.setdefault("complete", []):
                say(f"{name}: kept from before")
                continue
            start = time.perf_counter()
            self.results[name] = getattr(self, name)(say)
            self.results["complete"].append(name)
            self._keep()
            say(f"{name}: {time.perf_counter() - start:.0f} s")

    def _keep(self) -> None:
        replace_text(self.folder / "report.json", json.dumps(self.results, indent=1) + "\n")
        replace_text(self.folder / "report.md", self.markdown())

    # --- sections ----------------------------------------------------------------------------------------------

    def parity(self, say: Callable[[str], None]) -> list[Row]:
        """Compare with the reference's recorded numbers on this device, in every precision."""
        from evaluation.benchmark.parity import deviations

        half = ("float16", "bfloat16") if self.device.type == "cuda" else ("bfloat16",)
        rows = [row for dtype in ("float32", *half) for row in deviations(self.device, dtype)]
        for row in rows:
            say(f"  {row['what']:8} {row['dtype']:9} {row['deviation']:.1e} {'ok' if row['ok'] else 'TOO FAR'}")
        return rows

    def learn(self, say: Callable[[str], None]) -> Row:
        """Learn one concept: 600 steps without start-up, and `main.py` as a whole."""
        steps = 600 if self.size == "sd-v1" else 40
        captured, base = self._here(HALF | {"cuda_graph"}), self.base
        before = torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0  # in float32, not used
        start = time.perf_counter()
        step = TrainingStep(base, captured, 1, self.resolution)
        step.run()
        self._synchronize()
        first = time.perf_counter() - start
        start = time.perf_counter()
        for _ in range(steps):
            step.run()
        self._synchronize()
        seconds = time.perf_counter() - start
        peak = peak_memory(step.run, self.device)
        wall, profiled = self._profiled(step.run)
        counted = TrainingStep(base, captured - {"cuda_graph"}, 1, self.resolution)  # a graph hides what it does
        ceiling = matmul_ceiling(self.device, torch.float16 if self.device.type == "cuda" else torch.float32)
        found = {
            "steps": steps,
            "seconds": seconds,
            "first_step_s": first,
            "peak_gb": peak and (peak - before) / 1e9,
            "busy": _busy_ms(profiled) / wall,
            "of_ceiling": count_flop(counted.run) / ceiling / (1e3 * seconds / steps),
        }
        say(f"  {_learning(found)}")
        return {**found, **self._learn_by_command(steps, say)}

    def _learn_by_command(self, steps: int, say: Callable[[str], None]) -> Row:
        config = "configs/stable-diffusion/v1-finetune.yaml" if self.size == "sd-v1" else "configs/demo/finetune.yaml"
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "main.py", "--base", config, "-t", "-p", f"{folder}/run", "--gpus", "0,"]
            command += ["--data_root", "models/demo/references/dotted-star", "--max_steps", str(steps)]
            command += ["model.params.ckpt_path=null"]
            command += [f"model.params.cond_stage_config.params.tokenizer={ROOT / VOCABULARY}"] * (self.size == "sd-v1")
            if self.device.type == "cuda":
                fast = ("frozen_dtype=float16", "cuda_graph=true", "channels_last=true")
                command += [f"model.params.{switch}" for switch in fast]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - start
        say(f"  main.py: {seconds:.1f} s, exit code {done.returncode}")
        return {"command_s": seconds, "command_code": done.returncode, "command_tail": done.stderr[-600:]}

    def train(self, say: Callable[[str], None]) -> list[Row]:
        """Time a training step, batch 1, in every way."""
        return self._rows(TRAINING, "train", 1, say)

    def methods(self, say: Callable[[str], None]) -> list[Row]:
        """Time a training step of every method, eager and captured, and one of StyleDiffusion, eager and in float32."""
        for method in METHODS:
            base, self._base = self._base, build_model(self.size, self.device, [f"{METHOD}={method}"])
            ways = {f"{method}{way}": TRAINING[f"ours{way}"] for way in ("", ", captured")}
            self._rows(ways, "methods", 1, say)
            self._base = base
        return self._rows({"stylediffusion": DEFAULTS}, "methods", 1, say)

    def sample(self, say: Callable[[str], None]) -> list[Row]:
        """Time DDIM from noise to images, batch 1 and 8, in every way."""
        self._rows(SAMPLING, "sample", 1, say)
        some = {name: ways for name, ways in SAMPLING.items() if "compiled" not in name and "autotune" not in name}
        return self._rows(some, "sample", 8 if self.device.type == "cuda" else 2, say)

    def profile(self, say: Callable[[str], None]) -> Row:
        """Profile one training step and one sampling call: number and time of kernels, and gaps between them."""
        ways = self._here(HALF | {"cuda_graph"})
        found: Row = {}
        for name, run in {
            "training step": TrainingStep(self.base, ways, 1, self.resolution).run,
            "sampling, 10 steps": Sampling(self.base, ways, 1, self.resolution, 10).run,
        }.items():
            for _ in range(2):
                run()
            wall, profiled = self._profiled(run)
            own = "self_device_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
            events = sorted(profiled.key_averages(), key=lambda event: -getattr(event, own))
            found[name] = {
                "wall_ms": wall,
                "busy_ms": _busy_ms(profiled),
                "kernels": len(_kernels(profiled)),
                "top": [[e.key[:90], getattr(e, own) / 1e3, e.count] for e in events[:15]],
            }
            say(f"  {name}: {wall:.2f} ms, kernels {found[name]['busy_ms']:.2f} ms in {found[name]['kernels']}")
        return found

    def _profiled(self, run: Callable[[], object]) -> tuple[float, profiler.profile]:
        """Return the milliseconds of one run without the profiler, and the profile of another."""
        wall, _ = time_run(run, self.device)
        activities = [profiler.ProfilerActivity.CPU] + [profiler.ProfilerActivity.CUDA] * (self.device.type == "cuda")
        with profiler.profile(activities=activities) as profiled:
            run()
            self._synchronize()
        return wall, profiled

    def tests(self, say: Callable[[str], None]) -> Row:
        """Run the tests that need a CUDA device."""
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--show-capture=no", "--tb=short", "tests"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        lines = done.stdout.strip().splitlines()
        say(f"  {lines[-1] if lines else done.stderr[-200:]}")
        return {"passed": done.returncode == 0, "summary": lines[-1] if lines else "", "output": done.stdout[-6000:]}

    # --- rows --------------------------------------------------------------------------------------------------

    def _rows(
        self, ways: dict[str, frozenset[str] | None], what: str, batch: int, say: Callable[[str], None]
    ) -> list[Row]:
        rows: list[Row] = self.results.setdefault(what, [])
        for name, switches in ways.items():
            compiles = "compiled" in name or "autotune" in name
            if (compiles and not self.compiled) or (self.device.type != "cuda" and "captured" in name):
                continue
            if any(row["name"] == name and row["batch"] == batch for row in rows):
                continue  # of an interrupted run
            try:
                row = self._row(lambda: self._contender(name, switches, what, batch))  # noqa: B023, called at once
            except (RuntimeError, ValueError) as error:  # one way that fails must not hide the others
                row = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
            rows.append({"name": name, "batch": batch, **row})
            self._keep()
            say(f"  {what}, batch {batch}: {name}: {row.get('error') or format(row['ms'], '.2f') + ' ms'}")
        return rows

    def _here(self, switches: frozenset[str]) -> frozenset[str]:
        """Return the switches without those that only a GPU gains from."""
        return switches if self.device.type == "cuda" else switches - {"float16", "channels_last", "cuda_graph"}

    def _contender(self, name: str, switches: frozenset[str] | None, what: str, batch: int) -> Contender:
        if switches is None:
            return peer_contender(self.base, name, what, self._here(HALF), batch, self.resolution, self.steps)
        if name == "stylediffusion":
            return inversion_step(variant(self.base, DEFAULTS), self.resolution)  # which freezes what it is given
        switches = self._here(switches)
        if what in ("train", "methods"):
            return training_contender(self.base, name, switches, batch, self.resolution)
        return sampling_contender(self.base, name, switches, batch, self.resolution, self.steps)

    def _row(self, make: Callable[[], Contender]) -> Row:
        """Time one way alone; the peak of memory is without the base model, except where its weights are used."""
        gc.collect()
        before = 0
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            before = torch.cuda.memory_allocated(self.device)
        start = time.perf_counter()
        contender = make()
        contender.run()
        self._synchronize()
        first = time.perf_counter() - start
        contender.run()
        peak = None
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            contender.run()
            self._synchronize()
            peak = torch.cuda.max_memory_allocated(self.device) - (before if contender.dtype != torch.float32 else 0)
        times = [time_run(contender.run, self.device)[0] for _ in range(self.repeats)]
        return {
            "ms": statistics.median(times),
            "from": min(times),
            "to": max(times),
            "first_s": first,
            "peak_gb": peak and peak / 1e9,
        }

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    # --- goals and tables --------------------------------------------------------------------------------------

    def goals(self) -> list[tuple[str, str, bool | None]]:
        """Return (goal, what was measured, whether it is reached; None: not measured)."""
        train = {row["name"]: row.get("ms") for row in self.results.get("train", [])}
        sample = {row["name"]: row.get("ms") for row in self.results.get("sample", []) if row["batch"] == 1}
        memory = {row["name"]: row.get("peak_gb") for row in self.results.get("train", [])}
        ours = _best(train, "ours")
        seconds = self.results.get("learn", {}).get("seconds")
        fastest = _best(sample, "ours")
        rate = fastest and 1e3 * self.steps / fastest
        compiled = sample.get("diffusers-compiled")
        if self.size != "sd-v1":  # the goals are of Stable Diffusion's size
            train, sample, memory = {}, {}, {}
            seconds = fastest = rate = ours = compiled = None
        return [
            _goal("learning step against the reference's way ≥ 8×", _ratio(train.get("reference"), ours), 8, "×"),
            _goal("learning step against diffusers' best ≥ 1.5×", _ratio(_best(train, "diffusers"), ours), 1.5, "×"),
            _goal("600 steps of one concept ≤ 8 s", seconds, 8, "s", at_most=True),
            _goal("DDIM 50, batch 1, against diffusers compiled ≥ 1.1×", _ratio(compiled, fastest), 1.1, "×"),
            _goal("DDIM 50, batch 1 ≥ 105 it/s", rate, 105, "it/s"),
            _goal("peak memory of learning ≤ 6 GB", memory.get("ours, captured"), 6, "GB", at_most=True),
        ]

    def markdown(self) -> str:
        """Return the tables, with the device's name."""
        lines = [f"Measured on {self.results['device']}, torch {self.results['torch']}, {self.results['size']}.", ""]
        lines += ["| goal | measured | |", "|---|---|---|"]
        marks = {True: "pass", False: "miss", None: "waiting"}
        lines += [f"| {goal} | {measured} | {marks[reached]} |" for goal, measured, reached in self.goals()]
        if "learn" in self.results:
            lines += ["", f"Learning, captured where that is possible: {_learning(self.results['learn'])}."]
        for what in ("train", "methods", "sample"):
            if what in self.results:
                lines += ["", f"| {what} | batch | ms | first, s | peak, GB |", "|---|---|---|---|---|"]
                lines += [_line(row) for row in self.results[what]]
        if "parity" in self.results:
            lines += ["", "| parity | precision | deviation | |", "|---|---|---|---|"]
        for row in self.results.get("parity", []):
            verdict = "ok" if row["ok"] else "too far"
            lines.append(f"| {row['what']} | {row['dtype']} | {row['deviation']:.1e} | {verdict} |")
        for name, found in self.results.get("profile", {}).items():
            wall, busy, kernels = found["wall_ms"], found["busy_ms"], found["kernels"]
            gaps = f"{kernels} kernels take {busy:.2f} ms, gaps {wall - busy:.2f} ms"
            lines += ["", f"One {name}: {wall:.2f} ms; {gaps}."]
        if "tests" in self.results:
            lines += ["", f"Tests on the device: {self.results['tests']['summary']}"]
        return "\n".join(lines) + "\n"


def _kernels(profiled: profiler.profile) -> list[Any]:
    """Return the kernels of a profile; on the CPU there are none, and the operations without their parts stand in."""
    events = list(profiled.events() or [])
    kernels = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    return kernels or [event for event in events if event.cpu_parent is None]


def _busy_ms(profiled: profiler.profile) -> float:
    return sum(kernel.time_range.elapsed_us() for kernel in _kernels(profiled)) / 1e3


def _learning(found: Row) -> str:
    """Say what the section `learn` found, in one line."""
    memory = f"{found['peak_gb']:.1f} GB at the peak" if found["peak_gb"] else "peak of memory unknown"
    use = f"kernels run {found['busy']:.0%} of the time, {found['of_ceiling']:.0%} of what matrix products reach"
    seconds = f"{found['steps']} steps in {found['seconds']:.1f} s"
    return f"{seconds}, the first after {found['first_step_s']:.1f} s; {use}; {memory}"


def _best(ms: dict[str, float | None], prefix: str) -> float | None:
    return min((value for name, value in ms.items() if name.startswith(prefix) and value), default=None)


def _ratio(slow: float | None, fast: float | None) -> float | None:
    return slow / fast if slow and fast else None


def _goal(
    text: str, value: float | None, bound: float, unit: str, at_most: bool = False
) -> tuple[str, str, bool | None]:
    if value is None:
        return text, "", None
    return text, f"{value:.3g} {unit}", value <= bound if at_most else value >= bound


def _line(row: Row) -> str:
    if "error" in row:
        return f"| {row['name']} | {row['batch']} | {row['error']} | | |"
    peak = f"{row['peak_gb']:.1f}" if row["peak_gb"] else ""
    return f"| {row['name']} | {row['batch']} | {row['ms']:.2f} | {row['first_s']:.1f} | {peak} |"
