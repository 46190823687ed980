"""Make a run folder from a checkpoint of the published implementation, allenai/dnw.

    python -m train.import_allenai best.pt --kind mbv1_dnw --prune-rate 0.775 --data DIR

All commands that take a run then accept this folder: train.evaluate, train.predict, --init. The
file is read without executing code.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor

from dnw_graph import cost
from models.allenai import Kind, read_allenai
from train.choices import Dataset
from train.cli import run_command
from train.options import Options
from train.provenance import how_to_run
from train.run import RunConfig, RunFolder


@dataclass(frozen=True)
class Arguments:
    """Make a run folder from a checkpoint of the published implementation."""

    file: Annotated[str, tyro.conf.Positional]
    """The checkpoint, such as best.pt."""
    kind: Kind
    """Network type in that implementation."""
    prune_rate: float
    """The implementation's flag of that name: 1 minus the width multiplier; 0.95 for the tiny
    networks."""
    data: str
    """Folder of images of the classes that the network was trained on, as for training."""
    dataset: Dataset | None = None
    """Kind of images; by default, cifar10 for the tiny networks and imagenet for the others."""
    layers: int = 5
    """The implementation's flag of that name: the number of steps of kind discrete."""
    image_size: int | None = None
    """Height and width of the images, in pixels; by default, 32 for cifar10 and 224 otherwise."""
    out: str | None = None
    """Run folder to write; by default, runs/<name of the file>."""
    overwrite: bool = False
    """Replace the run folder if it exists."""


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint, by name, without executing code.

    Raises:
        ValueError: If the file is not such a checkpoint.
    """
    try:
        with warnings.catch_warnings():  # these concern files that are rejected below
            warnings.simplefilter("ignore", UserWarning)
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"there is no checkpoint {path}") from None
    except OSError:
        raise
    except Exception as error:  # PyTorch raises many types of errors for damaged files
        raise ValueError(
            f"{path} cannot be read: it is damaged, or contains more than tensors and plain values "
            "(as init.pt and epoch_*.pt of that implementation do; best.pt does not)"
        ) from error
    state = content.get("model", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not state:
        raise ValueError(f'{path} is not a checkpoint: it has no named tensors under "model"')
    if invalid := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise ValueError(f"{path} is not a checkpoint: {invalid[0]!r} is not a tensor")
    return {str(name): value for name, value in state.items()}


def import_allenai(args: Arguments) -> RunFolder:
    """Write the run folder, and return it.

    Raises:
        ValueError: If the file, kind, rate, data or folder is not valid.
    """
    from train.data import open_source

    state = read_checkpoint(Path(args.file))
    dataset = args.dataset or ("imagenet" if args.kind.startswith("mbv1") else "cifar10")
    image_size = args.image_size
    if image_size is None:
        image_size = 32 if dataset == "cifar10" else 224
    imported = read_allenai(
        state,
        kind=args.kind,
        prune_rate=args.prune_rate,
        image_size=image_size,
        layers=args.layers,
    )
    if imported.options is None:
        raise ValueError(
            f"the sizes of the network in {args.file} differ from those of {imported.name}; use "
            "models.load_allenai to load it"
        )
    source = open_source(args.data, training=False, dataset=dataset)
    classes = imported.options["num_classes"]
    if len(source.classes) != classes:
        raise ValueError(
            f"{args.file} has {classes} classes, but {args.data} has {len(source.classes)}"
        )
    network_options = {n: v for n, v in imported.options.items() if n != "num_classes"}
    out = args.out or f"runs/{Path(args.file).stem}"
    options = Options.from_flat(
        {"graph": imported.name, **network_options, "dataset": dataset, "out": out}
    )
    config = RunConfig.of(options.resolved(), source)
    folder, costs = RunFolder(out), cost(imported.model, image_size)
    folder.create(config, args.overwrite)
    folder.save_weights("last", imported.model, config)
    print(f"{folder.path}: {costs}")
    print(f"\nnext: {how_to_run('evaluate')} {folder.path}")
    return folder


def main(args: Sequence[str] | None = None) -> None:
    """Run the command."""
    prog = "python -m train.import_allenai"
    import_allenai(tyro.cli(Arguments, args=args, prog=prog, description=__doc__))


if __name__ == "__main__":
    run_command(main)
