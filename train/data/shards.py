"""Images in WebDataset shards: tars of ``<key>.jpg`` and ``<key>.cls``, read at random."""

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
    """Pictures in tars, read from disk each time.

    Attributes:
        shards: The tars.
        which: The tar of each picture ``[N]``, int32.
        offsets: Where it begins there ``[N]``, int64.
        sizes: How many bytes it has ``[N]``, int64.
        labels: Its label ``[N]``, int64.
    """

    shards: Sequence[Path]
    which: NDArray[np.int32]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.which)

    def __getitem__(self, number: int) -> Tensor:
        """See :class:`train.data.images.Images`."""
        shard, offset = self.shards[self.which[number]], int(self.offsets[number])
        with naming(lambda: name_at(shard, offset)), shard.open("rb", buffering=0) as file:
            data = bytearray(int(self.sizes[number]))
            file.seek(offset)
            if file.readinto(data) != len(data):
                raise ValueError("the shard ends within it")
            return decode(data)

    def select(self, indices: Sequence[int]) -> "ShardImages":
        """See :class:`train.data.images.Images`."""
        some = list(indices)
        parts = self.which[some], self.offsets[some], self.sizes[some]
        return ShardImages(self.shards, *parts, self.labels[some])


def shards(
    data: str, validation: str | None = None, training: bool = True, bad: BadImages | None = None
) -> Source:
    """Return the images of WebDataset shards.

    A sample is what shares a name up to the first dot behind the last slash: one picture, one
    ``.cls`` with the number of its class, and whatever else. The classes are called as a file
    ``classes.txt`` beside the shards says, a name a line, else by their numbers.

    Args:
        data: The training shards: a pattern, or a folder of ``train*.tar`` and ``val*.tar`` (or
            ``test*.tar``).
        validation: Those to measure on, likewise; in the same folder unless given.
        training: Whether there have to be images to learn from; else there are none.
        bad: Where to count what cannot be read; an error unless given.

    Raises:
        ValueError: Shards that are missing, compressed, damaged or without samples; samples without
            image or label; labels without a class.
    """
    bad = bad or BadImages()
    theirs = _found(validation, "--validation-data", ("val", "test")) if validation else []
    ours = _found(data, "--data", ("train",)) if training or not validation else []
    beside = ours[0].parent if ours else theirs[0].parent
    theirs = theirs or _beside(beside, data)
    if both := sorted(set(map(Path.resolve, ours)) & set(map(Path.resolve, theirs))):
        raise ValueError(
            f"{len(both)} shards are for training and validation alike ({both[0]}); give --data "
            "and --validation-data patterns that are apart"
        )
    learned, held_out = _images(ours, bad), _images(theirs, bad)
    for what, images in (("validation", held_out), *([("training", learned)] * training)):
        if not len(images):
            raise ValueError(f"the {what} shards hold no samples ({data})")
    return Source(
        train=learned if training else learned.select([]),
        validation=held_out,
        split="test" if theirs[0].name.startswith("test") else "val",
        place=os.path.abspath(data),
        classes=_classes(beside / "classes.txt", learned, held_out),
        augmentation="crop",
        bad=bad,
    )


def _found(pattern: str, flag: str, names: Sequence[str]) -> list[Path]:
    """Return the shards of a pattern, or of a folder those that have one of the names."""
    if not os.path.isdir(pattern):
        return expand(pattern, flag)
    found = next(filter(None, (in_folder(Path(pattern), name) for name in names)), [])
    if not found:
        raise ValueError(f"{flag} {pattern} holds no {' or '.join(f'{n}*.tar' for n in names)}")
    return checked(found, f"{flag} {pattern}")


def _beside(folder: Path, data: str) -> list[Path]:
    """Return the validation shards of a folder."""
    try:
        return _found(str(folder), "--data", ("val", "test"))
    except ValueError as error:
        raise ValueError(
            f"{data} goes without validation shards: {error}; give --validation-data"
        ) from None


def _images(paths: list[Path], bad: BadImages) -> ShardImages:
    """Return the images of shards, in the order of these."""
    found = [
        index(path, bad) for path in tqdm(paths, "indexing", delay=2, leave=False, disable=None)
    ]
    lengths = [len(one.labels) for one in found]
    none = [torch.empty(0, dtype=torch.int64)]
    return ShardImages(
        shards=paths,
        which=np.repeat(np.arange(len(paths), dtype=np.int32), lengths),
        offsets=torch.cat(none + [one.offsets for one in found]).numpy(),
        sizes=torch.cat(none + [one.sizes for one in found]).numpy(),
        labels=torch.cat(none + [one.labels for one in found]),
    )


def _names(file: Path) -> tuple[str, ...]:
    """Return the names in a file, a line each."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} has to hold the name of a class a line, as UTF-8") from error
    names = tuple(class_name(line) for line in map(str.strip, lines) if line)
    if again := [name for name, number in Counter(names).items() if number > 1]:
        raise ValueError(f"{file} names {again[0]!r} more than once; give each class its own name")
    return names


def _classes(file: Path, learned: ShardImages, held_out: ShardImages) -> tuple[str, ...]:
    """Return the names of the classes.

    Raises:
        ValueError: There are fewer than labels.
    """
    labels = torch.cat([learned.labels, held_out.labels])
    number = int(labels.max()) + 1
    names = tuple(map(str, range(number)))
    if file.is_file():
        names = _names(file)
    for images in (learned, held_out):
        beyond = (images.labels >= len(names)).nonzero().flatten().tolist()
        if beyond:
            i = beyond[0]
            sample = name_at(images.shards[images.which[i]], int(images.offsets[i]))
            raise ValueError(
                f"{sample} has the label {int(images.labels[i])}, but {file} names {len(names)} "
                "classes, from 0 on"
            )
    if len(learned) and int(learned.labels.max()) == int(learned.labels.min()):
        raise ValueError("the training shards have one class; there is nothing to tell apart")
    if len(learned) and (without := len(names) - len(learned.labels.unique())):
        _log.warning("%d of %d classes have no training images", without, len(names))
    return names
