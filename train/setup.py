"""What has to be right before training starts: device, folder, images, what a run begins from."""

from typing import Any

import torch
from lightning.fabric import Fabric
from torch import nn

from train.data import Batches, Source
from train.options import Options
from train.run import RunConfig, RunFolder

FREE_ON_RESUME = {"data", "workers", "device", "resume"}
"""Options that may differ from those of the run that is continued."""


def make_fabric(device: str, precision: str) -> Fabric:
    """Return Lightning Fabric on a device.

    Raises:
        ValueError: The device is not there.
    """
    there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if device == "auto":
        device = "cuda:0" if len(there) > 1 else "cpu"
    wanted = "cuda:0" if device == "cuda" else device
    if wanted not in there:
        raise ValueError(f"--device {device} is not there; this machine has {', '.join(there)}")
    kind, _, index = wanted.partition(":")
    return Fabric(
        accelerator=kind,
        devices=[int(index)] if index else 1,
        precision="bf16-mixed" if precision == "bf16" else "32-true",
    )


def make_batches(source: Source, config: RunConfig, device: torch.device) -> Batches:
    """Return the batches of a run, on its own images or others."""
    options = config.options
    return Batches(
        source,
        natural=config.natural,
        image_size=options.data.image_size,
        batch_size=options.optimization.batch_size,
        seed=options.run.seed,
        workers=options.data.workers,
        on_cpu=device.type == "cpu",
    )


def default_folder(options: Options) -> str:
    """Return the run folder of options that name none."""
    network = options.network
    rule = f"-{network.rule}" if network.rule else ""
    return f"runs/{network.graph}{rule}-{network.width}-seed{options.run.seed}"


def check_resume(folder: RunFolder, options: Options) -> dict[str, Any]:
    """Return the state of a run to be continued.

    Raises:
        ValueError: The run is of other options, or has nothing to resume.
    """
    theirs = folder.load_config().options
    apart = options.differences(theirs)
    for name in FREE_ON_RESUME:
        apart.pop(name, None)
    if apart.keys() & {"out", "overwrite"}:
        raise ValueError(
            f"{folder.path} is continued where it is: give --resume without --out and --overwrite"
        )
    if apart:
        listed = ", ".join(
            f"{k} {theirs!r} (asked: {ours!r})" for k, (ours, theirs) in apart.items()
        )
        raise ValueError(
            f"{folder.path} was trained with {listed}; resume with its own options (just "
            f"--resume {folder.path}), or start a new run from its network with "
            f"--init {folder.path}"
        )
    return folder.load_state()


def check_classes(folder: RunFolder, theirs: tuple[str, ...], ours: tuple[str, ...]) -> None:
    """Raise a ``ValueError`` where images have other classes than those a run was trained on."""
    if theirs != ours:
        at = next((i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), None)
        which = "" if at is None else f"; the first to differ are {theirs[at]!r} and {ours[at]!r}"
        raise ValueError(
            f"{folder.path} was trained on {len(theirs)} classes, the data have {len(ours)}{which}"
        )


def check_images(folder: RunFolder, state: dict[str, Any], source: Source) -> None:
    """Raise a ``ValueError`` where a run is to be continued on another number of images."""
    if state.get("images") != len(source.train):
        raise ValueError(
            f"{folder.path} was trained on {state.get('images')} images, the data have "
            f"{len(source.train)}: order and learning rate would change; resume with the images "
            f"it had, or start a new run from its network with --init {folder.path}"
        )


def initialize(model: nn.Module, folder: RunFolder) -> None:
    """Copy the trained network of a run, all but its classifier.

    Raises:
        ValueError: The run's network is another one.
    """
    theirs, ours = folder.load_weights("last"), model.state_dict()
    taken = {k: v for k, v in theirs.items() if not k.startswith("classifier.")}
    kept = {k for k in ours if k.startswith("classifier.")}
    apart = sorted((taken.keys() | kept) ^ ours.keys())
    apart += [k for k in taken if k in ours and taken[k].shape != ours[k].shape]
    if apart:
        network = folder.load_config().options.network
        raise ValueError(
            f"--init {folder.path} is {network.graph} at width {network.width}, another network "
            f"than the one to train (they differ at {', '.join(apart[:3])}); give the same "
            "--graph, --rule and --stem-stride"
        )
    model.load_state_dict(taken, strict=False)
