"""Load checkpoints of the published implementation, allenai/dnw."""

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
    """A network loaded from a checkpoint of the published implementation.

    Attributes:
        model: The network, in evaluation mode.
        name: Name of the corresponding model in the registry.
        options: Options with which :func:`models.create_model` builds the same network; None if
            the registry has no model of these sizes.
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

    The network returns the same logits. Its sizes follow from the tensors. Its real edges are those
    that the implementation keeps and that its forward pass reads.

    Args:
        state_dict: The checkpoint's ``"model"``; names may begin with ``module.``.
        kind: Network type: ``"mbv1_dnw"``, ``"mbv1_dnw_small"``, ``"mbv1_random"``, ``"discrete"``
            or ``"continuous"``.
        prune_rate: The implementation's flag of that name: 1 minus the width multiplier, or the
            share of edges that are not real.
        image_size: Height and width of the images, in pixels; up to 64 the stem has stride 1.
        layers: The implementation's flag of that name: the number of steps of kind ``"discrete"``.

    Raises:
        ValueError: If the kind is unknown, the rate is outside [0, 1), or tensors are missing,
            unknown, of the wrong shape or not finite.
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
    """Return the network of :func:`load_allenai` with its name and options in the registry."""
    if kind not in get_args(Kind):
        raise ValueError(f"unknown kind {kind!r} (known: {', '.join(get_args(Kind))})")
    if not 0 <= prune_rate < 1:
        raise ValueError(f"prune_rate must be a share, 0 or more and below 1, got {prune_rate}")
    state = unwrapped_names(state_dict)
    for name, value in state.items():
        is_scalar = not value.dim() and not name.endswith("num_batches_tracked")
        if value.layout != torch.strided or is_scalar:
            reason = "a single number" if is_scalar else f"of layout {value.layout}"
            raise ValueError(f"{name} of the checkpoint is {reason}; expected a tensor of weights")
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name} of the checkpoint has entries that are not finite")
    if kind.startswith("mbv1"):
        return _mobilenet(state, kind, prune_rate, image_size)
    return _tiny(state, kind, prune_rate, image_size, layers)


class _Translation:
    """Maps the tensors of a checkpoint to those of a network of this library.

    Args:
        state: The checkpoint's tensors, by name.
        kind: Network type, for error messages.
    """

    def __init__(self, state: Mapping[str, Tensor], kind: str) -> None:
        self._state, self._kind = state, kind
        self._rules: dict[str, Callable[[Tensor], dict[str, Tensor]]] = {}
        self._ignored: set[str] = set()

    def shape(self, name: str) -> torch.Size:
        """Return the shape of a required tensor."""
        if name not in self._state:
            raise ValueError(
                f"this is not a checkpoint of kind {self._kind!r}: it has no {name!r}, but "
                f"{', '.join(list(self._state)[:5]) or 'nothing'}, ..."
            )
        return self._state[name].shape

    def rename(self, source: str, target: str) -> None:
        """Copy a tensor unchanged."""
        self._rules[source] = lambda value: {target: value}

    def norm(self, source: str, target: str) -> None:
        """Copy the tensors of a batch norm."""
        for part in _NORM:
            self.rename(f"{source}.{part}", f"{target}.{part}")
        if f"{source}.num_batches_tracked" not in self._state:  # missing in old checkpoints
            self._rules[f"{source}.num_batches_tracked"] = lambda _: {}
            self._ignored.add(f"{source}.num_batches_tracked")

    def split(self, source: str, targets: Sequence[str], sizes: Sequence[int]) -> None:
        """Split a tensor along its nodes into several tensors."""

        def parts(value: Tensor) -> dict[str, Tensor]:
            if len(value) != sum(sizes):
                raise ValueError(f"{source} has {len(value)} nodes, but {sum(sizes)} are expected")
            return dict(zip(targets, value.split(list(sizes)), strict=True))

        self._rules[source] = parts

    def change(self, source: str, target: str, change: Callable[[Tensor], Tensor]) -> None:
        """Copy a tensor after applying a function to it."""
        self._rules[source] = lambda value: {target: change(value)}

    def ignore(self, source: str) -> None:
        """Accept a tensor that may be present but is not needed."""
        self._ignored.add(source)

    def load(self, model: nn.Module) -> nn.Module:
        """Load the tensors into a model, and return it in evaluation mode.

        Raises:
            ValueError: If tensors are missing, unknown or of the wrong shape.
        """
        missing = [n for n in self._rules if n not in self._state and n not in self._ignored]
        unknown = [n for n in self._state if n not in self._rules and n not in self._ignored]
        if missing or unknown:
            groups = [("missing", missing), ("unknown", unknown)]
            problems = "; ".join(f"{g}: {', '.join(names[:5])}" for g, names in groups if names)
            raise ValueError(f"this is not a checkpoint of kind {self._kind!r}; {problems}")
        tensors = model.state_dict()
        for name, rule in self._rules.items():
            if name in self._state:
                for key, value in rule(self._state[name]).items():
                    if tensors[key].shape != value.shape:
                        raise ValueError(
                            f"{name} of the checkpoint has shape {list(self._state[name].shape)}, "
                            f"which does not fit {key} {list(tensors[key].shape)} of a network of "
                            f"kind {self._kind!r}"
                        )
                    tensors[key] = value
        model.load_state_dict(tensors)
        return model.eval()


def candidates(stage: Stage, matrix: Tensor) -> Tensor:
    """Return the entries of a checkpoint's full matrix that are candidate edges here, in order."""
    matrix, width = matrix.flatten(1), stage.width
    rows = matrix.split(width)
    return torch.cat([r[:, : stage.inputs + j * width].flatten() for j, r in enumerate(rows)])


