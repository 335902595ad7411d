"""`lightning:` of a configuration: values, devices, loggers, and where callbacks may write."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_lightning.loggers import wandb
from runs import LEARN, NO_PICTURES, PICTURES, learn, resume

import main
from ldm.config import ConfigError
from ldm.training.messages import sentence
from ldm.training.runs import Run
from ldm.training.trainer import LEAST, check_inside, own_loggers, trainer_arguments

LOGGER = "lightning.logger.target=pytorch_lightning.loggers.CSVLogger"


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The sentence that a run ends with."""
    assert main.main([*LEARN, NO_PICTURES, "--max_steps", "1", *arguments]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"benchmark": -1}, "benchmark must be of the type Optional[bool], not -1"),
        ({"max_time": 0}, "max_time must be of the type Union[str, datetime.timedelta, dict[str, int]"),
        ({"accumulate_grad_batches": "0o17"}, "accumulate_grad_batches must be of the type int, not '0o17'"),
        ({"accumulate_grad_batches": 0}, "accumulate_grad_batches must be a number of at least 1, not 0"),
        ({"max_steps": 1.5}, "max_steps must be of the type int, not 1.5"),
        ({"max_steps": True}, "max_steps must be of the type int, not True"),
        ({"deterministic": "x"}, "deterministic must be of the type Union[bool, Literal['warn'], NoneType], not 'x'"),
        ({"gradient_clip_val": float("nan")}, "gradient_clip_val must be a number of at least 0, not nan"),
        ({"log_every_n_steps": -1}, "at least 0, not -1"),
        ({"precision": 7}, "precision must be of the type Union[Literal[64, 32, 16]"),
        ({"max_step": 3}, "did you mean 'max_steps'?"),
        *(({"gpus": gpus}, "--gpus takes device numbers") for gpus in ("0.5,", "x", "1;2", ",", "-2")),
    ],
)
def test_values_that_no_trainer_takes(values: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        trainer_arguments(values, Run(Path("x"), "now"))
    assert problem in str(caught.value)


ANY_VALUE = st.none() | st.booleans() | st.integers(-3, 3) | st.integers() | st.floats() | st.text(max_size=8)
ANY_VALUE |= st.sampled_from(["0o17", "32", "bf16-mixed", "cpu", "auto", "ddp", "warn", "1,", "00:00:01:00", "simple"])
ANY_VALUE |= st.lists(ANY_VALUE, max_size=2) | st.dictionaries(st.sampled_from(["hours", "x", "0"]), ANY_VALUE)
NAMES = [*LEAST, "max_steps", "max_time", "benchmark", "devices", "precision", "strategy", "limit_val_batches"]
NAMES += ["val_check_interval", "deterministic", "gradient_clip_algorithm", "profiler", "fast_dev_run", "num_nodes"]


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(values=st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=5), ANY_VALUE, max_size=3))
def test_any_value_is_taken_or_refused_in_one_sentence(values: dict[str, Any]) -> None:
    """The bounds are checked against Lightning's own trainer, which must take what is let through, or say why not."""
    try:
        arguments = trainer_arguments(values, Run(Path("x"), "now"))
        arguments |= {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
        pl.Trainer(**arguments, enable_progress_bar=False, enable_model_summary=False)
    except Exception as error:
        assert isinstance(error, (TypeError, ArithmeticError, LookupError, AttributeError)) or sentence(error)


def test_what_lightning_refuses(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
                                tmp_path: Path) -> None:  # fmt: skip
    """Its own errors are sentences, whatever their type, also those that it raises while training."""
    stop = "lightning.callbacks.stop={target: pytorch_lightning.callbacks.EarlyStopping, params: {monitor: nothing}}"
    line = refusal(capsys, "-p", str(tmp_path / "a"), stop, f"data.params.validation={{target: "
                   f"ldm.data.personalized.PersonalizedBase, params: {{size: 64, set: val, data_root: {PICTURES}}}}}",
                   "data.params.train.params.repeats=8")  # fmt: skip
    assert "error: Early stopping conditioned on metric `nothing` which is not available" in line
    for name, value in {"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "x", "SLURM_JOB_ID": "1"}.items():
        monkeypatch.setenv(name, value)
    assert "`--ntasks=2`" in refusal(capsys, "-p", str(tmp_path / "b"))


OUTSIDE = [
    *(("callbacks.x.params.dirpath", place) for place in ("{}/victim", "victim", "../victim", "~/victim")),
    *(("logger.params.save_dir", place) for place in ("{}/victim", "file:{}/victim")),
    ("logger.params.tags", ["a", "../../victim"]),
    ("logger.params.name", "../../victim"),
    ("logger.params.version", "{}/victim"),
    ("logger.params.tracking_uri", "file:{}/victim"),
]


def test_a_configuration_writes_into_its_run_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in OUTSIDE:
        given = value if isinstance(value, list) else value.format(tmp_path)
        with pytest.raises(ConfigError, match="is outside the log folder .* --allow_outside"):
            check_inside({name: given}, tmp_path / "run")
    check_inside(
        {"x": {"monitor": "val/loss", "filename": "a/b", "sub_dir": "a", "dirpath": f"{tmp_path}/a"}}, tmp_path
    )
    there = f"{LOGGER} lightning.logger.params.save_dir={tmp_path}/victim"
    assert "' is outside the log folder" in refusal(capsys, "-p", str(tmp_path / "run"), *there.split())
    assert not list(tmp_path.iterdir())


def test_a_logger_of_ones_own(tmp_path: Path) -> None:
    """Beside those that are always there; it writes into the run's folder unless another is allowed."""
    arguments = ["--max_steps", "1", "--log_every_n_steps", "1", "data.params.batch_size=2", LOGGER]
    learn(tmp_path / "run", *arguments, "lightning.logger.params={version: v, prefix: x}")
    (usual,) = (tmp_path / "run/csv").glob("*/metrics.csv")
    own = tmp_path / "run/lightning_logs/v/metrics.csv"
    columns, own_columns = (path.read_text().splitlines()[0].split(",") for path in (usual, own))
    assert "train/loss" in columns and "x-train/loss" in own_columns
    there = f"lightning.logger.params={{save_dir: {tmp_path}/there, name: n}}"
    learn(tmp_path / "other", *arguments, there, "--allow_outside")
    assert (tmp_path / "there/n/version_0/metrics.csv").is_file()
    assert resume(tmp_path / "other", "--max_steps", "3") == 2, "the folder may be a stranger's"


def test_a_logger_is_called_as_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """WandbLogger has no name and the folder it was started in of its own."""
    monkeypatch.setattr(wandb, "_WANDB_AVAILABLE", True)
    run: Any = SimpleNamespace(folder=tmp_path / "run")
    section = {"target": "pytorch_lightning.loggers.WandbLogger", "params": {"project": "p"}}
    logger: Any = own_loggers(section, run)[0]
    assert (logger.save_dir, logger._name, logger._project) == (str(run.folder), "run", "p")
