"""What befalls runs: images that cannot be read, loggers, thousands of steps."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.kills import ROOT, environment
from tests.train.test_step import TINY, options
from train.imagenet import resume, train
from train.loop import start_training


def picture(path: Path, mode: str = "RGB", size: tuple[int, int] = (12, 12)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(len(str(path))).integers(0, 255, (*size, 3), np.uint8)
    Image.fromarray(values).convert(mode).save(path)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Images of two classes; among those to learn from, one cut short and one that is none."""
    root = tmp_path / "images"
    for split, number in (("train", 9), ("val", 3)):
        for name in ("cat", "dog"):
            for i in range(number):
                picture(root / split / name / f"{i}.png")
    picture(root / "train" / "cat" / "cmyk.jpg", "CMYK")
    picture(root / "train" / "dog" / "pixel.png", size=(1, 1))
    cut = root / "train" / "dog" / "3.png"
    cut.write_bytes(cut.read_bytes()[:-60])
    return root


@pytest.mark.parametrize("on_disk", [False, True])
def test_bad_images_fail_or_are_skipped(
    on_disk: bool,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if on_disk:
        monkeypatch.setattr("train.data.folders.MEMORY_SHARE", 0.0)
    given = {"data": str(images), "batch_size": 6, "train_images": None, "validation_images": None}
    with pytest.raises(ValueError, match=r"train/dog/3.png cannot be read as an image .*--bad-im"):
        train(options(tmp_path / "fail", **given, workers=0, epochs=3))
    summary = train(options(tmp_path / "skip", **given, workers=0, epochs=3, bad_images="skip"))
    assert summary["bad_images"] == 1
    told = [line for line in caplog.messages if "3.png cannot be read" in line]
    assert len(told) == 1
    assert "is left out" in told[0]


def test_a_resumed_run_skips_what_it_skipped(images: Path, tmp_path: Path) -> None:
    (images / "train" / "cat" / "text.jpg").write_text("no picture")
    given = {"data": str(images), "batch_size": 6, "train_images": None, "validation_images": None}
    training = start_training(options(tmp_path / "run", **given, epochs=2, bad_images="skip"))
    training.advance()
    assert resume(tmp_path / "run")["bad_images"] == 2


def test_metrics_go_to_weights_and_biases_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="Weights & Biases is not installed: pip install wandb")
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in TINY.items() if k != "report"]
    command = [sys.executable, "-m", "train.imagenet", *flags, "--no-report", "--wandb=dnw"]
    done = subprocess.run(
        [*command, f"--out={tmp_path / 'run'}"],
        env={**environment(), "WANDB_MODE": "offline", "WANDB_SILENT": "true"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    train(options(tmp_path / "run", overwrite=True))  # a run's own folder


def test_without_weights_and_biases_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="pip install wandb"):
        start_training(options(tmp_path / "run", wandb="dnw"))


def test_nothing_piles_up_in_3000_steps() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.soak"],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "flat"
