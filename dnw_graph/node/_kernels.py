"""CPU kernels of ``norm_relu_conv``, which read a node's maps once forward and twice backward.

Each thread processes one node at a time. Its maps are one row of memory, which stays in cache from
the statistics to the filter. Images are stored padded, one after the other with rows of ``W + 2``,
so that the 3x3 filter is one long loop over nine shifted copies; its outputs in the padding are
discarded, and so are those that a stride skips.

Maps of 16-bit integers hold bfloat16; sums are computed in the type of the scales.
"""

import numba
import numpy as np

from dnw_graph import _jit
from dnw_graph._jit import load, store

_AT_ONCE = 4096  # padded pixels that are filtered together; they fit in a core's cache

# The arrays below have no annotations: Numba derives their types.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, no-untyped-call"


@_jit.inline
def _statistics(maps, start, n, eps, mean, rstd, g):
    """Write mean and ``1 / sqrt(variance + eps)`` of ``n`` images, from ``start`` on, at ``g``."""
    B, H, W = maps.shape
    rows = maps.reshape(B, H * W)
    total = np.float64(0)
    for i in range(start, start + n):
        row, part = rows[i], mean.dtype.type(0)
        for j in range(H * W):
            part += load(row, j)
        total += part
    mean[g] = total / (n * H * W)
    centre, total = mean[g], np.float64(0)
    for i in range(start, start + n):
        row, part = rows[i], mean.dtype.type(0)
        for j in range(H * W):
            part += (load(row, j) - centre) * (load(row, j) - centre)
        total += part
    rstd[g] = 1 / np.sqrt(total / (n * H * W) + eps)


@_jit.inline
def _normalize(maps, start, n, a, b, padded):
    """Write ``max(a I + b, 0)`` of ``n`` images inside the padding of ``padded``."""
    _, H, W = maps.shape
    zero = padded.dtype.type(0)
    for i in range(n):
        for y in range(H):
            row, at = maps[start + i, y], i * (H + 2) * (W + 2) + (y + 1) * (W + 2) + 1
            to = padded[at : at + W]
            for j in range(W):
                value = a * load(row, j) + b
                to[j] = zero if value < zero else value  # keep NaN


@_jit.inline
def _centre(maps, start, n, mean, padded):
    """Write ``I - mean`` of ``n`` images inside the padding of ``padded``."""
    _, H, W = maps.shape
    for i in range(n):
        for y in range(H):
            row, at = maps[start + i, y], i * (H + 2) * (W + 2) + (y + 1) * (W + 2) + 1
            to = padded[at : at + W]
            for j in range(W):
                to[j] = load(row, j) - mean


@_jit.inline
def _put(maps, start, n, padded, pitch, plane, stride):
    """Write gradients inside the padding of ``padded``, ``stride`` apart, leaving zeros between."""
    _, H, W = maps.shape
    for i in range(n):
        for y in range(H):
            row, at = maps[start + i, y], i * plane + (y * stride + 1) * pitch + 1
            for j in range(W):
                padded[at + j * stride] = load(row, j)


@_jit.inline
def _take(out, maps, start, n, pitch, plane, stride):
    """Write the outputs outside the padding, ``stride`` apart, to ``maps``."""
    _, H, W = maps.shape
    for i in range(n):
        for y in range(H):
            row, at = maps[start + i, y], i * plane + y * stride * pitch
            for j in range(W):
                store(row, j, out[at + j * stride])


@_jit.inline
def _filter(padded, taps, out, length, pitch, flipped):
    """Write ``out[i] = sum over a, b of taps[a, b] padded[i + a pitch + b]``.

    If ``flipped``, the taps are flipped along both axes.
    """
    k = taps.copy().reshape(9)
    if flipped:
        k = k[::-1].copy()
    k0, k1, k2, k3, k4, k5, k6, k7, k8 = k[0], k[1], k[2], k[3], k[4], k[5], k[6], k[7], k[8]
    p0, p1, p2 = padded, padded[1:], padded[2:]
    p3, p4, p5 = padded[pitch:], padded[pitch + 1 :], padded[pitch + 2 :]
    p6, p7, p8 = padded[2 * pitch :], padded[2 * pitch + 1 :], padded[2 * pitch + 2 :]
    for i in range(length):
        out[i] = (
            k0 * p0[i] + k1 * p1[i] + k2 * p2[i]
            + k3 * p3[i] + k4 * p4[i] + k5 * p5[i]
            + k6 * p6[i] + k7 * p7[i] + k8 * p8[i]
        )  # fmt: skip


