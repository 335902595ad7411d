"""The page in Chromium, as a user has it before him: `make test-page`."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from ldm.generate import PNG_KEY, load_model_from_config, main, read_parameters, save_picture
from ldm.page.command import free_port
from ldm.request import FAST

playwright = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.browser

ROOT = Path(__file__).parents[2]
STAR = "models/demo/concepts/dotted-star.safetensors"
REFERENCE = ROOT / "models/demo/references/dotted-star/dotted-star.png"
CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
SETUP = {"config": "configs/demo/finetune.yaml", "ckpt": "models/demo/model.safetensors", "dtype": "float32"}
# What a screen reader would call each control that can be seen.
NAMELESS = """() => [...document.querySelectorAll('button, input, textarea, a[href], [role=tab], [role=combobox]')]
  .filter(e => e.checkVisibility() && e.type !== 'file' && e.tabIndex >= 0)
  .filter(e => !(e.ariaLabel || e.title || e.innerText?.trim() || e.closest('label')?.innerText?.trim()
               || e.querySelector('img[alt]')))
  .map(e => e.outerHTML.slice(0, 200))"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the server runs, and what it writes."""
    made = tmp_path_factory.mktemp("page")
    for name in ("configs", "models"):
        (made / name).symlink_to(ROOT / name)
    return made


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[str]:
    port = free_port(8600)
    command = [sys.executable, str(ROOT / "scripts" / "page.py"), "--no_browser", "--port", str(port)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.pop("PYTEST_CURRENT_TEST", None)  # NiceGUI looks for it
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        until(lambda: _answers(url), 60)
        listening = {c.laddr for c in psutil.Process(process.pid).net_connections("tcp") if c.status == "LISTEN"}
        assert {address.ip for address in listening} == {"127.0.0.1"}
        yield url
    finally:
        process.terminate()
        process.wait(30)
    log = (folder / "server.log").read_text()
    assert "Traceback" not in log, log[-4000:]


def _answers(url: str) -> bool:
    with contextlib.suppress(OSError):
        return bool(urllib.request.urlopen(url, timeout=5).status == 200)
    return False


def until(condition: Callable[[], Any], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def open_page(browser: Any, server: str) -> Iterator[Callable[..., Any]]:
    """Opens pages; at the end none has asked another host for anything, or had an error."""
    contexts, wrong = [], []

    def note_error(message: Any) -> None:
        if message.type == "error":
            wrong.append(f"{message.text} ({message.location['url']})")

    def note_foreign(request: Any) -> None:
        if not request.url.startswith((server, "data:", "blob:", server.replace("http", "ws"))):
            wrong.append(f"asked for {request.url}")

    def make(width: int = 1500, scheme: str = "light") -> Any:
        context = browser.new_context(viewport={"width": width, "height": 1000}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", note_error)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", note_foreign)
        page.goto(server)
        page.get_by_role("button", name="Generate", exact=True).wait_for()
        return page

    yield make
    for context in contexts:
        context.close()
    assert not wrong


@pytest.fixture
def page(open_page: Callable[..., Any]) -> Any:
    return open_page()


def set_number(page: Any, label: str, value: object, region: str = "Settings") -> None:
    entry = page.get_by_role("region", name=region).get_by_role("spinbutton", name=label, exact=True)
    entry.fill(str(value))
    entry.press("Tab")


def set_seed(page: Any, seed: int) -> None:
    page.get_by_role("textbox", name="Seed").fill(str(seed))


def prompt_of(page: Any) -> Any:
    return page.get_by_role("textbox", name="Prompt", exact=True)


def generate(page: Any) -> None:
    page.get_by_role("button", name="Generate", exact=True).click()


def marked_stages(page: Any) -> list[int]:
    cells = page.locator(".lane .cell.on")
    return sorted(int(label.rpartition(" ")[2]) for label in cells.evaluate_all("all => all.map(e => e.ariaLabel)"))


def hand_in(page: Any, button: str, *files: Any) -> None:
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name=button).click()
    chooser.value.set_files(list(files))


def drop(page: Any, name: str, content: bytes) -> None:
    """Drop a file on the middle of the page."""
    data = page.evaluate_handle(
        """([name, bytes]) => { const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(bytes)], name)); return data; }""",
        [name, list(content)],
    )
    page.dispatch_event("body", "drop", {"dataTransfer": data})


def test_other_names_of_the_host_are_refused(server: str) -> None:
    for headers in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}):
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(urllib.request.Request(server, headers=headers))


