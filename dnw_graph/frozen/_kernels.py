"""CPU kernels of frozen graphs. docs/kernels.md explains their design.

:func:`run` computes the states of consecutive blocks (a part of a graph is one block here). It and
the functions it calls take the addresses of these arrays, in one array of integers with the columns
``BLOCKS`` to ``PACKED``. ``V`` counts the nodes that depend on the input, in the order in
which they fire, and floats are float32:

===================== ======= ======================================================================
``BLOCKS [n, 11]``    int64   One row per block, with the columns ``FIRST`` to ``NUMBER``.
``EPS [n]``           float64 ``eps`` of instance norm; 0 for other blocks.
``LEVELS [l, 11]``    int64   One row per size of maps, with the columns ``HEIGHT`` to ``MASK``.
``NODES [V, 3]``      int64   ``CHANNEL`` that the node reads from an image, ``OUTPUT`` channel and
                              ``ROW`` in the states; -1 for none.
``SCALES [V]``        float   ``a`` of ``max(a I + b, 0)``, where ``I`` is the input of a node.
``SHIFTS [V]``        float   ``b`` of the same.
``KERNELS``           float   3x3 filters ``[V, 3, 3]``.
``PTR [V + 1]``       int64   Edges ``ptr[v]`` to ``ptr[v + 1] - 1`` lead into node ``v``.
``SOURCES [E]``       int32   Row of the state that an edge reads, within its level.
``WEIGHTS [E]``       float   Weight of an edge.
``MASKS``             int32   For each level one row: -1 at pixels, 0 at padding.
``TAPS``              float   Weights ``[groups, 9 C, 8]`` of the convolution, 8 channels per group.
``BIASES``            float   Its bias ``[groups, 8]``.
``PLANES``            float   Memory for images in a frame of zeros, ``[B, C, (H + 2) (W + 2)]``.
``STATES``            float   Memory for what nodes send: one matrix per level, one row per node;
                              if they are packed, two numbers in bfloat16 per element.
``SUMS``              float   Memory for the inputs of nodes, which their filters read.
``IMAGES [B, C, HW]`` float   Input of the graph, or of the convolution before the graph.
``OUTPUTS``           float   Output ``[B, outputs, H' W']``.
``BATCH``, ``CHANNELS``       ``B`` and ``C`` of the images, themselves, not their addresses; so are
                              ``IMAGE_HEIGHT``, ``IMAGE_WIDTH``, ``STEM_STRIDE`` (stride of the
                              convolution), ``NUM_OUTPUTS``, ``NUM_BLOCKS`` and ``PACKED`` (0 or
                              1).
===================== ======= ======================================================================

A row of a table is passed as its address. Addresses count bytes, and offsets into arrays, such as
``BASE``, count floats. Small networks take 5 to 10 % longer if Numba's arrays are passed instead.
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
BYTES = 4 * LANES
COLUMN = _jit.vector_floats()  # floats of a column of a map
TILE = 7  # vectors of a state
TILE_PACKED = 7 if COLUMN == LANES else 3  # the same if they are packed, whose sums are twice that
AT_ONCE = 8  # channels of a convolution
SMALLEST = 0x10000000  # bits of 2.5e-29, for packed zeros: products with subnormal numbers are slow

# Columns of the tables that describe a call, blocks, levels and nodes to the kernels.
BLOCKS, EPS, LEVELS, NODES, SCALES, SHIFTS, KERNELS, PTR, SOURCES, WEIGHTS, MASKS = range(11)
TAPS, BIASES, PLANES, STATES, SUMS, IMAGES, OUTPUTS = range(11, 18)
BATCH, CHANNELS, IMAGE_HEIGHT, IMAGE_WIDTH, STEM_STRIDE, NUM_OUTPUTS, NUM_BLOCKS = range(18, 25)
PACKED = 25
FIRST, PAST, KIND, RELU, FILTERS, STRIDE, INSTANCE, READS, LEVEL, STEM, NUMBER = range(11)
HEIGHT, WIDTH, PITCH, IMAGE, VECTORS, ROW_LENGTH, BASE = range(7)
SUM_LENGTH, LEAD, ROWS, MASK = range(7, 11)
CHANNEL, OUTPUT, ROW = range(3)
BLOCK_COLUMNS, LEVEL_COLUMNS, NODE_COLUMNS = 11, 11, 3
# Kinds of blocks: inputs; inputs that the convolution computes; nodes whose edges are summed tile
# after tile or node after node; nodes whose sums a dense product has formed already.
INPUT, CONVOLUTION, BY_TILE, BY_NODE, DENSE = range(5)

# The arrays below have no annotations: Numba derives their types.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

_I32, _F32 = ir.IntType(32), ir.FloatType()
_VECTOR, _INTEGERS = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)


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


def _broadcast(builder: Any, value: Any, lanes: int = LANES) -> Any:
    """Return a vector whose elements all equal a number."""
    undefined = ir.Constant(ir.VectorType(_F32, lanes), ir.Undefined)
    places = ir.Constant(ir.VectorType(_I32, lanes), [0] * lanes)
    first = builder.insert_element(undefined, value, _I32(0))
    return builder.shuffle_vector(first, undefined, places)


def _add(builder: Any, total: Any, a: Any, b: Any) -> Any:
    """Return ``total + a b``, rounded once."""
    return builder.fadd(total, builder.fmul(a, b, flags=("contract",)), flags=("contract",))


def _make_sum(vectors: int, packed: bool) -> Any:
    """Return an intrinsic that sums messages into one node, over a tile of ``vectors`` vectors.

    A packed vector contributes to the sums of two vectors, which follow one another.
    """
    sixteen = ir.Constant(_INTEGERS, [16] * LANES)

    def loaded(builder: Any, address: Any) -> list[Any]:
        """Return one vector, or the two of a packed one."""
        if not packed:
            return [_load(builder, address)]
        bits = _load(builder, address, _INTEGERS)
        # The lower halves are less than a rounding error of the numbers in the upper halves.
        return [builder.bitcast(x, _VECTOR) for x in (bits, builder.shl(bits, sixteen))]

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        states, source, weight, first, past, length, mask, a, b, least, out = args
        i64 = ir.IntType(64)
        four, length = i64(4), builder.mul(length, i64(4))
        totals = [
            cgutils.alloca_once(builder, _VECTOR) for _ in range(2 * vectors if packed else vectors)
        ]
        for total in totals:
            builder.store(ir.Constant(_VECTOR, [0.0] * LANES), total)
        with cgutils.for_range_slice(builder, first, past, i64(1)) as (edge, _):
            offset = builder.mul(edge, four)
            row = builder.sext(_load(builder, builder.add(source, offset), _I32), i64)
            factor = _broadcast(builder, _load(builder, builder.add(weight, offset), _F32))
            state = builder.add(states, builder.mul(row, length))
            remaining = iter(totals)
            for i in range(vectors):
                for z in loaded(builder, builder.add(state, i64(BYTES * i))):
                    total = next(remaining)
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


@intrinsic
def _pack(typing_context, row, packed, vectors):
    """Round a row to bfloat16, and write two vectors each as one.

    The second vector of two takes the lower halves of the elements. The upper halves are chosen
    such that an element, read as a float, is as close to the first vector's as possible.
    """

    def constant(number: int) -> Any:
        return ir.Constant(_INTEGERS, [number] * LANES)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        row, packed, vectors = args
        i64, sixteen = ir.IntType(64), constant(16)
        with cgutils.for_range(builder, builder.udiv(vectors, i64(2))) as loop:
            at = builder.add(row, builder.mul(loop.index, i64(2 * BYTES)))
            first, second = (_load(builder, at, _INTEGERS, BYTES * i) for i in range(2))
            second = builder.lshr(builder.add(second, constant(0x8000)), sixteen)
            large = builder.and_(first, constant(0x70000000))
            small = builder.icmp_unsigned("==", large, constant(0))
            first = builder.select(small, builder.or_(first, constant(SMALLEST)), first)
            first = builder.add(first, builder.sub(constant(0x8000), second))
            both = builder.or_(builder.and_(first, constant(-(2**16))), second)
            _store(builder, both, builder.add(packed, builder.mul(loop.index, i64(BYTES))))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), generate


def _pick(builder: Any, first: Any, second: Any, start: int, step: int) -> Any:
    """Return elements ``start``, ``start + step``, ... of two vectors one behind the other."""
    lanes = first.type.count
    places = [_I32(place) for place in range(start, start + step * lanes, step)]
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(_I32, lanes), places))


def _neighbours(builder: Any, start: Any, stride: int, lanes: int = LANES) -> list[Any]:
    """Return the vectors of elements ``stride i``, ``stride i + 1`` and ``stride i + 2``."""
    kind = ir.VectorType(_F32, lanes)
    if stride == 1:
        return [_load(builder, start, kind, 4 * x) for x in range(3)]
    first, second, third, fourth = (
        _load(builder, start, kind, 4 * at) for at in (0, lanes, 2, lanes + 2)
    )
    return [
        _pick(builder, first, second, 0, 2),
        _pick(builder, first, second, 1, 2),
        _pick(builder, third, fourth, 0, 2),
    ]


def _make_filter() -> Any:
    """Return an intrinsic that applies a 3x3 filter to vectors that follow one another."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        padded, filters, out, vectors, pitch = args
        i64 = ir.IntType(64)
        k = [_broadcast(builder, _load(builder, filters, _F32, 4 * i)) for i in range(9)]
        with cgutils.for_range(builder, vectors) as loop:
            line = builder.add(padded, builder.mul(loop.index, i64(BYTES)))
            total = ir.Constant(_VECTOR, [0.0] * LANES)
            for y in range(3):
                for i, x in enumerate(_neighbours(builder, line, 1)):
                    total = _add(builder, total, k[3 * y + i], x)
                line = builder.add(line, builder.mul(pitch, i64(4)))
            _store(builder, total, builder.add(out, builder.mul(loop.index, i64(BYTES))))
        return context.get_dummy_value()

    @intrinsic
    def filtered(typing_context, padded, filters, out, vectors, pitch):
        """``out[i] = sum over y, x of filters[y, x] padded[i + y pitch + x]``."""
        return types.void(*[types.int64] * 5), generate

    return filtered