@_jit.inline
def _correlate(upstream, padded, taps, length, pitch):
    """Add ``sum over i of upstream[i] padded[i + a pitch + b]`` to ``taps[a, b]``."""
    for a in range(3):
        p0, p1, p2 = padded[a * pitch :], padded[a * pitch + 1 :], padded[a * pitch + 2 :]
        s0 = s1 = s2 = padded.dtype.type(0)
        for i in range(length):
            s0 += upstream[i] * p0[i]
            s1 += upstream[i] * p1[i]
            s2 += upstream[i] * p2[i]
        taps[a, 0] += s0
        taps[a, 1] += s1
        taps[a, 2] += s2


@_jit.inline
def _through_relu(rectified, centred, grad, length):
    """Zero gradients where ReLU returned 0; return the sums of ``g`` and ``g (I - mean)``."""
    zero = grad.dtype.type(0)
    total = dot = zero
    for i in range(length):
        g = zero if rectified[i] <= zero else grad[i]
        grad[i] = g
        total += g
        dot += g * centred[i]
    return total, dot


@_jit.inline
def _to_input(maps, start, n, relu_grad, a, slope, base, to):
    """Write ``to = a relu_grad + slope I + base`` for ``n`` images."""
    _, H, W = maps.shape
    slope, base = relu_grad.dtype.type(slope), relu_grad.dtype.type(base)
    for i in range(n):
        for y in range(H):
            at = i * (H + 2) * (W + 2) + y * (W + 2)
            row, out, g = maps[start + i, y], to[start + i, y], relu_grad[at : at + W]
            for j in range(W):
                store(out, j, a * g[j] + slope * load(row, j) + base)


@_jit.inline
def node_forward(x, z, scale, shift, filters, mean, rstd, stride, given, eps, padded, out):
    """Write the states ``z [B, Ho, Wo]`` of one node with inputs ``x [B, H, W]``.

    ``mean`` and ``rstd`` ``[G]`` are read if ``given``, else written; ``padded`` and ``out`` have
    room for :func:`images_at_once` padded images, and the padding of ``padded`` is 0.
    """
    B, H, W = x.shape
    G = len(mean)
    group_size = B // G
    plane = (H + 2) * (W + 2)
    at_once = images_at_once(B, G, H, W)
    for g in range(G):
        if not given:
            _statistics(x, g * group_size, group_size, eps, mean, rstd, g)
        a = scale * rstd[g]
        b = shift - mean[g] * a
        for start in range(g * group_size, (g + 1) * group_size, at_once):
            n = min(at_once, (g + 1) * group_size - start)
            _normalize(x, start, n, a, b, padded)
            _filter(padded, filters, out, n * plane - 2 * W - 6, W + 2, False)
            _take(out, z, start, n, W + 2, plane, stride)


