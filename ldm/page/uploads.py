"""Files that a user hands in: kept in a folder of the page's own, told apart by their content, read by the library.

Errors are the library's sentences, with the file called as the user calls it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from uuid import uuid4

from nicegui import ui
from nicegui.elements.upload_files import FileUpload
from nicegui.events import MultiUploadEventArguments

from ldm.embeddings import load_concept
from ldm.files.images import open_image
from ldm.files.kinds import is_image
from ldm.page import parts

MOST_BYTES = 256 << 20  # the reference's pickled concepts have 126 MB
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
Take = Callable[[list[Path]], None]  # raises the `ValueError` of a file that it cannot use


def upload(folder: Path, take: Take, mark: str, multiple: bool = True) -> ui.upload:
    """Add a hidden upload: its files are kept below `folder`, and `take` has them, or what is wrong is shown."""

    async def taken(event: MultiUploadEventArguments) -> None:
        event.sender.run_method("reset")
        paths = await keep(event.files, folder)
        with parts.problems():
            take(paths)

    made = ui.upload(
        multiple=multiple,
        auto_upload=True,
        max_file_size=MOST_BYTES,
        on_multi_upload=taken,
        on_rejected=lambda: parts.say(f"A file has more than {MOST_BYTES >> 20} MB; no image or concept has."),
    )
    return made.classes("offscreen").props("aria-hidden=true tabindex=-1").mark(mark)


def button(text: str, folder: Path, take: Take, mark: str, multiple: bool = True, label: str = "") -> ui.element:
    """A button that opens the browser's choice of files, for an upload of its own."""
    hidden = upload(folder, take, mark, multiple)
    made = parts.button(text, None, label=label or text)
    return made.on("click", js_handler=f"() => getElement({hidden.id}).$refs.qRef.pickFiles()")


def safe_name(name: str) -> str:
    """Return the last part of a name from a browser, without what other systems read as something else."""
    last = PurePosixPath(name.replace("\\", "/")).name
    return re.sub(r"[^\w.\- ]+", "_", last).strip(". ")[-100:] or "file"


async def keep(files: Sequence[FileUpload], folder: Path) -> list[Path]:
    """Save files together in a new folder below `folder`."""
    names = [safe_name(file.name) for file in files]
    place = folder / uuid4().hex
    paths = [place / (name if name not in names[:i] else f"{i}-{name}") for i, name in enumerate(names)]
    for file, path in zip(files, paths, strict=True):
        await file.save(path)
    return paths


@contextmanager
def as_the_user_calls_it(path: Path) -> Iterator[None]:
    """Leave the folder out of the sentence of an error."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(str(error).replace(f"{path.parent}/", "").replace(f"{path.parent}\\", "")) from error


def looks_like_image(path: Path) -> bool:
    """Whether a file is an image by its content, or wants to be one by its name."""
    with path.open("rb") as stream:
        return is_image(stream.read(512)) or path.suffix.lower() in IMAGE_ENDINGS


def check_image(path: Path) -> None:
    """Raise the library's sentence for a file that is no usable image."""
    with as_the_user_calls_it(path):
        open_image(path)


def concept_files(paths: Sequence[Path]) -> list[str]:
    """Return what `load_concept` reads: the files, or their folder where they are the stages of one concept.

    Raises:
        ValueError: one of them is no concept.
    """
    if len(paths) > 1 and all(re.search(r"[-_]\d+\.\w+$", path.name) for path in paths):
        paths = [paths[0].parent]
    for path in paths:
        with as_the_user_calls_it(path):
            load_concept(path)
    return [str(path) for path in paths]