_filter_vectors = _make_filter()


def _make_column_filter(stride: int) -> Any:
    """Return an intrinsic that applies a 3x3 filter line by line, to a column as wide as a vector.

    A line is loaded once for all lines of the result that it contributes to.
    """
    kind = ir.VectorType(_F32, COLUMN)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        padded, filters, out, columns, lines, pitch, out_pitch = args
        i64, four = ir.IntType(64), ir.IntType(64)(4)
        k = [_broadcast(builder, _load(builder, filters, _F32, 4 * i), COLUMN) for i in range(9)]
        line, to = (cgutils.alloca_once(builder, i64) for _ in range(2))
        # Sums of the next line of the result, and of the one after it.
        sums = [cgutils.alloca_once(builder, kind) for _ in range(2)]
        zero = ir.Constant(kind, [0.0] * COLUMN)

        def add_line(y: int, total: Any, pixels: list[Any]) -> Any:
            for x in range(3):
                total = _add(builder, total, k[3 * y + x], pixels[x])
            return total

        def next_line() -> list[Any]:
            at = builder.load(line)
            builder.store(builder.add(at, builder.mul(pitch, four)), line)
            return _neighbours(builder, at, stride, COLUMN)

        # From the right: a column's vectors overlap the first pixels of the next line.
        with cgutils.for_range(builder, columns) as loop:
            column = builder.sub(builder.sub(columns, loop.index), i64(1))
            builder.store(builder.add(padded, builder.mul(column, i64(4 * COLUMN * stride))), line)
            builder.store(builder.add(out, builder.mul(column, i64(4 * COLUMN))), to)
            total = add_line(0, zero, next_line())
            if stride == 1:
                second = next_line()
                builder.store(add_line(0, zero, second), sums[1])
                total = add_line(1, total, second)
            builder.store(total, sums[0])
            with cgutils.for_range(builder, lines):
                total = builder.load(sums[0])
                if stride == 2:
                    total = add_line(1, total, next_line())
                last, at = next_line(), builder.load(to)
                _store(builder, add_line(2, total, last), at)
                builder.store(builder.add(at, builder.mul(out_pitch, four)), to)
                if stride == 1:
                    builder.store(add_line(1, builder.load(sums[1]), last), sums[0])
                    builder.store(add_line(0, zero, last), sums[1])
                else:
                    builder.store(add_line(0, zero, last), sums[0])
        return context.get_dummy_value()

    @intrinsic
    def filtered(typing_context, padded, filters, out, columns, lines, pitch, out_pitch):
        """``out[i] = sum over y, x of filters[y, x] padded[stride i + y pitch + x]`` in a line."""
        return types.void(*[types.int64] * 7), generate

    return filtered


