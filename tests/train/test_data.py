"""Images: found, checked, read, batched."""

import random
import re
import shutil
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image, ImageOps
from scipy.stats import ks_2samp
from torchvision.transforms import v2

from train.data import (
    Batches,
    ResidentBatches,
    cache,
    evaluation_transform,
    fits,
    open_source,
    read_image,
)
from train.data.batches import workers_that_fit
from train.data.images import FileImages, MemoryImages
from train.data.source import Source
from train.data.transforms import moves, random_part, shift, training_transform
from train.options import Options


def picture(path: Path, mode: str = "RGB", size: tuple[int, int] = (20, 16)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(len(str(path))).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(values).convert(mode).save(path)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a folder of two classes, six training and four validation images."""
    for split, number in (("train", 3), ("val", 2)):
        for name in ("cat", "dog"):
            for i in range(number):
                picture(tmp_path / split / name / f"{i}.png", size=(18 + i, 16))
    return tmp_path


def test_a_folder_of_classes(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    (root / "train" / ".hidden").mkdir()
    (root / "train" / "cat" / "notes.txt").write_text("no picture")
    (root / "train" / "readme.txt").write_text("in no class")
    source = open_source(str(root))
    assert source.classes == ("cat", "dog")
    assert (
        "train: 2 files are ignored: they are not images, or not in a class folder (2 .txt)"
        in caplog.text
    )
    assert source.split == "val"
    assert source.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert torch.equal(source.train[4], read_image(root / "train" / "dog" / "1.png"))
    (root / "val").rename(root / "test")
    assert open_source(str(root)).split == "test"


def test_images_that_do_not_fit_into_memory_stay_on_disk(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_memory = open_source(str(root))
    monkeypatch.setattr("train.data.folders.MEMORY_SHARE", 0.0)
    on_disk = open_source(str(root))
    assert isinstance(in_memory.train, MemoryImages)
    assert isinstance(on_disk.train, FileImages)
    assert all(torch.equal(in_memory.train[i], on_disk.train[i]) for i in range(6))


def test_without_data_both_ways_to_get_going_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DNW_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(
        ValueError, match=r"elsewhere/imagenet or data/imagenet.*--data DIR.*digits"
    ):
        open_source(None)
    with pytest.raises(ValueError, match=r"--data nowhere: there is no such folder.*digits"):
        open_source("nowhere")


def test_data_are_found_in_the_usual_places(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    for split in ("train", "val"):
        (root / split).rename(place / split)
    (tmp_path / "data").mkdir()
    place.rename(tmp_path / "data" / "imagenet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DNW_DATA", raising=False)
    assert open_source(None).classes == ("cat", "dog")
    monkeypatch.setenv("DNW_DATA", str(tmp_path / "data"))
    monkeypatch.chdir("/")
    assert open_source(None).classes == ("cat", "dog")


def break_empty(root: Path) -> str:
    for file in (root / "train" / "dog").iterdir():
        file.unlink()
    return r"train/dog holds no images"


def break_single(root: Path) -> str:
    for split in ("train", "val"):
        shutil.rmtree(root / split / "dog")
    return r"train has one class"


def break_classes(root: Path) -> str:
    (root / "val" / "dog").rename(root / "val" / "dingo")
    return r"val has class folders that are not among .*: dingo; rename or remove them"


def break_file(root: Path) -> str:
    (root / "train" / "dog" / "1.png").write_bytes(b"not a picture at all")
    return r"train/dog/1.png cannot be read as an image"


def break_link(root: Path) -> str:
    (root / "train" / "dog" / "9.png").symlink_to(root / "gone.png")
    return r"train/dog/9.png cannot be read as an image \(there is no such file\)"


def break_end(root: Path) -> str:
    file = root / "val" / "cat" / "0.png"
    file.write_bytes(file.read_bytes()[:-200])
    return r"val/cat/0.png cannot be read as an image"


def break_layout(root: Path) -> str:
    (root / "val").rename(root / "validation")
    return r"must hold train/<class>/\* and val/<class>/\*.*but holds train, validation"


def break_flat(root: Path) -> str:
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            for file in (root / split / name).iterdir():
                file.rename(root / split / f"{name}{file.name}")
            (root / split / name).rmdir()
    return r"train has no class folders"


@pytest.mark.parametrize(
    "damage",
    [
        break_empty,
        break_single,
        break_classes,
        break_file,
        break_link,
        break_end,
        break_layout,
        break_flat,
    ],
)
def test_folders_with_mistakes(root: Path, damage) -> None:  # noqa: ANN001
    message = damage(root)
    with pytest.raises(ValueError, match=message):
        open_source(str(root))


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "LA", "1", "I;16"])
def test_pictures_of_every_kind_become_rgb(tmp_path: Path, mode: str) -> None:
    if mode == "I;16":
        path = tmp_path / "deep.png"
        Image.fromarray(np.full((6, 8), 0x80FF, np.uint16)).save(path)
    else:
        path = picture(tmp_path / ("x.tif" if mode == "CMYK" else "x.png"), mode, (8, 6))
    image = read_image(path)
    assert image.shape == (3, 6, 8)
    assert image.dtype == torch.uint8
    if mode == "I;16":
        assert image.unique().tolist() == [0x80]


def test_pictures_are_turned_as_their_exif_tag_says(tmp_path: Path) -> None:
    upright = Image.fromarray(np.arange(0, 240, 5, np.uint8).reshape(6, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored rotated; to be shown turned by 90 degrees clockwise
    upright.save(tmp_path / "turned.png", exif=exif)
    expected = np.asarray(upright.rotate(-90, expand=True))
    assert np.array_equal(read_image(tmp_path / "turned.png")[0].numpy(), expected)


def test_transparent_parts_are_white(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (10, 20, 30, 0)).save(tmp_path / "clear.png")
    assert read_image(tmp_path / "clear.png").unique().tolist() == [255]


def test_digits_are_split_the_same_way_always() -> None:
    source = open_source("digits")
    assert (len(source.train), len(source.validation)) == (1438, 359)
    assert source.train[0].shape == (3, 8, 8)
    assert source.augmentation == "none"


def batches(source: Source, **options: object) -> Batches:
    return Batches(source, **{"image_size": 12, "batch_size": 2, **options})


def test_batches_depend_on_seed_epoch_and_place_alone(root: Path) -> None:
    source = open_source(str(root))
    first = list(batches(source).train(epoch=1))
    assert len(first) == 3
    assert first[0][0].shape == (2, 3, 12, 12)
    for other in (
        batches(source).train(epoch=1),
        batches(source, workers=2).train(epoch=1),
    ):
        assert all(
            torch.equal(a, b)
            for x, y in zip(first, other, strict=True)
            for a, b in zip(x, y, strict=True)
        )
    rest = list(batches(source).train(epoch=1, first_step=2))
    assert torch.equal(rest[0][0], first[2][0])
    for different in (batches(source).train(epoch=2), batches(source, seed=1).train(epoch=1)):
        assert not all(torch.equal(x[0], y[0]) for x, y in zip(first, different, strict=True))


def test_every_validation_image_comes_once_and_in_order(root: Path) -> None:
    source = open_source(str(root))
    seen = torch.cat([labels for _, labels in batches(source, batch_size=3).validation()])
    assert seen.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_leaves_the_global_generator_alone(root: Path, workers: int) -> None:
    source = open_source(str(root))
    before = torch.get_rng_state()
    ours = batches(source, workers=workers)
    for loaded in (ours.train(epoch=0), ours.train(epoch=1), ours.validation()):
        list(loaded)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_batch_larger_than_the_data(root: Path) -> None:
    with pytest.raises(ValueError, match="--batch-size 7 is larger than the 6 training images"):
        batches(open_source(str(root)), batch_size=7).check()


def test_only_the_held_out_images_are_needed_to_measure(root: Path) -> None:
    shutil.rmtree(root / "train")
    source = open_source(str(root), training=False)
    assert source.classes == ("cat", "dog")
    assert len(source.train) == 0
    assert sum(len(labels) for _, labels in batches(source).validation()) == 4
    with pytest.raises(ValueError, match=r"must hold train/<class>/\*"):
        open_source(str(root))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_breaks_later_is_named_without_a_traceback(
    root: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.data.folders.MEMORY_SHARE", 0.0)
    source = open_source(str(root))
    break_file(root)
    with pytest.raises(ValueError, match=r"^\S+train/dog/1.png cannot be read") as raised:
        list(batches(source, workers=workers).train(epoch=0))
    assert "Traceback" not in str(raised.value)


def test_a_strip_is_cropped_rather_than_enlarged(tmp_path: Path) -> None:
    Image.new("RGB", (200_000, 1)).save(tmp_path / "strip.png")
    assert evaluation_transform("crop", 224)(read_image(tmp_path / "strip.png")).shape == (
        3,
        224,
        224,
    )
    image = torch.randint(0, 255, (3, 40, 60), dtype=torch.uint8)
    plain = v2.Compose([v2.Resize(37), v2.CenterCrop(32)])
    assert torch.equal(evaluation_transform("crop", 32)(image), plain(image))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pictures_of_unknown_range_are_refused(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (4, 4)).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match=r"x.tif cannot be read as an image \(32 bits per channel"):
        read_image(tmp_path / "x.tif")


def small(root: Path, number: int = 5, size: int = 32) -> Path:
    """Make a folder of two classes of small pictures, all of one size."""
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            for i in range(number):
                picture(root / split / name / f"{i}.png", size=(size, size))
    return root


def test_cifar10_is_read_from_a_folder_of_classes(tmp_path: Path) -> None:
    source = open_source(str(small(tmp_path)), dataset="cifar10")
    assert (source.augmentation, source.split) == ("shift", "test")
    assert source.mean == (0.491, 0.482, 0.447)
    assert len(source.train) == 10


def test_cifar10_is_read_as_torchvision_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class CachedImages:
        classes = ("cat", "dog")

        def __init__(self, root: str, train: bool, download: bool) -> None:
            assert root == str(tmp_path / "cifar10")
            self.data = np.arange(3 * 32 * 32 * 3).astype(np.uint8).reshape(3, 32, 32, 3)
            self.targets = [1, 0, 1]

    monkeypatch.setattr("train.data.sources.CIFAR10", CachedImages)
    monkeypatch.setenv("DNW_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)  # away from data/cifar10 of whoever runs the tests
    source = open_source(None, dataset="cifar10")
    assert source.classes == ("cat", "dog")
    assert source.train.labels.tolist() == [1, 0, 1]
    assert source.train[0][:, 0, 0].tolist() == [0, 1, 2]


def test_cifar10_that_is_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("train.data.sources.CIFAR10", refuse)
    monkeypatch.setenv("DNW_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)  # away from data/cifar10 of whoever runs the tests
    with pytest.raises(ValueError, match=r"not be downloaded \(no route to host\); use --data"):
        open_source(None, dataset="cifar10")
    with pytest.raises(ValueError, match=r"--data nowhere: there is no such folder; use --data"):
        open_source("nowhere", dataset="cifar10")
    (tmp_path / "notes.txt").write_text("no images")
    with pytest.raises(ValueError, match=r"does not hold CIFAR-10; use --data DIR"):
        open_source(str(tmp_path), dataset="cifar10")


def test_a_subset_has_as_many_of_each_class(tmp_path: Path) -> None:
    source = open_source(str(small(tmp_path)), train_images=7)
    assert source.train.labels.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert torch.equal(source.train[4], read_image(tmp_path / "train" / "dog" / "0.png"))
    fewer = open_source(str(tmp_path), validation_images=4)
    assert fewer.validation.labels.tolist() == [0, 0, 1, 1]
    assert len(fewer.train) == 10
    with pytest.raises(ValueError, match=r"--train-images must be from 1 to .* 10, got 11"):
        open_source(str(tmp_path), train_images=11)


def test_decoded_pictures_are_kept_until_a_file_changes(
    root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DNW_CACHE", str(tmp_path / "cache"))
    read = []
    monkeypatch.setattr(
        "train.data.images.read_image", lambda path: read.append(path) or read_image(path)
    )
    first = open_source(str(root))
    assert len(read) == 10
    again = open_source(str(root))
    assert len(read) == 10
    assert all(torch.equal(first.train[i], again.train[i]) for i in range(6))
    picture(root / "train" / "dog" / "0.png", size=(9, 9))
    assert open_source(str(root)).train[3].shape == (3, 9, 9)
    assert len(read) == 16


@pytest.mark.parametrize("damage", ["truncated", "unwritable"])
def test_a_cache_that_fails_is_said_and_done_without(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    place = root / "cache"
    monkeypatch.setenv("DNW_CACHE", str(place))
    if damage == "unwritable":
        place.write_text("a file, not a folder")
    else:
        open_source(str(root))
        for file in place.iterdir():
            file.write_bytes(file.read_bytes()[:50])
    assert len(open_source(str(root)).train) == 6
    assert ("is ignored" in caplog.text) == (damage == "truncated")
    assert ("nothing is cached" in caplog.text) == (damage == "unwritable")


def test_nothing_large_is_kept(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DNW_CACHE", str(root / "cache"))
    monkeypatch.setattr(cache, "MOST", 100)
    open_source(str(root))
    assert not (root / "cache").exists()


def resident(root: Path, **options: object) -> ResidentBatches:
    source = open_source(str(root), dataset="cifar10")
    return ResidentBatches(source, **{"image_size": 32, "batch_size": 3, **options})


def test_resident_batches_depend_on_seed_epoch_and_step_alone(tmp_path: Path) -> None:
    root = small(tmp_path)
    first = list(resident(root).train(epoch=1))
    assert [images.shape for images, _ in first] == [(3, 3, 32, 32)] * 3
    again, rest = list(resident(root).train(epoch=1)), list(resident(root).train(1, first_step=2))
    for batch, same in [*zip(first, again, strict=True), (first[2], rest[0])]:
        assert all(torch.equal(a, b) for a, b in zip(batch, same, strict=True))
    for other in (resident(root).train(epoch=2), resident(root, seed=1).train(epoch=1)):
        assert not all(torch.equal(x[0], y[0]) for x, y in zip(first, other, strict=True))


def test_resident_batches_hold_what_others_do(tmp_path: Path) -> None:
    root = small(tmp_path)
    source = open_source(str(root), dataset="cifar10")
    assert fits(source)
    assert not fits(open_source(str(root)))  # photographs are cropped one by one
    theirs = Batches(source, image_size=16, batch_size=4)
    ours = resident(root, image_size=16, batch_size=4)
    for (x, a), (y, b) in zip(theirs.validation(), ours.validation(), strict=True):
        assert torch.equal(x, y)
        assert torch.equal(a, b)
    for (_, a), (_, b) in zip(theirs.train(3), ours.train(3), strict=True):
        assert torch.equal(a, b)  # the same order
    with pytest.raises(ValueError, match="--batch-size 11 is larger than the 10 training images"):
        resident(root, batch_size=11).check()


def test_a_shift_moves_and_mirrors_each_image_on_its_own() -> None:
    images = torch.arange(1, 1 + 64 * 32 * 32).reshape(64, 1, 32, 32)
    moved = shift(images, moves(64, 32, torch.Generator().manual_seed(0)))
    assert torch.equal(moved, shift(images, moves(64, 32, torch.Generator().manual_seed(0))))
    seen = set()
    for before, after in zip(images[:, 0], moved[:, 0], strict=True):
        padded = torch.nn.functional.pad(before, [4] * 4)
        places = {
            (dy, dx, mirrored)
            for dy in range(9)
            for dx in range(9)
            for mirrored in (False, True)
            if torch.equal(after.flip(1) if mirrored else after, padded[dy : dy + 32, dx : dx + 32])
        }
        assert len(places) == 1
        seen |= places
    assert len(seen) > 40
    assert {dy for dy, _, _ in seen} == {dx for _, dx, _ in seen} == set(range(9))


def gathered(batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> list[bytes]:
    return [image.numpy().tobytes() for images, _ in batches for image in images]


@pytest.mark.parametrize("kind", [Batches, ResidentBatches])
@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_what_one_would_see(
    tmp_path: Path, kind: type[Batches] | type[ResidentBatches], world_size: int
) -> None:
    source = open_source(str(small(tmp_path, number=10)), dataset="cifar10")
    settings: dict[str, Any] = {"image_size": 32, "batch_size": 6}
    whole = kind(source, **settings)
    parts = [
        kind(source, **settings, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    shared = zip(*(part.train(2, first_step=1) for part in parts), strict=True)
    for (images, labels), several in zip(whole.train(2, first_step=1), shared, strict=True):
        assert {len(x) for x, _ in several} == {6 // world_size}
        for rank, (x, y) in enumerate(several):
            assert torch.equal(x, images[rank::world_size])
            assert torch.equal(y, labels[rank::world_size])
    held_out = [image for part in parts for image in gathered(part.validation())]
    assert sorted(held_out) == sorted(gathered(whole.validation()))
    assert parts[0].steps == whole.steps == 3


def test_augmentation_of_an_image_depends_on_no_batch(root: Path) -> None:
    source = open_source(str(root))
    seen = [set(gathered(batches(source, batch_size=size).train(epoch=4))) for size in (1, 2, 3, 6)]
    assert len(seen[0]) == 6
    assert all(other == seen[0] for other in seen)
    assert not seen[0] & set(gathered(batches(source).train(epoch=5)))


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (900, 100), (40, 400), (1, 1)])
def test_parts_are_distributed_as_torchvision_draws_them(size: tuple[int, int]) -> None:
    theirs = v2.RandomResizedCrop(8)
    torch.manual_seed(0)
    image, number = torch.empty(3, *size), 1500
    drawn = [tuple(theirs.make_params([image]).values()) for _ in range(number)]
    ours = [random_part(*size, random.Random(i)) for i in range(number)]
    for a, b in zip(np.array(drawn).T, np.array(ours).T, strict=True):
        assert ks_2samp(a, b).pvalue > 1e-3


def test_pictures_are_resized_as_torchvision_does(root: Path) -> None:
    image = read_image(root / "train" / "cat" / "0.png")
    expected = v2.functional.resize(image.contiguous(), [12, 12])
    assert torch.equal(training_transform("none", 12)(image, random.Random(0)), expected)


@pytest.mark.parametrize("change", ["", "exif", "grey", "progressive", "rgb", "cmyk", "ends"])
def test_jpegs_have_the_pixels_that_pil_reads(tmp_path: Path, change: str) -> None:
    path = tmp_path / "x.jpg"
    values = np.random.default_rng(0).integers(0, 255, (40, 33, 3), np.uint8)
    picture = Image.fromarray(values).resize((120, 90))
    exif = Image.Exif()
    exif[0x0112] = 3 if change == "exif" else 1
    kinds: dict[str, dict[str, Any]] = {
        "exif": {"exif": exif},
        "progressive": {"progressive": True},
        "rgb": {"keep_rgb": True},
    }
    mode = {"grey": "L", "cmyk": "CMYK"}.get(change, "RGB")
    picture.convert(mode).save(path, **kinds.get(change, {}))
    if change == "ends":
        path.write_bytes(path.read_bytes()[:-2] + b"\xff\xd9")
    upright = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    assert np.array_equal(read_image(path).permute(1, 2, 0).numpy(), np.asarray(upright))


def test_pictures_of_one_pixel_are_ordinary(root: Path) -> None:
    for split in ("train", "val"):
        for kind in ("png", "jpg"):
            Image.new("RGB", (1, 1), "red").save(root / split / "cat" / f"dot.{kind}")
    ours = batches(open_source(str(root)), batch_size=8)
    assert [images.shape for images, _ in ours.train(0)] == [(8, 3, 12, 12)]
    assert sum(len(labels) for _, labels in ours.validation()) == 6


def break_enormous(root: Path) -> str:
    """Claim 60,000 x 60,000 pixels in a file of a few bytes."""
    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")]
    data = b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )
    (root / "train" / "dog" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    return r"train/dog/1.png cannot be read as an image \(Image size \(3600000000 pixels\) exceeds"


def break_deep(root: Path) -> str:
    Image.new("I", (4, 4)).save(root / "train" / "dog" / "1.tif")
    (root / "train" / "dog" / "1.png").unlink()
    return r"train/dog/1.tif cannot be read as an image \(32 bits per channel"


HARMED = [break_file, break_link, break_end, break_enormous, break_deep]


@pytest.mark.parametrize("damage", HARMED)
@pytest.mark.parametrize("share", [0.0, 0.25])
def test_bad_images_are_left_out_and_counted(
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[Path], str],
    share: float,
) -> None:
    monkeypatch.setattr("train.data.folders.MEMORY_SHARE", share)
    message = damage(root)
    for _ in range(2):  # nothing is kept that would hide what is bad
        caplog.clear()
        ours = batches(open_source(str(root), bad_images="skip"), batch_size=3, workers=2)
        for epoch in range(3):
            assert sum(len(labels) for _, labels in ours.train(epoch)) in (3, 5, 6)
        seen = [*gathered(ours.train(0)), *gathered(ours.validation())]
        assert len(seen) <= 10
        assert ours.bad.count == 1
        place, reason = next(iter(ours.bad.paths.items()))
        assert re.search(message.partition(" cannot")[0], place)
        assert sum(place in line and reason in line for line in caplog.messages) == 1
    with pytest.raises(ValueError, match=message + ".*--bad-images skip"):
        list(batches(open_source(str(root))).train(0)) + list(
            batches(open_source(str(root))).validation()
        )


def test_labels_stay_with_their_images_where_some_are_left_out(root: Path) -> None:
    (root / "train" / "cat" / "0.png").write_bytes(b"no picture")
    source = open_source(str(root), bad_images="skip")
    assert source.train.labels.tolist() == [0, 0, 1, 1, 1]
    for i, name in enumerate(["cat/1", "cat/2", "dog/0"]):
        assert torch.equal(source.train[i], read_image(root / "train" / f"{name}.png"))


def test_a_class_or_batch_of_which_nothing_is_left(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.data.folders.MEMORY_SHARE", 0.0)
    source = open_source(str(root), bad_images="skip")
    for file in (root / "train" / "dog").iterdir():
        file.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"no image of a batch can be read"):
        list(batches(source, batch_size=1).train(0))
    with pytest.raises(
        ValueError, match=r"none of the 3 images in class folder \S+/train/dog can be read"
    ):
        open_source(str(root), bad_images="skip")


def test_large_pictures_are_read_up_to_twice_the_limit_of_pil(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # pytest asks for errors
    for name in ("x.png", "x.jpg"):
        picture(tmp_path / name, size=(20, 16))
        for limit, good in ((400, True), (200, True), (150, False)):
            monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
            if good:
                assert read_image(tmp_path / name).shape == (3, 16, 20)
                continue
            with pytest.raises(ValueError, match=f"{name} cannot be read .*exceeds limit of 300"):
                read_image(tmp_path / name)


def test_nothing_is_said_of_large_pictures(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from PIL import Image
from train.data.read import read_image
Image.MAX_IMAGE_PIXELS = 200
read_image(Path({str(picture(tmp_path / "x.png", size=(20, 16)))!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stderr == ""


def test_workers_leave_interrupts_to_the_main_process(root: Path) -> None:
    before = psutil.Process().children()  # of Python's own, for tests before this one
    ours = batches(open_source(str(root)), workers=2, batch_size=1)
    loaded = ours.train(0)
    first = [next(loaded)]
    workers = [child for child in psutil.Process().children() if child not in before]
    workers = [worker for worker in workers if "resource_tracker" not in str(worker.cmdline())]
    assert len(workers) == 2
    for worker in workers:
        subprocess.run(["kill", "-INT", str(worker.pid)], check=True)
        subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)  # not from their parent
    assert len([*first, *loaded]) == 6
    assert len(list(ours.train(1))) == 6
    for worker in workers:
        worker.terminate()  # from their parent
    assert not psutil.wait_procs(workers, timeout=10)[1]


def test_batches_that_are_kept_stay_as_they_are(root: Path) -> None:
    source = open_source(str(root))
    ours = batches(source, workers=1, batch_size=1)
    kept = [gathered(ours.train(epoch)) for epoch in range(3)]
    stopped = ours.train(0)
    next(stopped)
    stopped.close()
    kept.append(gathered(list(ours.train(3))))
    one_by_one = batches(source, batch_size=1)
    assert kept == [gathered(one_by_one.train(epoch)) for epoch in range(4)]


@pytest.mark.parametrize(
    ("free", "expected"), [(64, 1), (110, 2), (200, 4), (10_000, 4), (40, 0), (0, 0)]
)
def test_there_are_as_many_workers_as_shared_memory_allows(
    free: int,
    expected: int,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    batch = 3 * 224 * 224 * 48  # 7.2 MB
    usage = shutil.disk_usage(tmp_path)._replace(free=free * 10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert workers_that_fit(4, batch) == expected
    said = f"{free} MB free, but 4 worker processes need 145 MB, so {expected} are started"
    assert (said in caplog.text) == (expected < 4)
    assert workers_that_fit(0, batch) == 0
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0))
    loaded = batches(open_source(str(root)), batch_size=3, workers=2)  # without them it works too
    assert len(gathered(loaded.train(0))) == 6


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="this system has no /dev/shm")
def test_batches_within_shared_memory_of_64_mb(tmp_path: Path) -> None:
    """Run in a container's 64 MB, where a new mount is allowed, with pictures that fill it."""
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            for i in range(60):
                picture(tmp_path / "images" / split / name / f"{i}.png", size=(64, 64))
    code = f"""
from train.data import Batches, open_source
import train.data.folders
train.data.folders.MEMORY_SHARE = 0.0
source = open_source({str(tmp_path / "images")!r})
loaded = Batches(source, image_size=224, batch_size=48, workers=4)
print(sum(len(x) for x, _ in loaded.train(0)), sum(len(x) for x, _ in loaded.validation()))
"""
    script = 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$0" -W ignore -c "$1"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, sys.executable, code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip(f"no mount of its own here: {done.stderr.splitlines()[0]}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["96", "120"]
    assert "but 4 worker processes need 145 MB" in done.stderr


def test_digits_are_called_digits() -> None:
    for options in (
        {"data": "digits"},
        {"dataset": "digits"},
        {"data": "digits", "dataset": "cifar10"},
    ):
        stored = Options.from_flat(options)
        assert (stored.data.data, stored.data.dataset) == ("digits", "digits")
    with pytest.raises(ValueError, match=r"--data photos is not .* digits: use --dataset"):
        Options.from_flat({"data": "photos", "dataset": "digits"})
