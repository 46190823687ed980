"""Runs frozen graphs on a CPU, by kernels or by dense products, whichever is faster."""

import math
import operator
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnw_graph import _jit
from dnw_graph.frozen import _kernels as kernels
from dnw_graph.frozen.layout import Layout, Part
from dnw_graph.topology import Role

PIXELS_AT_ONCE = 1024  # images go through together up to so many pixels of a state
PLANS = 64  # sizes of input that are remembered
PLAN_BYTES = 2**28  # memory of their plans, but for the last one


@dataclass(frozen=True)
class PartKernel:
    """How the inputs of a part are summed.

    Attributes:
        at: Index of the part.
        part: The part.
        kind: The kernel that is taken.
        edges: Edges into it.
        candidates: Pairs of a node before it and one of it.
        sparse: Seconds by the sparse kernel.
        dense: Seconds with sums by a dense product.
    """

    at: int
    part: Part
    kind: int
    edges: int
    candidates: int
    sparse: float
    dense: float

    @property
    def is_dense(self) -> bool:
        """Whether the dense product is taken."""
        return self.kind == kernels.DENSE


class Engine:
    """What runs a graph; holds memory for its states, for each size of input.

    Nodes that nothing reaches hold the same whatever the image. What they send is one more node
    for each node that they feed.

    Args:
        graph: The graph, on a CPU, in float32.
    """

    def __init__(self, graph: Layout) -> None:
        self.graph = graph
        self._plans: dict[tuple[int, ...], _Plan] = {}
        self._kernels_by_scale: dict[tuple[int, int], list[PartKernel]] = {}
        self._matrices: dict[int, tuple[Tensor, slice]] = {}
        self._lock = threading.Lock()
        self.parts, self.nodes = _live_parts(graph)
        number = torch.full((graph.num_nodes,), -1, device="cpu")
        number[self.nodes] = torch.arange(len(self.nodes), device="cpu")
        level = graph.of_parts([part.level for part in graph.parts])
        reads = graph.of_parts([part.reads for part in graph.parts])
        source, target = graph.edge_index
        live, constant = graph.reached[source], ~graph.reached[source] & graph.reached[target]
        sends = torch.zeros(graph.num_nodes, dtype=torch.bool, device="cpu")
        sends[source[live]] = True
        #: Row of what a node sends among those of its level, -1 where it sends nothing. ``[V]``
        self.row = torch.full((graph.num_nodes,), -1, device="cpu")
        #: Nodes that constants feed, and the row of what these send to each, by level.
        self.fed: list[tuple[Tensor, Tensor]] = []
        self.num_rows: list[int] = []
        edges, weights = [torch.stack([self.row[:0], self.row[:0]])], [graph.edge_weight[live]]
        fed = target[constant].unique()
        #: Edges from constants to what is not constant, by the level that their maps have.
        self.constant_edges: list[Tensor] = []
        for each in range(len(graph.strides) + 1):
            senders = (sends & (level == each)).nonzero().flatten()
            here = fed[reads[fed] == each]
            # These come first, so that the number of rows before any other is known.
            rows = torch.arange(len(here), device="cpu")
            self.row[senders] = torch.arange(len(senders), device="cpu") + len(here)
            self.fed.append((here, rows))
            self.constant_edges.append((constant & (reads[target] == each)).nonzero().flatten())
            self.num_rows.append(len(senders) + len(here))
            edges.append(torch.stack([rows, number[here]]))
            weights.append(torch.ones(len(here), dtype=torch.float32, device="cpu"))
        edges[0] = torch.stack([self.row[source[live]], number[target[live]]])
        rows, self.target = torch.cat(edges, 1)
        order = self.target.argsort(stable=True)
        self.source, self.target = rows[order].int().numpy(), self.target[order]
        self.weight = torch.cat(weights)[order].numpy()
        every = torch.arange(len(self.nodes) + 1, device="cpu")
        self.ptr = torch.searchsorted(self.target, every).numpy()

    @property
    def num_edges(self) -> int:
        """Number of edges that are gone through, those from what stands for constants included."""
        return len(self.weight)

    def multiply_adds(self, features: Sequence[int]) -> int:
        """Return the multiply-adds for one input with maps of this size: edges and filters."""
        pixels = [math.prod(size) for size in self.graph.sizes(features)]
        total = first = 0
        for part in self.parts:
            past = first + len(part)
            total += int(self.ptr[past] - self.ptr[first]) * pixels[part.reads]
            total += 9 * len(part) * pixels[part.level] if part.filters else 0
            first = past
        return total

    def __call__(self, x: Tensor, stem: nn.Conv2d | None = None) -> Tensor:
        """Return the states of the outputs.

        Args:
            x: What the graph is given; see :class:`Layout` for shapes.
            stem: A convolution that ``x`` goes through before; see :meth:`takes`.
        """
        flat = x.detach().reshape(*x.shape[:2], -1).contiguous()
        with self._lock:
            stride = 1 if stem is None else int(stem.stride[0])
            sizes = self.graph.sizes([-(-n // stride) for n in _maps(x)])
            at_once = max(1, PIXELS_AT_ONCE // max(1, math.prod(sizes[0])))
            parts = flat.split(at_once)
            outputs = [self._plan(x[:1], len(part), stem).run(part) for part in parts]
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        size = sizes[-1] if x.dim() == 4 else x.shape[2:]
        return out.view(*out.shape[:2], *size)

    def takes(self, layer: nn.Module) -> bool:
        """Return whether a layer is a convolution that can be computed with the graph behind it."""
        return (
            type(layer) is nn.Conv2d
            and layer.kernel_size == (3, 3)
            and layer.stride in ((1, 1), (2, 2))
            and layer.padding == (1, 1)
            and layer.dilation == (1, 1)
            and layer.groups == 1
            and layer.padding_mode == "zeros"
            and layer.weight.dtype == torch.float32
            and layer.out_channels >= self.graph.least_channels
            and any(part.filters for part in self.graph.parts)
            and all(part.eps is None for part in self.graph.parts if part.role == Role.INPUT)
            and bool(self.graph.reached[: len(self.graph.inputs)].all())
        )

    def part_kernels(self, x: Tensor) -> list[PartKernel]:
        """Return how sums are formed for such an input ``[1, ...]``."""
        with self._lock:
            return self._plan(x, 1).part_kernels

    def _plan(self, x: Tensor, batch: int, stem: nn.Conv2d | None = None) -> "_Plan":
        key = (batch, *x.shape, id(stem), torch.get_num_threads())
        plan = self._plans.pop(key, None)
        if plan is None:
            with torch.inference_mode(False), torch.no_grad():
                plan = _Plan(self, self._known(x), batch, stem)
            self._make_room()
        self._plans[key] = plan  # the last one is the one that was used last
        return plan

    def _make_room(self) -> None:
        """Forget the plans that were used least recently, as far as they take too much memory."""
        total = sum(plan.nbytes for plan in self._plans.values())
        while self._plans and (len(self._plans) >= PLANS or total > PLAN_BYTES):
            total -= self._plans.pop(next(iter(self._plans))).nbytes

    def matrix(self, at: int) -> tuple[Tensor, slice]:
        """Return the weights into a part as a dense matrix, and the rows of states it reads."""
        if at not in self._matrices:
            first = sum(len(part) for part in self.parts[:at])
            edges = slice(int(self.ptr[first]), int(self.ptr[first + len(self.parts[at])]))
            source = torch.from_numpy(self.source[edges]).long()
            rows = slice(int(source.min()), int(source.max()) + 1)
            matrix = _zeros(len(self.parts[at]), rows.stop - rows.start)
            place = self.target[edges] - first, source - rows.start
            matrix[place] = torch.from_numpy(self.weight[edges])
            self._matrices[at] = matrix, rows
        return self._matrices[at]

    def known_kernels(self, positions: int) -> list[PartKernel] | None:
        """Return how sums are best formed for about so many pixels, if that was measured.

        Args:
            positions: Pixels of the input, of all images that go through together.
        """
        return self._kernels_by_scale.get(self._scale(positions))

    def remember(self, positions: int, part_kernels: list[PartKernel]) -> None:
        """Keep what was measured for :meth:`known_kernels`."""
        self._kernels_by_scale[self._scale(positions)] = part_kernels
        dense = {c.at for known in self._kernels_by_scale.values() for c in known if c.is_dense}
        self._matrices = {at: found for at, found in self._matrices.items() if at in dense}

    def _scale(self, positions: int) -> tuple[int, int]:
        """Return the power of four that a number of pixels lies at, and the number of threads."""
        return positions.bit_length() // 2, torch.get_num_threads()

    def _known(self, x: Tensor) -> Tensor:
        """Return an input of which only channels that do not depend on images are kept."""
        known, graph = _zeros(*x.shape), self.graph
        constant = graph.inputs[~graph.reached[: len(graph.inputs)]]
        known[:, constant] = x.detach().clone()[:, constant]
        return known


class _Plan:
    """Memory and tables for inputs of one size.

    Args:
        engine: The engine.
        x: An input ``[1, ...]`` of zeros, but for channels that always hold the same.
        batch: Number of images.
        stem: A convolution that inputs go through before.
    """

    def __init__(
        self, engine: Engine, x: Tensor, batch: int, stem: nn.Conv2d | None = None
    ) -> None:
        graph = engine.graph
        self.engine, self.batch, self.stem = engine, batch, stem
        given = _zeros(batch, x.shape[1], math.prod(x.shape[2:]))
        image = x.shape[1:]
        if stem is not None:
            x = stem(x)
        self.sizes = graph.sizes(_maps(x))
        self._levels()
        self._tables()
        self._stem(image)
        self.outputs = len(graph.outputs), math.prod(self.sizes[-1])
        self.constant = (~graph.reached[graph.outputs]).nonzero().flatten()
        if not bool(graph.reached.all()):
            self._constants(x)
        self.dense: dict[int, tuple[Tensor, slice]] = {}
        self._choose(given)

    def _levels(self) -> None:
        """Lay out memory for states and sums."""
        engine, lanes = self.engine, kernels.LANES
        padding = int(any(part.filters for part in engine.graph.parts))
        self.levels = np.zeros((len(self.sizes), 11), dtype=np.int64)
        masks, sizes, lives = [], [], []
        most = mask_base = 0
        for each, (height, width) in enumerate(self.sizes):
            pitch = width + padding
            image = (height + padding) * pitch
            vectors = -(-(self.batch * image - padding * pitch) // lanes)
            # Kernels write whole vectors: what they write too much falls behind the row.
            length = (vectors + 1) * lanes
            lead = -(-(pitch + 1) // lanes) * lanes  # padding before the first line
            sum_length = lead + length + -(-(pitch + 1) // lanes) * lanes + 2 * lanes
            reads = [at for at, part in enumerate(engine.parts) if part.reads == each]
            writes = [at for at, part in enumerate(engine.parts) if part.level == each]
            nodes = max((len(engine.parts[at]) for at in reads), default=0)
            nodes = -(-nodes // kernels.AT_ONCE) * kernels.AT_ONCE
            row = height, width, pitch, image, vectors, length, 0
            self.levels[each] = *row, sum_length, lead, nodes, mask_base
            # What constants send stays, so it shares its memory with nothing.
            forever = len(engine.fed[each][0]) > 0
            alive = range(len(engine.parts)) if forever else (*writes, *reads)
            lives.append((min(alive, default=0), max(alive, default=0)))
            sizes.append(engine.num_rows[each] * length)
            most = max(most, nodes * sum_length)
            mask_base += vectors * lanes
            inside = np.zeros((self.batch, height + padding, pitch), dtype=np.int32)
            inside[:, :height, :width] = -1
            masks.append(np.resize(np.append(inside, np.zeros(lanes, np.int32)), vectors * lanes))
        self.levels[:, kernels.BASE] = bases = _placed(sizes, lives)
        self.z = _zeros(max(map(operator.add, bases, sizes)))
        self.total = _zeros(most)
        self.mask = np.concatenate(masks)

    def _rows(self, level: int) -> Tensor:
        """Return what nodes of a level send ``[rows, length]``."""
        length, base = self.levels[level, [kernels.ROW_LENGTH, kernels.BASE]].tolist()
        number = self.engine.num_rows[level]
        return self.z[base : base + number * length].view(number, length)

    def _images(self, rows: Tensor, level: int) -> Tensor:
        """Return the maps in rows ``[rows, B, H, W]``."""
        height, width, pitch, image = self.levels[level, : kernels.IMAGE + 1].tolist()
        size, strides = (len(rows), self.batch, height, width), (rows.stride(0), image, pitch, 1)
        return rows.as_strided(size, strides)

    def run(self, x: Tensor) -> Tensor:
        """Return the outputs ``[B, outputs, Ho Wo]`` of ``x [B, C, H W]``."""
        out = x.new_empty(len(x), *self.outputs)
        if len(self.constant):
            out[:, self.constant] = self.constants
        self._fire(x.numpy(), out.numpy(), 0, len(self.engine.parts))
        return out

    def _fire(self, x: np.ndarray, out: np.ndarray, start: int, stop: int) -> None:
        for at, (matrix, rows) in self.dense.items():
            self._kernel(x, out, start, at)
            self._multiply(at, matrix, rows)
            start = at
        self._kernel(x, out, start, stop)

    def _kernel(self, x: np.ndarray, out: np.ndarray, start: int, stop: int) -> None:
        if start < stop:
            e = self.engine
            kernels.run(
                *(self.blocks, self.eps, self.levels, self.nodes),
                *(self.scale, self.shift, self.filters, e.ptr, e.source, e.weight, self.mask),
                *(self.stem_shape, self.stem_taps, self.stem_bias, self.planes),
                *(x, self.z.numpy(), self.total.numpy(), out, start, stop, _jit.threads()),
            )

    def _multiply(self, at: int, matrix: Tensor, rows: slice) -> None:
        reads = self.engine.parts[at].reads
        height, _, pitch, image = self.levels[reads, : kernels.IMAGE + 1].tolist()
        length, base = self.levels[reads, [kernels.SUM_LENGTH, kernels.LEAD]].tolist()
        size = len(matrix), (self.batch - 1) * image + height * pitch
        states = self._rows(reads)[rows, : size[1]]
        torch.mm(matrix, states, out=self.total.as_strided(size, (length, 1), base))

    def _tables(self) -> None:
        engine, graph = self.engine, self.engine.graph
        nodes, parts = engine.nodes, engine.parts
        self.blocks = np.zeros((len(parts), 10), dtype=np.int64)
        self.eps = np.array([part.eps or 0 for part in parts], dtype=np.float64)
        first = 0
        for at, part in enumerate(parts):
            kind = kernels.INPUT if part.role == Role.INPUT else kernels.BY_TILE
            stride = graph.strides[part.reads] if part.level > part.reads else 1
            does = kind, part.relu, part.filters, stride, part.eps is not None
            self.blocks[at] = first, first + len(part), *does, part.reads, part.level, 0
            first += len(part)
        self.nodes = np.full((len(nodes), 3), -1, dtype=np.int64)
        taken = nodes < len(graph.inputs)
        self.nodes[taken.numpy(), kernels.CHANNEL] = graph.inputs[nodes[taken]].numpy()
        live = graph.reached[graph.outputs]
        channel = torch.full((graph.num_nodes,), -1, device="cpu")
        channel[graph.outputs[live]] = live.nonzero().flatten()
        self.nodes[:, kernels.OUTPUT] = channel[nodes].numpy()
        self.nodes[:, kernels.ROW] = engine.row[nodes].numpy()
        self.scale, self.shift = graph.scale[nodes].numpy(), graph.shift[nodes].numpy()
        self.filters = graph.filters[nodes].contiguous().numpy()

    def _stem(self, image: Sequence[int]) -> None:
        """Lay out the convolution before, some channels at once, with scale and shift folded in."""
        at_once, taps, bias = kernels.AT_ONCE, [_zeros(0)], [_zeros(0)]
        self.stem_shape, frames = np.zeros(4, dtype=np.int64), 0
        if self.stem is not None:
            self.stem_shape[:] = *image, self.stem.stride[0]
            frames = self.batch * image[0] * (image[1] + 2) * (image[2] + 2)
            weight, groups = self.stem.weight.detach(), 0
            shift = _zeros(len(weight)) if self.stem.bias is None else self.stem.bias.detach()
            for block in self.blocks:
                if block[kernels.KIND] == kernels.INPUT:
                    nodes = slice(*block[[kernels.FIRST, kernels.PAST]].tolist())
                    channels = torch.from_numpy(self.nodes[nodes, kernels.CHANNEL])
                    scale = torch.from_numpy(self.scale[nodes])
                    more = -len(channels) % at_once
                    k = F.pad(weight[channels].flatten(1) * scale[:, None], (0, 0, 0, more))
                    taps.append(k.unflatten(0, (-1, at_once)).mT.flatten())
                    b = shift[channels] * scale + torch.from_numpy(self.shift[nodes])
                    bias.append(F.pad(b, (0, more)))
                    block[[kernels.KIND, kernels.STEM]] = kernels.CONVOLUTION, groups
                    groups += len(bias[-1]) // at_once
        number = max(1, 9 * int(self.stem_shape[0]))
        self.stem_taps = torch.cat(taps).view(-1, number, at_once).numpy()
        self.stem_bias = torch.cat(bias).view(-1, at_once).numpy()
        # Vectors are loaded past the end of the last line.
        self.planes = np.zeros(frames + 4 * kernels.LANES, dtype=np.float32)

    def _constants(self, x: Tensor) -> None:
        """Fill what does not depend on images: what constant nodes send, and constant outputs."""
        engine, graph = self.engine, self.engine.graph
        states = [s[0].reshape(s.shape[1], -1) for s in graph.states(x.detach())]
        source, target = graph.edge_index
        known = _zeros(0)
        for level, (fed, rows) in enumerate(engine.fed):
            here = [s for part, s in zip(graph.parts, states, strict=True) if part.level == level]
            known = torch.cat(here) if here else known[:0]  # by place of the node in its level
            if not len(fed):
                continue
            edges = engine.constant_edges[level]
            sent = graph.edge_weight[edges, None] * known[graph.places[source[edges]]]
            sums = _zeros(len(fed), known.shape[1])
            sums.index_add_(0, torch.searchsorted(fed, target[edges]), sent)
            maps = self._images(self._rows(level), level)
            maps[rows] = sums.view(len(fed), 1, *maps.shape[2:])
        self.constants = known[graph.places[graph.outputs[self.constant]]]

    def _choose(self, x: Tensor) -> None:
        """Form the sums of each part in the way that is fastest for inputs of about this size."""
        positions = self.batch * math.prod(self.sizes[0])
        part_kernels = self.engine.known_kernels(positions)
        if part_kernels is None:
            part_kernels = self._measured(x)
            self.engine.remember(positions, part_kernels)
        self.part_kernels = part_kernels
        for part_kernel in part_kernels:
            self.blocks[part_kernel.at, kernels.KIND] = part_kernel.kind
        self.dense = {c.at: self.engine.matrix(c.at) for c in part_kernels if c.is_dense}

    def _measured(self, x: Tensor) -> list[PartKernel]:
        """Time the sums of each part by every kernel, and return the fastest ones."""
        engine, part_kernels = self.engine, []
        out = np.zeros((len(x), *self.outputs), dtype=np.float32)
        for at, part in enumerate(engine.parts):
            first, past = self.blocks[at, :2]
            edges = int(engine.ptr[past] - engine.ptr[first])
            if part.role == Role.INPUT or not edges:
                continue
            matrix, rows = engine.matrix(at)
            seconds = {}
            for kind in (kernels.BY_TILE, kernels.BY_NODE, kernels.DENSE):
                self.blocks[at, kernels.KIND] = kind
                self.dense = {at: (matrix, rows)} if kind == kernels.DENSE else {}
                seconds[kind] = _seconds(partial(self._fire, x.numpy(), out, at, at + 1))
            kind = min(seconds, key=lambda kind: seconds[kind])
            self.blocks[at, kernels.KIND] = kind
            sparse = min(seconds[kernels.BY_TILE], seconds[kernels.BY_NODE])
            dense = seconds[kernels.DENSE]
            part_kernels.append(PartKernel(at, part, kind, edges, matrix.numel(), sparse, dense))
        return part_kernels

    @property
    def nbytes(self) -> int:
        """Bytes of memory for states, sums and tables."""
        arrays = self.mask, self.planes, self.stem_taps, self.filters
        return self.z.nbytes + self.total.nbytes + sum(array.nbytes for array in arrays)


def _zeros(*shape: int) -> Tensor:
    """Return zeros, whatever the default type and device."""
    return torch.zeros(shape, dtype=torch.float32, device="cpu")


def _placed(sizes: Sequence[int], lives: Sequence[tuple[int, int]]) -> list[int]:
    """Return where to put things of some sizes so that those alive together do not overlap."""
    bases: dict[int, int] = {}
    for each in sorted(range(len(sizes)), key=lambda each: -sizes[each]):
        (born, died), base = lives[each], 0
        for other in sorted(bases, key=lambda other: bases[other]):
            together = lives[other][0] <= died and born <= lives[other][1]
            if together and base + sizes[each] > bases[other]:
                base = max(base, bases[other] + sizes[other])
        bases[each] = base
    return [bases[each] for each in range(len(sizes))]


def _maps(x: Tensor) -> tuple[int, ...]:
    """Return height and width of the maps of an input; other features lie in one row."""
    return tuple(x.shape[2:]) if x.dim() == 4 else (1, math.prod(x.shape[2:]))


def _seconds(function: Callable[[], object], repeats: int = 3) -> float:
    """Return the shortest time of some calls, after one that is not timed."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _live_parts(graph: Layout) -> tuple[list[Part], Tensor]:
    """Return parts that hold nodes that something reaches, and the numbers of these nodes."""
    parts, nodes = [], []
    for part in graph.parts:
        live = graph.reached[part.first : part.past].nonzero().flatten() + part.first
        if len(live):
            parts.append(replace(part, past=part.first + len(live)))
            nodes.append(live)
    return parts, torch.cat(nodes) if nodes else torch.empty(0, dtype=torch.int64, device="cpu")


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
        and _jit.can_compile()
    )