_filter_columns_1, _filter_columns_2 = _make_column_filter(1), _make_column_filter(2)


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


def _make_reader(kind: Any, number: Any, size: int) -> Any:
    """Return an intrinsic that reads an element of an array at an address."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address, index = args
        return _load(builder, builder.add(address, builder.mul(index, index.type(size))), number)

    @intrinsic
    def read(typing_context, address, index):
        """Return element ``index`` of an array at an address."""
        return kind(types.int64, types.int64), generate

    return read


_integer = _make_reader(types.int64, ir.IntType(64), 8)
_real = _make_reader(types.float32, _F32, 4)
_double = _make_reader(types.float64, ir.DoubleType(), 8)


@intrinsic
def _set_zero(typing_context, address):
    """Write one zero."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _store(builder, ir.Constant(_F32, 0.0), args[0])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def _copy(typing_context, to, source, number):
    """Copy ``number`` floats."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        to, source = (builder.inttoptr(at, ir.IntType(8).as_pointer()) for at in args[:2])
        cgutils.raw_memcpy(builder, to, source, args[2], 4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), generate


@intrinsic
def _zero(typing_context, to, number):
    """Write ``number`` zeros."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        size = builder.mul(args[1], args[1].type(4))
        cgutils.memset(builder, builder.inttoptr(args[0], ir.IntType(8).as_pointer()), size, 0)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


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
def _floats(address, number):
    """Return the floats at an address as an array."""
    return numba.carray(_jit.pointer(address, np.float32(0)), (number,))


