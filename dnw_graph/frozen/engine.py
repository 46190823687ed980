"""Runs frozen graphs on a CPU, by kernels or by dense products, whichever is faster."""

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dnw_graph import _jit
from dnw_graph.frozen import _kernels as kernels
from dnw_graph.topology import Role

if TYPE_CHECKING:
    from dnw_graph.frozen.graph import FrozenGraph, Part

PIXELS_AT_ONCE = 1024  # images go through together up to so many pixels of a state
PLANS = 4  # sizes of input that are remembered


@dataclass(frozen=True)
class Choice:
    """How the inputs of a part are summed.

    Attributes:
        part: The part.
        edges: Edges into it.
        candidates: Pairs of a node before it and one of it.
        sparse: Seconds for the sums by the sparse kernel.
        dense: Seconds for the dense product.
    """

    part: "Part"
    edges: int
    candidates: int
    sparse: float
    dense: float

    @property
    def is_dense(self) -> bool:
        """Whether the dense product is taken."""
        return self.dense < self.sparse


class Engine:
    """What runs a graph; holds memory for its states, for each size of input.

    Nodes that nothing reaches hold the same whatever the image. What they send is one more node
    for each node that they feed.

    Args:
        graph: The graph, on a CPU, in float32.
    """

    def __init__(self, graph: "FrozenGraph") -> None:
        self.graph = graph
        self._plans: dict[tuple[int, ...], _Plan] = {}
        self._lock = threading.Lock()
        self.parts, self._nodes = _live_parts(graph)
        self._number = torch.full((graph.num_nodes,), -1)
        self._number[self._nodes] = torch.arange(len(self._nodes))
        source, target = graph.edge_index
        live, constant = graph.reached[source], ~graph.reached[source] & graph.reached[target]
        self.fed = target[constant].unique()
        sends = torch.zeros(graph.num_nodes, dtype=torch.bool)
        sends[source[live]] = True
        self.row = torch.where(sends, sends.cumsum(0) - 1, -1)
        self.num_rows = int(sends.sum()) + len(self.fed)
        edges = torch.stack([self.row[source[live]], self._number[target[live]]])
        more = torch.stack(
            [torch.arange(self.num_rows - len(self.fed), self.num_rows), self._number[self.fed]]
        )
        edges, weight = torch.cat([edges, more], 1), graph.edge_weight[live]
        weight = torch.cat([weight, torch.ones(len(self.fed))])
        order = edges[1].argsort(stable=True)
        self.source, self.weight = edges[0][order].int().numpy(), weight[order].numpy()
        self.target = edges[1][order]
        every = torch.arange(len(self._nodes) + 1)
        self.ptr = torch.searchsorted(self.target, every).numpy()

    @property
    def num_edges(self) -> int:
        """Number of edges that are gone through, those from what stands for constants included."""
        return len(self.weight)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the states of the outputs; see :class:`FrozenGraph` for shapes."""
        features = tuple(x.shape[2:])
        maps = features if len(features) == 2 else (1, math.prod(features))
        flat = x.detach().reshape(*x.shape[:2], -1).contiguous()
        with self._lock:
            first = self._plan(x[:1], maps, 1)
            at_once = max(1, PIXELS_AT_ONCE // max(1, first.image))
            outputs = [self._plan(x[:1], maps, len(part)).run(part) for part in flat.split(at_once)]
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        size = first.size if len(features) == 2 else features
        return out.view(*out.shape[:2], *size)

    def choices(self, x: Tensor) -> list[Choice]:
        """Return how sums are formed for such an input ``[1, ...]``."""
        self(x)
        features = tuple(x.shape[2:])
        return self._plan(
            x, features if len(features) == 2 else (1, math.prod(features)), 1
        ).choices

    def _plan(self, x: Tensor, maps: tuple[int, ...], batch: int) -> "_Plan":
        key = (batch, *maps, torch.get_num_threads())
        if key not in self._plans:
            while len(self._plans) >= PLANS:
                del self._plans[next(iter(self._plans))]
            self._plans[key] = _Plan(self, x, maps, batch)
        return self._plans[key]


class _Plan:
    """Memory and tables for inputs of one size.

    Args:
        engine: The engine.
        x: An input ``[1, ...]``, whose constant channels hold what they always do.
        maps: Height and width of its maps.
        batch: Number of images.
    """

    def __init__(self, engine: Engine, x: Tensor, maps: tuple[int, ...], batch: int) -> None:
        graph = engine.graph
        self.engine, self.batch = engine, batch
        self.size = tuple(-(-n // graph.stride) for n in maps)
        self.pitch = self.size[1] + any(part.filters for part in graph.parts)
        self.image = self.size[0] * self.pitch
        width = -(-batch * self.image // kernels.LANES) * kernels.LANES
        most = max((len(p) for p in engine.parts), default=0)
        self.z = torch.zeros(engine.num_rows, width)
        self.total = torch.zeros(most, width)
        self.outputs = len(graph.outputs), self.size[0] * self.size[1]
        self.constant = (~graph.reached[graph.outputs]).nonzero().flatten()
        self._tables(maps)
        if not bool(graph.reached.all()):
            self._constants(x)
        self.dense: dict[int, tuple[Tensor, slice]] = {}
        self.choices: list[Choice] = []
        self._choose(torch.zeros(batch, x.shape[1], math.prod(maps)))

    def run(self, x: Tensor) -> Tensor:
        """Return the outputs ``[B, outputs, Ho Wo]`` of ``x [B, C, H W]``."""
        out = torch.empty(len(x), *self.outputs)
        if len(self.constant):
            out[:, self.constant] = self.constants
        given, to = x.numpy(), out.numpy()
        start = 0
        for at, (matrix, rows) in self.dense.items():
            self._kernel(given, to, start, at)
            self._multiply(matrix, rows)
            start = at
        self._kernel(given, to, start, len(self.engine.parts))
        return out

    def _kernel(self, x: np.ndarray, out: np.ndarray, start: int, stop: int) -> None:
        if start < stop:
            e = self.engine
            kernels.run(
                *(self.blocks, self.eps, self.nodes, self.scale, self.shift, self.filters),
                *(e.ptr, e.source, e.weight, x, self.z.numpy(), self.total.numpy(), out),
                *(self.pitch, start, stop, _jit.threads()),
            )

    def _multiply(self, matrix: Tensor, rows: slice) -> None:
        torch.mm(matrix, self.z[rows], out=self.total[: len(matrix)])

    def _tables(self, maps: tuple[int, ...]) -> None:
        engine, graph = self.engine, self.engine.graph
        nodes, parts = engine._nodes, engine.parts
        self.blocks = np.zeros((len(parts) + 2, 7), dtype=np.int64)
        self.blocks[-2, :2], self.blocks[-1, :2] = maps, self.size
        self.eps = np.zeros(len(parts))
        first = 0
        for at, part in enumerate(parts):
            kind, stride = (0, graph.stride) if part.role == Role.INPUT else (1, 1)
            instance = part.eps is not None
            self.eps[at] = part.eps or 0
            row = first, first + len(part), kind, part.relu, part.filters, stride, instance
            self.blocks[at] = row
            first += len(part)
        self.nodes = np.full((len(nodes), 3), -1, dtype=np.int64)
        taken = nodes < len(graph.inputs)
        self.nodes[taken.numpy(), kernels.CHANNEL] = graph.inputs[nodes[taken]].numpy()
        live = graph.reached[graph.outputs]
        channel = torch.full((graph.num_nodes,), -1)
        channel[graph.outputs[live]] = live.nonzero().flatten()
        self.nodes[:, kernels.OUTPUT] = channel[nodes].numpy()
        self.nodes[:, kernels.ROW] = engine.row[nodes].numpy()
        self.scale, self.shift = graph.scale[nodes].numpy(), graph.shift[nodes].numpy()
        self.filters = graph.filters[nodes].contiguous().numpy()

    def _constants(self, x: Tensor) -> None:
        """Fill what does not depend on images: what constant nodes send, and constant outputs."""
        engine, graph = self.engine, self.engine.graph
        states = torch.cat(graph.states(x.detach()), 1).reshape(graph.num_nodes, -1)
        self.constants = states[graph.outputs[self.constant]]
        if not len(engine.fed):
            return
        source, target = graph.edge_index
        used = ~graph.reached[source] & graph.reached[target]
        sums = torch.zeros(graph.num_nodes, states.shape[1])
        sums.index_add_(0, target[used], graph.edge_weight[used, None] * states[source[used]])
        maps = sums[engine.fed].view(-1, *self.size)
        rows = self.z[engine.num_rows - len(engine.fed) :, : self.batch * self.image]
        rows.view(len(maps), self.batch, self.size[0], self.pitch)[..., : self.size[1]] = maps[
            :, None
        ]

    def _choose(self, x: Tensor) -> None:
        """Time the sums of each part by both ways, and keep the faster."""
        engine = self.engine
        out = np.zeros((len(x), *self.outputs), dtype=np.float32)
        sums_only = self.nodes.copy()
        sums_only[:, kernels.OUTPUT :] = -1
        for at, part in enumerate(engine.parts):
            if part.role == Role.INPUT:
                continue
            first, past = self.blocks[at, :2]
            edges = slice(int(engine.ptr[first]), int(engine.ptr[past]))
            source = torch.from_numpy(engine.source[edges]).long()
            if not len(source):
                continue
            rows = slice(int(source.min()), int(source.max()) + 1)
            matrix = torch.zeros(len(part), rows.stop - rows.start)
            place = engine.target[edges] - first, source - rows.start
            matrix[place] = torch.from_numpy(engine.weight[edges])
            nodes, self.nodes = self.nodes, sums_only
            sparse = _seconds(partial(self._kernel, x.numpy(), out, at, at + 1))
            self.nodes = nodes
            dense = _seconds(partial(self._multiply, matrix, rows))
            self.choices.append(Choice(part, len(source), matrix.numel(), sparse, dense))
            if self.choices[-1].is_dense:
                self.dense[at] = matrix, rows
                self.blocks[at, kernels.KIND] = 2


def _seconds(function: Callable[[], object], repeats: int = 3) -> float:
    """Return the shortest time of some calls, after one that is not timed."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _live_parts(graph: "FrozenGraph") -> tuple[list["Part"], Tensor]:
    """Return parts that hold nodes that something reaches, and the numbers of these nodes."""
    parts, nodes = [], []
    for part in graph.parts:
        live = graph.reached[part.first : part.past].nonzero().flatten() + part.first
        if len(live):
            parts.append(replace(part, past=part.first + len(live)))
            nodes.append(live)
    return parts, torch.cat(nodes) if nodes else torch.empty(0, dtype=torch.int64)


def usable(x: Tensor) -> bool:
    """Return whether an engine takes such an input now: a batch of floats on a CPU, no gradient."""
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.numel() > 0
        and not (torch.is_grad_enabled() and x.requires_grad)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not _jit._in_forked_child
    )
