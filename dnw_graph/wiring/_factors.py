"""Division of a gradient by a factored second moment: a factor a source and one a target."""

import torch
from torch import Tensor

from dnw_graph.topology import Topology

_QUIET = 0.01
"""Share of the usual below which a source or a target is not amplified further: what it has is
often rounding, as out of a node whose state is constant before a batch norm."""


def divide_by_factors(grad: Tensor, topology: Topology, scale: Tensor) -> None:
    r"""Replace ``grad`` by ``scale * grad / (r_u c_v)``, in place; 0 where ``r`` or ``c`` is 0.

    .. math::
        r_u^2 = \operatorname{mean}_v g_{uv}^2, \qquad
        c_v^2 = \operatorname{mean}_u (g_{uv} / r_u)^2

    neither taken to be less than 1 % of what is usual in the graph. Sums have a fixed order.

    Args:
        grad: A number a candidate ``[E]``, contiguous.
        topology: The candidates.
        scale: One number.
    """
    values = grad.float() if grad.dtype.itemsize < 4 else grad
    by_source = _by_source(values, topology)
    for block, sources in zip(topology.blocks, topology.source_lists_on(grad.device), strict=True):
        part, factors = values[block.edges.start : block.edges.stop], by_source[sources]
        if block.complete:
            rows = part.view(len(block.nodes), -1).mul_(factors)
            rows.mul_(scale * _inverse(rows.square().mean(1, keepdim=True), 1.0))
        else:
            rowptr = topology.rowptr_on(grad.device)
            ends = rowptr[block.nodes.start : block.nodes.stop + 1] - block.edges.start
            degree = ends.diff()
            part.mul_(factors)
            mean = torch.segment_reduce(part.square(), "sum", offsets=ends) / degree.clamp_min(1)
            by_target = scale * _inverse(mean, 1.0)
            part.mul_(by_target.repeat_interleave(degree, output_size=len(part)))
    if values is not grad:
        grad.copy_(values)


def _by_source(grad: Tensor, topology: Topology) -> Tensor:
    """Return ``1 / r_u`` ``[V]``."""
    sums = grad.new_zeros(topology.num_nodes)
    for block, sources in zip(topology.blocks, topology.source_lists_on(grad.device), strict=True):
        part = grad[block.edges.start : block.edges.stop]
        if block.complete:
            sums[sources] += part.view(len(block.nodes), -1).square().sum(0)
        else:
            order, ends = topology.by_source_on(block, grad.device)
            sums += torch.segment_reduce(part[order].square(), "sum", offsets=ends)
    mean = sums / topology.out_degree_on(grad.device).clamp_min(1)
    return _inverse(mean, sums.sum() / topology.num_candidates)


def _inverse(mean: Tensor, usual: Tensor | float) -> Tensor:
    """Return one over the root of a mean of squares, of at least 1 % of the usual; 0 for 0."""
    return torch.where(mean > 0, mean.clamp_min(_QUIET**2 * usual).rsqrt(), 0)
