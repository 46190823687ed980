"""Train a network on ImageNet, or on any folder of images by class.

The defaults are the protocol of the paper for ImageNet. To see it work in a minute:

    python -m train.imagenet --data digits --image-size 32 --batch-size 64 --lr 0.05 --epochs 3
"""

import sys
from collections.abc import Sequence
from typing import Any

from train.cli import parse_options, run_command
from train.loop import Training
from train.options import Options
from train.run import RunFolder


def train(options: Options) -> dict[str, Any]:
    """Train, and return what ``summary.json`` holds.

    Raises:
        ValueError: Whatever keeps the run from starting: options, data, device, folders.
    """
    return Training(options).fit()


def main(args: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = sys.argv[1:] if args is None else args
    description = (__doc__ or "").strip()
    default = None
    if "--resume" in args[:-1]:
        default = RunFolder(args[list(args).index("--resume") + 1]).load_config().options
    options = parse_options(args, "python -m train.imagenet", description, default)
    training = Training(options)
    print(f"training {options.network.graph} into {training.folder.path}")
    summary = training.fit()
    for name, value in summary.items():
        print(f"{name:>18}  {show(value)}")
    print(f"\nnext: python -m train.evaluate {training.folder.path}")


def show(value: Any) -> str:
    """Return a value of a summary as people read it."""
    if isinstance(value, float):
        return f"{value:,.1f}" if value > 1 else f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
    run_command(main)
