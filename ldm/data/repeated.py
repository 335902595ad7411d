"""Data sets of one's own, as ordinary PyTorch code writes them, for the running sample numbers used here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from torch.utils.data import Dataset


class SizedDataset(Protocol):
    """A data set with a length."""

    def __len__(self) -> int: ...

    def __getitem__(self, n: int, /) -> Any: ...


class Repeated(Dataset):
    """Sample n >= 0 of a data set that has only the samples 0 … len - 1: its sample n mod len, with n as `sample`.

    Args:
        dataset: gives mappings; a model with text needs `image` (H, W, 3) in [-1, 1] and `caption` (or the keys that
            its configuration names).

    Raises:
        ValueError: the data set has no length, or none of its samples is a mapping.
    """

    def __init__(self, dataset: SizedDataset) -> None:
        self.name = type(dataset).__name__
        if not hasattr(dataset, "__len__") or len(dataset) == 0:
            raise ValueError(f"{self.name} has no samples that can be counted; give it a length (__len__) above 0.")
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, n: int) -> dict[str, Any]:
        sample = self.dataset[n % len(self.dataset)]
        if not isinstance(sample, Mapping):
            raise ValueError(
                f"{self.name} must give mappings such as {{'image': …, 'caption': …}}, not {sample!r:.40}."
            )
        return {**sample, "sample": n}


def running(dataset: SizedDataset) -> SizedDataset:
    """Make a data set take running sample numbers; one that has `with_images` does so already."""
    return dataset if hasattr(dataset, "with_images") else Repeated(dataset)


def image_sides(
    dataset: SizedDataset, image_key: str = "image", caption_key: str = "caption"
) -> tuple[int, int] | None:
    """Return height and width of the images, as the data set says or its first sample shows; None: unknown.

    Raises:
        ValueError: the first sample has no image and caption to learn from.
    """
    if not isinstance(dataset, Repeated):
        size = getattr(dataset, "resolution", getattr(dataset, "size", None))  # a world's `size` counts images
        return None if size is None else (size, size)
    sample = dataset[0]
    for key in (image_key, caption_key):
        if key not in sample:
            raise ValueError(f"The samples of {dataset.name} lack '{key}'; add it to what they hold.")
    shape = tuple(np.shape(sample[image_key]))
    if len(shape) != 3 or shape[2] != 3:
        raise ValueError(f"'{image_key}' of {dataset.name} must be (height, width, 3) in [-1, 1], not {shape}.")
    return shape[:2]
