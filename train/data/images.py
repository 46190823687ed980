"""Labelled pictures: on disk, or decoded in memory."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from train.data import cache
from train.data.bad import BadImage, BadImages
from train.data.read import image_bytes, read_image

T = TypeVar("T")


class Images(Protocol):
    """Labelled pictures, by index."""

    @property
    def labels(self) -> Tensor:
        """Their labels ``[N]``, int64."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Tensor:
        """Return a picture ``[3, H, W]``, uint8, of any strides.

        Raises:
            BadImage: It cannot be read.
        """

    def select(self, indices: Sequence[int]) -> "Images":
        """Return some of them."""


@dataclass(frozen=True)
class FileImages:
    """Pictures that are read from disk each time."""

    paths: Sequence[Path]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        """See :class:`Images`."""
        return read_image(self.paths[index])

    def select(self, indices: Sequence[int]) -> "FileImages":
        """See :class:`Images`."""
        return FileImages([self.paths[i] for i in indices], self.labels[list(indices)])


class MemoryImages:
    """Pictures of any sizes, decoded, in one piece of memory that processes can share.

    Args:
        pictures: Each ``[3, H, W]``, uint8.
        labels: Their labels ``[N]``.
    """

    def __init__(self, pictures: Sequence[Tensor], labels: Tensor) -> None:
        self.labels = labels
        self._shapes = [p.shape for p in pictures]
        self._starts = [0]
        for p in pictures:
            self._starts.append(self._starts[-1] + p.numel())
        self._bytes = torch.cat([torch.empty(0, dtype=torch.uint8), *map(torch.ravel, pictures)])

    def __len__(self) -> int:
        return len(self._shapes)

    @property
    def nbytes(self) -> int:
        """Bytes of the pictures."""
        return self._bytes.nbytes

    @property
    def same_size(self) -> bool:
        """Whether all pictures have one size."""
        return len(set(self._shapes)) <= 1

    def stacked(self) -> Tensor:
        """Return pictures of one size as ``[N, 3, H, W]``, in the same memory."""
        return self._bytes.view(len(self), *(self._shapes[0] if self._shapes else (3, 1, 1)))

    def __getitem__(self, index: int) -> Tensor:
        """See :class:`Images`."""
        start, stop = self._starts[index], self._starts[index + 1]
        return self._bytes[start:stop].view(self._shapes[index])

    def select(self, indices: Sequence[int]) -> "MemoryImages":
        """See :class:`Images`."""
        return MemoryImages([self[i] for i in indices], self.labels[list(indices)])


def load(paths: Sequence[Path], labels: Tensor, memory: int, bad: BadImages) -> tuple[Images, int]:
    """Return pictures, decoded where they fit into memory, and the bytes they take there.

    Every file is looked at: decoded whole where all fit, else its header is read. Those that cannot
    be read are left out, where that is wanted.

    Args:
        paths: The files.
        labels: Their labels ``[N]``.
        memory: How many bytes may be taken.
        bad: Where to count what cannot be read.

    Raises:
        ValueError: A file that is no picture; the message names it.
    """
    entry = cache.pictures_entry(paths)
    kept = cache.find(entry)
    if kept is not None and kept.nbytes <= memory:
        return MemoryImages(kept.pictures(), labels), kept.nbytes
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sizes = _each(pool, image_bytes, paths, bad)
        some = FileImages(paths, labels).select(list(sizes))
        if sum(sizes.values()) > memory:
            return some, 0
        pictures = _each(pool, read_image, some.paths, bad)
    if len(pictures) == len(paths):  # else what is kept could not tell which files are bad
        cache.keep(entry, list(pictures.values()))
    held = MemoryImages(list(pictures.values()), some.labels[list(pictures)])
    return held, held.nbytes


def _each(
    pool: Executor, read: Callable[[Path], T], paths: Sequence[Path], bad: BadImages
) -> dict[int, T]:
    """Return what is read from each file, by its number, but for those that cannot be read."""

    def attempt(path: Path) -> T | None:
        try:
            return read(path)
        except BadImage as error:
            bad.found(error)
            return None

    results = enumerate(pool.map(attempt, paths))
    return {number: result for number, result in results if result is not None}
