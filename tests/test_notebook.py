"""`ProSpect.ipynb`: saved without outputs, and it runs from its first cell to its last."""

import functools
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
from ldm.files.tensors import TensorFileError
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
    monkeypatch.setenv("PROSPECT_STEPS", "3")
    monkeypatch.setenv("PROSPECT_OUTPUTS", str(tmp_path / "outputs"))
    return tmp_path / "outputs"


def test_the_notebook_is_saved_stripped_and_short() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    settings, *code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in (settings, *code))
    assert all(len(cell.source.splitlines()) <= 16 for cell in code)
    assert not any(cell.metadata for cell in notebook.cells)
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


def images_of(outputs: Path) -> dict[str, Image.Image]:
    """The images that the notebook has written and shown."""
    written = {path.name: Image.open(path) for path in outputs.glob("*.png")}
    assert {name.rpartition("-")[0] for name in written} == set(NAMES)
    assert all(np.asarray(image).std() > 0 for image in written.values())
    shown = [
        output
        for cell in nbformat.read(outputs / NOTEBOOK.name, as_version=4).cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert len(shown) == len(NAMES)
    return written


def test_the_notebook_runs(outputs: Path) -> None:
    execute(NOTEBOOK, outputs / NOTEBOOK.name)
    written = images_of(outputs)
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
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
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
    execute(folder / NOTEBOOK.name, outputs / NOTEBOOK.name, folder)
    images_of(outputs)
    words = read_parameters(outputs / "material-2.png")["prospect_words"]
    assert [stage for stage, entry in enumerate(words) if "*" in entry] == [0, 1, 2, 3, 4]  # the paper's


def test_what_the_notebook_shows_of_objects_and_functions_is_short(tiny_model: LatentDiffusion) -> None:
    assert re.fullmatch(
        r"LatentDiffusion\(.*: [\d.]+ M parameters, 10 stages, torch.float32 on cpu; .*\)", repr(tiny_model)
    )
    concept = load_concept(ROOT / "models/demo/concepts/dotted-star.safetensors")
    assert (
        repr(concept).startswith("Concept('prospect', vectors 10x128, init_word='thing'") and len(repr(concept)) < 200
    )

    @functools.wraps(main)
    def generate(*arguments: Any, **settings: Any) -> Any: ...

    found = Inspector(theme_name="nocolor").info(generate)
    lines = f"{found['definition']}\n{found['docstring']}".splitlines()
    assert len(lines) < 100 and not any("All others" in line for line in lines)
    assert any("strength: how much of the content image is given up" in line for line in lines)


def test_a_notebook_whose_cell_fails_is_written(tmp_path: Path) -> None:
    """Its kernel needs no network, not even the loopback device, which is down in `make test-offline`."""
    source = "import json, ipykernel.connect as c; print(json.loads(c.get_connection_info())['transport'])"
    cells = [nbformat.v4.new_code_cell(text) for text in (source, "1 / 0", "2")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "a.ipynb")
    with pytest.raises(CellExecutionError) as failed:
        execute(tmp_path / "a.ipynb", tmp_path / "b.ipynb")
    assert failed.value.ename == "ZeroDivisionError"
    first, second, third = nbformat.read(tmp_path / "b.ipynb", as_version=4).cells
    assert first.outputs[0].text == ("tcp\n" if sys.platform == "win32" else "ipc\n")
    assert second.outputs and not third.outputs


def test_a_missing_concept_is_said_in_one_sentence(
    tiny_model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROSPECT_CONCEPT", "nowhere.safetensors")
    cells = {cell.id: cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells}
    names: dict[str, Any] = {"model": tiny_model}
    exec(cells["settings"], names)
    with pytest.raises(TensorFileError, match="^There is no file 'nowhere.safetensors'[^\n]*$"):
        exec(cells["concept"], names)


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
