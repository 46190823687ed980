"""A static graph of ``norm_relu_conv`` nodes in many small blocks, as one function.

Like :mod:`dnw_graph.schedule._blocks`, but blocks need not be complete: compiled code computes one
block after the other, and sums over real edges only.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dnw_graph import _jit
from dnw_graph._arena import empty
from dnw_graph.aggregation import TYPES, Correlation, by_source, wide
from dnw_graph.node import NormReluConv, ReluConv, fused
from dnw_graph.node.norm import update_running
from dnw_graph.precision import accepted_dtype
from dnw_graph.schedule import _kernels
from dnw_graph.schedule.base import ForwardPass, is_identity, is_observed
from dnw_graph.topology import Role, Topology
from dnw_graph.wiring import Wiring


@dataclass(frozen=True)
class _Nodes:
    """The parameters of the nodes of all blocks, one row per node that is not an output.

    Attributes:
        plan: Scales, shifts, filters and statistics; see :class:`fused.Plan`.
        norms: The batch norms of the blocks in training; empty otherwise.
    """

    plan: fused.Plan
    norms: list[nn.BatchNorm2d]


def run(forward_pass: ForwardPass, x: Tensor) -> Tensor | None:
    """Return the states of the output nodes, or None if the graph is not of this kind.

    Args:
        forward_pass: The graph.
        x: Inputs of the input nodes ``[inputs, B, H, W]``, in node order.

    Returns:
        States ``[outputs, B, H / stride, W / stride]``, in node order.
    """
    wiring = forward_pass.wiring
    supported = x.is_cpu and x.dim() == 4 and x.numel() and accepted_dtype(x) in TYPES
    if not supported or wiring.sampler is not None or not forward_pass.backend.by_edge(wiring):
        return None
    x = x.to(accepted_dtype(x)).contiguous()
    nodes = _nodes(forward_pass, x)
    if nodes is None:
        return None
    plan, stride = nodes.plan, int(forward_pass.nodes[0].stride)  # type: ignore[arg-type]
    tensors = plan.scale, plan.shift, plan.filters, plan.mean, plan.rstd
    settings = stride, plan.eps, plan.given
    y, mean, rstd = _Function.apply(
        wiring, Correlation(wiring), settings, forward_pass.weight, x, *tensors
    )
    if nodes.norms:
        counts = torch.full_like(mean[:, 0], y[0].numel())
        counts[: len(x)] = x[0].numel()
        variance = (rstd[:, 0] ** -2 - plan.eps).clamp_min_(0)
        update_running(nodes.norms, mean[:, 0], variance, counts)
    result: Tensor = y
    return result


def _nodes(forward_pass: ForwardPass, x: Tensor) -> _Nodes | None:
    """Return the parameters of the nodes; None if compiled code does not support one of them."""
    functions: list[Any] = []
    for block, node, message in zip(
        forward_pass.topology.blocks, forward_pass.nodes, forward_pass.messages, strict=True
    ):
        if is_observed(node) or not is_identity(message) or is_observed(message):
            return None
        if block.role != Role.OUTPUT:
            functions.append(node)
        elif not is_identity(node):
            return None
    first = functions[0]
    if type(first) not in (NormReluConv, ReluConv):
        return None
    for node in functions:
        same = type(node) is type(first) and node.use_fused
        if not same or node.conv.weight.dtype not in (torch.float32, torch.float64):
            return None
    num_input_blocks = sum(b.role == Role.INPUT for b in forward_pass.topology.blocks)
    if any(node.stride != first.stride for node in functions[:num_input_blocks]):
        return None
    if any(node.stride != 1 for node in functions[num_input_blocks:]):
        return None
    filters = torch.cat([node.conv.weight for node in functions])[:, 0]
    if type(first) is ReluConv:
        ones, zeros = filters.new_ones(len(filters)), filters.new_zeros(len(filters))
        return _Nodes(fused.plan_without_norm(ones, zeros, filters, 1), [])
    return _with_norms(functions, filters, x)


def _with_norms(functions: list[Any], filters: Tensor, x: Tensor) -> _Nodes | None:
    """Return the parameters of nodes with norms; None if these differ or are not supported."""
    norms = [node.norm for node in functions]
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
    training = batch and first.training
    stride = int(functions[0].stride)
    if training and (first.momentum is None or math.prod(fused.shape(x, stride)[1:]) == 1):
        return None  # block by block, this is supported or raises an error
    scale, shift = (torch.cat([getattr(n, name) for n in norms]) for name in ("weight", "bias"))
    if batch and not training:
        mean, variance = (
            torch.cat([getattr(norm, name) for norm in norms])[:, None]
            for name in ("running_mean", "running_var")
        )
        rstd = (variance + first.eps).rsqrt()
    else:
        groups = 1 if batch else x.shape[1]
        mean, rstd = (filters.detach().new_empty(len(filters), groups) for _ in range(2))
    plan = fused.Plan(scale, shift, filters, 1, first.eps, mean, rstd, given=batch and not training)
    return _Nodes(plan, norms if training else [])


class _Function(torch.autograd.Function):
    """Computes all blocks in order, and in reverse order in the backward."""

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
        parameters = scale, shift, filters, mean, rstd
        forward(levels[1:], places, *edges, *parameters, inputs, z, given, eps)
        ctx.wiring, ctx.correlation, ctx.settings = wiring, correlation, settings
        ctx.dtype = weight.dtype
        ctx.save_for_backward(x, inputs, z, *parameters)
        ctx.mark_non_differentiable(mean, rstd)
        return z.index_select(0, topology.outputs.sort().values), mean, rstd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        wiring, (stride, _eps, given) = ctx.wiring, ctx.settings
        x, inputs, z, *parameters = ctx.saved_tensors
        topology, number = wiring.topology, len(x)
        ptr, target, order = by_source(wiring.edge_index[0], wiring.rowptr)
        edges = ptr, target, wide(wiring.edge_weight)[order]
        to_parameters = [torch.empty_like(t) for t in parameters[:3]]
        to_inputs, to_states = empty(z, z.shape), empty(z, (number, *z.shape[1:]))
        levels, places = _levels(topology), _places(topology)
        maps = inputs, to_inputs, to_states
        backward(
            grad.contiguous(), levels, places, *edges, *parameters, *maps, *to_parameters, given
        )
        to_x = torch.empty_like(x)
        fused.backward(
            to_states,
            x,
            *(t[:number] for t in parameters),
            to_x,
            *(t[:number] for t in to_parameters),
            None,
            stride,
            given,
        )
        needs_weight = ctx.needs_input_grad[3]
        to_weight = ctx.correlation(z, to_inputs, ctx.dtype) if needs_weight else None
        return None, None, None, to_weight, to_x, *to_parameters, None, None


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
        levels: First node of each block other than inputs, followed by ``V``.
        places: Row of each node in ``scale`` to ``rstd`` ``[V]``; ``-1 - i`` for output ``i``.
        ptr: Row pointers ``[V + 1]``: edges into node ``v`` are ``ptr[v]`` to ``ptr[v + 1] - 1``.
        source: Sources of the edges ``[k]``.
        weight: Weights of the edges ``[k]``.
        scale: See :class:`fused.Plan`; here and below one row per node that is not an output.
        shift: See :class:`fused.Plan`.
        filters: See :class:`fused.Plan`.
        mean: See :class:`fused.Plan`.
        rstd: See :class:`fused.Plan`.
        inputs: Result ``I [V, B, H, W]``.
        z: Result ``Z [V, B, H, W]``; the states of input nodes are read.
        given: See :class:`fused.Plan`.
        eps: See :class:`fused.Plan`.
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
    """Write ``dL/dZ`` of input nodes, ``dL/dI`` of all other nodes, and gradients to parameters.

    Arguments as for :func:`forward`, except that ``levels`` begins with 0, and ``ptr``, ``target``
    and ``weight`` describe the edges out of nodes. ``grad [outputs, B, H, W]`` holds the gradients
    to the outputs.
    """
    arguments = levels, places, ptr, target, weight, scale, shift, filters, mean, rstd, inputs
    results = to_inputs, to_states, to_scale, to_shift, to_filters
    arrays = map(_jit.array, (grad, *arguments, *results))
    _kernels.backward_maps(*arrays, given, _jit.threads())


def _levels(topology: Topology) -> Tensor:
    """Return the first node of each block, with all inputs as one block, followed by ``V``."""
    others = [block.nodes.start for block in topology.blocks if block.role != Role.INPUT]
    return torch.tensor([0, *others, topology.num_nodes], device="cpu")


def _places(topology: Topology) -> Tensor:
    """Return the index of each node among the nodes that are not outputs ``[V]``.

    For output ``i``, it is ``-1 - i``.
    """
    places: list[int] = []
    others = outputs = 0
    for block in topology.blocks:
        size = len(block.nodes)
        if block.role == Role.OUTPUT:
            places += range(-1 - outputs, -1 - outputs - size, -1)
            outputs += size
        else:
            places += range(others, others + size)
            others += size
    return torch.tensor(places, device="cpu")
