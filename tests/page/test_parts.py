"""Preview, uploads, the guard of the server, grids, charts and exports: what needs no page."""

import asyncio
import contextlib
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from nicegui.elements.upload_files import SmallFileUpload
from PIL import Image
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient, WebSocketDenialResponse

from ldm.embeddings import load_concept, save_stages
from ldm.files.images import fit, open_image, to_tensor
from ldm.page import chart, compare, uploads
from ldm.page.compare import Axis, read_sheet, read_stages
from ldm.page.edit import EditForm
from ldm.page.engine import Engine
from ldm.page.export import ExportForm, package
from ldm.page.form import Form
from ldm.page.guard import OwnHostOnly
from ldm.page.preview import Preview, fit_linear, linear_rgb
from ldm.page.session import Session

STAR = "models/demo/concepts/dotted-star.safetensors"


# --- preview -------------------------------------------------------------------------------------------------------


def test_the_linear_map_gives_nearly_the_colours_that_were_encoded(engine: Engine) -> None:
    files = sorted(Path("models/demo/references").glob("*/*.png"))
    images = torch.stack([to_tensor(fit(open_image(file), 128, 128)) for file in files])
    weights = fit_linear(engine.model, images)
    latents = engine.model.encode_first_stage(images).mean * engine.model.scale_factor
    found = torch.stack([linear_rgb(x, weights) for x in latents])
    wanted = torch.nn.functional.avg_pool2d(images, engine.model.first_stage_model.downsampling)
    assert found.shape == wanted.shape == (4, 3, 16, 16)
    assert (found - wanted).pow(2).mean() < 0.15 * wanted.var()


def test_a_large_first_stage_is_never_decoded(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    preview = Preview(engine.model)
    assert preview.decodes and preview(torch.zeros(2, 4, 16, 16)).size == (128, 128)
    preview.decodes = False
    monkeypatch.setattr(engine.model, "decode_first_stage", None)
    assert preview(torch.zeros(2, 4, 16, 16)).size == (16, 16)


# --- uploads -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("cat.png", "cat.png"),
        ("../../etc/passwd", "passwd"),
        ("C:\\Windows\\system.ini", "system.ini"),
        ('<img src=x onerror="a">.png', "_img src_x onerror_a_.png"),
        ("..", "file"),
        ("a" * 300 + ".png", "a" * 96 + ".png"),
    ],
)
def test_names_of_files_stay_in_the_folder(name: str, kept: str, tmp_path: Path) -> None:
    [path] = asyncio.run(uploads.keep([SmallFileUpload(name, "", b"x")], tmp_path / "up"))
    assert path.name == kept and path.parent.parent == tmp_path / "up" and path.read_bytes() == b"x"


def test_concepts_come_as_one_file_or_as_the_files_of_the_stages(engine: Engine, tmp_path: Path) -> None:
    paths = save_stages(load_concept(STAR), tmp_path / "star", "star")
    assert uploads.concept_files(paths) == [str(tmp_path / "star")]
    assert uploads.concept_files([Path(STAR)]) == [STAR]
    (tmp_path / "bad.pt").write_bytes(b"<html>")
    for wrong in (uploads.check_image, lambda path: uploads.concept_files([path])):
        with pytest.raises(ValueError, match="^'bad.pt' is a web page"):  # without the folder that the user never saw
            wrong(tmp_path / "bad.pt")


# --- the server ----------------------------------------------------------------------------------------------------