def test_cells_are_marked_by_presets_drawn_with_the_mouse_and_reached_with_the_keyboard(page: Any) -> None:
    for name, window in (("Material", [3, 4, 5, 6, 7]), ("All stages", list(range(10))), ("Layout", [7, 8, 9])):
        page.get_by_role("button", name=name, exact=True).click()
        until(lambda window=window: marked_stages(page) == window, 5)
    places = {stage: page.get_by_label(f"Concept 1 in stage {stage}").bounding_box() for stage in (5, 4, 3)}
    for number, box in enumerate(places.values()):
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        if not number:
            page.mouse.down()
    page.mouse.up()
    until(lambda: marked_stages(page) == [3, 4, 5, 7, 8, 9], 5)
    page.get_by_label("Select stage 9").focus()
    reached = set()
    for _ in range(21):
        reached.add(page.evaluate("document.activeElement.ariaLabel"))
        page.keyboard.press("Tab")
    assert {f"Concept 1 in stage {stage}" for stage in range(10)} <= reached
    page.get_by_label("Concept 1 in stage 9").focus()
    page.keyboard.press("Space")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    until(lambda: marked_stages(page) == [3, 4, 5, 7], 5)


def test_the_keyboard_keeps_its_place_when_a_concept_is_chosen_and_removed(page: Any) -> None:
    choice = page.get_by_role("combobox", name="Concept")
    choice.focus()
    for key in ("Enter", "ArrowDown", "ArrowDown", "Enter"):
        page.keyboard.press(key)
        page.wait_for_timeout(300)
    assert page.evaluate("document.activeElement.ariaLabel") == "Concept" == choice.get_attribute("aria-label")
    page.get_by_alt_text(re.compile("The image that (?!dotted-star)")).wait_for()
    page.get_by_role("button", name="Remove concept 1").press("Enter")
    until(lambda: page.evaluate("document.activeElement.innerText") == "Add a concept", 5)


