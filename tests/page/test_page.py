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

from ldm.generate import read_parameters
from ldm.page import learning
from ldm.page.app import build
from ldm.page.compare import CompareForm
from ldm.page.edit import EditForm
from ldm.page.engine import Engine, ImageJob
from ldm.page.learning import LearnForm
from ldm.page.session import Session
from ldm.request import Request

STAR = "models/demo/concepts/dotted-star.safetensors"
MARKUP = "<img src=x onerror=alert(1)>"
REFERENCE = Path(__file__).parents[2] / "models/demo/references/dotted-star/dotted-star.png"


def driven(script: Callable[[User, Engine], Awaitable[None]]) -> Callable[[Engine], None]:
    """A test that opens the page and runs a script with the user."""

    async def run(engine: Engine, errors: list[Exception]) -> None:
        async with user_simulation() as user:
            app.on_exception(errors.append)
            build(engine)
            try:
                await script(await opened(user), engine)
            except Exception as error:  # the server ends only where its context is left in order
                errors.insert(0, error)
            finally:
                await asyncio.sleep(0.2)  # what is being sent keeps the server from ending (Python 3.11)

    def test(engine: Engine) -> None:
        errors: list[Exception] = []
        asyncio.run(run(engine, errors))
        for error in errors:
            raise error

    return test


async def opened(user: User) -> User:
    await user.open("/")
    await user.should_see("Stages", retries=30)
    return user


