"""CPU kernels of frozen graphs. docs/kernels.md explains their design.

:func:`run` computes the states of consecutive blocks (a part of a graph is one block here). It and
the functions it calls take these arrays; ``V`` counts the nodes that depend on the input, in the
order in which they fire, and floats are float32:

=================== ======= ========================================================================
``blocks [n, 10]``  int64   One row per block, with the columns ``FIRST`` to ``STEM``.
``eps [n]``         float64 ``eps`` of instance norm; 0 for other blocks.
``levels [l, 11]``  int64   One row per size of maps, with the columns ``HEIGHT`` to ``MASK``.
``nodes [V, 3]``    int64   ``CHANNEL`` that the node reads from ``x``, ``OUTPUT`` channel and
                            ``ROW`` in ``states``; -1 for none.
``scale [V]``       float   ``a`` of ``max(a I + b, 0)``, where ``I`` is the input of a node.
``shift [V]``       float   ``b`` of the same.
``filters``         float   3x3 filters ``[V, 3, 3]``.
``ptr [V + 1]``     int64   Edges ``ptr[v]`` to ``ptr[v + 1] - 1`` lead into node ``v``.
``source [E]``      int32   Row of the state that an edge reads, within its level.
``weight [E]``      float   Weight of an edge.
``mask``            int32   For each level one row: -1 at pixels, 0 at padding.
``stem [4]``        int64   Channels, height and width of ``x``, and stride of the convolution.
``stem_taps``       float   Weights ``[groups, 9 C, 8]`` of the convolution, 8 channels per group.
``stem_bias``       float   Its bias ``[groups, 8]``.
``planes``          float   Memory for ``x`` in a frame of zeros, ``[B, C, (H + 2) (W + 2)]``.
``x [B, C, H W]``   float   Input of the graph, or of the convolution before the graph.
``states``          float   Memory for what nodes send: one matrix per level, one row per node.
``sums``            float   Memory for the inputs of nodes, and for what their filters read.
``out``             float   Output ``[B, outputs, H' W']``.
=================== ======= ========================================================================

Functions that take addresses (int64) in place of arrays use LLVM's vectors. Offsets into arrays
count floats, and addresses count bytes.
"""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from dnw_graph import _jit

LANES = 16  # floats per vector; LLVM splits it in two or four where registers are shorter
TILE = 7  # vectors
AT_ONCE = 8  # channels of a convolution
BYTES = 4 * LANES

# Columns of the tables that describe blocks, levels and nodes to the kernels.
FIRST, PAST, KIND, RELU, FILTERS, STRIDE, INSTANCE, READS, LEVEL, STEM = range(10)
HEIGHT, WIDTH, PITCH, IMAGE, VECTORS, ROW_LENGTH, BASE = range(7)
SUM_LENGTH, LEAD, NODES, MASK = range(7, 11)
CHANNEL, OUTPUT, ROW = range(3)
# Kinds of blocks: inputs; inputs that the convolution computes; nodes whose edges are summed tile
# after tile or node after node; nodes whose sums a dense product has formed already.
INPUT, CONVOLUTION, BY_TILE, BY_NODE, DENSE = range(5)

# The arrays below have no annotations: Numba derives their types.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

_I32, _F32 = ir.IntType(32), ir.FloatType()
_VECTOR, _INTEGERS = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)
_UNDEFINED = ir.Constant(_VECTOR, ir.Undefined)


def _at(builder: Any, address: Any, kind: Any = _VECTOR, offset: int = 0) -> Any:
    """Return a pointer to the value ``offset`` bytes behind an address."""
    return builder.inttoptr(builder.add(address, ir.IntType(64)(offset)), kind.as_pointer())


def _load(builder: Any, address: Any, kind: Any = _VECTOR, offset: int = 0) -> Any:
    """Load the value ``offset`` bytes behind an address; vectors need not be aligned."""
    value = builder.load(_at(builder, address, kind, offset))
    value.align = 4
    return value


def _store(builder: Any, value: Any, address: Any, offset: int = 0) -> None:
    """Store a value ``offset`` bytes behind an address; vectors need not be aligned."""
    builder.store(value, _at(builder, address, value.type, offset)).align = 4


def _broadcast(builder: Any, value: Any) -> Any:
    """Return a vector whose elements all equal a number."""
    first = builder.insert_element(_UNDEFINED, value, _I32(0))
    return builder.shuffle_vector(first, _UNDEFINED, ir.Constant(_INTEGERS, [0] * LANES))


