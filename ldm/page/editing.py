"""Editing a real image: what is filled in, and the two jobs, inverting the image and editing it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from ldm.cli.edit import Edits, pair, span
from ldm.cli.images import new_file
from ldm.editing.inversion import Progress
from ldm.editing.invert import AUTOENCODER, METHODS, PROMPT, PSNR, check_belongs, invert_image, rebuilt, word_masks
from ldm.editing.request import KINDS, TAUS, Edit, InversionOptions, grid_of
from ldm.embeddings import Concept, load_concept, save_new_concept
from ldm.files.texts import slug
from ldm.page.engine import Engine, Job
from ldm.page.uploads import as_the_user_calls_it

T = TypeVar("T")


@dataclass
class EditForm:
    """What is filled in on the tab Edit: texts, as the command line takes them.

    Args:
        taus: several values, with spaces between them, make a grid.
        blend: OLD:NEW; several words with commas.
        weights: WORD=X; several with spaces between them.
    """

    image: Path | None = None
    prompt: str = ""
    method: str = next(iter(METHODS))
    steps: int = 30
    inner_steps: int = 30
    guidance_scale: float | None = None
    target: str = ""
    kind: str = KINDS[0]
    taus: dict[str, str] = field(default_factory=lambda: {name: f"{getattr(Edit, name):g}" for name in TAUS})
    blend: str = ""
    weights: str = ""
    inversion: InversionJob | None = None
    job: EditJob | None = None

    def restore(self, text: str) -> None:
        """Take over the record of an edited image.

        Raises:
            ValueError: a value cannot be used.
        """
        names = ("target", "kind", *TAUS, "blend", "weights")
        try:
            record = json.loads(text)
            edit = Edit(**{name: record[name] for name in names if name in record})
            taus = {name: tau if isinstance(tau := getattr(edit, name), tuple) else (tau,) for name in TAUS}
            blend = ":".join(map(",".join, edit.blend or ()))
            weights = " ".join(f"{word}={weight:g}" for word, weight in (edit.weights or {}).items())
        except (TypeError, AttributeError, RecursionError, ValueError) as error:
            raise ValueError("The edit's record cannot be read; use another copy of the image.") from error
        self.target, self.kind, self.blend, self.weights = edit.target, edit.kind, blend, weights
        self.taus |= {name: ":".join(f"{end:g}" for end in ends) for name, ends in taus.items()}

    def options(self, engine: Engine) -> InversionOptions:
        """Return how the image is inverted.

        Raises:
            ValueError: a number cannot be used.
        """
        scale = min(7.5, engine.facts.scale) if self.guidance_scale is None else self.guidance_scale
        return InversionOptions(int(self.steps or 0), scale, inner_steps=int(self.inner_steps or 0))

    def edits(self) -> list[Edit]:
        """Return an edit for each combination of taus.

        Raises:
            ValueError: a text cannot be read.
        """
        if not self.target.strip():
            raise ValueError("Give the prompt of the edited image.")
        given: dict[str, Any] = {name: [read(span, tau) for tau in text.split()] for name, text in self.taus.items()}
        given |= {"blend": read(pair, self.blend)} if self.blend.strip() else {}
        given["weights"] = dict(read(_weight, text) for text in self.weights.split())
        return grid_of(self.target, kind=self.kind, **{name: value for name, value in given.items() if value})


def read(kind: Callable[[str], T], text: str) -> T:
    """Read a text as the command line does."""
    try:
        return kind(text.strip())
    except argparse.ArgumentTypeError as error:
        raise ValueError(str(error)) from None


def _weight(text: str) -> tuple[str, float]:
    word, sign, value = text.rpartition("=")
    try:
        return word, float(value if sign and word else "")
    except ValueError:
        raise ValueError(f"A weight is written WORD=X, as in blue=2, not '{text}'.") from None


@dataclass(eq=False)
class InversionJob(Job):
    """Inverts an image; its concept is kept as a file."""

    image: Path = Path()
    prompt: str = ""
    method: str = ""
    options: InversionOptions = field(default_factory=InversionOptions)
    concept: Concept | None = None
    rebuilt: Image.Image | None = None

    @property
    def quality(self) -> str:
        """PSNR of the reconstruction, beside the autoencoder's own."""
        if self.concept is None:
            return ""
        said = self.concept.metadata
        known = [said.get(key, "?")[:10] for key in (PSNR, AUTOENCODER)]
        return f"reconstruction {known[0]} dB, the autoencoder's own {known[1]} dB"

    def do(self, engine: Engine) -> None:
        def after(state: Progress) -> None:
            self.check_stop()
            self.change(step=state.epoch * self.options.steps + state.step + 1)

        self.steps = self.options.steps * self.options.epochs
        found = invert_image(engine.model, self.image, self.prompt, self.method, self.options, progress=after)
        self.show(found, engine)
        file = new_file(engine.outdir / f"{self.image.stem}-{self.method}", ".safetensors")
        save_new_concept(found, file, force=True)
        self.files = [file]

    def show(self, concept: Concept, engine: Engine) -> None:
        self.rebuilt, self.concept = rebuilt(engine.model, concept), concept


