"""Start a run: its folder, and the network or wiring of another run that it starts from."""

import dataclasses
import logging
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dnw_graph
from dnw_graph._wrapped import unwrapped_names
from dnw_graph.wiring import Complete, selectors
from models import ModelConfig, model_config
from train.data import class_name
from train.options import Options, RunOptions
from train.run import RunFolder, build_network

_log = logging.getLogger(__name__)


def default_folder(options: Options) -> str:
    """Return the run folder for options without ``--out``."""
    values = options.network.given().items()
    words = [options.network.graph, *(name if value is True else value for name, value in values)]
    parts = [re.sub(r"[^\w.]+", "_", str(word)).strip("_") for word in words]
    return f"runs/{'-'.join(parts)}-seed{options.run.seed}"


def check_classes(folder: RunFolder, theirs: tuple[str, ...], ours: tuple[str, ...]) -> None:
    """Raise ValueError if the classes of the images are not those that a run was trained on.

    Args:
        folder: The run folder.
        theirs: Class names of the run.
        ours: Class names of the images.
    """
    theirs, ours = (tuple(map(class_name, names)) for names in (theirs, ours))
    if theirs != ours:
        at = next((i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), None)
        detail = "" if at is None else f"; the first to differ are {theirs[at]!r} and {ours[at]!r}"
        raise ValueError(
            f"{folder.path} was trained on {len(theirs)} classes, the data have {len(ours)}{detail}"
        )


def network_weights(folder: RunFolder, network: nn.Module) -> dict[str, Tensor]:
    """Return the trained weights of a run for a network, except those of its classifier.

    Raises:
        ValueError: If this is not a run folder, or its network differs.
    """
    classifier = _classifier(folder.load_config().options)
    state = network.state_dict()
    trained = unwrapped_names(folder.load_weights("last"), state)
    weights = {k: v for k, v in trained.items() if not k.startswith(classifier)}
    new = {k for k in state if k.startswith(classifier)}
    differences = sorted((weights.keys() | new) ^ state.keys())
    differences += [k for k in weights if k in state and weights[k].shape != state[k].shape]
    if differences:
        options = folder.load_config().options.network
        raise ValueError(
            f"the network of --init {folder.path} ({options}) differs from the one to train (at "
            f"{', '.join(differences[:3])}); use its --graph and network options"
        )
    return weights


def _classifier(options: Options) -> str:
    """Return the prefix of the names of a network's classifier: the weights that classes resize."""
    with torch.device("meta"):
        numbers = ModelConfig.num_classes, ModelConfig.num_classes + 1
        one, other = (build_network(options, num_classes=n).state_dict() for n in numbers)
    name = next(name for name, value in one.items() if value.shape != other[name].shape)
    return name.partition(".")[0] + "."


def check_from(options: Options, network: nn.Module) -> None:
    """Raise ValueError if ``--from`` does not match the rule.

    Args:
        options: The options of a new run.
        network: Its network, on the meta device.
    """
    sources = {entry.selector.rule.starts_from for entry in selectors(network)}
    rule, run = options.network.given().get("rule"), options.run
    if sources <= {"itself"}:
        if run.from_run is not None:
            raise ValueError(
                f"--from {run.from_run} is for the rules lottery and fine_tune, not for "
                f"{rule or options.network.graph}; use --init to start from another run's network"
            )
        return
    if run.from_run is None:
        raise ValueError(
            f"rule {rule} keeps the largest weights of a trained complete graph: train one with "
            "--rule complete, and pass its run folder with --from"
        )
    if run.init is not None:
        raise ValueError(f"rule {rule} takes its weights from --from, so leave out --init")
    folder = RunFolder(run.from_run)
    complete = folder.load_config().options
    with torch.device("meta"):
        rules = {
            type(entry.selector.rule) for entry in selectors(build_network(complete, num_classes=2))
        }
    if not rules <= {Complete}:
        raise ValueError(
            f"--from {folder.path} is a run of {complete.network}; it must be a run of a complete "
            "graph, --rule complete"
        )
    if not (folder.path / "summary.json").exists():
        raise ValueError(
            f"--from {folder.path} is not finished; finish it with --resume {folder.path}"
        )
    for name in model_config(options.network.graph).not_in_shapes:
        before, now = (getattr(o.network, name, None) for o in (complete, options))
        if before != now:
            raise ValueError(
                f"--from {folder.path} was trained with {name} {before}, not {now}; use the same"
            )


def begin_from(model: nn.Module, run: RunOptions, classes: tuple[str, ...]) -> None:
    """Load the weights of the run ``--init`` and the wiring of the run ``--from``, if they are set.

    Raises:
        ValueError: If a run is not suitable, or its network differs.
    """
    if run.init:
        model.load_state_dict(network_weights(RunFolder(run.init), model), strict=False)
    if run.from_run:
        inherit(model, run.from_run, classes)


def inherit(model: nn.Module, from_run: str, classes: tuple[str, ...]) -> None:
    """Set the wiring and the weights of a network from a finished run of the complete graph.

    Raises:
        ValueError: If the classes or the network of the run differ.
    """
    folder = RunFolder(from_run)
    check_classes(folder, folder.load_config().classes, classes)
    weights = {
        "initial": folder.load_weights("initial"),
        "trained": folder.load_weights("last"),
    }
    try:
        dnw_graph.inherit(model, **weights)
    except ValueError as error:
        raise ValueError(f"--from {folder.path}: {error}") from error


def check_network(options: Options) -> nn.Module:
    """Return the network on the meta device, to check that it can be built.

    The number of classes is not known yet. The models' default is less likely than a small number
    to be too small for the options, such as a number of edges.

    Raises:
        ValueError: If the model or rule is unknown, or a size is invalid.
    """
    with torch.device("meta"):
        return build_network(options, num_classes=ModelConfig.num_classes)


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
            *(folder.path, differences_as_text(changes, "here")),
        )


def differences_as_text(changes: dict[str, tuple[Any, Any]], label: str = "now") -> str:
    """Return differences as text: each option's first value, and its second with a label."""
    return ", ".join(
        f"{k} {first!r} ({label}: {second!r})" for k, (first, second) in changes.items()
    )
