"""NS-LPIPS: how much an edit changes what lies outside the edited object (StyleDiffusion)."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from evaluation.judges import Distance
from ldm.files.images import BLACK, open_image

SIDE = 256  # pixels: every image is squeezed to it
GREY = (0.2989, 0.587, 0.114)  # torchvision's weights, whose sum is 0.9999
MODES = ("paper", "standard")
Images = tuple[Image.Image, Image.Image, Image.Image]  # source, edit, mask of the background


@dataclass(frozen=True)
class Scores:
    """Scores of all cases, in their mode; lower is better. `missing` are cases without a file, which do not count."""

    mode: str
    scores: Mapping[str, float]
    missing: tuple[str, ...] = ()

    @property
    def mean(self) -> float:
        return float(np.mean(list(self.scores.values())))

    def __str__(self) -> str:
        lacking = f"; {len(self.missing)} without files: {', '.join(self.missing)}" if self.missing else ""
        return f"NS-LPIPS ({self.mode}, AlexNet) {self.mean:.4f}, {len(self.scores)} cases{lacking}"


def as_tensor(image: Image.Image) -> Tensor:
    """Return an image as (3, 256, 256) in [0, 1], squeezed bilinearly."""
    small = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1).float() / 255


def mask_tensor(mask: Image.Image) -> Tensor:
    """Return a background's mask (3, 256, 256): soft and grey; white is 0.9999, as the reference's is."""
    grey = (as_tensor(mask) * torch.tensor(GREY)[:, None, None]).sum(dim=0)
    return grey.expand(3, -1, -1)


def masked_pair(
    source: Image.Image, edit: Image.Image, mask: Image.Image, mode: str = "paper"
) -> tuple[Tensor, Tensor]:
    """Return what is compared, (1, 3, 256, 256) each.

    Args:
        mask: of the background, white where nothing should change.
        mode: `paper`: images in [0, 1] times the soft mask, as published values are made. `standard`: images in
            [-1, 1], as LPIPS expects; where the mask is below one half both are 0.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, not '{mode}'.")
    one, other, soft = as_tensor(source), as_tensor(edit), mask_tensor(mask)
    if mode == "paper":
        return (one * soft)[None], (other * soft)[None]
    hard = (soft >= 0.5).float()
    return ((2 * one - 1) * hard)[None], ((2 * other - 1) * hard)[None]


def ns_lpips(cases: Mapping[str, Images], distance: Distance, mode: str = "paper") -> Scores:
    """Return the scores of named cases by `lpips_distance`, or another distance of images (1, 3, 256, 256)."""
    return Scores(mode, {name: float(distance(*masked_pair(*images, mode=mode))) for name, images in cases.items()})


def score_folders(sources: Path, edits: Path, masks: Path, distance: Distance, mode: str = "paper") -> Scores:
    """Return the scores of images of the same names, up to the suffix, in three folders.

    Raises:
        ValueError: no case has all files, or a mask is empty: it would compare nothing.
    """
    cases, missing = {}, []
    for name in sorted(path.stem for path in sources.iterdir()):
        files = [min(folder.glob(f"{glob.escape(name)}.*"), default=None) for folder in (sources, edits, masks)]
        images = [open_image(file, BLACK) for file in files if file is not None]
        if len(images) < 3:
            missing.append(name)
            continue
        source, edit, mask = images
        if not np.asarray(mask).any():
            raise ValueError(f"The mask of '{name}' is empty, so nothing would be compared; make it again.")
        cases[name] = source, edit, mask
    if not cases:
        raise ValueError(f"No case has a source, an edit and a mask; looked for {', '.join(missing) or 'none'}.")
    return Scores(mode, ns_lpips(cases, distance, mode).scores, tuple(missing))