def test_the_image_has_previews_and_is_what_main_gives(
    page: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_number(page, "Steps", 40)
    page.evaluate(
        """() => { window.sources = new Set(); new MutationObserver(() => {
        const image = document.querySelector('.picture img'); if (image) window.sources.add(image.src); })
        .observe(document.querySelector('.picture'), {subtree: true, childList: true, attributes: true}); }"""
    )
    generate(page)
    page.get_by_text("Done in").wait_for(timeout=60_000)
    assert page.evaluate("window.sources.size") >= 6  # five previews and the image
    file = folder / page.get_by_role("status").first.inner_text().rpartition("kept as ")[2]
    with page.expect_download() as download:
        page.get_by_role("link", name="Save").first.click()
    saved = Path(download.value.path()).read_bytes()
    assert saved == file.read_bytes()
    monkeypatch.chdir(folder)
    model = load_model_from_config(SETUP["config"], SETUP["ckpt"])
    prompt = "a large * heart on a black background"
    asked = FAST | {"ddim_steps": 40}
    image = main(prompt, preset="material", concepts={"*": STAR}, model=model, progress=False, **asked)
    image.info[PNG_KEY] = json.dumps(json.loads(image.info[PNG_KEY]) | SETUP)
    save_picture(image, folder / "main.png")
    assert saved == (folder / "main.png").read_bytes()


def test_stop_ends_within_two_steps_and_the_next_image_comes(page: Any) -> None:
    set_number(page, "Steps", 900)
    page.get_by_role("button", name="Generate", exact=True).press("Enter")
    page.get_by_text(re.compile(r"Step \d+ of 900")).wait_for()
    step = int(re.findall(r"Step (\d+)", page.get_by_role("status").first.inner_text())[0])
    until(lambda: page.evaluate("document.activeElement.innerText") == "Stop", 5)  # the keyboard's place is kept
    page.keyboard.press("Enter")
    page.get_by_text("Stopped after step").wait_for()
    stopped = int(re.findall(r"step (\d+)", page.get_by_role("status").first.inner_text())[0])
    assert step <= stopped < step + 40  # what the page shows is a little behind; see test_engine for the two steps
    set_number(page, "Steps", 2)
    generate(page)
    page.get_by_text("Done in").wait_for()


def test_a_concept_is_learned_used_and_resumed(page: Any) -> None:
    page.get_by_role("tab", name="Learn").click()
    hand_in(page, "Choose images", str(REFERENCE))
    page.get_by_alt_text("dotted-star.png").wait_for()
    set_number(page, "Steps", 20, "Concept")
    page.get_by_role("button", name="Learn", exact=True).click()
    page.locator(".chart polyline").first.wait_for(timeout=60_000)
    page.get_by_text("Complete · step 20 of 20").wait_for(timeout=120_000)
    set_number(page, "Steps", 25, "Concept")
    page.get_by_role("button", name="Resume").click()
    page.get_by_text("Complete · step 25 of 25").wait_for(timeout=120_000)
    page.get_by_role("button", name="Use in Generate").click()
    until(lambda: marked_stages(page) == list(range(10)), 5)
    set_number(page, "Steps", 2)
    generate(page)
    page.get_by_text("Done in").wait_for()


WRONG_FILES = [
    ("page.png", b"<!doctype html>", "'page.png' is a web page, perhaps of a login"),
    ("cut.png", REFERENCE.read_bytes()[:300], "'cut.png' "),
    ("photo.heic.png", b"\0\0\0\x18ftypheic" + b"\0" * 100, "is a HEIC image"),
    ("notes.txt", b"hello", "'notes.txt' "),
]


def test_wrong_files_are_answered_with_a_sentence(page: Any, folder: Path, tmp_path: Path) -> None:
    before = sorted(path for path in folder.rglob("*") if path.name != "server.log")
    for name, content, sentence in WRONG_FILES:
        drop(page, name, content)
        page.get_by_text(sentence).first.wait_for(timeout=20_000)
    (tmp_path / "big.jpg").write_bytes(b"\x07" * 30_000_000)
    page.get_by_text("Start from an image").click()
    hand_in(page, "Choose an image", str(tmp_path / "big.jpg"))
    page.get_by_text("'big.jpg' is no image that Pillow can read").first.wait_for(timeout=20_000)
    assert sorted(path for path in folder.rglob("*") if path.name != "server.log") == before


def test_an_image_is_edited_and_dropped_images_restore_the_form(page: Any, folder: Path) -> None:
    page.get_by_text("Start from an image").click()
    hand_in(page, "Choose an image", str(REFERENCE))
    page.get_by_text("dotted-star.png").first.wait_for()
    set_number(page, "Strength", 0.8)
    set_seed(page, 77)
    set_number(page, "Steps", 5)
    generate(page)
    page.get_by_text("Done in").wait_for()
    file = folder / page.get_by_role("status").first.inner_text().rpartition("kept as ")[2]
    assert read_parameters(file)["strength"] == 0.8
    prompt_of(page).fill("something else")
    set_seed(page, 1)
    drop(page, "ours.png", file.read_bytes())
    until(lambda: page.get_by_role("textbox", name="Seed").input_value() == "77", 10)
    # the browser gets the fields one by one
    until(lambda: prompt_of(page).input_value() == "a large * heart on a black background", 10)


def test_markup_in_a_prompt_is_text(page: Any) -> None:
    page.on("dialog", lambda dialog: pytest.fail("a script ran"))
    prompt_of(page).fill("<img src=x onerror=alert(1)> *")
    set_number(page, "Steps", 1)
    generate(page)
    page.get_by_text("Done in").wait_for()
    for tab in ("Compare", "Export", "Generate"):
        page.get_by_role("tab", name=tab).click()
        page.wait_for_timeout(300)
    assert page.evaluate("document.querySelectorAll('img[onerror]').length") == 0
    assert page.get_by_role("textbox", name="Text of stages 7–3").input_value() == "<img src=x onerror=alert(1)> *"


def test_two_tabs_do_not_mix_and_a_reload_keeps_the_form(open_page: Callable[..., Any]) -> None:
    one, other = open_page(), open_page()
    for page, prompt, steps in ((one, "a small * circle", 60), (other, "a large * star", 3)):
        prompt_of(page).fill(prompt)
        set_number(page, "Steps", steps)
        generate(page)
    for page in (one, other):
        page.get_by_text("Done in").wait_for(timeout=60_000)
    assert "a-small-circle" in one.get_by_role("status").first.inner_text()
    assert "a-large-star" in other.get_by_role("status").first.inner_text()
    one.get_by_role("button", name="Layout", exact=True).click()
    until(lambda: marked_stages(one) == [7, 8, 9], 5)
    one.reload()
    one.get_by_role("button", name="Generate", exact=True).wait_for()
    assert prompt_of(one).input_value() == "a small * circle"
    assert one.get_by_role("spinbutton", name="Steps").input_value() == "60"
    until(lambda: marked_stages(one) == [7, 8, 9], 5)
    one.get_by_text("Done in").wait_for()


def test_a_grid_is_compared_loaded_and_exported(page: Any) -> None:
    set_number(page, "Steps", 2)
    page.get_by_role("tab", name="Compare").click()
    page.get_by_label("Rows: one value a line").fill("material\nlayout")
    page.get_by_label("Columns: one value a line").fill("3\n4")
    page.get_by_role("button", name="Compare", exact=True).click()
    page.get_by_role("link", name="Save as one PNG").wait_for(timeout=60_000)
    page.get_by_role("button", name="Load into Generate: layout, 4").click()
    until(lambda: marked_stages(page) == [7, 8, 9], 5)
    page.get_by_role("tab", name="Export").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Download zip").click()
    assert download.value.suggested_filename == "dotted-star.zip"


@pytest.mark.parametrize("width", [390, 1500])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_tab_is_readable_and_labelled(
    open_page: Callable[..., Any], width: int, scheme: str, tmp_path: Path
) -> None:
    page = open_page(width, scheme)
    for tab in ("Generate", "Learn", "Compare", "Edit", "Export"):
        page.get_by_role("tab", name=tab).click()
        page.wait_for_timeout(400)
        page.screenshot(path=tmp_path / f"{tab}-{width}-{scheme}.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, tab
        assert page.evaluate(NAMELESS) == []
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (dark == "rgb(18, 17, 21)") == (scheme == "dark")


def test_screenshots(open_page: Callable[..., Any], tmp_path: Path) -> None:
    """The images of the documentation: `SCREENSHOTS=docs/images make test-page` renews them."""
    folder = Path(os.environ.get("SCREENSHOTS", tmp_path))
    for width, scheme, name in ((1500, "light", "page"), (1500, "dark", "page-dark"), (390, "dark", "page-phone")):
        page = open_page(width, scheme)
        set_seed(page, 44)
        generate(page)
        page.get_by_text("Done in").wait_for(timeout=60_000)
        page.wait_for_timeout(500)
        _keep(page, folder / f"{name}.png")
    page = open_page()
    page.get_by_role("tab", name="Compare").click()
    page.get_by_role("button", name="Compare", exact=True).click()
    page.get_by_role("link", name="Save as one PNG").wait_for(timeout=300_000)  # 20 images
    _keep(page, folder / "page-compare.png")


def _keep(page: Any, file: Path) -> None:
    """Save a screenshot with 256 colours: a quarter of the bytes."""
    page.mouse.move(0, 0)
    page.wait_for_timeout(500)
    image = Image.open(io.BytesIO(page.screenshot()))
    image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(file, optimize=True)
    assert file.stat().st_size < 300_000
