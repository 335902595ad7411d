"""The flags of `main.py`, without anything heavy."""

from __future__ import annotations

import inspect

import pytest
import pytorch_lightning as pl

from ldm.cli import train as cli


def test_help_is_complete() -> None:
    text = cli.build_parser().format_help()
    flags = "base train resume seed no_test project debug postfix logdir scale_lr datadir_in_name actual_resume"
    flags += " data_root embedding_manager_ckpt placeholder_tokens init_word name gpus max_steps precision devices"
    assert all(f"--{flag}" in text for flag in flags.split())
    assert set(cli.TRAINER_FLAGS) <= set(inspect.signature(pl.Trainer).parameters)


def test_flags_and_values_of_the_configuration_mix() -> None:
    for spelling in ("--data_root", "--data-root"):
        assert cli.parse(["--base", "a.yaml", spelling, "b", "x.y=1"]).data_root == "b"
    options = cli.parse(["-b", "a.yaml", "x=1", "b.yaml", "--base", "c.yaml", "--placeholder_tokens", "<a>",
                         "-r", "y=2/run", "-t", "z.w=3", "--gpus", "0,"])  # fmt: skip
    assert options.base == ["a.yaml", "b.yaml", "c.yaml"] and options.overrides == ["x=1", "z.w=3"]
    assert options.resume == "y=2/run", "the value of a flag stays its value"
    assert options.train and options.placeholder_tokens == ["<a>"]
    assert cli.parse(["-b", "d.yaml"]).base == ["d.yaml"], "nothing is left of an earlier call"


def test_values_of_the_trainer_keep_their_types() -> None:
    """Lightning reads 1 as one batch and 1.0 as all of them."""
    for text in ("1", "1.0", "0.5"):
        given = cli.parse(["--base", "x.yaml", "--limit_val_batches", text]).trainer["limit_val_batches"]
        assert (given, type(given)) == (float(text), float if "." in text else int)
    given = cli.parse(["--base", "x.yaml", "--benchmark", "--deterministic", "No", "--precision", "bf16"]).trainer
    assert given == {"benchmark": True, "deterministic": False, "precision": "bf16"}


def test_a_home_folder_is_expanded_in_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shell does it at the beginning of a word only."""
    monkeypatch.setenv("HOME", "/home/me")
    flags = "--base=~/a --resume=~/a --actual_resume=~/a --data_root=~/a --embedding_manager_ckpt=~/a -l=~/a -p=~/a"
    options = vars(cli.parse(flags.split()))
    names = ("resume", "actual_resume", "data_root", "embedding_manager_ckpt", "logdir", "project")
    assert options["base"] == ["/home/me/a"] and {options[name] for name in names} == {"/home/me/a"}
