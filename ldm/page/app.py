"""The page: its parts on one screen, and the server that answers to this machine alone."""

from __future__ import annotations

import logging
from pathlib import Path

from nicegui import app, ui

from ldm.files.images import image_info
from ldm.files.records import PNG_KEY
from ldm.page import compare, edit, uploads
from ldm.page.engine import Engine
from ldm.page.export import ExportTab
from ldm.page.generate import GenerateTab
from ldm.page.guard import OWN, OwnHostOnly
from ldm.page.learn import LearnTab
from ldm.page.session import Session

CSS = Path(__file__).with_name("page.css")
FAVICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 20 20"><rect width="20" height="20" rx="5" fill="#5b4bd6"/>'
    '<path d="M10 4v12M4.8 7l10.4 6M4.8 13l10.4-6" stroke="#fff" stroke-width="2.4" stroke-linecap="round"/></svg>'
)
TABS = ("Generate", "Learn", "Compare", "Edit", "Export")
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
        if "session" not in app.storage.tab:
            app.storage.tab["session"] = Session.start(engine)
        _Page(app.storage.tab["session"])


class _Page:
    def __init__(self, session: Session) -> None:
        self.session = session
        ui.dark_mode().bind_value_from(session, "dark")
        ui.colors(primary="#5b4bd6")
        self._build_header()
        with ui.tab_panels(self._tabs, value=session.tab).classes("panels") as panels:
            with ui.tab_panel("Generate"):
                self._generate = GenerateTab(session)
            with ui.tab_panel("Learn"):
                self._learn = LearnTab(session, self._generate)
            with ui.tab_panel("Compare"):
                self._compare = compare.CompareTab(session, self._generate)
            with ui.tab_panel("Edit"):
                self._edit = edit.EditTab(session)
            with ui.tab_panel("Export"):
                export = ExportTab(session)
        panels.on_value_change(export.refresh)  # the concepts may be others when it is opened
        drop = uploads.upload(session.engine.uploads, self._take, "drop")
        ui.run_javascript(_DROP % drop.id)

    def _build_header(self) -> None:
        engine = self.session.engine
        with ui.element("header"):
            with ui.element("div").classes("brand"):
                ui.element("span").classes("spectrum").props("aria-hidden=true")
                ui.label("ProSpect").props("role=heading aria-level=1")
            with ui.tabs().bind_value(self.session, "tab").props("no-caps dense inline-label") as self._tabs:
                for name in TABS:
                    ui.tab(name)
            with ui.element("div").classes("where"):
                ui.label(f"{engine.title} · {engine.model.device}").classes("soft")
                dark = ui.button(icon="contrast", on_click=lambda: setattr(self.session, "dark", not self.session.dark))
                dark.props('flat round dense aria-label="Light or dark"')

    def _take(self, paths: list[Path]) -> None:
        """An image of ours restores its form, another one is to be edited or learned from, other files are concepts."""
        if not all(map(uploads.looks_like_image, paths)):
            if len(paths) > 1 or not self._edit.open_concept(paths[0]):
                self._generate.take_concepts(paths)
            return
        for path in paths:
            uploads.check_image(path)
        info = image_info(paths[0]) if len(paths) == 1 else {}
        for key, tab in ((edit.PNG_KEY, self._edit), (compare.GRID_KEY, self._compare), (PNG_KEY, self._generate)):
            if key in info:
                tab.open(paths[0])
                return
        takes = {"Learn": self._learn.take, "Edit": self._edit.take}
        takes.get(self.session.tab, self._generate.take_content)(paths)
