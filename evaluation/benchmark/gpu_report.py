"""Everything that waits for a GPU, in one resumable run: parity, learning, sampling, tests and a profile.

Each section's results are kept in `report.json` as soon as they are there; a section that is there is not run again.
`report.md` has the tables, the goals with pass or miss, and the device's name. On the CPU the same sections run on the
small model, to test the report itself.
"""

from __future__ import annotations

import gc
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import profiler

from evaluation.benchmark import ours, peer
from evaluation.benchmark.editing import inversion_step
from evaluation.benchmark.measure import (
    Contender,
    Row,
    count_flop,
    device_name,
    matmul_ceiling,
    measure,
    peak_memory,
    time_run,
)
from evaluation.benchmark.models import CONFIGS, ROOT, VOCABULARY, build_model, variant
from evaluation.benchmark.switches import DEFAULTS, REFERENCE, Work
from evaluation.statistics import table
from ldm.files.texts import read_text
from ldm.files.writing import replace_text
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.request import shown

Say = Callable[[str], None]
Ways = Mapping[str, frozenset[str] | None]  # name -> switches; None: the peer of that name

HALF = DEFAULTS | {"float16", "channels_last"}
CAPTURED = HALF | {"cuda_graph"}
TRAINING: Ways = {
    "reference": REFERENCE,
    "ours": HALF,
    "ours, captured": CAPTURED,
    "ours, captured, bfloat16": DEFAULTS | {"bfloat16", "channels_last", "cuda_graph"},
    "diffusers": None,
    "ours, compiled": HALF | {"compile"},
    "diffusers-compiled": None,
}
SAMPLING: Ways = {
    "ours, captured": CAPTURED,
    "diffusers": None,
    "ours, compiled": HALF | {"compile"},
    "diffusers-compiled": None,
    "ours": HALF,
    "ours, max-autotune": HALF | {"max_autotune"},
    "DPM++, two fifths of the steps, captured": CAPTURED | {"fast"},
    "guidance in half of the stages, captured": CAPTURED | {"half_guided"},
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

    def __init__(self, folder: Path, device: torch.device, size: str, compiled: bool, repeats: int, say: Say) -> None:
        self.folder, self.device, self.size, self.say = folder, device, size, say
        self.compiled, self.repeats, self.on_gpu = compiled, repeats, device.type == "cuda"
        resolution, steps = (512, 50) if size == "sd-v1" else (128, 10)
        self.work = Work("train", 1, resolution, steps)
        self._base: LatentDiffusion | None = None
        self.results = read_report(folder / "report.json", device_name(device), size)
        self.results |= {"device": device_name(device), "torch": torch.__version__, "size": size}

    @property
    def base(self) -> LatentDiffusion:
        if self._base is None:
            self._base = build_model(self.size, self.device)
        return self._base

    def run(self, sections: Sequence[str]) -> None:
        """Run the sections whose results are missing, and keep each as soon as it is complete."""
        for name in sections:
            if name in self.results.setdefault("complete", []):
                self.say(f"{name}: kept from before")
                continue
            start = time.perf_counter()
            self.results[name] = getattr(self, name)()
            self.results["complete"].append(name)
            self._keep()
            self.say(f"{name}: {time.perf_counter() - start:.0f} s")

    def _keep(self) -> None:
        replace_text(self.folder / "report.json", json.dumps(self.results, indent=1) + "\n")
        replace_text(self.folder / "report.md", self.markdown())

    # --- sections ----------------------------------------------------------------------------------------------

    def parity(self) -> list[Row]:
        """Compare with the reference's recorded numbers on this device, in every precision."""
        from evaluation.benchmark.parity import deviations

        half = ("float16", "bfloat16") if self.on_gpu else ("bfloat16",)
        rows = [row for dtype in ("float32", *half) for row in deviations(self.device, dtype)]
        for row in rows:
            self.say(f"  {row['what']:8} {row['dtype']:9} {row['deviation']:.1e} {'ok' if row['ok'] else 'TOO FAR'}")
        return rows

    def learn(self) -> Row:
        """Learn one concept: 600 steps without start-up, and `main.py` as a whole."""
        steps = 600 if self.size == "sd-v1" else 40
        captured, base = self._here(CAPTURED), self.base
        before = self._allocated()  # in float32, not used

        def begin() -> ours.TrainingStep:
            step = ours.TrainingStep(base, captured, self.work)
            step.run()
            return step

        first, step = self._seconds(begin)
        seconds, _ = self._seconds(lambda: [step.run() for _ in range(steps)])
        peak = peak_memory(step.run, self.device)
        profiled = self._profiled(step.run)
        counted = ours.TrainingStep(base, captured - {"cuda_graph"}, self.work)  # a graph hides what it does
        ceiling = matmul_ceiling(self.device, torch.float16 if self.on_gpu else torch.float32)
        found = {
            "steps": steps,
            "seconds": seconds,
            "first_step_s": first,
            "peak_gb": peak and (peak - before) / 1e9,
            "busy": profiled["busy_ms"] / profiled["wall_ms"],
            "of_ceiling": count_flop(counted.run) / ceiling / (1e3 * seconds / steps),
        }
        self.say(f"  {_learning(found)}")
        return {**found, **self._learn_by_command(steps)}

    def _learn_by_command(self, steps: int) -> Row:
        with tempfile.TemporaryDirectory() as folder:
            command = ["main.py", "--base", CONFIGS[self.size], "-t", "-p", f"{folder}/run", "--gpus", "0,"]
            command += ["--data_root", "models/demo/references/dotted-star", "--max_steps", str(steps)]
            command += ["model.params.ckpt_path=null"]
            command += [f"model.params.cond_stage_config.params.tokenizer={ROOT / VOCABULARY}"] * (self.size == "sd-v1")
            fast = ("frozen_dtype=float16", "cuda_graph=true", "channels_last=true") if self.on_gpu else ()
            seconds, done = self._seconds(lambda: _python(*command, *(f"model.params.{switch}" for switch in fast)))
        self.say(f"  main.py: {seconds:.1f} s, exit code {done.returncode}")
        return {"command_s": seconds, "command_code": done.returncode, "command_tail": done.stderr[-600:]}

    def train(self) -> list[Row]:
        """Time a training step, batch 1, in every way."""
        return self._rows("train", TRAINING, self.work)

    def methods(self) -> list[Row]:
        """Time a training step of every method, eager and captured, and one of StyleDiffusion, eager and in float32."""
        for method in METHODS:
            base, self._base = self._base, build_model(self.size, self.device, [f"{METHOD}={method}"])
            self._rows("methods", {method: HALF, f"{method}, captured": CAPTURED}, self.work)
            self._base = base
        return self._rows("methods", {"stylediffusion": DEFAULTS}, self.work)

    def sample(self) -> list[Row]:
        """Time DDIM from noise to images, batch 1 and 8, in every way."""
        work = self.work._replace(what="sample")
        self._rows("sample", SAMPLING, work)
        some = {name: ways for name, ways in SAMPLING.items() if not _compiles(name)}
        return self._rows("sample", some, work._replace(batch=8 if self.on_gpu else 2))

    def profile(self) -> Row:
        """Profile one training step and one sampling call: number and time of kernels, and gaps between them."""
        ways, work = self._here(CAPTURED), self.work._replace(steps=10)
        found = {
            "training step": self._profiled(ours.TrainingStep(self.base, ways, work).run),
            "sampling, 10 steps": self._profiled(ours.Sampling(self.base, ways, work).run),
        }
        for name, x in found.items():
            self.say(f"  {name}: {x['wall_ms']:.2f} ms, kernels {x['busy_ms']:.2f} ms in {x['kernels']}")
        return found

    def tests(self) -> Row:
        """Run the tests that need a CUDA device."""
        done = _python("-m", "pytest", "-q", "-m", "gpu", "--show-capture=no", "--tb=short", "tests")
        lines = done.stdout.strip().splitlines()
        self.say(f"  {lines[-1] if lines else done.stderr[-200:]}")
        return {"passed": done.returncode == 0, "summary": lines[-1] if lines else "", "output": done.stdout[-6000:]}

    # --- rows --------------------------------------------------------------------------------------------------

    def _rows(self, section: str, ways: Ways, work: Work) -> list[Row]:
        rows: list[Row] = self.results.setdefault(section, [])
        for name, switches in ways.items():
            if (_compiles(name) and not self.compiled) or (not self.on_gpu and "captured" in name):
                continue
            if any(row["name"] == name and row["batch"] == work.batch for row in rows):
                continue  # of an interrupted run
            try:
                row = self._row(name, switches, work)
            except (RuntimeError, ValueError) as error:  # one way that fails must not hide the others
                row = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
            rows.append({"name": name, "batch": work.batch, **row})
            self._keep()
            self.say(f"  {section}, batch {work.batch}: {name}: {row.get('error') or format(row['ms'], '.2f') + ' ms'}")
        return rows

    def _row(self, name: str, switches: frozenset[str] | None, work: Work) -> Row:
        """Time one way alone; the peak of memory is without the base model, except where its weights are used."""
        base = self.base
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
        before = self._allocated()

        def begin() -> Contender:
            if name == "stylediffusion":
                way = inversion_step(variant(base, DEFAULTS), work.resolution)  # which freezes what it is given
            elif switches is None:
                way = peer.contender(base, work, self._here(HALF), name)
            else:
                way = ours.contender(base, work, self._here(switches), name)
            way.run()
            return way

        first, way = self._seconds(begin)
        (row,) = measure([replace(way, result=None)], self.device, self.repeats)
        unused = before if way.dtype != torch.float32 else 0
        peak = row["peak_mb"] / 1e3 - unused / 1e9 if self.on_gpu else None
        return {"ms": row["ms"], "from": row["ms_from"], "to": row["ms_to"], "first_s": first, "peak_gb": peak}

    def _here(self, switches: frozenset[str]) -> frozenset[str]:
        """Return the switches without those that only a GPU gains from."""
        return switches if self.on_gpu else switches - {"float16", "channels_last", "cuda_graph"}

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.on_gpu else 0

    def _seconds(self, work: Callable[[], Any]) -> tuple[float, Any]:
        """Return how long it takes until the device is done, and what it returns."""
        found = []
        wall, _ = time_run(lambda: found.append(work()), self.device)
        return wall / 1e3, found[0]

    def _profiled(self, run: Callable[[], object]) -> Row:
        """Return what a profile of one run shows, and the milliseconds of another without the profiler.

        On the CPU there are no kernels, and the operations without their parts stand in.
        """
        for _ in range(2):
            run()
        wall, _ = time_run(run, self.device)
        activities = [profiler.ProfilerActivity.CPU] + [profiler.ProfilerActivity.CUDA] * self.on_gpu
        with profiler.profile(activities=activities) as profiled:
            time_run(run, self.device)
        events = list(profiled.events() or [])
        kernels = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
        kernels = kernels or [event for event in events if event.cpu_parent is None]
        own = "self_device_time_total" if self.on_gpu else "self_cpu_time_total"
        top = sorted(profiled.key_averages(), key=lambda event: -getattr(event, own))[:15]
        return {
            "wall_ms": wall,
            "busy_ms": sum(kernel.time_range.elapsed_us() for kernel in kernels) / 1e3,
            "kernels": len(kernels),
            "top": [[event.key[:90], getattr(event, own) / 1e3, event.count] for event in top],
        }

    # --- goals and tables --------------------------------------------------------------------------------------

    def goals(self) -> list[tuple[str, str, str]]:
        """Return (goal, what was measured, pass or miss)."""
        results = self.results if self.size == "sd-v1" else {}  # the goals are of Stable Diffusion's size

        def best(section: str, names: str, key: str = "ms") -> float | None:
            rows = [row for row in results.get(section, []) if row["batch"] == 1 and re.fullmatch(names, row["name"])]
            return min((row[key] for row in rows if row.get(key)), default=None)

        def ratio(slow: float | None, fast: float | None) -> float | None:
            return slow / fast if slow and fast else None

        ours, fastest = best("train", "ours.*"), best("sample", "ours.*")
        compiled = best("sample", "diffusers-compiled")
        seconds, memory = results.get("learn", {}).get("seconds"), best("train", "ours, captured", "peak_gb")
        goals = [
            ("learning step against the reference's way ≥", 8, "×", ratio(best("train", "reference"), ours)),
            ("learning step against diffusers' best ≥", 1.5, "×", ratio(best("train", "diffusers.*"), ours)),
            ("600 steps of one concept ≤", 8, " s", seconds),
            ("DDIM 50, batch 1, against diffusers compiled ≥", 1.1, "×", ratio(compiled, fastest)),
            ("DDIM 50, batch 1 ≥", 105, " it/s", ratio(1e3 * self.work.steps, fastest)),
            ("peak memory of learning ≤", 6, " GB", memory),
        ]
        lines = []
        for goal, bound, unit, value in goals:
            reached = value is not None and (value <= bound if goal.endswith("≤") else value >= bound)
            measured = "" if value is None else f"{value:.3g} {unit.strip()}"
            lines.append((f"{goal} {bound}{unit}", measured, "pass" if reached else "miss" if measured else "waiting"))
        return lines

    def markdown(self) -> str:
        """Return the tables, with the device's name."""
        found = self.results
        parts = [f"Measured on {found['device']}, torch {found['torch']}, {found['size']}."]
        parts.append(table(["goal", "measured", ""], self.goals()))
        if "learn" in found:
            parts.append(f"Learning, captured where that is possible: {_learning(found['learn'])}.")
        for section in ("train", "methods", "sample"):
            if section in found:
                parts.append(table([section, "batch", "ms", "first, s", "peak, GB"], map(_cells, found[section])))
        if "parity" in found:
            lines = [
                (row["what"], row["dtype"], f"{row['deviation']:.1e}", "ok" if row["ok"] else "too far")
                for row in found["parity"]
            ]
            parts.append(table(["parity", "precision", "deviation", ""], lines))
        for name, x in found.get("profile", {}).items():
            gaps = f"{x['kernels']} kernels take {x['busy_ms']:.2f} ms, gaps {x['wall_ms'] - x['busy_ms']:.2f} ms"
            parts.append(f"One {name}: {x['wall_ms']:.2f} ms; {gaps}.")
        if "tests" in found:
            parts.append(f"Tests on the device: {found['tests']['summary']}")
        return "\n\n".join(parts) + "\n"


def read_report(file: Path, device: str, size: str) -> dict[str, Any]:
    """Return the results of an earlier run, {} without one.

    Raises:
        ValueError: the report is of another device or size, or a file of something else.
    """
    if not file.exists():
        return {}
    try:
        found = json.loads(read_text(file, "--out"))
        made_for = found["device"], found["size"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"'{file}' is no report of this script; give another folder with --out.") from error
    if made_for != (device, size):
        remedy = f"for {device} and {size}, give another folder with --out"
        raise ValueError(f"'{file}' was measured on {shown(made_for[0])} with {shown(made_for[1])}; {remedy}.")
    return found


def _compiles(name: str) -> bool:
    return "compiled" in name or "autotune" in name


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def _learning(found: Row) -> str:
    """Say what the section `learn` found, in one line."""
    memory = f"{found['peak_gb']:.1f} GB at the peak" if found["peak_gb"] else "peak of memory unknown"
    use = f"kernels run {found['busy']:.0%} of the time, {found['of_ceiling']:.0%} of what matrix products reach"
    seconds = f"{found['steps']} steps in {found['seconds']:.1f} s"
    return f"{seconds}, the first after {found['first_step_s']:.1f} s; {use}; {memory}"


def _cells(row: Row) -> list[object]:
    if "error" in row:
        return [row["name"], row["batch"], row["error"], "", ""]
    peak = f"{row['peak_gb']:.1f}" if row["peak_gb"] else ""
    return [row["name"], row["batch"], f"{row['ms']:.2f}", f"{row['first_s']:.1f}", peak]
