"""The page itself, in process: NiceGUI's simulated user clicks and types where a browser would."""

import asyncio
import re
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from nicegui import app, ui
from nicegui.elements.upload_files import SmallFileUpload
from nicegui.testing import User, user_simulation
from runs import wait_for

from ldm.generate import read_parameters
from ldm.page import learning
from ldm.page.app import build
from ldm.page.compare import CompareForm
from ldm.page.edit import EditForm, InversionJob
from ldm.page.engine import Engine
from ldm.page.learning import LearnForm
from ldm.page.session import Session
from ldm.request import Request

STAR = "models/demo/concepts/dotted-star.safetensors"
MARKUP = "<img src=x onerror=alert(1)>"
REFERENCE = Path(__file__).parents[2] / "models/demo/references/dotted-star/dotted-star.png"


def drive(engine: Engine, script: Callable[[User], Awaitable[None]]) -> None:
    """Open the page and run a script with the user."""

    errors: list[Exception] = []

    async def run() -> Exception | None:
        async with user_simulation() as user:
            app.on_exception(errors.append)
            build(engine)
            await user.open("/")
            try:
                await user.should_see("Stages", retries=30)
                await script(user)
            except Exception as error:  # the server ends only where its context is left in order
                return error
            finally:
                await asyncio.sleep(0.2)  # what is being sent keeps the server from ending (Python 3.11)
        return None

    failure = asyncio.run(run())
    for error in (failure, *errors):
        if error is not None:
            raise error