async def _application(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.accept"})
    else:
        await PlainTextResponse("ok")(scope, receive, send)


@pytest.mark.parametrize(
    ("headers", "answers"),
    [
        ({"host": "127.0.0.1:8080"}, True),
        ({"host": "localhost:8080", "origin": "http://localhost:8080"}, True),
        ({"host": "[::1]:8080"}, True),
        ({"host": "evil.example"}, False),
        ({"host": "127.0.0.1.evil.example:8080"}, False),
        ({"host": "evil.example@[", "origin": "http://["}, False),
        ({"host": "127.0.0.1:8080", "origin": "https://evil.example"}, False),
        ({"host": "127.0.0.1:8080", "origin": "http://127.0.0.1:9999"}, False),
        ({"host": "127.0.0.1:8080", "origin": "null"}, False),
        ({}, False),
    ],
)
def test_only_this_machines_own_names_and_pages_are_answered(headers: dict[str, str], answers: bool) -> None:
    client = TestClient(OwnHostOnly(_application))
    found = client.get("/", headers=headers)
    assert found.status_code == (200 if answers else 403)
    assert not answers or "connect-src 'self'" in found.headers["content-security-policy"]
    denied = contextlib.nullcontext() if answers else pytest.raises(WebSocketDenialResponse)
    with denied, client.websocket_connect("/", headers=headers):
        pass


# --- grids ---------------------------------------------------------------------------------------------------------


def test_stages_are_read_as_they_are_written() -> None:
    written = {"7-3": {3, 4, 5, 6, 7}, "9": {9}, "2–0, 9": {0, 1, 2, 9}, "none": set(), "all stages": set(range(10))}
    assert {text: read_stages(text, 10) for text in written} == written


@pytest.mark.parametrize(
    ("rows", "columns", "sentence"),
    [
        (("Seed", "1"), ("Seed", "2"), "Rows and columns both vary Seed"),
        (("Seed", " \n"), ("Steps", "2"), "Seed needs at least one value"),
        (("Seed", f"1-{2**62}"), ("Steps", "2"), "A grid has at most 400 images"),
        (("Seed", "1-21"), ("Guidance scale", "1\n" * 20), "A grid has at most 400 images"),
        (("Seed", "one"), ("Steps", "2"), "seed must be a whole number, not 'one'"),
        (("Steps", "0"), ("Seed", "1"), "ddim_steps must be in 1..1000, not 0"),
        (("Preset", "shape"), ("Seed", "1"), "Unknown preset 'shape'"),
        (
            ("Stages", "7-12"),
            ("Seed", "1"),
            "Stages are written as 7-3, 9, all stages or none, and at most 9, not '7-12'",
        ),
        (("Stages", "7..3"), ("Seed", "1"), "Stages are written as 7-3"),
        (("Concept", "nobody"), ("Seed", "1"), "There is no concept 'nobody'; there are checkered-circle, "),
        (("Sampler", "euler"), ("Seed", "1"), "Unknown sampler 'euler'"),
    ],
)
def test_grids_that_cannot_be_made_say_why(
    engine: Engine, rows: tuple[str, str], columns: tuple[str, str], sentence: str
) -> None:
    form = Form(prompt="a *")
    form.add_concept(STAR)
    with pytest.raises(ValueError, match=sentence):
        compare.cells(Session(engine, form), Axis(*rows), Axis(*columns))


def test_a_grid_is_kept_as_one_labelled_image_with_its_record(engine: Engine) -> None:
    form = Form(prompt="a *", settings={"ddim_steps": 1})
    form.add_concept(STAR)
    rows, columns = Axis("Preset", "all stages\nmaterial"), Axis("Seed", "3-4\n9")
    run = compare.Comparison(rows, columns, compare.cells(Session(engine, form), rows, columns))
    asyncio.run(run.work(engine))
    assert (run.step, run.is_running, run.error) == (6, False, "")
    [file] = run.files
    assert file.name == "preset-seed.png"
    assert [path.name for path in engine.outdir.iterdir()] == ["preset-seed.png"]  # not every cell beside it
    with Image.open(file) as sheet:
        text = sheet.info[compare.GRID_KEY]
        corner = sheet.convert("RGB").crop((sheet.width - 135, sheet.height - 135, sheet.width - 7, sheet.height - 7))
    cell = run.jobs[1, 2].image
    assert cell is not None and corner.tobytes() == cell.tobytes()
    axes, record = read_sheet(text)
    assert [axis.values for axis in axes] == [["all stages", "material"], ["3", "4", "9"]]
    found = Form.restored(record, engine.facts)
    assert found.request().seed == 3 and found.lanes == form.lanes
    assert [len(line) for line in json.loads(text)["cells"]] == [3, 3]


NO_CELLS = '{"rows": ["Seed", "1"], "columns": ["Steps", "1"], "cells": []}'
NO_KIND = '{"rows": ["Colour", "1"], "columns": ["Steps", "1"], "cells": [[{}]]}'


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": 3}', NO_CELLS, NO_KIND])
def test_a_damaged_record_of_a_grid_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="The grid's record cannot be read"):
        read_sheet(text)


def test_a_grid_stops_after_the_image_that_is_being_made(engine: Engine) -> None:
    form = Form(prompt="a star", settings={"ddim_steps": 200})
    rows, columns = Axis("Seed", "1-9"), Axis("Steps", "200")
    run = compare.Comparison(rows, columns, compare.cells(Session(engine, form), rows, columns))

    async def stop() -> None:
        await asyncio.sleep(0.3)
        run.stop()

    async def both() -> None:
        await asyncio.gather(run.work(engine), stop())

    asyncio.run(both())
    assert not run.files and len(run.jobs) == 1 and run.jobs[0, 0].state == "stopped"


# --- charts, exports -----------------------------------------------------------------------------------------------


def test_charts_say_what_they_show() -> None:
    assert chart.curve([], 20) == "" and chart.bars({}, 10) == ""
    curve = chart.curve([(5, 0.3), (10, 0.2)], 20)
    assert "0.200 at step 10 of 20" in curve and curve.count("<polyline") == 2
    bars = chart.bars({0: 0.5, 9: 1.0}, 10)
    assert bars.count("<rect") == 2
    assert bars.index(">9<") < bars.index(">0</text>", bars.index(">9<"))  # the start on the left


def test_the_zip_is_what_the_command_line_writes(engine: Engine) -> None:
    form = Form(prompt="a large * heart")
    lane = form.add_concept(STAR)
    form.set_preset(lane, "material", engine.windows)

    session = Session(engine, form)
    session.of(ExportForm).names[STAR] = "star"
    _, content, files, _ = package(session)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = archive.namelist()
        prompt = archive.read("star/star_a1111.txt").decode()
    assert names == [f"star/{name}" for name in files] and len(names) == 14
    assert "star-3" in prompt and "star-2" not in prompt.partition("\n\n")[2]
    session.of(ExportForm).names[STAR] = "a b"
    with pytest.raises(ValueError, match="The name 'a b' cannot be used"):
        package(session)
    form.lanes.clear()
    with pytest.raises(ValueError, match="There is no concept to export"):
        package(session)


@pytest.mark.parametrize(
    "text", ["{", "[]", "3", '{"target": "a", "blend": [[1], [2]]}', '{"target": "a", "weights": 3}']
)
def test_a_damaged_record_of_an_edit_is_refused(text: str) -> None:
    form = EditForm(target="mine")
    with pytest.raises(ValueError, match="The edit's record cannot be read; use another copy of the image."):
        form.restore(text)
    assert form.target == "mine"
