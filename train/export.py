"""Export a trained network: ``python -m train.export RUN --to onnx``.

Graphs are frozen first: nodes that no output needs are removed, and normalisation is folded into
the weights. The exported network takes images ``[B, 3, H, W]`` of the run's size, as 32-bit floats
normalised to mean 0 and standard deviation 1; means, deviations and class names are in the file.
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
from train.choices import Weights
from train.cli import run_command
from train.files import atomically
from train.run import RunConfig, RunFolder

Kind = Literal["onnx", "torch", "safetensors"]
SUFFIXES: dict[Kind, str] = {"onnx": "onnx", "torch": "pt2", "safetensors": "frozen.safetensors"}


def export(run: str, to: Kind, out: str | None = None, weights: Weights = "last") -> Path:
    """Write a run's network to a file, and return its path.

    Args:
        run: The run folder.
        to: ``"onnx"``; ``"torch"``, a program that ``torch.export.load`` reads; or
            ``"safetensors"``, which :func:`dnw_graph.load_frozen` reads.
        out: Path of the file. If None, a file beside the weights.
        weights: ``"last"``, ``"best"`` or ``"initial"``.

    Raises:
        ValueError: If this is not a run folder, the network cannot be frozen, or the exported
            network computes something else.
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
        buffer = io.BytesIO()  # a disk that is full would end the process while it is written to
        torch.export.save(to_exported(model, example), buffer, extra_files=files)
        atomically(path, lambda partial: partial.write_bytes(buffer.getbuffer()))
    else:
        save_frozen(model, path, notes(config))
    return path


def notes(config: RunConfig) -> dict[str, str]:
    """Return class names, image size and normalisation as text, to store in an exported file."""
    return {
        "classes": json.dumps(config.classes),
        "mean": json.dumps(config.mean),
        "std": json.dumps(config.std),
        "image_size": str(config.options.data.image_size),
    }


def report(run: str, weights: Weights = "last") -> Report:
    """Return the cost of a run's network when it is frozen."""
    folder = RunFolder(run)
    model: FrozenModel = freeze(folder.load_model(weights))
    return model.report(folder.load_config().options.data.image_size)


@dataclass(frozen=True)
class Arguments:
    """Export a trained network."""

    run: Annotated[str, tyro.conf.Positional]
    """Run folder."""
    to: Kind
    """onnx; torch, for torch.export.load; or safetensors, for dnw_graph.load_frozen."""
    out: str | None = None
    """File to write; by default, a file beside the weights."""
    weights: Weights = "last"
    """Which weights of the run."""


def main() -> None:
    """Run the command."""
    arguments = tyro.cli(Arguments, prog="python -m train.export", description=__doc__)
    path = export(**vars(arguments))
    print(report(arguments.run, arguments.weights))
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_command(main)
