"""CPU kernels that compute a whole static graph.

If node functions are elementwise, columns of the states ``[V, N]`` are independent of each other,
so every thread computes some of them for the whole graph, without synchronisation between nodes. If
node functions act on maps, the nodes of each level are divided among threads.
"""

import math

import numba
import numpy as np

from dnw_graph import _jit
from dnw_graph._jit import load, store
from dnw_graph.node._kernels import images_at_once, node_backward, node_forward

IDENTITY, RELU, GELU, TANH = range(4)
_TILE = 512  # columns of a tile: 2 kB per row in float32

# The arrays below have no annotations: Numba derives their types.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, no-untyped-call"


@_jit.inline
def _add_message(total, weight, row, first, n):
    for i in range(n):
        total[i] += weight * load(row, first + i)


@_jit.inline
def _gather(start, stop, index, weight, rows, to, total):
    """Write the sum of ``weight[e]`` times row ``index[e]`` for ``start <= e < stop``."""
    N, tile = len(to), len(total)
    for first in range(0, N, max(tile, 1)):
        n = min(tile, N - first)
        total[:] = 0
        e = start
        while e + 2 <= stop:
            w0, w1 = weight[e], weight[e + 1]
            z0, z1 = rows[index[e], first : first + n], rows[index[e + 1], first : first + n]
            for i in range(n):
                total[i] += w0 * load(z0, i) + w1 * load(z1, i)
            e += 2
        if e < stop:
            _add_message(total, weight[e], rows[index[e]], first, n)
        for i in range(n):
            store(to, first + i, total[i])


@_jit.inline
def _activate(total, kind, n):
    """Write ``φ(u)`` over ``u``."""
    zero, half = total.dtype.type(0), total.dtype.type(0.5)
    if kind == RELU:
        for i in range(n):
            total[i] = zero if total[i] < zero else total[i]  # keep NaN
    elif kind == GELU:
        for i in range(n):
            total[i] *= half + half * total.dtype.type(math.erf(total[i] * math.sqrt(0.5)))
    elif kind == TANH:
        for i in range(n):
            total[i] = math.tanh(total[i])


@_jit.inline
def _through(grad, state, preactivation, kind, n):
    """Write ``g φ'(u)`` over the gradient ``g``, given ``φ(u)`` and ``u``."""
    zero, one = grad.dtype.type(0), grad.dtype.type(1)
    if kind == RELU:
        for i in range(n):
            grad[i] = zero if state[i] <= zero else grad[i]
    elif kind == GELU:
        for i in range(n):
            u = preactivation[i]
            below = 0.5 + 0.5 * math.erf(u * math.sqrt(0.5))
            density = math.exp(-0.5 * u * u) / math.sqrt(2 * math.pi)
            grad[i] *= grad.dtype.type(below + u * density)
    elif kind == TANH:
        for i in range(n):
            grad[i] *= one - state[i] * state[i]


@_jit.Kernel
def gather(start, stop, ptr, index, weight, rows, out):
    """Write sums of ``rows [V, N]`` over the edges of each node from ``start`` to ``stop - 1``."""
    N = rows.shape[1]
    tiles = (N + _TILE - 1) // _TILE
    for task in numba.prange((stop - start) * tiles):
        v, first = start + task // tiles, task % tiles * _TILE
        last = min(first + _TILE, N)
        total = np.empty(last - first, dtype=weight.dtype)
        to = out[v - start, first:last]
        _gather(ptr[v], ptr[v + 1], index, weight, rows[:, first:last], to, total)


