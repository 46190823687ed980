"""The run folder: the files of a training run.

::

    config.yaml              options, classes, versions
    initial.safetensors      weights before the first step, with the configuration
    last, best, ema          likewise after the last epoch, after the best one, averaged
    checkpoints/             the state needed to resume; read without executing code
    metrics.csv              one row per epoch
    history/                 births and deaths of edges, one file per record
    report.html              a page with curves, cost and wiring
    summary.json             the result
    tensorboard/             the metrics for TensorBoard
    lock, owner.json         the process that trains in the folder
"""

import csv
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typeguard import TypeCheckError, check_type

from models import create_model
from train.checkpoint import Checkpoints
from train.choices import Augmentation, Weights
from train.files import atomically
from train.lock import LOCK, OWNER
from train.options import Options
from train.provenance import versions

if TYPE_CHECKING:
    from train.data import Source


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The configuration needed to build a run's network and prepare its input.

    Attributes:
        options: The options of the run.
        classes: Names of the classes, by label.
        mean: Mean of each channel, for pixels from 0 to 1.
        std: Standard deviation of each channel.
        augmentation: How images are augmented.
        split: Name of the validation split.
    """

    options: Options
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: Augmentation
    split: str

    @classmethod
    def of(cls, options: Options, source: "Source") -> "RunConfig":
        """Return the configuration of a run on a source of images, including their place."""
        return cls(
            options=options.replace(data=source.place),
            classes=source.classes,
            mean=source.mean,
            std=source.std,
            augmentation=source.augmentation,
            split=source.split,
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RunConfig":
        """Return a configuration from the values of :meth:`to_dict`.

        Raises:
            ValueError: If a value is missing or of the wrong type.
        """
        fields = {name: values[name] for name in ("augmentation", "split")}
        fields |= {name: tuple(values[name]) for name in ("classes", "mean", "std")}
        for name, hint in get_type_hints(cls).items():
            if name in fields:
                check_type(fields[name], hint)
        return cls(options=Options.from_flat(values["options"]), **fields)

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as plain values, with the installed versions of packages."""
        return {
            "options": self.options.flat(),
            "classes": list(self.classes),
            "mean": list(self.mean),
            "std": list(self.std),
            "augmentation": self.augmentation,
            "split": self.split,
            "versions": versions(),
        }

    def build(self) -> nn.Module:
        """Return the run's network with new weights."""
        return build_network(self.options, len(self.classes))


def build_network(options: Options, num_classes: int) -> nn.Module:
    """Build the network that options describe, with new weights.

    Raises:
        ValueError: If the model or rule is unknown, or a size is invalid.
    """
    return create_model(options.network.graph, **model_arguments(options, num_classes))


def model_arguments(options: Options, num_classes: int) -> dict[str, Any]:
    """Return the arguments of ``create_model`` for the network that options describe."""
    size = options.data.image_size
    return {**options.network.given(), "image_size": size, "num_classes": num_classes}


