"""docs/extending.md: its module is trained, saved, resumed, loaded and used, without a change here."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from runs import LEARN as BASE
from runs import MADE_SMALL, ROOT

import main
from ldm import config
from ldm.embeddings import load_concept
from ldm.generate import load_model_from_config
from ldm.generate import main as generate

PARAMS = "model.params.personalization_config.params"
LEARN = [*BASE, *MADE_SMALL, "--allow_targets", "drift"]
LEARN += [f"{PARAMS}.method=drift.Drift", f"{PARAMS}.method_params.speed=0.5"]


@pytest.fixture
def drift(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The document's module, importable from a folder of its own."""
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs/extending.md").read_text(encoding="utf-8"), re.DOTALL)
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "drift.py").write_text(code[1], encoding="utf-8")
    assert len(code[1].splitlines()) <= 60
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(config, "_allowed", set())
    yield folder
    sys.modules.pop("drift", None)


def test_a_method_of_another_package(drift: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main.main([*LEARN, "-p", str(whole), "--max_steps", "4"]) == 0
    assert main.main([*LEARN, "-p", str(cut), "--max_steps", "2"]) == 0
    assert main.main(["-r", str(cut), "-t", "--max_steps", "4", "--allow_targets", "drift"]) == 0
    paths = [folder / "checkpoints/embeddings.safetensors" for folder in (whole, cut)]
    learned, resumed = (load_concept(path) for path in paths)
    assert torch.equal(learned.tensors["ends"], resumed.tensors["ends"])
    assert learned.method == "drift.Drift" and learned.metadata["drift.speed"] == "0.5"
    assert not torch.equal(*learned.tensors["ends"])

    model = load_model_from_config("configs/demo/finetune.yaml", "models/demo/model.safetensors", device="cpu")
    plain = generate("a thing", ddim_steps=3, model=model, progress=False)
    model.embedding_manager.load(paths[0])
    shown = generate("a *", ddim_steps=3, model=model, progress=False)
    assert shown.tobytes() != plain.tobytes()
    with torch.no_grad():
        cond = model.get_learned_conditioning(["a *"])
        context = cond.at(500)
        assert context.k.shape[:2] == (7, 1) and context.k is cond.at(500).k and context.k is not cond.at(501).k
    config._allowed.clear()
    with pytest.raises(ValueError, match=r"drift\.Drift.*allow"):
        load_concept(paths[0])
