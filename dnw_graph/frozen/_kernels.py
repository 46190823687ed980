"""CPU kernels of frozen graphs: sums that stay in registers, node functions behind them.

States are rows of floats, one a node, of ``B`` images one behind the other. Where there are
filters, lines of pixels are one column further apart than the maps are wide, and images one line:
what lies between is the padding at the right of one line and at the left of the next, below one
image and above the next. In a state it is of no meaning; in what a filter reads it is 0.

A row is cut into tiles of up to 7 vectors. The sum of a node over a tile stays in registers while
its edges are gone through, so an edge costs a load and a multiply-add a vector, from sources that
stay in cache as the tile does. Scale, shift and maximum follow before it is written. Where maps are
small, or edges few, it is faster to do node after node: then what a filter reads is still near.
"""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from dnw_graph import _jit

LANES = 16  # floats a vector; LLVM makes two of it, or four, where registers are shorter
TILE = 7  # vectors
AT_ONCE = 8  # channels of a convolution
BYTES = 4 * LANES

# Columns of the tables that describe blocks, levels and nodes to the kernels.
FIRST, PAST, KIND, RELU, FILTERS, STRIDE, INSTANCE, READS, LEVEL, STEM = range(10)
HEIGHT, WIDTH, PITCH, IMAGE, VECTORS, ROW_LENGTH, BASE = range(7)
SUM_LENGTH, LEAD, NODES, MASK = range(7, 11)
CHANNEL, OUTPUT, ROW = range(3)
# Kinds of blocks: of inputs; of inputs that a convolution computes; with sums to form, tile after
# tile for all nodes or node after node; with sums that are formed.
GIVEN, STEMMED, BY_TILE, BY_NODE, SUMMED = range(5)

# The arrays below have no annotations: Numba derives their types.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

_I32, _F32 = ir.IntType(32), ir.FloatType()
_VECTOR, _INTEGERS = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)
_ANY = ir.Constant(_VECTOR, ir.Undefined)


def _at(builder: Any, address: Any, kind: Any = _VECTOR, offset: int = 0) -> Any:
    """Return a pointer to what lies some bytes behind an address."""
    return builder.inttoptr(builder.add(address, ir.IntType(64)(offset)), kind.as_pointer())


def _load(builder: Any, address: Any, kind: Any = _VECTOR, offset: int = 0) -> Any:
    """Return what lies there; vectors need not be aligned."""
    value = builder.load(_at(builder, address, kind, offset))
    value.align = 4
    return value


def _store(builder: Any, value: Any, address: Any, offset: int = 0) -> None:
    builder.store(value, _at(builder, address, value.type, offset)).align = 4


def _everywhere(builder: Any, value: Any) -> Any:
    """Return a vector of one number."""
    first = builder.insert_element(_ANY, value, _I32(0))
    return builder.shuffle_vector(first, _ANY, ir.Constant(_INTEGERS, [0] * LANES))


def _add(builder: Any, total: Any, a: Any, b: Any) -> Any:
    """Return ``total + a b``, rounded once."""
    return builder.fadd(total, builder.fmul(a, b, flags=("contract",)), flags=("contract",))


