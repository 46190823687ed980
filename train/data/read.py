"""Read one image file as RGB."""

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from train.data.bad import BadImage

# Pillow raises an error above twice its limit of 89 million pixels. Below that it only warns, again
# for each image. Its warnings about damaged metadata do not name the file.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", module=r"PIL\.TiffImagePlugin")


def _readable_suffixes() -> frozenset[str]:
    """Return the suffixes of the formats that Pillow decodes without other programs."""
    Image.init()

    def decodes(name: str) -> bool:
        opens = Image.OPEN[name][0] if name in Image.OPEN else None
        is_stub = isinstance(opens, type) and issubclass(opens, ImageFile.StubImageFile)
        return opens is not None and not is_stub and name not in ("EPS", "MPEG", "FITS", "IPTC")

    suffixes = {suffix for suffix, name in Image.EXTENSION.items() if decodes(name)}
    return frozenset(suffixes - {".pcd", ".pfm"})  # point clouds, depth maps


SUFFIXES = _readable_suffixes()
"""File name suffixes of readable images, in lower case, with the dot."""


def read_image(path: Path) -> Tensor:
    """Return an image as RGB.

    The image is rotated according to its EXIF orientation, transparent parts become white, 16 bits
    per channel become 8, and only the first frame of an animation is read. Damaged metadata are
    ignored.

    Args:
        path: The file.

    Returns:
        Bytes ``[3, H, W]``, uint8, of any strides.

    Raises:
        BadImage: If the file is not an image or is damaged, has 32 bits per channel (whose range is
            unknown), or more than twice ``PIL.Image.MAX_IMAGE_PIXELS`` pixels. This is a
            ``ValueError`` that names the file.
    """
    with naming(lambda: str(path)), open(path, "rb", buffering=0) as file:
        return decode(bytearray(file.read()))


def image_bytes(path: Path) -> int:
    """Return the number of bytes of a decoded image, reading only its header.

    Raises:
        BadImage: If the file is not an image. This is a ``ValueError`` that names it.
    """
    with naming(lambda: str(path)), Image.open(path) as image:
        _check_mode(image)
        width, height = image.size
    return 3 * width * height


def decode(data: bytearray) -> Tensor:
    """Return an image from the bytes of its file, as :func:`read_image` does.

    JPEGs that need no rotation are decoded by torchvision, which returns the same pixels as Pillow
    in less time.
    """
    with Image.open(io.BytesIO(data)) as image:
        if image.format == "JPEG" and image.mode in ("RGB", "L") and _rotation(image) is None:
            with suppress(RuntimeError):  # Pillow is used then, for its error message
                pixels: Tensor = decode_jpeg(
                    torch.frombuffer(data, dtype=torch.uint8), ImageReadMode.RGB
                )
                return pixels
        _check_mode(image)
        image.load()
        rotation = _rotation(image)  # after loading, which rotates TIFF files
        upright = image if rotation is None else image.transpose(rotation)
        return _rgb(upright)


def _rotation(image: Image.Image) -> Image.Transpose | None:
    """Return how to rotate or mirror an image; None if not at all, or its metadata are damaged.

    ``PIL.ImageOps.exif_transpose`` also rewrites the metadata, which fails if they are damaged.
    """
    try:
        return _ROTATIONS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # Pillow raises many types of errors for damaged metadata
        return None


_ROTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Operations, by EXIF orientation."""


def _rgb(image: Image.Image) -> Tensor:
    """Return the pixels of an image as RGB ``[3, H, W]``, uint8."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _check_mode(image: Image.Image) -> None:
    """Raise ValueError if an image has 32 bits per channel."""
    if image.mode in ("I", "F"):
        raise ValueError("32 bits per channel, of unknown range; save it with 8 or 16")


@contextmanager
def naming(name: Callable[[], str]) -> Iterator[None]:
    """Convert any error while reading an image into a :class:`BadImage` that names the place."""
    try:
        yield
    except FileNotFoundError:
        raise BadImage(name(), "there is no such file") from None
    except UnidentifiedImageError as error:  # its message names a buffer, not the file
        raise BadImage(name(), "unknown format, or damaged at its beginning") from error
    except MemoryError:
        raise
    except Exception as error:  # decoders raise many types of errors for damaged files
        raise BadImage(name(), str(error) or type(error).__name__) from error
