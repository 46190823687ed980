"""The data of a frozen graph, and its evaluation by PyTorch's operations."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnw_graph._deprecated import warn_renamed
from dnw_graph.schedule.checks import check_input_type
from dnw_graph.topology import Role


@dataclass(frozen=True, kw_only=True)
class Part:
    """Consecutive nodes that fire together and compute the same terms of the formula.

    Attributes:
        first: Number of the first node.
        past: Number of the last node, plus 1.
        role: Role of the nodes.
        norm: Whether they have a scale and a shift.
        eps: ``eps`` of their instance norm; None if they have no norm or its statistics are folded.
        relu: Whether they take the maximum with 0.
        filters: Whether they have a 3x3 filter.
        reads: Level of their inputs.
        level: Level of their states: ``reads``, or the next level if the filter has a stride.
    """

    first: int
    past: int
    role: Role
    norm: bool = False
    eps: float | None = None
    relu: bool = False
    filters: bool = False
    reads: int = 0
    level: int = 0

    def __len__(self) -> int:
        return self.past - self.first


TENSORS = (
    *("edge_index", "edge_weight", "inputs", "outputs", "node"),
    *("scale", "shift", "filters", "reached"),
)
"""Names of the tensors of a graph."""


class Layout(nn.Module):
    r"""A static graph that no longer changes: ``Z_v = K_v * max(a_v n(I_v) + b_v, 0)``.

    Nodes are numbered part by part, edges sorted by ``(target, source)``.

    Shapes:
        - input ``[B, C, H, W]``; input nodes read its channels ``inputs``
        - output ``[B, outputs, H', W']``, of the last level

    Args:
        parts: The nodes, in the order in which they fire; parts of inputs first.
        strides: Strides between levels: states of level ``l`` have the size of the input divided by
            the first ``l`` strides, rounded up each time.
        edge_index: Edges ``[2, k]``, from nodes to those of later parts that read their level.
        edge_weight: Their weights ``[k]``.
        inputs: Channel that each input node reads.
        outputs: Node of each output channel.
        node: Number of each node in the graph that was frozen ``[V]``.
        scale: ``a [V]``; 1 for parts without a norm.
        shift: ``b [V]``; 0 for parts without a norm.
        filters: ``K [V, 3, 3]``; ignored for parts without a filter.
        reached: Whether the state of a node depends on the inputs ``[V]``.

    Raises:
        ValueError: If the parts, strides and tensors do not describe a graph.
    """

    edge_index: Tensor
    edge_weight: Tensor
    inputs: Tensor
    outputs: Tensor
    node: Tensor
    scale: Tensor
    shift: Tensor
    filters: Tensor
    reached: Tensor
    places: Tensor

    def __init__(self, parts: Sequence[Part], strides: Sequence[int], **tensors: Tensor) -> None:
        super().__init__()
        self.parts, self.strides = tuple(parts), tuple(strides)
        for name in TENSORS:
            self.register_buffer(name, tensors[name])
        self._check()
        #: Index of each node among those of its level ``[V]``.
        self.register_buffer("places", self._places(), persistent=False)
        #: Least number of channels of an input.
        self.least_channels = int(self.inputs.max()) + 1 if len(self.inputs) else 0
        self._matrices: dict[int, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_matrices": {}}

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self._matrices = {}
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._matrices = {}

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the graph by name."""
        return {name: getattr(self, name) for name in TENSORS}

    @property
    def num_nodes(self) -> int:
        """Number of nodes."""
        return len(self.node)

    @property
    def num_edges(self) -> int:
        """Number of edges."""
        return len(self.edge_weight)

    def forward_by_torch(self, x: Tensor) -> Tensor:
        """Return the states of the outputs, computed by PyTorch's operations alone."""
        last = len(self.strides)
        ends = [s for p, s in zip(self.parts, self.states(x), strict=True) if p.level == last]
        return torch.cat(ends, 1)[:, self.places[self.outputs]]

    def plainly(self, x: Tensor) -> Tensor:
        """Deprecated name of :meth:`forward_by_torch`."""
        warn_renamed("FrozenGraph.plainly", "forward_by_torch")
        return self.forward_by_torch(x)

    def make_matrices(self) -> None:
        """Build the dense matrices of :meth:`forward_by_torch` as constants for an export."""
        for at, part in enumerate(self.parts):
            if part.role != Role.INPUT:
                self._matrix(at)

    def sizes(self, features: Sequence[int]) -> list[list[int]]:
        """Return the size of the states of each level for an input of a size."""
        sizes = [list(features)]
        for stride in self.strides:
            sizes.append([-(-n // stride) for n in sizes[-1]])
        return sizes

    def of_parts(self, values: Sequence[int]) -> Tensor:
        """Repeat the value of each part for each of its nodes ``[V]``, int64."""
        sizes = torch.tensor([len(part) for part in self.parts], dtype=torch.int64, device="cpu")
        return torch.tensor(values, dtype=torch.int64, device="cpu").repeat_interleave(sizes)

    def _places(self) -> Tensor:
        """Return the index of each node among those of its level ``[V]``."""
        level = self.of_parts([part.level for part in self.parts])
        places = torch.zeros_like(level)
        for number in level.unique():
            places[level == number] = torch.arange(int((level == number).sum()), device="cpu")
        return places

    def _check_input(self, x: Tensor) -> None:
        """Raise ValueError if the graph cannot compute an input."""
        if x.dim() < 2 or x.shape[1] < self.least_channels:
            raise ValueError(
                f"expected input with {self.least_channels} channels or more, got {list(x.shape)}"
            )
        check_input_type(self.edge_weight, x, "the frozen network")
        if x.dim() != 4 and any(part.filters for part in self.parts):
            raise ValueError(f"expected input of feature maps [B, C, H, W], got {list(x.shape)}")

    def _check(self) -> None:
        """Raise ValueError if parts, strides and tensors do not describe a graph."""
        self._check_types()
        self._check_shapes()
        self._check_input_parts()
        self._check_numbers()
        self._check_edges()
        self._check_levels()
        self._check_levels_of_edges()

    def _check_types(self) -> None:
        """Raise ValueError if a tensor has the wrong type."""
        floats = ("edge_weight", "scale", "shift", "filters")
        for name, x in self.tensors().items():
            dtype = torch.float32 if name in floats else torch.int64
            if name == "reached":
                dtype = torch.bool
            if x.dtype != dtype:
                raise ValueError(f"{name} must not be {x.dtype}: expected {dtype}")

    def _check_shapes(self) -> None:
        """Raise ValueError if parts leave out nodes or the tensors' shapes do not agree."""
        size, edges = len(self.node), self.edge_weight.shape
        bounds = [part.first for part in self.parts] + [size]
        if bounds[0] or [part.past for part in self.parts] != bounds[1:]:
            raise ValueError("parts must follow one another, from the first node to the last")
        shapes = {
            "node": (size,),
            "inputs": (self.inputs.numel(),),
            "outputs": (self.outputs.numel(),),
            "edge_index": (2, *edges),
            "edge_weight": (edges.numel(),),
            "scale": (size,),
            "shift": (size,),
            "filters": (size, 3, 3),
            "reached": (size,),
        }
        for name, shape in shapes.items():
            x = getattr(self, name)
            if x.shape != shape:
                raise ValueError(f"{name} must be {list(shape)}, got {list(x.shape)}")

    def _check_input_parts(self) -> None:
        """Raise ValueError if parts of inputs do not come first, or channels are missing."""
        roles = [part.role for part in self.parts]
        if (
            Role.INPUT in roles[roles.count(Role.INPUT) :]
            or len(self.inputs) != self._num_input_nodes
        ):
            raise ValueError(
                "parts of inputs must come first, and each input node must read a channel"
            )

    def _check_numbers(self) -> None:
        """Raise ValueError if a tensor of numbers holds one out of range."""
        size = len(self.node)
        for name, ids, end in (
            ("edge_index", self.edge_index, size),
            ("outputs", self.outputs, size),
            ("inputs", self.inputs, 2**31),
        ):
            if bool(((ids < 0) | (ids >= end)).any()):
                raise ValueError(f"{name} must hold numbers from 0 to {end - 1}")

    def _check_edges(self) -> None:
        """Raise ValueError if an edge leads backwards or to an input, or edges are not sorted."""
        part_of = self.of_parts(range(len(self.parts)))
        source, target = self.edge_index
        if bool((part_of[source] >= part_of[target]).any()):
            raise ValueError("edges must lead from parts to later ones")
        if bool((target.diff() < 0).any()) or bool((target < self._num_input_nodes).any()):
            raise ValueError("edges must be sorted by target, and must not lead to an input")

    def _check_levels(self) -> None:
        """Raise ValueError if strides or the levels of parts are not possible."""
        numbers = [*self.strides, *(n for part in self.parts for n in (part.reads, part.level))]
        if any(isinstance(n, bool) or not isinstance(n, int) for n in numbers):
            raise ValueError("strides and levels must be whole numbers")
        if any(stride < 2 for stride in self.strides):
            raise ValueError("strides between levels must be 2 or more")
        for part in self.parts:
            if part.level - part.reads not in (0, part.filters):
                raise ValueError(
                    "the level of a part must be the level that it reads, or with a filter the next"
                )
            if not 0 <= part.reads <= part.level <= len(self.strides):
                raise ValueError(f"levels must be from 0 to {len(self.strides)}")
            if part.role == Role.INPUT and part.reads:
                raise ValueError("inputs must read the first level")

    def _check_levels_of_edges(self) -> None:
        """Raise ValueError if an edge or an output has the wrong level."""
        source, target = self.edge_index
        level = self.of_parts([part.level for part in self.parts])
        reads = self.of_parts([part.reads for part in self.parts])
        if bool((level[source] != reads[target]).any()):
            raise ValueError("edges must lead from nodes to others that read their level")
        if bool((level[self.outputs] != len(self.strides)).any()):
            raise ValueError("outputs must be of the last level")

    @property
    def _num_input_nodes(self) -> int:
        return sum(len(part) for part in self.parts if part.role == Role.INPUT)

    def states(self, x: Tensor) -> list[Tensor]:
        """Return the states of each part ``[B, nodes, *features]``, by PyTorch's operations."""
        sizes, states = self.sizes(x.shape[2:]), []
        by_level = [[x.new_zeros(x.shape[0], 0, *size)] for size in sizes]
        for at, part in enumerate(self.parts):
            if part.role == Role.INPUT:
                inputs = x[:, self.inputs[part.first : part.past]]
            else:
                size, earlier = sizes[part.reads], torch.cat(by_level[part.reads], 1)
                flat = earlier.reshape(x.shape[0], earlier.shape[1], math.prod(size))
                inputs = (self._matrix(at) @ flat).reshape(x.shape[0], len(part), *size)
            states.append(self.fire(part, inputs))
            by_level[part.level].append(states[-1])
        return states

    def fire(self, part: Part, into: Tensor) -> Tensor:
        """Return the states ``Z`` of a part for its inputs ``I [B, nodes, *features]``."""
        nodes = slice(part.first, part.past)
        if part.eps is not None:
            into = F.instance_norm(into, eps=part.eps)
        if part.norm:
            shape = [1, -1, *[1] * (into.dim() - 2)]
            into = into * self.scale[nodes].view(shape) + self.shift[nodes].view(shape)
        if part.relu:
            into = F.relu(into)
        if part.filters:
            filters = self.filters[nodes, None]
            stride = self.strides[part.reads] if part.level > part.reads else 1
            into = F.conv2d(into, filters, None, stride, 1, groups=len(part))
        return into

    def _matrix(self, at: int) -> Tensor:
        """Return the weights into a part ``[nodes, earlier nodes of the level it reads]``, kept."""
        # A tensor made in inference mode would allow no gradients later.
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False), torch.no_grad():
                return self._matrix(at)
        weight = self._matrices.get(at)
        if weight is None or weight.device != self.edge_weight.device:
            part = self.parts[at]
            source, target = self.edge_index
            edges = (target >= part.first) & (target < part.past)
            columns = sum(len(p) for p in self.parts[:at] if p.level == part.reads)
            weight = self.edge_weight.new_zeros(len(part), columns)
            weight[target[edges] - part.first, self.places[source[edges]]] = self.edge_weight[edges]
            self._matrices[at] = weight
        return weight