def _summing(vectors: int) -> Any:
    """Return what sums messages over a tile of some vectors, as LLVM instructions."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        states, source, value, first, past, length, mask, a, b, least, out = args
        four, length = ir.IntType(64)(4), builder.mul(length, ir.IntType(64)(4))
        totals = [cgutils.alloca_once(builder, _VECTOR) for _ in range(vectors)]
        for total in totals:
            builder.store(ir.Constant(_VECTOR, [0.0] * LANES), total)
        with cgutils.for_range_slice(builder, first, past, ir.IntType(64)(1)) as (edge, _):
            place = builder.mul(edge, four)
            row = builder.sext(_load(builder, builder.add(source, place), _I32), ir.IntType(64))
            weight = _everywhere(builder, _load(builder, builder.add(value, place), _F32))
            state = builder.add(states, builder.mul(row, length))
            for i, total in enumerate(totals):
                z = _load(builder, state, offset=BYTES * i)
                builder.store(_add(builder, builder.load(total), weight, z), total)
        a, b, least = (_everywhere(builder, each) for each in (a, b, least))
        for i, total in enumerate(totals):
            result = _add(builder, b, a, builder.load(total))
            below = builder.fcmp_ordered("<", result, least)  # false for NaN, which stays
            bits = builder.bitcast(builder.select(below, least, result), _INTEGERS)
            inside = builder.and_(bits, _load(builder, mask, _INTEGERS, BYTES * i))
            _store(builder, builder.bitcast(inside, _VECTOR), out, BYTES * i)
        return context.get_dummy_value()

    @intrinsic
    def sums(typing_context, states, source, value, first, past, length, mask, a, b, least, out):
        """``out = max(a sum over e of value[e] states[source[e]] + b, least)``, 0 off the mask."""
        wide, real = types.int64, types.float32
        return types.void(*[wide] * 7, real, real, real, wide), generate

    return sums


_1, _2, _3, _4, _5, _6, _7 = (_summing(n) for n in range(1, 8))


def _taken(builder: Any, first: Any, second: Any, start: int, step: int) -> Any:
    """Return some of the numbers of two vectors one behind the other."""
    places = list(range(start, start + step * LANES, step))
    return builder.shuffle_vector(first, second, ir.Constant(_INTEGERS, places))


def _neighbours(builder: Any, start: Any, stride: int) -> list[Any]:
    """Return what lies at ``stride i``, ``stride i + 1`` and ``stride i + 2``, a vector of each."""
    first, second, *more = (_load(builder, start, offset=BYTES * i) for i in range(stride + 1))
    if stride == 1:
        return [first, _taken(builder, first, second, 1, 1), _taken(builder, first, second, 2, 1)]
    shifted = _taken(builder, first, second, 2, 1), _taken(builder, second, more[0], 2, 1)
    here = [_taken(builder, first, second, start, 2) for start in range(2)]
    return [*here, _taken(builder, *shifted, 0, 2)]


def _filtering(stride: int) -> Any:
    """Return what applies a 3x3 filter, as LLVM instructions."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        padded, filters, out, vectors, pitch = args
        i64 = ir.IntType(64)
        k = [_everywhere(builder, _load(builder, filters, _F32, 4 * i)) for i in range(9)]
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


_each, _every_other = _filtering(1), _filtering(2)


def _convolving(stride: int) -> Any:
    """Return what computes a line of some channels of a 3x3 convolution, as LLVM instructions."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        planes, channels, plane, pitch, taps, bias, least, out, length, vectors = args
        i64 = ir.IntType(64)
        least = _everywhere(builder, least)
        totals = [cgutils.alloca_once(builder, _VECTOR) for _ in range(AT_ONCE)]
        with cgutils.for_range(builder, vectors) as along:
            for g, total in enumerate(totals):
                builder.store(_everywhere(builder, _load(builder, bias, _F32, 4 * g)), total)
            start = builder.add(planes, builder.mul(along.index, i64(BYTES * stride)))
            with cgutils.for_range(builder, channels) as channel:
                line = builder.add(start, builder.mul(channel.index, builder.mul(plane, i64(4))))
                k = builder.add(taps, builder.mul(channel.index, i64(4 * 9 * AT_ONCE)))
                for y in range(3):
                    for i, x in enumerate(_neighbours(builder, line, stride)):
                        for g, total in enumerate(totals):
                            place = 4 * (AT_ONCE * (3 * y + i) + g)
                            weight = _everywhere(builder, _load(builder, k, _F32, place))
                            builder.store(_add(builder, builder.load(total), weight, x), total)
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

        ``length`` lies between channels of ``out``, ``plane`` between those of ``planes``.
        """
        wide = types.int64
        return types.void(*[wide] * 6, types.float32, *[wide] * 3), generate

    return convolved


_line, _half_line = _convolving(1), _convolving(2)


def _inline(function: Callable[..., Any]) -> Any:
    return numba.njit(fastmath={"contract", "reassoc"}, error_model="numpy")(function)


@_inline
def _sum(n, states, source, value, first, past, length, mask, a, b, least, out):
    """Sum over ``n`` vectors, 1 to 7."""
    if n == 7:
        _7(states, source, value, first, past, length, mask, a, b, least, out)
    elif n == 6:
        _6(states, source, value, first, past, length, mask, a, b, least, out)
    elif n == 5:
        _5(states, source, value, first, past, length, mask, a, b, least, out)
    elif n == 4:
        _4(states, source, value, first, past, length, mask, a, b, least, out)
    elif n == 3:
        _3(states, source, value, first, past, length, mask, a, b, least, out)
    elif n == 2:
        _2(states, source, value, first, past, length, mask, a, b, least, out)
    else:
        _1(states, source, value, first, past, length, mask, a, b, least, out)


