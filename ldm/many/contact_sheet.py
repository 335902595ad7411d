"""Results of all concepts together: a table, and a contact sheet of images."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from PIL import Image
from tqdm import tqdm

from ldm.config import load_config
from ldm.data.personalized import find_images
from ldm.files.images import fit, label_grid, open_image
from ldm.files.records import save_png
from ldm.files.writing import replace_text
from ldm.generate import load_model_from_config, main
from ldm.many.jobs import Job, Learned, Setting, finished
from ldm.request import PRESETS

COLUMNS = ("name", "image", "method", "steps", "seconds", "result")  # of `concepts.csv`
STEPS = 25


def write_table(jobs: Sequence[Job], results: Sequence[Learned], out: Path) -> str:
    """Write `concepts.csv`, and return it as a text for the terminal."""
    learned = {found.job.name: found for found in results}
    rows = [COLUMNS]
    for job in jobs:
        found = learned.get(job.name)
        seconds = f"{found.seconds:.0f}" if found and found.seconds else ""
        told = (found.error or "learned") if found else "learned before"
        rows.append((job.name, str(job.image), job.method or "", str(job.steps or ""), seconds, told))
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    replace_text(out / "concepts.csv", text.getvalue())
    widths = [max(len(row[i]) for row in rows) for i in (0, 4)]
    return "\n".join(f"{row[0]:{widths[0]}}  {row[4]:>{widths[1]}}  {row[5]}" for row in rows)


def write_sheet(jobs: Sequence[Job], setting: Setting, out: Path) -> Path | None:
    """Write `concepts.png`: for each concept the image learned from, the concept alone, and each preset.

    Returns None where there is no concept. A preset's prompt names the initial word, with the learned token before it
    in the preset's stages.
    """
    if not jobs:
        return None
    config = load_config(*setting.base, overrides=setting.overrides, flag="--base")
    model = load_model_from_config(config, setting.ckpt, lightning=False)
    words = OmegaConf.select(config, "model.params.personalization_config.params.initializer_words") or [""]
    rows = []
    for job in tqdm(jobs, "contact sheet"):
        concepts = {"*": finished(out, job)}
        given: dict[str, Any] = {"model": model, "concepts": concepts, "ddim_steps": STEPS, "progress": False}
        alone = main("*", **given)
        row = [fit(open_image(find_images(job.image)[0]), *alone.size, "pad"), alone]
        for preset in PRESETS:
            try:
                row.append(main(f"a * {job.init_word or words[0]}", preset=preset, **given))
            except ValueError:  # a method that has no stages
                row.append(Image.new("RGB", alone.size, "white"))
        rows.append(row)
    path = out / "concepts.png"
    save_png(label_grid(rows, [job.name for job in jobs], ("reference", "*", *PRESETS)), path, {})
    return path
