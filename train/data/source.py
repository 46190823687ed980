"""What a run is given to learn from: images, their classes, and what may be done to them."""

import unicodedata
import zlib
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from train.data.bad import BadImage, BadImages
from train.data.images import Images
from train.data.transforms import Augmentation


def class_name(name: str) -> str:
    """Return the name of a class in Unicode's composed form (NFC), in which names are compared."""
    return unicodedata.normalize("NFC", name)


@dataclass(frozen=True, kw_only=True)
class Source:
    """Training and validation images of the same classes.

    Attributes:
        train: Images to learn from.
        validation: Images to measure on.
        split: What the validation split is called.
        place: Where the images are: a folder or shards, absolute, or the name of a data set.
        classes: Names, by label.
        augmentation: What may be done to pictures.
        mean: Of each channel, for pixels from 0 to 1.
        std: Likewise the standard deviation.
        bad: The images of both kinds that could not be read so far.
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
        """Return how many training images there are, and a checksum over labels and a few."""
        checksum = zlib.crc32(self.train.labels.numpy().tobytes())
        for i in np.linspace(0, len(self.train) - 1, 16).astype(int) if len(self.train) else ():
            try:
                checksum = zlib.crc32(self.train[int(i)].numpy().tobytes(), checksum)
            except BadImage as bad:
                self.bad.found(bad)
        return f"{len(self.train)} images, checksum {checksum:08x}"

    def subset(self, train: int | None = None, validation: int | None = None) -> "Source":
        """Return the same with so many images of each kind, the first of each class alike.

        Raises:
            ValueError: There are not that many.
        """
        ours = self.train if train is None else self._first("train", train)
        held_out = self.validation if validation is None else self._first("validation", validation)
        return replace(self, train=ours, validation=held_out)

    def _first(self, name: str, number: int) -> Images:
        images: Images = getattr(self, name)
        labels = images.labels
        if not 1 <= number <= len(labels):
            raise ValueError(
                f"--{name}-images must be 1 to {len(labels):,}, which is how many there are, "
                f"got {number:,}"
            )
        rank = torch.zeros_like(labels)
        for label in range(len(self.classes)):
            own = labels == label
            rank[own] = torch.arange(int(own.sum()))
        chosen = (rank * len(self.classes) + labels).argsort()[:number].sort().values
        return images.select(chosen.tolist())