@_inline
def _tile(
    tile, tiles, vectors, states, source, value, first, past, length, mask, a, b, least, raw, out,
):  # fmt: skip
    """Sum over one of some tiles; ``raw``, nothing follows."""
    low = tile * vectors // tiles
    if raw:
        a, b, least = np.float32(1), np.float32(0), np.float32(-np.inf)
    _sum(
        (tile + 1) * vectors // tiles - low, states + BYTES * low, source.ctypes.data,
        value.ctypes.data, first, past, length, mask + BYTES * low, a, b, least, out + BYTES * low,
    )  # fmt: skip


@_inline
def _normalized(row, H, W, pitch, eps, scale, shift):
    """Return ``a, b`` of ``a I + b`` for instance norm of a map."""
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
def _zero(row, first, number):
    for i in range(first, first + number):
        row[i] = 0


@_inline
def _clear(total, rows, length, lead, end):
    """Write the padding before and behind what rows hold."""
    for row in range(rows):
        _zero(total, row * length, lead)
        _zero(total, row * length + end, length - end)


@_inline
def _framed(row, H, W, to):
    """Write a map within a frame of zeros."""
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
    planes, channels, plane, width, stride, taps, bias, least, total, at, length, pitch, H, W
):  # fmt: skip
    """Write maps of some channels of a convolution, 0 behind each line and each map."""
    for y in range(H):
        line, to = planes + 4 * y * stride * width, total.ctypes.data + 4 * (at + y * pitch)
        vectors = (W + LANES - 1) // LANES
        if stride == 1:
            _line(line, channels, plane, width, taps, bias, least, to, length, vectors)
        else:
            _half_line(line, channels, plane, width, taps, bias, least, to, length, vectors)
        for g in range(AT_ONCE):
            _zero(total, at + g * length + y * pitch + W, pitch - W)
    for g in range(AT_ONCE):
        _zero(total, at + g * length + H * pitch, max(LANES, pitch))


