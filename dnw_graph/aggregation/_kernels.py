"""Operators of the sparse backend, which are opaque to ``torch.compile``, and their CPU kernels.

On GPUs, they use :mod:`dnw_graph.aggregation._triton`.

There is one tensor of states per block, so kernels find a node's row by its address. Feature maps
are split into tiles that stay in cache during the loop over edges. Every sum has a fixed order,
regardless of the number of threads.
"""

from typing import Any

import numba
import numpy as np
import torch
from numba import carray
from torch import Tensor

from dnw_graph import _jit
from dnw_graph._arena import empty
from dnw_graph._jit import load, pointer, store
from dnw_graph.aggregation._matmul import matrix

TYPES = (torch.float32, torch.float64, torch.bfloat16)
"""Types of states that kernels support."""

_TILE = 512  # columns of a tile: 2 kB per row in float32


@torch.library.custom_op("dnw_graph::gather", mutates_args=(), device_types="cpu")
def gather(
    weight: Tensor,
    sources: Tensor,
    rowptr: Tensor,
    block: list[int],
    starts: list[int],
    states: list[Tensor],
) -> Tensor:
    """Return ``I_v``, the sum of ``w_uv Z_u`` over edges into a block, ``[targets, *features]``.

    Args:
        weight: Weights of all edges of the graph ``[k]``.
        sources: Sources of the edges ``[k]``.
        rowptr: Index of the first edge into each node ``[V + 1]``.
        block: First node of the block, one past its last.
        starts: Index of the first node of each source block.
        states: States of the source blocks, each ``[nodes, *features]``.

    Raises:
        ValueError: If the features of states differ, or an edge comes from a node without a state.
    """
    ptr, at = _edges_of(rowptr, block)
    rows = [_matrix(z, weight) for z in states]
    out = empty(rows[0], (block[1] - block[0], *states[0].shape[1:]))
    _multiply(ptr, sources[at].numpy(), _values(weight[at]), (starts, rows), ([0], [out]))
    return out.to(states[0].dtype)


@torch.library.custom_op("dnw_graph::spread", mutates_args=(), device_types="cpu")
def spread(
    weight: Tensor,
    sources: Tensor,
    rowptr: Tensor,
    block: list[int],
    starts: list[int],
    sizes: list[int],
    grad: Tensor,
) -> list[Tensor]:
    """Return the sums of ``w_uv dL/dI_v``, one tensor ``[nodes, *features]`` per source block.

    Arguments as for :func:`gather`. ``sizes`` is the number of nodes of each source block, and
    ``grad`` is ``dL/dI`` ``[targets, *features]``.
    """
    ptr, at = _edges_of(rowptr, block)
    source, rows = sources[at].numpy(), _matrix(grad, weight)
    outs = [rows.new_empty(n, *grad.shape[1:]) for n in sizes]
    by_source = np.empty(starts[-1] + sizes[-1] + 1, dtype=np.int64)
    target, order = np.empty((2, len(source)), dtype=np.int64)
    if not _transpose(ptr, source, by_source, target, order):
        raise ValueError("an edge comes from a node that has no state")
    _multiply(by_source, target, _values(weight[at])[order], ([0], [rows]), (starts, outs))
    return [out.to(grad.dtype) for out in outs]


@torch.library.custom_op("dnw_graph::correlate", mutates_args=(), device_types="cpu")
def correlate(
    weight: Tensor,
    position: Tensor,
    sources: Tensor,
    rowptr: Tensor,
    block: list[int],
    starts: list[int],
    states: list[Tensor],
    grad: Tensor,
) -> Tensor:
    """Return ``<Z_u, dL/dI_v>`` of some edges into a block, and 0 for others, like ``weight``.

    Args:
        weight: Weights of edges into the block.
        position: Indices of the edges to compute among all weights of the graph, ascending.
        sources: Sources of these edges.
        rowptr: Index of the first of these edges into each node ``[V + 1]``.
        block: First node of the block, one past its last, index of its first weight.
        starts: Index of the first node of each source block.
        states: States of the source blocks, each ``[nodes, *features]``.
        grad: ``dL/dI`` ``[targets, *features]``.
    """
    ptr, at = _edges_of(rowptr, block)
    source, place = sources[at].numpy(), position[at] - block[2]
    rows, grads = [_matrix(z, weight) for z in states], _matrix(grad, weight)
    products = torch.empty(len(source), dtype=_wide(weight))
    target = np.repeat(np.arange(len(grads)), np.diff(ptr))
    inputs, outputs = _addresses(starts, rows, source), _addresses([0], [grads], target)
    _dots(source, target, inputs, outputs, grads.shape[1], _like(grads), products.numpy())
    return torch.zeros_like(weight).index_put_((place,), products.to(weight.dtype))