class RunFolder:
    """The files of one run.

    Args:
        path: The folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def check_free(self, overwrite: bool) -> None:
        """Raise ValueError if the path exists and may not be overwritten."""
        path = self.path
        if not path.exists() and not path.is_symlink():
            return
        if path.is_dir() and {entry.name for entry in path.iterdir()} <= {LOCK, OWNER}:
            return
        if not overwrite:
            resume = f"continue it with --resume {path}, " if Checkpoints(path) else ""
            raise ValueError(
                f"{path} exists: {resume}replace it with --overwrite, or choose another folder "
                "with --out"
            )
        if not path.is_dir() or path.is_symlink():
            raise ValueError(
                f"{path} is not overwritten: it is not a run folder; choose another folder with "
                "--out"
            )
        names = {entry.name for entry in path.iterdir()} - {LOCK, OWNER}
        allowed = _CONTENT | {f".{name}.half" for name in _CONTENT}
        foreign = sorted(n for n in names - allowed if not n.startswith("history-damaged-"))
        if foreign:
            raise ValueError(
                f"{path} is not overwritten: {path / foreign[0]} is not part of a run; choose "
                "another folder with --out"
            )
        if names:
            try:
                self.load_config()
            except ValueError as error:
                raise ValueError(
                    f"{path} is not overwritten: {error}; choose another folder with --out"
                ) from error

    def create(self, config: RunConfig, overwrite: bool) -> None:
        """Create the folder with only ``config.yaml`` in it; a lock in it stays.

        Raises:
            ValueError: If :meth:`check_free` does.
        """
        self.check_free(overwrite)
        text = _as_yaml(config)  # nothing is deleted if this fails
        self.path.mkdir(parents=True, exist_ok=True)
        for entry in self.path.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name not in (LOCK, OWNER):
                entry.unlink()
        atomically(self.path / "config.yaml", lambda path: path.write_text(text))

    def save_config(self, config: RunConfig) -> None:
        """Write ``config.yaml``."""
        text = _as_yaml(config)
        atomically(self.path / "config.yaml", lambda path: path.write_text(text))

    def load_config(self) -> RunConfig:
        """Read ``config.yaml``.

        Raises:
            ValueError: If this is not a run folder, or its configuration is damaged.
        """
        path = self.path / "config.yaml"
        if not path.exists():
            raise ValueError(f"{self.path} is not a run folder: it has no config.yaml")
        try:
            return RunConfig.from_dict(yaml.safe_load(path.read_text()))
        except KeyError as error:
            raise ValueError(
                f"{path} is damaged or of another version: {error} is missing"
            ) from error
        except (TypeError, AttributeError, ValueError, TypeCheckError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{path} is damaged or of another version: {reason}") from error

    def save_weights(self, name: Weights, model: nn.Module, config: RunConfig) -> None:
        """Write ``<name>.safetensors``, with the configuration inside."""
        tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
        metadata = {"config": json.dumps(config.to_dict())}
        path = self.path / f"{name}.safetensors"
        atomically(path, lambda to: save_file(tensors, to, metadata=metadata))

    def load_weights(self, name: Weights) -> dict[str, Tensor]:
        """Read ``<name>.safetensors``.

        Raises:
            ValueError: If the file is missing or damaged.
        """
        if name not in get_args(Weights):
            raise ValueError(f"weights must be one of {', '.join(get_args(Weights))}, got {name!r}")
        path = self.path / f"{name}.safetensors"
        if not path.exists():
            raise ValueError(
                f"{self.path} has no weights {name!r}: the run stopped before they were saved"
            )
        with path.open("rb"):  # raises OSError if the file cannot be opened
            pass
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from error

    def load_model(self, weights: Weights = "last") -> nn.Module:
        """Return the run's network in evaluation mode.

        Raises:
            ValueError: If a file is missing or damaged, or the weights are of another network.
        """
        config = self.load_config()
        model = config.build()
        try:
            model.load_state_dict(self.load_weights(weights))
        except RuntimeError as error:
            raise ValueError(
                f"{self.path / weights}.safetensors does not fit {config.options.network}, which "
                f"config.yaml describes: {' '.join(str(error).split()[:40])}"
            ) from error
        return model.eval()

    def save_metrics(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write ``metrics.csv``."""

        def write(path: Path) -> None:
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)

        atomically(self.path / "metrics.csv", write)

    def save_summary(self, summary: Mapping[str, Any]) -> None:
        """Write ``summary.json``."""
        text = json.dumps(summary, indent=2) + "\n"
        atomically(self.path / "summary.json", lambda path: path.write_text(text))


_CONTENT = {
    LOCK,
    OWNER,
    "config.yaml",
    "initial.safetensors",
    "last.safetensors",
    "best.safetensors",
    "ema.safetensors",
    "checkpoints",
    "wandb",
    "metrics.csv",
    "summary.json",
    "tensorboard",
    "history",
    "report.html",
    "wiring.png",
    "resume.pt",  # written by versions without checkpoints
}
"""Names of files that a run folder may contain."""


def _as_yaml(config: RunConfig) -> str:
    text: str = yaml.safe_dump(config.to_dict(), sort_keys=False)
    return text