@_inline
def _filter(padded, pitch, H, W, k, stride, line, to, to_pitch):
    """Filter a map, given the address of its padding's corner, to an address."""
    if stride == 1:
        _each(padded, k, to, ((H - 1) * pitch + W + LANES - 1) // LANES, pitch)
    elif stride == 2:
        vectors = ((W + 1) // 2 + LANES - 1) // LANES
        for y in range((H + 1) // 2):
            _every_other(padded + 8 * y * pitch, k, to + 4 * y * to_pitch, vectors, pitch)
    else:
        out = numba.carray(_jit.pointer(to, np.float32(0)), (H * to_pitch,))
        for y in range((H + stride - 1) // stride):
            start = padded + 4 * y * stride * pitch
            _each(start, k, line.ctypes.data, (W + LANES - 1) // LANES, pitch)
            for x in range((W + stride - 1) // stride):
                out[y * to_pitch + x] = line[x * stride]


@_jit.Kernel
def run(
    blocks, eps, levels, nodes, scale, shift, filters, ptr, source, value, mask,
    stem, stem_taps, stem_bias, planes, x, z, total, out, start, stop, threads,
):  # fmt: skip
    """Let blocks ``start`` to ``stop - 1`` fire.

    ``x [B, C, H W]`` is what the graph is given, or what the convolution before it is given;
    ``planes``, ``z`` and ``total`` are memory for that with a frame, for states and for what
    filters read, ``out [B, outputs, H' W']`` what the graph gives.
    """
    B = x.shape[0]
    states, sums, taps = z.ctypes.data, total.ctypes.data, filters.ctypes.data
    for block in range(start, stop):
        first, past = blocks[block, FIRST], blocks[block, PAST]
        kind, instance = blocks[block, KIND], blocks[block, INSTANCE] != 0
        has_filters, stride = blocks[block, FILTERS], blocks[block, STRIDE]
        least = np.float32(0) if blocks[block, RELU] else np.float32(-np.inf)
        reads, gives = blocks[block, READS], blocks[block, LEVEL]
        h, w, pitch = levels[reads, HEIGHT], levels[reads, WIDTH], levels[reads, PITCH]
        image, length = levels[reads, IMAGE], levels[reads, ROW_LENGTH]
        sum_length, lead = levels[reads, SUM_LENGTH], levels[reads, LEAD]
        if block == start or blocks[block - 1, READS] != reads:
            end = lead + B * image - (pitch - w) * pitch
            _clear(total, levels[reads, NODES], sum_length, lead, end)
        vectors = levels[reads, VECTORS]
        tiles = (vectors + TILE - 1) // TILE
        from_states = states + 4 * levels[reads, BASE]
        inside = mask.ctypes.data + 4 * levels[reads, MASK]
        if kind == STEMMED:
            channels, height, width, step = stem[0], stem[1], stem[2], stem[3]
            plane = (height + 2) * (width + 2)
            for task in numba.prange(B * channels):
                b, c = task // channels, task % channels
                _framed(x[b, c], height, width, planes[np.int64(task) * plane :])
            taps_of, bias_of = stem_taps[blocks[block, STEM] :], stem_bias[blocks[block, STEM] :]
            for task in numba.prange((past - first + AT_ONCE - 1) // AT_ONCE):
                for b in range(B):
                    _convolve(
                        planes.ctypes.data + 4 * b * channels * plane, channels, plane, width + 2,
                        step, taps_of[task].ctypes.data, bias_of[task].ctypes.data, least,
                        total, lead + np.int64(task) * AT_ONCE * sum_length + b * image,
                        sum_length, pitch, h, w,
                    )  # fmt: skip
        elif kind == BY_TILE:
            chunks = min(past - first, max(1, (4 * threads + tiles - 1) // tiles))
            for task in numba.prange(tiles * chunks):
                tile, chunk = task // chunks, task % chunks
                lo = first + chunk * (past - first) // chunks
                hi = first + (chunk + 1) * (past - first) // chunks
                for v in range(lo, hi):
                    _tile(
                        tile, tiles, vectors, from_states, source, value, ptr[v], ptr[v + 1],
                        length, inside, scale[v], shift[v], least, instance,
                        sums + 4 * (lead + (v - first) * sum_length),
                    )  # fmt: skip
        H, W, to_pitch = levels[gives, HEIGHT], levels[gives, WIDTH], levels[gives, PITCH]
        to_image, to_length = levels[gives, IMAGE], levels[gives, ROW_LENGTH]
        pieces = min(max(past - first, 1), 1 if threads == 1 else 4 * threads)
        for piece in numba.prange(pieces):
            line = np.empty(w + 3 * LANES, dtype=np.float32)
            spare = np.empty(to_image + 3 * LANES, dtype=np.float32)
            for v in range(
                first + piece * (past - first) // pieces,
                first + (piece + 1) * (past - first) // pieces,
            ):
                held_in = np.int64(piece) if kind == BY_NODE else v - first
                row_of_sums = lead + held_in * sum_length
                if kind == BY_NODE:
                    for tile in range(tiles):
                        _tile(
                            tile, tiles, vectors, from_states, source, value, ptr[v], ptr[v + 1],
                            length, inside, scale[v], shift[v], least, instance,
                            sums + 4 * row_of_sums,
                        )  # fmt: skip
                for b in range(B):
                    at = row_of_sums + b * image
                    if instance or kind in (GIVEN, SUMMED):
                        if kind == GIVEN:
                            row, row_pitch = x[b, nodes[v, CHANNEL]], w
                        else:
                            row, row_pitch = total[at:], pitch
                        scaled, shifted = scale[v], shift[v]
                        if instance:
                            scaled, shifted = _normalized(
                                row, h, w, row_pitch, eps[block], scaled, shifted
                            )
                        _affine(
                            row, row_pitch, total[at:], pitch, image, h, w, scaled, shifted, least
                        )
                    held, place = total, at
                    if has_filters:
                        if nodes[v, ROW] >= 0:
                            held = z
                            place = levels[gives, BASE] + nodes[v, ROW] * to_length + b * to_image
                        else:
                            held, place = spare, 0
                        _filter(
                            sums + 4 * (at - pitch - 1), pitch, h, w, taps + 36 * v, stride, line,
                            held.ctypes.data + 4 * place, to_pitch,
                        )  # fmt: skip
                    elif nodes[v, ROW] >= 0:
                        to = levels[gives, BASE] + nodes[v, ROW] * to_length + b * to_image
                        for i in range((h - 1) * pitch + w):
                            z[to + i] = total[at + i]
                    if nodes[v, OUTPUT] >= 0:
                        result = out[b, nodes[v, OUTPUT]]
                        for y in range(H):
                            for i in range(W):
                                result[y * W + i] = held[place + y * to_pitch + i]
