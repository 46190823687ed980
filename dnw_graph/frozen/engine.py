"""Run frozen graphs on a CPU, by sparse kernels or dense products, whichever should be faster.

docs/kernels.md explains the design.
"""

import math
import operator
import threading
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnw_graph import _jit
from dnw_graph.frozen import _kernels as kernels
from dnw_graph.frozen.layout import Layout, Part
from dnw_graph.topology import Role

PIXELS_AT_ONCE = 4096  # images are computed together up to this many pixels of a state
PLANS = 64  # most plans that an engine keeps
PLAN_BYTES = 2**28  # most memory of the plans that it keeps, besides that of the last one used


# Fitted by benchmarks/frozen_kernels.py. The unit of cost is the time for one edge of a sparse sum.
NODE_COST, COLUMN_COST = 120, 0.8  # of a dense product: per node, and per node and column
EDGES_BY_TILE = 16  # edges per node from which BY_TILE is faster on one thread


def kernel_of(nodes: int, edges: int, columns: int, threads: int) -> int:
    """Return the kernel that is expected to sum the messages into a part in the shortest time.

    The choice depends on sizes alone, so outputs do not differ from run to run.

    Args:
        nodes: Number of nodes.
        edges: Number of edges into them.
        columns: Number of rows of states that a dense product would read.
        threads: Number of threads.

    Returns:
        ``BY_TILE``, ``BY_NODE`` or ``DENSE``.
    """
    if edges > nodes * (NODE_COST + COLUMN_COST * columns):
        return kernels.DENSE
    if threads == 1 and edges > nodes * EDGES_BY_TILE:
        return kernels.BY_TILE
    return kernels.BY_NODE


