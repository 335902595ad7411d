"""What the tabs of one open page share: the session, where they are shown, and who follows the form."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from nicegui import app, ui
from PIL import Image

from ldm.files.images import image_info
from ldm.files.records import PNG_KEY, read_parameters
from ldm.page.compare import GRID_KEY, read_sheet
from ldm.page.session import Session

LOOK = "outlined dense stack-label"  # of inputs
TABS = ("Generate", "Learn", "Compare", "Edit", "Export")


class View:
    """Args:
    session: of this browser tab.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.tabs: ui.tabs | None = None
        self._followers: list[Callable[[], None]] = []

    def follow_form(self, refresh: Callable[[], None]) -> None:
        """Call `refresh` when something else than its own inputs has changed the form."""
        self._followers.append(refresh)

    def form_changed(self) -> None:
        for refresh in self._followers:
            refresh()

    @staticmethod
    def is_ours(file: Path) -> bool:
        """Whether an image says how it was made."""
        return bool({PNG_KEY, GRID_KEY} & image_info(file).keys())

    def restore(self, file: Path) -> None:
        """Fill in the form that an image was made with, and show it."""
        session = self.session
        try:
            info = image_info(file)
            if GRID_KEY in info:
                rows, columns, record = read_sheet(str(info[GRID_KEY]))
                session.compare.rows, session.compare.columns = (
                    (axis.kind, "\n".join(axis.values)) for axis in (rows, columns)
                )
            else:
                record = read_parameters(file)
            session.form.restore(record)
        except ValueError as error:
            say(error)
            return
        self.form_changed()
        self.show("Compare" if GRID_KEY in info else "Generate")

    def show(self, tab: str) -> None:
        if self.tabs is not None:
            self.tabs.value = tab


def say(message: object, kind: Literal["negative", "info"] = "negative") -> None:
    """Show a sentence for as long as it takes to read."""
    text = str(message)
    ui.notify(text, type=kind, multi_line=True, timeout=4000 + 50 * len(text), close_button="Close", position="top")


def url_of(file: Path) -> str:
    """Where the browser finds a file that the page shows."""
    return app.add_static_file(local_file=file)


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
    upload.classes("offscreen").props("aria-hidden=true tabindex=-1")
    made = ui.element("button").classes("button quiet").props(f'type=button aria-label="{label or text}"')
    made.on("click", js_handler=f"() => getElement({upload.id}).$refs.qRef.pickFiles()")
    with made:
        ui.label(text)
    return made


def shown(image: Image.Image | str, alt: str, look: str = "") -> ui.element:
    """An image that fills its place, with a text in its place."""
    source = image if isinstance(image, str) else inline(image)
    made = ui.image(source).props("fit=contain no-spinner no-transition").classes(look)
    made.props["alt"] = alt
    return made


def progress_bar() -> ui.linear_progress:
    """A bar that follows its value at once."""
    return ui.linear_progress(value=0, show_value=False).props('instant-feedback aria-label="Progress"')


def offer(link: ui.link, file: Path) -> None:
    """Let a link save a file."""
    link.props["href"], link.props["download"] = url_of(file), file.name
