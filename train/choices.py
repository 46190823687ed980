"""Names that options accept, in a module of their own: parsing options imports nothing else."""

from typing import Literal

Dataset = Literal["imagenet", "cifar10", "digits"]

Augmentation = Literal["crop", "shift", "none"]
"""``crop``: for photographs of any size: a random crop, mirrored at random; in evaluation, the
centre. ``shift``: for small images: a shift by up to an eighth of their size, filled with black,
mirrored at random. ``none``: only resized."""

Weights = Literal["initial", "last", "best", "ema"]
