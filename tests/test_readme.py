"""Every command of the README is run, from a folder of its own; with few training steps."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from runs import ROOT, call

README = (ROOT / "README.md").read_text(encoding="utf-8")
HEAVY = ("make ", "pip ")  # what installs, and what tests
SHORT = ["--max_steps", "2", "lightning.callbacks.image_logger.params.disabled=true"]


def commands() -> list[str]:
    blocks = re.findall(r"^```bash\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith(HEAVY)]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with all of the repository, into which outputs go."""
    for name in ("configs", "evaluation", "ldm", "main.py", "models", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)


def run(command: str) -> subprocess.CompletedProcess[str]:
    program, *arguments = shlex.split(command, comments=True)
    if program == "prospect":
        program, arguments = "python", ["ldm/cli/main.py", *arguments]
    assert program == "python", f"nothing here knows how to try '{command}'"
    if arguments[:2][-1] == "learn" or arguments[0] == "main.py":
        arguments += SHORT
    return call(*arguments)


@pytest.mark.parametrize("command", commands())
def test_command(command: str, checkout: None) -> None:
    if command.startswith("prospect page"):
        command = "prospect page --help"  # it would not end
    done = run(command)
    if "sd-v1-4" in command or "--config sd" in command:  # the weights are the user's; nothing else is missing
        assert done.returncode == 2
        assert re.search(r"sd-v1-4\.ckpt|path/to/images|logs/…", done.stderr), done.stderr
    else:
        assert done.returncode == 0, done.stderr


def test_links_lead_to_files() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#:]+?)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_it_is_short() -> None:
    assert len(README.split()) <= 900
