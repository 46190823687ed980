"""CPU kernels of the sparse backend, as operators that a compiler need not see through.

States lie in one tensor a block, so kernels find a node's row by its address. Feature maps are cut
into tiles that stay in cache while edges are gone through; every sum has a fixed order, whatever
the number of threads.
"""

import numba
import numpy as np
import torch
from numba import carray
from torch import Tensor

from dnw_graph import _jit
from dnw_graph._jit import pointer

_TILE = 512  # columns of a tile: 2 kB a row in float32


@torch.library.custom_op("dnw_graph::gather", mutates_args=(), device_types="cpu")
def gather(
    weight: Tensor,
    edge_id: Tensor,
    edge_index: Tensor,
    rowptr: Tensor,
    nodes: list[int],
    first_edge: int,
    starts: list[int],
    states: list[Tensor],
) -> Tensor:
    """Return ``I_v``, the sum of ``w_uv Z_u`` over real edges, ``[targets, *features]``.

    Args:
        weight: Candidate weights of the block ``[E of the block]``.
        edge_id: :attr:`Wiring.edge_id`.
        edge_index: :attr:`Wiring.edge_index`.
        rowptr: :attr:`Wiring.rowptr`.
        nodes: First node of the block, and one past the last.
        first_edge: Id of the first candidate of the block.
        starts: Number of the first node of each state.
        states: States of the source blocks, each ``[nodes, *features]``.
    """
    source, _, value, ptr = _real(weight, edge_id, edge_index, rowptr, nodes, first_edge)
    rows = [_matrix(z, weight.dtype) for z in states]
    out = weight.new_empty(nodes[1] - nodes[0], rows[0].shape[1])
    _multiply(ptr, source, value, _addresses(starts, rows), _addresses([0], [out]), out)
    return out.view(len(out), *states[0].shape[1:]).to(states[0].dtype)


@torch.library.custom_op("dnw_graph::spread", mutates_args=(), device_types="cpu")
def spread(
    weight: Tensor,
    edge_id: Tensor,
    edge_index: Tensor,
    rowptr: Tensor,
    nodes: list[int],
    first_edge: int,
    starts: list[int],
    sizes: list[int],
    grad: Tensor,
) -> list[Tensor]:
    """Return the sums of ``w_uv dL/dI_v``, one tensor ``[nodes, *features]`` a source block.

    Args as for :func:`gather`, and ``sizes``, the number of nodes of each source block, and
    ``grad``, ``dL/dI`` ``[targets, *features]``.
    """
    source, _, value, ptr = _real(weight, edge_id, edge_index, rowptr, nodes, first_edge)
    rows = _matrix(grad, weight.dtype)
    outs = [weight.new_empty(n, rows.shape[1]) for n in sizes]
    by_source = np.empty(starts[-1] + sizes[-1] + 1, dtype=np.int64)
    target, order = np.empty((2, len(source)), dtype=np.int64)
    _transpose(ptr, source, by_source, target, order)
    _multiply(
        by_source, target, value[order], _addresses([0], [rows]), _addresses(starts, outs), rows
    )
    return [o.view(len(o), *grad.shape[1:]).to(grad.dtype) for o in outs]


@torch.library.custom_op("dnw_graph::correlate", mutates_args=(), device_types="cpu")
def correlate(
    weight: Tensor,
    edge_id: Tensor,
    edge_index: Tensor,
    rowptr: Tensor,
    nodes: list[int],
    first_edge: int,
    starts: list[int],
    states: list[Tensor],
    grad: Tensor,
) -> Tensor:
    """Return ``<Z_u, dL/dI_v>`` of the given edges ``[E of the block]``, 0 for others.

    Args as for :func:`gather`, with the edges in question in place of the real ones, and ``grad``,
    ``dL/dI`` ``[targets, *features]``.
    """
    source, at, _, ptr = _real(weight, edge_id, edge_index, rowptr, nodes, first_edge)
    rows, columns = [_matrix(z, weight.dtype) for z in states], _matrix(grad, weight.dtype)
    out = torch.zeros_like(weight)
    target = np.repeat(np.arange(len(columns)), np.diff(ptr))
    _jit.use_torch_threads()
    _dots(source, target, _addresses(starts, rows), columns.numpy(), at, out.numpy())
    return out


@gather.register_fake
def _(
    weight: Tensor,
    edge_id: Tensor,
    edge_index: Tensor,
    rowptr: Tensor,
    nodes: list[int],
    first_edge: int,
    starts: list[int],
    states: list[Tensor],
) -> Tensor:
    return states[0].new_empty(nodes[1] - nodes[0], *states[0].shape[1:])


@spread.register_fake
def _(
    weight: Tensor,
    edge_id: Tensor,
    edge_index: Tensor,
    rowptr: Tensor,
    nodes: list[int],
    first_edge: int,
    starts: list[int],
    sizes: list[int],
    grad: Tensor,
) -> list[Tensor]:
    return [grad.new_empty(n, *grad.shape[1:]) for n in sizes]


