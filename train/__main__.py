"""All commands under one name: ``dnw-graph imagenet …`` is ``python -m train.imagenet …``.

``python -m`` searches the current folder first, so it may import a ``train.py`` or ``models`` from
there; the console command ``dnw-graph`` does not.
"""

import runpy
import sys
from collections.abc import Sequence

from train.provenance import started_by

COMMANDS = {
    "imagenet": "train on ImageNet, or on any folder of images by class",
    "cifar10": "train on CIFAR-10",
    "evaluate": "measure a trained network",
    "predict": "classify images",
    "report": "write an HTML file about runs",
    "export": "write a trained network to ONNX, torch.export or safetensors",
    "tables": "reproduce the tables of the paper",
    "import_allenai": "make a run folder from a checkpoint of the published implementation",
}
"""Modules of ``train`` that are commands, with their descriptions."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command named by the first argument.

    Args:
        args: The command's name and its arguments. If None, those of the command line.
    """
    args = sys.argv[1:] if args is None else list(args)
    name = args[0].replace("-", "_") if args else ""
    if name in COMMANDS:
        started_by("dnw-graph")
        sys.argv = [f"dnw-graph {args[0]}", *args[1:]]
        runpy.run_module(f"train.{name}", run_name="__main__", alter_sys=True)
        return
    usage = "usage: dnw-graph COMMAND [--help]\n\n" + "\n".join(
        f"  {command.replace('_', '-'):15} {description}"
        for command, description in COMMANDS.items()
    )
    if name in ("", "__help", "_h"):
        print(usage)
        return
    print(f"error: unknown command {args[0]!r}\n\n{usage}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
