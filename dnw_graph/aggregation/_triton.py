"""GPU kernels of the sparse backend in Triton.

They read where the edges of a node begin and end from the device, so the host never waits for the
number of real edges. Arguments are those of the operators in :mod:`dnw_graph.aggregation._kernels`.
Every sum has a fixed order.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS = 1024  # of a row, per program or iteration
_EDGES = 8  # candidate edges per program that computes products

# Triton derives the types of the arguments below.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"


@triton.jit
def _sums(
    ptr, index, value, rows, out, first, base, columns, parts,
    TOTAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the sum of ``value[e] * rows[index[e] - base]`` over the edges of ``first + v``."""
    program = tl.program_id(0).to(tl.int64)
    v, at = program // parts, program % parts * BLOCK + tl.arange(0, BLOCK)
    inside = at < columns
    total = tl.zeros([BLOCK], TOTAL)
    e, last = tl.load(ptr + (first + v)), tl.load(ptr + (first + v + 1))
    while e < last:
        row = (tl.load(index + e) - base) * columns
        weight = tl.load(value + e).to(TOTAL)
        total += weight * tl.load(rows + (row + at), mask=inside, other=0).to(TOTAL)
        e += 1
    tl.store(out + (v * columns + at), total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _products(
    ptr, index, position, nodes, rows, out, first, base, offset, columns, parts,
    TOTAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write ``<nodes[v], rows[index[e] - base]>`` of each edge ``e`` of ``first + v``.

    The result is written to ``out[position[e] - offset]``. Edges of a node are divided among
    ``parts`` programs.
    """
    program = tl.program_id(0).to(tl.int64)
    v = program // parts
    e, last = tl.load(ptr + (first + v)), tl.load(ptr + (first + v + 1))
    e += program % parts
    while e < last:
        row = (tl.load(index + e) - base) * columns
        total = tl.zeros([BLOCK], TOTAL)
        for start in range(0, columns, BLOCK):
            at = start + tl.arange(0, BLOCK)
            node = tl.load(nodes + (v * columns + at), mask=at < columns, other=0).to(TOTAL)
            total += node * tl.load(rows + (row + at), mask=at < columns, other=0).to(TOTAL)
        to = out + (tl.load(position + e) - offset)
        tl.store(to, tl.sum(total).to(out.dtype.element_ty))
        e += parts


def gather(
    weight: Tensor,
    sources: Tensor,
    rowptr: Tensor,
    block: list[int],
    starts: list[int],
    states: list[Tensor],
) -> Tensor:
    """Return the sums into a block."""
    out = states[0].new_empty(block[1] - block[0], *states[0].shape[1:])
    _sum(weight, rowptr, sources, block[0], _rows(starts, states), out)
    return out


def spread(
    weight: Tensor,
    sources: Tensor,
    rowptr: Tensor,
    block: list[int],
    starts: list[int],
    sizes: list[int],
    grad: Tensor,
) -> list[Tensor]:
    """Return the sums out of each source block."""
    number = starts[-1] + sizes[-1]
    edges = torch.arange(len(sources), device=sources.device)
    is_inside = (edges >= rowptr[block[0]]) & (edges < rowptr[block[1]])
    ptr, target, order = _sorted(torch.where(is_inside, sources, number), rowptr, number)
    rows, outs = ([block[0]], [grad]), [grad.new_empty(n, *grad.shape[1:]) for n in sizes]
    for start, out in zip(starts, outs, strict=True):
        _sum(weight[order], ptr, target, start, _rows(*rows), out)
    return outs


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
    """Return the products of some edges into a block, and 0 for others."""
    out, rows = torch.zeros_like(weight), _rows(starts, states)
    _multiply(out, rowptr, sources, position, (block[0], block[2]), grad, rows)
    return out


def by_source(sources: Tensor, rowptr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the edges sorted by ``(source, target)``."""
    return _sorted(sources, rowptr, len(rowptr) - 1)


def push(
    weight: Tensor,
    ptr: Tensor,
    target: Tensor,
    block: list[int],
    starts: list[int],
    grads: list[Tensor],
    out: Tensor,
) -> None:
    """Write the sums out of a block."""
    _sum(weight, ptr, target, block[0], _rows(starts, grads), out)


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
    """Write the products of the edges out of a block."""
    _multiply(out, ptr, target, position, (block[0], 0), state, _rows(starts, grads))


Rows = tuple[Tensor, int]
"""Rows of nodes ``[n, *features]``, contiguous, and the index of the first node."""


def _rows(starts: Sequence[int], tensors: Sequence[Tensor]) -> Rows:
    """Return tensors of several blocks as one; the rows of nodes between them are undefined."""
    if len(tensors) == 1:
        return tensors[0].contiguous(), starts[0]
    number = starts[-1] + len(tensors[-1]) - starts[0]
    rows = tensors[0].new_empty(number, *tensors[0].shape[1:])
    for start, x in zip(starts, tensors, strict=True):
        rows[start - starts[0] : start - starts[0] + len(x)] = x
    return rows, starts[0]


def _sorted(sources: Tensor, rowptr: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return where the edges out of each node begin, their targets, and the order of edges."""
    ordered, order = sources.sort(stable=True)
    nodes = torch.arange(number + 1, device=sources.device)
    target = torch.searchsorted(rowptr, order, right=True) - 1
    return torch.searchsorted(ordered, nodes), target, order


def _sum(weight: Tensor, ptr: Tensor, index: Tensor, first: int, rows: Rows, out: Tensor) -> None:
    columns = out.shape[1:].numel()
    parts = triton.cdiv(columns, _COLUMNS)
    if out.numel():
        edges = ptr, index.contiguous(), weight.contiguous()
        sizes = first, rows[1], columns, parts
        _sums[(len(out) * parts,)](*edges, rows[0], out, *sizes, **_constants(weight, columns))


def _multiply(
    out: Tensor,
    ptr: Tensor,
    index: Tensor,
    position: Tensor,
    first: tuple[int, int],
    nodes: Tensor,
    rows: Rows,
) -> None:
    columns = nodes.shape[1:].numel()
    parts = triton.cdiv(len(index), _EDGES * max(1, len(nodes)))
    if len(nodes) and len(index):
        tensors = ptr, index.contiguous(), position, nodes.contiguous(), rows[0], out
        sizes = first[0], rows[1], first[1], columns, parts
        _products[(len(nodes) * parts,)](*tensors, *sizes, **_constants(out, columns))


def _constants(weight: Tensor, columns: int) -> dict[str, object]:
    """Return the type of sums, which depends on that of weights, and the columns per program."""
    total = tl.float64 if weight.dtype == torch.float64 else tl.float32
    return {"TOTAL": total, "BLOCK": min(_COLUMNS, triton.next_power_of_2(max(1, columns)))}
