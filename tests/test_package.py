"""The wheel and the sdist: what they hold, and that the installed program works from any folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import time
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from runs import DRIVER
from test_readme import commands, in_little_time

import ldm

ROOT = Path(__file__).parents[1]
BUILD = """\
import sys
from setuptools import build_meta
folder = sys.argv[1]  # setuptools changes sys.argv
build_meta.build_sdist(folder)
build_meta.build_wheel(folder)
"""
NOT_PACKAGED = shutil.ignore_patterns(
    ".*", "logs", "outputs", "tests", "docs", "build", "dist", "*.egg-info", "__pycache__", "evaluation", "*.ckpt"
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel and the sdist, built from a copy of the checkout, which is left as it is."""
    folder = tmp_path_factory.mktemp("built")
    shutil.copytree(ROOT, folder / "copy", ignore=NOT_PACKAGED)
    subprocess.run([sys.executable, "-c", BUILD, folder], cwd=folder / "copy", check=True, capture_output=True)
    return next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def program(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command `prospect` in an environment of its own that finds everything but `ldm` in this one's."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=os.name != "nt")
    places = {"base": str(folder), "platbase": str(folder)}
    scripts, packages = (Path(sysconfig.get_path(name, vars=places)) for name in ("scripts", "purelib"))
    with zipfile.ZipFile(built[0]) as wheel:  # as installers do, without asking an index for torch
        wheel.extractall(packages)
        (entry,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
        assert wheel.read(entry).decode().split() == ["[console_scripts]", "prospect", "=", "ldm.cli.main:main"]
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))  # only as a folder: its own .pth are not read
    command = scripts / "prospect"
    command.write_text(
        f"#!{scripts / 'python'}\nimport sys\nfrom ldm.cli.main import main\nsys.exit(main())\n", encoding="utf-8"
    )
    return command


def prospect(program: Path, folder: Path, *commands: Sequence[str]) -> str:
    """Run commands of the installed program in a folder, in one process; what they wrote, and their exit codes."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PROSPECT_DEVICE": "cpu", "PYTHONIOENCODING": "utf-8"}
    driver = [str(program.parent / "python"), "-c", DRIVER, json.dumps(commands)]
    done = subprocess.run(
        driver, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8"
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_what_is_in_the_wheel_and_the_sdist(built: tuple[Path, Path]) -> None:
    wheel, sdist = built
    assert wheel.name == f"prospect_ldm-{ldm.__version__}-py3-none-any.whl" and wheel.stat().st_size < 20e6
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names} == {"ldm", f"prospect_ldm-{ldm.__version__}.dist-info"}
    shipped = {name.removeprefix("ldm/shipped/") for name in names if name.startswith("ldm/shipped/")}
    expected = ("configs/demo/finetune.yaml", "models/demo/model.safetensors", "models/demo/tokenizer/merges.txt")
    assert shipped >= {*expected, "configs/stable-diffusion/v1-inference.yaml", "models/demo/presets.yaml"}
    assert all((ROOT / name).is_file() for name in shipped) and "ldm/py.typed" in names
    code = {path.relative_to(ROOT).as_posix() for path in (ROOT / "ldm").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == code
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert inside >= shipped | code | {"pyproject.toml", "setup.py", "LICENSE", "README.md"}


def test_the_installed_program_answers(program: Path, tmp_path: Path) -> None:
    done = subprocess.run([program.parent / "python", program, "--help"], capture_output=True, encoding="utf-8")
    names = re.findall(r"^  (\S+) +[A-Z]", done.stdout, re.MULTILINE)
    assert names == ["demo", "learn", "learn-many", "generate", "export", "import", "push", "invert", "edit", "page"], (
        done.stderr
    )
    text = prospect(program, tmp_path, *([name, "--help"] for name in names), ["--version"], ["generat"])
    assert all(f"usage: prospect {name} " in text for name in names) and text.count("\n[0, ") == len(names) + 1
    assert f"prospect {ldm.__version__}\n" in text
    assert "unknown command 'generat'; did you mean generate?\n[2, " in text


def test_the_commands_of_the_readme_installed(program: Path, tmp_path: Path) -> None:
    """In an empty folder: what ships is found by its name in the checkout."""
    lines = [line for line in commands() if line.startswith("prospect ") and " learn-many " not in line]
    image = "outputs/a-large-heart-on-a-black-background-material-42.png"
    repeating = ["generate", "--from", image, "--steps", "1"]
    text = prospect(program, tmp_path, *(in_little_time(line)[1:] for line in lines), repeating)
    assert text.count("\n[0, ") == len(lines) + 1, text
    for name in (image, image.replace("42", "seeds"), image.replace("-42", "-42-2")):
        assert f"{name}\n" in text and (tmp_path / name).is_file()
    run = next((tmp_path / "logs").iterdir()).relative_to(tmp_path)
    assert f"More steps: prospect learn -r {run} --max_steps N\n" in text
    settings, concept = (
        next((tmp_path / run / "configs").glob("*-project.yaml")).relative_to(tmp_path),
        run / "checkpoints/embeddings.safetensors",
    )
    assert f"Generate: prospect generate --config {settings} --concept {concept} --prompt 'a *'\n" in text


def test_importing_ldm_is_quick_and_its_names_are_public() -> None:
    command = [sys.executable, "-X", "importtime", "-c", "import ldm; print(ldm.__version__); ldm.Request"]
    started = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert time.monotonic() - started < 1
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert done.stdout == "0.1.0\n" and not imported & {"torch", "numpy", "omegaconf", "PIL"}
    assert all(getattr(ldm, name) is not None for name in ldm.__all__) and set(ldm.__all__) <= set(dir(ldm))
    with pytest.raises(AttributeError, match="module 'ldm' has no attribute 'Concpt'"):
        _ = ldm.Concpt
