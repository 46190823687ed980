"""A graph with its wiring decided: what is left of it, as data, and evaluated by plain layers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnw_graph.topology import Role


@dataclass(frozen=True, kw_only=True)
class Part:
    """Consecutive nodes that fire together, and which parts of a formula they compute.

    Attributes:
        first: Number of the first node.
        past: One past that of the last.
        role: Role of all of them.
        norm: Whether there are a scale and a shift.
        eps: Of instance norm; None where statistics are folded in.
        relu: Whether there is a maximum with 0.
        filters: Whether there is a 3x3 filter.
        reads: Level of the inputs.
        level: Level of the states: that, or the next, and then the filter has its stride.
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
"""Names of what a graph is made of, besides its parts."""


class Layout(nn.Module):
    r"""A static graph that no longer changes: ``Z_v = K_v * max(a_v n(I_v) + b_v, 0)``.

    Nodes are numbered part by part, edges sorted by ``(target, source)``.

    Shapes:
        - input ``[B, C, H, W]``, of which input nodes read the channels ``inputs``
        - output ``[B, outputs, H', W']``, of the last level

    Args:
        parts: The nodes, in the order in which they fire; those of inputs first.
        strides: Between levels: states of level ``l`` have the size of what the graph is given,
            divided by the first ``l`` strides, each time rounded up.
        edge_index: Edges ``[2, k]``, from parts to later ones that read their level.
        edge_weight: Their weights ``[k]``.
        inputs: Channel that each input node reads.
        outputs: Node of each output channel.
        node: What the nodes were called before ``[V]``.
        scale: ``a [V]``; 1 where a part has no norm.
        shift: ``b [V]``; 0 there.
        filters: ``K [V, 3, 3]``; not read where a part has none.
        reached: Whether what a node holds depends on the inputs ``[V]``.

    Raises:
        ValueError: Tensors that do not belong together.
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
        #: Place of each node among those of its level ``[V]``.
        self.register_buffer("places", self._places(), persistent=False)
        #: How many channels an input must have, at least.
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
        """Return what it is made of, besides its parts."""
        return {name: getattr(self, name) for name in TENSORS}

    @property
    def num_nodes(self) -> int:
        """Number of nodes."""
        return len(self.node)

    @property
    def num_edges(self) -> int:
        """Number of edges."""
        return len(self.edge_weight)

    def plainly(self, x: Tensor) -> Tensor:
        """Return the states of the outputs, by PyTorch's layers alone."""
        last = len(self.strides)
        ends = [s for p, s in zip(self.parts, self.states(x), strict=True) if p.level == last]
        return torch.cat(ends, 1)[:, self.places[self.outputs]]

    def make_matrices(self) -> None:
        """Make the matrices of :meth:`plainly`, which are constants of an exported program."""
        for at, part in enumerate(self.parts):
            if part.role != Role.INPUT:
                self._matrix(at)

    def sizes(self, features: Sequence[int]) -> list[list[int]]:
        """Return the size of the states of each level, given that of the input."""
        sizes = [list(features)]
        for stride in self.strides:
            sizes.append([-(-n // stride) for n in sizes[-1]])
        return sizes

    def of_parts(self, values: Sequence[int]) -> Tensor:
        """Return a number of each part for each of its nodes ``[V]``, int64."""
        sizes = torch.tensor([len(part) for part in self.parts], dtype=torch.int64, device="cpu")
        return torch.tensor(values, dtype=torch.int64, device="cpu").repeat_interleave(sizes)

    def _places(self) -> Tensor:
        """Return the place of each node among those of its level ``[V]``."""
        level = self.of_parts([part.level for part in self.parts])
        place = torch.zeros_like(level)
        for each in level.unique():
            place[level == each] = torch.arange(int((level == each).sum()), device="cpu")
        return place

    def _check_input(self, x: Tensor) -> None:
        if x.dim() < 2 or x.shape[1] < self.least_channels:
            raise ValueError(
                f"expected {self.least_channels} channels or more, got {list(x.shape)}"
            )
        if x.dtype != self.edge_weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(
                f"expected input of the weights' type {self.edge_weight.dtype}, got {x.dtype}; "
                f"convert it, or the frozen network with .to({x.dtype})"
            )
        if x.dim() != 4 and any(part.filters for part in self.parts):
            raise ValueError(f"expected feature maps [B, C, H, W], got {list(x.shape)}")

    def _check(self) -> None:
        size, edges = len(self.node), self.edge_weight.shape
        for name, x in self.tensors().items():
            known = name in ("edge_weight", "scale", "shift", "filters")
            wanted = torch.float32 if known else torch.int64
            if x.dtype != (torch.bool if name == "reached" else wanted):
                raise ValueError(f"{name} must not be {x.dtype}")
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
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name} must be {list(shape)}")
        roles = [part.role for part in self.parts]
        past_inputs = sum(len(p) for p in self.parts if p.role == Role.INPUT)
        if Role.INPUT in roles[roles.count(Role.INPUT) :] or past_inputs != len(self.inputs):
            raise ValueError("parts of inputs come first, and each input reads a channel")
        part_of = self.of_parts(range(len(self.parts)))
        for name, ids, most in (
            ("edge_index", self.edge_index, size),
            ("outputs", self.outputs, size),
            ("inputs", self.inputs, 2**31),
        ):
            if ids.dtype != torch.int64 or bool(((ids < 0) | (ids >= most)).any()):
                raise ValueError(f"{name} must hold numbers from 0 to {most - 1}")
        source, target = self.edge_index
        if bool((part_of[source] >= part_of[target]).any()):
            raise ValueError("edges must lead from parts to later ones")
        if bool((target.diff() < 0).any()) or bool((target < past_inputs).any()):
            raise ValueError("edges must be sorted by target, and lead to no input")
        numbers = [*self.strides, *(n for part in self.parts for n in (part.reads, part.level))]
        if any(isinstance(n, bool) or not isinstance(n, int) for n in numbers):
            raise ValueError("strides and levels must be whole numbers")
        if any(stride < 2 for stride in self.strides):
            raise ValueError("strides between levels must be 2 or more")
        for part in self.parts:
            if part.level - part.reads not in (0, part.filters):
                raise ValueError("a part leads to the level it reads, or with a filter to the next")
            if not 0 <= part.reads <= part.level <= len(self.strides):
                raise ValueError(f"levels are numbered from 0 to {len(self.strides)}")
            if part.role == Role.INPUT and part.reads:
                raise ValueError("inputs read the first level")
        level = self.of_parts([part.level for part in self.parts])
        reads = self.of_parts([part.reads for part in self.parts])
        if bool((level[source] != reads[target]).any()):
            raise ValueError("edges must lead from nodes to others that read their level")
        if bool((level[self.outputs] != len(self.strides)).any()):
            raise ValueError("outputs must be of the last level")

    def states(self, x: Tensor) -> list[Tensor]:
        """Return the states of each part ``[B, nodes, *features]``."""
        sizes, states = self.sizes(x.shape[2:]), []
        known = [[x.new_zeros(x.shape[0], 0, *size)] for size in sizes]  # states of each level
        for at, part in enumerate(self.parts):
            if part.role == Role.INPUT:
                into = x[:, self.inputs[part.first : part.past]]
            else:
                size, before = sizes[part.reads], torch.cat(known[part.reads], 1)
                flat = before.reshape(x.shape[0], before.shape[1], math.prod(size))
                into = (self._matrix(at) @ flat).reshape(x.shape[0], len(part), *size)
            states.append(self.fire(part, into))
            known[part.level].append(states[-1])
        return states

    def fire(self, part: Part, into: Tensor) -> Tensor:
        """Return ``Z`` of a part for ``I [B, nodes, *features]``."""
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
        """Return the weights into a part ``[nodes, nodes before it of the level it reads]``."""
        if torch.is_inference_mode_enabled():  # what it keeps may be asked for gradients later
            with torch.inference_mode(False), torch.no_grad():
                return self._matrix(at)
        weight = self._matrices.get(at)
        if weight is None or weight.device != self.edge_weight.device:
            part = self.parts[at]
            source, target = self.edge_index
            into = (target >= part.first) & (target < part.past)
            before = sum(len(p) for p in self.parts[:at] if p.level == part.reads)
            weight = self.edge_weight.new_zeros(len(part), before)
            weight[target[into] - part.first, self.places[source[into]]] = self.edge_weight[into]
            self._matrices[at] = weight
        return weight
