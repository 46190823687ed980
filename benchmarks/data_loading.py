"""Compare the speed of loading batches of photographs with that of decoding alone.

    python -m benchmarks.data_loading [--data TAR] [--workers N] [--images 2000] [--repeats 5]

The images of a flat tar of JPEGs are copied repeatedly to a temporary folder, as a folder of
classes and as WebDataset shards. The benchmark times an epoch of training batches (224 pixels, 64
images, random part, mirrored, collated in the main process) and the decoding of the same images
from memory with the same number of processes. All candidates take turns in one process.
"""

import io
import os
import statistics
import tarfile
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import PIL
import torch
import torchvision
import tyro
from PIL import Image, features
from torchvision.io import ImageReadMode, decode_image

from benchmarks.measure import Timing, alternate, machine
from train.data import Batches, Source
from train.data.images import FileImages
from train.data.read import SUFFIXES, decode
from train.data.shards import shards

BATCH = 64
DATA = Path(__file__).parents[2] / "shared" / "data" / "imagenet-fullsize-32.tar"
SHARDS = 8


@dataclass(frozen=True)
class Arguments:
    """Time loading against decoding."""

    data: Path = DATA
    """Flat tar of JPEGs at their full size."""
    workers: int = os.cpu_count() or 1
    """Number of processes."""
    images: int = 2000
    """Images per epoch; rounded down to full batches."""
    repeats: int = 5
    """Number of timed rounds."""


def pil(data: bytes) -> object:
    """Decode an image with PIL."""
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


def vision(data: bytes) -> object:
    """Decode an image with torchvision."""
    return decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)


def project(data: bytes) -> object:
    """Decode an image as in training."""
    return decode(bytearray(data))


DECODERS = {
    "torchvision.io.decode_image, bare": vision,
    "PIL, bare": pil,
    "train.data.read.decode, bare": project,
}
contents: list[bytes] = []
"""The bytes of all images, each in separate memory, for forked processes."""


def begin() -> None:
    """Initialise a worker process."""
    torch.set_num_threads(1)


def decode_some(decoder: str, start: int) -> int:
    """Decode a batch and return the number of values of the last image."""
    run, image = DECODERS[decoder], None
    for i in range(start, start + BATCH):
        image = run(contents[i])
    return np.size(image)


def load_epoch(batches: Batches) -> None:
    """Load all training batches of one epoch."""
    for images, _ in batches.train(0):
        assert len(images) == BATCH


def write_folder(root: Path, files: Mapping[str, bytes], images: int) -> None:
    """Write a folder of classes, one class per file, repeating files up to ``images``."""
    names = list(files)
    for i in range(images):
        folder = root / "train" / names[i % len(names)]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.jpg").write_bytes(files[folder.name])


def write_shards(root: Path, files: Mapping[str, bytes], images: int) -> None:
    """Write training and validation shards, one class per file."""
    names = list(files)
    for split, number in (("train", images), ("val", len(names))):
        for shard in range(SHARDS):
            with tarfile.open(root / f"{split}-{shard:03}.tar", "w") as tar:
                for i in range(shard, number, SHARDS):
                    parts = {"jpg": files[names[i % len(names)]], "cls": b"%d" % (i % len(names))}
                    for suffix, data in parts.items():
                        member = tarfile.TarInfo(f"{i:06}.{suffix}")
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))


def sources(root: Path, images: int) -> dict[str, Source]:
    """Return sources for the same images as files and as shards, without decoded images."""
    packed = shards(str(root))
    paths = sorted((root / "train").rglob("*.jpg"), key=lambda path: int(path.stem))
    files = FileImages(paths, torch.arange(images) % len(packed.classes))
    return {"folder of classes": Source(**{**vars(packed), "train": files}), "shards": packed}


def ratio(one: Timing, other: Timing) -> str:
    """Return by how many percent ``one`` is slower than ``other``, paired by round."""
    parts = [100 * (1 - b / a) for a, b in zip(one.seconds, other.seconds, strict=True)]
    return f"{statistics.median(parts):.1f} ({min(parts):.1f}..{max(parts):.1f})"


def show(times: Mapping[str, Timing], images: int) -> None:
    """Print the rates as a table."""
    print("| | images/s | less than the decoder's, % |\n| --- | --- | --- |")
    bare = times[next(iter(DECODERS))]
    for name, time in times.items():
        rates = [images / t for t in (time.median, time.high, time.low)]
        print(
            f"| {name} | {rates[0]:,.0f} ({rates[1]:,.0f}..{rates[2]:,.0f}) | {ratio(time, bare)} |"
        )


def main() -> None:
    args = tyro.cli(Arguments, prog="python -m benchmarks.data_loading")
    if not args.data.is_file():
        raise SystemExit(
            f"{args.data} does not exist: pass a flat tar of full-size JPEGs as --data"
        )
    with tarfile.open(args.data) as tar:
        members = [m for m in tar if m.isfile() and Path(m.name).suffix.lower() in SUFFIXES]
        files = {Path(m.name).stem: tar.extractfile(m).read() for m in members}
    images = args.images // BATCH * BATCH
    names = list(files)
    contents.extend(bytes(bytearray(files[names[i % len(names)]])) for i in range(images))
    with (
        TemporaryDirectory() as folder,
        ProcessPoolExecutor(args.workers, initializer=begin) as pool,
    ):
        root = Path(folder)
        write_folder(root, files, images)
        write_shards(root, files, images)

        def bare(decoder: str) -> None:
            list(pool.map(partial(decode_some, decoder), range(0, images, BATCH)))

        runs: dict[str, Callable[[], object]] = {n: partial(bare, n) for n in DECODERS}
        for name, source in sources(root, images).items():
            batches = Batches(source, image_size=224, batch_size=BATCH, workers=args.workers)
            runs[name] = partial(load_epoch, batches)
        times = alternate(runs, args.repeats, "cpu")
    print(
        f"{machine('cpu')}, torchvision {torchvision.__version__}, PIL {PIL.__version__} with "
        f"libjpeg-turbo {features.version_feature('libjpeg_turbo')}, {args.workers} processes, "
        f"{images:,} images of {len(files)}\n"
    )
    show(times, images)


if __name__ == "__main__":
    main()
