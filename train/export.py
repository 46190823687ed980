"""Write a trained network for others to run: ``python -m train.export RUN --to onnx``.

Graphs are frozen first: nodes that no output needs are gone, and normalisation is folded in. What
is written takes images ``[B, 3, H, W]`` of the run's size, as 32-bit floats of mean 0 and deviation
1; means, deviations and class names are in the file.
"""

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from dnw_graph import freeze, save_frozen
from dnw_graph.frozen import FrozenModel, Report, to_exported, to_onnx
from train.cli import run_command
from train.files import atomically
from train.run import RunConfig, RunFolder, Weights

Kind = Literal["onnx", "torch", "safetensors"]
SUFFIXES: dict[Kind, str] = {"onnx": "onnx", "torch": "pt2", "safetensors": "frozen.safetensors"}


def export(run: str, to: Kind, out: str | None = None, weights: Weights = "last") -> Path:
    """Write a run's network, and return the path of the file.

    Args:
        run: The run folder.
        to: ``"onnx"``; ``"torch"``, a program that ``torch.export.load`` reads; or
            ``"safetensors"``, which :func:`dnw_graph.load_frozen` reads.
        out: The file; beside the weights unless given.
        weights: ``"last"``, ``"best"`` or ``"initial"``.

    Raises:
        ValueError: Not a run folder, a network that cannot be frozen, or a file that computes
            something else than the network.
    """
    folder = RunFolder(run)
    config = folder.load_config()
    model = freeze(folder.load_model(weights))
    path = Path(out) if out else folder.path / f"{weights}.{SUFFIXES[to]}"
    path.parent.mkdir(parents=True, exist_ok=True)
    example = torch.zeros(2, 3, *[config.options.data.image_size] * 2)
    if to == "onnx":
        to_onnx(model, example, path, notes(config))
    elif to == "torch":
        files = {f"{name}.txt": text for name, text in notes(config).items()}
        whole = io.BytesIO()  # a disk that is full would end the process while it is written to
        torch.export.save(to_exported(model, example), whole, extra_files=files)
        atomically(path, lambda half: half.write_bytes(whole.getbuffer()))
    else:
        save_frozen(model, path, notes(config))
    return path


def notes(config: RunConfig) -> dict[str, str]:
    """Return what whoever runs a network has to know, as text."""
    return {
        "classes": json.dumps(config.classes),
        "mean": json.dumps(config.mean),
        "std": json.dumps(config.std),
        "image_size": str(config.options.data.image_size),
    }


def report(run: str, weights: Weights = "last") -> Report:
    """Return what a run's network costs when it is frozen."""
    folder = RunFolder(run)
    model: FrozenModel = freeze(folder.load_model(weights))
    return model.report(folder.load_config().options.data.image_size)


@dataclass(frozen=True)
class Arguments:
    """Write a trained network for others to run."""

    run: Annotated[str, tyro.conf.Positional]
    """Run folder."""
    to: Kind
    """onnx; torch, which torch.export.load reads; or safetensors, for dnw_graph.load_frozen."""
    out: str | None = None
    """The file; beside the weights unless given."""
    weights: Weights = "last"
    """Which weights of the run."""


def main() -> None:
    """Run the command."""
    given = tyro.cli(Arguments, prog="python -m train.export", description=__doc__)
    path = export(**vars(given))
    print(report(given.run, given.weights))
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_command(main)