@_jit.Kernel
def forward(ptr, source, weight, x, scale, shift, kind, inputs, z, tile):
    """Write the states of all nodes ``z [V, N]``, and ``I`` unless ``inputs`` is empty.

    ``x [inputs, N]`` is ``I`` of the first nodes; the other nodes sum messages over the edges in
    ``ptr`` and ``source``. ``scale`` and ``shift [V]`` may be empty.
    """
    V, N = z.shape
    for t in numba.prange((N + tile - 1) // tile):
        first = t * tile
        n = min(tile, N - first)
        total = np.empty(tile, dtype=weight.dtype)
        for v in range(V):
            total[:n] = 0
            if v < len(x):
                _add_message(total, total.dtype.type(1), x[v], first, n)
            for e in range(ptr[v], ptr[v + 1]):
                _add_message(total, weight[e], z[source[e]], first, n)
            if len(inputs):
                for i in range(n):
                    store(inputs[v], first + i, total[i])
            a = scale[v] if len(scale) else total.dtype.type(1)
            b = shift[v] if len(shift) else total.dtype.type(0)
            if len(scale) or len(shift):
                for i in range(n):
                    total[i] = a * total[i] + b
            _activate(total, kind[v], n)
            for i in range(n):
                store(z[v], first + i, total[i])


@_jit.Kernel
def backward(
    grad, output, ptr, source, weight, scale, shift, kind, inputs, z, to_inputs, to_affine, tile
):
    """Write ``dL/dI [V, N]`` of all nodes, and each tile's part of ``dL/da`` and ``dL/db``.

    ``grad [outputs, N]`` holds the gradients to the states of the nodes ``output``. ``to_affine``
    is ``[tiles, 2, V]``, or ``[tiles, 2, 0]`` if nodes have neither ``a`` nor ``b``.
    """
    V, N = z.shape
    for t in numba.prange((N + tile - 1) // tile):
        first = t * tile
        n = min(tile, N - first)
        gradient = np.zeros((V, n), dtype=weight.dtype)
        state = np.empty(n, dtype=weight.dtype)
        preactivation = np.empty(n, dtype=weight.dtype)
        for j in range(len(output)):
            _add_message(gradient[output[j]], state.dtype.type(1), grad[j], first, n)
        for back in range(V):
            v = V - 1 - back
            g = gradient[v]
            a = scale[v] if len(scale) else state.dtype.type(1)
            b = shift[v] if len(shift) else state.dtype.type(0)
            for i in range(n):
                state[i] = load(z[v], first + i)
            if len(inputs):
                for i in range(n):
                    preactivation[i] = a * load(inputs[v], first + i) + b
            _through(g, state, preactivation, kind[v], n)
            if to_affine.shape[2]:
                total, dot = state.dtype.type(0), state.dtype.type(0)
                for i in range(n):
                    total += g[i]
                    dot += g[i] * load(inputs[v], first + i)
                to_affine[t, 0, v] = dot
                to_affine[t, 1, v] = total
            for i in range(n):
                g[i] *= a
                store(to_inputs[v], first + i, g[i])
            for e in range(ptr[v], ptr[v + 1]):
                to = gradient[source[e]]
                w = weight[e]
                for i in range(n):
                    to[i] += w * g[i]


@_jit.Kernel
def forward_maps(
    first, place, ptr, source, weight, scale, shift, filters, mean, rstd, inputs, z, given, eps,
    threads,
):  # fmt: skip
    """Write ``I`` and ``z [V, B, H, W]`` of the nodes of all levels, given those of the inputs.

    Level ``l`` consists of nodes ``first[l]`` to ``first[l + 1] - 1``. Nodes with a negative
    ``place [V]`` return their inputs; the others compute ``norm_relu_conv`` with row ``place`` of
    the other arguments, which are those of :func:`dnw_graph.node._kernels.forward`.
    """
    V, B, H, W = z.shape
    N = B * H * W
    rows, into = z.reshape(V, N), inputs.reshape(V, N)
    size = images_at_once(B, mean.shape[1], H, W) * (H + 2) * (W + 2)
    padded = np.zeros((threads, size), dtype=weight.dtype)
    out = np.empty((threads, size), dtype=weight.dtype)
    total = np.empty((threads, min(N, _TILE)), dtype=weight.dtype)
    for level in range(len(first) - 1):
        start, nodes = first[level], first[level + 1] - first[level]
        chunks = min(threads, nodes)
        for c in numba.prange(chunks):
            for v in range(start + c * nodes // chunks, start + (c + 1) * nodes // chunks):
                p = place[v]
                to = rows[v] if p < 0 else into[v]
                _gather(ptr[v], ptr[v + 1], source, weight, rows, to, total[c])
                if p >= 0:
                    affine = scale[p], shift[p], filters[p]
                    node_forward(
                        inputs[v], z[v], *affine, mean[p], rstd[p], 1, given, eps, padded[c], out[c]
                    )


@_jit.Kernel
def backward_maps(
    grad, first, place, ptr, target, weight, scale, shift, filters, mean, rstd, inputs,
    to_inputs, to_states, dscale, dshift, dfilters, given, threads,
):  # fmt: skip
    """Write ``dL/dI [V, B, H, W]`` and the gradients to the nodes' parameters, last level first.

    For nodes with a negative ``place``, row ``-place[v] - 1`` of ``grad [outputs, B, H, W]`` is
    read. ``dL/dZ`` of the inputs, which are level 0, is written to ``to_states``. ``ptr`` and
    ``target`` hold the edges out of each node.
    """
    V, B, H, W = inputs.shape
    N = B * H * W
    plane = (H + 2) * (W + 2)
    size = images_at_once(B, mean.shape[1], H, W) * plane
    rows, upstream = to_inputs.reshape(V, N), grad.reshape(len(grad), N)
    of_inputs = to_states.reshape(len(to_states), N)
    scratch = np.zeros((3, threads, size), dtype=weight.dtype)
    relu_grad = np.empty((threads, B // mean.shape[1] * plane), dtype=weight.dtype)
    total = np.empty((threads, min(N, _TILE)), dtype=weight.dtype)
    state_grads = np.empty((threads, N), dtype=inputs.dtype)
    for back in range(len(first) - 1):
        level = len(first) - 2 - back
        start, nodes = first[level], first[level + 1] - first[level]
        chunks = min(threads, nodes)
        for c in numba.prange(chunks):
            state_grad = state_grads[c]
            for v in range(start + c * nodes // chunks, start + (c + 1) * nodes // chunks):
                _gather(ptr[v], ptr[v + 1], target, weight, rows, state_grad, total[c])
                p = place[v]
                if p < 0:
                    for i in range(N):
                        store(state_grad, i, load(state_grad, i) + load(upstream[-p - 1], i))
                    rows[v, :] = state_grad
                elif level == 0:
                    of_inputs[v, :] = state_grad
                else:
                    affine = scale[p], shift[p], filters[p]
                    dscale[p], dshift[p] = node_backward(
                        state_grad.reshape(B, H, W), inputs[v], *affine, mean[p], rstd[p],
                        to_inputs[v], dfilters[p], inputs[:0, 0], 1, given, scratch[0, c],
                        scratch[1, c], scratch[2, c], relu_grad[c],
                    )  # fmt: skip
