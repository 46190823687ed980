"""What has to be right before training starts: device, folder, images, what a run begins from."""

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
    """Return a process' part of the batches of a run, on its own images or others.

    Raises:
        ValueError: Batches that cannot be shared out.
    """
    options, source = config.options, replace(source, augmentation=config.augmentation)
    size, batch_size = options.data.image_size, options.optimization.batch_size
    seed = options.run.seed
    if batch_size % world_size:
        raise ValueError(
            f"--batch-size {batch_size} counts the images of all processes, and has to be a "
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
    """Return what sets the learning rate before each step: a linear rise, then the way down.

    Args:
        optimizer: Whose learning rate it is.
        fit: Epochs in all, those of the rise, and how it falls.
        steps: Steps of an epoch.
    """
    rise, total = fit.warmup_epochs * steps, fit.epochs * steps

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        if fit.lr_schedule == "steps":
            return 0.1 ** (int(step >= total / 2) + int(step >= 3 * total / 4))
        return (1 + math.cos(math.pi * (step - rise) / (total - rise))) / 2

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def default_folder(options: Options) -> str:
    """Return the run folder of options that name none."""
    given = options.network.given().items()
    told = [options.network.graph, *(name if value is True else value for name, value in given)]
    parts = [re.sub(r"[^\w.]+", "_", str(part)).strip("_") for part in told]
    return f"runs/{'-'.join(parts)}-seed{options.run.seed}"


def go_on(options: Options) -> Options:
    """Return options that continue the run in ``--out`` where there is one and that is wanted.

    So a command may be given again as it is, by a cluster or by torchrun.
    """
    run = options.run
    if run.resume is not None or not (run.auto_resume or restarted()):
        return options
    assert run.out is not None
    if not Path(run.out).exists():
        return options
    if Checkpoints(run.out):
        return options.replace(resume=run.out, overwrite=False)
    kept = (Path(run.out) / f"{name}.safetensors" for name in ("last", "best"))
    if any(path.exists() for path in kept):  # a run of another kind, which is not begun again
        return options
    return options.replace(overwrite=True)  # it ended before there was anything to keep


@dataclass(frozen=True)
class PreviousRun:
    """A run that is continued: its folder, configuration and state."""

    folder: RunFolder
    config: RunConfig
    state: dict[str, Any]

    def check_images(self, source: Source) -> None:
        """Raise a ``ValueError`` where images are not those of the run."""
        check_classes(self.folder, self.config.classes, source.classes)
        seen = self.state.get("images")
        if seen != source.fingerprint():
            raise ValueError(
                f"{self.folder.path} was trained on other images ({seen}; the data given: "
                f"{source.fingerprint()}): order and learning rate would change. Resume with the "
                f"images it had, or start a new run from its network with --init {self.folder.path}"
            )


def check_resume(options: Options) -> PreviousRun | None:
    """Return the run that options continue, if they do.

    Raises:
        ValueError: The run is of other options, or has nothing to resume.
    """
    if options.run.resume is None:
        return None
    folder = RunFolder(options.run.resume)
    config, state = folder.load_config(), Checkpoints(folder.path).load()
    begun = _differences(Options.from_flat(state.get("options", {})), config.options)
    if begun.keys() - {"init", "out"}:
        raise ValueError(
            f"{folder.path}/config.yaml was changed after training began: {_listed(begun)}; "
            "a run goes on as it was, so change that back"
        )
    apart = _differences(config.options, options)
    if apart.keys() & {"out", "overwrite"}:
        raise ValueError(
            f"{folder.path} is continued where it is: give --resume without --out and --overwrite"
        )
    if apart:
        raise ValueError(
            f"{folder.path} was trained with {_listed(apart)}; resume with its own options (just "
            f"--resume {folder.path}), or start a new run from its network with "
            f"--init {folder.path}"
        )
    return PreviousRun(folder, config, state)


def _differences(theirs: Options, ours: Options) -> dict[str, tuple[Any, Any]]:
    """Return the options that differ and may not."""
    apart = theirs.differences(ours)
    return {name: both for name, both in apart.items() if name not in FREE_ON_RESUME}


def _listed(apart: dict[str, tuple[Any, Any]], which: str = "asked") -> str:
    return ", ".join(f"{k} {theirs!r} ({which}: {ours!r})" for k, (theirs, ours) in apart.items())


def check_network(options: Options) -> nn.Module:
    """Return the network without memory for its weights, to see that it can be built at all.

    Raises:
        ValueError: An unknown model or rule, a size it cannot have.
    """
    with torch.device("meta"):
        return build_network(options, num_classes=2)


def check_new(options: Options, network: nn.Module, first: bool = True) -> RunFolder:
    """Return the folder of a new run.

    Args:
        options: Of the run.
        network: Its network, without memory for its weights.
        first: Whether this is the process that writes files; others find what it has written.

    Raises:
        ValueError: The folder is taken, or ``--init`` names no run, or one of another network.
    """
    run = options.run
    assert run.out is not None
    folder = RunFolder(run.out)
    check_from(options, network)
    if run.init is not None:
        if folder.path.resolve() == Path(run.init).resolve():
            raise ValueError(f"--init {run.init} would be overwritten by the run; choose --out")
        network_weights(RunFolder(run.init), network)
        if first:
            _report_changes(RunFolder(run.init), options)
    if first:
        folder.check_free(run.overwrite)
    return folder


def _report_changes(folder: RunFolder, options: Options) -> None:
    """Log the options by which a network computes something else with the same weights."""
    theirs, ours = folder.load_config().options.network, options.network.resolved()
    changes = {
        name: (value, getattr(ours, name))
        for name, value in dataclasses.asdict(theirs).items()
        if name not in ("graph", "backend") and value != getattr(ours, name)
    }
    if changes:
        _log.warning(
            "--init %s is a network with %s: with the same weights it may compute something else",
            *(folder.path, _listed(changes, "here")),
        )
