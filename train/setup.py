"""Checks and setup before training starts: batches, schedule, folder, the run to continue."""

import dataclasses
import logging
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from train.checkpoint import Checkpoints
from train.data import Batches, ResidentBatches, Source, fits
from train.options import OptimizationOptions, Options
from train.process_group import restarted
from train.run import RunConfig, RunFolder, build_network
from train.start import check_classes, check_from, network_weights

_log = logging.getLogger(__name__)

FREE_ON_RESUME = {
    *("data", "validation_data", "workers", "bad_images", "device", "resume", "auto_resume"),
    *("checkpoint_every", "checkpoint_minutes", "report", "wandb"),
}
"""Options that may differ from those of the run that is continued."""


def make_batches(
    source: Source, config: RunConfig, device: torch.device, rank: int = 0, world_size: int = 1
) -> Batches | ResidentBatches:
    """Return a process' part of the batches of a run.

    Args:
        source: The images, which may differ from those of the run.
        config: The configuration of the run.
        device: The device of training.
        rank: Rank of this process.
        world_size: Number of processes.

    Raises:
        ValueError: If a batch cannot be divided equally among processes.
    """
    options, source = config.options, replace(source, augmentation=config.augmentation)
    size, batch_size = options.data.image_size, options.optimization.batch_size
    seed = options.run.seed
    if batch_size % world_size:
        raise ValueError(
            f"--batch-size {batch_size} counts the images of all processes, so it must be a "
            f"multiple of their number, {world_size}"
        )
    if fits(source):
        return ResidentBatches(
            source,
            image_size=size,
            batch_size=batch_size,
            seed=seed,
            device=device,
            rank=rank,
            world_size=world_size,
        )
    return Batches(
        source,
        image_size=size,
        batch_size=batch_size,
        seed=seed,
        workers=options.data.workers,
        on_cpu=device.type == "cpu",
        rank=rank,
        world_size=world_size,
    )


def make_schedule(
    optimizer: torch.optim.Optimizer, fit: OptimizationOptions, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Return the learning rate schedule: a linear warm-up, then the decay.

    Args:
        optimizer: The optimizer whose learning rate is set before each step.
        fit: Number of epochs, warm-up epochs, and kind of decay.
        steps: Steps per epoch.
    """
    warmup, total = fit.warmup_epochs * steps, fit.epochs * steps

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if fit.lr_schedule == "steps":
            return 0.1 ** (int(step >= total / 2) + int(step >= 3 * total / 4))
        return (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def default_folder(options: Options) -> str:
    """Return the run folder for options without ``--out``."""
    values = options.network.given().items()
    words = [options.network.graph, *(name if value is True else value for name, value in values)]
    parts = [re.sub(r"[^\w.]+", "_", str(word)).strip("_") for word in words]
    return f"runs/{'-'.join(parts)}-seed{options.run.seed}"


def go_on(options: Options) -> Options:
    """Return options that continue the run in ``--out``, if ``--auto-resume`` or torchrun asks to.

    This lets a cluster or torchrun repeat a command unchanged. If there is no such run, the options
    are returned unchanged; if it stopped before its first checkpoint, they overwrite it.
    """
    run = options.run
    if run.resume is not None or not (run.auto_resume or restarted()):
        return options
    assert run.out is not None
    if not Path(run.out).exists():
        return options
    if Checkpoints(run.out):
        return options.replace(resume=run.out, overwrite=False)
    weights = (Path(run.out) / f"{name}.safetensors" for name in ("last", "best"))
    if any(path.exists() for path in weights):  # trained weights are not overwritten
        return options
    return options.replace(overwrite=True)  # it stopped before its first checkpoint


@dataclass(frozen=True)
class PreviousRun:
    """The folder, configuration and state of a run to continue."""

    folder: RunFolder
    config: RunConfig
    state: dict[str, Any]

    def check_images(self, source: Source) -> None:
        """Raise ValueError if images are not those of the run."""
        check_classes(self.folder, self.config.classes, source.classes)
        fingerprint = self.state.get("images")
        if fingerprint != source.fingerprint():
            raise ValueError(
                f"{self.folder.path} was trained on other images ({fingerprint}; now "
                f"{source.fingerprint()}): order and learning rate would change. Resume with the "
                "original images, or start a new run from its network with "
                f"--init {self.folder.path}"
            )


def check_resume(options: Options) -> PreviousRun | None:
    """Return the run to continue, or None if ``--resume`` is not set.

    Raises:
        ValueError: If the options of the run differ, or it has no checkpoint.
    """
    if options.run.resume is None:
        return None
    folder = RunFolder(options.run.resume)
    config, state = folder.load_config(), Checkpoints(folder.path).load()
    edits = _differences(Options.from_flat(state.get("options", {})), config.options)
    if edits.keys() - {"init", "out"}:
        raise ValueError(
            f"{folder.path}/config.yaml was changed after training began: {_as_text(edits)}; "
            "a run continues with its original options, so undo the change"
        )
    changes = _differences(config.options, options)
    if changes.keys() & {"out", "overwrite"}:
        raise ValueError(
            f"{folder.path} is continued in place: use --resume without --out and --overwrite"
        )
    if changes:
        raise ValueError(
            f"{folder.path} was trained with {_as_text(changes)}; resume without changing options "
            f"(only --resume {folder.path}), or start a new run from its network with "
            f"--init {folder.path}"
        )
    return PreviousRun(folder, config, state)


def _differences(before: Options, after: Options) -> dict[str, tuple[Any, Any]]:
    """Return the options that differ although they may not, with both values."""
    differences = before.differences(after)
    return {name: both for name, both in differences.items() if name not in FREE_ON_RESUME}


def _as_text(changes: dict[str, tuple[Any, Any]], label: str = "now") -> str:
    """Return differences as text: each option's first value, and its second with a label."""
    return ", ".join(
        f"{k} {first!r} ({label}: {second!r})" for k, (first, second) in changes.items()
    )


def check_network(options: Options) -> nn.Module:
    """Return the network on the meta device, to check that it can be built.

    Raises:
        ValueError: If the model or rule is unknown, or a size is invalid.
    """
    with torch.device("meta"):
        return build_network(options, num_classes=2)


def check_new(options: Options, network: nn.Module, first: bool = True) -> RunFolder:
    """Return the folder of a new run, after checking ``--out``, ``--init`` and ``--from``.

    Args:
        options: The options of the run.
        network: Its network, on the meta device.
        first: Whether this is the process that writes files; only this one checks the folder.

    Raises:
        ValueError: If the folder is taken, or ``--init`` does not name a run of the same network.
    """
    run = options.run
    assert run.out is not None
    folder = RunFolder(run.out)
    check_from(options, network)
    if run.init is not None:
        if folder.path.resolve() == Path(run.init).resolve():
            raise ValueError(
                f"--init {run.init} would be overwritten by the run; choose another folder with "
                "--out"
            )
        network_weights(RunFolder(run.init), network)
        if first:
            _report_changes(RunFolder(run.init), options)
    if first:
        folder.check_free(run.overwrite)
    return folder


def _report_changes(folder: RunFolder, options: Options) -> None:
    """Log the differences between a run's network options and those of a new run."""
    before, after = folder.load_config().options.network, options.network.resolved()
    changes = {
        name: (value, getattr(after, name))
        for name, value in dataclasses.asdict(before).items()
        if name not in ("graph", "backend") and value != getattr(after, name)
    }
    if changes:
        _log.warning(
            "--init %s is a network with %s: the new run's network may compute something else with "
            "the same weights",
            *(folder.path, _as_text(changes, "here")),
        )