@_inline
def _level(call, index):
    """Return the address of a row of ``levels``."""
    return _integer(call, LEVELS) + 8 * LEVEL_COLUMNS * index


@_inline
def _least(block):
    """Return the least value that nodes pass on: 0 after ReLU."""
    return np.float32(0) if _integer(block, RELU) else np.float32(-np.inf)


def _make_sum_of(packed: bool) -> Any:
    """Return a function that calls the intrinsic for a number of vectors, 1 to 7."""
    s1, s2, s3, s4, s5, s6, s7 = (_make_sum(vectors, packed) for vectors in range(1, 8))

    @_inline
    def of(n, states, source, weight, first, past, length, mask, a, b, least, out):
        if n == 7:
            s7(states, source, weight, first, past, length, mask, a, b, least, out)
        elif n == 6:
            s6(states, source, weight, first, past, length, mask, a, b, least, out)
        elif n == 5:
            s5(states, source, weight, first, past, length, mask, a, b, least, out)
        elif n == 4:
            s4(states, source, weight, first, past, length, mask, a, b, least, out)
        elif n == 3:
            s3(states, source, weight, first, past, length, mask, a, b, least, out)
        elif n == 2:
            s2(states, source, weight, first, past, length, mask, a, b, least, out)
        else:
            s1(states, source, weight, first, past, length, mask, a, b, least, out)

    return of