def _add(builder: Any, total: Any, a: Any, b: Any) -> Any:
    """Return ``total + a b``, rounded once."""
    return builder.fadd(total, builder.fmul(a, b, flags=("contract",)), flags=("contract",))


def _make_sum(vectors: int) -> Any:
    """Return an intrinsic that sums messages into one node, over a tile of ``vectors`` vectors."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        states, source, weight, first, past, length, mask, a, b, least, out = args
        four, length = ir.IntType(64)(4), builder.mul(length, ir.IntType(64)(4))
        totals = [cgutils.alloca_once(builder, _VECTOR) for _ in range(vectors)]
        for total in totals:
            builder.store(ir.Constant(_VECTOR, [0.0] * LANES), total)
        with cgutils.for_range_slice(builder, first, past, ir.IntType(64)(1)) as (edge, _):
            offset = builder.mul(edge, four)
            row = builder.sext(_load(builder, builder.add(source, offset), _I32), ir.IntType(64))
            factor = _broadcast(builder, _load(builder, builder.add(weight, offset), _F32))
            state = builder.add(states, builder.mul(row, length))
            for i, total in enumerate(totals):
                z = _load(builder, state, offset=BYTES * i)
                builder.store(_add(builder, builder.load(total), factor, z), total)
        a, b, least = (_broadcast(builder, number) for number in (a, b, least))
        for i, total in enumerate(totals):
            result = _add(builder, b, a, builder.load(total))
            below = builder.fcmp_ordered("<", result, least)  # false for NaN, which stays
            bits = builder.bitcast(builder.select(below, least, result), _INTEGERS)
            inside = builder.and_(bits, _load(builder, mask, _INTEGERS, BYTES * i))
            _store(builder, builder.bitcast(inside, _VECTOR), out, BYTES * i)
        return context.get_dummy_value()

    @intrinsic
    def sums(typing_context, states, source, weight, first, past, length, mask, a, b, least, out):
        """``out = max(a sum over e of weight[e] states[source[e]] + b, least)``, 0 off the mask."""
        wide, real = types.int64, types.float32
        return types.void(*[wide] * 7, real, real, real, wide), generate

    return sums


_sum_1, _sum_2, _sum_3, _sum_4, _sum_5, _sum_6, _sum_7 = (_make_sum(n) for n in range(1, 8))


def _pick(builder: Any, first: Any, second: Any, start: int, step: int) -> Any:
    """Return elements ``start``, ``start + step``, ... of two vectors one behind the other."""
    places = list(range(start, start + step * LANES, step))
    return builder.shuffle_vector(first, second, ir.Constant(_INTEGERS, places))


def _neighbours(builder: Any, start: Any, stride: int) -> list[Any]:
    """Return the vectors of elements ``stride i``, ``stride i + 1`` and ``stride i + 2``."""
    first, second, *more = (_load(builder, start, offset=BYTES * i) for i in range(stride + 1))
    if stride == 1:
        return [first, _pick(builder, first, second, 1, 1), _pick(builder, first, second, 2, 1)]
    shifted = _pick(builder, first, second, 2, 1), _pick(builder, second, more[0], 2, 1)
    here = [_pick(builder, first, second, start, 2) for start in range(2)]
    return [*here, _pick(builder, *shifted, 0, 2)]


def _make_filter(stride: int) -> Any:
    """Return an intrinsic that applies a 3x3 filter with a horizontal stride."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        padded, filters, out, vectors, pitch = args
        i64 = ir.IntType(64)
        k = [_broadcast(builder, _load(builder, filters, _F32, 4 * i)) for i in range(9)]
        with cgutils.for_range(builder, vectors) as loop:
            line = builder.add(padded, builder.mul(loop.index, i64(BYTES * stride)))
            total = ir.Constant(_VECTOR, [0.0] * LANES)
            for y in range(3):
                for i, x in enumerate(_neighbours(builder, line, stride)):
                    total = _add(builder, total, k[3 * y + i], x)
                line = builder.add(line, builder.mul(pitch, i64(4)))
            _store(builder, total, builder.add(out, builder.mul(loop.index, i64(BYTES))))
        return context.get_dummy_value()

    @intrinsic
    def filtered(typing_context, padded, filters, out, vectors, pitch):
        """``out[i] = sum over y, x of filters[y, x] padded[stride i + y pitch + x]``."""
        return types.void(*[types.int64] * 5), generate

    return filtered


