"""`ProSpect.ipynb`: saved without outputs, and it runs from its first cell to its last."""

import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from nbclient.exceptions import CellExecutionError
from PIL import Image

from ldm.conditioning.presets import load_presets
from ldm.embeddings import Concept, save_concept
from ldm.generate import read_parameters
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
    monkeypatch.setenv("PROSPECT_STEPS", "3")
    monkeypatch.setenv("PROSPECT_OUTPUTS", str(tmp_path / "outputs"))
    return tmp_path / "outputs"


def test_the_notebook_is_saved_stripped_and_short() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert all(len(cell.source.splitlines()) <= 25 for cell in code)
    assert not any(cell.metadata for cell in notebook.cells)
    settings = code[0].source
    assert all(f"\n{name} = " in settings for name in ("CONFIG", "CKPT", "CONCEPT", "SIZE", "SCALE"))
    named = [line.split('"')[1] for line in settings.splitlines() if line.startswith(("CONFIG", "CKPT"))]
    named += [line.split('"')[3] for line in settings.splitlines() if line.startswith("CONCEPT")]
    assert len(named) == 4 and all((ROOT / path).is_file() for path in named)


def test_the_notebook_runs(outputs: Path) -> None:
    execute(NOTEBOOK, outputs / NOTEBOOK.name)
    written = {path.name: Image.open(path) for path in outputs.glob("*.png")}
    names = ["editing", "prompt-to-prompt", "content", "layout", "material", "attributes"]
    names += ["flexible", "two-concepts", "joint", "between", "previews"]
    assert {name.rpartition("-")[0] for name in written} == set(names)
    assert all(np.asarray(picture).std() > 0 for picture in written.values())
    assert written["content-2.png"].size == (4 * 128, 128)
    words = read_parameters(outputs / "content-2.png")["prospect_words"]
    measured = load_presets(ROOT / "models/demo/presets.yaml")["content"]
    assert [stage for stage, entry in enumerate(words) if "*" in entry] == list(measured)
    assert read_parameters(outputs / "flexible-3.png")["prospect_words"] == [9] * 10
    joint = read_parameters(outputs / "joint-2.png")["prospect_words"]
    assert [entry.count("<") for entry in joint] == [0, 0, 0, 1, 1, 2, 3, 2, 1, 1]
    executed = nbformat.read(outputs / NOTEBOOK.name, as_version=4)
    shown = [
        cell.id
        for cell in executed.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert len(shown) == len(names)


@pytest.mark.skipif(sys.platform == "win32", reason="the platform has no such sockets")
def test_the_kernel_needs_no_network(tmp_path: Path) -> None:
    """Not even the loopback device, which is down where the network is cut off (`make test-offline`)."""
    source = "import json, ipykernel.connect as c; print(json.loads(c.get_connection_info())['transport'])"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)]), tmp_path / "a.ipynb")
    execute(tmp_path / "a.ipynb", tmp_path / "b.ipynb")
    assert nbformat.read(tmp_path / "b.ipynb", as_version=4).cells[0].outputs[0].text == "ipc\n"


def test_a_missing_concept_is_said_in_one_sentence(
    outputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROSPECT_CONCEPT", "nowhere.safetensors")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = {cell.id: cell for cell in notebook.cells}
    notebook.cells = [cells[name] for name in ("settings", "load", "concept")]
    nbformat.write(notebook, tmp_path / "short.ipynb")
    with pytest.raises(CellExecutionError) as failed:
        execute(tmp_path / "short.ipynb", outputs / "short.ipynb")
    assert failed.value.ename == "TensorFileError"
    assert failed.value.evalue.startswith("There is no file 'nowhere.safetensors'")
    assert nbformat.read(outputs / "short.ipynb", as_version=4).cells[-1].outputs  # written though it failed


def test_the_editing_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved without outputs, in short cells; every cell that shows an image shows one."""
    saved = nbformat.read(ROOT / "editing.ipynb", as_version=4)
    code = [cell for cell in saved.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert all(len(cell.source.splitlines()) <= 16 for cell in code)
    monkeypatch.setenv("PROSPECT_STEPS", "2")
    execute(ROOT / "editing.ipynb", tmp_path / "editing.ipynb")
    shown = nbformat.read(tmp_path / "editing.ipynb", as_version=4)
    images = [o for cell in shown.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(images) == 7
