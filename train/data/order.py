"""Which images come in which batch: a function of seed and epoch, shared out among processes."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from train.data.slots import NO_SLOT, Slots


class BatchRequest(NamedTuple):
    """A batch to load.

    Attributes:
        epoch: On which augmentation depends.
        indices: Its images.
        slot: Where to leave it, of memory that processes share.
    """

    epoch: int
    indices: list[int]
    slot: int = NO_SLOT


def batch_indices(num_images: int, batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of an epoch ``[steps, batch_size]``; what is left over is not seen."""
    order = np.random.default_rng([seed, epoch]).permutation(num_images)
    steps = num_images // batch_size
    return order[: steps * batch_size].reshape(steps, batch_size)


def share(batch_size: int, rank: int, world_size: int) -> slice:
    """Return the part of every training batch that is one process': every so many-th image.

    So parts of these parts are, over all processes, the parts that one process would have taken.
    """
    return slice(rank, batch_size, world_size)


def held_out_batches(
    num_images: int, batch_size: int, rank: int, world_size: int
) -> list[BatchRequest]:
    """Return one process' validation batches: one in so many as there are processes."""
    starts = range(rank * batch_size, num_images, world_size * batch_size)
    ends = (min(start + batch_size, num_images) for start in starts)
    return [BatchRequest(0, list(range(*both))) for both in zip(starts, ends, strict=True)]


def check_batch_size(batch_size: int, num_train: int) -> None:
    """Raise a ``ValueError`` where there are fewer training images than one batch has."""
    if batch_size > num_train:
        raise ValueError(
            f"--batch-size {batch_size} is larger than the {num_train} training images; give a "
            "smaller one"
        )


class Order(Sampler[BatchRequest]):
    """One process' part of an epoch's batches.

    Args:
        num_images: Of all processes.
        batch_size: Likewise.
        seed: Of the order.
        part: Which part of each batch.

    Attributes:
        epoch: The epoch it gives next.
        first_step: From which step on.
        slots: Where batches are left, if not in memory of their own.
    """

    def __init__(self, num_images: int, batch_size: int, seed: int, part: slice) -> None:
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        self.part = part
        self.epoch = self.first_step = 0
        self.slots: Slots | None = None

    def __len__(self) -> int:
        return self.num_images // self.batch_size - self.first_step

    def __iter__(self) -> Iterator[BatchRequest]:
        batches = batch_indices(self.num_images, self.batch_size, self.seed, self.epoch)
        if self.slots:
            self.slots.reclaim()
        for chosen in batches[self.first_step :, self.part]:
            yield BatchRequest(
                self.epoch, chosen.tolist(), self.slots.reserve() if self.slots else NO_SLOT
            )
