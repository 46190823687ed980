"""Reads one picture as three channels of bytes, whatever it was."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".tif", ".tiff"},
)


def read_image(path: Path) -> Tensor:
    """Return a picture as RGB.

    Rotated as its EXIF tag says; transparent parts on white; 16 bits a channel scaled to 8; of an
    animation the first frame. Pictures of 32 bits a channel say nothing of their range, and are
    refused.

    Args:
        path: The file.

    Returns:
        Bytes ``[3, H, W]``, uint8.

    Raises:
        ValueError: The file is no picture, or is damaged; the message names it.
    """
    with _naming(path), Image.open(path) as opened:
        picture: Image.Image = ImageOps.exif_transpose(opened)
        _check_mode(opened)
        if picture.mode.startswith("I;16"):
            picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        array = np.array(picture.convert("RGB"))
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


def image_bytes(path: Path) -> int:
    """Return how many bytes a picture takes when read, from its header alone.

    Raises:
        ValueError: The file is no picture; the message names it.
    """
    with _naming(path), Image.open(path) as opened:
        _check_mode(opened)
        width, height = opened.size
    return 3 * width * height


def _check_mode(picture: Image.Image) -> None:
    if picture.mode in ("I", "F"):
        raise ValueError("32 bits a channel, of unknown range; save it with 8 or 16")


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn whatever goes wrong while reading into an error that names the file."""
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = str(error) or type(error).__name__
        raise ValueError(
            f"{path} cannot be read as a picture ({reason}): repair the file or remove it"
        ) from error
