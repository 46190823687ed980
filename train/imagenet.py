"""Train a network on ImageNet, or on any folder of images by class.

The defaults follow the paper's protocol for ImageNet. For a short trial run:

    python -m train.imagenet --data digits --image-size 32 --batch-size 64 --lr 0.05 --epochs 3
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from models import model_config
from train.cli import as_text, parse_options, run_command
from train.options import Options
from train.provenance import how_to_run
from train.run import RunFolder


def train(options: Options) -> dict[str, Any]:
    """Train a network, and return the content of ``summary.json``.

    Raises:
        ValueError: If options, data, device or folders keep the run from starting.
    """
    from train.loop import start_training  # takes seconds to import

    return start_training(options).fit()


def resume(run: str | Path, **changes: Any) -> dict[str, Any]:
    """Continue a run to its end with the same options, and return the content of ``summary.json``.

    Args:
        run: The run folder.
        changes: New values of ``data``, ``workers`` or ``device``.

    Raises:
        ValueError: If this is not a run folder, an option may not be changed, or the images
            differ.
    """
    options = RunFolder(run).load_config().options
    return train(Options.from_flat({**changes, "resume": str(run)}, options))


def main(args: Sequence[str] | None = None) -> None:
    """Run the command."""
    run_training(args, "python -m train.imagenet", __doc__ or "", lambda _: Options())


def run_training(
    args: Sequence[str] | None,
    prog: str,
    description: str,
    defaults: Callable[[str], Options],
) -> None:
    """Train a network with the options set by flags, and print the summary.

    Args:
        args: The flags. If None, those of the command line.
        prog: Name of the command.
        description: Description of the command.
        defaults: Returns the default options of a model.
    """
    args = sys.argv[1:] if args is None else args
    options = parse_options(args, prog, description.strip(), defaults)
    model_config(options.network.graph)  # raises ValueError if the model is unknown
    from train.loop import start_training  # takes seconds to import

    training = start_training(options)
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