@correlate.register_fake
def _(
    weight: Tensor,
    edge_id: Tensor,
    edge_index: Tensor,
    rowptr: Tensor,
    nodes: list[int],
    first_edge: int,
    starts: list[int],
    states: list[Tensor],
    grad: Tensor,
) -> Tensor:
    return torch.empty_like(weight)


def _real(
    weight: Tensor,
    edge_id: Tensor,
    edge_index: Tensor,
    rowptr: Tensor,
    nodes: list[int],
    first_edge: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return sources, places among the block's candidates, weights and row pointers of a block."""
    ptr = rowptr[nodes[0] : nodes[1] + 1].numpy()
    edges = slice(int(ptr[0]), int(ptr[-1]))
    at = edge_id[edges] - first_edge
    value = weight.detach()[at].numpy()
    return edge_index[0, edges].numpy(), at.numpy(), value, ptr - ptr[0]


def _matrix(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``[nodes, N]``, contiguous, in the type that sums are formed in."""
    return x.detach().to(dtype).reshape(len(x), -1).contiguous()


def _addresses(starts: list[int], matrices: list[Tensor]) -> np.ndarray:
    """Return the address of each node's row, by number of the node."""
    address = np.zeros(starts[-1] + len(matrices[-1]), dtype=np.int64)
    for start, m in zip(starts, matrices, strict=True):
        step = m.shape[1] * m.element_size()
        address[start : start + len(m)] = m.data_ptr() + step * np.arange(len(m))
    return address


def _multiply(
    ptr: np.ndarray,
    index: np.ndarray,
    value: np.ndarray,
    inputs: np.ndarray,
    outputs: np.ndarray,
    like: Tensor,
) -> None:
    """Run :func:`_spmm` over rows like those of ``like``, in enough tasks for the threads."""
    columns = like.shape[1]
    zero = np.float64(0) if like.dtype == torch.float64 else np.float32(0)
    tiles = max(1, -(-columns // _TILE))
    parts = max(1, -(-4 * _jit.use_torch_threads() // tiles))
    rows = max(1, -(-(len(ptr) - 1) // parts))
    _spmm(ptr, index, value, inputs, outputs, columns, zero, _TILE, rows)


# The arrays below have no annotations: Numba derives their types.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def"


@_jit.kernel
def _spmm(ptr, index, value, inputs, outputs, columns, zero, tile, rows):
    """outputs[v] = sum over e of value[e] * inputs[index[e]], e from ptr[v] to ptr[v + 1]."""
    tiles = (columns + tile - 1) // tile
    parts = (len(ptr) - 1 + rows - 1) // rows
    width = value.itemsize
    for task in numba.prange(tiles * parts):
        first = (task % tiles) * tile
        n = min(tile, columns - first)
        offset = first * width
        top = (task // tiles) * rows
        for v in range(top, min(top + rows, len(ptr) - 1)):
            if outputs[v] == 0:
                continue
            out = carray(pointer(outputs[v] + offset, zero), n)
            for i in range(n):
                out[i] = zero
            e, last = ptr[v], ptr[v + 1]
            while e + 4 <= last:  # four messages at a time: the sum is loaded and stored once
                w0, w1, w2, w3 = value[e], value[e + 1], value[e + 2], value[e + 3]
                z0 = carray(pointer(inputs[index[e]] + offset, zero), n)
                z1 = carray(pointer(inputs[index[e + 1]] + offset, zero), n)
                z2 = carray(pointer(inputs[index[e + 2]] + offset, zero), n)
                z3 = carray(pointer(inputs[index[e + 3]] + offset, zero), n)
                for i in range(n):
                    out[i] += w0 * z0[i] + w1 * z1[i] + w2 * z2[i] + w3 * z3[i]
                e += 4
            while e < last:
                w0, z0 = value[e], carray(pointer(inputs[index[e]] + offset, zero), n)
                for i in range(n):
                    out[i] += w0 * z0[i]
                e += 1


@_jit.kernel
def _dots(source, target, inputs, grad, edge_id, out):
    """out[edge_id[e]] = <inputs[source[e]], grad[target[e]]>."""
    n = grad.shape[1]
    zero = out.dtype.type(0)
    for e in numba.prange(len(source)):
        z, g = carray(pointer(inputs[source[e]], zero), n), grad[target[e]]
        total = zero
        for i in range(n):
            total += z[i] * g[i]
        out[edge_id[e]] = total


@_jit.kernel
def _transpose(rowptr, source, by_source, target, order):
    """Sort the edges of a block by source: a counting sort, stable in the target."""
    by_source[:] = 0
    for e in range(len(source)):
        by_source[source[e] + 1] += 1
    for u in range(len(by_source) - 1):
        by_source[u + 1] += by_source[u]
    place = by_source[:-1].copy()
    for v in range(len(rowptr) - 1):
        for e in range(rowptr[v], rowptr[v + 1]):
            at = place[source[e]]
            target[at], order[at] = v, e
            place[source[e]] += 1
