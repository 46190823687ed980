"""Make a run folder of a checkpoint of the published implementation, allenai/dnw.

    python -m train.import_allenai best.pt --kind mbv1_dnw --prune-rate 0.775 --data DIR

Every command that takes a run takes it then: train.evaluate, train.predict, --init. The file is
read without executing code.
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
from train.cli import run_command
from train.data import Dataset, open_source
from train.options import Options
from train.provenance import how_to_run
from train.run import RunConfig, RunFolder


@dataclass(frozen=True)
class Arguments:
    """Make a run folder of a checkpoint of the published implementation."""

    file: Annotated[str, tyro.conf.Positional]
    """The checkpoint, such as best.pt."""
    kind: Kind
    """Which network of that implementation."""
    prune_rate: float
    """Its flag of that name: 1 less the width multiplier; 0.95 for the tiny networks."""
    data: str
    """Folder of images of the classes that it was trained on, as for training."""
    dataset: Dataset | None = None
    """Kind of images; cifar10 for the tiny networks and imagenet otherwise, unless given."""
    layers: int = 5
    """Its flag of that name, the steps of kind discrete."""
    image_size: int | None = None
    """Height and width of the images, in pixels; 32 for cifar10 and 224 otherwise, unless given."""
    out: str | None = None
    """Run folder to write; runs/<name of the file> unless given."""
    overwrite: bool = False
    """Replace the run folder if it exists."""


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint, by name, refusing anything that would execute code.

    Raises:
        ValueError: Not such a checkpoint.
    """
    try:
        with warnings.catch_warnings():  # of kinds of files that are refused anyway
            warnings.simplefilter("ignore", UserWarning)
            found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"there is no checkpoint {path}") from None
    except OSError:
        raise
    except Exception as error:  # PyTorch raises errors of many types for files that are damaged
        raise ValueError(
            f"{path} is not read: it is damaged, or holds more than tensors and plain values (as "
            "init.pt and epoch_*.pt of that implementation do; best.pt does not)"
        ) from error
    state = found.get("model", found) if isinstance(found, Mapping) else None
    if not isinstance(state, Mapping) or not state:
        raise ValueError(f'{path} is no checkpoint: it has no tensors by name under "model"')
    if other := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise ValueError(f"{path} is no checkpoint: {other[0]!r} is no tensor")
    return {str(name): value for name, value in state.items()}


def import_allenai(args: Arguments) -> RunFolder:
    """Write the run folder, and return it.

    Raises:
        ValueError: A file, kind, rate, data or folder that does not do.
    """
    state = read_checkpoint(Path(args.file))
    dataset = args.dataset or ("imagenet" if args.kind.startswith("mbv1") else "cifar10")
    image_size = args.image_size
    if image_size is None:
        image_size = 32 if dataset == "cifar10" else 224
    found = read_allenai(
        state,
        kind=args.kind,
        prune_rate=args.prune_rate,
        image_size=image_size,
        layers=args.layers,
    )
    if found.options is None:
        raise ValueError(
            f"{args.file} is a network of other sizes than {found.name} has; "
            "models.load_allenai reads it"
        )
    source = open_source(args.data, training=False, dataset=dataset)
    classes = found.options["num_classes"]
    if len(source.classes) != classes:
        raise ValueError(
            f"{args.file} knows {classes} classes, but {args.data} has {len(source.classes)}"
        )
    given = {n: v for n, v in found.options.items() if n != "num_classes"}
    out = args.out or f"runs/{Path(args.file).stem}"
    options = Options.from_flat({"graph": found.name, **given, "dataset": dataset, "out": out})
    config = RunConfig.of(options.resolved(), source)
    folder, costs = RunFolder(out), cost(found.model, image_size)
    folder.create(config, args.overwrite)
    folder.save_weights("last", found.model, config)
    print(f"{folder.path}: {costs}")
    print(f"\nnext: {how_to_run('evaluate')} {folder.path}")
    return folder


def main(args: Sequence[str] | None = None) -> None:
    """Run the command."""
    prog = "python -m train.import_allenai"
    import_allenai(tyro.cli(Arguments, args=args, prog=prog, description=__doc__))


if __name__ == "__main__":
    run_command(main)
