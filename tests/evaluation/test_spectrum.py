"""`scripts/spectrum.py` and `scripts/accuracy.py` from end to end on the small model that ships, in few steps."""

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from evaluation import captions, jobs, plots, spectrum
from evaluation.concepts import MAX_STEPS
from evaluation.judges import DistanceJudge, colour_distance
from evaluation.statistics import mean_interval, share_interval, wilson
from ldm.conditioning.presets import load_presets
from scripts import accuracy
from scripts import spectrum as command

ROOT = Path(__file__).parents[2]
MODEL, CONCEPT = "models/demo/model.safetensors", "models/demo/concepts/dotted-star.safetensors"
FEW = [(3, 4), (0, 9)]  # windows of the rendered world's concepts; all 55 take too long here
Run = Callable[..., None]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    def call(script, *flags: object) -> None:
        monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, flags)])
        script.main()

    return call


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "spectrum.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_rendered_world(tmp_path: Path, run: Run, monkeypatch):
    """Presets, figures and table; then another model, for which everything is made anew."""
    monkeypatch.setattr(spectrum, "all_windows", lambda: FEW)
    # two steps of learning, and not in bfloat16, in which many processors are slow
    monkeypatch.setattr(spectrum, "SETTINGS", {MAX_STEPS: 2})
    out, presets = tmp_path / "out", tmp_path / "new" / "presets.yaml"
    flags = ["--concepts", 1, "--count", 2, "--width", 10, "--steps", 2, "--workers", 1]
    run(command, *flags, "--write-presets", presets, "--outdir", out)
    windows = {tuple(range(first, last + 1)) for first, last in FEW}
    assert set(load_presets(presets).values()) <= windows and len(yaml.safe_load(presets.read_text())) == 4
    concepts = [f"concept-{name}" for name in ("content", "layout", "material", "style")]
    strips = {path.name for path in out.glob("strip-*.png")}
    assert {path.name for path in out.glob("*.png")} - strips == {
        f"{name}.png" for name in ("withhold", "add", "switch", *concepts)
    }
    assert len(strips) == 1 + 6 + 1 + 4
    table = rows(out)
    assert {row["images"] for row in table if row["experiment"] in concepts} == {"4"}
    assert {row["images"] for row in table if row["experiment"] not in concepts} == {"2"}
    assert [row["stages"] for row in table if row["experiment"] == "concept-style"][::6] == ["3-4", "0-9"]
    # one concept tells nothing of others; captions do
    assert {(row["low"], row["high"]) for row in table if row["experiment"] in concepts} == {("0.0", "1.0")}
    assert ("0.0", "1.0") not in {(row["low"], row["high"]) for row in table if row["experiment"] == "switch"}

    monkeypatch.setattr(plots, "plot_spectrum", lambda *_: [])
    monkeypatch.setattr(spectrum, "caption_experiments", lambda *_: {})
    before = set(out.rglob("*.npz"))
    run(command, *flags, "--outdir", out)
    assert set(out.rglob("*.npz")) == before, "nothing is made twice"
    state, changed = load_file(MODEL), tmp_path / "changed.safetensors"
    state[next(name for name in state if name.endswith("token_embedding.weight"))] += 0.01
    with safe_open(MODEL, "pt") as file:
        save_file(state, changed, file.metadata())
    run(command, *flags, "--ckpt", changed, "--outdir", out)
    new = set(out.rglob("*.npz")) - before
    parts = [path.relative_to(out).parts[0] for path in new]
    assert sorted(parts) == ["drawn"] * 3 * len(FEW) + ["learned"], "material and style have one prompt"
    first, second = (np.load(path)["vectors"] for path in out.rglob("*.npz") if "learned" in path.parts)
    assert not np.allclose(first, second)