class Engine:
    """Compute a frozen graph on a CPU, with a plan for each size of input.

    Constant nodes are not computed for each image. All that they send to one node is summed once
    per plan and stored as one more row of the states, with one edge of weight 1.

    Args:
        graph: The graph, on a CPU, in float32.
        state_dtype: Type in which states are stored, float32 or bfloat16.
    """

    def __init__(self, graph: Layout, state_dtype: torch.dtype = torch.float32) -> None:
        self.graph, self.packed = graph, state_dtype == torch.bfloat16
        self._plans: dict[tuple[int, ...], _Plan] = {}
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
        #: Row of a node's state within its level ``[V]``; -1 if it sends to no node.
        self.row = torch.full((graph.num_nodes,), -1, device="cpu")
        #: By level: live nodes with edges from constant nodes, and the rows of what these send.
        self.fed: list[tuple[Tensor, Tensor]] = []
        self.num_rows: list[int] = []
        edges, weights = [torch.stack([self.row[:0], self.row[:0]])], [graph.edge_weight[live]]
        receivers = target[constant].unique()
        #: By level of their sources: edges from constant nodes to live ones.
        self.constant_edges: list[Tensor] = []
        for index in range(len(graph.strides) + 1):
            senders = (sends & (level == index)).nonzero().flatten()
            level_receivers = receivers[reads[receivers] == index]
            # Rows of constants come first in a level.
            rows = torch.arange(len(level_receivers), device="cpu")
            self.row[senders] = torch.arange(len(senders), device="cpu") + len(rows)
            self.fed.append((level_receivers, rows))
            self.constant_edges.append((constant & (reads[target] == index)).nonzero().flatten())
            self.num_rows.append(len(senders) + len(rows))
            edges.append(torch.stack([rows, number[level_receivers]]))
            weights.append(torch.ones(len(rows), dtype=torch.float32, device="cpu"))
        edges[0] = torch.stack([self.row[source[live]], number[target[live]]])
        rows, self.target = torch.cat(edges, 1)
        order = self.target.argsort(stable=True)
        self.source, self.target = rows[order].int().numpy(), self.target[order]
        self.weight = torch.cat(weights)[order].numpy()
        bounds = torch.arange(len(self.nodes) + 1, device="cpu")
        self.ptr = torch.searchsorted(self.target, bounds).numpy()

    @property
    def num_edges(self) -> int:
        """Number of edges of the kernels, including those from the sums of constants."""
        return len(self.weight)

    def multiply_adds(self, features: Sequence[int]) -> int:
        """Return the multiply-adds of edges and filters for one input with maps of a size."""
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
            x: Input of the graph, or of ``stem``; see :class:`Layout` for shapes.
            stem: A convolution before the graph that :meth:`takes` accepts.
        """
        flat = x.detach().reshape(*x.shape[:2], -1).contiguous()
        with self._lock:
            stride = 1 if stem is None else int(stem.stride[0])
            sizes = self.graph.sizes([-(-n // stride) for n in _map_size(x)])
            at_once = max(1, PIXELS_AT_ONCE // max(1, math.prod(sizes[0])))
            out = self._in_batches(flat, x[:1], at_once, stem)
        size = sizes[-1] if x.dim() == 4 else x.shape[2:]
        return out.view(*out.shape[:2], *size)

    def _in_batches(
        self, flat: Tensor, example: Tensor, size: int, stem: nn.Conv2d | None
    ) -> Tensor:
        """Return the outputs ``[B, outputs, Ho Wo]``, computed ``size`` images at a time.

        If there are enough images, threads compute different ones, which needs no data of other
        threads. The last images, or all of them, are computed by all threads together.

        Args:
            flat: The images ``[B, C, H W]``.
            example: The first image ``[1, C, H, W]``.
            size: Number of images that are computed at a time.
            stem: A convolution before the graph, if any.
        """
        threads, outputs, rest = _jit.threads(), [], flat
        if threads > 1 and len(flat) >= threads * size:
            plans = [self._plan(example, size, stem, 0)]
            if not plans[0].dense:  # products of PyTorch use all threads
                plans += [self._plan(example, size, stem, thread) for thread in range(1, threads)]
                number = len(flat) // (threads * size) * threads * size
                outputs.append(_run_apart(plans, flat[:number]))
                rest = flat[number:]
        for part in rest.split(size) if len(rest) else ():
            outputs.append(self._plan(example, len(part), stem).run(part))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def takes(self, layer: nn.Module) -> bool:
        """Return whether a layer is a convolution that can be passed as ``stem``."""
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

    def kinds(self, x: Tensor) -> list[int]:
        """Return the kernels that sum the messages into the parts, for an input ``[1, ...]``.

        Parts without edges are left out.
        """
        with self._lock:
            return list(self._plan(x, 1).kinds.values())

    def _plan(
        self, x: Tensor, batch: int, stem: nn.Conv2d | None = None, thread: int | None = None
    ) -> "_Plan":
        """Return the plan for ``batch`` inputs of the size of ``x [1, ...]``.

        Args:
            x: An input.
            batch: Number of inputs.
            stem: A convolution before the graph, if any.
            thread: Number of the thread that computes alone; None for all threads together.
        """
        threads = _jit.threads() if thread is None else 1
        key = (batch, *x.shape, id(stem), threads, thread)
        plan = self._plans.pop(key, None)
        if plan is None:
            with torch.inference_mode(False), torch.no_grad():
                plan = _Plan(self, self._constant_input(x), batch, stem, threads)
            self._make_room()
        self._plans[key] = plan  # in order of their last use
        return plan

    def _make_room(self) -> None:
        """Drop the least recently used plans while there are too many or they are too large."""
        total = sum(plan.nbytes for plan in self._plans.values())
        while self._plans and (len(self._plans) >= PLANS or total > PLAN_BYTES):
            total -= self._plans.pop(next(iter(self._plans))).nbytes

    def edges(self, at: int) -> slice:
        """Return the range of edges into a part."""
        first = sum(len(part) for part in self.parts[:at])
        return slice(int(self.ptr[first]), int(self.ptr[first + len(self.parts[at])]))

    def columns(self, at: int) -> range:
        """Return the range of rows that hold the sources of a part's edges."""
        source = self.source[self.edges(at)]
        return range(int(source.min()), int(source.max()) + 1)

    def matrix(self, at: int) -> tuple[Tensor, slice]:
        """Return the weights into a part as a dense matrix, and the rows that it multiplies."""
        if at not in self._matrices:
            edges, columns = self.edges(at), self.columns(at)
            first = sum(len(part) for part in self.parts[:at])
            source = torch.from_numpy(self.source[edges]).long() - columns.start
            matrix = _zeros(len(self.parts[at]), len(columns))
            matrix[self.target[edges] - first, source] = torch.from_numpy(self.weight[edges])
            self._matrices[at] = matrix, slice(columns.start, columns.stop)
        return self._matrices[at]

    def _constant_input(self, x: Tensor) -> Tensor:
        """Return ``x`` with zeros in all channels but those of constant input nodes."""
        constant_input, graph = _zeros(*x.shape), self.graph
        channels = graph.inputs[~graph.reached[: len(graph.inputs)]]
        constant_input[:, channels] = x.detach().clone()[:, channels]
        return constant_input


