"""Find, check, decode, augment and batch images."""

from train.choices import Augmentation, Dataset
from train.data.bad import BadImage, BadImages
from train.data.batches import Batches
from train.data.make import make_batches
from train.data.read import read_image
from train.data.resident import ResidentBatches, fits
from train.data.shards import are_shards
from train.data.source import Source, class_name
from train.data.sources import open_source
from train.data.transforms import evaluation_transform

__all__ = [
    "Augmentation",
    "BadImage",
    "BadImages",
    "Batches",
    "Dataset",
    "ResidentBatches",
    "Source",
    "are_shards",
    "class_name",
    "evaluation_transform",
    "fits",
    "make_batches",
    "open_source",
    "read_image",
]