_sum, _sum_packed = _make_sum_of(packed=False), _make_sum_of(packed=True)


@_inline
def _sum_tile(call, block, level, v, tile, out):
    """Sum messages into node ``v`` over a tile; ``out`` is the node's row in ``sums``.

    For parts with instance norm, it is the sum itself, for the norm to follow.
    """
    packed, ptr = _integer(call, PACKED), _integer(call, PTR)
    vectors, tiles = _integer(level, VECTORS) >> packed, _tiles(call, level)
    low = tile * vectors // tiles
    number = (tile + 1) * vectors // tiles - low
    first, past, length = _integer(ptr, v), _integer(ptr, v + 1), _integer(level, ROW_LENGTH)
    states = _integer(call, STATES) + 4 * _integer(level, BASE) + BYTES * low
    to = BYTES * (low << packed)
    mask, out = _integer(call, MASKS) + 4 * _integer(level, MASK) + to, out + to
    source, weight = _integer(call, SOURCES), _integer(call, WEIGHTS)
    a, b, least = np.float32(1), np.float32(0), np.float32(-np.inf)
    if _integer(block, INSTANCE) == 0:
        a, b = _real(_integer(call, SCALES), v), _real(_integer(call, SHIFTS), v)
        least = _least(block)
    if packed:
        _sum_packed(
            number, states, source, weight, first, past, length, mask, a, b, least, out
        )  # fmt: skip
    else:
        _sum(number, states, source, weight, first, past, length, mask, a, b, least, out)


