"""Buttons, panels, images and sentences of the page, as all its tabs have them."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Literal

from nicegui import app, ui
from PIL import Image

LOOK = "outlined dense stack-label"  # of inputs
# The element takes the focus from one that cannot be seen any more.
TAKE_FOCUS = """setTimeout(() => {
  const focused = document.activeElement;
  if (focused === document.body || !focused.checkVisibility()) getHtmlElement(%d)?.focus({preventScroll: true});
}, 50)"""


def say(message: object, kind: Literal["negative", "info"] = "negative") -> None:
    """Show a sentence for as long as it takes to read."""
    text = str(message)
    ui.notify(text, type=kind, multi_line=True, timeout=4000 + 50 * len(text), close_button="Close", position="top")


@contextmanager
def problems(label: ui.label) -> Iterator[None]:
    """Show the sentence of what cannot be done, or that there is none."""
    label.set_text("")
    try:
        yield
    except (ValueError, OSError) as error:
        label.set_text(str(error))


@cache
def url_of(file: Path) -> str:
    """Where the browser finds a file that the page shows."""
    # without a cache, and though there is none: the user may have deleted it, and another one may get its name
    return app.add_static_file(local_file=file, strict=False, max_cache_age=0)


def inline(image: Image.Image) -> str:
    """An image as a URL that holds it: a file for each preview would be gone before it is fetched."""
    stream = io.BytesIO()
    image.save(stream, format="PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def section(title: str, hint: str = "") -> ui.element:
    """A titled panel to build into."""
    panel = ui.element("section").classes("panel").props(f'aria-label="{title}"')
    with panel, ui.element("div").classes("panel-head"):
        ui.label(title).classes("panel-title").props("role=heading aria-level=2")
        if hint:
            ui.label(hint).classes("soft")
    return panel


def button(text: str, on_click: Callable[[], object], look: str = "quiet", label: str = "") -> ui.element:
    """A native button; `label` is what a screen reader says where the text is a sign."""
    made = ui.element("button").classes(f"button {look}").props("type=button").on("click", on_click)
    if label:
        made.props["aria-label"] = made.props["title"] = label  # not as a text that is parsed: it may hold any name
    with made:
        ui.label(text)
    return made


def file_button(text: str, upload: ui.upload, label: str = "") -> ui.element:
    """A button that opens the browser's choice of files for an `upload`, which is hidden."""
    made = ui.element("button").classes("button quiet").props(f'type=button aria-label="{label or text}"')
    made.on("click", js_handler=f"() => getElement({upload.id}).$refs.qRef.pickFiles()")
    with made:
        ui.label(text)
    return made


def look(made: ui.element, name: str, is_so: bool) -> None:
    """Give an element a look of the style sheet, or take it away."""
    made.classes(add=name if is_so else "", remove="" if is_so else name)


def press(made: ui.element, is_pressed: bool, name: str = "on") -> None:
    """Show a button that stays pressed, to the eye and to a screen reader."""
    look(made, name, is_pressed)
    made.props(f"aria-pressed={str(is_pressed).lower()}")


class Switch:
    """Buttons that start something, and the one that stops it: only the ones of use can be seen.

    The focus of a button that is hidden goes to the one in its place, for the keyboard.
    """

    def __init__(self, stop: ui.element, *starts: ui.element) -> None:
        self._stop, self._starts, self._was_on = stop, starts, False
        stop.set_visibility(False)

    def set(self, is_on: bool) -> None:
        """Show what fits something that runs, or does not."""
        if is_on is self._was_on:
            return
        self._was_on = is_on
        self._stop.set_visibility(is_on)
        for start in self._starts:
            start.set_visibility(not is_on)
        shown = self._stop if is_on else self._starts[-1]
        ui.run_javascript(TAKE_FOCUS % shown.id)


def show_messages(box: ui.element, messages: Sequence[tuple[str, str]]) -> None:
    """Show what the library has said, each sentence with its level."""
    if [text for _, text in messages] == [getattr(label, "text", None) for label in box.default_slot.children]:
        return
    box.clear()
    with box:
        for level, text in messages:
            ui.label(text).classes(f"message {level}")


def shown(image: Image.Image | str, alt: str, look: str = "") -> ui.element:
    """An image that fills its place, with a text in its place."""
    source = image if isinstance(image, str) else inline(image)
    made = ui.image(source).props("fit=contain no-spinner no-transition").classes(look)
    made.props["alt"] = alt
    return made


def figure(image: Image.Image | str, caption: str) -> None:
    """An image with a caption below it."""
    with ui.element("figure"):
        shown(image, caption)
        ui.label(caption).classes("soft")


def progress_bar() -> ui.linear_progress:
    """A bar that follows its value at once."""
    return ui.linear_progress(value=0, show_value=False).props('instant-feedback aria-label="Progress"')


def offer(link: ui.link, file: Path) -> None:
    """Let a link save a file."""
    link.props["href"], link.props["download"] = url_of(file), file.name
