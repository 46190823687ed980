"""Classify images: ``python -m train.predict RUN IMAGE…``."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from train.choices import Weights
from train.cli import run_command
from train.provenance import how_to_run
from train.run import RunFolder

Guess = tuple[str, float]  # class name and probability


class Predictor:
    """Classifies images with a run's network.

    Args:
        run: The run folder.
        weights: ``"last"``, ``"best"`` or ``"initial"``.
        device: As for training.

    Raises:
        ValueError: If this is not a run folder, or the device does not exist.
    """

    def __init__(self, run: str | Path, weights: Weights = "last", device: str = "auto") -> None:
        from train.data import evaluation_transform
        from train.metrics import Normalize
        from train.process_group import make_fabric

        folder = RunFolder(run)
        self.config = folder.load_config()
        fabric = make_fabric(device, self.config.options.run.precision)
        self._device = fabric.device
        self._model = fabric.setup(folder.load_model(weights))
        self._normalize = Normalize(self.config.mean, self.config.std).to(fabric.device)
        size = self.config.options.data.image_size
        self._transform = evaluation_transform(self.config.augmentation, size)

    def __call__(self, path: str | Path, most: int = 5) -> list[Guess]:
        """Return up to ``most`` classes of an image with their probabilities, likeliest first.

        Raises:
            ValueError: If the file is not an image; the message names it. Or if ``most`` is below
                1.
        """
        from train.data import read_image

        if most < 1:
            raise ValueError(f"most must be 1 or more, got {most}")
        image = self._transform(read_image(Path(path))).unsqueeze(0).to(self._device)
        with torch.inference_mode():
            probabilities = self._model(self._normalize(image)).float().softmax(1)[0]
        best = probabilities.topk(min(most, len(self.config.classes)))
        pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        return [(self.config.classes[index], value) for value, index in pairs]


@dataclass(frozen=True)
class Arguments:
    """Classify images: print the five likeliest classes of each."""

    run: Annotated[str, tyro.conf.Positional]
    """Run folder."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Images of any format and size."""
    weights: Weights = "last"
    """Which weights of the run."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto (a GPU if there is one)."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command; report and skip files that are not images, then exit with status 1."""
    arguments = tyro.cli(Arguments, args=args, prog="python -m train.predict")
    if not arguments.images:
        raise ValueError(f"no images: run {how_to_run('predict')} {arguments.run} IMAGE…")
    predict = Predictor(arguments.run, arguments.weights, arguments.device)
    failed = False
    for path in arguments.images:
        try:
            guesses = predict(path)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            failed = True
            continue
        print(path)
        for name, probability in guesses:
            print(f"  {probability:6.1%}  {name}")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
