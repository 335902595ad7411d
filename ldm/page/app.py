"""The page: its parts on one screen, and the server that answers to this machine alone."""

from __future__ import annotations

import logging
from pathlib import Path

from nicegui import app, ui
from nicegui.events import ValueChangeEventArguments

from ldm.page import uploads
from ldm.page.compare_tab import CompareTab
from ldm.page.edit_tab import EditTab
from ldm.page.editing import opened
from ldm.page.engine import Engine
from ldm.page.export_tab import ExportTab
from ldm.page.generate_tab import GenerateTab
from ldm.page.guard import OWN, OwnHostOnly
from ldm.page.learn_tab import LearnTab
from ldm.page.session import Session
from ldm.page.view import TABS, View

CSS = Path(__file__).with_name("page.css")
FAVICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 20 20"><rect width="20" height="20" rx="5" fill="#5b4bd6"/>'
    '<path d="M10 4v12M4.8 7l10.4 6M4.8 13l10.4-6" stroke="#fff" stroke-width="2.4" stroke-linecap="round"/></svg>'
)
# A file that is dropped anywhere goes to the hidden upload.
_DROP = """
for (const kind of ['dragover', 'drop']) window.addEventListener(kind, (e) => {
  if (!e.dataTransfer?.types.includes('Files')) return;
  e.preventDefault();
  if (kind === 'drop') getElement(%d).$refs.qRef.addFiles(e.dataTransfer.files);
}, true);
"""


def serve(engine: Engine, port: int = 8080, show: bool = True) -> None:
    """Serve the page on this machine until it is stopped."""
    build(engine)
    logging.getLogger("nicegui").setLevel(logging.ERROR)  # it warns of each tenth of a second that it waits
    app.add_middleware(OwnHostOnly)
    app.on_shutdown(engine.close)
    ui.run(
        host=OWN[0], port=port, title="ProSpect", favicon=FAVICON, dark=None, show=show, reload=False,
        show_welcome_message=False, reconnect_timeout=30, storage_secret=None, language="en-US",
    )  # fmt: skip


def build(engine: Engine) -> None:
    """Make the page known to the server."""

    @ui.page("/")
    async def page() -> None:
        ui.add_css(CSS)
        await ui.context.client.connected()
        if not ui.context.client.has_socket_connection:
            return  # it was fetched, and not opened
        sessions = app.storage.tab
        if "session" not in sessions:
            sessions["session"] = Session.start(engine)
        _Page(View(sessions["session"]))


class _Page:
    def __init__(self, view: View) -> None:
        self.view, self.session = view, view.session
        self._dark = ui.dark_mode(self.session.dark)
        ui.colors(primary="#5b4bd6")
        self._build_header()
        with ui.tab_panels(view.tabs, value=self.session.tab).props("keep-alive").classes("panels"):
            with ui.tab_panel("Generate"):
                self._generate = GenerateTab(view)
            with ui.tab_panel("Learn"):
                self._learn = LearnTab(view)
            with ui.tab_panel("Compare"):
                CompareTab(view)
            with ui.tab_panel("Edit"):
                self._edit = EditTab(view)
            with ui.tab_panel("Export"):
                ExportTab(view)
        self._build_drop()

    def _build_header(self) -> None:
        engine = self.session.engine
        with ui.element("header"):
            with ui.element("div").classes("brand"):
                ui.element("span").classes("spectrum").props("aria-hidden=true")
                ui.label("ProSpect").props("role=heading aria-level=1")
            self.view.tabs = ui.tabs(on_change=self._tab_chosen).props("no-caps dense inline-label")
            with self.view.tabs:
                for name in TABS:
                    ui.tab(name)
            self.view.tabs.value = self.session.tab
            with ui.element("div").classes("where"):
                ui.label(f"{engine.title} · {engine.model.device}").classes("soft")
                ui.button(icon="contrast", on_click=self._switch_dark).props(
                    'flat round dense aria-label="Light or dark"'
                )

    def _tab_chosen(self, event: ValueChangeEventArguments) -> None:
        self.session.tab = event.value

    def _switch_dark(self) -> None:
        self.session.dark = self._dark.value = not self._dark.value

    def _build_drop(self) -> None:
        upload = uploads.upload(self.session.engine.uploads, self._take, multiple=True).mark("drop")
        ui.run_javascript(_DROP % upload.id)

    def _take_concepts(self, paths: list[Path]) -> None:
        inversion = opened(paths[0], self.session.engine) if len(paths) == 1 else None
        if inversion is None:
            self._generate.take_concepts(paths)
        else:
            self.session.edit.inversion, self.session.edit.prompt = inversion, inversion.prompt
        self.view.show("Generate" if inversion is None else "Edit")

    def _take(self, paths: list[Path]) -> None:
        """An image of ours restores the form, another one is to be edited or learned from, other files are concepts."""
        if not all(map(uploads.looks_like_image, paths)):
            self._take_concepts(paths)
            return
        for path in paths:
            uploads.check_image(path)
        if len(paths) == 1 and self.view.is_ours(paths[0]):
            self._generate.open(paths[0])
        elif self.session.tab == "Learn":
            self._learn.take(paths)
        elif self.session.tab == "Edit":
            self._edit.take(paths)
        else:
            self._generate.take_content(paths)
            self.view.show("Generate")
