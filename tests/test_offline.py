"""Without any network: what is needed is on this machine, and what is not is said at once."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest
import torch
from bad_files import ROOT

from ldm.cli import sample as commands
from ldm.config import load_config
from ldm.util import instantiate_from_config


@pytest.fixture(autouse=True)
def cut_off(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No connection can be opened, as under `unshare -n`; returns who tried."""
    tried: list[str] = []

    def refuse(address: object, *_: object, **__: object) -> None:
        tried.append(str(address))
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: refuse(address))
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(ROOT)
    return tried


def test_loading_and_generating_ask_nobody(cut_off: list[str], tmp_path: Path) -> None:
    small = ["--steps", "1", "--height", "32", "--width", "32", "--device", "cpu", "--prompt", "a star"]
    assert commands.run([*small, "--outdir", str(tmp_path)])
    assert cut_off == []


def test_a_vocabulary_that_is_not_here_is_said_at_once(
    cut_off: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    encoder = load_config("configs/stable-diffusion/v1-inference.yaml").model.params.cond_stage_config
    with torch.device("meta"):
        encoder = instantiate_from_config(encoder)
    started = time.monotonic()
    with pytest.raises(OSError, match=r"is neither on this machine nor can it be fetched; put vocab\.json and"):
        encoder.tokenizer  # noqa: B018
    assert time.monotonic() - started < 5  # transformers tries for minutes
    assert cut_off