@_inline
def _tiles(call, level):
    """Return the number of tiles of a row."""
    if _integer(call, PACKED):
        return (_integer(level, VECTORS) // 2 + TILE_PACKED - 1) // TILE_PACKED
    return (_integer(level, VECTORS) + TILE - 1) // TILE


@_inline
def _instance_norm(row, H, W, pitch, eps, scale, shift):
    """Return ``a, b`` such that ``a I + b`` is the instance norm of a map ``I``."""
    values = _floats(row, H * pitch)
    total = np.float64(0)
    for y in range(H):
        part = np.float32(0)
        for x in range(W):
            part += values[y * pitch + x]
        total += part
    mean = np.float32(total / (H * W))
    total = np.float64(0)
    for y in range(H):
        part = np.float32(0)
        for x in range(W):
            part += (values[y * pitch + x] - mean) * (values[y * pitch + x] - mean)
        total += part
    a = np.float32(scale / np.sqrt(total / (H * W) + eps))
    return a, shift - mean * a


@_inline
def _affine(row, row_pitch, to, pitch, image, H, W, a, b, least):
    """``to = max(a I + b, least)`` for a map, 0 behind each line and behind the map."""
    values, result = _floats(row, H * row_pitch), _floats(to, image)
    for y in range(H):
        for x in range(W):
            value = a * values[y * row_pitch + x] + b
            result[y * pitch + x] = least if value < least else value  # NaN stays
        result[y * pitch + W : (y + 1) * pitch] = 0
    result[H * pitch : image] = 0


@_inline
def _clear_padding(level, B, sums):
    """Write zeros before the first map and behind the last one in each row of ``sums``."""
    length, lead = _integer(level, SUM_LENGTH), _integer(level, LEAD)
    pitch = _integer(level, PITCH)
    end = lead + B * _integer(level, IMAGE) - (pitch - _integer(level, WIDTH)) * pitch
    for row in range(_integer(level, ROWS)):
        _zero(sums + 4 * row * length, lead)
        _zero(sums + 4 * (row * length + end), length - end)


@_inline
def _frame(row, H, W, to):
    """Copy a map into a frame of zeros, one pixel wide."""
    _zero(to, W + 3)
    for y in range(H):
        line = to + 4 * ((y + 1) * (W + 2) + 1)
        _copy(line, row + 4 * y * W, W)
        _zero(line + 4 * W, 2)
    _zero(to + 4 * ((H + 1) * (W + 2) + 1), W + 1)


@_inline
def _convolve(
    planes, channels, plane, width, stride, taps, bias, least, sums, length, pitch, H, W
):  # fmt: skip
    """Write maps of 8 channels of a convolution, 0 behind each line and each map."""
    vectors = (W + LANES - 1) // LANES
    for y in range(H):
        line, to = planes + 4 * y * stride * width, sums + 4 * y * pitch
        if stride == 1:
            _convolve_stride_1(
                line, channels, plane, width, taps, bias, least, to, length, vectors
            )  # fmt: skip
        else:
            _convolve_stride_2(
                line, channels, plane, width, taps, bias, least, to, length, vectors
            )  # fmt: skip
        if pitch > W:
            for g in range(AT_ONCE):
                _set_zero(to + 4 * (g * length + W))
    for g in range(AT_ONCE):
        _zero(sums + 4 * (g * length + H * pitch), max(LANES, pitch))


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
    width, height = (W + stride - 1) // stride, (H + stride - 1) // stride
    columns = (width + COLUMN - 1) // COLUMN
    if stride == 2:
        _filter_columns_2(padded, k, to, columns, height, pitch, to_pitch)
    elif stride == 1 and 3 * columns * COLUMN < 4 * pitch:  # few elements of vectors are wasted
        _filter_columns_1(padded, k, to, columns, height, pitch, to_pitch)
    elif stride == 1:
        _filter_vectors(padded, k, to, ((H - 1) * pitch + W + LANES - 1) // LANES, pitch)
    else:
        values, result = _floats(line, W + 3 * LANES), _floats(to, H * to_pitch)
        for y in range(height):
            start = padded + 4 * y * stride * pitch
            _filter_vectors(start, k, line, (W + LANES - 1) // LANES, pitch)
            for x in range(width):
                result[y * to_pitch + x] = values[x * stride]


@_inline
def _write_output(row, level, out):
    """Copy a map to an output channel, which has no padding."""
    width = _integer(level, WIDTH)
    for y in range(_integer(level, HEIGHT)):
        _copy(out + 4 * y * width, row + 4 * y * _integer(level, PITCH), width)


@_inline
def _finish(call, block, node, v, image, inputs, state, line, spare):
    """Compute the state of a node for one image from its input.

    Args:
        call: The arguments of :func:`run`.
        block: Row of ``blocks``.
        node: Row of ``nodes``.
        v: Number of the node.
        image: Number of the image.
        inputs: Map in ``sums``.
        state: Map in ``states``.
        line: Memory for a line, for strides above 2.
        spare: Memory for a state that is not sent.
    """
    kind, instance = _integer(block, KIND), _integer(block, INSTANCE) != 0
    level, to_level = _level(call, _integer(block, READS)), _level(call, _integer(block, LEVEL))
    H, W, pitch = _integer(level, HEIGHT), _integer(level, WIDTH), _integer(level, PITCH)
    if kind in (INPUT, DENSE) or instance:
        values, values_pitch = inputs, pitch
        if kind == INPUT:
            channel = image * _integer(call, CHANNELS) + _integer(node, CHANNEL)
            values, values_pitch = _integer(call, IMAGES) + 4 * channel * H * W, W
        a, b = _real(_integer(call, SCALES), v), _real(_integer(call, SHIFTS), v)
        if instance:
            eps = _double(_integer(call, EPS), _integer(block, NUMBER))
            a, b = _instance_norm(values, H, W, values_pitch, eps, a, b)
        size = _integer(level, IMAGE)
        _affine(values, values_pitch, inputs, pitch, size, H, W, a, b, _least(block))
    result, sent, output = inputs, _integer(node, ROW) >= 0, _integer(node, OUTPUT)
    if _integer(block, FILTERS):
        result = state if sent else spare
        _filter(
            inputs - 4 * (pitch + 1), pitch, H, W, _integer(call, KERNELS) + 36 * v,
            _integer(block, STRIDE), line, result, _integer(to_level, PITCH),
        )  # fmt: skip
    elif sent:
        _copy(state, inputs, (H - 1) * pitch + W)
    if output >= 0:
        channel = image * _integer(call, NUM_OUTPUTS) + output
        size = _integer(to_level, HEIGHT) * _integer(to_level, WIDTH)
        _write_output(result, to_level, _integer(call, OUTPUTS) + 4 * channel * size)


@_inline
def _convolve_group(call, block, group, inputs):
    """Convolve images into the maps of ``AT_ONCE`` nodes, whose rows in ``sums`` are ``inputs``."""
    level, channels = _level(call, _integer(block, READS)), _integer(call, CHANNELS)
    group += _integer(block, STEM)
    width = _integer(call, IMAGE_WIDTH) + 2
    plane = (_integer(call, IMAGE_HEIGHT) + 2) * width
    taps = _integer(call, TAPS) + 4 * 9 * channels * AT_ONCE * group
    for image in range(_integer(call, BATCH)):
        _convolve(
            _integer(call, PLANES) + 4 * image * channels * plane, channels, plane, width,
            _integer(call, STEM_STRIDE), taps, _integer(call, BIASES) + 4 * AT_ONCE * group,
            _least(block), inputs + 4 * image * _integer(level, IMAGE),
            _integer(level, SUM_LENGTH), _integer(level, PITCH),
            _integer(level, HEIGHT), _integer(level, WIDTH),
        )  # fmt: skip


@_expand
def _frame_images(call):
    """Write the channels of the images to ``planes``; threads share them out."""
    height, width = _integer(call, IMAGE_HEIGHT), _integer(call, IMAGE_WIDTH)
    plane = (height + 2) * (width + 2)
    for task in numba.prange(_integer(call, BATCH) * _integer(call, CHANNELS)):
        channel = np.int64(task)
        image = _integer(call, IMAGES) + 4 * channel * height * width
        _frame(image, height, width, _integer(call, PLANES) + 4 * channel * plane)


@_expand
def _sum_by_tile(call, block, threads):
    """Sum messages into all nodes of a block of kind ``BY_TILE``, tile after tile.

    Threads share out tiles, and parts of the nodes where there are few tiles.
    """
    first, past = _integer(block, FIRST), _integer(block, PAST)
    level = _level(call, _integer(block, READS))
    sums = _integer(call, SUMS) + 4 * _integer(level, LEAD)
    length, tiles = _integer(level, SUM_LENGTH), _tiles(call, level)
    chunks = min(past - first, max(1, (4 * threads + tiles - 1) // tiles))
    for task in numba.prange(tiles * chunks):
        tile, chunk = np.int64(task) // chunks, np.int64(task) % chunks
        for v in range(
            first + chunk * (past - first) // chunks,
            first + (chunk + 1) * (past - first) // chunks,
        ):
            _sum_tile(call, block, level, v, tile, sums + 4 * (v - first) * length)


@_expand
def _finish_nodes(call, block, threads):
    """Compute the states of a block from images (``INPUT``, ``CONVOLUTION``), edges (``BY_NODE``)
    or ``sums``.

    Threads share out the nodes. Unless the sums have been formed already, a thread needs only the
    rows of ``sums`` for the nodes that it computes together, 1 or ``AT_ONCE``.
    """
    first, past, kind = _integer(block, FIRST), _integer(block, PAST), _integer(block, KIND)
    level, to_level = _level(call, _integer(block, READS)), _level(call, _integer(block, LEVEL))
    length = _integer(level, SUM_LENGTH)
    step = AT_ONCE if kind == CONVOLUTION else 1
    groups = (past - first + step - 1) // step
    pieces = min(groups, most_pieces(threads))
    for task in numba.prange(pieces):
        piece = np.int64(task)
        line = np.empty(_integer(level, WIDTH) + 3 * LANES, dtype=np.float32)
        # Zeros, since states are packed with their padding: sums of subnormal numbers are slow.
        spare = np.zeros((_integer(to_level, VECTORS) + 3) * LANES, dtype=np.float32)
        # Numba would make numbers of both signs and those without into floats.
        line_at, spare_at = np.int64(line.ctypes.data), np.int64(spare.ctypes.data)
        for group in range(piece * groups // pieces, (piece + 1) * groups // pieces):
            low = first + group * step
            row = low - first if kind in (BY_TILE, DENSE) else piece * step
            inputs = _integer(call, SUMS) + 4 * (_integer(level, LEAD) + row * length)
            if kind == CONVOLUTION:
                _convolve_group(call, block, group, inputs)
            for v in range(low, min(low + step, past)):
                if kind == BY_NODE:
                    for tile in range(_tiles(call, level)):
                        _sum_tile(call, block, level, v, tile, inputs)
                node = _integer(call, NODES) + 8 * NODE_COLUMNS * v
                row = _integer(node, ROW) * _integer(to_level, ROW_LENGTH)
                state = _integer(call, STATES) + 4 * (_integer(to_level, BASE) + row)
                to = spare_at if _integer(call, PACKED) else state
                for image in range(_integer(call, BATCH)):
                    _finish(
                        call, block, node, v, image,
                        inputs + 4 * image * _integer(level, IMAGE),
                        to + 4 * image * _integer(to_level, IMAGE),
                        line_at, spare_at,
                    )  # fmt: skip
                if _integer(call, PACKED) and _integer(node, ROW) >= 0:
                    _pack(spare_at, state, _integer(to_level, VECTORS))
                inputs += 4 * length


@_inline
def most_pieces(threads):
    """Return the largest number of parts into which threads divide the nodes of a block."""
    return 1 if threads == 1 else 4 * threads


def _run(call, start, stop, threads):
    """Compute blocks ``start`` to ``stop - 1`` on ``threads`` threads."""
    for number in range(start, stop):
        block = _integer(call, BLOCKS) + 8 * BLOCK_COLUMNS * number
        reads, kind = _integer(block, READS), _integer(block, KIND)
        if number == start or _integer(block - 8 * BLOCK_COLUMNS, READS) != reads:
            _clear_padding(_level(call, reads), _integer(call, BATCH), _integer(call, SUMS))
        if kind == CONVOLUTION:
            _frame_images(call)
        elif kind == BY_TILE:
            _sum_by_tile(call, block, threads)
        _finish_nodes(call, block, threads)


_run_by_all, _run_by_one = _expand(_run), _inline(_run)


@_jit.Kernel
def run(arguments, start, stop, threads):
    """Compute blocks ``start`` to ``stop - 1`` on ``threads`` threads.

    The module's docstring explains the arguments. A block of kind ``DENSE`` must be the first, with
    its sums in ``sums``.
    """
    _run_by_all(np.int64(arguments.ctypes.data), start, stop, threads)


@_jit.Kernel
def run_apart(arguments, images, outputs):
    """Compute all blocks for several batches, each batch on one thread.

    Args:
        arguments: Arguments of each thread, with memory of its own ``[threads, columns]``.
        images: Addresses of the images of each batch.
        outputs: Addresses of the outputs of each batch.
    """
    for thread in numba.prange(len(arguments)):
        call = arguments[thread]
        for batch in range(thread, len(images), len(arguments)):
            call[IMAGES], call[OUTPUTS] = images[batch], outputs[batch]
            _run_by_one(np.int64(call.ctypes.data), 0, call[NUM_BLOCKS], 1)