def opened(file: Path, engine: Engine) -> InversionJob | None:
    """Return the inversion that an uploaded file is; None for a concept of another kind.

    Raises:
        ValueError: it is no concept, or one for another model.
    """
    with as_the_user_calls_it(file):
        concept = load_concept(file)
        if concept.method not in METHODS.values():
            return None
        check_belongs(concept, engine.model)
    job = InversionJob(state="done", prompt=concept.metadata[PROMPT], method=concept.method, files=[file])
    job.show(concept, engine)
    return job


@dataclass(eq=False)
class EditJob(Job):
    """Edits an inverted image; several taus are a grid, the last of the files.

    Args:
        masks: word -> where it is in the image; of the words to blend.
    """

    inversion: InversionJob = field(default_factory=InversionJob)
    edits: list[Edit] = field(default_factory=list)
    masks: dict[str, Image.Image] = field(default_factory=dict)

    def do(self, engine: Engine) -> None:
        concept = self.inversion.concept
        assert concept is not None
        steps = len(concept.metadata["inversion.timesteps"].split(","))
        self.steps = steps * len(self.edits)

        def after(step: int, latents: object) -> None:
            self.check_stop()
            self.change(step=self.step + 1)

        if self.edits[0].blend is not None:
            found = word_masks(engine.model, concept, self.edits[0].blend[0])
            self.masks = {word: foreground for word, (foreground, _) in found.items()}
        image = self.inversion.image if self.inversion.image.is_file() else None
        sheet = Edits(engine.model, engine.outdir, slug(self.edits[0].target), after)
        self.files = sheet.inverted(concept, self.edits, image)


def start_inversion(form: EditForm, engine: Engine) -> InversionJob:
    """Queue the inversion of the form's image.

    Raises:
        ValueError: something is missing or cannot be used.
    """
    if form.image is None:
        raise ValueError("Choose the image to edit first.")
    if not form.prompt.strip():
        raise ValueError("Say what the image shows: words of this prompt are what an edit exchanges.")
    options = form.options(engine)
    return engine.queue(InversionJob(image=form.image, prompt=form.prompt, method=form.method, options=options))


def start_edit(form: EditForm, engine: Engine) -> EditJob:
    """Queue the edits of the form's inversion.

    Raises:
        ValueError: there is none, or words are not in the prompts.
    """
    inversion = form.inversion
    if inversion is None or inversion.concept is None:
        raise ValueError("Invert the image first.")
    edits = form.edits()
    for edit in edits:
        edit.check(inversion.concept.metadata[PROMPT], engine.facts.num_stages)
    return engine.queue(EditJob(inversion=inversion, edits=edits))