@torch.library.custom_op("dnw_graph::by_source", mutates_args=(), device_types="cpu")
def by_source(sources: Tensor, rowptr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the edges sorted by ``(source, target)``.

    Args:
        sources: Sources of the edges ``[k]``.
        rowptr: Index of the first edge into each node ``[V + 1]``.

    Returns:
        Index of the first edge out of each node ``[V + 1]``, targets ``[k]``, and the permutation
        that sorts the edges ``[k]``.
    """
    ptr, target, order = (torch.empty_like(x) for x in (rowptr, sources, sources))
    arrays = [x.numpy() for x in (rowptr, sources, ptr, target, order)]
    if not _transpose(*arrays):
        raise ValueError("an edge comes from a node that does not exist")
    return ptr, target, order


@torch.library.custom_op("dnw_graph::push", mutates_args=("out",), device_types="cpu")
def push(
    weight: Tensor,
    ptr: Tensor,
    target: Tensor,
    block: list[int],
    starts: list[int],
    grads: list[Tensor],
    out: Tensor,
) -> None:
    """Write ``dL/dZ_u``, the sum of ``w_uv dL/dI_v`` over all edges out of the nodes of a block.

    Args:
        weight: Weights of all edges of the graph, in the order of :func:`by_source`.
        ptr: Index of the first edge out of each node, from :func:`by_source`.
        target: Targets of the edges, from :func:`by_source`.
        block: First node of the block, one past its last.
        starts: Index of the first node of each block in ``grads``.
        grads: ``dL/dI``, each ``[nodes, *features]``.
        out: Result ``[nodes, *features]``, contiguous, of the same type.
    """
    rows = [_matrix(g, weight) for g in grads]
    fits = out.dtype == rows[0].dtype
    to = out if fits else torch.empty_like(out, dtype=rows[0].dtype)
    local, at = _edges_of(ptr, block)
    _multiply(local, target[at].numpy(), _values(weight[at]), (starts, rows), ([0], [to]))
    if not fits:
        out.copy_(to)


@torch.library.custom_op("dnw_graph::dots", mutates_args=("out",), device_types="cpu")
def dots(
    out: Tensor,
    ptr: Tensor,
    target: Tensor,
    position: Tensor,
    block: list[int],
    state: Tensor,
    starts: list[int],
    grads: list[Tensor],
) -> None:
    """Write ``<Z_u, dL/dI_v>`` of the edges out of the nodes of a block into ``out``.

    Other arguments as for :func:`push`. ``position`` holds the indices of the edges in ``out``, in
    the order of ``target``, and ``state`` is ``Z`` of the block ``[nodes, *features]``.
    """
    local, at = _edges_of(ptr, block)
    source, to = np.repeat(np.arange(len(state)), np.diff(local)), target[at].numpy()
    z, rows = _matrix(state, out), [_matrix(g, out) for g in grads]
    products = torch.empty(len(source), dtype=_wide(out))
    inputs, outputs = _addresses([0], [z], source), _addresses(starts, rows, to)
    _dots(source, to, inputs, outputs, z.shape[1], _like(z), products.numpy())
    out[position[at]] = products.to(out.dtype)


def _kernel_for_gpus(name: str) -> Any:
    def run(*args: Any) -> Any:
        from dnw_graph.aggregation import _triton

        with torch.cuda.device_of(args[0]):  # Triton uses the current GPU
            return getattr(_triton, name)(*args)

    return run


for _operator in (gather, spread, correlate, by_source, push, dots):
    _operator.register_kernel("cuda")(_kernel_for_gpus(_operator._name))


@by_source.register_fake
def _(sources: Tensor, rowptr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(rowptr), torch.empty_like(sources), torch.empty_like(sources)


def _edges_of(ptr: Tensor, block: list[int]) -> tuple[np.ndarray, slice]:
    """Return the row pointers of a block, beginning at 0, and the slice of its edges."""
    rows = ptr[block[0] : block[1] + 1].numpy()
    return rows - rows[0], slice(int(rows[0]), int(rows[-1]))


@gather.register_fake
def _(*args: Any) -> Tensor:
    *_, block, _, states = args
    empty: Tensor = states[0].new_empty(block[1] - block[0], *states[0].shape[1:])
    return empty


@spread.register_fake
def _(*args: Any) -> list[Tensor]:
    *_, sizes, grad = args
    return [grad.new_empty(n, *grad.shape[1:]) for n in sizes]


@correlate.register_fake
def _(weight: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(weight)


def _values(weight: Tensor) -> np.ndarray:
    return weight.detach().to(_wide(weight)).numpy()


def _matrix(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x`` as a contiguous ``[nodes, N]``, converted to the type of the sums.

    bfloat16 is not converted unless sums are in float64.
    """
    wide = _wide(weight)
    if x.dtype != torch.bfloat16 or wide == torch.float64:
        x = x.to(wide)
    return matrix(x.detach()).contiguous()


def _wide(weight: Tensor) -> torch.dtype:
    """Return the type in which sums are computed."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def wide(weight: Tensor) -> Tensor:
    """Return weights in the type in which sums are computed."""
    return weight.detach().to(_wide(weight))


def _addresses(
    starts: list[int], tensors: list[Tensor], nodes: np.ndarray | None = None
) -> np.ndarray:
    """Return the address of the row of each node, 0 for nodes without one.

    Kernels read and write there unchecked, so this raises ValueError if features differ or one of
    ``nodes`` has no row.
    """
    size = tensors[0][0].numel()
    if any(x[0].numel() != size for x in tensors):
        raise ValueError(f"states differ in their features: {[list(x.shape) for x in tensors]}")
    address = np.zeros(starts[-1] + len(tensors[-1]), dtype=np.int64)
    for start, x in zip(starts, tensors, strict=True):
        step = size * x.element_size()
        address[start : start + len(x)] = x.data_ptr() + step * np.arange(len(x))
    if nodes is None or not len(nodes) or not size:
        return address
    if nodes.min() < 0 or nodes.max() >= len(address) or not address[nodes].all():
        raise ValueError("an edge comes from a node that has no state")
    return address


def _like(rows: Tensor) -> Any:
    """Return a 0 of the element type of rows in a kernel."""
    return _jit.array(rows[:0]).dtype.type(0)


Rows = tuple[list[int], list[Tensor]]
"""Indices of first nodes, and the rows of the nodes from there on."""


def _multiply(
    ptr: np.ndarray, index: np.ndarray, value: np.ndarray, inputs: Rows, outputs: Rows
) -> None:
    """Run :func:`_spmm`, split into enough tasks for all threads."""
    columns = inputs[1][0][0].numel()
    like = _like(inputs[1][0])
    tiles = max(1, -(-columns // _TILE))
    parts = max(1, -(-4 * _jit.threads() // tiles))
    rows = max(1, -(-(len(ptr) - 1) // parts))
    sources, targets = _addresses(*inputs, index), _addresses(*outputs)
    _spmm(ptr, index, value, sources, targets, columns, like, _TILE, rows)


# The arrays below have no annotations: Numba derives their types.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, no-untyped-call"


@_jit.Kernel
def _spmm(ptr, index, value, inputs, outputs, columns, like, tile, rows):
    """Write the sum of ``value[e] * inputs[index[e]]`` over the edges of ``v`` to ``outputs[v]``.

    These are ``ptr[v] <= e < ptr[v + 1]``; ``inputs`` and ``outputs`` are addresses of rows.
    """
    tiles = (columns + tile - 1) // tile
    parts = (len(ptr) - 1 + rows - 1) // rows
    width = np.array([like]).itemsize
    for task in numba.prange(tiles * parts):
        first = (task % tiles) * tile
        n = min(tile, columns - first)
        offset = first * width
        top = (task // tiles) * rows
        total = np.empty(tile, dtype=value.dtype)
        for v in range(top, min(top + rows, len(ptr) - 1)):
            if outputs[v] == 0:
                continue
            for i in range(n):
                total[i] = 0
            e, last = ptr[v], ptr[v + 1]
            while e + 4 <= last:  # four messages at a time: the sum is loaded and stored once
                w0, w1, w2, w3 = value[e], value[e + 1], value[e + 2], value[e + 3]
                z0 = carray(pointer(inputs[index[e]] + offset, like), n)
                z1 = carray(pointer(inputs[index[e + 1]] + offset, like), n)
                z2 = carray(pointer(inputs[index[e + 2]] + offset, like), n)
                z3 = carray(pointer(inputs[index[e + 3]] + offset, like), n)
                for i in range(n):
                    total[i] += (
                        w0 * load(z0, i) + w1 * load(z1, i) + w2 * load(z2, i) + w3 * load(z3, i)
                    )
                e += 4
            while e < last:
                w0, z0 = value[e], carray(pointer(inputs[index[e]] + offset, like), n)
                for i in range(n):
                    total[i] += w0 * load(z0, i)
                e += 1
            out = carray(pointer(outputs[v] + offset, like), n)
            for i in range(n):
                store(out, i, total[i])


@_jit.Kernel
def _dots(source, target, inputs, grads, n, like, out):
    """Write ``out[e] = <inputs[source[e]], grads[target[e]]>``, of ``n`` numbers each."""
    for e in numba.prange(len(source)):
        z = carray(pointer(inputs[source[e]], like), n)
        g = carray(pointer(grads[target[e]], like), n)
        total = out.dtype.type(0)
        for i in range(n):
            total += load(z, i) * load(g, i)
        out[e] = total


@_jit.Kernel
def _transpose(rowptr, source, by_source, target, order):
    """Sort edges by ``(source, target)``; return False if a source is invalid."""
    by_source[:] = 0
    for e in range(len(source)):
        if source[e] < 0 or source[e] >= len(by_source) - 1:
            return False
        by_source[source[e] + 1] += 1
    for u in range(len(by_source) - 1):
        by_source[u + 1] += by_source[u]
    place = by_source[:-1].copy()
    for v in range(len(rowptr) - 1):
        for e in range(rowptr[v], rowptr[v + 1]):
            at = place[source[e]]
            target[at], order[at] = v, e
            place[source[e]] += 1
    return True
