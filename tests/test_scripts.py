"""Scripts as programs: importing and mixing concepts, the demo."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import call
from safetensors.torch import save_file

from ldm.cli import train as cli
from ldm.embeddings import Concept, load_concept, save_concept, save_stages
from scripts import demo


@pytest.fixture
def concept_file(tmp_path: Path) -> Path:
    path = tmp_path / "concept.safetensors"
    save_concept(Concept(torch.randn(10, 128, generator=torch.Generator().manual_seed(1))), path)
    return path


def program(script: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return call(f"scripts/{script}.py", *flags)


def test_import_as_a_program_and_its_mistakes(tmp_path: Path, concept_file: Path) -> None:
    paths = save_stages(load_concept(concept_file), tmp_path, "star")
    out = tmp_path / "new" / "back.safetensors"
    result = program("import_embedding", *map(str, paths[::-1]), "--out", str(out))
    assert (result.returncode, result.stdout) == (0, f"{out}: 10 stages of width 128, called *\n"), result.stderr
    back, original = load_concept(out), load_concept(concept_file)
    assert torch.equal(back.vectors, original.vectors) and back.metadata == original.metadata
    result = program("import_embedding", str(paths[0]), "--out", str(out))
    assert (
        result.returncode == 2
        and "is there already; use --force to overwrite it, or name another file" in result.stderr
    )
    save_file({"<a>": torch.zeros(2, 4), "<b>": torch.ones(2, 4)}, tmp_path / "two.safetensors")
    flags = ["import_embedding", str(tmp_path / "two.safetensors"), "--out", str(out), "--force", "--rows_are_stages"]
    result = program(*flags)
    assert (result.returncode, result.stdout) == (2, "") and "holds 2 embeddings (<a>, <b>)" in result.stderr
    result = program(*flags, "--key", "<b>", "--placeholder", "<*>")
    assert result.returncode == 2 and "The placeholder '<*>' must not contain '*'" in result.stderr
    assert program(*flags, "--key", "<b>", "--placeholder", "<x>").returncode == 0
    assert load_concept(out).vectors.eq(1).all() and load_concept(out).metadata["placeholder"] == "<x>"


def test_mix_as_a_program(tmp_path: Path, concept_file: Path) -> None:
    save_concept(Concept(torch.ones(1, 128)), tmp_path / "one.safetensors")
    flags = [
        "mix_concepts",
        str(concept_file),
        str(tmp_path / "one.safetensors"),
        "--out",
        str(tmp_path / "m.safetensors"),
    ]
    assert program(*flags, "--weight", "0.25").stdout == f"{flags[-1]}: 10 stages of width 128\n"
    mixed = load_concept(flags[-1])
    expected = load_concept(concept_file).lerp(load_concept(tmp_path / "one.safetensors"), 0.25)
    assert torch.equal(mixed.vectors, expected.vectors)
    assert mixed.metadata["mixed"] == "0.75 concept.safetensors + 0.25 one.safetensors"
    result = program(*flags, "--weight", "2", "--force")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1) and "must be in 0..1, or 10" in result.stderr


def test_the_diffusers_folder_is_not_overwritten(tmp_path: Path) -> None:
    result = program("make_diffusers_folder", str(tmp_path))
    assert (result.returncode, result.stderr.count("\n")) == (2, 1) and "is there already" in result.stderr


def test_the_demo_calls_main_with_flags_and_files_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []

    def record(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        called.append(command)
        return subprocess.CompletedProcess(command, returncode=0)

    monkeypatch.setattr(demo.subprocess, "run", record)
    learned = [demo.learn(concept) for concept in demo.CONCEPTS]
    for (python, script, *flags), embedding in zip(called, learned, strict=True):
        assert (python, script) == (sys.executable, "main.py")
        options = cli.parse(flags)
        assert options.train and Path(options.project) == embedding.parents[1]
        assert all(Path(path).exists() for path in (*options.base, options.actual_resume, options.data_root))


def test_make_concepts_learns_every_reference(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("dotted-star", "striped-heart"):
        (tmp_path / "logs" / name).mkdir(parents=True)
        (tmp_path / "logs" / name / "e.safetensors").write_text(name)
        (tmp_path / demo.REFERENCES / name).mkdir(parents=True)
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    monkeypatch.setattr(demo, "learn", lambda concept: Path("logs") / concept / "e.safetensors")
    monkeypatch.setattr(sys, "argv", ["demo.py", "--concepts"])
    demo.main()
    shipped = {path.name: path.read_text() for path in (tmp_path / demo.SHIPPED).iterdir()}
    assert shipped == {f"{name}.safetensors": name for name in ("dotted-star", "striped-heart")}


def test_the_demo_ends_with_the_exit_code_of_main(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 3))
    with pytest.raises(SystemExit) as ended:
        demo.learn("dotted-star")
    assert ended.value.code == 3
