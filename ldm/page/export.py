"""The tab Export: the concepts and the prompt of the form as other programs' files, in a zip."""

from __future__ import annotations

import io
import re
import tempfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

from nicegui import ui

from ldm.conditioning.presets import preset_words
from ldm.embeddings import load_concept
from ldm.export.card import Card
from ldm.export.files import PROGRAMS, Export, Use, most_stages
from ldm.export.texts import check_name
from ldm.page import parts
from ldm.page.engine import concept_name
from ldm.page.form import Lane
from ldm.page.session import Session
from ldm.request import PLACEHOLDER

TITLES = {"diffusers": "diffusers", "a1111": "AUTOMATIC1111's web UI", "comfyui": "ComfyUI"}


@dataclass
class ExportForm:
    """What is to be written beside the stages' files."""

    programs: dict[str, bool] = field(default_factory=lambda: dict.fromkeys(PROGRAMS, True))
    names: dict[str, str] = field(default_factory=dict)  # file of a concept -> name in the other program
    card: bool = True
    license: str = "creativeml-openrail-m"


def package(session: Session) -> tuple[str, bytes, list[str], list[str]]:
    """Return the name and the bytes of the zip of what `prospect export` writes, the names in it, and warnings.

    Raises:
        ValueError: there is no concept, a name that cannot be used, or what else `Export` refuses.
    """
    chosen = session.of(ExportForm)
    concepts = {
        lane.placeholder: (check_name(chosen.names.get(lane.file) or usual_name(lane)), load_concept(lane.file))
        for lane in session.form.lanes
    }
    export = Export(concepts, _use(session, most_stages(c for _, c in concepts.values()) if concepts else 0))
    programs = [program for program, is_wanted in chosen.programs.items() if is_wanted]
    with tempfile.TemporaryDirectory() as folder:
        warnings = export.write(programs, Path(folder), Card(chosen.license) if chosen.card else None)
        paths = sorted(Path(folder).iterdir())
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in paths:
                archive.write(path, f"{export.name}/{path.name}")
    return export.name, stream.getvalue(), [path.name for path in paths], warnings


def usual_name(lane: Lane) -> str:
    """A name that other programs take, made from the concept's."""
    return re.sub(r"[^A-Za-z0-9]+", "-", concept_name(Path(lane.file))).strip("-") or "concept"


def _use(session: Session, stages: int) -> Use:
    """The prompt and the settings of the form, for other programs."""
    request = session.form.request().for_model(session.engine.facts)
    prompt, words = request.prompt, request.prospect_words
    if request.preset is not None:
        placeholders = tuple(request.concepts or ())
        words = preset_words(request.preset, prompt, placeholders, stages, session.engine.windows)
        prompt = PLACEHOLDER
    same = {
        name: getattr(request, name) for name in ("sampler", "seed", "width", "height", "negative_prompt", "rescale")
    }
    return Use(prompt, words, steps=request.ddim_steps, scale=request.guidance_scale, **same)


class ExportTab:
    """Builds itself into the open slot."""

    def __init__(self, session: Session) -> None:
        self.session, self.form = session, session.of(ExportForm)
        left, right = parts.columns()
        with left, parts.section("Export", "the concepts and the prompt of Generate"):
            self._concepts = ui.element("div").classes("fields")
            with ui.element("div").classes("checks"):
                for program in PROGRAMS:
                    ui.checkbox(TITLES[program]).bind_value(self.form.programs, program).mark(f"to-{program}")
                ui.checkbox("Model card").bind_value(self.form, "card")
            licence = ui.input("License of the card").bind_value(self.form, "license")
            licence.props(parts.LOOK).bind_visibility_from(self.form, "card")
            parts.button("Download zip", self.export, "primary alone").mark("export")
            self._problem = parts.problem_label()
        with right, parts.section("Contents"):
            self._contents = ui.element("div").classes("messages")
            with self._contents:
                ui.label("What is in the zip is listed here.").classes("soft")
        self.refresh()

    def refresh(self) -> None:
        """Show the concepts of the form."""
        self._concepts.clear()
        lanes = self.session.form.lanes
        with self._concepts:
            for lane in lanes:
                self.form.names.setdefault(lane.file, usual_name(lane))
                name = ui.input(f"Name of {lane.placeholder} in the files").props(parts.LOOK).mark("export-name")
                name.bind_value(self.form.names, lane.file).classes("wide")
            if not lanes:
                ui.label("Generate has no concept; add one there first.").classes("soft wide")

    def export(self) -> None:
        """Hand everything over as a zip."""
        self._contents.clear()
        with parts.problems(self._problem), self._contents:
            title, content, names, warnings = package(self.session)
            for warning in warnings:
                ui.label(warning).classes("message warning")
            for name in names:
                ui.label(name).classes("file-name")
            ui.download.content(content, f"{title}.zip")
