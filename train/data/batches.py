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
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torchvision.transforms import v2

from train.data.images import Images, MemoryImages
from train.data.sources import Source
from train.data.transforms import evaluation_transform, training_transform

Key = tuple[int, int]  # epoch, index
Loaded = tuple[Tensor, int] | ValueError  # image and label, or why there is none


class Batches:
    """Training and validation batches of a source.

    Args:
        source: The images.
        image_size: Height and width to return, in pixels.
        batch_size: Images a batch; the last of an epoch is left out of training if smaller.
        seed: Of order and augmentation.
        workers: Processes that load images; see :class:`train.options.DataOptions`.
        on_cpu: Whether training itself runs on the CPU.
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
        idle = on_cpu and isinstance(source.train, MemoryImages)
        automatic = 0 if idle else min(8, os.cpu_count() or 1)
        processes = automatic if workers == "auto" else workers
        train = training_transform(source.augmentation, image_size)
        held_out = evaluation_transform(source.augmentation, image_size)
        self._order = _Order(self.num_train, batch_size, seed)
        self._train = DataLoader(
            _Transformed(source.train, train, seed),
            batch_sampler=self._order,
            collate_fn=_collate,
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
            collate_fn=_collate,
            num_workers=processes,
            pin_memory=not on_cpu,
        )

    def check(self) -> None:
        """Raise a ``ValueError`` where there are fewer training images than one batch has."""
        check_batch_size(self.batch_size, self.num_train)

    def train(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images ``[B, 3, H, W]``, uint8, and labels ``[B]`` of an epoch, from a step on.

        Raises:
            ValueError: A file that cannot be read; the message names it.
        """
        self._order.epoch, self._order.first_step = epoch, first_step
        yield from map(_unpack, self._train)

    def validation(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield every validation image once, in order; the last batch may be smaller.

        Raises:
            ValueError: A file that cannot be read; the message names it.
        """
        yield from map(_unpack, self._validation)


def batch_indices(num_images: int, batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of an epoch ``[steps, batch_size]``; what is left over is not seen."""
    order = np.random.default_rng([seed, epoch]).permutation(num_images)
    steps = num_images // batch_size
    return order[: steps * batch_size].reshape(steps, batch_size)


def check_batch_size(batch_size: int, num_train: int) -> None:
    """Raise a ``ValueError`` where there are fewer training images than one batch has."""
    if batch_size > num_train:
        raise ValueError(
            f"--batch-size {batch_size} is larger than the {num_train} training images; give a "
            "smaller one"
        )


class _Order(Sampler[list[Key]]):
    """The keys of an epoch's batches: a permutation that depends on seed and epoch."""

    def __init__(self, num_images: int, batch_size: int, seed: int) -> None:
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        self.epoch = self.first_step = 0

    def __len__(self) -> int:
        return self.num_images // self.batch_size - self.first_step

    def __iter__(self) -> Iterator[list[Key]]:
        batches = batch_indices(self.num_images, self.batch_size, self.seed, self.epoch)
        for chosen in batches[self.first_step :]:
            yield [(self.epoch, int(i)) for i in chosen]


class _Transformed(Dataset[Loaded]):
    """Images by key, augmented by random numbers that depend on seed, epoch and the first index."""

    def __init__(self, images: Images, transform: v2.Transform, seed: int) -> None:
        self.images, self.transform, self.seed = images, transform, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, keys: list[Key]) -> list[Loaded]:
        """Return a batch; called by PyTorch's loader, in whichever process."""
        entropy = np.random.SeedSequence([self.seed, *keys[0]]).generate_state(1, np.uint64)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(entropy[0]) >> 1)
            return [self._load(index) for _, index in keys]

    def _load(self, index: int) -> Loaded:
        try:
            return self.transform(self.images[index]), int(self.images.labels[index])
        except ValueError as error:
            return error


def _collate(items: list[Loaded]) -> tuple[Tensor, Tensor] | ValueError:
    """Return a batch, or what went wrong: raised in a worker, it would arrive as a traceback."""
    for item in items:
        if isinstance(item, ValueError):
            return item
    images, labels = default_collate(items)
    return images, labels


def _unpack(batch: tuple[Tensor, Tensor] | ValueError) -> tuple[Tensor, Tensor]:
    if isinstance(batch, ValueError):
        raise batch
    return batch
