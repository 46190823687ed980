"""Images: found, checked, decoded, augmented, batched."""

from train.data.batches import Batches, evaluation_transform
from train.data.read import read_image
from train.data.sources import Source, open_source

__all__ = ["Batches", "Source", "evaluation_transform", "open_source", "read_image"]
