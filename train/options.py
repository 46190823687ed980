"""What a training run is told: typed, frozen, and the same from flags, recipes and Python."""

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
from train.data import Dataset
from train.network_options import network_options


@dataclass(frozen=True, kw_only=True)
class Network:
    """Which network; :data:`NetworkOptions` adds the options of every model."""

    graph: Annotated[str, tyro.conf.arg(help=f"Model: {', '.join(list_models())}.")] = "mbv1_dnw"

    def given(self) -> dict[str, Any]:
        """Return what differs from what every model does unless told, the model's name apart."""
        fields = [field for field in dataclasses.fields(self) if field.name != "graph"]
        values = {field.name: getattr(self, field.name) for field in fields}
        return {f.name: values[f.name] for f in fields if values[f.name] != f.default}

    def resolved(self) -> "Network":
        """Return the same with every option that the model takes.

        Raises:
            ValueError: An unknown model.
        """
        own = model_options(self.graph)
        taken = [field.name for field in dataclasses.fields(self) if field.name in own]
        return dataclasses.replace(self, **{n: own[n] for n in taken if n not in self.given()})

    def __str__(self) -> str:
        return ", ".join([self.graph, *(f"{name} {value}" for name, value in self.given().items())])


NetworkOptions = network_options(Network)
"""The model, and every option of every model in ``models/``; None where it is not given."""


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Which images."""

    data: str | None = None
    """Folder that holds train/<class>/* and val/<class>/* (or test/), or "digits" for
    scikit-learn's handwritten digits; unless given, imagenet (or cifar10) in $DNW_DATA or data/."""
    dataset: Dataset = "imagenet"
    """Kind of images: photographs are cropped, CIFAR-10's moved; sets normalisation as well."""
    train_images: int | None = None
    """Training images to use, as many of each class; all unless given."""
    validation_images: int | None = None
    """Images to measure on, likewise."""
    validation_data: str | None = None
    """Shards to measure on, where data names shards; unless given, those beside them whose names
    begin with val or test."""
    bad_images: Literal["fail", "skip"] = "fail"
    """What to do with an image that cannot be read: stop with an error that names it, or count it,
    log its path and do without."""
    image_size: int = 224
    """Height and width the network sees, in pixels."""
    workers: int | Literal["auto"] = "auto"
    """Processes that load images, for each one that trains; auto is none where all images fit into
    memory and training is on a CPU, else one per core, 8 at most."""

    def source(self) -> dict[str, Any]:
        """Return what :func:`train.data.open_source` is told."""
        names = ("data", "dataset", "train_images", "validation_images")
        return {name: getattr(self, name) for name in (*names, "validation_data", "bad_images")}


@dataclass(frozen=True, kw_only=True)
class OptimizationOptions:
    """How the weights are fitted; the defaults are the paper's."""

    epochs: int = 250
    """Passes over the training images."""
    batch_size: int = 512
    """Images a step, over all processes and parts."""
    micro_batch_size: int | None = None
    """Images that a process takes at a time; gradients add up until the step's are done. All at
    once unless given."""
    lr: float = 0.1
    """Learning rate at its highest."""
    lr_schedule: Literal["cosine", "steps"] = "cosine"
    """How it falls: to 0 along a cosine, step by step; or to a tenth after half of the epochs, and
    again after three quarters."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 5e-5
    """Weight decay of SGD, on every parameter."""
    warmup_epochs: int = 0
    """Epochs in which the learning rate first rises to lr, linearly, step by step."""
    clip_grad_norm: float | None = None
    """Norm to which longer gradients are cut."""
    label_smoothing: float = 0.0
    """Share of the label that is spread over all classes in the training loss."""
    mixup: float = 0.0
    """Mix pairs of images, by shares from a beta distribution with this parameter; 0 is off. With
    cutmix too, one of both is drawn each time."""
    cutmix: float = 0.0
    """Paste a part of one image into another, likewise."""
    ema_decay: float | None = None
    """Also keep and measure a moving average of the weights, of which so much stays at a step."""
    recalibrate: int = 0
    """Batches over which normalisation statistics are taken anew for the final wiring."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How and where it runs."""

    seed: int = 0
    """Seed of weights, data order and augmentation."""
    device: str = "auto"
    """cpu, cuda, cuda:N, or auto: a GPU if there is one."""
    precision: Literal["32", "bf16", "64"] = "32"
    """Bits of activations; bf16 is automatic mixed precision with bfloat16; 64 has weights of 64
    bits as well, to compare results with."""
    sync_norms: bool = False
    """Take statistics of batch norm over the images of all processes."""
    compile: bool = False
    """Compile the network with torch.compile, on a GPU with CUDA graphs."""
    out: str | None = None
    """Run folder to write; runs/<graph>-<what is said of it>-seed<seed> unless given."""
    resume: str | None = None
    """Run folder to continue; its options are kept."""
    auto_resume: bool = False
    """Continue the run in out where there is one, else begin it: the same command for both."""
    checkpoint_every: int | None = None
    """Steps between checkpoints, beside those after epochs and every so many minutes."""
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
    """Steps between records of the wiring, beside one at the end of each epoch."""
    wandb: str | None = None
    """Project of Weights & Biases to log to as well."""


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
                raise ValueError(f"{name} is empty: name one, or leave it out")
        optimization = self.optimization
        for name in ("history_every", "checkpoint_every"):
            every = getattr(self.run, name)
            if every is not None and every < 1:
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
            if value and not 0.01 <= value <= 100:  # others are none, or the same, but for rounding
                raise ValueError(f"{name} must be 0, which is off, or from 0.01 to 100")
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
            base: What is missing in ``values``; the defaults unless given.

        Raises:
            ValueError: An unknown option, or a value of the wrong type or out of range.
        """
        check_names(values)
        base = base or cls()
        built = {}
        for field_ in dataclasses.fields(cls):
            group = getattr(base, field_.name)
            hints = get_type_hints(type(group))
            ours = {name: _plain(value) for name, value in values.items() if name in hints}
            for name, value in ours.items():
                try:
                    check_type(value, hints[name])
                except TypeCheckError as error:
                    raise ValueError(f"{name} is {value!r}, but {error}") from error
            built[field_.name] = dataclasses.replace(group, **ours)
        return cls(**built)

    def flat(self) -> dict[str, Any]:
        """Return every option by name."""
        return {k: v for group in dataclasses.asdict(self).values() for k, v in group.items()}

    def resolved(self) -> "Options":
        """Return the same with every option that the model takes, as it is unless given.

        Raises:
            ValueError: An unknown model.
        """
        return dataclasses.replace(self, network=self.network.resolved())

    def replace(self, **changes: Any) -> "Options":
        """Return the same options but for some."""
        return Options.from_flat(changes, self)

    def differences(self, other: "Options") -> dict[str, tuple[Any, Any]]:
        """Return the options in which two differ, with both values."""
        ours, theirs = self.flat(), other.flat()
        return {name: (ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]}


def _plain(value: Any) -> Any:
    """Return a value as options hold it: paths as text, NumPy's float64 as float, no lists."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list):
        return tuple(value)
    return float(value) if isinstance(value, float) else value


def check_names(names: Iterable[str]) -> None:
    """Raise a ``ValueError`` where a name is no option; it shows the nearest one."""
    known = list(Options().flat())
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"unknown option {name!r}{hint} (known: {', '.join(known)})")
