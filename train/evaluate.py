"""Measure a trained network: ``python -m train.evaluate RUN [--data DIR]``."""

from dataclasses import dataclass, replace
from typing import Annotated

import tyro

from train.choices import Weights
from train.cli import as_text, run_command
from train.run import RunFolder


def evaluate(
    run: str, data: str | None = None, weights: Weights = "last", device: str = "auto"
) -> dict[str, float]:
    """Return ``loss``, ``top1`` and ``top5`` of a run on its validation images.

    Args:
        run: The run folder.
        data: Other images of the same classes, as for training. If None, the images of the run.
        weights: ``"last"``, ``"best"`` or ``"initial"``.
        device: As for training.

    Raises:
        ValueError: If this is not a run folder, there are no images (only ``val`` or ``test`` is
            needed), the classes differ, or the device does not exist.
    """
    from train.data import are_shards, make_batches, open_source
    from train.metrics import Normalize
    from train.metrics import evaluate as measure
    from train.process_group import make_fabric
    from train.start import check_classes

    folder = RunFolder(run)
    config = folder.load_config()
    fabric = make_fabric(device, config.options.run.precision)
    model = fabric.setup(folder.load_model(weights))
    data_options = config.options.data
    if data is not None:
        shards = data if are_shards(data) else None
        data_options = replace(
            data_options,
            data=data,
            dataset="imagenet" if data_options.dataset == "digits" else data_options.dataset,
            validation_images=None,
            validation_data=shards,
        )
    source = open_source(training=False, classes=config.classes, **data_options.source())
    check_classes(folder, config.classes, source.classes)
    batches = make_batches(
        replace(source, augmentation=config.augmentation),
        image_size=data_options.image_size,
        batch_size=config.options.optimization.batch_size,
        seed=config.options.run.seed,
        workers=data_options.workers,
        device=fabric.device,
    )
    normalize = Normalize(config.mean, config.std).to(fabric.device)
    return measure(model, normalize, batches.validation(), len(config.classes))


@dataclass(frozen=True)
class Arguments:
    """Measure a trained network on its validation images."""

    run: Annotated[str, tyro.conf.Positional]
    """Run folder."""
    data: str | None = None
    """Folder of images of the same classes, or "digits"; by default, the images of the run."""
    weights: Weights = "last"
    """Which weights of the run."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto (a GPU if there is one)."""


def main() -> None:
    """Run the command."""
    arguments = tyro.cli(Arguments, prog="python -m train.evaluate")
    for name, value in evaluate(**vars(arguments)).items():
        print(f"{name:>5}  {as_text(name, value)}")


if __name__ == "__main__":
    run_command(main)
