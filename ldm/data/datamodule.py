"""Data sets from a configuration, read in an order that a resumed run can take up again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ldm.util import instantiate_from_config


class Repeated(Dataset):
    """Sample n >= 0 of a data set that has only the samples 0 … len - 1: its sample n mod len, with n as `sample`.

    Args:
        dataset: of one's own, as ordinary PyTorch code writes them. It gives mappings; a model with text needs `image`
            (H, W, 3) in [-1, 1] and `caption` (or the keys that its configuration names).
    """

    def __init__(self, dataset: Any) -> None:
        self.name = type(dataset).__name__
        if not hasattr(dataset, "__len__") or len(dataset) == 0:
            raise ValueError(f"{self.name} has no samples that can be counted; give it a length (__len__) above 0.")
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, n: int) -> dict[str, Any]:
        return {**self.dataset[n % len(self.dataset)], "sample": n}


class RunningSampler(Sampler[int]):
    """Running sample numbers of this process, from where the run stands to the end of the epoch.

    Sample n of the run is the same image with the same randomness whatever the epoch, the number of
    processes or the number of interruptions. Global batch b holds the numbers b·W·B … (b+1)·W·B - 1 of W
    processes with B samples each; process r reads the r-th B of them.

    Args:
        samples_per_epoch: length of the data set.
        position: returns how many global batches the run has consumed.
        accumulate: batches in a step; an epoch has whole steps only, since a shorter one would end it early.
    """

    def __init__(
        self,
        samples_per_epoch: int,
        batch_size: int,
        position: Callable[[], int],
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
    ) -> None:
        self.batch_size, self.rank, self.world = batch_size, rank, world
        self.position = position
        self.batches_per_epoch = max(1, samples_per_epoch // (batch_size * world * accumulate)) * accumulate

    def __len__(self) -> int:
        return self.batches_per_epoch * self.batch_size

    def __iter__(self) -> Iterator[int]:
        first = self.position()
        last = (first // self.batches_per_epoch + 1) * self.batches_per_epoch
        for batch in range(first, last):
            start = (batch * self.world + self.rank) * self.batch_size
            yield from range(start, start + self.batch_size)


class DataModuleFromConfig(pl.LightningDataModule):
    """`train` and `validation` data sets as the YAML files name them, batched.

    Data sets that do not take running sample numbers (they have no `with_images`) are `Repeated`. Those that hold their
    images in memory (`in_memory = True`) are read in this process: worker processes would only copy.
    """

    ignored_keys = {
        "wrap": "data sets here are indexed by running sample numbers",
        "test": "nothing is tested after training",
    }

    def __init__(
        self,
        batch_size: int,
        train: Mapping[str, Any] | None = None,
        validation: Mapping[str, Any] | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}.")
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.datasets: dict[str, Any] = {}
        for split, config in (("train", train), ("validation", validation)):
            if config:
                dataset = instantiate_from_config(config)
                self.datasets[split] = dataset if hasattr(dataset, "with_images") else Repeated(dataset)

    def _loader(self, split: str, sampler: Sampler[int] | None = None) -> DataLoader:
        dataset = self.datasets[split]
        workers = 0 if getattr(dataset, "in_memory", False) else self.num_workers
        # with workers a thread pins memory, which CUDA forbids while the training step is captured
        captures = workers > 0 and getattr(getattr(self.trainer, "lightning_module", None), "cuda_graph", False)
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available() and not captures,
        )

    def train_dataloader(self) -> DataLoader:
        trainer = self.trainer
        assert trainer is not None
        sampler = RunningSampler(
            samples_per_epoch=len(self.datasets["train"]),
            batch_size=self.batch_size,
            position=lambda: trainer.global_step * trainer.accumulate_grad_batches,
            rank=trainer.global_rank,
            world=trainer.world_size,
            accumulate=trainer.accumulate_grad_batches,
        )
        return self._loader("train", sampler)

    def val_dataloader(self) -> DataLoader | list:
        return self._loader("validation") if "validation" in self.datasets else []
