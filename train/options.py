"""The options of a training run, as set by flags, recipes or Python."""

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import tyro
from typeguard import TypeCheckError, check_type

from models import list_models, model_options
from train.choices import Dataset
from train.network_options import network_options


@dataclass(frozen=True, kw_only=True)
class Network:
    """The model; :data:`NetworkOptions` adds the options of every model."""

    graph: Annotated[str, tyro.conf.arg(help=f"Model: {', '.join(list_models())}.")] = "mbv1_dnw"

    def given(self) -> dict[str, Any]:
        """Return the options that differ from their defaults, without the model's name."""
        fields = [field for field in dataclasses.fields(self) if field.name != "graph"]
        values = {field.name: getattr(self, field.name) for field in fields}
        return {f.name: values[f.name] for f in fields if values[f.name] != f.default}

    def resolved(self) -> "Network":
        """Return a copy in which the options that are not set have the model's defaults.

        Raises:
            ValueError: If the model is unknown.
        """
        defaults = model_options(self.graph)
        names = [field.name for field in dataclasses.fields(self) if field.name in defaults]
        return dataclasses.replace(self, **{n: defaults[n] for n in names if n not in self.given()})

    def __str__(self) -> str:
        return ", ".join([self.graph, *(f"{name} {value}" for name, value in self.given().items())])


