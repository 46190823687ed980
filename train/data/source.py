"""The images of a run, with their classes, normalisation and augmentation."""

import unicodedata
import zlib
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from train.choices import Augmentation
from train.data.bad import BadImage, BadImages
from train.data.images import Images


def class_name(name: str) -> str:
    """Return a class name in Unicode's composed form (NFC), which is used to compare names."""
    return unicodedata.normalize("NFC", name)


@dataclass(frozen=True, kw_only=True)
class Source:
    """Training and validation images of the same classes.

    Attributes:
        train: Training images.
        validation: Validation images.
        split: Name of the validation split.
        place: Absolute path of the folder or shards, or the name of a data set.
        classes: Class names, by label.
        augmentation: How images are augmented.
        mean: Mean of each channel, for pixels from 0 to 1.
        std: Standard deviation of each channel.
        bad: The images of both splits that could not be read so far.
    """

    train: Images
    validation: Images
    split: str
    place: str
    classes: tuple[str, ...]
    augmentation: Augmentation
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    bad: BadImages = field(default_factory=BadImages)

    def fingerprint(self) -> str:
        """Return the number of training images, and a checksum of all labels and a few images."""
        checksum = zlib.crc32(self.train.labels.numpy().tobytes())
        for i in np.linspace(0, len(self.train) - 1, 16).astype(int) if len(self.train) else ():
            try:
                checksum = zlib.crc32(self.train[int(i)].numpy().tobytes(), checksum)
            except BadImage as bad:
                self.bad.found(bad)
        return f"{len(self.train)} images, checksum {checksum:08x}"

    def subset(self, train: int | None = None, validation: int | None = None) -> "Source":
        """Return a source with fewer images: the first of each class, the same number of each.

        Args:
            train: Number of training images. If None, all.
            validation: Number of validation images. If None, all.

        Raises:
            ValueError: If there are not that many images.
        """
        learned = self.train if train is None else self._first("train", train)
        held_out = self.validation if validation is None else self._first("validation", validation)
        return replace(self, train=learned, validation=held_out)

    def _first(self, name: str, number: int) -> Images:
        """Return the first images of each class in a split, ``number`` in total."""
        images: Images = getattr(self, name)
        labels = images.labels
        if not 1 <= number <= len(labels):
            raise ValueError(
                f"--{name}-images must be from 1 to the number of images, {len(labels):,}, "
                f"got {number:,}"
            )
        rank = torch.zeros_like(labels)
        for label in range(len(self.classes)):
            mask = labels == label
            rank[mask] = torch.arange(int(mask.sum()))
        indices = (rank * len(self.classes) + labels).argsort()[:number].sort().values
        return images.select(indices.tolist())
