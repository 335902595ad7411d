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


def say(message: object, kind: Literal["negative", "info"] = "negative") -> None:
    """Show a sentence for as long as it takes to read."""
    text = str(message)
    ui.notify(text, type=kind, multi_line=True, timeout=4000 + 50 * len(text), close_button="Close", position="top")


@contextmanager
def problems(label: ui.label) -> Iterator[None]:
    """Show the sentence of what cannot be done, or that there is none."""
    try:
        yield
    except (ValueError, OSError) as error:
        label.set_text(str(error))
    else:
        label.set_text("")


@cache
def url_of(file: Path) -> str:
    """Where the browser finds a file that the page shows."""
    return app.add_static_file(local_file=file, strict=False)  # the user may have deleted it


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


def keep_focus(*buttons: ui.element) -> None:
    """Give the focus of a button that was hidden to the one that stands in its place, for the keyboard."""
    for made in buttons:
        if made.visible:
            focus = f"getHtmlElement({made.id})?.focus({{preventScroll: true}})"
            ui.run_javascript(f"setTimeout(() => document.activeElement === document.body && {focus}, 50)")
            return


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
