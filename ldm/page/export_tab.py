"""The tab Export: what is written for which program, and the download."""

from __future__ import annotations

from nicegui import ui

from ldm.export.files import PROGRAMS
from ldm.page import parts
from ldm.page.exporting import package, usual_name
from ldm.page.view import View

TITLES = {"diffusers": "diffusers", "a1111": "AUTOMATIC1111's web UI", "comfyui": "ComfyUI"}


class ExportTab:
    """Builds itself into the open slot."""

    def __init__(self, view: View) -> None:
        self.view, self.engine, self.form = view, view.session.engine, view.session.export
        with ui.element("div").classes("split even"):
            with ui.element("div").classes("stack"), parts.section("Export", "the concepts and the prompt of Generate"):
                self._concepts = ui.element("div").classes("fields")
                with ui.element("div").classes("checks"):
                    for program in PROGRAMS:
                        ui.checkbox(TITLES[program]).bind_value(self.form.programs, program).mark(f"to-{program}")
                    ui.checkbox("Model card").bind_value(self.form, "card")
                licence = ui.input("License of the card").bind_value(self.form, "license")
                licence.props(parts.LOOK).bind_visibility_from(self.form, "card")
                parts.button("Download zip", self.export, "primary alone").mark("export")
                self._problem = ui.label().classes("problem").props("role=alert")
            with ui.element("div").classes("stack"), parts.section("Contents"):
                self._contents = ui.element("div").classes("messages")
                with self._contents:
                    ui.label("What is in the zip is listed here.").classes("soft")
        if view.tabs is not None:
            view.tabs.on_value_change(lambda: self._refresh())  # the concepts may be others when it is opened
        self._refresh()

    def _refresh(self) -> None:
        self._concepts.clear()
        lanes = self.view.session.form.lanes
        with self._concepts:
            for lane in lanes:
                self.form.names.setdefault(lane.file, usual_name(lane))
                name = ui.input(f"Name of {lane.placeholder} in the files").props(parts.LOOK).mark("export-name")
                name.bind_value(self.form.names, lane.file).classes("wide")
            if not lanes:
                ui.label("Generate has no concept; add one there first.").classes("soft wide")

    def export(self) -> None:
        """Write everything into a folder, and hand it over as a zip."""
        self._contents.clear()
        with parts.problems(self._problem), self._contents:
            made = package(self.view.session.form, self.form, self.engine)
            for warning in made.warnings:
                ui.label(warning).classes("message warning")
            for name in made.names:
                ui.label(name).classes("file-name")
            ui.download.content(made.content, f"{made.title}.zip")
