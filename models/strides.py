"""A check that images are large enough for a network's strides."""

from collections.abc import Sequence


def check_strides(image_size: int, strides: Sequence[int]) -> None:
    """Raise ValueError if an image is too small for a sequence of strides.

    Args:
        image_size: Height and width of the images, in pixels.
        strides: Strides of the layers, in order.

    Raises:
        ValueError: If the image is too small; the message names the smallest size that is not.
    """
    least = 1  # pixels before the last stride, then before the one before it, ...
    for stride in reversed(strides):
        least = max(stride, (least - 1) * stride + 1)
    if image_size < least:
        raise ValueError(
            f"images of {image_size} pixels are too small for strides {list(strides)}: use "
            f"{least} pixels or more, or a smaller stem_stride"
        )
