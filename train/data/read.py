"""Reads one picture as three channels of bytes, whatever it was."""

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from train.data.bad import BadImage

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".tif", ".tiff"},
)

# Twice PIL's limit of 89 million pixels is refused. Below that it only warns, of every picture
# anew, and reading goes on.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def read_image(path: Path) -> Tensor:
    """Return a picture as RGB.

    Rotated as its EXIF tag says; transparent parts on white; 16 bits a channel scaled to 8; of an
    animation the first frame. Pictures of 32 bits a channel say nothing of their range, and are
    refused, as are those of more than twice ``PIL.Image.MAX_IMAGE_PIXELS``.

    Args:
        path: The file.

    Returns:
        Bytes ``[3, H, W]``, uint8, of any strides.

    Raises:
        BadImage: The file is no picture, or is damaged; a ``ValueError`` that names it.
    """
    with naming(lambda: str(path)), open(path, "rb", buffering=0) as file:
        return decode(bytearray(file.read()))


def image_bytes(path: Path) -> int:
    """Return how many bytes a picture takes when read, from its header alone.

    Raises:
        BadImage: The file is no picture; a ``ValueError`` that names it.
    """
    with naming(lambda: str(path)), Image.open(path) as opened:
        _check_mode(opened)
        width, height = opened.size
    return 3 * width * height


def decode(data: bytearray) -> Tensor:
    """Return a picture, from the bytes of its file, as :func:`read_image` does.

    Common JPEGs are left to torchvision, which returns the pixels that PIL does, sooner.
    """
    if _is_plain(data):
        with suppress(RuntimeError):  # PIL says what is wrong
            return _decode_jpeg(data)
    with Image.open(io.BytesIO(data)) as opened:
        upright = opened.getexif().get(ExifTags.Base.Orientation, 1) == 1
        if opened.format == "JPEG" and opened.mode in ("RGB", "L") and upright:
            with suppress(RuntimeError):
                return _decode_jpeg(data)
        return _decode_any(opened)


def _decode_jpeg(data: bytearray) -> Tensor:
    image: Tensor = decode_jpeg(torch.frombuffer(data, dtype=torch.uint8), ImageReadMode.RGB)
    return image


def _is_plain(data: bytearray) -> bool:
    """Return whether this is a JPEG of usual size, grey or RGB, that says nothing of rotation.

    To open it with PIL for that would take a twentieth of what decoding takes.
    """
    if data[:2] != b"\xff\xd8":
        return False
    at, limit = 2, Image.MAX_IMAGE_PIXELS or 0
    while at + 9 < len(data) and data[at] == 0xFF and data[at + 1] != _EXIF:
        if data[at + 1] in _FRAMES:
            height, width = (int.from_bytes(data[i : i + 2]) for i in (at + 5, at + 7))
            return data[at + 4] == 8 and 0 < height * width <= limit and data[at + 9] in (1, 3)
        at += 2 + int.from_bytes(data[at + 2 : at + 4])
    return False


_FRAMES = (0xC0, 0xC1, 0xC2)  # markers of what every decoder reads: baseline, extended, progressive
_EXIF = 0xE1


def _decode_any(opened: Image.Image) -> Tensor:
    picture: Image.Image = ImageOps.exif_transpose(opened)
    _check_mode(opened)
    if picture.mode.startswith("I;16"):
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)


def _check_mode(picture: Image.Image) -> None:
    if picture.mode in ("I", "F"):
        raise ValueError("32 bits a channel, of unknown range; save it with 8 or 16")


@contextmanager
def naming(name: Callable[[], str]) -> Iterator[None]:
    """Turn whatever goes wrong while reading into an error that names the place."""
    try:
        yield
    except FileNotFoundError:
        raise BadImage(name(), "there is no such file") from None
    except UnidentifiedImageError as error:  # which names an object in memory
        raise BadImage(name(), "it is none, or damaged from its beginning") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadImage(name(), str(error) or type(error).__name__) from error