async def until(condition: Callable[[], Any], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        await asyncio.sleep(0.02)


def session(user: User) -> Session:
    found: Session = app.storage._tabs[user.tab_id]["session"]
    return found


def one(user: User, marker: str) -> Any:
    """The one element with a marker."""
    [element] = user.find(marker=marker).elements
    return element


def marked_stages(user: User, lane: int = 0) -> list[int]:
    """The stages whose cells are shown as carrying the concept."""
    cells = [(stage, one(user, f"cell-{lane}-{stage}")) for stage in range(10)]
    assert all(("on" in cell.classes) == (cell.props["aria-pressed"] == "true") for _, cell in cells)
    return [stage for stage, cell in cells if "on" in cell.classes]


async def hand_in(user: User, marker: str, *files: tuple[str, bytes]) -> None:
    await one(user, marker).handle_uploads([SmallFileUpload(name, "", content) for name, content in files])


def test_a_preset_marks_exactly_its_window(engine: Engine) -> None:
    async def script(user: User) -> None:
        for attribute in ("content", "layout", "material", "style"):
            user.find(marker="preset-all").trigger("click")
            assert marked_stages(user) == list(range(10))
            user.find(marker=f"preset-{attribute}").trigger("click")
            assert marked_stages(user) == sorted(engine.windows[attribute])
            texts = {stage: session(user).form.text(stage) for stage in range(10)}
            assert [stage for stage, text in texts.items() if "*" in text] == sorted(engine.windows[attribute])

    drive(engine, script)


def test_drawing_over_cells_gives_them_what_the_first_one_got(engine: Engine) -> None:
    async def script(user: User) -> None:
        user.find(marker="preset-layout").trigger("click")  # 7, 8, 9
        user.find(marker="cell-0-7").trigger("pointerdown")
        user.find(marker="cell-0-8").trigger("pointerenter")
        user.find(marker="cell-0-3").trigger("pointerenter")
        assert marked_stages(user) == [9]
        user.find(marker="cell-0-4").trigger("click")  # a key
        assert marked_stages(user) == [4, 9]
        assert session(user).form.request().preset is None

    drive(engine, script)


def test_the_text_of_a_selection_is_edited_with_its_token_count(engine: Engine) -> None:
    async def script(user: User) -> None:
        user.find(marker="preset-all").trigger("click")
        for stage in (6, 5):
            user.find(marker=f"stage-{stage}").trigger("pointerdown")
        entry = one(user, "text-6")
        entry.value = "a small * star"
        await user.should_see("4 tokens")
        form = session(user).form
        assert [form.text(stage) for stage in (7, 6, 5, 4)].count("a small * star") == 2
        assert one(user, "text-6") is entry  # it keeps the focus
        user.find(marker="text-6").trigger("blur")
        await user.should_see("Reset")
        user.find(marker="reset-6").trigger("click")
        assert not form.own

    drive(engine, script)


def test_a_text_without_the_concept_is_marked_while_it_is_written(engine: Engine) -> None:
    async def script(user: User) -> None:
        one(user, "text-7").value = "a large green heart"
        await until(lambda: marked_stages(user) == [], 5)
        one(user, "text-7").value = "a large green * heart"
        await until(lambda: marked_stages(user) == [3, 4, 5, 6, 7], 5)

    drive(engine, script)


def test_each_stage_can_have_a_guidance_scale(engine: Engine) -> None:
    async def script(user: User) -> None:
        user.find(marker="scales").trigger("click")
        one(user, "scale-9").value = 6
        assert session(user).form.request().scale == (2.5,) * 9 + (6,)
        one(user, "scale-0").value = None
        await user.should_see("scale[0] must be a number, not None.")
        user.find(marker="scales").trigger("click")
        await user.should_not_see("scale[0] must be a number")
        assert session(user).form.request().scale is None

    drive(engine, script)


def test_an_image_comes_with_previews_and_restores_the_form(engine: Engine) -> None:
    async def script(user: User) -> None:
        one(user, "prompt").value = "a small * circle"
        one(user, "seed").value = str(2**53 + 1)  # a browser's number would lose the 1
        one(user, "ddim_steps").value = 5
        user.find(marker="preset-material").trigger("click")
        user.find(marker="generate").trigger("click")
        job = session(user).job
        assert job is not None
        await until(lambda: not job.is_running)
        await user.should_see("Done in", retries=20)
        await user.should_see("The preset 'material' is stages 3, 4, 5, 6, 7 of 10, from models/demo/presets.yaml.")
        record = read_parameters(job.files[0])
        assert (record["seed"], record["ddim_steps"], record["preset"]) == (2**53 + 1, 5, "material")
        one(user, "prompt").value = "something else"
        user.find(marker="preset-all").trigger("click")
        await hand_in(user, "drop", ("ours.png", job.files[0].read_bytes()))
        await until(lambda: one(user, "prompt").value == "a small * circle", 5)
        assert marked_stages(user) == [3, 4, 5, 6, 7]
        assert session(user).form.request().for_model(engine.facts) == job.request

    drive(engine, script)


def test_mistakes_are_answered_with_the_librarys_sentence(engine: Engine) -> None:
    async def script(user: User) -> None:
        one(user, "width").value = 100
        await user.should_see("width must be a multiple of 32 for this model, not 100; nearest: 96.")
        user.find(marker="generate").trigger("click")
        assert session(user).job is None
        one(user, "width").value = 96
        await user.should_not_see("width must be a multiple")
        one(user, "ddim_steps").value = None
        await user.should_see("ddim_steps must be a whole number, not None.")
        one(user, "ddim_steps").value = 2.5
        await user.should_see("ddim_steps must be a whole number, not 2.5.")
        one(user, "ddim_steps").value = 2
        one(user, "seed").value = "one"
        await user.should_see("seed must be a whole number, not 'one'.")
        one(user, "seed").value = "42"
        one(user, "negative_prompt").value = "no *"
        await user.should_see("negative_prompt has the placeholder '*'; it must be plain text, so leave it out.")
        one(user, "negative_prompt").value = ""
        one(user, "prompt").value = "word " * 60
        user.find(marker="generate").trigger("click")
        await until(lambda: not session(user).job.is_running)  # type: ignore[union-attr]
        await user.should_see("The prompt is longer than 30 tokens; cut off: 'rd word", retries=20)

    drive(engine, script)


WRONG_FILES = [
    ("page.png", b"<!doctype html>", "'page.png' is a web page, perhaps of a login"),
    ("cut.png", REFERENCE.read_bytes()[:200], "'cut.png' "),
    ("big.png", b"\x07" * 30_000_000, "'big.png' is no image that Pillow can read"),
    ("page.pt", b"<!doctype html>", "'page.pt' is a web page, perhaps of a login"),
    ("notes.txt", b"hello", "'notes.txt' "),
]


def test_files_that_are_none_are_named(engine: Engine) -> None:
    async def script(user: User) -> None:
        before = sorted(Path().iterdir())
        for name, content, sentence in WRONG_FILES:
            await hand_in(user, "drop", (name, content))
            await until(lambda sentence=sentence: any(sentence in text for text in user.notify.messages), 10)
        assert sorted(Path().iterdir()) == before

    drive(engine, script)


def test_other_files_go_where_they_belong(engine: Engine) -> None:
    async def script(user: User) -> None:
        await hand_in(user, "drop", ("star.safetensors", Path(STAR).read_bytes()))
        await until(lambda: len(session(user).form.lanes) == 2, 5)
        assert session(user).form.lanes[1].placeholder == "<star>"
        assert one(user, "cell-1-9").props["aria-pressed"] == "true"
        await hand_in(user, "drop", ("cat.png", REFERENCE.read_bytes()))
        await until(lambda: session(user).form.settings.get("content_dir"), 5)
        await user.should_see("cat.png")
        user.find(marker="generate").trigger("click")
        await until(lambda: not session(user).job.is_running)  # type: ignore[union-attr]
        record = read_parameters(session(user).job.files[0])  # type: ignore[union-attr]
        assert record["content_hash"] and set(record["concepts"]) == {"*", "<star>"}
        assert session(user).form.text(9) == "a large heart on a black background <star>"

    drive(engine, script)


def test_an_image_of_ours_restores_the_form_wherever_it_is_dropped(engine: Engine) -> None:
    ours = [engine.submit(Request(prompt="a star", ddim_steps=1, seed=seed)) for seed in (5, 6, 7)]
    wait_for(lambda: not ours[-1].is_running)

    async def script(user: User) -> None:
        for tab, job in zip(("Learn", "Edit", "Export"), ours, strict=True):
            user.find(tab).click()
            await hand_in(user, "drop", ("ours.png", job.files[0].read_bytes()))
            await until(lambda job=job: one(user, "seed").value == str(job.request.seed), 5)
            assert session(user).tab == "Generate" and one(user, "prompt").value == "a star"
        assert (
            not session(user).form.lanes
            and not session(user).of(LearnForm).images
            and session(user).of(EditForm).image is None
        )

    drive(engine, script)


def test_two_tabs_do_not_mix_and_a_reload_keeps_the_form(engine: Engine) -> None:
    async def script(user: User) -> None:
        other = User(user.http_client)
        await other.open("/")
        await other.should_see("Stages", retries=30)
        one(user, "prompt").value = MARKUP
        one(other, "prompt").value = "yours"
        user.find(marker="preset-layout").trigger("click")
        for which in (user, other):
            one(which, "ddim_steps").value = 3
            which.find(marker="generate").trigger("click")
        mine, yours = session(user).job, session(other).job
        assert mine is not None and yours is not None and yours.state in ("waiting", "running")
        await until(lambda: not (mine.is_running or yours.is_running))
        assert read_parameters(mine.files[0])["preset_prompt"] == MARKUP
        assert read_parameters(yours.files[0])["preset_prompt"] == "yours"
        await user.should_see("Made in this tab", retries=20)
        mine.files[0].unlink()
        await user.open("/")  # again, in the same tab
        await user.should_see("Images that you make are kept here.", retries=30)
        assert not user._sees(ui.html) or all("onerror" not in e.content for e in user.find(ui.html).elements)
        assert one(user, "prompt").value == MARKUP and marked_stages(user) == [7, 8, 9]
        assert one(other, "prompt").value == "yours" and marked_stages(other) == [3, 4, 5, 6, 7]

    drive(engine, script)


def test_stop_ends_the_image_and_the_next_one_comes(engine: Engine) -> None:
    async def script(user: User) -> None:
        one(user, "ddim_steps").value = 500
        user.find(marker="generate").trigger("click")
        job = session(user).job
        assert job is not None
        await until(lambda: job.step >= 2)
        step = job.step
        await user.should_see("Stop", retries=20)
        user.find(marker="stop").trigger("click")
        await until(lambda: not job.is_running)
        assert job.state == "stopped" and job.step <= step + 2
        one(user, "ddim_steps").value = 1
        await user.should_see("Stopped after step", retries=20)
        user.find(marker="generate").trigger("click")
        await until(lambda: session(user).job.state == "done")  # type: ignore[union-attr]

    drive(engine, script)


def test_what_is_learned_is_shown_used_and_resumed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "PROGRAM", (sys.executable, str(Path(__file__).with_name("learner.py"))))

    async def script(user: User) -> None:
        user.find("Learn").click()
        user.find(marker="learn").trigger("click")
        await user.should_see("Choose the images to learn from first.")
        await hand_in(user, "learn-upload", ("cup.png", REFERENCE.read_bytes()), ("page.png", b"<html>"))
        await until(lambda: any("'page.png' is a web page" in text for text in user.notify.messages), 10)
        await until(lambda: one(user, "learn-name").value == "cup", 5)
        assert (one(user, "learn-method").value, one(user, "learn-steps").value) == ("ProSpect, fast", 75)
        one(user, "learn-method").value = "ProSpect"
        await until(lambda: one(user, "learn-steps").value == 300, 5)
        one(user, "learn-init_word").value = "star"
        user.find(marker="learn").trigger("click")
        form = session(user).of(LearnForm)
        assert form.run is not None
        await until(lambda: re.search(r"Learning · step \d+ of 300", _texts(user)), 10)
        user.find(marker="learn-stop").trigger("click")
        await until(lambda: not form.run.is_running, 10)  # type: ignore[union-attr]
        await until(lambda: re.search(r"Stopped · step \d+ of 300", _texts(user)), 10)
        one(user, "learn-steps").value = 23
        user.find(marker="learn-resume").trigger("click")
        await until(lambda: "Complete · step 23 of 23" in _texts(user), 10)  # of which 20 is the last that was logged
        user.find(marker="use").trigger("click")
        [lane] = session(user).form.lanes
        assert Path(lane.file).is_file() and Path(lane.file).parts[:2] == ("logs", "page")

    drive(engine, script)