def _largest(matrix: Tensor, drop: int) -> Tensor:
    """Return a mask of the entries that remain when the ``drop`` smallest are removed."""
    mask = torch.ones(matrix.numel(), dtype=torch.bool)
    mask[matrix.flatten().abs().argsort()[:drop]] = False
    return mask.view(matrix.shape)


def _mobilenet(
    state: Mapping[str, Tensor], kind: str, prune_rate: float, image_size: int
) -> Imported:
    """Return a MobileNetV1-DNW network from the tensors of a checkpoint."""
    translation, small, random = (
        _Translation(state, kind),
        kind == "mbv1_dnw_small",
        kind == "mbv1_random",
    )
    number = len({name.split(".")[1] for name in state if name.startswith("layers.")})
    stages, masks = [], []
    translation.rename("conv1.weight", "stem.weight")
    translation.norm("bn", "norm")
    for i in range(max(number, 1)):
        inputs = translation.shape(f"layers.{i}.norm.0.weight")[0]
        targets, sources = translation.shape(f"layers.{i}.graph.weight")[:2]
        hidden = sources - inputs
        stage = Stage(inputs, targets - hidden, 1 if i == 0 else 2, targets // (targets - hidden))
        stages.append(stage)
        translation.rename(f"layers.{i}.downsample.0.weight", f"graphs.{i}.nodes.0.conv.weight")
        for block in range(stage.blocks):
            translation.norm(f"layers.{i}.norm.{block}", f"graphs.{i}.nodes.{block}.norm")
        if stage.blocks > 1:
            names = [f"graphs.{i}.nodes.{b}.conv.weight" for b in range(1, stage.blocks)]
            translation.split(f"layers.{i}.conv.weight", names, [stage.width] * (stage.blocks - 1))
        translation.change(f"layers.{i}.graph.weight", f"graphs.{i}.weight", _candidates_of(stage))
        matrix = state[f"layers.{i}.graph.weight"]
        if random:
            translation.shape(f"layers.{i}.graph.mask")
            mask = state[f"layers.{i}.graph.mask"] != 0
            translation.change(
                f"layers.{i}.graph.mask", f"graphs.{i}.selector.edge_id", _ids_of(stage)
            )
        else:
            edges = stage.inputs * stage.width + (stage.blocks - 1) * stage.width**2
            share = 1 - edges * (1 - prune_rate) ** 2 / matrix.numel()
            mask = _largest(matrix, int(share * matrix.numel()))
        masks.append(candidates(stage, mask))
    if small:
        classes = translation.shape("linear.graph.weight")[0]
        translation.change("linear.graph.weight", "classifier.weight", torch.flatten)
        matrix = state["linear.graph.weight"]
        masks.append(_largest(matrix, int(prune_rate * matrix.numel())))
    else:
        classes = translation.shape("linear.weight")[0]
        translation.rename("linear.weight", "classifier.weight")
        translation.rename("linear.bias", "classifier.bias")
    options: dict[str, Any] = {
        "width": round(1 - prune_rate, 6),
        "num_edges": tuple(int(mask.sum()) for mask in masks),
        "norm_eps": 1e-5,
        "image_size": image_size,
        "num_classes": classes,
    }
    config = MobileNetV1DNWConfig(**options)
    model = MobileNetV1DNW(config, "random" if random else "dnw", small, stages)
    is_registered = tuple(stages) == STAGES
    return Imported(translation.load(model), kind, options if is_registered else None)


def _candidates_of(stage: Stage) -> Callable[[Tensor], Tensor]:
    return lambda matrix: candidates(stage, matrix)


def _ids_of(stage: Stage) -> Callable[[Tensor], Tensor]:
    return lambda mask: candidates(stage, mask).nonzero().flatten()


def _tiny(
    state: Mapping[str, Tensor], kind: str, prune_rate: float, image_size: int, layers: int
) -> Imported:
    """Return a tiny classifier in time from the tensors of a checkpoint."""
    translation = _Translation(state, kind)
    prefix = "odesolve.odefunc." if kind == "continuous" else ""
    nodes = translation.shape(f"{prefix}graph.weight")[0]
    inputs = translation.shape("downsample.4.weight")[0]
    classes, outputs = translation.shape("fc.weight")
    sizes = inputs, nodes - inputs - outputs, outputs
    translation.ignore("zeros")
    for layer in (0, 3, 4):
        for part in ("weight", "bias"):
            translation.rename(f"downsample.{layer}.{part}", f"stem.{layer}.{part}")
    for layer in (1, 5):
        translation.norm(f"downsample.{layer}", f"stem.{layer}")
    for part in ("weight", "bias"):
        translation.rename(f"fc.{part}", f"classifier.{part}")
        names = [f"graph.nodes.{i}.norm.{part}" for i in range(3)]
        translation.split(f"{prefix}norm.{part}", names, sizes)
    names = [f"graph.messages.{i}.conv.weight" for i in range(3)]
    translation.split(f"{prefix}conv.weight", names, sizes)
    translation.change(f"{prefix}graph.weight", "graph.weight", torch.flatten)
    matrix, random = state[f"{prefix}graph.weight"], f"{prefix}graph.mask" in state
    num_edges = matrix.numel() - int(prune_rate * matrix.numel())
    if random:
        num_edges = int(torch.count_nonzero(state[f"{prefix}graph.mask"]))
        translation.change(
            f"{prefix}graph.mask",
            "graph.selector.edge_id",
            lambda mask: mask.flatten().nonzero().flatten(),
        )
    options: dict[str, Any] = {
        "rule": "random" if random else "dnw",
        "norm_eps": 1e-5,
        "image_size": image_size,
        "num_classes": classes,
        # The checkpoint's solver starts and ends with states that the ReLU has changed in place.
        "schedule": f"discrete(steps={layers})"
        if kind == "discrete"
        else "continuous(rtol=1e-3, atol=1e-3, rectified=True)",
    }
    config = TinyConfig(**options)
    graph = in_time(config, f"tiny_{kind}", sizes, num_edges)
    is_registered = (nodes, inputs, outputs, num_edges) == (NODES, INPUTS, OUTPUTS, EDGES)
    model = translation.load(TinyClassifier(config, graph))
    return Imported(model, f"tiny_{kind}", options if is_registered else None)
