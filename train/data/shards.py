"""Images in WebDataset shards: tars of ``<key>.jpg`` and ``<key>.cls``, with random access."""

import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from train.data.bad import BadImages
from train.data.patterns import are_shards, checked, expand, in_folder
from train.data.read import decode, naming
from train.data.source import Source, class_name
from train.data.tar_index import index, name_at

__all__ = ["ShardImages", "are_shards", "shards"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardImages:
    """Images in tars that are read from disk at each access.

    Attributes:
        shards: The tars.
        which: Index of each image's tar ``[N]``, int32.
        offsets: Offset of each image in its tar, in bytes ``[N]``, int64.
        sizes: Number of bytes of each image file ``[N]``, int64.
        labels: Label of each image ``[N]``, int64.
    """

    shards: Sequence[Path]
    which: NDArray[np.int32]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.which)

    def __getitem__(self, number: int) -> Tensor:
        """Read an image ``[3, H, W]``, uint8, of any strides."""
        shard, offset = self.shards[self.which[number]], int(self.offsets[number])
        with naming(lambda: name_at(shard, offset)), shard.open("rb", buffering=0) as file:
            data = bytearray(int(self.sizes[number]))
            file.seek(offset)
            if file.readinto(data) != len(data):
                raise ValueError("the shard ends within it")
            return decode(data)

    def select(self, indices: Sequence[int]) -> "ShardImages":
        """Return the images at some indices."""
        ids = list(indices)
        parts = self.which[ids], self.offsets[ids], self.sizes[ids]
        return ShardImages(self.shards, *parts, self.labels[ids])


def shards(
    data: str, validation: str | None = None, training: bool = True, bad: BadImages | None = None
) -> Source:
    """Return the images of WebDataset shards.

    A sample consists of the files whose names are equal up to the first dot after the last slash:
    one image, one ``.cls`` with the number of its class, and any others. A file ``classes.txt``
    beside the shards has the names of the classes, one per line; without it, their names are their
    numbers.

    Args:
        data: The training shards: a pattern, or a folder of ``train*.tar`` and ``val*.tar`` (or
            ``test*.tar``).
        validation: The validation shards: a pattern or a folder. If None, those in the folder of
            the training shards.
        training: Whether training images are required. If False, only validation images are
            returned.
        bad: Collects the images that cannot be read. If None, such an image is an error.

    Raises:
        ValueError: If shards are missing, compressed, damaged or without samples, samples have no
            image or label, or labels have no class.
    """
    bad = bad or BadImages()
    held_out_shards = _find(validation, "--validation-data", ("val", "test")) if validation else []
    train_shards = _find(data, "--data", ("train",)) if training or not validation else []
    folder = (train_shards or held_out_shards)[0].parent
    held_out_shards = held_out_shards or _find_validation(folder, data)
    if both := sorted(
        set(map(Path.resolve, train_shards)) & set(map(Path.resolve, held_out_shards))
    ):
        raise ValueError(
            f"{len(both)} shards are used for both training and validation ({both[0]}); pass "
            "patterns without common shards to --data and --validation-data"
        )
    train, held_out = _images(train_shards, bad), _images(held_out_shards, bad)
    for split, images in (("validation", held_out), *([("training", train)] * training)):
        if not len(images):
            raise ValueError(f"the {split} shards hold no samples ({data})")
    return Source(
        train=train if training else train.select([]),
        validation=held_out,
        split="test" if held_out_shards[0].name.startswith("test") else "val",
        place=os.path.abspath(data),
        classes=_classes(folder / "classes.txt", train, held_out),
        augmentation="crop",
        bad=bad,
    )


def _find(pattern: str, flag: str, names: Sequence[str]) -> list[Path]:
    """Return the shards of a pattern, or those of a folder whose names begin with one of these."""
    if not os.path.isdir(pattern):
        return expand(pattern, flag)
    paths = next(filter(None, (in_folder(Path(pattern), name) for name in names)), [])
    if not paths:
        raise ValueError(f"{flag} {pattern} holds no {' or '.join(f'{n}*.tar' for n in names)}")
    return checked(paths, f"{flag} {pattern}")


def _find_validation(folder: Path, data: str) -> list[Path]:
    """Return the validation shards of a folder."""
    try:
        return _find(str(folder), "--data", ("val", "test"))
    except ValueError as error:
        raise ValueError(
            f"{data} has no validation shards: {error}; pass them with --validation-data"
        ) from None


def _images(paths: list[Path], bad: BadImages) -> ShardImages:
    """Return the images of shards, in order."""
    indices = [
        index(path, bad) for path in tqdm(paths, "indexing", delay=2, leave=False, disable=None)
    ]
    lengths = [len(i.labels) for i in indices]
    empty = [torch.empty(0, dtype=torch.int64)]
    return ShardImages(
        shards=paths,
        which=np.repeat(np.arange(len(paths), dtype=np.int32), lengths),
        offsets=torch.cat(empty + [i.offsets for i in indices]).numpy(),
        sizes=torch.cat(empty + [i.sizes for i in indices]).numpy(),
        labels=torch.cat(empty + [i.labels for i in indices]),
    )


def _names(file: Path) -> tuple[str, ...]:
    """Return the class names in a file, one per line."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} must hold one class name per line, as UTF-8") from error
    names = tuple(class_name(line) for line in map(str.strip, lines) if line)
    if repeated := [name for name, number in Counter(names).items() if number > 1]:
        raise ValueError(f"{file} has {repeated[0]!r} more than once; class names must be unique")
    return names


def _classes(file: Path, train: ShardImages, held_out: ShardImages) -> tuple[str, ...]:
    """Return the names of the classes.

    Args:
        file: File with the names; if it does not exist, the names are numbers.
        train: The training images.
        held_out: The validation images.

    Raises:
        ValueError: If a label has no name, or the training images have only one class.
    """
    labels = torch.cat([train.labels, held_out.labels])
    number = int(labels.max()) + 1
    names = tuple(map(str, range(number)))
    if file.is_file():
        names = _names(file)
    for images in (train, held_out):
        unnamed = (images.labels >= len(names)).nonzero().flatten().tolist()
        if unnamed:
            i = unnamed[0]
            sample = name_at(images.shards[images.which[i]], int(images.offsets[i]))
            raise ValueError(
                f"{sample} has the label {int(images.labels[i])}, but {file} names {len(names)} "
                "classes, numbered from 0"
            )
    if len(train) and int(train.labels.max()) == int(train.labels.min()):
        raise ValueError("the training shards have one class; training needs two or more")
    if len(train) and (empty := len(names) - len(train.labels.unique())):
        _log.warning("%d of %d classes have no training images", empty, len(names))
    return names