def test_a_run_of_another_tab_or_page_is_shown_stopped_and_resumed(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the page was killed: what the run was given lies beside it, and its lock says whether it runs."""
    monkeypatch.setattr(learning, "PROGRAM", (sys.executable, str(Path(__file__).with_name("learner.py"))))
    left = LearnForm([REFERENCE], "cup", steps=300).start(engine.setup)

    async def script(user: User) -> None:
        await until(lambda: left.step, 10)
        user.find("Learn").click()
        await user.should_see(f"{left.folder.name} · running")
        user.find(marker="unfinished").trigger("click")
        form = session(user).of(LearnForm)
        await until(lambda: re.search(r"Learning · step \d+ of 300", _texts(user)), 10)
        user.find(marker="learn-stop").trigger("click")
        await until(lambda: re.search(r"Stopped · step \d+ of 300", _texts(user)), 10)
        assert left.process is not None and left.process.wait(10) == 130
        assert [(run.folder, run.is_running) for run in learning.unfinished()] == [(left.folder, False)]
        one(user, "learn-steps").value = 23
        user.find(marker="learn-resume").trigger("click")
        assert left.is_running  # so no tab starts it twice
        await until(lambda: "Complete · step 23 of 23" in _texts(user), 10)
        assert learning.unfinished() == [] and form.run in engine.runs.values()
        [image] = (left.given / "images").iterdir()
        assert image.read_bytes() == REFERENCE.read_bytes()

    drive(engine, script)


def _texts(user: User) -> str:
    with user:
        return " ".join(str(element.text) for element in user.find(ui.label).elements)


def test_a_run_that_fails_ends_with_its_own_sentence(engine: Engine) -> None:
    async def script(user: User) -> None:
        user.find("Learn").click()
        await hand_in(user, "learn-upload", ("cup.png", REFERENCE.read_bytes()))
        await until(lambda: session(user).of(LearnForm).images, 5)
        engine.setup["ckpt"] = "models/nowhere.safetensors"
        user.find(marker="learn").trigger("click")
        form = session(user).of(LearnForm)
        await until(lambda: form.run is not None and not form.run.is_running, 120)
        assert form.run is not None and form.run.error.startswith("There is no file 'models/nowhere.safetensors'")
        await user.should_see(form.run.error, retries=40)

    drive(engine, script)


def test_a_grid_is_made_and_a_cell_is_loaded(engine: Engine) -> None:
    async def script(user: User) -> None:
        one(user, "ddim_steps").value = 2
        user.find("Compare").click()
        one(user, "rows-kind").value = "Preset"
        one(user, "rows-values").value = "all stages\nlayout"
        one(user, "columns-kind").value = "Seed"
        assert one(user, "columns-values").value == "42-45"
        one(user, "columns-values").value = "3\n4"
        user.find(marker="compare").trigger("click")
        run = session(user).of(CompareForm).run
        assert run is not None
        await until(lambda: run.files)
        await user.should_see("4 of 4 images", retries=20)
        user.find(marker="grid-1-1").trigger("click")
        assert (session(user).form.request().seed, session(user).form.lanes[0].preset) == (4, "layout")
        assert marked_stages(user) == [7, 8, 9]
        sheet = run.files[0].read_bytes()
        one(user, "rows-values").value = "style"
        await hand_in(user, "drop", ("grid.png", sheet))
        await until(lambda: one(user, "rows-values").value == "all stages\nlayout", 5)
        one(user, "rows-values").value = "style"
        await user.open("/")  # again, in the same tab
        await user.should_see("Stages", retries=30)
        assert one(user, "rows-values").value == "style" and one(user, "grid-1-1")

    drive(engine, script)


async def invert(user: User) -> InversionJob:
    """Invert the reference image in two steps, as fast as that goes."""
    user.find("Edit").click()
    await hand_in(user, "edit-upload", ("star.png", REFERENCE.read_bytes()))
    await until(lambda: session(user).of(EditForm).image, 5)
    one(user, "edit-prompt").value = "a dotted star"
    one(user, "edit-steps").value, one(user, "edit-inner_steps").value = 2, 1
    user.find(marker="invert").trigger("click")
    job = session(user).of(EditForm).inversion
    assert job is not None
    await until(lambda: not job.is_running)
    assert (job.state, job.error) == ("done", "")
    return job


def test_an_image_is_inverted_and_edited_where_the_words_are(engine: Engine) -> None:
    async def script(user: User) -> None:
        user.find("Edit").click()
        user.find(marker="invert").trigger("click")
        await user.should_see("Choose the image to edit first.")
        user.find(marker="edit").trigger("click")
        await user.should_see("Invert the image first.")
        job = await invert(user)
        await user.should_see("the image, reconstructed by the autoencoder", retries=20)
        await user.should_see(job.quality)
        await user.should_see("The reconstruction has")  # the library's warning: so few steps are not enough
        one(user, "edit-target").value = "a dotted heart"
        one(user, "edit-blend").value = "moon:heart"
        user.find(marker="edit").trigger("click")
        await user.should_see("blend, of the source: 'moon' is no word of the prompt 'a dotted star'; its words are")
        one(user, "edit-blend").value = "star:heart"
        one(user, "edit-tau_c").value = "0.2 0.8"
        user.find(marker="edit").trigger("click")
        form = session(user).of(EditForm)
        await until(lambda: form.job is not None and not form.job.is_running)
        assert form.job is not None and (form.job.state, form.job.step) == ("done", 4)
        for caption in ("where 'star' is", "v0.5 c0.2 s0.6 u0", "v0.5 c0.8 s0.6 u0"):
            await user.should_see(caption, retries=20)
        assert [path.suffix for path in form.job.files] == [".png"] * 3  # the edits and their grid
        form.target, form.taus["tau_c"] = "", "0.6"
        await hand_in(user, "drop", ("edit.png", form.job.files[1].read_bytes()))
        await until(lambda: one(user, "edit-target").value == "a dotted heart", 5)
        await until(lambda: (one(user, "edit-tau_c").value, one(user, "edit-blend").value) == ("0.2", "star:heart"), 5)

    drive(engine, script)


def test_an_inversion_that_is_dropped_is_edited_elsewhere(engine: Engine) -> None:
    async def script(user: User) -> None:
        [file] = (await invert(user)).files
        other = User(user.http_client)
        await other.open("/")
        await other.should_see("Stages", retries=30)
        await hand_in(other, "drop", (file.name, file.read_bytes()))
        await until(lambda: session(other).tab == "Edit" and one(other, "edit-prompt").value == "a dotted star", 5)
        one(other, "edit-target").value = "a dotted heart"
        other.find(marker="edit").trigger("click")
        await until(
            lambda: session(other).of(EditForm).job is not None and not session(other).of(EditForm).job.is_running
        )
        assert session(other).of(EditForm).job.state == "done" and not session(user).of(EditForm).job

    drive(engine, script)


def test_the_export_is_downloaded(engine: Engine) -> None:
    async def script(user: User) -> None:
        user.find("Export").click()
        await until(lambda: one(user, "export-name").value == "dotted-star")
        [lane] = session(user).form.lanes
        one(user, "concept").value = str(Path(lane.file).with_name("striped-heart.safetensors"))
        user.find("Generate").click()
        user.find("Export").click()
        await until(lambda: one(user, "export-name").value == "striped-heart")  # and not the name of the one before
        one(user, "concept").value = STAR
        user.find("Generate").click()
        user.find("Export").click()
        await until(lambda: one(user, "export-name").value == "dotted-star")
        user.find(marker="export").trigger("click")
        download = await user.download.next()
        assert download.content[:2] == b"PK"
        await user.should_see("dotted-star_comfyui.json")

    drive(engine, script)
