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
from train.provenance import versions
from train.run import RunConfig, RunFolder, model_arguments

Kind = Literal["onnx", "torch", "safetensors", "hub"]
SUFFIXES: dict[Kind, str] = {
    "onnx": "onnx",
    "torch": "pt2",
    "safetensors": "frozen.safetensors",
    "hub": "hub",
}


def export(run: str, to: Kind, out: str | None = None, weights: Weights = "last") -> Path:
    """Write a run's network to a file, and return its path.

    Args:
        run: The run folder.
        to: ``"onnx"``; ``"torch"``, a program that ``torch.export.load`` reads;
            ``"safetensors"``, which :func:`dnw_graph.load_frozen` reads; or ``"hub"``, a folder
            with the network as it is, not frozen, which ``HubModel.from_pretrained`` reads.
        out: Path of the file or folder. If None, one beside the weights.
        weights: ``"last"``, ``"best"`` or ``"initial"``.

    Raises:
        ValueError: If this is not a run folder, the network cannot be frozen, or the exported
            network computes something else.
    """
    folder = RunFolder(run)
    config = folder.load_config()
    path = Path(out) if out else folder.path / f"{weights}.{SUFFIXES[to]}"
    path.parent.mkdir(parents=True, exist_ok=True)
    if to == "hub":
        return _export_to_hub(folder, weights, path)
    model = freeze(folder.load_model(weights))
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


def _export_to_hub(folder: RunFolder, weights: Weights, path: Path) -> Path:
    """Write a run's network, with a model card, to a folder of the format of Hugging Face's hub."""
    from models.hub import HubModel

    config = folder.load_config()
    model = HubModel(
        config.options.network.graph,
        classes=list(config.classes),
        mean=list(config.mean),
        std=list(config.std),
        **model_arguments(config.options, len(config.classes)),
    )
    model.network.load_state_dict(folder.load_model(weights).state_dict())
    # The card may become public, so it has the name of the data's folder only.
    facts = {"data": Path(str(config.options.data.data)).name, "weights": weights}
    summary = folder.path / "summary.json"
    if summary.exists() and weights != "initial":
        results = json.loads(summary.read_text())
        top1, epoch = results["top1"], "last"
        if weights == "best":
            top1, epoch = results["best_top1"], "best"
        facts["epochs"] = str(results["epochs"])
        facts[f"top-1 on {config.split}"] = f"{top1:.2%} after the {epoch} epoch"
    facts["trained with"] = ", ".join(f"{name} {value}" for name, value in versions().items())
    model.eval().save_pretrained(path, model_card_kwargs={"facts": facts})
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
    """onnx; torch, for torch.export.load; safetensors, for dnw_graph.load_frozen; or hub, a folder
    for HubModel.from_pretrained, with a model card."""
    out: str | None = None
    """File or folder to write; by default, one beside the weights."""
    weights: Weights = "last"
    """Which weights of the run."""


def main() -> None:
    """Run the command."""
    arguments = tyro.cli(Arguments, prog="python -m train.export", description=__doc__)
    path = export(**vars(arguments))
    print(report(arguments.run, arguments.weights))
    files = path.iterdir() if path.is_dir() else [path]
    print(f"{path}: {sum(file.stat().st_size for file in files) / 1e6:.1f} MB")


if __name__ == "__main__":
    run_command(main)
