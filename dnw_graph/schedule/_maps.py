"""A static graph of ``norm_relu_conv`` nodes in many small blocks, as one function.

As :mod:`dnw_graph.schedule._blocks` for blocks that need not be complete: compiled code goes from
block to block, and sums real edges only.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dnw_graph import _jit
from dnw_graph._arena import empty
from dnw_graph.aggregation import Correlation
from dnw_graph.aggregation._kernels import TYPES, by_source, wide
from dnw_graph.node import NormReluConv, ReluConv, fused
from dnw_graph.schedule import _kernels
from dnw_graph.schedule.base import ForwardPass, is_identity, is_observed
from dnw_graph.topology import Role, Topology
from dnw_graph.wiring import Wiring


@dataclass(frozen=True)
class _Nodes:
    """What the nodes of all blocks have, one row per node that is no output.

    Attributes:
        plan: Scales, shifts, filters and statistics; see :class:`fused.Plan`.
        sizes: Number of nodes of each block.
        norms: Their batch norms in training.
    """

    plan: fused.Plan
    sizes: list[int]
    norms: list[nn.BatchNorm2d]


def run(forward_pass: ForwardPass, x: Tensor) -> Tensor | None:
    """Return the states of the output nodes, or None where the graph is not of this kind.

    Args:
        forward_pass: The graph.
        x: Inputs of the input nodes ``[inputs, B, H, W]``, by number of the node.

    Returns:
        States ``[outputs, B, H / stride, W / stride]``, by number of the node.
    """
    wiring = forward_pass.wiring
    known = x.is_cpu and x.dim() == 4 and x.numel() and fused.accepted(x) in TYPES
    if not known or wiring.sampler is not None or not forward_pass.backend.by_edge(wiring):
        return None
    x = x.to(fused.accepted(x)).contiguous()
    nodes = _nodes(forward_pass, x)
    if nodes is None:
        return None
    plan, stride = nodes.plan, int(forward_pass.nodes[0].stride)  # type: ignore[arg-type]
    tensors = plan.scale, plan.shift, plan.filters, plan.mean, plan.rstd
    settings = stride, plan.eps, plan.given
    y, mean, rstd = _Function.apply(
        wiring, Correlation(wiring), settings, forward_pass.weight, x, *tensors
    )
    counts = torch.full_like(mean, y[0].numel())
    counts[: len(x)] = x[0].numel()
    _learn(nodes, mean, rstd, counts)
    result: Tensor = y
    return result


def _nodes(forward_pass: ForwardPass, x: Tensor) -> _Nodes | None:
    """Return what the nodes have; None if compiled code does not know one of them."""
    computing: list[Any] = []
    for block, node, message in zip(
        forward_pass.topology.blocks, forward_pass.nodes, forward_pass.messages, strict=True
    ):
        if is_observed(node) or not is_identity(message) or is_observed(message):
            return None
        if block.role != Role.OUTPUT:
            computing.append(node)
        elif not is_identity(node):
            return None
    first = computing[0]
    if type(first) not in (NormReluConv, ReluConv):
        return None
    for node in computing:
        same = type(node) is type(first) and node.use_fused
        if not same or node.conv.weight.dtype not in (torch.float32, torch.float64):
            return None
    inputs = sum(block.role == Role.INPUT for block in forward_pass.topology.blocks)
    if any(node.stride != first.stride for node in computing[:inputs]):
        return None
    if any(node.stride != 1 for node in computing[inputs:]):
        return None
    filters = torch.cat([node.conv.weight for node in computing])[:, 0]
    sizes = [int(node.num_nodes) for node in computing]
    if type(first) is ReluConv:
        ones, zeros = torch.ones_like(filters[:, 0, 0]), torch.zeros_like(filters[:, :1, 0])
        ones, zeros = ones.detach(), zeros.detach()
        plan = fused.Plan(ones, zeros[:, 0], filters, 1, 1e-5, zeros, ones[:, None], given=True)
        return _Nodes(plan, sizes, [])
    return _normalized(computing, filters, sizes, x)


def _normalized(
    computing: list[Any], filters: Tensor, sizes: list[int], x: Tensor
) -> _Nodes | None:
    norms = [node.norm for node in computing]
    norms = [norm[0] if isinstance(norm, nn.ModuleList) else norm for norm in norms]
    first = norms[0]
    batch = type(first) is nn.BatchNorm2d
    if not batch and type(first) is not nn.InstanceNorm2d:
        return None
    for norm in norms:
        same = type(norm) is type(first) and norm.training == first.training and norm.affine
        if not same or norm.eps != first.eps or norm.momentum != first.momentum:
            return None
        if batch and norm.running_mean is None:
            return None
    learns = batch and first.training
    stride = int(computing[0].stride)
    if learns and (first.momentum is None or math.prod(fused.shape(x, stride)[1:]) == 1):
        return None  # block by block, which raises where it has to
    scale, shift = (torch.cat([getattr(n, name) for n in norms]) for name in ("weight", "bias"))
    if batch and not learns:
        mean, variance = (
            torch.cat([getattr(norm, name) for norm in norms])[:, None]
            for name in ("running_mean", "running_var")
        )
        rstd = (variance + first.eps).rsqrt()
    else:
        groups = 1 if batch else x.shape[1]
        mean, rstd = (filters.detach().new_empty(len(filters), groups) for _ in range(2))
    plan = fused.Plan(scale, shift, filters, 1, first.eps, mean, rstd, given=batch and not learns)
    return _Nodes(plan, sizes, norms if learns else [])


@torch.no_grad()
def _learn(nodes: _Nodes, mean: Tensor, rstd: Tensor, counts: Tensor) -> None:
    """Update running statistics, as PyTorch does; see :meth:`NormReluConv.learn`.

    Args:
        nodes: The nodes.
        mean: Means ``[nodes, 1]``.
        rstd: Their ``1 / sqrt(var + eps)``.
        counts: Of how many values each ``[nodes, 1]``.
    """
    if not nodes.norms:
        return
    variance = (rstd**-2 - nodes.plan.eps).clamp_min_(0) * (counts / (counts - 1))
    part = float(nodes.norms[0].momentum or 0)
    for name, values in (("running_mean", mean), ("running_var", variance)):
        kept = [getattr(norm, name) for norm in nodes.norms]
        torch._foreach_lerp_(kept, values[:, 0].to(kept[0].dtype).split(nodes.sizes), part)
    batches: list[Any] = [norm.num_batches_tracked for norm in nodes.norms]
    torch._foreach_add_(batches, 1)


class _Function(torch.autograd.Function):
    """All blocks in their order forward, and in the reverse order backward."""

    @staticmethod
    def forward(
        ctx: Any,
        wiring: Wiring,
        correlation: Correlation,
        settings: tuple[int, float, bool],
        weight: Tensor,
        x: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        topology, (stride, eps, given) = wiring.topology, settings
        scale, shift, filters, mean, rstd = (t.contiguous() for t in tensors)
        mean, rstd, number = mean.clone(), rstd.clone(), len(x)
        of_inputs = scale[:number], shift[:number], filters[:number], mean[:number], rstd[:number]
        size = fused.shape(x, stride)[1:]
        inputs, z = (empty(x, (topology.num_nodes, *size)) for _ in range(2))
        fused.forward(x, *of_inputs, z[:number], stride, eps, given)
        edges = wiring.rowptr, wiring.edge_index[0], wide(wiring.edge_weight)
        levels, places = _levels(topology), _places(topology)
        own = scale, shift, filters, mean, rstd
        forward(levels[1:], places, *edges, *own, inputs, z, given, eps)
        ctx.wiring, ctx.correlation, ctx.settings = wiring, correlation, settings
        ctx.dtype = weight.dtype
        ctx.save_for_backward(x, inputs, z, *own)
        ctx.mark_non_differentiable(mean, rstd)
        return torch.cat([z[b.nodes.start : b.nodes.stop] for b in _ends(topology)]), mean, rstd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        wiring, (stride, _eps, given) = ctx.wiring, ctx.settings
        x, inputs, z, *own = ctx.saved_tensors
        topology, number = wiring.topology, len(x)
        ptr, target, order = by_source(wiring.edge_index[0], wiring.rowptr)
        edges = ptr, target, wide(wiring.edge_weight)[order]
        to_own = [torch.empty_like(t) for t in own[:3]]
        to_inputs, to_states = empty(z, z.shape), empty(z, (number, *z.shape[1:]))
        levels, places = _levels(topology), _places(topology)
        kept = inputs, to_inputs, to_states
        backward(grad.contiguous(), levels, places, *edges, *own, *kept, *to_own, given)
        to_x = torch.empty_like(x)
        fused.backward(
            to_states,
            x,
            *(t[:number] for t in own),
            to_x,
            *(t[:number] for t in to_own),
            None,
            stride,
            given,
        )
        wanted = ctx.needs_input_grad
        to_weight = ctx.correlation(z, to_inputs, ctx.dtype) if wanted[3] else None
        return None, None, None, to_weight, to_x, *to_own, None, None


@torch.library.custom_op(
    "dnw_graph::static_maps", mutates_args=("mean", "rstd", "inputs", "z"), device_types="cpu"
)
def forward(
    levels: Tensor,
    places: Tensor,
    ptr: Tensor,
    source: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    filters: Tensor,
    mean: Tensor,
    rstd: Tensor,
    inputs: Tensor,
    z: Tensor,
    given: bool,
    eps: float,
) -> None:
    """Write the inputs and states of all nodes, given the states of the input nodes.

    Args:
        levels: First node of each block but those of the inputs, and at last ``V``.
        places: Row of each node in ``scale`` and the next four ``[V]``, ``-1 - i`` of output ``i``.
        ptr: Edges into node ``v`` are ``ptr[v]`` to ``ptr[v + 1] - 1``. ``[V + 1]``
        source: Sources of the edges ``[k]``.
        weight: Their weights ``[k]``.
        scale: See :class:`fused.Plan`, as the next four; one row per node that is no output.
        shift: See there.
        filters: See there.
        mean: See there.
        rstd: See there.
        inputs: Where to write ``I [V, B, H, W]``.
        z: Where to write ``Z [V, B, H, W]``; those of input nodes are read.
        given: See :class:`fused.Plan`, as the next.
        eps: See there.
    """
    tensors = levels, places, ptr, source, weight, scale, shift, filters, mean, rstd, inputs, z
    _kernels.forward_maps(*map(_jit.array, tensors), given, eps, _jit.threads())


@torch.library.custom_op(
    "dnw_graph::static_maps_backward",
    mutates_args=("to_inputs", "to_states", "to_scale", "to_shift", "to_filters"),
    device_types="cpu",
)
def backward(
    grad: Tensor,
    levels: Tensor,
    places: Tensor,
    ptr: Tensor,
    target: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    filters: Tensor,
    mean: Tensor,
    rstd: Tensor,
    inputs: Tensor,
    to_inputs: Tensor,
    to_states: Tensor,
    to_scale: Tensor,
    to_shift: Tensor,
    to_filters: Tensor,
    given: bool,
) -> None:
    """Write ``dL/dI`` of all nodes but the inputs, ``dL/dZ`` of these, and gradients to parameters.

    Args as for :func:`forward`, where ``levels`` begins with 0 and ``ptr``, ``target`` and
    ``weight`` are of the edges out of nodes; ``grad [outputs, B, H, W]`` are gradients to outputs.
    """
    read = levels, places, ptr, target, weight, scale, shift, filters, mean, rstd, inputs
    written = to_inputs, to_states, to_scale, to_shift, to_filters
    arrays = map(_jit.array, (grad, *read, *written))
    _kernels.backward_maps(*arrays, given, _jit.threads())


def _ends(topology: Topology) -> list[Any]:
    return [block for block in topology.blocks if block.role == Role.OUTPUT]


def _levels(topology: Topology) -> Tensor:
    """Return the first node of each block, those of inputs being one, and at last ``V``."""
    others = [block.nodes.start for block in topology.blocks if block.role != Role.INPUT]
    return torch.tensor([0, *others, topology.num_nodes], device="cpu")


def _places(topology: Topology) -> Tensor:
    """Return the number of each node among those that are no outputs ``[V]``.

    Of the outputs, it is ``-1 - i``.
    """
    places: list[int] = []
    computing = outputs = 0
    for block in topology.blocks:
        size = len(block.nodes)
        if block.role == Role.OUTPUT:
            places += range(-1 - outputs, -1 - outputs - size, -1)
            outputs += size
        else:
            places += range(computing, computing + size)
            computing += size
    return torch.tensor(places, device="cpu")
