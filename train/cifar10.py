"""Train a network on CIFAR-10, as in Tables 1 and 2 of the paper.

The defaults follow the paper: 160 epochs, batches of 128, a learning rate that falls from 0.1 along
a cosine; for the tiny classifiers, batches of 512 and a learning rate that falls in steps. CIFAR-10
is downloaded to data/cifar10 unless --data DIR holds train/<class>/* and test/<class>/*:

    python -m train.cifar10 --graph mbv1_dnw
"""

from collections.abc import Sequence

from models import model_config
from train.cli import run_command
from train.imagenet import run_training
from train.options import DataOptions, OptimizationOptions, Options

DEFAULTS = Options(
    data=DataOptions(dataset="cifar10", image_size=32),
    optimization=OptimizationOptions(epochs=160, batch_size=128, lr=0.1, weight_decay=1e-4),
)


def defaults(graph: str) -> Options:
    """Return the options with which the paper trains a model."""
    return DEFAULTS.replace(**model_config(graph).cifar10)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command."""
    run_training(args, "python -m train.cifar10", __doc__ or "", defaults)


if __name__ == "__main__":
    run_command(main)
