"""The command `prospect`: help on any terminal, and mistakes that are answered at once."""

from __future__ import annotations

import io
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from runs import DRIVER

from ldm.cli.main import COMMANDS, main

ROOT = Path(__file__).parents[2]
STAR = "models/demo/concepts/dotted-star.safetensors"
IMAGES = "models/demo/references/dotted-star"
HEAVY = ("torch", "numpy", "PIL", "transformers", "pytorch_lightning", "huggingface_hub")
MISTAKES = {
    "generat": "unknown command 'generat'; did you mean generate?",
    "generate --contents a": "unknown argument '--contents'; did you mean --content?",
    "generate --words a.yaml": "unknown argument '--words'; did you mean --stages '0=TEXT', or --prompts FILE?",
    "generate --prompt a --ckpt no.ckpt": "There is no file 'no.ckpt', given with --ckpt; check the path.",
    "generate --prompt a --config no.yaml": "'no.yaml'; check the path given with --config",
    "generate --prompt a --config dmo": "There is no configuration 'dmo'; did you mean 'demo'?",
    "generate --prompt a --config sd": "Stable Diffusion's weights, 'models/sd/sd-v1-4.ckpt', are not there; put them",
    "generate --prompt a --concept <v>=no.pt": "There is no file 'no.pt', given with --concept; check the path.",
    "generate --prompt a --concept hf:toy": "'hf:toy' must be hf:user/name, or hf:user/name@revision.",
    "generate --prompt a --outdir file": "is a file; give a folder with --outdir",
    "generate --prompt a --content no.png": "There is no file 'no.png', given with --content; check the path.",
    "generate --prompts no.yaml": "'no.yaml'; check the path given with --prompts",
    "generate --prompt a --stages 8-11=x": "'8-11=x' must be RANGE=TEXT, of the stages 0 (the end",
    "generate --from no.png": "There is no file 'no.png', given with --from; check the path.",
    "generate --prompt a --sampler euler": "Unknown sampler 'euler'",
    "generate --prompt a --dtype int8": "argument --dtype: invalid choice: 'int8' (choose from",
    "generate --prompt a --width 65": "width must be a multiple of 32 for this model, not 65; nearest: 64",
    "generate --prompt a --preset mood": "Unknown preset 'mood'",
    "demo --concept no.pt": "There is no file 'no.pt', given with --concept; check the path.",
    "learn": "Say which images to learn from: --data_root",
    "learn nowhere": "There is no file 'nowhere', given with --data_root; check the path.",
    f"learn {IMAGES} --base demo demo/tii": "There is no configuration 'demo/tii'; did you mean 'demo/ti'?",
    f"learn {IMAGES} --base sd": "weights, 'models/sd/sd-v1-4.ckpt', are not there; put them there, or give --actual_",
    f"learn {IMAGES} --precision 17": "argument --precision: invalid choice: '17' (choose from",
    "learn -r nowhere": "There is no file 'nowhere', given with -r; check the path.",
    "learn-many nowhere --out a": "There is no file 'nowhere', given with IMAGES; check the path.",
    f"learn-many {IMAGES} --out a --cluster b": "'b' is neither local nor auto nor HOST:PORT",
    "export no.pt --name a": "There is no file 'no.pt', given with CONCEPT; check the path.",
    f"export {STAR} --name a --preset mood": "Unknown preset 'mood'",
    "import no.pt --out a.safetensors": "There is no file 'no.pt', given with FILE; check the path.",
    f"import {STAR} --out a.pt": "'a.pt': the file to write must end in .safetensors.",
    "push no.pt a/b": "There is no file 'no.pt', given with CONCEPT; check the path.",
    "push a b": "'b' is no name of a repository; it must be user/name.",
    "invert no.png --prompt a": "There is no file 'no.png', given with IMAGE; check the path.",
    f"invert {IMAGES}/dotted-star.png --prompt a --ckpt no.ckpt": "There is no file 'no.ckpt', given with --ckpt",
    "edit no.pt --target a": "There is no file 'no.pt', given with CONCEPT; check the path.",
    "edit --csv no.csv": "There is no CSV file 'no.csv'; check the path given with --csv.",
    "page --config nowhere": "There is no configuration 'nowhere'; known: demo, sd,",
    "page --ckpt no.ckpt": "There is no file 'no.ckpt', given with --ckpt; check the path.",
}


def drive(folder: Path, commands: list[list[str]], **variables: str) -> subprocess.CompletedProcess[bytes]:
    """Give commands to the program, one after the other; the modules of `HEAVY` cannot be imported."""
    (folder / "stubs").mkdir()
    for name in HEAVY:
        (folder / "stubs" / f"{name}.py").write_text("raise RuntimeError(f'{__name__} was imported')")
    (folder / "file").touch()
    places = {"PYTHONPATH": f"{folder / 'stubs'}{os.pathsep}{ROOT}"}
    driver = [sys.executable, "-c", DRIVER, json.dumps(commands)]
    return subprocess.run(driver, cwd=folder, env=os.environ | places | variables, capture_output=True, timeout=120)


def test_mistakes_are_answered_at_once_in_one_sentence(tmp_path: Path) -> None:
    done = drive(tmp_path, [command.split() for command in MISTAKES])
    answers, said = [json.loads(line) for line in done.stdout.splitlines()], done.stderr.decode().splitlines()
    assert len(answers) == len(said) == len(MISTAKES), done.stderr.decode()
    for (command, sentence), (code, seconds), line in zip(MISTAKES.items(), answers, said, strict=True):
        assert code == 2 and sentence in line and seconds < 0.5, (command, line, seconds)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_help_on_any_terminal_imports_nothing_heavy(encoding: str, tmp_path: Path) -> None:
    done = drive(tmp_path, [["--help"], *([name, "--help"] for name in COMMANDS)], PYTHONIOENCODING=encoding)
    text = done.stdout.decode(encoding)
    assert all(f"usage: prospect {name} " in text for name in COMMANDS), done.stderr
    times = [json.loads(line)[1] for line in text.splitlines() if line.startswith("[0, ")]
    assert len(times) == len(COMMANDS) + 1 and max(times) < 0.3


def test_help_of_every_script_on_any_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for script in (*sorted((ROOT / "scripts").glob("*.py")), ROOT / "main.py"):
        screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        monkeypatch.setattr(sys, "stdout", screen)
        monkeypatch.setattr(sys, "argv", [str(script), "--help"])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(script), run_name="__main__")
        screen.flush()
        assert not ended.value.code and screen.buffer.getvalue().count(b"usage: ") == 1, script


def test_a_demo_of_another_concept(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr("ldm.cli.sample.run", lambda argv, *_, **__: seen.append(argv))
    for argv in (["--seed", "3"], ["--concept=a.pt"], ["--prompt=a"]):
        assert main(["demo", *argv]) == 0
    shown = ["--preset", "material", "--prompt", "a large * heart on a black background"]
    assert seen == [["--concept", STAR, *shown, "--seed", "3"], [*shown, "--concept=a.pt"], ["--prompt=a"]]
