"""Train a network on ImageNet, or on any folder of images by class.

The defaults are the protocol of the paper for ImageNet. To see it work in a minute:

    python -m train.imagenet --data digits --image-size 32 --batch-size 64 --lr 0.05 --epochs 3
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from train.cli import as_text, parse_options, run_command
from train.loop import Training
from train.options import Options
from train.provenance import how_to_run
from train.run import RunFolder


def train(options: Options) -> dict[str, Any]:
    """Train, and return what ``summary.json`` holds.

    Raises:
        ValueError: Whatever keeps the run from starting: options, data, device, folders.
    """
    return Training(options).fit()


def resume(run: str | Path, **changes: Any) -> dict[str, Any]:
    """Continue a run with its own options to the end, and return what ``summary.json`` holds.

    Args:
        run: The run folder.
        changes: ``data``, ``workers`` or ``device``, where these are others than before.

    Raises:
        ValueError: Not a run folder, other changes, or other images.
    """
    own = RunFolder(run).load_config().options
    return train(Options.from_flat({**changes, "resume": str(run)}, own))


def main(args: Sequence[str] | None = None) -> None:
    """Run the command."""
    run_training(args, "python -m train.imagenet", __doc__ or "", lambda _: Options())


def run_training(
    args: Sequence[str] | None,
    prog: str,
    description: str,
    defaults: Callable[[str], Options],
) -> None:
    """Train as flags say, and print the summary.

    Args:
        args: The flags; those of the command line unless given.
        prog: What the command is called.
        description: What it does.
        defaults: Returns the options of a model where flags say nothing.
    """
    args = sys.argv[1:] if args is None else args
    options = parse_options(args, prog, description.strip(), defaults)
    training = Training(options)
    first = training.processes.first
    if first:
        print(f"training {options.network.graph} into {training.folder.path}", flush=True)
    summary = training.fit()
    if not first:
        return
    for name, value in summary.items():
        print(f"{name:>18}  {as_text(name, value)}")
    print(f"\nnext: {how_to_run('evaluate')} {training.folder.path}")


if __name__ == "__main__":
    run_command(main)
