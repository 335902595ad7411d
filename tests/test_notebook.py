"""`ProSpect.ipynb`: saved without outputs, and it runs from its first cell to its last."""

import ast
import functools
import inspect
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import torch
from IPython.core.oinspect import Inspector
from nbclient.exceptions import CellExecutionError
from PIL import Image
from safetensors.torch import load_file

from ldm.conditioning.presets import load_presets
from ldm.embeddings import Concept, load_concept, save_concept
from ldm.generate import main, read_parameters
from ldm.models.diffusion.ddpm import LatentDiffusion
from scripts.demo import execute

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "ProSpect.ipynb"


@pytest.fixture
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the notebook writes to; it is told so by environment variables, and to take few steps."""
    for number, variable in enumerate(("PROSPECT_CONCEPT", "PROSPECT_CONCEPT_2")):
        generator = torch.Generator().manual_seed(number)
        save_concept(Concept(torch.randn(10, 128, generator=generator)), tmp_path / f"{variable}.safetensors")
        monkeypatch.setenv(variable, str(tmp_path / f"{variable}.safetensors"))
    monkeypatch.setenv("PROSPECT_STEPS", "1")
    monkeypatch.setenv("PROSPECT_OUTPUTS", str(tmp_path / "outputs"))
    return tmp_path / "outputs"


def stripped(path: Path) -> list[nbformat.NotebookNode]:
    """The code cells of a notebook, which is saved without outputs and has short ones behind the first."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)
    assert all(len(cell.source.splitlines()) <= 16 for cell in cells[1:])
    assert not any(cell.metadata for cell in notebook.cells)
    return cells


def test_the_notebook_is_saved_stripped_and_short() -> None:
    settings, *code = stripped(NOTEBOOK)
    assert not any("models/" in cell.source or " heart" in cell.source for cell in code)  # it stands in the first cell
    table: dict[str, Any] = {}
    exec(settings.source, table)
    for world in table["WORLDS"].values():
        assert world.keys() == table["WORLDS"]["demo"].keys()
    demo = table["WORLDS"]["demo"]
    files = [demo[name] for name in ("config", "ckpt", "concept", "second", "image")] + list(demo["joint"].values())
    assert len(files) == 9 and all((ROOT / file).is_file() for file in files)


NAMES = ["editing", "prompt-to-prompt", "content", "layout", "material", "attributes"]
NAMES += ["flexible", "two-concepts", "joint", "between", "previews"]


def images_of(outputs: Path, shown: int) -> dict[str, Image.Image]:
    """The images that the notebook has written; it has shown a grid for each name."""
    written = {path.name: Image.open(path) for path in outputs.glob("*.png")}
    assert {name.rpartition("-")[0] for name in written} == set(NAMES)
    assert all(np.asarray(image).std() > 0 for image in written.values())
    assert shown == len(NAMES)
    return written