def test_ones_own_prompts(tmp_path: Path, run: Run, monkeypatch):
    maps, heat_map = {}, plots.heat_map

    def record(values, rows, columns, title, path):
        assert values.shape == (len(rows), len(columns)) and ((values >= 0) & (values <= 1)).all()
        maps[path.name] = list(rows), list(columns), title
        heat_map(values, rows, columns, title, path)

    monkeypatch.setattr(plots, "heat_map", record)
    flags = ["--prompt", "", "--add", "a blue heart", "--switch", "a star", "--size", 32]  # an empty prompt is one
    flags += ["--concept", f"{CONCEPT}=a * heart", "--count", 2, "--steps", 2, "--workers", 1, "--outdir", tmp_path]
    run(command, *flags)
    sliding = ["0-2", "1-3", "2-4", "3-5", "4-6", "5-7", "6-8", "7-9"]
    windows = {"withhold": sliding, "add": sliding, "switch": [str(k) for k in range(11)], "concept": sliding}
    assert {name: columns for name, (_, columns, _) in maps.items()} == {f"{k}.png": v for k, v in windows.items()}
    made = {path.name for path in tmp_path.glob("*.png")}
    assert made == {*maps, *(f"strip-{name}" for name in maps)}
    assert {tuple(rows) for rows, _, _ in maps.values()} == {("colour", "structure")}
    assert "`*` in all stages" in maps["concept.png"][2] and "learned image" not in maps["concept.png"][2]
    table = rows(tmp_path)
    assert len(table) == 2 * sum(map(len, windows.values()))
    poles = {row["stages"]: row["mean"] for row in table if row["experiment"] == "switch" and row["judged"] == "colour"}
    assert (poles["0"], poles["10"]) == ("1.0", "0.0")
    drawn = [np.load(path)["images"] for path in tmp_path.rglob("*.npz")]
    assert {images.shape for images in drawn} == {(2, 32, 32, 3)}
    concept = {row["mean"] for row in table if row["experiment"] == "concept"}
    assert len(concept) > 2, "the concept changes images"