async def until(condition: Callable[[], Any], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        await asyncio.sleep(0.02)


def session(user: User) -> Session:
    found: Session = app.storage._tabs[user.tab_id]["session"]
    return found


async def over(user: User) -> ImageJob:
    """The image that is being made, when it is over."""
    job = session(user).job
    assert job is not None
    await until(lambda: not job.is_running)
    return job


def one(user: User, marker: str) -> Any:
    """The one element with a marker."""
    [element] = user.find(marker=marker).elements
    return element


def click(user: User, *markers: str) -> None:
    for marker in markers:
        user.find(marker=marker).trigger("click")


def fill(user: User, **values: object) -> None:
    """Give inputs values; `__` in a name stands for a hyphen."""
    for name, value in values.items():
        one(user, name.replace("__", "-")).value = value


def marked_stages(user: User, lane: int = 0) -> list[int]:
    """The stages whose cells are shown as carrying the concept."""
    cells = [(stage, one(user, f"cell-{lane}-{stage}")) for stage in range(10)]
    assert all(("on" in cell.classes) == (cell.props["aria-pressed"] == "true") for _, cell in cells)
    return [stage for stage, cell in cells if "on" in cell.classes]


async def hand_in(user: User, marker: str, *files: tuple[str, bytes]) -> None:
    await one(user, marker).handle_uploads([SmallFileUpload(name, "", content) for name, content in files])


@driven
async def test_presets_and_drawing_mark_stages(user: User, engine: Engine) -> None:
    form = session(user).form
    click(user, "preset-all")
    assert marked_stages(user) == list(range(10))
    click(user, "preset-layout")
    assert marked_stages(user) == sorted(engine.windows["layout"]) == [7, 8, 9]
    user.find(marker="cell-0-7").trigger("pointerdown")
    for stage in (8, 3):
        user.find(marker=f"cell-0-{stage}").trigger("pointerenter")
    assert marked_stages(user) == [9]
    click(user, "cell-0-4")  # a key
    assert marked_stages(user) == [4, 9] and form.request().preset is None


@driven
async def test_stages_have_texts_with_their_token_counts_and_guidance_scales(user: User, engine: Engine) -> None:
    form = session(user).form
    for text, stages in (("a large green heart", []), ("a large green * heart", [3, 4, 5, 6, 7])):
        one(user, "text-7").value = text
        assert marked_stages(user) == stages
    click(user, "preset-all")
    for stage in (6, 5):
        user.find(marker=f"stage-{stage}").trigger("pointerdown")
    entry = one(user, "text-6")
    entry.value = "a small * star"
    await user.should_see("4 tokens")
    assert [form.text(stage) for stage in (7, 6, 5, 4)].count("a small * star") == 2
    assert one(user, "text-6") is entry  # it keeps the focus
    user.find(marker="text-6").trigger("blur")
    await user.should_see("Reset")
    click(user, "reset-6", "scales")
    assert not form.own
    one(user, "scale-9").value = 6
    assert form.request().scale == (2.5,) * 9 + (6,)
    one(user, "scale-0").value = None
    await user.should_see("scale[0] must be a number, not None.")
    click(user, "scales")
    await user.should_not_see("scale[0] must be a number")
    assert form.request().scale is None


@driven
async def test_an_image_comes_with_previews_and_restores_the_form(user: User, engine: Engine) -> None:
    seed = 2**53 + 1  # a browser's number would lose the 1
    fill(user, prompt="a small * circle", seed=str(seed), ddim_steps=5)
    click(user, "preset-material", "generate")
    job = await over(user)
    await user.should_see("Done in", retries=20)
    await user.should_see("The preset 'material' is stages 3, 4, 5, 6, 7 of 10, from models/demo/presets.yaml.")
    record = read_parameters(job.files[0])
    assert (record["seed"], record["ddim_steps"], record["preset"]) == (seed, 5, "material")
    fill(user, prompt="something else")
    click(user, "preset-all")
    await hand_in(user, "drop", ("ours.png", job.files[0].read_bytes()))
    await until(lambda: one(user, "prompt").value == "a small * circle", 5)
    assert marked_stages(user) == [3, 4, 5, 6, 7]
    assert session(user).form.request().for_model(engine.facts) == job.request


@driven
async def test_mistakes_are_answered_with_the_librarys_sentence(user: User, engine: Engine) -> None:
    fill(user, width=100)
    await user.should_see("width must be a multiple of 32 for this model, not 100; nearest: 96.")
    click(user, "generate")
    assert session(user).job is None
    fill(user, width=96)
    await user.should_not_see("width must be a multiple")
    for name, wrong, sentence, right in [
        ("ddim_steps", None, "ddim_steps must be a whole number, not None.", 2),
        ("ddim_steps", 2.5, "ddim_steps must be a whole number, not 2.5.", 2),
        ("seed", "one", "seed must be a whole number, not 'one'.", "42"),
        ("negative_prompt", "no *", "negative_prompt has the placeholder '*'; it must be plain text, so", ""),
    ]:
        fill(user, **{name: wrong})
        await user.should_see(sentence)
        fill(user, **{name: right})
    fill(user, prompt="word " * 60)
    click(user, "generate")
    await over(user)
    await user.should_see("The prompt is longer than 30 tokens; cut off: 'rd word", retries=20)


WRONG_FILES = [
    ("page.png", b"<!doctype html>", "'page.png' is a web page, perhaps of a login"),
    ("cut.png", REFERENCE.read_bytes()[:200], "'cut.png' "),
    ("big.png", b"\x07" * 30_000_000, "'big.png' is no image that Pillow can read"),
    ("iphone.jpg", b"\0\0\0\x18ftypheic" + b"\0" * 20, "'iphone.jpg' is a HEIC image"),
    ("page.pt", b"<!doctype html>", "'page.pt' is a web page, perhaps of a login"),
    ("notes.txt", b"hello", "'notes.txt' "),
]


@driven
async def test_dropped_files_go_where_they_belong_or_are_named(user: User, engine: Engine) -> None:
    ours = [engine.submit(Request(prompt="a star", ddim_steps=1, seed=seed)) for seed in (5, 6, 7)]
    await until(lambda: not ours[-1].is_running)
    before = sorted(Path().iterdir())
    for name, content, sentence in WRONG_FILES:
        await hand_in(user, "drop", (name, content))
        await until(lambda sentence=sentence: any(sentence in text for text in user.notify.messages), 10)
    assert sorted(Path().iterdir()) == before
    await hand_in(user, "drop", ("star.safetensors", Path(STAR).read_bytes()))
    await until(lambda: len(session(user).form.lanes) == 2, 5)
    assert session(user).form.lanes[1].placeholder == "<star>"
    assert one(user, "cell-1-9").props["aria-pressed"] == "true"
    await hand_in(user, "drop", ("cat.png", REFERENCE.read_bytes()))
    await until(lambda: session(user).form.settings.get("content_dir"), 5)
    await user.should_see("cat.png")
    click(user, "generate")
    record = read_parameters((await over(user)).files[0])
    assert record["content_hash"] and set(record["concepts"]) == {"*", "<star>"}
    assert session(user).form.text(9) == "a large heart on a black background <star>"
    for tab, job in zip(("Learn", "Edit", "Export"), ours, strict=True):  # ours restores its form on every tab
        user.find(tab).click()
        await hand_in(user, "drop", ("ours.png", job.files[0].read_bytes()))
        await until(lambda job=job: one(user, "seed").value == str(job.request.seed), 5)
        assert session(user).tab == "Generate" and one(user, "prompt").value == "a star"
    assert not session(user).form.lanes
    assert not session(user).of(LearnForm).images and session(user).of(EditForm).image is None


@driven
async def test_two_tabs_do_not_mix_and_a_reload_keeps_the_form(user: User, engine: Engine) -> None:
    other = await opened(User(user.http_client))
    fill(user, prompt=MARKUP, ddim_steps=3)
    fill(other, prompt="yours", ddim_steps=3)
    click(user, "preset-layout")
    for which in (user, other):
        click(which, "generate")
    mine, yours = await over(user), await over(other)
    assert read_parameters(mine.files[0])["preset_prompt"] == MARKUP
    assert read_parameters(yours.files[0])["preset_prompt"] == "yours"
    await user.should_see("Made in this tab", retries=20)
    mine.files[0].unlink()
    await opened(user)  # again, in the same tab
    await user.should_see("Images that you make are kept here.")
    assert not user._sees(ui.html) or all("onerror" not in e.content for e in user.find(ui.html).elements)
    assert one(user, "prompt").value == MARKUP and marked_stages(user) == [7, 8, 9]
    assert one(other, "prompt").value == "yours" and marked_stages(other) == [3, 4, 5, 6, 7]


def _texts(user: User) -> str:
    with user:
        return " ".join(str(element.text) for element in user.find(ui.label).elements)


@pytest.fixture
def quick_learner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "PROGRAM", (sys.executable, str(Path(__file__).with_name("learner.py"))))


