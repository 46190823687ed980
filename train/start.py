"""What a run may begin from: the network of another one, or the wiring that another one found."""

import torch
from torch import Tensor, nn

import dnw_graph
from dnw_graph._wrapped import unwrapped_names
from dnw_graph.wiring import Complete, selectors
from train.data import class_name
from train.options import Options, RunOptions
from train.run import RunFolder, build_network


def check_classes(folder: RunFolder, theirs: tuple[str, ...], ours: tuple[str, ...]) -> None:
    """Raise a ``ValueError`` where images have other classes than those a run was trained on."""
    theirs, ours = (tuple(map(class_name, names)) for names in (theirs, ours))
    if theirs != ours:
        at = next((i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), None)
        which = "" if at is None else f"; the first to differ are {theirs[at]!r} and {ours[at]!r}"
        raise ValueError(
            f"{folder.path} was trained on {len(theirs)} classes, the data have {len(ours)}{which}"
        )


def network_weights(folder: RunFolder, network: nn.Module) -> dict[str, Tensor]:
    """Return the trained weights of a run for a network, all but its classifier.

    Raises:
        ValueError: Not a run folder, or the run's network is another one.
    """
    classifier = _classifier(folder.load_config().options)
    ours = network.state_dict()
    theirs = unwrapped_names(folder.load_weights("last"), ours)
    taken = {k: v for k, v in theirs.items() if not k.startswith(classifier)}
    kept = {k for k in ours if k.startswith(classifier)}
    apart = sorted((taken.keys() | kept) ^ ours.keys())
    apart += [k for k in taken if k in ours and taken[k].shape != ours[k].shape]
    if apart:
        given = folder.load_config().options.network
        raise ValueError(
            f"--init {folder.path} is another network ({given}) than the one to train (they "
            f"differ at {', '.join(apart[:3])}); give the same --graph and options of it"
        )
    return taken


def _classifier(options: Options) -> str:
    """Return what the names of a network's classifier begin with: what the classes change."""
    with torch.device("meta"):
        two, three = (build_network(options, num_classes=n).state_dict() for n in (2, 3))
    name = next(name for name, value in two.items() if value.shape != three[name].shape)
    return name.partition(".")[0] + "."


def check_from(options: Options, network: nn.Module) -> None:
    """Raise a ``ValueError`` unless rule and ``--from`` go together.

    Args:
        options: The options of a new run.
        network: Its network, without memory for its weights.
    """
    sources = {entry.selector.rule.starts_from for entry in selectors(network)}
    rule, run = options.network.given().get("rule"), options.run
    if sources <= {"itself"}:
        if run.from_run is not None:
            raise ValueError(
                f"--from {run.from_run} is for the rules lottery and fine_tune, not for "
                f"{rule or options.network.graph}; --init starts from another run's network"
            )
        return
    if run.from_run is None:
        raise ValueError(
            f"rule {rule} keeps the largest weights of a trained complete graph: train one with "
            "--rule complete, and name its run folder with --from"
        )
    if run.init is not None:
        raise ValueError(f"rule {rule} takes its weights from --from, so leave --init out")
    folder = RunFolder(run.from_run)
    theirs, ours = folder.load_config().options, options.network
    kept = theirs.network
    with torch.device("meta"):
        rules = {
            type(entry.selector.rule) for entry in selectors(build_network(theirs, num_classes=2))
        }
    if not rules <= {Complete}:
        raise ValueError(
            f"--from {folder.path} is a run of {kept}; it has to be of a complete graph, "
            "--rule complete"
        )
    if not (folder.path / "summary.json").exists():
        raise ValueError(
            f"--from {folder.path} is not finished; finish it with --resume {folder.path}"
        )
    for name in ("norm_eps", "stem_stride"):
        before, now = (getattr(network, name, None) for network in (kept, ours))
        if now is not None and before != now:
            raise ValueError(
                f"--from {folder.path} was trained with {name} {before}, not {now}; give the same"
            )


def begin_from(model: nn.Module, run: RunOptions, classes: tuple[str, ...]) -> None:
    """Give a network the weights, or the wiring, that options name a run for, if they do.

    Raises:
        ValueError: Not such a run, or one of another network.
    """
    if run.init:
        model.load_state_dict(network_weights(RunFolder(run.init), model), strict=False)
    if run.from_run:
        inherit(model, run.from_run, classes)


def inherit(model: nn.Module, from_run: str, classes: tuple[str, ...]) -> None:
    """Give a network the wiring, and the weights, of a finished run of the complete graph.

    Raises:
        ValueError: The run has other classes, or another network.
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
