"""A contact sheet of learned concepts: the image learned from, the concept alone, and each preset."""

from __future__ import annotations

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
from ldm.generate import load_model_from_config, main
from ldm.many.jobs import Job, Setting, finished
from ldm.request import PRESETS

STEPS = 25


def write_sheet(jobs: Sequence[Job], setting: Setting, out: Path) -> Path | None:
    """Write `concepts.png`: a row for each concept that is there. Returns None where there is none.

    A preset's prompt names the initial word, with the learned token before it in the preset's stages.
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