class _Plan:
    """Memory and tables of the kernels, for inputs of one size and a number of images.

    Args:
        engine: The engine.
        x: An input ``[1, ...]``, 0 except in channels of constant input nodes.
        batch: Number of images.
        stem: A convolution before the graph, if any.
        threads: Number of threads.
    """

    def __init__(
        self,
        engine: Engine,
        x: Tensor,
        batch: int,
        stem: nn.Conv2d | None = None,
        threads: int = 1,
    ) -> None:
        graph = engine.graph
        self.engine, self.batch, self.stem = engine, batch, stem
        image = x.shape[1:]
        if stem is not None:
            x = stem(x)
        self.sizes = graph.sizes(_map_size(x))
        self.threads, self.packed = threads, engine.packed
        self.padding = int(any(part.filters for part in graph.parts))
        self._choose_kernels()
        self._lay_out_levels()
        self._make_tables()
        self._lay_out_stem(image)
        self.outputs = len(graph.outputs), math.prod(self.sizes[-1])
        self.constant = (~graph.reached[graph.outputs]).nonzero().flatten()
        if not bool(graph.reached.all()):
            self._fill_constants(x)
        self._lay_out_call(image)

    def _lay_out_levels(self) -> None:
        """Lay out memory for states and sums, and make the masks of padding."""
        engine, lanes, padding = self.engine, kernels.LANES, self.padding
        self.levels = np.zeros((len(self.sizes), kernels.LEVEL_COLUMNS), dtype=np.int64)
        masks, sizes, lives = [], [], []
        sums_size = mask_base = 0
        for level, (height, width) in enumerate(self.sizes):
            pitch = width + padding
            image, vectors = (height + padding) * pitch, self._vectors(level)
            length = (vectors + 1) * lanes  # kernels write whole vectors, past the end of a map
            lead = -(-(pitch + 1) // lanes) * lanes  # padding before the first line
            sum_length = lead + length + -(-(pitch + 1) // lanes) * lanes + 2 * lanes
            rows = self._rows_of_sums(level)
            if self.packed:
                length = vectors // 2 * lanes
            row = height, width, pitch, image, vectors, length, 0
            self.levels[level] = *row, sum_length, lead, rows, mask_base
            lives.append(self._life(level))
            sizes.append(engine.num_rows[level] * length)
            sums_size = max(sums_size, rows * sum_length)
            mask_base += vectors * lanes
            inside = np.zeros((self.batch, height + padding, pitch), dtype=np.int32)
            inside[:, :height, :width] = -1
            behind = np.zeros(2 * lanes, dtype=np.int32)
            masks.append(np.append(inside, behind)[: vectors * lanes])
        self.levels[:, kernels.BASE] = bases = _offsets(sizes, lives)
        self.states = _zeros(max(map(operator.add, bases, sizes)))
        self.sums = _zeros(sums_size)
        self.mask = np.concatenate(masks)

    def _vectors(self, level: int) -> int:
        """Return the number of vectors of a row of a level before it is packed."""
        height, width = self.sizes[level]
        pitch = width + self.padding
        elements = self.batch * (height + self.padding) * pitch - self.padding * pitch
        vectors = -(-elements // kernels.LANES)
        return vectors + vectors % 2 if self.packed else vectors

    def _rows_of_sums(self, level: int) -> int:
        """Return how many inputs of nodes are in memory at a time, for the parts of a level."""
        pieces = kernels.most_pieces(self.threads)
        rows = pieces if self.stem is None or level else pieces * kernels.AT_ONCE
        for at, kind in self.kinds.items():
            part = self.engine.parts[at]
            if part.reads == level and kind in (kernels.BY_TILE, kernels.DENSE):
                rows = max(rows, len(part))
        return rows

    def _life(self, level: int) -> tuple[int, int]:
        """Return the first and the last part during which the states of a level are in use."""
        parts = self.engine.parts
        if len(self.engine.fed[level][0]):  # constants stay from call to call
            return 0, max(len(parts) - 1, 0)
        users = [at for at, part in enumerate(parts) if level in (part.reads, part.level)]
        return min(users, default=0), max(users, default=0)

    def _rows(self, level: int) -> Tensor:
        """Return the rows of states of a level ``[rows, length]``."""
        length, base = self.levels[level, [kernels.ROW_LENGTH, kernels.BASE]].tolist()
        number = self.engine.num_rows[level]
        return self.states[base : base + number * length].view(number, length)

    def _images(self, rows: Tensor, level: int) -> Tensor:
        """Return a view of the maps in rows of a level ``[rows, B, H, W]``."""
        height, width, pitch, image = self.levels[level, : kernels.IMAGE + 1].tolist()
        size, strides = (len(rows), self.batch, height, width), (rows.stride(0), image, pitch, 1)
        return rows.as_strided(size, strides)

    def run(self, x: Tensor) -> Tensor:
        """Return the outputs ``[B, outputs, Ho Wo]`` of ``x [B, C, H W]``."""
        out = self.empty_outputs(len(x))
        self.call[kernels.IMAGES], self.call[kernels.OUTPUTS] = x.data_ptr(), out.data_ptr()
        self.fire(0, len(self.engine.parts))
        return out

    def fire(self, start: int, stop: int) -> None:
        """Compute parts ``start`` to ``stop - 1``, by kernels and the dense products between."""
        for at, (matrix, rows) in self.dense.items():
            if start <= at < stop:
                self._run_kernel(start, at)
                self._multiply(at, matrix, rows)
                start = at
        self._run_kernel(start, stop)

    def empty_outputs(self, images: int) -> Tensor:
        """Return memory for the outputs of some images, with the constant outputs in it."""
        out = torch.empty(images, *self.outputs, dtype=torch.float32, device="cpu")
        if len(self.constant):
            out[:, self.constant] = self.constants
        return out

    def _run_kernel(self, start: int, stop: int) -> None:
        """Compute parts ``start`` to ``stop - 1`` by one call of the kernel, if there are any."""
        if start < stop:
            kernels.run(self.call, start, stop, self.threads)

    def _multiply(self, at: int, matrix: Tensor, rows: slice) -> None:
        """Write the sums into part number ``at``, as a dense product, to ``sums``."""
        reads = self.engine.parts[at].reads
        height, _, pitch, image = self.levels[reads, : kernels.IMAGE + 1].tolist()
        length, base = self.levels[reads, [kernels.SUM_LENGTH, kernels.LEAD]].tolist()
        size = len(matrix), (self.batch - 1) * image + height * pitch
        states = self._rows(reads)[rows]
        if self.packed:
            states = _unpacked(states)
        out = self.sums.as_strided(size, (length, 1), base)
        torch.mm(matrix, states[:, : size[1]], out=out)

    def _make_tables(self) -> None:
        """Describe blocks and nodes to the kernels."""
        engine, graph = self.engine, self.engine.graph
        nodes, parts = engine.nodes, engine.parts
        self.blocks = np.zeros((len(parts), kernels.BLOCK_COLUMNS), dtype=np.int64)
        self.eps = np.array([part.eps or 0 for part in parts], dtype=np.float64)
        first = 0
        for at, part in enumerate(parts):
            kind = self.kinds.get(at, kernels.BY_NODE)
            if part.role == Role.INPUT:
                kind = kernels.INPUT if self.stem is None else kernels.CONVOLUTION
            stride = graph.strides[part.reads] if part.level > part.reads else 1
            formula = part.relu, part.filters, stride, part.eps is not None
            levels = part.reads, part.level
            self.blocks[at] = first, first + len(part), kind, *formula, *levels, 0, at
            first += len(part)
        self.nodes = np.full((len(nodes), 3), -1, dtype=np.int64)
        is_input = nodes < len(graph.inputs)
        self.nodes[is_input.numpy(), kernels.CHANNEL] = graph.inputs[nodes[is_input]].numpy()
        live = graph.reached[graph.outputs]
        channel = torch.full((graph.num_nodes,), -1, device="cpu")
        channel[graph.outputs[live]] = live.nonzero().flatten()
        self.nodes[:, kernels.OUTPUT] = channel[nodes].numpy()
        self.nodes[:, kernels.ROW] = engine.row[nodes].numpy()
        self.scale, self.shift = graph.scale[nodes].numpy(), graph.shift[nodes].numpy()
        self.filters = graph.filters[nodes].contiguous().numpy()

    def _lay_out_stem(self, image: Sequence[int]) -> None:
        """Lay out the convolution before the graph for the kernels, and memory for its input.

        Args:
            image: Shape of its input ``[C, H, W]``.
        """
        taps, bias, planes_size = [_zeros(0)], [_zeros(0)], 0
        if self.stem is not None:
            planes_size = self.batch * image[0] * (image[1] + 2) * (image[2] + 2)
            groups = 0
            for block in self.blocks:
                if block[kernels.KIND] == kernels.CONVOLUTION:
                    block_taps, block_bias = self._folded_stem(self.stem, block)
                    taps.append(block_taps)
                    bias.append(block_bias)
                    block[kernels.STEM] = groups
                    groups += len(block_bias) // kernels.AT_ONCE
        self.stem_taps, self.stem_bias = torch.cat(taps).numpy(), torch.cat(bias).numpy()
        # Vectors are loaded past the end of the last line.
        self.planes = np.zeros(planes_size + 4 * kernels.LANES, dtype=np.float32)

    def _folded_stem(self, stem: nn.Conv2d, block: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return taps and bias of the channels that a block reads, with scale and shift folded in.

        Taps are ``[groups, 9 C, AT_ONCE]``, flattened, and the bias ``[groups * AT_ONCE]``; absent
        channels of the last group are 0.
        """
        weight = stem.weight.detach()
        shift = _zeros(len(weight)) if stem.bias is None else stem.bias.detach()
        nodes = slice(*block[[kernels.FIRST, kernels.PAST]].tolist())
        channels = torch.from_numpy(self.nodes[nodes, kernels.CHANNEL])
        scale = torch.from_numpy(self.scale[nodes])
        missing = -len(channels) % kernels.AT_ONCE
        taps = F.pad(weight[channels].flatten(1) * scale[:, None], (0, 0, 0, missing))
        bias = shift[channels] * scale + torch.from_numpy(self.shift[nodes])
        return taps.unflatten(0, (-1, kernels.AT_ONCE)).mT.flatten(), F.pad(bias, (0, missing))

    def _fill_constants(self, x: Tensor) -> None:
        """Compute what constant nodes send, into the states, and the constant outputs."""
        engine, graph = self.engine, self.engine.graph
        states = [s[0].reshape(s.shape[1], -1) for s in graph.states(x.detach())]
        source, target = graph.edge_index
        level_states = _zeros(0)
        for level, (receivers, rows) in enumerate(engine.fed):
            blocks = [s for part, s in zip(graph.parts, states, strict=True) if part.level == level]
            level_states = torch.cat(blocks) if blocks else level_states[:0]  # in order of places
            if not len(receivers):
                continue
            edges = engine.constant_edges[level]
            messages = graph.edge_weight[edges, None] * level_states[graph.places[source[edges]]]
            sums = _zeros(len(receivers), level_states.shape[1])
            sums.index_add_(0, torch.searchsorted(receivers, target[edges]), messages)
            states_of_level = self._rows(level)
            filled = _zeros(len(receivers), states_of_level.shape[1] * (2 if self.packed else 1))
            maps = self._images(filled, level)
            maps[:] = sums.view(len(receivers), 1, *maps.shape[2:])
            states_of_level[rows] = _packed(filled) if self.packed else filled
        self.constants = level_states[graph.places[graph.outputs[self.constant]]]

    def _lay_out_call(self, image: Sequence[int]) -> None:
        """Collect the arguments of the kernels.

        Args:
            image: Shape of an input ``[C, H, W]``.
        """
        engine, self.call = self.engine, np.zeros(kernels.PACKED + 1, dtype=np.int64)
        arrays = {
            kernels.BLOCKS: self.blocks,
            kernels.EPS: self.eps,
            kernels.LEVELS: self.levels,
            kernels.NODES: self.nodes,
            kernels.SCALES: self.scale,
            kernels.SHIFTS: self.shift,
            kernels.KERNELS: self.filters,
            kernels.PTR: engine.ptr,
            kernels.SOURCES: engine.source,
            kernels.WEIGHTS: engine.weight,
            kernels.MASKS: self.mask,
            kernels.TAPS: self.stem_taps,
            kernels.BIASES: self.stem_bias,
            kernels.PLANES: self.planes,
            kernels.STATES: self.states.numpy(),
            kernels.SUMS: self.sums.numpy(),
        }
        for column, array in arrays.items():
            assert array.flags.c_contiguous
            self.call[column] = array.ctypes.data
        size = image if len(image) == 3 else (image[0], 1, math.prod(image[1:]))
        stride = 1 if self.stem is None else self.stem.stride[0]
        self.call[kernels.BATCH :] = (
            self.batch,
            *size,
            stride,
            self.outputs[0],
            len(self.blocks),
            self.packed,
        )

    def _choose_kernels(self) -> None:
        """Choose how the messages into each part with edges are summed."""
        engine = self.engine
        self.kinds: dict[int, int] = {}
        for at, part in enumerate(engine.parts):
            edges = engine.edges(at)
            if part.role == Role.INPUT or edges.start == edges.stop:
                continue
            size = len(part), edges.stop - edges.start, len(engine.columns(at))
            kind = kernel_of(*size, self.threads)
            tile = 2 * kernels.TILE_PACKED if self.packed else kernels.TILE
            if kind == kernels.BY_TILE and self._vectors(part.reads) <= tile:
                kind = kernels.BY_NODE
            self.kinds[at] = kind
        dense = [at for at, kind in self.kinds.items() if kind == kernels.DENSE]
        self.dense = {at: engine.matrix(at) for at in dense}

    @property
    def nbytes(self) -> int:
        """Bytes of its memory and tables."""
        arrays = self.mask, self.planes, self.stem_taps, self.filters
        return self.states.nbytes + self.sums.nbytes + sum(array.nbytes for array in arrays)


def _zeros(*shape: int) -> Tensor:
    """Return zeros in float32 on the CPU, regardless of the default type and device."""
    return torch.zeros(shape, dtype=torch.float32, device="cpu")


def _run_apart(plans: Sequence[_Plan], x: Tensor) -> Tensor:
    """Return the outputs of ``x [B, C, H W]``, computed by one thread per plan."""
    out, size = plans[0].empty_outputs(len(x)), plans[0].batch
    starts = np.arange(len(x) // size, dtype=np.int64) * size
    images = x.data_ptr() + 4 * x[0].numel() * starts
    outputs = out.data_ptr() + 4 * out[0].numel() * starts
    kernels.run_apart(np.stack([plan.call for plan in plans]), images, outputs)
    return out


def _packed(rows: Tensor) -> Tensor:
    """Return rows of states, packed as by the kernel ``_pack``."""
    first, second = rows.view(torch.int32).unflatten(1, (-1, 2, kernels.LANES)).unbind(2)
    second = ((second + 0x8000) >> 16) & 0xFFFF
    first = torch.where((first & 0x70000000) == 0, first | kernels.SMALLEST, first)
    first = (first + (0x8000 - second)) & -(2**16)
    return (first | second).flatten(1).view(torch.float32)


def _unpacked(rows: Tensor) -> Tensor:
    """Return packed rows of states in float32."""
    both = rows.view(torch.int32).unflatten(1, (-1, 1, kernels.LANES))
    return torch.cat([both, both << 16], 2).flatten(1).view(torch.float32)


def _offsets(sizes: Sequence[int], lives: Sequence[tuple[int, int]]) -> list[int]:
    """Return offsets for pieces of memory, such that pieces in use together do not overlap.

    Args:
        sizes: Size of each piece.
        lives: First and last time at which each piece is in use.
    """
    bases: dict[int, int] = {}
    for piece in sorted(range(len(sizes)), key=lambda piece: -sizes[piece]):
        (born, died), base = lives[piece], 0
        for other in sorted(bases, key=lambda other: bases[other]):
            together = lives[other][0] <= died and born <= lives[other][1]
            if together and base + sizes[piece] > bases[other]:
                base = max(base, bases[other] + sizes[other])
        bases[piece] = base
    return [bases[piece] for piece in range(len(sizes))]


def _map_size(x: Tensor) -> tuple[int, ...]:
    """Return the height and width of an input's maps; features that are not maps are one line."""
    return tuple(x.shape[2:]) if x.dim() == 4 else (1, math.prod(x.shape[2:]))


def _live_parts(graph: Layout) -> tuple[list[Part], Tensor]:
    """Return the parts without their constant nodes, and the numbers of the nodes left."""
    parts, nodes = [], []
    for part in graph.parts:
        live = graph.reached[part.first : part.past].nonzero().flatten() + part.first
        if len(live):
            parts.append(replace(part, past=part.first + len(live)))
            nodes.append(live)
    return parts, torch.cat(nodes) if nodes else torch.empty(0, dtype=torch.int64, device="cpu")


def usable(x: Tensor) -> bool:
    """Return whether an engine can compute an input: float32 on a CPU, not empty, no gradient.

    It cannot under autocast, while compiling, in a forked process, or without Numba's compiler.
    """
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.numel() > 0
        and not (torch.is_grad_enabled() and x.requires_grad)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not _jit.in_forked_child()
        and _jit.can_compile()
    )
