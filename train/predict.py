"""Name what is in pictures: ``python -m train.predict RUN IMAGE…``."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from train.cli import run_command
from train.data import evaluation_transform, read_image
from train.metrics import Normalize
from train.process_group import make_fabric
from train.provenance import how_to_run
from train.run import RunFolder, Weights

Guess = tuple[str, float]  # class name and probability


class Predictor:
    """A run's network, ready for pictures.

    Args:
        run: The run folder.
        weights: ``"last"``, ``"best"`` or ``"initial"``.
        device: As for training.

    Raises:
        ValueError: Not a run folder, or a device that is not there.
    """

    def __init__(self, run: str | Path, weights: Weights = "last", device: str = "auto") -> None:
        folder = RunFolder(run)
        self.config = folder.load_config()
        fabric = make_fabric(device, self.config.options.run.precision)
        self._device = fabric.device
        self._model = fabric.setup(folder.load_model(weights))
        self._normalize = Normalize(self.config).to(fabric.device)
        size = self.config.options.data.image_size
        self._transform = evaluation_transform(self.config.augmentation, size)

    def __call__(self, path: str | Path, most: int = 5) -> list[Guess]:
        """Return the likeliest classes of a picture with their probabilities, best first.

        Raises:
            ValueError: The file is no picture, and the message names it; or ``most`` is below 1.
        """
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
    """Name what is in pictures: the five likeliest classes of each."""

    run: Annotated[str, tyro.conf.Positional]
    """Run folder."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Pictures of any kind and size."""
    weights: Weights = "last"
    """Which weights of the run."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto: a GPU if there is one."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command; a file that is no picture is said and skipped, and the exit status is 1."""
    arguments = tyro.cli(Arguments, args=args, prog="python -m train.predict")
    if not arguments.images:
        raise ValueError(f"no images given: {how_to_run('predict')} {arguments.run} IMAGE…")
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