_filter_stride_1, _filter_stride_2 = _make_filter(1), _make_filter(2)


def _make_convolution(stride: int) -> Any:
    """Return an intrinsic that computes a line of 8 channels of a 3x3 convolution."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        planes, channels, plane, pitch, taps, bias, least, out, length, vectors = args
        i64 = ir.IntType(64)
        least = _broadcast(builder, least)
        totals = [cgutils.alloca_once(builder, _VECTOR) for _ in range(AT_ONCE)]
        with cgutils.for_range(builder, vectors) as along:
            for g, total in enumerate(totals):
                builder.store(_broadcast(builder, _load(builder, bias, _F32, 4 * g)), total)
            start = builder.add(planes, builder.mul(along.index, i64(BYTES * stride)))
            with cgutils.for_range(builder, channels) as channel:
                line = builder.add(start, builder.mul(channel.index, builder.mul(plane, i64(4))))
                k = builder.add(taps, builder.mul(channel.index, i64(4 * 9 * AT_ONCE)))
                for y in range(3):
                    for i, x in enumerate(_neighbours(builder, line, stride)):
                        for g, total in enumerate(totals):
                            offset = 4 * (AT_ONCE * (3 * y + i) + g)
                            tap = _broadcast(builder, _load(builder, k, _F32, offset))
                            builder.store(_add(builder, builder.load(total), tap, x), total)
                    line = builder.add(line, builder.mul(pitch, i64(4)))
            to = builder.add(out, builder.mul(along.index, i64(BYTES)))
            for total in totals:
                result = builder.load(total)
                below = builder.fcmp_ordered("<", result, least)  # false for NaN, which stays
                _store(builder, builder.select(below, least, result), to)
                to = builder.add(to, builder.mul(length, i64(4)))
        return context.get_dummy_value()

    @intrinsic
    def convolved(
        typing_context, planes, channels, plane, pitch, taps, bias, least, out, length, vectors
    ):
        """``out[g, i] = max(b + sum taps[c, y, x, g] planes[c, stride i + y pitch + x], least)``.

        ``length`` is the distance between channels of ``out``, ``plane`` that between channels of
        ``planes``.
        """
        wide = types.int64
        return types.void(*[wide] * 6, types.float32, *[wide] * 3), generate

    return convolved


_convolve_stride_1, _convolve_stride_2 = _make_convolution(1), _make_convolution(2)


def _inline(function: Callable[..., Any]) -> Any:
    """Compile a function that kernels call; LLVM may inline it."""
    return numba.njit(fastmath={"contract", "reassoc"}, error_model="numpy")(function)


def _expand(function: Callable[..., Any]) -> Any:
    """Let Numba copy a function into its caller before it looks for parallel loops.

    Functions with ``numba.prange`` need it. Compiled separately, their loops would run on one
    thread, or on several in a forked process, where OpenMP must not start any. It also saves the
    reference counts of arrays passed for each node, 7 % of the time in ``_write_state``.
    """
    return numba.njit(inline="always")(function)


@_inline
def _sum(n, states, source, weight, first, past, length, mask, a, b, least, out):
    """Sum messages into one node over ``n`` vectors, 1 to 7."""
    if n == 7:
        _sum_7(states, source, weight, first, past, length, mask, a, b, least, out)
    elif n == 6:
        _sum_6(states, source, weight, first, past, length, mask, a, b, least, out)
    elif n == 5:
        _sum_5(states, source, weight, first, past, length, mask, a, b, least, out)
    elif n == 4:
        _sum_4(states, source, weight, first, past, length, mask, a, b, least, out)
    elif n == 3:
        _sum_3(states, source, weight, first, past, length, mask, a, b, least, out)
    elif n == 2:
        _sum_2(states, source, weight, first, past, length, mask, a, b, least, out)
    else:
        _sum_1(states, source, weight, first, past, length, mask, a, b, least, out)


@_inline
def _sum_tile(
    tile, tiles, level, states, source, weight, first, past, mask, a, b, least, raw, sums, at
):
    """Sum messages into one node over tile number ``tile`` of ``tiles``.

    The node's row begins at ``sums[at]``. ``raw`` writes the sum itself, for a norm to follow.
    """
    low = tile * level[VECTORS] // tiles
    if raw:
        a, b, least = np.float32(1), np.float32(0), np.float32(-np.inf)
    _sum(
        (tile + 1) * level[VECTORS] // tiles - low,
        states.ctypes.data + 4 * level[BASE] + BYTES * low, source.ctypes.data, weight.ctypes.data,
        first, past, level[ROW_LENGTH], mask.ctypes.data + 4 * level[MASK] + BYTES * low,
        a, b, least, sums.ctypes.data + 4 * at + BYTES * low,
    )  # fmt: skip


@_inline
def _tiles(level):
    """Return the number of tiles of a row."""
    return (level[VECTORS] + TILE - 1) // TILE


@_inline
def _instance_norm(row, H, W, pitch, eps, scale, shift):
    """Return ``a, b`` such that ``a I + b`` is the instance norm of a map ``I``."""
    total = np.float64(0)
    for y in range(H):
        part = np.float32(0)
        for x in range(W):
            part += row[y * pitch + x]
        total += part
    mean = np.float32(total / (H * W))
    total = np.float64(0)
    for y in range(H):
        part = np.float32(0)
        for x in range(W):
            part += (row[y * pitch + x] - mean) * (row[y * pitch + x] - mean)
        total += part
    a = np.float32(scale / np.sqrt(total / (H * W) + eps))
    return a, shift - mean * a


@_inline
def _affine(row, row_pitch, to, pitch, image, H, W, a, b, least):
    """``to = max(a I + b, least)`` for a map, 0 behind each line and behind the map."""
    for y in range(H):
        line, into = row[y * row_pitch :], to[y * pitch :]
        for x in range(W):
            value = a * line[x] + b
            into[x] = least if value < least else value  # NaN stays
        into[W:pitch] = 0
    to[H * pitch : image] = 0


@_inline
def _transform(row, row_pitch, level, instance, eps, a, b, least, to):
    """Write ``max(a n(I) + b, least)`` for a map, where ``n`` is instance norm or nothing."""
    H, W = level[HEIGHT], level[WIDTH]
    if instance:
        a, b = _instance_norm(row, H, W, row_pitch, eps, a, b)
    _affine(row, row_pitch, to, level[PITCH], level[IMAGE], H, W, a, b, least)


@_inline
def _zero(row, first, number):
    """Write ``number`` zeros from ``row[first]`` on."""
    for i in range(first, first + number):
        row[i] = 0


@_inline
def _clear_padding(level, B, sums):
    """Write zeros before the first map and behind the last one in each row of ``sums``."""
    length, lead = level[SUM_LENGTH], level[LEAD]
    end = lead + B * level[IMAGE] - (level[PITCH] - level[WIDTH]) * level[PITCH]
    for row in range(level[NODES]):
        _zero(sums, row * length, lead)
        _zero(sums, row * length + end, length - end)


@_inline
def _frame(row, H, W, to):
    """Copy a map into a frame of zeros, one pixel wide."""
    _zero(to, 0, W + 3)
    for y in range(H):
        at = (y + 1) * (W + 2)
        for x in range(W):
            to[at + 1 + x] = row[y * W + x]
        to[at + W + 1] = 0
        to[at + W + 2] = 0
    _zero(to, (H + 1) * (W + 2) + 1, W + 1)


@_inline
def _convolve(
    planes, channels, plane, width, stride, taps, bias, least, sums, at, length, pitch, H, W
):  # fmt: skip
    """Write maps of 8 channels of a convolution, 0 behind each line and each map."""
    for y in range(H):
        line, to = planes + 4 * y * stride * width, sums.ctypes.data + 4 * (at + y * pitch)
        vectors = (W + LANES - 1) // LANES
        if stride == 1:
            _convolve_stride_1(
                line, channels, plane, width, taps, bias, least, to, length, vectors
            )  # fmt: skip
        else:
            _convolve_stride_2(
                line, channels, plane, width, taps, bias, least, to, length, vectors
            )  # fmt: skip
        for g in range(AT_ONCE):
            _zero(sums, at + g * length + y * pitch + W, pitch - W)
    for g in range(AT_ONCE):
        _zero(sums, at + g * length + H * pitch, max(LANES, pitch))


@_inline
def _filter(padded, pitch, H, W, k, stride, line, to, to_pitch):
    """Filter a map.

    Args:
        padded: Address of the corner of its padding, one line and one pixel before the map.
        pitch: Distance between its lines.
        H: Its height.
        W: Its width.
        k: Address of the filter.
        stride: Stride of the filter.
        line: Memory for one line, for strides above 2.
        to: Address of the result.
        to_pitch: Distance between lines of the result.
    """
    if stride == 1:
        vectors = ((H - 1) * pitch + W + LANES - 1) // LANES
        _filter_stride_1(padded, k, to, vectors, pitch)
    elif stride == 2:
        vectors = ((W + 1) // 2 + LANES - 1) // LANES
        for y in range((H + 1) // 2):
            _filter_stride_2(padded + 8 * y * pitch, k, to + 4 * y * to_pitch, vectors, pitch)
    else:
        out = numba.carray(_jit.pointer(to, np.float32(0)), (H * to_pitch,))
        for y in range((H + stride - 1) // stride):
            start = padded + 4 * y * stride * pitch
            _filter_stride_1(start, k, line.ctypes.data, (W + LANES - 1) // LANES, pitch)
            for x in range((W + stride - 1) // stride):
                out[y * to_pitch + x] = line[x * stride]


@_inline
def _copy(row, first, number, to, at):
    """Copy ``number`` elements from ``row[first]`` on to ``to[at]`` and on."""
    for i in range(number):
        to[at + i] = row[first + i]


@_inline
def _write_output(row, first, level, out):
    """Copy a map that begins at ``row[first]`` to an output channel, which has no padding."""
    for y in range(level[HEIGHT]):
        for x in range(level[WIDTH]):
            out[y * level[WIDTH] + x] = row[first + y * level[PITCH] + x]


@_expand
def _write_state(block, level, to_level, node, k, sums, at, states, to, line, spare, out):
    """Filter the map at ``sums[at]`` and write it to ``states[to]`` and an output.

    Args:
        block: Row of ``blocks``.
        level: Row of ``levels`` of the map.
        to_level: Row of ``levels`` of the state.
        node: Row of ``nodes``, which says whether the state is sent and whether it is an output.
        k: Address of the filter.
        sums: Memory of the map.
        at: Offset of the map.
        states: Memory of the state.
        to: Offset of the state.
        line: Memory for a line, for strides above 2.
        spare: Memory for a state that is not sent.
        out: Output ``[outputs, H' W']``.
    """
    H, W, pitch = level[HEIGHT], level[WIDTH], level[PITCH]
    result, result_at = sums, at
    if block[FILTERS]:
        result, result_at = (states, to) if node[ROW] >= 0 else (spare, 0)
        _filter(
            sums.ctypes.data + 4 * (at - pitch - 1), pitch, H, W, k, block[STRIDE], line,
            result.ctypes.data + 4 * result_at, to_level[PITCH],
        )  # fmt: skip
    elif node[ROW] >= 0:
        _copy(sums, at, (H - 1) * pitch + W, states, to)
    if node[OUTPUT] >= 0:
        _write_output(result, result_at, to_level, out[node[OUTPUT]])


@_expand
def _convolve_inputs(blocks, levels, stem, stem_taps, stem_bias, planes, x, sums, block):
    """Convolve ``x`` into ``sums``, for a block of kind ``CONVOLUTION``.

    Threads share out first the channels of ``x``, then groups of 8 nodes.
    """
    B, number = x.shape[0], blocks[block, PAST] - blocks[block, FIRST]
    least = np.float32(0) if blocks[block, RELU] else np.float32(-np.inf)
    level = levels[blocks[block, READS]]
    channels, height, width, stride = stem[0], stem[1], stem[2], stem[3]
    plane = (height + 2) * (width + 2)
    for task in numba.prange(B * channels):
        b, c = task // channels, task % channels
        _frame(x[b, c], height, width, planes[np.int64(task) * plane :])
    taps, bias = stem_taps[blocks[block, STEM] :], stem_bias[blocks[block, STEM] :]
    for task in numba.prange((number + AT_ONCE - 1) // AT_ONCE):
        for b in range(B):
            at = np.int64(task) * AT_ONCE * level[SUM_LENGTH] + b * level[IMAGE]
            _convolve(
                planes.ctypes.data + 4 * b * channels * plane, channels, plane, width + 2, stride,
                taps[task].ctypes.data, bias[task].ctypes.data, least, sums, level[LEAD] + at,
                level[SUM_LENGTH], level[PITCH], level[HEIGHT], level[WIDTH],
            )  # fmt: skip


@_expand
def _sum_by_tile(
    blocks, levels, scale, shift, ptr, source, weight, mask, states, sums, block, threads
):
    """Sum messages into all nodes of a block of kind ``BY_TILE``, tile after tile.

    Threads share out tiles, and parts of the nodes where there are few tiles.
    """
    first, past = blocks[block, FIRST], blocks[block, PAST]
    raw = blocks[block, INSTANCE] != 0
    least = np.float32(0) if blocks[block, RELU] else np.float32(-np.inf)
    level = levels[blocks[block, READS]]
    tiles = _tiles(level)
    chunks = min(past - first, max(1, (4 * threads + tiles - 1) // tiles))
    for task in numba.prange(tiles * chunks):
        tile, chunk = task // chunks, task % chunks
        for v in range(
            first + chunk * (past - first) // chunks,
            first + (chunk + 1) * (past - first) // chunks,
        ):
            _sum_tile(
                tile, tiles, level, states, source, weight, ptr[v], ptr[v + 1], mask,
                scale[v], shift[v], least, raw,
                sums, level[LEAD] + (v - first) * level[SUM_LENGTH],
            )  # fmt: skip


@_expand
def _finish_nodes(
    blocks, eps, levels, nodes, scale, shift, filters, ptr, source, weight, mask,
    x, states, sums, out, block, threads,
):  # fmt: skip
    """Compute the states of a block from ``x`` (``INPUT``), edges (``BY_NODE``) or ``sums``.

    Threads share out the nodes. A thread needs one row of ``sums`` only if it sums node after node.
    """
    first, past, kind = blocks[block, FIRST], blocks[block, PAST], blocks[block, KIND]
    instance = blocks[block, INSTANCE] != 0
    least = np.float32(0) if blocks[block, RELU] else np.float32(-np.inf)
    level, to_level = levels[blocks[block, READS]], levels[blocks[block, LEVEL]]
    W, pitch = level[WIDTH], level[PITCH]
    pieces = min(max(past - first, 1), 1 if threads == 1 else 4 * threads)
    for piece in numba.prange(pieces):
        line = np.empty(W + 3 * LANES, dtype=np.float32)
        spare = np.empty(to_level[IMAGE] + 3 * LANES, dtype=np.float32)
        for v in range(
            first + piece * (past - first) // pieces,
            first + (piece + 1) * (past - first) // pieces,
        ):
            a, b = scale[v], shift[v]
            sums_row = np.int64(piece) if kind == BY_NODE else v - first
            start = level[LEAD] + sums_row * level[SUM_LENGTH]
            if kind == BY_NODE:
                for tile in range(_tiles(level)):
                    _sum_tile(
                        tile, _tiles(level), level, states, source, weight, ptr[v], ptr[v + 1],
                        mask, a, b, least, instance, sums, start,
                    )  # fmt: skip
            for n in range(x.shape[0]):
                at = start + n * level[IMAGE]
                if kind == INPUT:
                    channel = x[n, nodes[v, CHANNEL]]
                    _transform(channel, W, level, instance, eps[block], a, b, least, sums[at:])
                elif instance or kind == DENSE:
                    _transform(
                        sums[at:], pitch, level, instance, eps[block], a, b, least, sums[at:]
                    )
                to = to_level[BASE] + nodes[v, ROW] * to_level[ROW_LENGTH] + n * to_level[IMAGE]
                _write_state(
                    blocks[block], level, to_level, nodes[v], filters.ctypes.data + 36 * v,
                    sums, at, states, to, line, spare, out[n],
                )  # fmt: skip


@_jit.Kernel
def run(
    blocks, eps, levels, nodes, scale, shift, filters, ptr, source, weight, mask,
    stem, stem_taps, stem_bias, planes, x, states, sums, out, start, stop, threads,
):  # fmt: skip
    """Compute blocks ``start`` to ``stop - 1`` on ``threads`` threads.

    The module's docstring explains the arrays. A block of kind ``DENSE`` must be the first, with
    its sums in ``sums``.
    """
    for block in range(start, stop):
        if block == start or blocks[block - 1, READS] != blocks[block, READS]:
            _clear_padding(levels[blocks[block, READS]], x.shape[0], sums)
        if blocks[block, KIND] == CONVOLUTION:
            _convolve_inputs(blocks, levels, stem, stem_taps, stem_bias, planes, x, sums, block)
        elif blocks[block, KIND] == BY_TILE:
            _sum_by_tile(
                blocks, levels, scale, shift, ptr, source, weight, mask, states, sums,
                block, threads,
            )  # fmt: skip
        _finish_nodes(
            blocks, eps, levels, nodes, scale, shift, filters, ptr, source, weight, mask,
            x, states, sums, out, block, threads,
        )  # fmt: skip
