"""CPU kernels of frozen graphs: sums that stay in registers, node functions behind them.

States are rows of floats, one a node, of ``B`` images one behind the other. Rows of pixels are
``pitch`` apart: one column more than the maps have where there are filters, which is the padding
at the right of one row and at the left of the next. What lies there in a state is of no meaning.

A row is cut into tiles of up to 7 vectors. The sum of a node over a tile stays in registers while
its edges are gone through, so an edge costs a load and a multiply-add a vector, from sources that
stay in cache as the tile does.
"""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from dnw_graph import _jit

LANES = 16  # floats a vector; LLVM makes two of it, or four, where registers are shorter
TILE = 7  # vectors

# Columns of the tables that describe blocks, levels and nodes to the kernels.
FIRST, PAST, KIND, RELU, FILTERS, STRIDE, INSTANCE, READS, LEVEL = range(9)
HEIGHT, WIDTH, PITCH, ROW_LENGTH, BASE = range(5)
CHANNEL, OUTPUT, ROW = range(3)
GIVEN, SUMS, SUMMED = range(3)  # kinds of blocks: of inputs; with sums to form; with sums formed

# The arrays below have no annotations: Numba derives their types.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, no-untyped-call"


def _summing(vectors: int) -> Any:
    """Return what sums messages over a tile of some vectors, as LLVM instructions."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        base, source, value, first, past, pitch, out = args
        i32, i64, f32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
        vector = ir.VectorType(f32, LANES)
        zero, undefined = ir.Constant(vector, [0.0] * LANES), ir.Constant(vector, ir.Undefined)
        everywhere = ir.Constant(ir.VectorType(i32, LANES), [0] * LANES)
        fused = ("contract",)
        sources = builder.inttoptr(source, i32.as_pointer())
        values = builder.inttoptr(value, f32.as_pointer())
        start = builder.block
        loop, done = (builder.append_basic_block(name) for name in ("edges", "done"))
        builder.cbranch(builder.icmp_signed("<", first, past), loop, done)

        builder.position_at_end(loop)
        edge = builder.phi(i64)
        edge.add_incoming(first, start)
        totals = [builder.phi(vector) for _ in range(vectors)]
        row = builder.sext(builder.load(builder.gep(sources, [edge])), i64)
        weight = builder.insert_element(
            undefined, builder.load(builder.gep(values, [edge])), i32(0)
        )
        weight = builder.shuffle_vector(weight, undefined, everywhere)
        state = builder.inttoptr(builder.add(base, builder.mul(row, pitch)), vector.as_pointer())
        sums = []
        for i, total in enumerate(totals):
            z = builder.load(builder.gep(state, [i64(i)]))
            z.align = 4
            sums.append(builder.fadd(total, builder.fmul(weight, z, flags=fused), flags=fused))
            total.add_incoming(zero, start)
            total.add_incoming(sums[-1], loop)
        following = builder.add(edge, i64(1))
        edge.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", following, past), loop, done)

        builder.position_at_end(done)
        results = [builder.phi(vector) for _ in range(vectors)]
        to = builder.inttoptr(out, vector.as_pointer())
        for i, result in enumerate(results):
            result.add_incoming(zero, start)
            result.add_incoming(sums[i], loop)
        for i, result in enumerate(results):
            builder.store(result, builder.gep(to, [i64(i)])).align = 4
        return context.get_dummy_value()

    @intrinsic
    def sums(typing_context, base, source, value, first, past, pitch, out):
        """out[i] = sum over e of value[e] * (base + pitch * source[e])[i], by addresses."""
        wide = types.int64
        return types.void(wide, wide, wide, wide, wide, wide, wide), generate

    return sums


_1, _2, _3, _4, _5, _6, _7 = (_summing(n) for n in range(1, 8))


@intrinsic
def _part(typing_context, source, even, odd):
    """even[i] = source[2 i], odd[i] = source[2 i + 1] for a vector of each, by addresses."""

    def generate(context, builder, signature, args):
        i32, vector = ir.IntType(32), ir.VectorType(ir.FloatType(), LANES)
        source, *outputs = (builder.inttoptr(a, vector.as_pointer()) for a in args)
        halves = [builder.load(builder.gep(source, [i32(i)])) for i in range(2)]
        for half in halves:
            half.align = 4
        for first, out in enumerate(outputs):
            places = ir.Constant(ir.VectorType(i32, LANES), list(range(first, 2 * LANES, 2)))
            taken = builder.shuffle_vector(halves[0], halves[1], places)
            builder.store(taken, out).align = 4
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


def _inline(function: Callable[..., Any]) -> Any:
    return numba.njit(fastmath={"contract", "reassoc"}, error_model="numpy")(function)


@_inline
def _sum(n, base, source, value, first, past, pitch, out):
    """Sum over ``n`` vectors, 1 to 7."""
    if n == 7:
        _7(base, source, value, first, past, pitch, out)
    elif n == 6:
        _6(base, source, value, first, past, pitch, out)
    elif n == 5:
        _5(base, source, value, first, past, pitch, out)
    elif n == 4:
        _4(base, source, value, first, past, pitch, out)
    elif n == 3:
        _3(base, source, value, first, past, pitch, out)
    elif n == 2:
        _2(base, source, value, first, past, pitch, out)
    else:
        _1(base, source, value, first, past, pitch, out)


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
def _affine(row, to, n, a, b, relu):
    """``to = a I + b``, or its maximum with 0."""
    zero = np.float32(0)
    if relu:
        for i in range(n):
            value = a * row[i] + b
            to[i] = zero if value < zero else value  # NaN stays
    else:
        for i in range(n):
            to[i] = a * row[i] + b


@_inline
def _filter(padded, k, out, n, pitch):
    """``out[i] = sum over a, b of k[a, b] padded[i + a pitch + b]``."""
    k0, k1, k2, k3, k4, k5, k6, k7, k8 = (
        k[0, 0], k[0, 1], k[0, 2], k[1, 0], k[1, 1], k[1, 2], k[2, 0], k[2, 1], k[2, 2],
    )  # fmt: skip
    p0, p1, p2 = padded, padded[1:], padded[2:]
    p3, p4, p5 = padded[pitch:], padded[pitch + 1 :], padded[pitch + 2 :]
    p6, p7, p8 = padded[2 * pitch :], padded[2 * pitch + 1 :], padded[2 * pitch + 2 :]
    for i in range(n):
        out[i] = (
            k0 * p0[i] + k1 * p1[i] + k2 * p2[i]
            + k3 * p3[i] + k4 * p4[i] + k5 * p5[i]
            + k6 * p6[i] + k7 * p7[i] + k8 * p8[i]
        )  # fmt: skip


@_inline
def _pad(row, pitch, H, W, a, b, relu, padded):
    """Write ``max(a I + b, 0)`` inside the padding, rows ``W + 1`` apart."""
    p = W + 1
    if pitch == p:
        _affine(row, padded[p + 1 :], (H - 1) * p + W, a, b, relu)
        for y in range(1, H):
            padded[(y + 1) * p] = 0
    else:
        for y in range(H):
            _affine(row[y * pitch :], padded[(y + 1) * p + 1 :], W, a, b, relu)


@_inline
def _part_by_parity(row, pitch, H, W, a, b, relu, line, parts):
    """Write what :func:`_pad` does to four arrays, by whether its row and column are odd.

    A row is parted a vector at a time, past its end too, which the next row or a zero overwrites.
    """
    q = (W + 1) // 2 + 1
    line[W:] = 0
    for y in range(H):
        part, at = (y + 1) % 2, (y + 1) // 2 * q
        _affine(row[y * pitch :], line, W, a, b, relu)
        odd, even = parts[2 * part + 1, at:], parts[2 * part, at + 1 :]
        for i in range(0, W, 2 * LANES):
            _part(line.ctypes.data + 4 * i, odd.ctypes.data + 2 * i, even.ctypes.data + 2 * i)
        parts[2 * part, at] = 0
    parts[:2, (H // 2 + 1) * q :] = 0
    parts[2:, ((H - 1) // 2 + 1) * q :] = 0


@_inline
def _filter_by_parity(parts, k, out, n, q):
    """Filter with a stride of 2."""
    k0, k1, k2, k3, k4, k5, k6, k7, k8 = (
        k[0, 0], k[0, 1], k[0, 2], k[1, 0], k[1, 1], k[1, 2], k[2, 0], k[2, 1], k[2, 2],
    )  # fmt: skip
    p0, p1, p2, p3, p4 = parts[0], parts[1], parts[0, 1:], parts[2], parts[3]
    p5, p6, p7, p8 = parts[2, 1:], parts[0, q:], parts[1, q:], parts[0, q + 1 :]
    for i in range(n):
        out[i] = (
            k0 * p0[i] + k1 * p1[i] + k2 * p2[i]
            + k3 * p3[i] + k4 * p4[i] + k5 * p5[i]
            + k6 * p6[i] + k7 * p7[i] + k8 * p8[i]
        )  # fmt: skip


@_inline
def _fire(row, pitch, H, W, a, b, relu, k, filters, stride, padded, parts, line, to, to_pitch):
    """Write ``Z`` of a map, whose rows are ``pitch`` apart, with rows ``to_pitch`` apart."""
    p = W + 1
    if not filters:
        if pitch == to_pitch:
            _affine(row, to, (H - 1) * pitch + W, a, b, relu)
        else:
            for y in range(H):
                _affine(row[y * pitch :], to[y * to_pitch :], W, a, b, relu)
    elif stride == 1 and to_pitch == p:
        _pad(row, pitch, H, W, a, b, relu, padded)
        _filter(padded, k, to, (H - 1) * p + W, p)
    elif stride == 2 and to_pitch == (W + 1) // 2 + 1:
        _part_by_parity(row, pitch, H, W, a, b, relu, line, parts)
        _filter_by_parity(parts, k, to, (H + 1) // 2 * to_pitch - 1, to_pitch)
    else:
        _pad(row, pitch, H, W, a, b, relu, padded)
        for y in range(0, H, stride):
            out = to[(y // stride) * to_pitch :]
            _filter(padded[y * p :], k, line, W, p)
            for x in range((W + stride - 1) // stride):
                out[x] = line[x * stride]


@_jit.Kernel
def run(
    blocks, eps, levels, nodes, scale, shift, filters, ptr, source, value, x, z, total, out,
    start, stop, threads,
):  # fmt: skip
    """Let blocks ``start`` to ``stop - 1`` fire.

    ``x [B, C, H W]`` is what the graph is given, ``z`` and ``total`` memory for states and sums,
    ``out [B, outputs, H' W']`` what it gives.
    """
    B = x.shape[0]
    states, totals = z.ctypes.data, total.ctypes.data
    for block in range(start, stop):
        first, past = blocks[block, FIRST], blocks[block, PAST]
        kind, relu = blocks[block, KIND], blocks[block, RELU]
        has_filters, stride = blocks[block, FILTERS], blocks[block, STRIDE]
        reads, gives = blocks[block, READS], blocks[block, LEVEL]
        h, w, pitch = levels[reads, HEIGHT], levels[reads, WIDTH], levels[reads, PITCH]
        width, image = levels[reads, ROW_LENGTH], h * pitch
        if kind == SUMS:
            vectors = (B * image + LANES - 1) // LANES
            tiles = (vectors + TILE - 1) // TILE
            chunks = min(past - first, max(1, (4 * threads + tiles - 1) // tiles))
            base = states + levels[reads, BASE] * 4
            for task in numba.prange(tiles * chunks):
                tile, chunk = task // chunks, task % chunks
                offset = tile * TILE * LANES * 4
                n = min(TILE, vectors - tile * TILE)
                lo = first + chunk * (past - first) // chunks
                hi = first + (chunk + 1) * (past - first) // chunks
                for v in range(lo, hi):
                    _sum(
                        n, base + offset, source.ctypes.data, value.ctypes.data, ptr[v],
                        ptr[v + 1], width * 4, totals + (v - first) * width * 4 + offset,
                    )  # fmt: skip
        pitch_out, width_out = levels[gives, PITCH], levels[gives, ROW_LENGTH]
        image_out = levels[gives, HEIGHT] * pitch_out
        pieces = min(max((past - first) * B, 1), 1 if threads == 1 else 4 * threads)
        for piece in numba.prange(pieces):
            padded = np.zeros((h + 2) * (w + 1) + 1, dtype=np.float32)
            parts = np.zeros((4, (h // 2 + 2) * ((w + 1) // 2 + 1) + 2 * LANES), dtype=np.float32)
            line = np.empty(w + 2 * LANES, dtype=np.float32)
            for task in range(
                piece * (past - first) * B // pieces, (piece + 1) * (past - first) * B // pieces
            ):
                v, b = first + task // B, task % B
                if kind == GIVEN:
                    row, row_pitch = x[b, nodes[v, CHANNEL]], w
                else:
                    row, row_pitch = total[(v - first) * width + b * image :], pitch
                a, shifted = scale[v], shift[v]
                if blocks[block, INSTANCE]:
                    a, shifted = _normalized(row, h, w, row_pitch, eps[block], a, shifted)
                k = filters[v]
                if nodes[v, OUTPUT] >= 0:
                    to = out[b, nodes[v, OUTPUT]]
                    _fire(
                        row, row_pitch, h, w, a, shifted, relu, k, has_filters, stride,
                        padded, parts, line, to, levels[gives, WIDTH],
                    )  # fmt: skip
                if nodes[v, ROW] >= 0:
                    to = z[levels[gives, BASE] + nodes[v, ROW] * width_out + b * image_out :]
                    _fire(
                        row, row_pitch, h, w, a, shifted, relu, k, has_filters, stride,
                        padded, parts, line, to, pitch_out,
                    )  # fmt: skip