def run_here(notebook: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run the code cells in this process; how many images they show."""
    shown: list[object] = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    names: dict[str, Any] = {}
    for cell in nbformat.read(notebook, as_version=4).cells:
        if cell.cell_type == "code":
            *body, last = ast.parse(cell.source).body
            ends_with_value = isinstance(last, ast.Expr)
            exec(compile(ast.Module(body if ends_with_value else [*body, last], []), cell.id, "exec"), names)
            if ends_with_value:
                shown.append(eval(compile(ast.Expression(last.value), cell.id, "eval"), names))
    return sum(isinstance(value, Image.Image) for value in shown)


def test_the_notebook_runs(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a kernel, `make demo` runs it."""
    monkeypatch.chdir(ROOT)
    written = images_of(outputs, run_here(NOTEBOOK, monkeypatch))
    assert written["content-2.png"].size == (4 * 128, 128)
    words = read_parameters(outputs / "content-2.png")["prospect_words"]
    measured = load_presets(ROOT / "models/demo/presets.yaml")["content"]
    assert [stage for stage, entry in enumerate(words) if "*" in entry] == list(measured)
    assert read_parameters(outputs / "flexible-3.png")["prospect_words"] == [9] * 10
    joint = read_parameters(outputs / "joint-1.png")["prospect_words"]
    assert [entry.count("<") for entry in joint] == [0, 0, 0, 1, 1, 2, 3, 2, 1, 1]


def test_the_notebook_runs_for_stable_diffusion_by_its_first_cell_alone(
    outputs: Path, tmp_path: Path, tiny_config: Path, tiny_model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On random weights of Stable Diffusion's layout and width, and files where its table looks for them."""
    for variable in ("PROSPECT_CONCEPT", "PROSPECT_CONCEPT_2"):
        monkeypatch.delenv(variable)
    folder = tmp_path / "elsewhere"
    (folder / "configs/stable-diffusion").mkdir(parents=True)
    (folder / "models/sd/concepts").mkdir(parents=True)
    (folder / "models/sd/images").mkdir()
    shutil.copyfile(tiny_config, folder / "configs/stable-diffusion/v1-inference.yaml")
    torch.save({"state_dict": load_file(tiny_config.with_suffix(".safetensors"))}, folder / "models/sd/sd-v1-4.ckpt")
    for number, name in enumerate(("teapot", "teddy")):
        vectors = torch.randn(10, 768, generator=torch.Generator().manual_seed(number))
        save_concept(Concept(vectors), folder / f"models/sd/concepts/{name}.safetensors")
    shutil.copyfile(ROOT / "models/demo/references/dotted-star/dotted-star.png", folder / "models/sd/images/teapot.png")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    settings = next(cell for cell in notebook.cells if cell.id == "settings")
    settings.source = settings.source.replace('MODEL = "demo"', 'MODEL = "sd"')
    nbformat.write(notebook, folder / NOTEBOOK.name)
    monkeypatch.chdir(folder)
    images_of(outputs, run_here(folder / NOTEBOOK.name, monkeypatch))
    words = read_parameters(outputs / "material-2.png")["prospect_words"]
    assert [stage for stage, entry in enumerate(words) if "*" in entry] == [0, 1, 2, 3, 4]  # the paper's


def test_what_the_notebook_shows_of_objects_and_functions_is_short(tiny_model: LatentDiffusion) -> None:
    shown = r"LatentDiffusion\(.*: [\d.]+ M parameters, 10 stages, torch.float32 on cpu; .*\)"
    assert re.fullmatch(shown, repr(tiny_model))
    shown = repr(load_concept(ROOT / "models/demo/concepts/dotted-star.safetensors"))
    assert shown.startswith("Concept('prospect', vectors 10x128, init_word='thing'") and len(shown) < 200

    @functools.wraps(main)
    def generate(*arguments: Any, **settings: Any) -> Any: ...

    found = Inspector(theme_name="nocolor").info(generate)
    lines = f"{found['definition']}\n{found['docstring']}".splitlines()
    names = [line.partition(":")[0].strip() for line in found["docstring"].splitlines()]
    missing = set(inspect.signature(main).parameters) - {name for text in names for name in text.split(", ")}
    assert len(lines) < 70 and not missing and not any("All others" in line for line in lines)
    assert any("strength: how much of the content image is given up" in line for line in lines)


@pytest.mark.skipif(sys.platform == "win32", reason="the platform has no such sockets")
def test_the_kernel_needs_no_network_and_a_failed_notebook_is_written(tmp_path: Path) -> None:
    """Not even the loopback device, which is down where the network is cut off (`make test-offline`)."""
    transport = "import json, ipykernel.connect as c; print(json.loads(c.get_connection_info())['transport'])"
    cells = [nbformat.v4.new_code_cell(source) for source in (transport, "nowhere")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "a.ipynb")
    with pytest.raises(CellExecutionError) as failed:
        execute(tmp_path / "a.ipynb", tmp_path / "b.ipynb")
    assert failed.value.ename == "NameError"
    first, second = nbformat.read(tmp_path / "b.ipynb", as_version=4).cells
    assert first.outputs[0].text == "ipc\n" and second.outputs


def test_the_editing_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved without outputs, in short cells, of which only the first says what is in the images; each shows its own."""
    _, *code = stripped(ROOT / "editing.ipynb")
    assert not any("star" in cell.source or "models/" in cell.source for cell in code)
    monkeypatch.setenv("PROSPECT_STEPS", "2")
    monkeypatch.chdir(ROOT)
    assert run_here(ROOT / "editing.ipynb", monkeypatch) == 7
