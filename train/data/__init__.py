"""Images: found, checked, decoded, augmented, batched."""

from train.data.batches import Batches
from train.data.read import read_image
from train.data.resident import ResidentBatches, fits
from train.data.sources import Dataset, Source, open_source
from train.data.transforms import Augmentation, evaluation_transform

__all__ = [
    "Augmentation",
    "Batches",
    "Dataset",
    "ResidentBatches",
    "Source",
    "evaluation_transform",
    "fits",
    "open_source",
    "read_image",
]
