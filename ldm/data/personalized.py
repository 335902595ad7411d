"""The user's few images of one concept, as training samples with captions that hold the placeholder."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm.data.templates import TEMPLATES
from ldm.files.images import bytes_to_tensor, check_fit, fit, is_heic_file, is_image_file, open_image
from ldm.files.kinds import is_utf8
from ldm.util import mix_seed

logger = logging.getLogger(__name__)

SETS = ("train", "validation", "val", "test")
# Folders of up to this many images are read at once, so that a damaged file shows before a model is loaded.
READ_AHEAD = 64
CACHE_BYTES = 2**30
LISTED = 10
SQUASHED = 1.05  # sides that differ by more are reported

# Each random draw has its own number, so that no two of them ever share a stream.
ORDER, FLIP = 1, 2


class PersonalizedBase(Dataset):
    """All images of a folder (or one image file), in the order of their names.

    Samples are numbered without end: sample n >= 0 belongs to epoch n // num_images, and an epoch shows
    every image once, in an order drawn from (seed, epoch). Whether sample n is mirrored is drawn from
    (seed, n). There is no other state, so sample n is the same in every process and after every interruption.

    Args:
        data_root: a folder with images, or one image. Hidden files, sub-folders and what Pillow cannot
            identify are skipped, with one logged line.
        size: side of the square images in pixels; None leaves them as they are.
        repeats: number of epochs that make up the length of the training set.
        interpolation: linear, bilinear, bicubic or lanczos.
        flip_p: probability that a training sample is mirrored; samples of the other sets never are. Use 0 for
            images with writing or a left and a right.
        set: "train", or "validation", "val", "test".
        placeholder_token: what is learned is called this.
        templates: captions, in which `{}` stands for the placeholder; each sample draws one. The default is the
            placeholder alone (ProSpect); `object`, `style` and `textual-inversion` are published sets
            (`ldm.data.templates`). A caption that names everything but the wanted attribute leaves only that
            to be learned. CatVersion's caption is the class word, without a placeholder.
        center_crop: the reference's way to say `resize="crop"`.
        resize: "squash", "crop" or "pad", see `ldm.files.images.fit`.
        seed: of the order and of the mirroring.

    Attributes:
        num_images: number of images.
        paths: their files, in order.
        with_images: set to False, samples come without "image".
        flips: whether samples may be mirrored.
        in_memory: whether all images have been read, so that worker processes would not help.

    Raises:
        ValueError: there is no such folder, it holds no image, an image is damaged (`ImageError`), or a
            setting is out of its range.
    """

    ignored_keys = dict.fromkeys(
        ("per_image_tokens", "mixing_prob", "coarse_class_text"), "there, too, a caption is the placeholder"
    )

    def __init__(
        self,
        data_root: str | Path,
        size: int | None = None,
        repeats: int = 100,
        interpolation: str = "bicubic",
        flip_p: float = 0.5,
        set: str = "train",
        placeholder_token: str = "*",
        center_crop: bool = False,
        resize: str = "squash",
        seed: int = 23,
        templates: Sequence[str] | str = ("{}",),
    ) -> None:
        if center_crop and resize == "pad":
            raise ValueError("center_crop: true means resize: crop; leave it out for resize: pad.")
        if set not in SETS:
            raise ValueError(f"Unknown set '{set}'; known: {', '.join(SETS)}.")
        if repeats < 1 or not 0 <= flip_p <= 1:
            raise ValueError(f"repeats must be at least 1, and flip_p 0 to 1 (a probability), not {repeats}, {flip_p}.")
        self.size, self.repeats, self.interpolation = size, repeats, interpolation
        self.resize = "crop" if center_crop else resize
        check_fit(*((1, 1) if size is None else (size, size)), self.resize, interpolation)
        self.is_training = set == "train"
        self.flip_p = flip_p if self.is_training else 0.0
        self.flips = self.flip_p > 0
        self.placeholder_token, self.seed = placeholder_token, seed
        self.templates = TEMPLATES.get(templates, [templates]) if isinstance(templates, str) else list(templates)
        if not self.templates or not all(isinstance(text, str) for text in self.templates):
            raise ValueError(f"templates must be texts such as 'a photo of a {{}}', not {templates!r}.")
        self.with_images = True
        self.paths = find_images(data_root)
        self.num_images = len(self.paths)
        self._cache: dict[int, Tensor] = {}
        self._cached_bytes = 0
        self._told = not self.is_training
        self._epoch: tuple[int, np.ndarray] | None = None
        self.in_memory = self.num_images <= READ_AHEAD
        if self.in_memory:
            for i in range(self.num_images):
                self._bytes(i)

    def image(self, i: int, flipped: bool = False) -> Tensor:
        """Return image i of `paths`, float32 (3, size, size) in [-1, 1], mirrored left to right where asked."""
        image = bytes_to_tensor(self._bytes(i))
        return image.flip(-1) if flipped else image

    def _bytes(self, i: int) -> Tensor:
        """Return image i as uint8 (3, H, W), from memory as far as there is room."""
        if i in self._cache:
            return self._cache[i]
        image = open_image(self.paths[i])
        if self.size is not None:
            self._tell_of_squashing(self.paths[i], image.size)
            image = fit(image, self.size, self.size, self.resize, self.interpolation)
        values = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        if self._cached_bytes + values.numel() <= CACHE_BYTES:
            self._cache[i] = values
            self._cached_bytes += values.numel()
        return values

    def _tell_of_squashing(self, path: Path, size: tuple[int, int]) -> None:
        """Log, once, that images lose their proportions."""
        if self.resize == "squash" and max(size) > SQUASHED * min(size) and not self._told:
            self._told = True
            logger.warning(
                "'%s' (%d x %d) is squashed to %d x %d; data.params.train.params.resize=crop cuts its longer side, "
                "resize=pad adds to its shorter one.", path, *size, self.size, self.size,
            )  # fmt: skip

    def _image_number(self, n: int) -> int:
        epoch, place = divmod(n, self.num_images)
        if self._epoch is None or self._epoch[0] != epoch:
            order = np.random.default_rng((self.seed, epoch, ORDER)).permutation(self.num_images)
            self._epoch = epoch, order
        return int(self._epoch[1][place])

    def _is_flipped(self, n: int) -> bool:
        return self.flips and bool(np.random.default_rng((self.seed, n, FLIP)).random() < self.flip_p)

    def __len__(self) -> int:
        return self.num_images * (self.repeats if self.is_training else 1)

    def __iter__(self) -> Iterator[dict[str, object]]:
        """Return the samples 0 … len - 1; without it, a loop over the data set would have no end."""
        return (self[n] for n in range(len(self)))

    def caption(self, n: int) -> str:
        """Return the caption of sample n, drawn from the templates."""
        choice = mix_seed(self.seed, n) % len(self.templates) if len(self.templates) > 1 else 0
        return self.templates[choice].replace("{}", self.placeholder_token)

    def __getitem__(self, n: int) -> dict[str, object]:
        """Return sample n >= 0, also beyond the length.

        Returns:
            image float32 (H, W, 3) in [-1, 1] (left out when `with_images` is False), caption, image_number (its
            image's number), flipped, sample (n).
        """
        i, flipped = self._image_number(n), self._is_flipped(n)
        sample: dict[str, object] = {"caption": self.caption(n), "image_number": i, "flipped": flipped, "sample": n}
        if self.with_images:
            sample["image"] = self.image(i, flipped).permute(1, 2, 0).contiguous()
        return sample


def find_images(data_root: str | Path) -> list[Path]:
    """List the image files of a folder by name, or the one image that `data_root` is; what is skipped is logged.

    Raises:
        ValueError: nothing is there, no image, or the name is not UTF-8.
    """
    root = Path(data_root).expanduser()
    if not is_utf8(root):
        shown = str(root).encode(errors="replace").decode()
        raise ValueError(f"The name of data_root '{shown}' is not UTF-8; rename the folder.")
    if root.is_file():
        with open_image(root):
            return [root]
    images: list[Path] = []
    unread: list[str] = []
    others: list[str] = []
    paths = root.iterdir() if root.is_dir() else ()
    for path in sorted(paths, key=lambda path: path.name):  # the same order on every operating system
        if path.name.startswith(".") or not path.is_file():
            others.append(path.name)
        elif is_image_file(path):
            images.append(path)
        else:
            (unread if is_heic_file(path) else others).append(path.name)
    if not images:
        empty = "it is empty" if root.is_dir() else "there is no such folder"
        found = f"only {_listing(unread + others)}" if unread or others else empty
        raise ValueError(f"There is no image in data_root '{root}' ({found}); put PNG or JPEG files there.")
    if unread:
        logger.warning("Skipped in '%s', save them as PNG or JPEG to use them: HEIC images %s", root, _listing(unread))
    if others:
        logger.warning("Skipped in '%s', as they are no images: %s", root, _listing(others))
    return images


def _listing(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
