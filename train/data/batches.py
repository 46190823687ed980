"""Batches whose order and augmentation depend only on seed, epoch and image.

There is no state between batches, so a run that is resumed at any step, with any number of worker
processes, gets the same batches as without the interruption; and processes that train together get
parts of the batches that a single process would get.
"""

import logging
import os
import shutil
import signal
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from train.data.images import MemoryImages
from train.data.loading import Batch, Transformed, as_ever
from train.data.order import BatchRequest, Order, check_batch_size, held_out_batches, share
from train.data.slots import Slots
from train.data.source import Source
from train.data.transforms import evaluation_transform, training_transform

PREFETCH = 2
"""Number of batches that each worker process loads ahead."""

SPARE = 3
"""Number of further batches in memory: the current one, the previous one and the next one."""

SHARED_MEMORY = Path("/dev/shm")

_log = logging.getLogger(__name__)


class Batches:
    """Training and validation batches of a source, or one process' share of them.

    Images are ``[B, 3, S, S]``, uint8, in ``torch.channels_last``, labels ``[B]``. If bad images
    are skipped, batches that contain them are smaller.

    Args:
        source: The images.
        image_size: Height and width to return, in pixels.
        batch_size: Images per batch, over all processes that train together; a smaller last batch
            of an epoch is left out of training.
        seed: Seed of order and augmentation.
        workers: Processes that load images; see :class:`train.options.DataOptions`.
        on_cpu: Whether training runs on the CPU.
        rank: Rank of this process among those that train together.
        world_size: Number of processes that train together.

    Attributes:
        steps: Number of training batches per epoch.
        bad: The images that this process could not read so far.
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
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.batch_size, self.seed, self.bad = batch_size, seed, source.bad
        self.num_train, self.num_validation = len(source.train), len(source.validation)
        self.steps = self.num_train // batch_size
        idle = on_cpu and isinstance(source.train, MemoryImages)
        auto_workers = 0 if idle else min(8, os.cpu_count() or 1)
        requested = auto_workers if workers == "auto" else workers
        self._workers = workers_that_fit(requested, 3 * image_size**2 * batch_size)
        self._pinned, self._image_size = not on_cpu, image_size
        train = training_transform(source.augmentation, image_size)
        held_out = partial(as_ever, evaluation_transform(source.augmentation, image_size))
        self._part = share(batch_size, rank, world_size)
        self._order = Order(self.num_train, batch_size, seed, self._part)
        self._loaded = Transformed(source.train, train, seed)
        self._train = self._loader(self._loaded, self._order, persistent=self._workers > 0)
        self._validation = self._loader(
            Transformed(source.validation, held_out, seed),
            held_out_batches(self.num_validation, batch_size, rank, world_size),
        )

    def _loader(
        self, images: Transformed, batches: Iterable[BatchRequest], persistent: bool = False
    ) -> DataLoader[Batch]:
        return DataLoader(
            images,
            batch_sampler=cast(Sampler[list[Any]], batches),
            collate_fn=_identity,
            num_workers=self._workers,
            prefetch_factor=PREFETCH if self._workers else None,
            persistent_workers=persistent,
            worker_init_fn=_begin_worker,
            generator=torch.Generator(),  # without one, it draws from PyTorch's global generator
        )

    def check(self) -> None:
        """Raise ValueError if there are fewer training images than one batch needs."""
        check_batch_size(self.batch_size, self.num_train)

    def train(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this process' part of an epoch's batches, starting from a step.

        Raises:
            ValueError: If an image cannot be read, or, if such images are skipped, no image of a
                batch can be read.
        """
        self._order.epoch, self._order.first_step = epoch, first_step
        if self._workers and self._order.slots is None:
            batch = len(range(self.batch_size)[self._part])
            slots = Slots(PREFETCH * self._workers + SPARE, batch, self._image_size)
            self._order.slots = self._loaded.slots = slots
        for images, labels in self._readable(self._train):
            if not len(labels):
                raise ValueError(
                    "no image of a batch can be read: use a larger --batch-size, or repair images"
                )
            yield images, labels

    def validation(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this process' validation batches in order, each image once; some may be smaller.

        Raises:
            ValueError: If an image cannot be read, or, if such images are skipped, none can be
                read.
        """
        loaded = 0
        for images, labels in self._readable(self._validation):
            loaded += len(labels)
            if len(labels):
                yield images, labels
        if len(self._validation) and not loaded:
            raise ValueError("no validation image can be read")

    def _readable(self, loader: DataLoader[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the images and labels of a loader's batches, and count the bad images."""
        for batch in loader:
            for bad in batch.missing:
                self.bad.found(bad)
            images = batch.images
            if images is None:
                assert self._loaded.slots is not None
                images = self._loaded.slots.take(batch.slot, len(batch.labels))
            yield images.pin_memory() if self._pinned else images, batch.labels


def workers_that_fit(workers: int, batch_bytes: int) -> int:
    """Return how many worker processes fit into the shared memory.

    Args:
        workers: The requested number; a warning is logged if fewer fit.
        batch_bytes: Bytes of a batch, over all processes that train together.
    """
    if not workers or not SHARED_MEMORY.is_dir():
        return workers
    free = shutil.disk_usage(SHARED_MEMORY).free
    # Training and validation batches that workers load, and those kept in this process.
    batches = [2 * PREFETCH * number + SPARE + 1 for number in range(1, workers + 1)]
    fitting = sum(number * batch_bytes <= free for number in batches)
    if fitting < workers:
        _log.warning(
            "%s has %.0f MB free, but %d worker processes need %.0f MB, so %d are "
            "started; give a container more shared memory (docker run --shm-size 8g)",
            *(SHARED_MEMORY, free / 1e6, workers, batches[-1] * batch_bytes / 1e6, fitting),
        )
    return fitting


def _identity(batch: Any) -> Any:
    return batch


def _begin_worker(_: int) -> None:
    """Ignore signals in a worker process, except a SIGTERM from the main process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on every system
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=_wait_for_end, args=(os.getppid(),), daemon=True).start()


def _wait_for_end(main: int) -> None:
    """End this process on a SIGTERM from the main process, whose ID is ``main``.

    Without this, a main process that ends by an error would wait for its workers forever.
    """
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main:
        pass
    os._exit(0)
