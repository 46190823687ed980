"""Labelled pictures: on disk, or decoded in memory."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from train.data import cache
from train.data.read import image_bytes, read_image


class Images(Protocol):
    """Labelled pictures, by index."""

    @property
    def labels(self) -> Tensor:
        """Their labels ``[N]``, int64."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Tensor:
        """Return a picture ``[3, H, W]``, uint8."""

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


def load(paths: Sequence[Path], labels: Tensor, memory: int) -> tuple[Images, int]:
    """Return pictures, decoded where they fit into memory, and the bytes they take there.

    Every file is looked at: decoded whole where all fit, else its header is read.

    Args:
        paths: The files.
        labels: Their labels ``[N]``.
        memory: How many bytes may be taken.

    Raises:
        ValueError: A file that is no picture; the message names it.
    """
    kept = cache.find(paths)
    if kept is not None and kept.nbytes <= memory:
        return MemoryImages(kept.pictures(), labels), kept.nbytes
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        needed = sum(pool.map(image_bytes, paths, chunksize=64))
        if needed > memory:
            return FileImages(paths, labels), 0
        pictures = list(pool.map(read_image, paths))
    cache.keep(paths, pictures)
    return MemoryImages(pictures, labels), needed
