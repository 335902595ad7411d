"""Buttons, panels, images and sentences of the page, as all its tabs have them, and how they follow what runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Generic, Literal, TypeVar

from nicegui import app, ui
from nicegui.binding import BindableProperty
from PIL import Image

from ldm.page.engine import Job
from ldm.page.learning import Learning
from ldm.page.preview import inline

AnyRun = TypeVar("AnyRun", bound=Job | Learning)
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
def problems(label: ui.label | None = None) -> Iterator[None]:
    """Show the sentence of what cannot be done: in a label, which is empty otherwise, or for as long as it takes."""
    if label is not None:
        label.set_text("")
    try:
        yield
    except (ValueError, OSError) as error:
        say(error) if label is None else label.set_text(str(error))


@cache
def url_of(file: Path) -> str:
    """Where the browser finds a file that the page shows."""
    # without a cache, and though there is none: the user may have deleted it, and another one may get its name
    return app.add_static_file(local_file=file, strict=False, max_cache_age=0)


def section(title: str, hint: str = "") -> ui.element:
    """A titled panel to build into."""
    panel = ui.element("section").classes("panel").props(f'aria-label="{title}"')
    with panel, ui.element("div").classes("panel-head"):
        ui.label(title).classes("panel-title").props("role=heading aria-level=2")
        if hint:
            ui.label(hint).classes("soft")
    return panel


def columns() -> tuple[ui.element, ui.element]:
    """Two columns to build into."""
    with ui.element("div").classes("split even"):
        return ui.element("div").classes("stack"), ui.element("div").classes("stack")


def button(text: str, on_click: Callable[[], object] | None, look: str = "quiet", label: str = "") -> ui.element:
    """A native button; `label` is what a screen reader says where the text is a sign."""
    made = ui.element("button").classes(f"button {look}").props("type=button")
    if on_click is not None:
        made.on("click", on_click)
    if label:
        made.props["aria-label"] = made.props["title"] = label  # not as a text that is parsed: it may hold any name
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


def problem_label() -> ui.label:
    return ui.label().classes("problem").props("role=alert")


def message_box() -> ui.element:
    return ui.element("div").classes("messages").props("aria-live=polite")


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


def offer(link: ui.link, files: Sequence[Path]) -> None:
    """Let a link save the first of some files; without one it is not shown."""
    link.set_visibility(bool(files))
    if files:
        link.props["href"], link.props["download"] = url_of(files[0]), files[0].name


class Watch(Generic[AnyRun]):
    """Looks at what runs every so often, for elements that are bound to its status, its share and whether it runs.

    Args:
        run: returns it; None before the first.
        show: shows what else there is to see, after each change.
        nothing: the status before the first.
    """

    is_running, status, share = BindableProperty(), BindableProperty(), BindableProperty()

    def __init__(
        self, run: Callable[[], AnyRun | None], show: Callable[[AnyRun | None], None], every: float, nothing: str = ""
    ) -> None:
        self._run, self._show, self._nothing = run, show, nothing
        self.is_running, self.status, self.share = False, nothing, 0.0
        self._seen: object = self
        ui.timer(every, self.poll)

    def status_label(self) -> ui.label:
        return ui.label().classes("status").props("role=status").bind_text_from(self, "status")

    def bar(self) -> ui.linear_progress:
        """A bar that follows at once."""
        made = ui.linear_progress(show_value=False).props('instant-feedback aria-label="Progress"')
        return made.bind_value_from(self, "share").bind_visibility_from(self, "is_running")

    def stop_button(self, *starts: ui.element) -> ui.element:
        """A button that stops it, in place of those that start it; the last of them gets its focus at the end."""
        stop = button("Stop", self.stop).bind_visibility_from(self, "is_running")
        for start in starts:
            start.bind_visibility_from(self, "is_running", value=False)
        self._focus = {True: stop, False: starts[-1]}
        return stop

    def stop(self) -> None:
        if (run := self._run()) is not None:
            run.stop()
        self.poll()

    def poll(self) -> None:
        run = self._run()
        is_running = run is not None and run.is_running
        seen = (run, is_running, self._nothing if run is None else run.status)
        if seen == self._seen:
            return
        self._seen = seen
        self.status, self.share = seen[2], 0.0 if run is None else run.share
        if is_running is not self.is_running:
            self.is_running = is_running
            ui.run_javascript(TAKE_FOCUS % self._focus[is_running].id)
        self._show(run)
