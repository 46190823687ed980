"""Folders of images as other people's machines have them."""

import json
import os
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from train.data import cache, open_source, read_image
from train.evaluate import evaluate
from train.imagenet import train
from train.options import Options
from train.predict import main as predict


def picture(path: Path, value: int = 0, size: tuple[int, int] = (18, 16)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(value).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(values).save(path)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a folder of two classes, six training and four validation images."""
    root = tmp_path / "images"
    for split, number in (("train", 3), ("val", 2)):
        for label, name in enumerate(("cat", "dog")):
            for i in range(number):
                picture(root / split / name / f"{i}.png", 100 * label + i)
    return root


def sizes(root: Path) -> tuple[list[int], list[int]]:
    """Return how many images of each class there are for training and for validation."""
    source = open_source(str(root))
    return source.train.labels.bincount().tolist(), source.validation.labels.bincount().tolist()


@pytest.mark.parametrize("hidden", [".ipynb_checkpoints", ".git/objects", "a/.thumbs/b"])
def test_hidden_folders_are_ignored(root: Path, hidden: str) -> None:
    for i in range(4):
        picture(root / "train" / "cat" / hidden / f"{i}.png", i)
    picture(root / "train" / "cat" / "a" / "seen.png")
    assert sizes(root) == ([4, 3], [2, 2])


@pytest.mark.parametrize(
    "links",
    [
        {"cat/all": "."},
        {"cat/back": ".."},
        {"cat/one": ".", "cat/two": "."},
        {"cat/one": "../dog", "dog/two": "../cat"},
        {"cat/root": "../.."},
        {"cat/sub": "../dog/inner"},
        {"dog/inner/up": "../inner"},
    ],
    ids=str,
)
def test_a_folder_is_read_once_and_as_its_own_class(root: Path, links: dict[str, str]) -> None:
    picture(root / "train" / "dog" / "inner" / "x.png", 7)
    for link, target in links.items():
        (root / "train" / link).symlink_to(target)
    assert sizes(root) == ([3, 4], [2, 2])


def test_links_to_folders_elsewhere_are_followed(root: Path, tmp_path: Path) -> None:
    for i in range(2):
        picture(tmp_path / "more" / "deeper" / f"{i}.png", i)
    (root / "train" / "cat" / "more").symlink_to(tmp_path / "more")
    (root / "train" / "cat" / "again").symlink_to(tmp_path / "more")
    shutil.move(root / "val" / "dog", tmp_path / "held")
    (root / "val" / "dog").symlink_to(tmp_path / "held")
    assert sizes(root) == ([5, 3], [2, 2])


def test_two_classes_that_are_one_folder_are_an_error(root: Path) -> None:
    (root / "train" / "kitten").symlink_to("cat")
    (root / "val" / "kitten").symlink_to("cat")
    with pytest.raises(ValueError, match=r"train/cat and \S+train/kitten are the same folder"):
        open_source(str(root))


def test_a_link_to_itself_is_named(root: Path) -> None:
    (root / "train" / "cat" / "loop.png").symlink_to("loop.png")
    with pytest.raises(ValueError, match=r"loop.png cannot be read as an image"):
        open_source(str(root))


def with_equal_times(path: Path) -> Path:
    os.utime(path, (1, 1))
    return path


@pytest.mark.parametrize("change", ["renamed files", "renamed folders", "content", "copies"])
def test_files_of_equal_size_and_time_that_change_places_are_read_again(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    monkeypatch.setenv("DNW_CACHE", str(tmp_path / "cache"))
    for path in root.rglob("*.png"):
        image = Image.open(path)
        image.save(path.with_suffix(".bmp"))
        path.unlink()
        with_equal_times(path.with_suffix(".bmp"))
    one, other = (root / "train" / name / "0.bmp" for name in ("cat", "dog"))
    assert one.stat().st_size == other.stat().st_size
    before = open_source(str(root)).train
    held = tmp_path / "held"
    if change == "renamed files":
        one.rename(held), other.rename(one), held.rename(other)
    elif change == "renamed folders":
        one.parent.rename(held), other.parent.rename(one.parent), held.rename(other.parent)
    elif change == "content":
        first, second = one.read_bytes(), other.read_bytes()
        one.write_bytes(second), other.write_bytes(first)
    else:
        shutil.copy2(one, held), shutil.copy2(other, one), shutil.copy2(held, other)
    with_equal_times(one), with_equal_times(other)
    after = open_source(str(root)).train
    assert torch.equal(after[0], before[3])
    assert torch.equal(after[3], before[0])


def test_files_that_change_while_they_are_read_are_read_again(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DNW_CACHE", str(tmp_path / "cache"))
    path = root / "train" / "cat" / "0.png"

    def read_then_change(read: Path) -> torch.Tensor:
        image = read_image(read)
        if read == path:
            picture(path, 55)
        return image

    monkeypatch.setattr("train.data.images.read_image", read_then_change)
    open_source(str(root))
    monkeypatch.undo()
    monkeypatch.setenv("DNW_CACHE", str(tmp_path / "cache"))
    assert torch.equal(open_source(str(root)).train[0], read_image(path))


def test_without_a_home_directory_nothing_is_cached(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_home(*_: object) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("DNW_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert cache.folder() is None
    assert len(open_source(str(root)).train) == 6


def test_a_user_without_entry_and_home_can_train(root: Path, tmp_path: Path) -> None:
    code = """
import pwd
def missing(*_):
    raise KeyError("uid not found")
pwd.getpwuid = pwd.getpwnam = missing  # as for an arbitrary uid in a container
from train.imagenet import main
main()
"""
    flags = "--graph tiny_static --image-size 8 --epochs 1 --batch-size 3 --no-report"
    out = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-c", code, *flags.split(), f"--data={root}", f"--out={out}"],
        env={k: v for k, v in os.environ.items() if k not in ("HOME", "DNW_CACHE", "USER")},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "summary.json").read_text())["top1"] >= 0


COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))


def test_class_names_in_another_unicode_form_are_the_same_class(root: Path) -> None:
    (root / "train" / "cat").rename(root / "train" / f"caf{COMPOSED}")
    (root / "val" / "cat").rename(root / "val" / f"caf{DECOMPOSED}")
    assert open_source(str(root)).classes == (f"caf{COMPOSED}", "dog")
    picture(root / "train" / f"caf{DECOMPOSED}" / "more.png", 9)
    assert sizes(root) == ([4, 3], [2, 2])


def test_a_class_without_validation_images_is_said_once(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    picture(root / "train" / "emu" / "0.png")
    assert sizes(root) == ([3, 3, 1], [2, 2])
    assert caplog.text.count("val has no images of 1 of the 3 classes (emu)") == 1
    (root / "val" / "emu").mkdir()
    assert sizes(root) == ([3, 3, 1], [2, 2])
    shutil.rmtree(root / "val" / "cat")
    assert open_source(str(root)).validation.labels.tolist() == [1, 1]
    for path in (root / "val" / "dog").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="val holds no images"):
        open_source(str(root))


def test_a_class_without_training_images_is_an_error(root: Path) -> None:
    picture(root / "val" / "emu" / "0.png")
    with pytest.raises(ValueError, match=r"val has class folders .* 2 classes .*: emu; rename"):
        open_source(str(root))


def options(root: Path, out: Path, **more: object) -> Options:
    return Options.from_flat(
        {
            **{"data": str(root), "out": str(out), "graph": "tiny_static", "image_size": 16},
            **{"epochs": 1, "batch_size": 3, "lr": 0.05, "report": False, "workers": 0},
            **more,
        }
    )


def test_a_network_is_measured_on_the_classes_that_are_there(root: Path, tmp_path: Path) -> None:
    for i in range(2):
        picture(root / "train" / "emu" / f"{i}.png", i)
    out = tmp_path / "run"
    assert train(options(root, out))["top1"] >= 0
    whole = evaluate(str(out))
    shutil.rmtree(root / "val" / "cat")
    part = evaluate(str(out))
    assert part["loss"] != whole["loss"]
    names = [name for name, _ in _guesses(out, root / "val" / "dog" / "0.png")]
    assert set(names) == {"cat", "dog", "emu"}


def _guesses(out: Path, path: Path) -> list[tuple[str, float]]:
    from train.predict import Predictor

    return Predictor(out)(path)


@pytest.mark.skipif(sys.platform != "linux", reason="needs file names that are any bytes")
@pytest.mark.parametrize("name", [b"caf\xe9", b"\xff\xfe"])
def test_class_names_that_are_not_text_can_be_trained_and_predicted(
    root: Path, tmp_path: Path, name: bytes
) -> None:
    for split in ("train", "val"):
        (root / split / "cat").rename(root / split / os.fsdecode(name))
    out = tmp_path / "run"
    train(options(root, out))
    image = root / "val" / "dog" / "0.png"
    done = subprocess.run(
        [sys.executable, "-m", "train.predict", str(out), str(image), str(image)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("dog") == 4  # path and class, twice
    assert "\\udc" in done.stdout or "\\x" in done.stdout


@pytest.mark.parametrize("suffix", ["pgm", "pbm", "jfif", "jpe", "avif", "jp2", "ico", "TIFF"])
def test_whatever_pillow_reads_is_an_image(root: Path, suffix: str) -> None:
    path = root / "train" / "cat" / f"other.{suffix}"
    mode = {"pgm": "L", "pbm": "1"}.get(suffix, "RGB")
    Image.new(mode, (16, 16)).save(path)
    assert sizes(root) == ([4, 3], [2, 2])


@pytest.mark.parametrize("suffix", ["txt", "json", "h5", "mpg", "eps", "npy", "pdf", "wmf"])
def test_what_pillow_does_not_decode_is_ignored(
    root: Path, suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    (root / "train" / "cat" / f"other.{suffix}").write_bytes(b"1")
    assert sizes(root) == ([3, 3], [2, 2])
    assert f"1 files are ignored: they are not images, or not in a class folder (1 .{suffix})" in (
        caplog.text
    )


def test_predict_is_a_command(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "run"
    train(options(root, out))
    predict([str(out), str(root / "val" / "dog" / "0.png")])
    assert "dog" in capsys.readouterr().out
