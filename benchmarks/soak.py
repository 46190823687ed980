"""Train for thousands of steps and check that memory, file handles and checkpoints do not grow.

    python -m benchmarks.soak                  # 3,000 steps on small images

A small network is trained on PNG files that a worker process loads, with a checkpoint every 20
steps and a record of the wiring every 50. Resident memory of both processes, open file handles,
threads and checkpoints are counted every 300 steps. Their values after the first 300 steps are the
limits for all later ones.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from train.loop import start_training
from train.options import Options

EVERY = 300
PER_EPOCH = 100
BATCH = 8


def write_images(root: Path) -> None:
    """Write images of 8x8 pixels in two classes, for 100 steps per epoch."""
    draw = np.random.default_rng(0)
    for split, number in (("train", PER_EPOCH * BATCH // 2), ("val", 8)):
        for label, name in enumerate(("dark", "light")):
            (root / split / name).mkdir(parents=True)
            for i in range(number):
                values = draw.integers(128 * label, 128 * label + 127, (8, 8, 3), np.uint8)
                Image.fromarray(values).save(root / split / name / f"{i}.png")


def sample(folder: Path) -> dict[str, float]:
    """Return the resources that this process and its workers use now."""
    parent = psutil.Process()
    processes = [parent, *parent.children(recursive=True)]
    return {
        "MB": sum(process.memory_info().rss for process in processes) / 1e6,
        "file handles": sum(process.num_fds() for process in processes),
        "threads": sum(process.num_threads() for process in processes),
        "checkpoints": len(list((folder / "checkpoints").iterdir())),
    }


def soak(steps: int, root: Path) -> list[dict[str, float]]:
    """Train, and return a sample for every 300 steps."""
    write_images(root / "images")
    options = Options.from_flat(
        {
            **{"graph": "tiny_static", "data": str(root / "images"), "image_size": 8},
            **{"batch_size": BATCH, "epochs": steps // PER_EPOCH, "workers": 1, "device": "cpu"},
            **{"out": str(root / "run"), "checkpoint_every": 20, "history_every": 50},
            **{"ema_decay": 0.99, "clip_grad_norm": 1.0, "report": False},
        }
    )
    training, samples = start_training(options), []
    while training.epoch < options.optimization.epochs:
        training.advance()
        if training.learner.steps % EVERY == 0:
            samples.append({"step": training.learner.steps, **sample(root / "run")})
            print(json.dumps(samples[-1]), flush=True)
    return samples


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3000)
    options = parser.parse_args(args)
    with tempfile.TemporaryDirectory() as root:
        first, *later = soak(options.steps, Path(root))
    maxima = {name: max(sample[name] for sample in later) for name in first}
    flat = maxima["MB"] <= 1.02 * first["MB"] + 5
    flat &= all(maxima[name] <= first[name] for name in ("file handles", "threads", "checkpoints"))
    print("flat" if flat else f"not flat: {first} after {EVERY} steps, later up to {maxima}")
    sys.exit(not flat)


if __name__ == "__main__":
    main()
