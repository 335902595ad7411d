"""Configurations name the tokenizer's folder relative to the repository."""

import pytest
from runs import ROOT


@pytest.fixture(autouse=True)
def in_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
