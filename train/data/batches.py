"""Batches whose order and augmentation depend on seed, epoch and place alone.

Nothing is remembered between batches, so a run that is resumed anywhere, with any number of worker
processes, sees what it would have seen.
"""

import os
from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import v2

from train.data.images import Images, MemoryImages
from train.data.sources import Source

Key = tuple[int, int]  # epoch, index


class Batches:
    """Training and validation batches of a source.

    Args:
        source: The images.
        image_size: Height and width to return, in pixels.
        batch_size: Images a batch; the last of an epoch is left out of training if smaller.
        seed: Of order and augmentation.
        workers: Processes that load images; see :class:`train.options.DataOptions`.
        on_cpu: Whether training itself runs on the CPU.

    Raises:
        ValueError: Fewer training images than one batch has.
    """

    def __init__(
        self,
        source: Source,
        *,
        image_size: int,
        batch_size: int,
        seed: int = 0,
        workers: int | Literal["auto"] = "auto",
        on_cpu: bool = True,
    ) -> None:
        self.batch_size, self.seed = batch_size, seed
        self.num_train, self.num_validation = len(source.train), len(source.validation)
        self.steps = self.num_train // batch_size
        if self.steps == 0:
            raise ValueError(
                f"--batch-size {batch_size} is larger than the {self.num_train} training images; "
                "give a smaller one"
            )
        idle = on_cpu and isinstance(source.train, MemoryImages)
        automatic = 0 if idle else min(8, os.cpu_count() or 1)
        processes = automatic if workers == "auto" else workers
        train, held_out = _transforms(source.natural, image_size)
        self._order = _Order(self.num_train, batch_size, seed)
        self._train = DataLoader(
            _Transformed(source.train, train, seed),
            batch_sampler=self._order,
            num_workers=processes,
            persistent_workers=processes > 0,
            pin_memory=not on_cpu,
        )
        self._validation = DataLoader(
            _Transformed(source.validation, held_out, seed),
            batch_sampler=[
                [(0, i) for i in range(at, min(at + batch_size, self.num_validation))]
                for at in range(0, self.num_validation, batch_size)
            ],
            num_workers=processes,
            pin_memory=not on_cpu,
        )

    def train(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images ``[B, 3, H, W]``, uint8, and labels ``[B]`` of an epoch, from a step on."""
        self._order.epoch, self._order.first_step = epoch, first_step
        yield from self._train

    def validation(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield every validation image once, in order; the last batch may be smaller."""
        yield from self._validation


class _Order(Sampler[list[Key]]):
    """The keys of an epoch's batches: a permutation that depends on seed and epoch."""

    def __init__(self, num_images: int, batch_size: int, seed: int) -> None:
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        self.epoch = self.first_step = 0

    def __len__(self) -> int:
        return self.num_images // self.batch_size - self.first_step

    def __iter__(self) -> Iterator[list[Key]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.num_images)
        for step in range(self.first_step, self.num_images // self.batch_size):
            chosen = order[step * self.batch_size : (step + 1) * self.batch_size]
            yield [(self.epoch, int(i)) for i in chosen]


class _Transformed(Dataset[tuple[Tensor, int]]):
    """Images by key, augmented by random numbers that depend on seed, epoch and the first index."""

    def __init__(self, images: Images, transform: v2.Transform, seed: int) -> None:
        self.images, self.transform, self.seed = images, transform, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, keys: list[Key]) -> list[tuple[Tensor, int]]:
        """Return a batch; called by PyTorch's loader, in whichever process."""
        entropy = np.random.SeedSequence([self.seed, *keys[0]]).generate_state(1, np.uint64)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(entropy[0]) >> 1)
            return [
                (self.transform(self.images[index]), int(self.images.labels[index]))
                for _, index in keys
            ]


def _transforms(natural: bool, size: int) -> tuple[v2.Transform, v2.Transform]:
    """Return the transforms of training and validation, from bytes to bytes."""
    if not natural:
        return v2.Resize((size, size)), v2.Resize((size, size))
    train = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()])
    return train, evaluation_transform(size)


def evaluation_transform(size: int) -> v2.Transform:
    """Return the paper's: the shorter side to 256 / 224 of the size, then the centre."""
    return v2.Compose([v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size)])
