"""Image files of other people: unusual and damaged ones become a tensor or a ``BadImage``."""

import collections
import io
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from torch import Tensor

from train.data.bad import BadImage
from train.data.read import decode, naming, read_image

pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow's, of damaged metadata

ORIENTATION, RESOLUTION, MAKER, DETAILS = 0x0112, 0x011A, 0x010F, 0x8769
PIXELS = Image.fromarray(np.random.default_rng(0).integers(0, 255, (14, 18, 3), np.uint8))


def exif(orientation: int = 6) -> Image.Exif:
    tags = Image.Exif()
    tags[ORIENTATION], tags[RESOLUTION], tags[MAKER] = orientation, 300.0, "maker"
    tags.get_ifd(DETAILS).update({0x829A: 0.5, 0x9003: "2020:01:01 00:00:00"})
    return tags


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def saved(kind: str, mode: str = "RGB", **options: object) -> bytes:
    file = io.BytesIO()
    PIXELS.convert(mode).save(file, kind, **options)
    return file.getvalue()


def read(data: bytes) -> Tensor:
    with naming(lambda: "image"):
        return decode(bytearray(data))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_rotated_as_exif_says(kind: str, orientation: int) -> None:
    exact = {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind == "JPEG" else {}
    upright = read(saved(kind, **exact))
    turned = read(saved(kind, exif=exif(orientation), **exact))
    # From the definition of the EXIF tag: where row 0 and column 0 of the file are seen.
    array = upright.numpy()
    expected = {
        1: array,
        2: array[:, :, ::-1],
        3: array[:, ::-1, ::-1],
        4: array[:, ::-1],
        5: array.transpose(0, 2, 1),
        6: array.transpose(0, 2, 1)[:, :, ::-1],
        7: array.transpose(0, 2, 1)[:, ::-1, ::-1],
        8: array.transpose(0, 2, 1)[:, ::-1],
    }[orientation]
    assert np.array_equal(turned.numpy(), expected)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG"])
@pytest.mark.parametrize(
    "entry",
    [
        pytest.param(b"\x1b\x01\x0a\x00\x01\x00\x00\x00\x38\x00\x00\x00", id="rational -1/0"),
        pytest.param(b"\x1b\x01\x05\x00\x01\x00\x00\x00\xff\xff\xff\xff", id="offset beyond"),
        pytest.param(b"\x1b\x01\x63\x00\x01\x00\x00\x00\x00\x00\x00\x00", id="unknown type"),
    ],
)
def test_the_orientation_is_used_where_other_tags_are_damaged(kind: str, entry: bytes) -> None:
    header = b"II*\x00\x08\x00\x00\x00\x02\x00"
    orientation = b"\x12\x01\x03\x00\x01\x00\x00\x00\x06\x00\x00\x00"
    block = header + orientation + entry + b"\x00" * 22 + b"\xff\xff\xff\xff\x00\x00\x00\x00"
    data = saved(kind, exif=b"Exif\x00\x00" + block)
    assert read(data).shape == (3, 18, 14)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG"])
def test_damaged_exif_does_not_keep_pixels_from_being_read(kind: str) -> None:
    chance, block = random.Random(0), exif().tobytes()
    plain = read(saved(kind))
    for _ in range(400):
        damaged = bytearray(block)
        for _ in range(chance.choice([1, 2, 8, 32])):
            damaged[chance.randrange(6, len(damaged))] = chance.choice([0, 1, 127, 255])
        image = read(saved(kind, exif=bytes(damaged)))
        assert sorted(image.flatten().tolist()) == sorted(plain.flatten().tolist())


def samples() -> dict[str, list[bytes]]:
    """Return files of many formats, with metadata where the format has them."""
    metadata = {"exif": exif().tobytes(), "icc_profile": ICC}
    return {
        "JPEG": [saved("JPEG", **metadata), saved("JPEG", xmp=XMP), saved("JPEG", "CMYK")],
        "PNG": [saved("PNG", **metadata), saved("PNG", "P"), saved("PNG", "LA")],
        "WEBP": [saved("WEBP", xmp=XMP, **metadata)],
        "AVIF": [saved("AVIF", xmp=XMP, **metadata)],
        "TIFF": [saved("TIFF", **metadata), saved("TIFF", compression="tiff_lzw")],
        "JPEG2000": [saved("JPEG2000")],
        "GIF": [saved("GIF", "P")],
        "BMP": [saved("BMP"), saved("BMP", "P")],
        "PPM": [saved("PPM"), saved("PPM", "L"), saved("PPM", "1")],
        "ICO": [saved("ICO")],
        "TGA": [saved("TGA"), saved("TGA", compression="tga_rle")],
        "PCX": [saved("PCX")],
        "QOI": [saved("QOI")],
        "DDS": [saved("DDS")],
    }


def damaged(data: bytes, chance: random.Random) -> bytes:
    """Return a file with some bytes changed, mostly of its head, or cut off."""
    changed = bytearray(data)
    if chance.random() < 0.2:
        del changed[chance.randrange(1, len(changed)) :]
        return bytes(changed)
    reach = min(len(changed), chance.choice([40, 200, 600, len(changed)]))
    for _ in range(chance.choice([1, 1, 2, 4, 16])):
        changed[chance.randrange(reach)] = chance.choice([0, 1, 128, 255, chance.randrange(256)])
    return bytes(changed)


def test_20000_damaged_files_become_tensors_or_bad_images() -> None:
    chance, files = random.Random(0), samples()
    results: collections.Counter[tuple[str, bool]] = collections.Counter()
    for number in range(20_000):
        kind = list(files)[number % len(files)]
        try:
            image = read(damaged(chance.choice(files[kind]), chance))
        except BadImage:
            results[kind, False] += 1
        else:
            results[kind, True] += 1
            assert image.dtype == torch.uint8
            assert image.ndim == 3
            assert image.shape[0] == 3
            assert image.numel() > 0
    assert len(files) >= 12
    for kind in files:  # or the test would try too little
        assert min(results[kind, True], results[kind, False]) > 20, kind


def test_whatever_goes_wrong_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(saved("PNG"))
    for error in (KeyError("k"), AttributeError("a"), ZeroDivisionError("z"), RecursionError("r")):

        def fail(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(Image.Image, "convert", fail)
        with pytest.raises(BadImage, match=r"a.png cannot be read as an image"):
            read_image(path)
