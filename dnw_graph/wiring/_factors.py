"""Running average of a gradient divided by a factored second moment."""

from collections.abc import Iterator

import numba
import numpy as np
import torch
from torch import Tensor

from dnw_graph import _jit
from dnw_graph.topology import Block, Topology

_MIN_SHARE = 0.01
"""Smallest factor, as a share of the typical one. Smaller factors are often rounding errors, as for
a source whose state is constant before a batch norm, and must not be amplified."""

_CHUNK = 64  # rows summed at a time, independent of the number of threads


def average_factored(average: Tensor, grad: Tensor, topology: Topology, share: float) -> None:
    r"""Update a running average, in place, with the gradient divided by its factors.

    .. math::
        m_{uv} \leftarrow (1 - \text{share}) \, m_{uv} + \text{share} \, \frac{g_{uv}}{r_u c_v},
        \qquad
        r_u^2 = \operatorname{mean}_v g_{uv}^2, \qquad
        c_v^2 = \operatorname{mean}_u (g_{uv} / r_u)^2

    Each factor is at least 1 % of its typical value in the graph. If a factor is 0, the quotient is
    0. Sums have a fixed order.

    Args:
        average: The average ``m`` ``[E]``, contiguous.
        grad: The gradient ``g`` ``[E]``, contiguous.
        topology: The candidates.
        share: Weight of the gradient in the average, 0 to 1.
    """
    values = grad.float() if grad.dtype.itemsize < 4 else grad
    sums = _sums_by_source(values, topology)
    means = sums / topology.out_degree_on(grad.device).clamp_min(1)
    source_scale = _inverse_root(means, sums.sum() / topology.num_candidates)
    use_kernel = grad.is_cpu and average.dtype == values.dtype and _jit.can_compile()
    for block, sources, part in _parts(values, topology):
        average_part = average[block.edges.start : block.edges.stop]
        scale = source_scale[sources]
        if block.complete and use_kernel:
            rows, averages = (
                _jit.array(x.view(len(block.nodes), -1)) for x in (part, average_part)
            )
            _average_rows(rows, averages, _jit.array(scale), share)
        else:
            quotient = _quotient(part, scale, block, topology)
            average_part.lerp_(quotient.to(average.dtype), share)


def _parts(values: Tensor, topology: Topology) -> Iterator[tuple[Block, Tensor, Tensor]]:
    """Yield each block, the sources of its candidates, and its part of the candidates' values."""
    lists = topology.source_lists_on(values.device)
    for block, sources in zip(topology.blocks, lists, strict=True):
        yield block, sources, values[block.edges.start : block.edges.stop]


def _sums_by_source(grad: Tensor, topology: Topology) -> Tensor:
    """Return the sum of ``g_uv²`` over ``v`` ``[V]``."""
    sums = grad.new_zeros(topology.num_nodes)
    for block, sources, part in _parts(grad, topology):
        if block.complete:
            rows = part.view(len(block.nodes), -1)
            if grad.is_cpu and _jit.can_compile():
                chunks = rows.new_zeros(-(-len(rows) // _CHUNK), rows.shape[1])
                _column_squares(_jit.array(rows), _jit.array(chunks))
                squares = chunks.sum(0)
            else:
                squares = rows.square().sum(0)
            sums[sources] += squares
        else:
            order, ends = topology.by_source_on(block, grad.device)
            sums += torch.segment_reduce(part[order].square(), "sum", offsets=ends)
    return sums


def _quotient(part: Tensor, source_scale: Tensor, block: Block, topology: Topology) -> Tensor:
    """Return a block's part of ``g_uv / (r_u c_v)``; ``source_scale`` is ``1 / r_u``."""
    if block.complete:
        rows = part.view(len(block.nodes), -1) * source_scale
        return rows.mul_(_inverse_root(rows.square().mean(1, keepdim=True), 1.0)).view(-1)
    rowptr = topology.rowptr_on(part.device)
    ends = rowptr[block.nodes.start : block.nodes.stop + 1] - block.edges.start
    degree = ends.diff()
    part = part * source_scale
    means = torch.segment_reduce(part.square(), "sum", offsets=ends) / degree.clamp_min(1)
    target_scale = _inverse_root(means, 1.0)
    return part.mul_(target_scale.repeat_interleave(degree, output_size=len(part)))


def _inverse_root(mean: Tensor, typical: Tensor | float) -> Tensor:
    """Return one over the root of a mean square, the root at least 1 % of the typical; 0 for 0."""
    return torch.where(mean > 0, mean.clamp_min(_MIN_SHARE**2 * typical).rsqrt(), 0)


@_jit.Kernel
def _column_squares(rows, sums):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Add the squares of each chunk of rows to a row of ``sums``."""
    for chunk in numba.prange(sums.shape[0]):
        total = sums[chunk]
        for i in range(chunk * _CHUNK, min(rows.shape[0], (chunk + 1) * _CHUNK)):
            for j in range(rows.shape[1]):
                total[j] += rows[i, j] * rows[i, j]


@_jit.Kernel
def _average_rows(rows, average, source_scale, share):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Update the rows of ``average`` with ``rows / (r_u c_v)``; ``source_scale`` is ``1 / r_u``."""
    columns = rows.shape[1]
    old_share, minimum = rows.dtype.type(1 - share), rows.dtype.type(_MIN_SHARE**2)
    for i in numba.prange(rows.shape[0]):
        total = rows.dtype.type(0)
        for j in range(columns):
            value = rows[i, j] * source_scale[j]
            total += value * value
        mean = max(minimum, total / rows.dtype.type(columns))
        factor = rows.dtype.type(share) / np.sqrt(mean) if total > 0 else rows.dtype.type(0)
        for j in range(columns):
            average[i, j] = old_share * average[i, j] + rows[i, j] * source_scale[j] * factor
