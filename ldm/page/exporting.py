"""The concepts and the prompt of the form as other programs' files, in a zip."""

from __future__ import annotations

import io
import re
import tempfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

from ldm.conditioning.presets import preset_words
from ldm.embeddings import load_concept
from ldm.export.card import Card
from ldm.export.files import PROGRAMS, Export, Use, most_stages
from ldm.export.texts import check_name
from ldm.page.engine import Engine, concept_name
from ldm.page.form import Form, Lane
from ldm.request import PLACEHOLDER


@dataclass
class ExportForm:
    """What is to be written beside the stages' files."""

    programs: dict[str, bool] = field(default_factory=lambda: dict.fromkeys(PROGRAMS, True))
    names: dict[str, str] = field(default_factory=dict)  # file of a concept -> name in the other program
    card: bool = True
    license: str = "creativeml-openrail-m"


@dataclass(frozen=True)
class Package:
    """A zip file, what is in it, and what its reader should know."""

    title: str
    content: bytes
    names: list[str]
    warnings: list[str]


def package(form: Form, chosen: ExportForm, engine: Engine) -> Package:
    """Return the zip of what `scripts/export_embedding.py` writes.

    Raises:
        ValueError: there is no concept, a name that cannot be used, or what else `Export` refuses.
    """
    concepts = {lane.placeholder: (_name(lane, chosen), load_concept(lane.file)) for lane in form.lanes}
    export = Export(concepts, _use(form, engine, most_stages(c for _, c in concepts.values()) if concepts else 0))
    programs = [program for program, is_wanted in chosen.programs.items() if is_wanted]
    card = Card(chosen.license) if chosen.card else None
    with tempfile.TemporaryDirectory() as folder:
        warnings = export.write(programs, Path(folder), card)
        paths = sorted(Path(folder).iterdir())
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in paths:
                archive.write(path, f"{export.name}/{path.name}")
    return Package(export.name, stream.getvalue(), [path.name for path in paths], warnings)


def _name(lane: Lane, chosen: ExportForm) -> str:
    return check_name(chosen.names.get(lane.file) or usual_name(lane))


def usual_name(lane: Lane) -> str:
    """A name that other programs take, made from the concept's."""
    return re.sub(r"[^A-Za-z0-9]+", "-", concept_name(Path(lane.file))).strip("-") or "concept"


def _use(form: Form, engine: Engine, stages: int) -> Use:
    """The prompt and the settings of the form, for other programs."""
    request = form.request().for_model(engine.facts)
    prompt, words = request.prompt, request.prospect_words
    if request.preset is not None:
        words = preset_words(request.preset, prompt, tuple(request.concepts or ()), stages, engine.windows)
        prompt = PLACEHOLDER
    height, width = request.size
    return Use(
        prompt,
        words,
        sampler=request.sampler,
        steps=request.ddim_steps,
        scale=request.guidance_scale,
        seed=request.seed,
        width=width,
        height=height,
        negative_prompt=request.negative_prompt,
        rescale=request.rescale,
    )