NetworkOptions = network_options(Network)
"""The model, and every option of every model in ``models/``; None if it is not set."""


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Images to train and validate on."""

    data: str | None = None
    """Folder that holds train/<class>/* and val/<class>/* (or test/), or "digits" for
    scikit-learn's handwritten digits; by default, imagenet (or cifar10) in $DNW_DATA or data/."""
    dataset: Dataset = "imagenet"
    """Kind of images: photographs are cropped, CIFAR-10 images shifted, digits neither; also sets
    the normalisation. With --data digits it is digits."""
    train_images: int | None = None
    """Number of training images to use, the same from each class; by default, all."""
    validation_images: int | None = None
    """Number of validation images to use, likewise."""
    validation_data: str | None = None
    """Validation shards, if data names shards; by default, those in the same folder whose names
    begin with val or test."""
    bad_images: Literal["fail", "skip"] = "fail"
    """What to do with an image that cannot be read: fail with an error that names it, or skip it,
    count it and log its path."""
    image_size: int = 224
    """Height and width of the network's input, in pixels."""
    workers: int | Literal["auto"] = "auto"
    """Processes that load images, per training process; auto is 0 if all images fit into memory and
    training is on a CPU, and otherwise one per core, at most 8."""

    def __post_init__(self) -> None:
        if "digits" not in (self.data, self.dataset):
            return
        if self.data not in (None, "digits"):
            raise ValueError(
                f"--data {self.data} is not scikit-learn's digits: use --dataset imagenet or "
                "cifar10, or --data digits"
            )
        object.__setattr__(self, "data", "digits")
        object.__setattr__(self, "dataset", "digits")

    def source(self) -> dict[str, Any]:
        """Return the arguments for :func:`train.data.open_source`."""
        names = ("data", "dataset", "train_images", "validation_images")
        return {name: getattr(self, name) for name in (*names, "validation_data", "bad_images")}


@dataclass(frozen=True, kw_only=True)
class OptimizationOptions:
    """How the weights are optimized; the defaults are the paper's."""

    epochs: int = 250
    """Passes over the training images."""
    batch_size: int = 512
    """Images per step, over all processes and micro-batches."""
    micro_batch_size: int | None = None
    """Images that a process computes at a time, accumulating the gradients of a step; by default,
    all at once."""
    lr: float = 0.1
    """Highest learning rate."""
    lr_schedule: Literal["cosine", "steps"] = "cosine"
    """How the learning rate falls: to 0 along a cosine, step by step; or to a tenth after half of
    the epochs, and again after three quarters."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 5e-5
    """Weight decay of SGD, on every parameter."""
    warmup_epochs: int = 0
    """Epochs in which the learning rate first rises to lr, linearly, step by step."""
    clip_grad_norm: float | None = None
    """Maximum norm of the gradient; larger gradients are clipped."""
    label_smoothing: float = 0.0
    """Share of the label that is spread over all classes in the training loss."""
    mixup: float = 0.0
    """Mix pairs of images with shares from a beta distribution with this parameter; 0 is off. With
    cutmix too, one of the two is chosen at random for each batch."""
    cutmix: float = 0.0
    """Paste a part of one image into another, likewise."""
    ema_decay: float | None = None
    """Also keep and evaluate a moving average of the weights; this is the share of the average that
    is kept at each step."""
    recalibrate: int = 0
    """Number of batches over which normalisation statistics are recomputed for the final wiring."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How and where the run is executed."""

    seed: int = 0
    """Seed of weights, data order and augmentation."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto (a GPU if there is one)."""
    precision: Literal["32", "bf16", "64"] = "32"
    """Bits of activations; bf16 is automatic mixed precision with bfloat16; 64 also uses 64-bit
    weights, for comparing results."""
    sync_norms: bool = False
    """Compute batch norm statistics over the images of all processes."""
    compile: bool = False
    """Compile the network with torch.compile, on a GPU with CUDA graphs."""
    out: str | None = None
    """Run folder to write; by default, runs/<graph>-<its options>-seed<seed>."""
    resume: str | None = None
    """Run folder to continue, with its options."""
    auto_resume: bool = False
    """Continue the run in out if there is one, otherwise start it, with the same command."""
    checkpoint_every: int | None = None
    """Steps between checkpoints, in addition to those after epochs and by time."""
    checkpoint_minutes: float = 10.0
    """Minutes between checkpoints."""
    init: str | None = None
    """Run folder whose trained network to start from, with a new classifier."""
    from_run: Annotated[str | None, tyro.conf.arg(aliases=["--from"])] = None
    """Finished run of the complete graph, whose largest weights the rules lottery and fine_tune
    keep."""
    overwrite: bool = False
    """Replace the run folder if it exists."""
    report: bool = True
    """Write report.html into the run folder at the end."""
    history_every: int | None = None
    """Steps between records of the wiring, in addition to one at the end of each epoch."""
    wandb: str | None = None
    """Weights & Biases project to log to, in addition to TensorBoard."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """All options of a training run."""

    network: Network = field(default_factory=NetworkOptions)
    data: DataOptions = field(default_factory=DataOptions)
    optimization: OptimizationOptions = field(default_factory=OptimizationOptions)
    run: RunOptions = field(default_factory=RunOptions)

    def __post_init__(self) -> None:
        for name in ("data", "validation_data", "out", "resume", "init", "from_run", "wandb"):
            if self.flat()[name] == "":
                raise ValueError(f"{name} is empty: pass a value, or leave the option out")
        optimization = self.optimization
        for name in ("history_every", "checkpoint_every"):
            interval = getattr(self.run, name)
            if interval is not None and interval < 1:
                raise ValueError(f"{name} must be 1 step or more")
        if not self.run.checkpoint_minutes > 0:
            raise ValueError("checkpoint_minutes must be above 0")
        if optimization.epochs < 1:
            raise ValueError("epochs must be 1 or more")
        if not 0 <= optimization.warmup_epochs < optimization.epochs:
            raise ValueError("warmup_epochs must be 0 or more, and fewer than epochs")
        if not 0 <= optimization.label_smoothing < 1:
            raise ValueError("label_smoothing must be a share, 0 or more and below 1")
        if optimization.micro_batch_size is not None and optimization.micro_batch_size < 1:
            raise ValueError("micro_batch_size must be 1 image or more")
        if optimization.clip_grad_norm is not None and not optimization.clip_grad_norm > 0:
            raise ValueError("clip_grad_norm must be above 0")
        if optimization.ema_decay is not None and not 0 < optimization.ema_decay < 1:
            raise ValueError("ema_decay must be a share, above 0 and below 1")
        for name in ("mixup", "cutmix"):
            value = getattr(optimization, name)
            if value and not 0.01 <= value <= 100:  # beyond, shares are constant but for rounding
                raise ValueError(f"{name} must be 0 (off), or from 0.01 to 100")
        if optimization.batch_size < 2:
            raise ValueError("batch_size must be 2 or more: normalisation needs a variance")
        for name, below in (("lr", math.inf), ("momentum", 1.0), ("weight_decay", math.inf)):
            if not 0 <= getattr(optimization, name) < below:
                limit = "a finite number" if below == math.inf else f"below {below:g}"
                raise ValueError(f"{name} must be {limit}, and not negative")
        if optimization.recalibrate < 0:
            raise ValueError("recalibrate must be 0 or more batches")
        if self.data.workers != "auto" and self.data.workers < 0:
            raise ValueError("workers must be 0 or more")
        if not 0 <= self.run.seed < 2**32:
            raise ValueError("seed must be from 0 to 2**32 - 1")

    @classmethod
    def from_flat(cls, values: Mapping[str, Any], base: "Options | None" = None) -> "Options":
        """Build options from ``{"graph": …, "epochs": …}``.

        Args:
            values: Options by name.
            base: Source of the options that are not in ``values``. If None, the defaults.

        Raises:
            ValueError: If an option is unknown, or a value is of the wrong type or out of range.
        """
        check_names(values)
        base = base or cls()
        groups = {}
        for field_ in dataclasses.fields(cls):
            group = getattr(base, field_.name)
            hints = get_type_hints(type(group))
            changes = {name: _plain(value) for name, value in values.items() if name in hints}
            for name, value in changes.items():
                try:
                    check_type(value, hints[name])
                except TypeCheckError as error:
                    raise ValueError(f"invalid {name} {value!r}: {error}") from error
            groups[field_.name] = dataclasses.replace(group, **changes)
        return cls(**groups)

    def flat(self) -> dict[str, Any]:
        """Return every option by name."""
        return {k: v for group in dataclasses.asdict(self).values() for k, v in group.items()}

    def resolved(self) -> "Options":
        """Return a copy in which model options that are not set have the model's defaults.

        Raises:
            ValueError: If the model is unknown.
        """
        return dataclasses.replace(self, network=self.network.resolved())

    def replace(self, **changes: Any) -> "Options":
        """Return a copy with some options changed."""
        return Options.from_flat(changes, self)

    def differences(self, other: "Options") -> dict[str, tuple[Any, Any]]:
        """Return the options that differ, with this object's value and the other's."""
        values, others = self.flat(), other.flat()
        return {
            name: (values[name], others[name]) for name in values if values[name] != others[name]
        }


def _plain(value: Any) -> Any:
    """Return a value with paths as text, NumPy's float64 as float, and lists as tuples."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list):
        return tuple(value)
    return float(value) if isinstance(value, float) else value


def check_names(names: Iterable[str]) -> None:
    """Raise ValueError if a name is not an option; the message suggests the nearest one."""
    valid = list(Options().flat())
    for name in names:
        if name not in valid:
            matches = difflib.get_close_matches(str(name), valid, n=1)
            hint = f"; did you mean {matches[0]!r}?" if matches else ""
            raise ValueError(f"unknown option {name!r}{hint} (known: {', '.join(valid)})")
