"""Every command of the README is run, in an empty folder and with few steps; test_package.py has most of `prospect`."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
from runs import MADE_SMALL, NO_PICTURES, ROOT

import ldm.many.learn
from ldm.cli.main import main as prospect
from ldm.cli.sample import run as txt2img
from ldm.cli.train import run as learn

README = (ROOT / "README.md").read_text(encoding="utf-8")
HEAVY = ("make ", "pip ")  # what installs, and what tests
PROGRAMS = {"main.py": learn, "scripts/txt2img.py": txt2img}


def commands() -> list[str]:
    blocks = re.findall(r"^```bash\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith(HEAVY)]


def in_little_time(command: str) -> list[str]:
    """The words of a command, with what makes it short; `prospect page` would not end."""
    words = shlex.split(command, comments=True)
    if words[1] in ("learn", "main.py"):
        return [*words, "--max_steps", "1", NO_PICTURES, *MADE_SMALL]
    if words[1] in ("demo", "generate"):
        return [*words, "--steps", "1", "--height", "32", "--width", "32"]
    return [*words, "--help"] if words[1] == "page" else words


@pytest.mark.parametrize("command", [c for c in commands() if not c.startswith("prospect ") or " learn-many " in c])
def test_command(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What `learn-many` starts, tests/many runs: here it only reads its flags and its folders."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ldm.many.learn, "learn_many", lambda *arguments: iter(()))
    monkeypatch.setattr("ldm.many.contact_sheet.write_sheet", lambda *arguments: None)
    program, *words = in_little_time(command)[0 if command.startswith("prospect ") else 1 :]
    if program == "prospect":
        assert prospect(words) == 0
        return
    with pytest.raises(SystemExit) as ended:  # the weights are the user's; nothing else is missing
        sys.exit(PROGRAMS[program](words))
    assert ended.value.code == 2 and re.search(r"sd-v1-4\.ckpt|path/to/images|logs/…", capsys.readouterr().err)


def test_links_lead_to_files() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r'(?:\]\(|src=")([^)"#:]+?)[)"]', page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_it_is_short_and_cites_all_papers() -> None:
    assert len(README.split()) <= 900
    known = re.findall(r"@\w+\{(\w+),", (ROOT / "CITATION.bib").read_text(encoding="utf-8"))
    cited = re.findall(r"@\w+\{(\w+),", README)
    assert cited == ["zhang2023prospect", "alaluf2023neti", "zhao2023catversion", "li2023stylediffusion"]
    assert set(cited) <= set(known)
