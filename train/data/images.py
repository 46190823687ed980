"""Labelled images, on disk or decoded in memory."""

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
    """Labelled images, by index."""

    @property
    def labels(self) -> Tensor:
        """Labels ``[N]``, int64."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Tensor:
        """Return an image ``[3, H, W]``, uint8, of any strides.

        Raises:
            BadImage: If it cannot be read.
        """

    def select(self, indices: Sequence[int]) -> "Images":
        """Return the images at some indices."""


@dataclass(frozen=True)
class FileImages:
    """Images that are read from disk at each access."""

    paths: Sequence[Path]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        """Read an image ``[3, H, W]``, uint8, of any strides."""
        return read_image(self.paths[index])

    def select(self, indices: Sequence[int]) -> "FileImages":
        """Return the images at some indices."""
        return FileImages([self.paths[i] for i in indices], self.labels[list(indices)])


class MemoryImages:
    """Decoded images of any sizes, in one tensor that processes can share.

    Args:
        pictures: Images, each ``[3, H, W]``, uint8.
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
        """Number of bytes of the images."""
        return self._bytes.nbytes

    @property
    def same_size(self) -> bool:
        """Whether all images have the same size."""
        return len(set(self._shapes)) <= 1

    def stacked(self) -> Tensor:
        """Return images of equal size as a view ``[N, 3, H, W]``."""
        return self._bytes.view(len(self), *(self._shapes[0] if self._shapes else (3, 1, 1)))

    def __getitem__(self, index: int) -> Tensor:
        """Return a view of an image ``[3, H, W]``, uint8."""
        start, stop = self._starts[index], self._starts[index + 1]
        return self._bytes[start:stop].view(self._shapes[index])

    def select(self, indices: Sequence[int]) -> "MemoryImages":
        """Return copies of the images at some indices."""
        return MemoryImages([self[i] for i in indices], self.labels[list(indices)])


def load(paths: Sequence[Path], labels: Tensor, memory: int, bad: BadImages) -> tuple[Images, int]:
    """Return images, decoded if all fit into memory, and the bytes of memory they take.

    All files are checked: decoded if all fit into memory, otherwise by their headers. Images that
    cannot be read are errors or left out, depending on ``bad``.

    Args:
        paths: The files.
        labels: Their labels ``[N]``.
        memory: Maximum number of bytes of memory to use.
        bad: Collects the images that cannot be read.

    Raises:
        ValueError: If a file is not an image; the message names it.
    """
    entry = cache.pictures_entry(paths)
    cached = cache.find(entry)
    if cached is not None and cached.nbytes <= memory:
        return MemoryImages(cached.pictures(), labels), cached.nbytes
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sizes = _read_all(pool, image_bytes, paths, bad)
        files = FileImages(paths, labels).select(list(sizes))
        if sum(sizes.values()) > memory:
            return files, 0
        pictures = _read_all(pool, read_image, files.paths, bad)
    if len(pictures) == len(paths):  # a cache entry does not record which files are bad
        cache.keep(entry, list(pictures.values()))
    images = MemoryImages(list(pictures.values()), files.labels[list(pictures)])
    return images, images.nbytes


def _read_all(
    pool: Executor, read: Callable[[Path], T], paths: Sequence[Path], bad: BadImages
) -> dict[int, T]:
    """Return the results of reading each file, by number, without files that cannot be read."""

    def attempt(path: Path) -> T | None:
        try:
            return read(path)
        except BadImage as error:
            bad.found(error)
            return None

    results = enumerate(pool.map(attempt, paths))
    return {number: result for number, result in results if result is not None}
