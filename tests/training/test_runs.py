"""Log folders: what a new run takes, and what `-r` does with what other programs left, damaged or changed."""

from __future__ import annotations

import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from runs import LEARN, MADE_SMALL, MODEL, PICTURES, every, learn, resume, same_tensors
from safetensors.torch import load_file, save_file

import main
from ldm.cli.train import parse
from ldm.embeddings import load_concept
from ldm.training.runs import open_run

NAME = "checkpoints/embeddings.safetensors"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log folder of a run of 6 steps, saved every 2, from images in a folder beside it."""
    folder = tmp_path_factory.mktemp("finished")
    images = shutil.copytree(PICTURES, folder / "images")
    learn(folder / "run", *MADE_SMALL, *every(2), "--max_steps", "6", "--data_root", str(images))
    return folder / "run"


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def hole(path: Path) -> None:
    """As a program leaves it that reserves the size first."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(10_000))


def with_parts(change: Callable[[dict[str, object]], dict[str, object]], **options: bool) -> Callable[[Path], None]:
    return lambda path: torch.save(change(torch.load(path, weights_only=True)), path, **options)


PARTS = {"optimizer_states": [[], "x", {}], "loops": [None, {}, {"fit_loop": "x"}], "state_dict": [{}]}
DAMAGES: list[Callable[[Path], object]] = [
    *(cut, hole, Path.unlink),
    lambda path: path.write_bytes(b""),
    lambda path: save_file(torch.load(path, weights_only=True)["state_dict"], path),
    with_parts(dict, _use_new_zipfile_serialization=False),  # torch's old format
    with_parts(lambda saved: {"state_dict": saved["state_dict"]}),
    with_parts(lambda saved: {name: saved[name] for name in saved.keys() - {"pytorch-lightning_version"}}),
    *(with_parts(lambda saved, given={name: x}: saved | given) for name, values in PARTS.items() for x in values),
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_checkpoint_before_is_offered(
    run: Path, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence with the command that resumes from it."""
    damage(run / "checkpoints/last.ckpt")
    assert resume(run) == 2
    (line,) = capsys.readouterr().err.splitlines()
    previous = run / "checkpoints/previous.ckpt"
    assert f"'{run}/checkpoints/last.ckpt'" in line
    assert line.endswith(f"; resume from the one before it: python main.py -r {previous} -t.")


def test_the_last_embeddings_are_offered(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where both checkpoints are lost or damaged; those that are damaged themselves name the ones before them."""
    latest = run / "checkpoints/embeddings_gs-6.safetensors"
    (run / "checkpoints/embeddings_gs-abc.safetensors").write_text("of its owner")
    for change in (cut, Path.unlink):
        for name in ("last.ckpt", "previous.ckpt"):
            change(run / "checkpoints" / name)
        before = content(run)
        assert resume(run) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.endswith(f"; start a new run with its latest embeddings: --embedding_manager_ckpt {latest}.")
        assert before == content(run)
    cut(run / NAME)
    begin = [*LEARN, *MADE_SMALL, "-p", str(tmp_path / "new"), "--max_steps", "1", "--embedding_manager_ckpt"]
    assert main.main([*begin, str(run / NAME)]) == 2
    assert capsys.readouterr().err.rstrip().endswith(f", or the ones saved before it: '{latest}'.")
    assert not (tmp_path / "new").exists()


def test_a_complete_run_that_is_resumed_mends_its_embeddings(run: Path, finished: Path) -> None:
    cut(run / NAME)
    assert resume(run) == 0
    assert torch.equal(load_concept(run / NAME).vectors, load_concept(finished / NAME).vectors)


def test_a_run_that_saved_nothing_starts_anew(run: Path, finished: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With its own flags; without a configuration there is nothing to resume."""
    shutil.rmtree(run / "checkpoints")
    with caplog.at_level("INFO"):
        assert resume(run) == 0
    assert f"'{run}' has no checkpoint yet: the run starts anew." in caplog.messages
    assert same_tensors(finished / "checkpoints", run / "checkpoints")
    shutil.rmtree(run / "configs")
    assert resume(run) == 2


def test_a_new_run_takes_no_folder_that_holds_anything(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign, link, lost = tmp_path / "foreign", tmp_path / "link", shutil.copytree(run, tmp_path / "lost")
    (foreign / "checkpoints").mkdir(parents=True)
    (foreign / NAME).write_text("of somebody")
    link.mkdir()
    (link / "checkpoints").symlink_to(tmp_path)
    for name in ("last.ckpt", "previous.ckpt"):
        (lost / "checkpoints" / name).unlink()
    for folder in (foreign, link, lost, run):
        sentence = "is not empty; name a new or an empty folder with -p."
        if folder in (lost, run):
            sentence = f"holds a run: resume it (python main.py -r {folder} -t) or name another folder."
        before = content(folder)
        assert main.main([*LEARN, *MADE_SMALL, "-p", str(folder), "--max_steps", "1"]) == 2
        assert f"'{folder}' {sentence}" in capsys.readouterr().err
        assert before == content(folder)


TIME = r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d"


def test_names_of_log_folders() -> None:
    """A data folder's name is cut to what fits; the name of the run is what was asked for, or refused."""
    words = ["--base", "configs/demo/finetune.yaml", "--data_root", "some/" + "龍" * 80]
    name = open_run(parse([*words, "-n", "龍" * 20, "-f", "ö"])).folder.name
    assert re.fullmatch(rf"龍{{40,}}{TIME}_龍{{20}}ö", name) and len(name.encode()) <= 250
    broken = open_run(parse([*words[:3], "a\udcffb"])).folder.name  # a name that is no UTF-8
    assert re.fullmatch(rf"ab{TIME}_finetune", broken)
    for flags, sentence in (
        (["-n", "x" * 300], "too long"),
        (["-n", "../x"], "a path goes"),
        (["-f", "a\\b"], "a path"),
    ):
        with pytest.raises((ValueError, OSError), match=sentence):
            open_run(parse([*words, *flags]))


# Resumed with something changed


def test_what_differs_is_said_in_one_line(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also where only the content of files changed; the rate and the placeholder are the configured ones."""

    def changed(*arguments: str) -> list[str]:
        caplog.clear()
        assert resume(run, *arguments) == 0
        return [line for line in caplog.messages if line.startswith("This run is resumed with changes: ")]

    images, model = tmp_path / "images", tmp_path / "model.safetensors"
    images.mkdir()
    Image.new("RGB", (64, 64), "red").save(images / "a.png")
    save_file(load_file(MODEL), model)
    settings = ["data.params.batch_size=1", "data.params.train.params.flip_p=0.5", "model.base_learning_rate=1e-3"]
    files = ["--data_root", str(images), "--actual_resume", str(model)]
    (line,) = changed("--max_steps", "7", *settings, *files)
    parts = ("batch_size (2 -> 1)", "flip_p (0.0 -> 0.5)", "base_learning_rate", "data_root", "ckpt_path")
    assert all(part in line for part in parts)
    assert line.endswith(", the content of the images.") and "max_steps" not in line
    (state,) = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["optimizer_states"]
    assert [group["lr"] for group in state["param_groups"]] == [1e-3]
    Image.new("RGB", (64, 64), "blue").save(images / "a.png")
    save_file({key: x + (key.endswith("out.2.bias")) for key, x in load_file(MODEL).items()}, model)
    assert changed("--max_steps", "8") == [
        "This run is resumed with changes: the content of the images, the content of the base model."
    ]
    same = ["-s", "23", "--init_word", "thing"]
    (line,) = changed("--max_steps", "9", *same, "--placeholder_tokens", "<x>")
    assert "placeholder_strings" in line and "batch_size" not in line, "those are now its own"
    assert load_concept(run / NAME).metadata["placeholder"] == "<x>"


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (f"--embedding_manager_ckpt {{run}}/{NAME}", "--embedding_manager_ckpt does not apply to a resumed run (None"),
        ("--init_word star", "--init_word does not apply to a resumed run ('thing' -> 'star')"),
        ("-s 7", "--seed does not apply to a resumed run (23 -> 7)"),
        ("model.params.prospect_stages=5", "model.params.prospect_stages does not apply"),
        ("model.params.personalization_config.params.generator=table", "params.generator does not apply"),
        ("model.params.first_stage_config.params.ddconfig.ch=32", "; "),
        ("--base configs/demo/autoencoder.yaml", "; "),
        ("--max_stepz 3", "did you mean --max_steps?"),
    ],
)
def test_what_cannot_apply_is_refused(flags: str, sentence: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = content(run)
    try:
        code = resume(run, *flags.format(run=run).split())
    except SystemExit as ended:
        code = int(ended.code or 0)
    *_, line = capsys.readouterr().err.splitlines()
    assert code == 2 and sentence in line
    assert before == content(run)


def test_resuming_reads_no_environment(run: Path, capsys: pytest.CaptureFixture[str],
                                       monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setenv("WORD", "thing")
    (saved,) = run.glob("configs/*-project.yaml")
    saved.write_text(saved.read_text().replace("- thing", "- ${oc.env:WORD}"))
    assert resume(run, "--max_steps", "7") == 2
    assert "initializer_words.0: '${oc.env:WORD}' calls a resolver" in capsys.readouterr().err
    assert resume(run, "--max_steps", "7", "--allow_resolvers") == 0


# Stops


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C as a program in the foreground has it; a suite in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_stopped_run_ends_as_the_whole_run_did(run: Path, finished: Path, interruptible: None) -> None:
    """From the checkpoint before a damaged one, by Ctrl-C when nothing is due to be saved, and by a bad step.

    A stop goes before a least number of steps. After each, signals are the program's own again.
    """
    last, previous = (run / "checkpoints" / name for name in ("last.ckpt", "previous.ckpt"))
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    ours, off = ["--allow_targets", "runs"], "lightning.callbacks.{}=null".format
    stop = [
        *ours,
        "lightning.callbacks.stop={target: runs.CtrlC, params: {step: 5}}",
        "--min_steps",
        "6",
        "--min_epochs",
        "1",
    ]
    poison = [*ours, "lightning.callbacks.poison={target: runs.Poison, params: {step: 6}}"]
    cut(last)
    for place, arguments, code, step, step_before in (
        (previous, stop, 130, 5, 4),  # the damaged one does not take its place
        (run, [*poison, off("stop")], 2, 5, 4),
        (run, [off("poison")], 0, 6, 5),
    ):
        assert resume(place, *arguments) == code
        saved = [torch.load(path, weights_only=True)["global_step"] for path in (last, previous)]
        assert saved == [step, step_before]
        assert [signal.getsignal(number) for number in numbers] == before
    assert same_tensors(finished / "checkpoints", run / "checkpoints")


def test_ctrl_c_before_the_first_step_shows_no_trace(
    run: Path, interruptible: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Within Lightning, which exits itself, and while the model is loaded."""
    stop = ["--allow_targets", "runs", "lightning.callbacks.stop={target: runs.CtrlC, params: {step: 0}}"]
    with pytest.raises(SystemExit) as ended:
        resume(run, "--max_steps", "9", *stop)
    assert ended.value.code == 1 and "Traceback" not in capsys.readouterr().err
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning ignores it from then on
    monkeypatch.setattr("ldm.training.setup.instantiate_from_config", lambda _: signal.raise_signal(signal.SIGINT))
    assert resume(run, "--max_steps", "9") == 130