@pytest.mark.usefixtures("quick_learner")
@driven
async def test_a_run_is_shown_stopped_in_another_tab_and_resumed(user: User, engine: Engine) -> None:
    """Also by a page that knows no process: what the run was given lies beside it, its lock says whether it runs."""
    user.find("Learn").click()
    click(user, "learn")
    await user.should_see("Choose the images to learn from, and at least one step.")
    await hand_in(user, "learn-upload", ("cup.png", REFERENCE.read_bytes()), ("page.png", b"<html>"))
    await until(lambda: any("'page.png' is a web page" in text for text in user.notify.messages), 10)
    await until(lambda: one(user, "learn-name").value == "cup", 5)
    assert (one(user, "learn-method").value, one(user, "learn-steps").value) == ("ProSpect, fast", 75)
    fill(user, learn__method="ProSpect", learn__init_word="star")
    await until(lambda: one(user, "learn-steps").value == 300, 5)
    click(user, "learn")
    run = session(user).of(LearnForm).run
    assert run is not None and run.process is not None
    await until(lambda: re.search(r"Learning · step \d+ of 300", _texts(user)), 10)
    engine.runs.clear()  # as if the page had ended
    other = await opened(User(user.http_client))
    other.find("Learn").click()
    await other.should_see(f"{run.folder.name} · running")
    click(other, "unfinished")
    await until(lambda: re.search(r"Learning · step \d+ of 300", _texts(other)), 10)
    click(other, "learn-stop")
    for which in (user, other):
        await until(lambda which=which: re.search(r"Stopped · step \d+ of 300", _texts(which)), 10)
    assert run.process.wait(10) == 130
    assert [(left.folder, left.is_running) for left in learning.unfinished()] == [(run.folder, False)]
    fill(other, learn__steps=23)
    click(other, "learn-resume")
    assert run.is_running  # so no tab starts it twice
    await until(lambda: "Complete · step 23 of 23" in _texts(other), 10)  # of which 20 is the last that was logged
    assert learning.unfinished() == [] and session(other).of(LearnForm).run in engine.runs.values()
    [image] = (run.given / "images").iterdir()
    assert image.read_bytes() == REFERENCE.read_bytes()
    click(other, "use")
    [lane] = session(other).form.lanes
    assert Path(lane.file).is_file() and Path(lane.file).parts[:2] == ("logs", "page")


@driven
async def test_a_run_that_fails_ends_with_its_own_sentence(user: User, engine: Engine) -> None:
    user.find("Learn").click()
    await hand_in(user, "learn-upload", ("cup.png", REFERENCE.read_bytes()))
    await until(lambda: session(user).of(LearnForm).images, 5)
    engine.setup["ckpt"] = "models/nowhere.safetensors"
    click(user, "learn")
    run = session(user).of(LearnForm).run
    assert run is not None
    await until(lambda: not run.is_running, 120)
    assert run.error.startswith("There is no file 'models/nowhere.safetensors'")
    await user.should_see(run.error, retries=40)


