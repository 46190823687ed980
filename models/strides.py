"""Whether an image has pixels enough for a network's strides."""

from collections.abc import Sequence


def check_strides(image_size: int, strides: Sequence[int]) -> None:
    """Raise where the feature maps run out of pixels.

    Args:
        image_size: Height and width of the images, in pixels.
        strides: Of the layers that have one, in order.

    Raises:
        ValueError: Naming the smallest image that is large enough.
    """
    least = 1  # pixels before the last stride, then before the one before it, ...
    for stride in reversed(strides):
        least = max(stride, (least - 1) * stride + 1)
    if image_size < least:
        raise ValueError(
            f"images of {image_size} pixels are too small for strides {list(strides)}: use "
            f"{least} pixels or more, or a smaller stem_stride"
        )
