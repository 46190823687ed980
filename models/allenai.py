"""Networks out of checkpoints of the published implementation, allenai/dnw."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from dnw_graph._wrapped import unwrapped_names
from models.mbv1_dnw import STAGES, MobileNetV1DNW, MobileNetV1DNWConfig, Stage
from models.tiny import EDGES, INPUTS, NODES, OUTPUTS, TinyClassifier, TinyConfig, in_time

Kind = Literal["mbv1_dnw", "mbv1_dnw_small", "mbv1_random", "discrete", "continuous"]

_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class Imported:
    """A network of the published implementation.

    Attributes:
        model: The network, in evaluation mode.
        name: What the registry calls networks like it.
        options: What :func:`models.create_model` builds the same network from; None for one of
            sizes that the registry does not have.
    """

    model: nn.Module
    name: str
    options: dict[str, Any] | None


def load_allenai(
    state_dict: Mapping[str, Tensor],
    *,
    kind: Kind,
    prune_rate: float,
    image_size: int = 224,
    layers: int = 5,
) -> nn.Module:
    """Return the network of a checkpoint of the published implementation, in evaluation mode.

    It gives the same logits. Sizes follow from the tensors; the real edges are those that the
    implementation keeps, as far as its forward pass reads them.

    Args:
        state_dict: The checkpoint's ``"model"``; names may begin with ``module.``.
        kind: Which of its networks: ``"mbv1_dnw"``, ``"mbv1_dnw_small"``, ``"mbv1_random"``,
            ``"discrete"`` or ``"continuous"``.
        prune_rate: Its flag of that name: 1 less the width multiplier, or the share of edges
            that are not real.
        image_size: Height and width of the images, in pixels; up to 64 the stem has stride 1.
        layers: Its flag of that name, the steps of kind ``"discrete"``.

    Raises:
        ValueError: Another kind, a rate outside [0, 1), tensors that are missing, unknown, of the
            wrong shape or not finite.
    """
    return read_allenai(
        state_dict, kind=kind, prune_rate=prune_rate, image_size=image_size, layers=layers
    ).model


def read_allenai(
    state_dict: Mapping[str, Tensor],
    *,
    kind: Kind,
    prune_rate: float,
    image_size: int = 224,
    layers: int = 5,
) -> Imported:
    """Return the network of :func:`load_allenai`, and what the registry builds it from."""
    if kind not in get_args(Kind):
        raise ValueError(f"unknown kind {kind!r} (known: {', '.join(get_args(Kind))})")
    if not 0 <= prune_rate < 1:
        raise ValueError(f"prune_rate must be a share, 0 or more and below 1, got {prune_rate}")
    state = unwrapped_names(state_dict)
    for name, value in state.items():
        single = not value.dim() and not name.endswith("num_batches_tracked")
        if value.layout != torch.strided or single:
            kind_of = "a single number" if single else f"of layout {value.layout}"
            raise ValueError(f"{name} of the checkpoint is {kind_of}, not a tensor of weights")
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name} of the checkpoint has entries that are not finite")
    if kind.startswith("mbv1"):
        return _mobilenet(state, kind, prune_rate, image_size)
    return _tiny(state, kind, prune_rate, image_size, layers)


class _Translation:
    """What each of their tensors is here.

    Args:
        state: Their tensors, by name.
        kind: For errors.
    """

    def __init__(self, state: Mapping[str, Tensor], kind: str) -> None:
        self._state, self._kind = state, kind
        self._rules: dict[str, Callable[[Tensor], dict[str, Tensor]]] = {}
        self._ignored: set[str] = set()

    def shape(self, name: str) -> torch.Size:
        """Return the shape of a tensor that has to be there."""
        if name not in self._state:
            raise ValueError(
                f"this is no checkpoint of kind {self._kind!r}: it has no {name!r}, but "
                f"{', '.join(list(self._state)[:5]) or 'nothing'}, ..."
            )
        return self._state[name].shape

    def rename(self, theirs: str, ours: str) -> None:
        """Take a tensor as it is."""
        self._rules[theirs] = lambda value: {ours: value}

    def norm(self, theirs: str, ours: str) -> None:
        """Take a batch norm."""
        for part in _NORM:
            self.rename(f"{theirs}.{part}", f"{ours}.{part}")
        if f"{theirs}.num_batches_tracked" not in self._state:  # not in checkpoints of old
            self._rules[f"{theirs}.num_batches_tracked"] = lambda _: {}
            self._ignored.add(f"{theirs}.num_batches_tracked")

    def split(self, theirs: str, ours: Sequence[str], sizes: Sequence[int]) -> None:
        """Take a tensor in parts, by nodes."""

        def parts(value: Tensor) -> dict[str, Tensor]:
            if len(value) != sum(sizes):
                raise ValueError(f"{theirs} has {len(value)} nodes, but {sum(sizes)} are expected")
            return dict(zip(ours, value.split(list(sizes)), strict=True))

        self._rules[theirs] = parts

    def change(self, theirs: str, ours: str, change: Callable[[Tensor], Tensor]) -> None:
        """Take a tensor changed."""
        self._rules[theirs] = lambda value: {ours: change(value)}

    def ignore(self, theirs: str) -> None:
        """Expect a tensor, or not, of which nothing is needed."""
        self._ignored.add(theirs)

    def load(self, model: nn.Module) -> nn.Module:
        """Give a model these tensors, and return it in evaluation mode.

        Raises:
            ValueError: Tensors that are missing, unknown or of the wrong shape.
        """
        missing = [n for n in self._rules if n not in self._state and n not in self._ignored]
        unknown = [n for n in self._state if n not in self._rules and n not in self._ignored]
        if missing or unknown:
            parts = [("missing", missing), ("unknown", unknown)]
            listed = "; ".join(f"{w}: {', '.join(names[:5])}" for w, names in parts if names)
            raise ValueError(f"this is no checkpoint of kind {self._kind!r}; {listed}")
        ours = model.state_dict()
        for name, rule in self._rules.items():
            if name in self._state:
                for key, value in rule(self._state[name]).items():
                    if ours[key].shape != value.shape:
                        raise ValueError(
                            f"{name} of the checkpoint has shape {list(self._state[name].shape)}, "
                            f"which does not fit {key} {list(ours[key].shape)} of a network of "
                            f"kind {self._kind!r}"
                        )
                    ours[key] = value
        model.load_state_dict(ours)
        return model.eval()


def candidates(stage: Stage, matrix: Tensor) -> Tensor:
    """Return those entries of their full matrix that are candidate edges here, in our order."""
    matrix, width = matrix.flatten(1), stage.width
    rows = matrix.split(width)
    return torch.cat([r[:, : stage.inputs + j * width].flatten() for j, r in enumerate(rows)])


def _kept(matrix: Tensor, drop: int) -> Tensor:
    """Return which entries of a matrix are left when so many of the smallest are dropped."""
    kept = torch.ones(matrix.numel(), dtype=torch.bool)
    kept[matrix.flatten().abs().argsort()[:drop]] = False
    return kept.view(matrix.shape)


def _mobilenet(
    state: Mapping[str, Tensor], kind: str, prune_rate: float, image_size: int
) -> Imported:
    to, small, random = _Translation(state, kind), kind == "mbv1_dnw_small", kind == "mbv1_random"
    number = len({name.split(".")[1] for name in state if name.startswith("layers.")})
    stages, masks = [], []
    to.rename("conv1.weight", "stem.weight")
    to.norm("bn", "norm")
    for i in range(max(number, 1)):
        inputs = to.shape(f"layers.{i}.norm.0.weight")[0]
        targets, sources = to.shape(f"layers.{i}.graph.weight")[:2]
        hidden = sources - inputs
        stage = Stage(inputs, targets - hidden, 1 if i == 0 else 2, targets // (targets - hidden))
        stages.append(stage)
        to.rename(f"layers.{i}.downsample.0.weight", f"graphs.{i}.nodes.0.conv.weight")
        for block in range(stage.blocks):
            to.norm(f"layers.{i}.norm.{block}", f"graphs.{i}.nodes.{block}.norm")
        if stage.blocks > 1:
            names = [f"graphs.{i}.nodes.{b}.conv.weight" for b in range(1, stage.blocks)]
            to.split(f"layers.{i}.conv.weight", names, [stage.width] * (stage.blocks - 1))
        to.change(f"layers.{i}.graph.weight", f"graphs.{i}.weight", _candidates_of(stage))
        matrix = state[f"layers.{i}.graph.weight"]
        if random:
            to.shape(f"layers.{i}.graph.mask")
            mask = state[f"layers.{i}.graph.mask"] != 0
            to.change(f"layers.{i}.graph.mask", f"graphs.{i}.selector.edge_id", _ids_of(stage))
        else:
            edges = stage.inputs * stage.width + (stage.blocks - 1) * stage.width**2
            share = 1 - edges * (1 - prune_rate) ** 2 / matrix.numel()
            mask = _kept(matrix, int(share * matrix.numel()))
        masks.append(candidates(stage, mask))
    if small:
        classes = to.shape("linear.graph.weight")[0]
        to.change("linear.graph.weight", "classifier.weight", torch.flatten)
        matrix = state["linear.graph.weight"]
        masks.append(_kept(matrix, int(prune_rate * matrix.numel())))
    else:
        classes = to.shape("linear.weight")[0]
        to.rename("linear.weight", "classifier.weight")
        to.rename("linear.bias", "classifier.bias")
    options: dict[str, Any] = {
        "width": round(1 - prune_rate, 6),
        "num_edges": tuple(int(mask.sum()) for mask in masks),
        "norm_eps": 1e-5,
        "image_size": image_size,
        "num_classes": classes,
    }
    config = MobileNetV1DNWConfig(**options)
    model = MobileNetV1DNW(config, "random" if random else "dnw", small, stages)
    known = tuple(stages) == STAGES
    return Imported(to.load(model), kind, options if known else None)


def _candidates_of(stage: Stage) -> Callable[[Tensor], Tensor]:
    return lambda matrix: candidates(stage, matrix)


def _ids_of(stage: Stage) -> Callable[[Tensor], Tensor]:
    return lambda mask: candidates(stage, mask).nonzero().flatten()


def _tiny(
    state: Mapping[str, Tensor], kind: str, prune_rate: float, image_size: int, layers: int
) -> Imported:
    to = _Translation(state, kind)
    inside = "odesolve.odefunc." if kind == "continuous" else ""
    nodes = to.shape(f"{inside}graph.weight")[0]
    inputs, (classes, outputs) = to.shape("downsample.4.weight")[0], to.shape("fc.weight")
    sizes = inputs, nodes - inputs - outputs, outputs
    to.ignore("zeros")
    for layer in (0, 3, 4):
        for part in ("weight", "bias"):
            to.rename(f"downsample.{layer}.{part}", f"stem.{layer}.{part}")
    for layer in (1, 5):
        to.norm(f"downsample.{layer}", f"stem.{layer}")
    for part in ("weight", "bias"):
        to.rename(f"fc.{part}", f"classifier.{part}")
        names = [f"graph.nodes.{i}.norm.{part}" for i in range(3)]
        to.split(f"{inside}norm.{part}", names, sizes)
    names = [f"graph.messages.{i}.conv.weight" for i in range(3)]
    to.split(f"{inside}conv.weight", names, sizes)
    to.change(f"{inside}graph.weight", "graph.weight", torch.flatten)
    matrix, random = state[f"{inside}graph.weight"], f"{inside}graph.mask" in state
    num_edges = matrix.numel() - int(prune_rate * matrix.numel())
    if random:
        num_edges = int(torch.count_nonzero(state[f"{inside}graph.mask"]))
        to.change(
            f"{inside}graph.mask",
            "graph.selector.edge_id",
            lambda mask: mask.flatten().nonzero().flatten(),
        )
    options: dict[str, Any] = {
        "rule": "random" if random else "dnw",
        "norm_eps": 1e-5,
        "image_size": image_size,
        "num_classes": classes,
        # Their solver starts from, and ends with, states that the ReLU has changed in place.
        "schedule": f"discrete(steps={layers})"
        if kind == "discrete"
        else "continuous(rtol=1e-3, atol=1e-3, rectified=True)",
    }
    config = TinyConfig(**options)
    graph = in_time(config, f"tiny_{kind}", sizes, num_edges)
    known = (nodes, inputs, outputs, num_edges) == (NODES, INPUTS, OUTPUTS, EDGES)
    model = to.load(TinyClassifier(config, graph))
    return Imported(model, f"tiny_{kind}", options if known else None)
