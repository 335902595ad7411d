"""Learning: the command, what it leaves in its folder, and which training variants there are."""

from pathlib import Path

import pytest
from runs import LOGGER

import ldm.cli.main
import ldm.cli.train
from ldm.page import learning
from ldm.page.engine import Engine
from ldm.page.learning import LearnForm


def test_the_command_that_learns_fills_the_folder_that_the_page_reads(engine: Engine, tmp_path: Path) -> None:
    form, folder = LearnForm(init_word="star", method="ProSpect, fast", steps=5), tmp_path / "run"
    words = form.command(Path("models/demo/references/dotted-star"), folder, engine.setup)
    run = learning.Learning(folder, 5)
    assert words[: len(learning.PROGRAM)] == list(learning.PROGRAM)
    small = ["data.params.batch_size=2", *(f"{LOGGER}.{text}" for text in ("batch_frequency=5", "max_images=1"))]
    ldm.cli.main.learn([*words[len(learning.PROGRAM) :], *small, f"{LOGGER}.log_images_kwargs.ddim_steps=2"])
    assert [step for step, _ in run.losses()] == [5]
    assert set(run.stage_losses()) <= set(range(10)) and run.stage_losses()
    assert [path.name[:23] for path in run.samples()] == ["samples_scaled_gs-00000"]
    assert run.concept is not None


@pytest.mark.parametrize(
    ("lesson", "trust", "texts"),
    [
        ({}, [], []),
        ({"init_word": "star", "method": "NeTI"}, [], ["configs/demo/neti.yaml", "--init_word=star"]),
        ({"init_word": "cat", "method": "CatVersion"}, [], ["--caption=a cat"]),
        ({"caption": "a large * star"}, ["--allow_resolvers"], ["--allow_resolvers", "--caption=a large * star"]),
    ],
)
def test_a_lesson_is_a_command(engine: Engine, lesson: dict[str, str], trust: list[str], texts: list[str]) -> None:
    form = LearnForm(steps=300, **lesson)  # type: ignore[arg-type]
    words = form.command(Path("images"), Path("run"), engine.setup, trust)
    optional = [text for text in words if text.startswith(("--init", "--caption", "--allow")) or "neti" in text]
    assert optional == sorted(texts, key=words.index) == texts
    parsed = ldm.cli.train.parse(["-t", *words[len(learning.PROGRAM) :]])
    assert (parsed.base[0], parsed.project, parsed.trainer["max_steps"]) == (engine.setup["config"], "run", 300)


def test_methods_are_those_that_have_a_configuration_beside_the_models(engine: Engine, tmp_path: Path) -> None:
    usual = {"ProSpect": 300, "ProSpect, fast": 75, "Textual Inversion": 300, "P+ (XTI)": 300, "NeTI": 300}
    assert engine.methods == usual | {"CatVersion": 300}
    own = tmp_path / "own.yaml"
    own.write_text(Path(engine.setup["config"]).read_text())
    assert learning.usual_steps(own) == {"ProSpect": 300}
    assert learning.usual_steps(Path("configs/stable-diffusion/v1-inference.yaml"))["ProSpect"] == 600