@driven
async def test_a_grid_is_made_and_a_cell_is_loaded(user: User, engine: Engine) -> None:
    fill(user, ddim_steps=2)
    user.find("Compare").click()
    fill(user, rows__kind="Preset", rows__values="all stages\nlayout", columns__kind="Seed")
    assert one(user, "columns-values").value == "42-45"
    fill(user, columns__values="3\n4")
    click(user, "compare")
    run = session(user).of(CompareForm).run
    assert run is not None
    await until(lambda: run.files)
    await user.should_see("4 of 4 images", retries=20)
    click(user, "grid-1-1")
    assert (session(user).form.request().seed, session(user).form.lanes[0].preset) == (4, "layout")
    assert marked_stages(user) == [7, 8, 9]
    fill(user, rows__kind="Steps", rows__values="1")
    await hand_in(user, "drop", ("grid.png", run.files[0].read_bytes()))
    await until(lambda: one(user, "rows-values").value == "all stages\nlayout", 5)
    assert one(user, "rows-kind").value == "Preset"
    fill(user, rows__values="style")
    await opened(user)  # again, in the same tab
    assert one(user, "rows-values").value == "style" and one(user, "grid-1-1")


@driven
async def test_an_image_is_inverted_and_edited_where_the_words_are(user: User, engine: Engine) -> None:
    user.find("Edit").click()
    click(user, "invert", "edit")
    await user.should_see("Choose the image to edit, and say what it shows")
    await user.should_see("Invert the image first, and give the prompt of the edited one.")
    await hand_in(user, "edit-upload", ("star.png", REFERENCE.read_bytes()))
    form = session(user).of(EditForm)
    await until(lambda: form.image, 5)
    fill(user, edit__prompt="a dotted star", edit__steps=2, edit__inner_steps=1)
    click(user, "invert")
    inversion = form.inversion
    assert inversion is not None
    await until(lambda: not inversion.is_running)
    assert (inversion.state, inversion.error) == ("done", "")
    await user.should_see("the image, reconstructed by the autoencoder", retries=20)
    await user.should_see(inversion.quality)
    await user.should_see("The reconstruction has")  # the library's warning: so few steps are not enough
    fill(user, edit__target="a dotted heart", edit__blend="moon:heart")
    click(user, "edit")
    await user.should_see("blend, of the source: 'moon' is no word of the prompt 'a dotted star'; its words are")
    fill(user, edit__blend="star:heart", edit__tau_c="0.2 0.8")
    click(user, "edit")
    job = form.job
    assert job is not None
    await until(lambda: not job.is_running)
    assert (job.state, job.step) == ("done", 4)
    for caption in ("where 'star' is", "v0.5 c0.2 s0.6 u0", "v0.5 c0.8 s0.6 u0"):
        await user.should_see(caption, retries=20)
    assert [path.suffix for path in job.files] == [".png"] * 3  # the grid and the edits
    fill(user, edit__target="", edit__tau_c="0.6")
    await hand_in(user, "drop", ("edit.png", job.files[1].read_bytes()))
    await until(lambda: one(user, "edit-target").value == "a dotted heart", 5)
    await until(lambda: (one(user, "edit-tau_c").value, one(user, "edit-blend").value) == ("0.2", "star:heart"), 5)
    other = await opened(User(user.http_client))  # the inversion is dropped in another tab
    await hand_in(other, "drop", (inversion.files[0].name, inversion.files[0].read_bytes()))
    await until(lambda: session(other).tab == "Edit" and one(other, "edit-prompt").value == "a dotted star", 5)
    fill(other, edit__target="a dotted heart")
    click(other, "edit")
    again = session(other).of(EditForm).job
    assert again is not None
    await until(lambda: not again.is_running)
    assert again.state == "done" and form.job is job


@driven
async def test_the_export_is_downloaded(user: User, engine: Engine) -> None:
    [lane] = session(user).form.lanes
    for file in (lane.file, lane.file.replace("dotted-star", "striped-heart"), STAR):
        one(user, "concept").value = file
        user.find("Generate").click()
        user.find("Export").click()
        await until(lambda file=file: one(user, "export-name").value == Path(file).stem)  # and no name before it
    click(user, "export")
    download = await user.download.next()
    assert download.content[:2] == b"PK"
    await user.should_see("dotted-star_comfyui.json")