@_jit.inline
def node_backward(
    grad, x, scale, shift, filters, mean, rstd, dx, dfilters, z, stride, given,
    padded, centred, upstream, relu_grad,
):  # fmt: skip
    """Write the gradients to inputs and filters of one node; return those to scale and shift.

    Unless ``z`` is empty, also write the states again, since their inputs are read anyway.
    ``padded``, ``centred`` and ``upstream`` are scratch memory as for :func:`node_forward`, filled
    with zeros; ``relu_grad`` has the size of the padded maps of the images that share statistics.
    """
    B, H, W = x.shape
    G = len(mean)
    group_size = B // G
    P, plane = W + 2, (H + 2) * (W + 2)
    at_once = images_at_once(B, G, H, W)
    dfilters[:] = 0
    dscale = dshift = np.float64(0)
    for g in range(G):
        a = scale * rstd[g]
        b = shift - mean[g] * a
        total, dot = np.float64(0), np.float64(0)
        for start in range(g * group_size, (g + 1) * group_size, at_once):
            n = min(at_once, (g + 1) * group_size - start)
            length = n * plane - 2 * P - 2
            out = relu_grad[(start - g * group_size) * plane :]
            _normalize(x, start, n, a, b, padded)
            if len(z):
                _filter(padded, filters, out, length, P, False)
                _take(out, z, start, n, P, plane, stride)
            _centre(x, start, n, mean[g], centred)
            _put(grad, start, n, upstream, P, plane, stride)
            _correlate(upstream[P + 1 :], padded, dfilters, length, P)
            _filter(upstream, filters, out, length, P, True)
            part, part_dot = _through_relu(padded[P + 1 :], centred[P + 1 :], out, length)
            total += part
            dot += part_dot
        dot *= rstd[g]
        dshift += total
        dscale += dot
        # With h the normalised input: dL/dI = a (g - mean(g) - h mean(g h)).
        slope, base = np.float64(0), np.float64(0)
        if not given:
            slope = -a * rstd[g] * dot / (group_size * H * W)
            base = -a * total / (group_size * H * W) - slope * mean[g]
        _to_input(x, g * group_size, group_size, relu_grad, a, slope, base, dx)
    return dscale, dshift


@_jit.inline
def images_at_once(B, G, H, W):
    """Return how many of the ``B`` images, in ``G`` groups, are filtered together."""
    return max(1, min(B // G, _AT_ONCE // ((H + 2) * (W + 2))))


@_jit.Kernel
def forward(x, scale, shift, filters, mean, rstd, z, stride, given, eps, chunks):
    """Write states ``z [V, B, Ho, Wo]`` of ``x [V, B, H, W]``; see :mod:`dnw_graph.node.fused`.

    ``mean`` and ``rstd`` ``[V, G]`` are read if ``given``, else written: over all ``B`` images if
    ``G`` is 1, over each image if ``G`` is ``B``.
    """
    V, B, H, W = x.shape
    size = images_at_once(B, mean.shape[1], H, W) * (H + 2) * (W + 2)
    for c in numba.prange(chunks):
        padded = np.zeros(size, dtype=scale.dtype)
        out = np.empty(size, dtype=scale.dtype)
        for v in range(c * V // chunks, (c + 1) * V // chunks):
            affine = scale[v], shift[v], filters[v]
            node_forward(x[v], z[v], *affine, mean[v], rstd[v], stride, given, eps, padded, out)


@_jit.Kernel
def backward(
    grad,
    x,
    scale,
    shift,
    filters,
    mean,
    rstd,
    dx,
    dscale,
    dshift,
    dfilters,
    z,
    stride,
    given,
    chunks,
):
    """Write the gradients to ``x [V, B, H, W]``, scales, shifts and filters ``[V, 3, 3]``.

    Unless ``z`` is empty, also write the states again.
    """
    V, B, H, W = x.shape
    G = mean.shape[1]
    plane = (H + 2) * (W + 2)
    size = images_at_once(B, G, H, W) * plane
    for c in numba.prange(chunks):
        padded = np.zeros(size, dtype=scale.dtype)
        centred = np.zeros(size, dtype=scale.dtype)
        upstream = np.zeros(size, dtype=scale.dtype)
        relu_grad = np.empty(B // G * plane, dtype=scale.dtype)
        for v in range(c * V // chunks, (c + 1) * V // chunks):
            affine = scale[v], shift[v], filters[v]
            states = z[v] if len(z) else z[:0].reshape(0, 0, 0)
            dscale[v], dshift[v] = node_backward(
                grad[v], x[v], *affine, mean[v], rstd[v], dx[v], dfilters[v], states,
                stride, given, padded, centred, upstream, relu_grad,
            )  # fmt: skip
