"""Images in WebDataset shards."""

import gc
import io
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from train.data import BadImages, Batches, cache, open_source, read_image, tar_index
from train.data.patterns import expand
from train.data.shards import ShardImages
from train.data.tar_index import index

Members = Iterable[tuple[str, bytes]]


def png(number: int) -> bytes:
    file = io.BytesIO()
    values = np.random.default_rng(number).integers(0, 255, (16, 18 + number % 3, 3), np.uint8)
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()


def sample(number: int, label: object) -> Members:
    return [(f"n/{number:04}.png", png(number)), (f"n/{number:04}.cls", str(label).encode())]


def write(path: Path, members: Members) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a folder of three training shards of three samples, and one to measure on."""
    for shard in range(3):
        samples = (sample(3 * shard + i, i % 2) for i in range(3))
        write(tmp_path / f"train-{shard:03}.tar", [part for one in samples for part in one])
    write(tmp_path / "val-000.tar", [*sample(20, 0), *sample(21, 1), *sample(22, 1)])
    return tmp_path


def pattern(root: Path) -> str:
    return str(root / "train-{000..002}.tar")


def test_samples_are_those_that_were_written(root: Path, tmp_path: Path) -> None:
    source = open_source(pattern(root))
    assert source.classes == ("0", "1")
    assert (source.place, source.split) == (pattern(root), "val")
    assert source.train.labels.tolist() == [0, 1, 0] * 3
    assert source.validation.labels.tolist() == [0, 1, 1]
    for i in range(9):
        (tmp_path / "x.png").write_bytes(png(i))
        assert torch.equal(source.train[i], read_image(tmp_path / "x.png"))
    assert source.fingerprint() == open_source(pattern(root)).fingerprint()
    some = open_source(pattern(root), train_images=3)
    assert some.train.labels.tolist() == [0, 1, 0]
    assert torch.equal(some.train[2], source.train[2])


@pytest.mark.parametrize(
    "given", ["train-*.tar", "train-00{0..2}.tar", "train-{000,001,002}.tar", ""]
)
def test_patterns_and_a_folder_mean_the_same(root: Path, given: str) -> None:
    fingerprint = open_source(pattern(root)).fingerprint()
    assert open_source(str(root / given)).fingerprint() == fingerprint


def test_ranges_are_padded_as_they_are_written(tmp_path: Path) -> None:
    names = [f"{a}{b}.tar" for a in "xy" for b in ("8", "9", "10")]
    for name in names:
        (tmp_path / name).touch()
    found = expand(str(tmp_path / "{x,y}{8..10}.tar"), "--data")
    assert [path.name for path in found] == names
    with pytest.raises(ValueError, match=r"2 of 3 shards are missing: \S+x08.tar, \S+x09.tar$"):
        expand(str(tmp_path / "x{08..10}.tar"), "--data")


def test_batches_of_shards_are_the_same_for_any_number_of_workers(root: Path) -> None:
    ours = [
        list(Batches(open_source(str(root)), image_size=8, batch_size=4, workers=n).train(1))
        for n in (0, 2)
    ]
    for (x, a), (y, b) in zip(*ours, strict=True):
        assert torch.equal(x, y)
        assert torch.equal(a, b)


def test_names_of_classes_stand_beside_the_shards(root: Path) -> None:
    (root / "classes.txt").write_text("cat\ndog\nfox\n")
    assert open_source(str(root)).classes == ("cat", "dog", "fox")
    (root / "classes.txt").write_text("cat\n")
    with pytest.raises(
        ValueError, match=r"train-000.tar: n/0001 has the label 1, .* names 1 class"
    ):
        open_source(str(root))


def test_only_the_held_out_shards_are_needed_to_measure(root: Path) -> None:
    source = open_source(str(root), training=False)
    assert (len(source.train), len(source.validation)) == (0, 3)
    other = write(root / "held.tar", sample(30, 1))
    given = open_source(pattern(root), validation_data=str(other))
    assert given.validation.labels.tolist() == [1]


def keep_one(root: Path) -> str:
    for shard in root.glob("train-00[01].tar"):
        shard.unlink()
    return r"--data \S+: 2 of 3 shards are missing: \S+train-000.tar, \S+train-001.tar$"


def pack(root: Path) -> str:
    (root / "train-001.tar").rename(root / "train-001.tar.gz")
    return r"1 shards are compressed.*train-001.tar.gz; unpack them"


def no_held_out(root: Path) -> str:
    (root / "val-000.tar").unlink()
    return (
        r"has no validation shards.* holds no val\*.tar or test\*.tar; pass them with --validation"
    )


def no_label(root: Path) -> str:
    write(root / "train-001.tar", [*sample(3, 0), ("n/0004.png", png(4)), *sample(5, 1)])
    return r"train-001.tar: n/0004 is not a sample \(it has no label \(.cls\)\)"


def no_image(root: Path) -> str:
    write(root / "train-001.tar", [*sample(3, 0), ("n/0004.cls", b"1")])
    return r"train-001.tar: n/0004 is not a sample \(it has no image"


def no_number(root: Path) -> str:
    write(root / "train-001.tar", [*sample(3, 0), *sample(4, "cat")])
    return r"train-001.tar: n/0004 is not a sample \(its .cls must hold a number .* not 'cat'\)"


def truncated(root: Path) -> str:
    shard = root / "train-001.tar"
    with tarfile.open(shard) as tar:
        last = tar.getmembers()[-2]  # the image of the third sample
    shard.write_bytes(shard.read_bytes()[: last.offset_data + 20])
    return r"train-001.tar cannot be read to its end \(it ends within n/0005.png\)"


def cut_between_samples(root: Path) -> str:
    shard = root / "train-001.tar"
    with tarfile.open(shard) as tar:
        last = tar.getmembers()[-2]
    shard.write_bytes(shard.read_bytes()[: last.offset])
    return r"train-001.tar cannot be read to its end \(it is cut off or damaged at byte [\d,]+\)"


def no_tar(root: Path) -> str:
    (root / "train-001.tar").write_bytes(b"no tar at all" * 100)
    return r"train-001.tar cannot be read to its end \("


HARMED = [no_label, no_image, no_number, truncated, cut_between_samples, no_tar]


@pytest.mark.parametrize("harm", [keep_one, *HARMED, pack, no_held_out])
def test_shards_with_mistakes(root: Path, harm: Any) -> None:
    message = harm(root)
    given = pattern(root) if harm is keep_one else str(root)
    with pytest.raises(ValueError, match=message):
        open_source(given)


@pytest.mark.parametrize(("harm", "left"), [*zip(HARMED, [8, 7, 7, 8, 8, 6], strict=True)])
def test_what_is_readable_is_used_where_bad_images_are_skipped(
    root: Path, harm: Any, left: int
) -> None:
    harm(root)
    for _ in range(2):  # nothing of it is kept that would hide what is bad
        source = open_source(str(root), bad_images="skip")
        assert len(source.train) == left
        assert source.bad.count == 1
        assert "train-001.tar" in next(iter(source.bad.paths))


@pytest.mark.parametrize("skip", [False, True])
def test_a_bad_image_is_named_by_shard_and_sample(root: Path, skip: bool) -> None:
    broken = [("n/0004.png", png(4)[:-100]), ("n/0004.cls", b"1")]
    write(root / "train-001.tar", [*sample(3, 0), *broken, *sample(5, 1)])
    source = open_source(str(root), bad_images="skip" if skip else "fail")
    batches = Batches(source, image_size=8, batch_size=3, workers=1)
    if skip:
        assert sum(len(labels) for _, labels in batches.train(0)) == 8
        assert list(batches.bad.paths) == [f"{root}/train-001.tar: n/0004"]
    else:
        with pytest.raises(ValueError, match=r"train-001.tar: n/0004 cannot be read as an image"):
            list(batches.train(0))


def test_where_samples_are_is_found_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DNW_CACHE", str(root / "cache"))
    scanned: list[Path] = []
    scan = tar_index._scan
    monkeypatch.setattr(tar_index, "_scan", lambda shard: scanned.append(shard) or scan(shard))
    first = open_source(str(root)).train
    again = open_source(str(root)).train
    assert len(scanned) == 4
    assert isinstance(first, ShardImages)
    assert isinstance(again, ShardImages)
    assert np.array_equal(first.offsets, again.offsets)
    assert {file.suffix for file in cache.folder().iterdir()} == {".safetensors"}
    write(root / "train-000.tar", [*sample(0, 1), *sample(1, 0)])
    assert open_source(str(root)).train.labels.tolist() == [1, 0] + [0, 1, 0] * 2
    assert len(scanned) == 5


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # it leaves files open
def test_samples_are_those_of_the_package_webdataset(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset", reason="compares with the package webdataset")
    with webdataset.ShardWriter(str(tmp_path / "train-%03d.tar"), maxcount=4, verbose=0) as writer:
        for i in range(10):
            key = f"a.b/c{i % 8}"  # a dot in the folder; two names that come again
            data = {"png": png(i), "cls": i % 3, "json": {"i": i}, "seg.png": png(i + 50)}
            writer.write({"__key__": key, **data})
    with webdataset.TarWriter(str(tmp_path / "test-0.tar")) as held_out:
        held_out.write({"__key__": "x", "png": png(30), "cls": 2})
    gc.collect()
    source = open_source(str(tmp_path / "train-{000..002}.tar"))
    shards = sorted(map(str, tmp_path.glob("train-*.tar")))
    theirs = list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False))
    gc.collect()
    assert len(theirs) == len(source.train) == 10
    assert (source.split, source.classes) == ("test", ("0", "1", "2"))
    for i, one in enumerate(theirs):
        (tmp_path / "x.png").write_bytes(one["png"])
        assert torch.equal(source.train[i], read_image(tmp_path / "x.png"))
        assert int(one["cls"]) == int(source.train.labels[i])


def test_long_names_and_an_index_of_them(tmp_path: Path) -> None:
    name = "n" * 150 + "/" + "m" * 120
    shard = write(tmp_path / "x.tar", [(f"{name}.JPEG", b"a"), (f"{name}.cls", b" 7\n")])
    found = index(shard, BadImages())
    assert shard.read_bytes()[int(found.offsets[0])] == ord("a")
    assert found.labels.tolist() == [7]
    assert tar_index.name_at(shard, int(found.offsets[0])) == f"{shard}: {name}"