def test_accuracy(tmp_path: Path, run: Run, monkeypatch):
    """Captions and the classifier's own columns are of the same kind of combinations."""
    asked, judge_itself, random_attributes = [], captions.judge_itself, captions.random_attributes

    def judge_few(count: int, **arguments):
        return judge_itself(count=count // 62, **arguments)

    def spy(count, seed, held_out):
        asked.append((count, held_out))
        return random_attributes(count, seed, held_out)

    monkeypatch.setattr(captions, "judge_itself", judge_few)
    monkeypatch.setattr(captions, "random_attributes", spy)
    flags = ["--count", 2, "--steps", 2, "--workers", 1, "--seen", "--outdir", tmp_path]
    run(accuracy, *flags)
    assert asked == [(2, False), (8, False)]
    table = json.loads((tmp_path / "accuracy.json").read_text())
    assert table["captions"] == 2 and table["steps"] == 2 and table["held_out"] is False
    found = [dict(np.load(path)) for path in tmp_path.rglob("*.npz")]
    (correct,) = (result["correct"] for result in found if "correct" in result)
    low, high = wilson(correct[:, 0].sum(), 2)
    assert table["position"].items() >= {"share": correct[:, 0].mean(), "low": low, "high": high}.items()
    assert table["position"]["rendered"] >= 0.9 and (tmp_path / "images.png").is_file()


OWN = ["--prompt", "a star"]
PRESETS = "--write-presets"


@pytest.mark.parametrize(
    ("script", "flags", "sentence"),
    [
        (command, ["--count", 0], "--count:"),
        (accuracy, ["--count", "x"], "--count:"),
        (command, ["--workers", "x"], "--workers:"),
        (command, ["--steps", 1001], "must be in 1..1000, not 1001"),
        (accuracy, ["--scale", "nan"], "scale must be in 0.."),
        *((s, ["--outdir", "README.md"], "give a folder with --outdir") for s in (command, accuracy)),
        *((s, ["--classifier", "none.safetensors"], "There is no file 'none.") for s in (command, accuracy)),
        (command, ["--concepts", -1], "--concepts:"),
        (command, ["--width", 11], "--width must be in 1..10, not 11"),
        (command, ["--size", 64], "128 pixels a side, not 64"),
        (command, [*OWN, "--size", 60], "must be a multiple of 32 for this model, not 60; nearest: 64"),
        *((command, [flag, ""], f"{flag} goes with --prompt") for flag in ("--add", "--concept")),
        (command, ["--lpips"], "--lpips goes with --prompt"),
        *((command, [*OWN, "--concept", x], "takes FILE=PROMPT with a *") for x in ("", f"{CONCEPT}=a mug")),
        (command, [*OWN, "--concept", "none.safetensors=a *"], "There is no file 'none.safetensors'"),
        (command, [*OWN, "--concept", "README.md=a *"], "'README.md' is a text file"),
        (command, [PRESETS, "README.md/presets.yaml"], "'README.md'"),
        (command, [PRESETS, MODEL], "does not hold presets, and would be lost"),
        (command, [PRESETS, "models/demo/presets.yaml"], "is there already; use --force"),
        (command, [PRESETS, "docs"], "'docs' is a folder; name another file"),
        *((command, [PRESETS, "p.yaml", *x], "needs concepts of") for x in (["--concepts", 0], ["--prompt", ""])),
    ],
)
def test_what_cannot_be_done_is_one_sentence_before_drawing(
    script, flags: list[object], sentence: str, tmp_path: Path, capsys, run: Run, monkeypatch
):
    def start(*_, **__):
        raise AssertionError("work has started")

    for module in (jobs, spectrum):
        monkeypatch.setattr(module, "run_jobs", start)
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stop:
        run(script, "--outdir", out, *flags)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and sentence in error and error.count("\n") == 1, error
    assert not out.exists()


def test_intervals_count_what_is_independent():
    """Eight concepts of four images each, which are all alike within a concept."""
    concepts = np.array([1, 1, 1, 1, 1, 0, 0, 0.0])
    values = concepts.repeat(4)
    assert spectrum.interval(values, 1, counts=True) == wilson(20, 32)
    assert spectrum.interval(values, 4, counts=True) == share_interval(concepts)
    distances = np.linspace(0.4, 0.6, 32)
    assert spectrum.interval(distances, 1, counts=False) == mean_interval(distances, 0, 1)
    assert spectrum.interval(values[:4], 4, counts=True) == (0.0, 1.0)
    made = spectrum.concept_experiments({"<0>": "a", "<1>": "b"}, seeds=3)["concept-style"]
    assert made.together == 3 and len(set(made.seeds)) == 6  # every concept has seeds of its own
    assert spectrum.caption_experiments(2, spectrum.sliding(3))["switch"].together == 1


def test_the_stage_at_which_half_of_the_images_change_over():
    shares = {"0": [1.0, 1.0], "1": [0.75, 1.0], "2": [0.25, 1.0], "3": [0.5, 1.0]}
    found = {k: np.array([row, row]) for k, row in shares.items()}
    places = spectrum.half_way(found, DistanceJudge())
    assert places["colour"] == 1.5 and np.isnan(places["structure"])


def test_a_concept_of_all_windows_is_drawn_with_those_at_one_end(tmp_path: Path, monkeypatch):
    maps = {}
    monkeypatch.setattr(plots, "heat_map", lambda values, rows, columns, title, *_: maps.update({title: columns}))
    made = spectrum.concept_experiments({"<0>": "a"}, seeds=1)["concept-style"]
    found = spectrum.Spectrum({"concept-style": {window: np.zeros((1, 2)) for window in made.conditions}}, {})
    plots.plot_spectrum(found, {"concept-style": made}, DistanceJudge(), tmp_path)
    ((title, columns),) = maps.items()
    assert len(columns) == 19 and {"0", "0-9", "9", "4-9"} <= set(columns) and "4-8" not in columns
    assert "comes from the learned image" in title


def test_colours_are_counted_in_little_memory():
    red, blue = (torch.full((1, 3, 4, 4), -1.0) for _ in range(2))
    red[:, 0], blue[:, 2] = 1.0, 1.0
    half = torch.cat([red[..., :2], blue[..., :2]], dim=-1)
    assert colour_distance(torch.cat([red, red, half]), torch.cat([red, blue, blue])).tolist() == [0.0, 1.0, 0.5]
    with torch.profiler.profile(profile_memory=True) as watch:
        colour_distance(torch.zeros(2, 3, 64, 64), torch.ones(2, 3, 64, 64))
    assert max(event.cpu_memory_usage for event in watch.key_averages()) < 2**21  # one-hot: 2**25
