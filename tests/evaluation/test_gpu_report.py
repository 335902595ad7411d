"""The command that waits for a GPU, on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts import gpu_report

MARKED = "before\n<!-- gpu report -->\nold\n<!-- end of gpu report -->\nafter\n"


def report(folder: Path, *flags: str) -> dict[str, list]:
    """What the command leaves in its folder."""
    gpu_report.main(["--device", "cpu", "--repeats", "1", "--no_compile", "--out", str(folder), *flags])
    return json.loads((folder / "report.json").read_text())


def test_parity_with_the_records_and_where_the_tables_go(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = tmp_path / "page.md"
    document.write_text(MARKED)
    found = report(tmp_path / "a", "--only", "parity", "--into", str(document))
    rows = found["parity"]
    assert len(rows) == 8 and all(row["ok"] for row in rows), rows
    text = document.read_text()
    assert text.startswith("before\n<!-- gpu report -->\n") and text.endswith("<!-- end of gpu report -->\nafter\n")
    assert "bfloat16" in text and "old" not in text
    capsys.readouterr()
    report(tmp_path / "a", "--only", "parity")
    assert "parity: kept from before" in capsys.readouterr().out
    for content, sentence in {
        '{"mine": 1}': "is no report of this script; give another folder with --out",
        '{"device": "H100", "size": "demo"}': "was measured on 'H100' with 'demo'; for ",
    }.items():
        (tmp_path / "report.json").write_text(content)
        with pytest.raises(SystemExit):
            report(tmp_path, "--only", "parity")
        assert sentence in capsys.readouterr().err and (tmp_path / "report.json").read_text() == content


@pytest.mark.slow
def test_every_section(tmp_path: Path) -> None:
    report(tmp_path, "--only", "parity", "learn", "train", "methods", "sample", "profile")
    learn = json.loads((tmp_path / "report.json").read_text())["learn"]
    assert learn["command_code"] == 0 and learn["peak_gb"] > 0
    assert 0 < learn["of_ceiling"] < 1 and 0.2 < learn["busy"] < 2  # on the CPU two runs are divided
    text = (tmp_path / "report.md").read_text()
    assert "TOO FAR" not in text and "prospect" in text and "catversion" in text
