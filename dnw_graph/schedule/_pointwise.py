"""A static graph of pointwise node functions as one function, in compiled code.

A graph of many small blocks spends most time between blocks, which the kernels in
:mod:`dnw_graph.schedule._kernels` avoid.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dnw_graph import _jit
from dnw_graph._arena import empty
from dnw_graph.aggregation import TYPES, Correlation, wide
from dnw_graph.node import Bias, Gelu, Identity, Linear, Relu, Tanh
from dnw_graph.precision import accepted_dtype
from dnw_graph.schedule import _kernels
from dnw_graph.schedule.base import ForwardPass, is_identity, is_observed
from dnw_graph.wiring import Wiring

KINDS = {
    "identity": _kernels.IDENTITY,
    "relu": _kernels.RELU,
    "gelu": _kernels.GELU,
    "tanh": _kernels.TANH,
}
KNOWN = (Bias, Gelu, Identity, Linear, Relu, Tanh)


def run(forward_pass: ForwardPass, x: Tensor) -> Tensor | None:
    """Return the states of the output nodes, or None if the graph is not of this kind.

    Args:
        forward_pass: The graph.
        x: Inputs of the input nodes ``[inputs, *features]``, in node order.

    Returns:
        States ``[outputs, *features]``, in node order.
    """
    wiring = forward_pass.wiring
    x = x.to(accepted_dtype(x))
    if not x.is_cpu or x.dtype not in TYPES or not x.numel() or wiring.sampler is not None:
        return None
    if not forward_pass.backend.by_edge(wiring) or not all(
        map(_supports, forward_pass.nodes, forward_pass.messages)
    ):
        return None
    like = wide(wiring.edge_weight)
    scale, shift = (_affine(forward_pass.nodes, name, like) for name in ("scale", "bias"))
    keeps_inputs = scale is not None or shift is not None or _needs_inputs(forward_pass)
    tensors = _kinds(forward_pass), forward_pass.weight, x, scale, shift
    result: Tensor = _Function.apply(wiring, Correlation(wiring), keeps_inputs, *tensors)
    return result


def _supports(node: nn.Module, message: nn.Module) -> bool:
    """Return whether compiled code supports the modules of a block, which must have no hooks."""
    if is_observed(node) or is_observed(message):
        return False
    return is_identity(message) and type(node) in KNOWN


def _kinds(forward_pass: ForwardPass) -> Tensor:
    """Return the kind of each node's activation ``[V]``, int8."""
    kinds = [KINDS[node.activation] for node in forward_pass.nodes]  # type: ignore[index]
    sizes = torch.tensor([len(block.nodes) for block in forward_pass.topology.blocks], device="cpu")
    by_block = torch.tensor(kinds, dtype=torch.int8, device="cpu")
    return by_block.repeat_interleave(sizes)


def _needs_inputs(forward_pass: ForwardPass) -> bool:
    """Return whether the derivative of an activation cannot be computed from its output."""
    return any(node.activation == "gelu" for node in forward_pass.nodes)


def _affine(nodes: Any, name: str, like: Tensor) -> Tensor | None:
    """Return the factors or biases of all nodes ``[V]``; None if no node has one."""
    parameters = [getattr(node, name) for node in nodes]
    if all(part is None for part in parameters):
        return None
    neutral = 1.0 if name == "scale" else 0.0
    parts = [
        torch.full((node.num_nodes,), neutral, dtype=like.dtype, device=like.device)
        if part is None
        else part.to(like.dtype)
        for node, part in zip(nodes, parameters, strict=True)
    ]
    return torch.cat(parts)


class _Function(torch.autograd.Function):
    """Computes all nodes in order, and in reverse order in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        wiring: Wiring,
        correlation: Correlation,
        keeps_inputs: bool,
        kinds: Tensor,
        weight: Tensor,
        x: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
    ) -> Tensor:
        topology = wiring.topology
        shape = topology.num_nodes, *x.shape[1:]
        inputs = empty(x, shape) if keeps_inputs else x.new_empty(0, *x.shape[1:])
        z = empty(x, shape)
        forward(*_edges(wiring), x.contiguous(), scale, shift, kinds, inputs, z)
        ctx.wiring, ctx.correlation, ctx.dtype = wiring, correlation, weight.dtype
        ctx.save_for_backward(scale, shift, kinds, inputs, z)
        return z.index_select(0, wiring.topology.outputs.sort().values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wiring, (scale, shift, kinds, inputs, z) = ctx.wiring, ctx.saved_tensors
        to_inputs = empty(z, z.shape)
        width = 0 if scale is None and shift is None else len(z)
        affine_dtype = torch.float64 if ctx.dtype == torch.float64 else torch.float32
        to_affine = torch.empty(_tiles(z), 2, width, dtype=affine_dtype, device=z.device)
        backward(
            grad.contiguous(),
            wiring.topology.outputs.sort().values,
            *_edges(wiring),
            scale,
            shift,
            kinds,
            inputs,
            z,
            to_inputs,
            to_affine,
        )
        to_scale, to_shift = to_affine.sum(0)
        needs_grad = ctx.needs_input_grad
        return (
            *[None] * 4,
            ctx.correlation(z, to_inputs, ctx.dtype) if needs_grad[4] else None,
            to_inputs[: wiring.topology.num_inputs] if needs_grad[5] else None,
            to_scale if needs_grad[6] else None,
            to_shift if needs_grad[7] else None,
        )


@torch.library.custom_op("dnw_graph::static", mutates_args=("inputs", "z"), device_types="cpu")
def forward(
    ptr: Tensor,
    source: Tensor,
    weight: Tensor,
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    kinds: Tensor,
    inputs: Tensor,
    z: Tensor,
) -> None:
    """Write the states of all nodes.

    Args:
        ptr: Row pointers ``[V + 1]``: edges into node ``v`` are ``ptr[v]`` to ``ptr[v + 1] - 1``.
        source: Sources of the edges ``[k]``.
        weight: Weights of the edges ``[k]``.
        x: ``I`` of the input nodes, which are first ``[inputs, *features]``, contiguous.
        scale: ``a [V]``; None for 1.
        shift: ``b [V]``; None for 0.
        kinds: Activation of each node ``[V]``, int8.
        inputs: Result ``I [V, *features]``; empty if it is not needed.
        z: Result ``Z [V, *features]``.
    """
    arrays = [_jit.array(t) for t in (ptr, source, weight, _rows(x))]
    affine = [_jit.array(weight[:0] if t is None else t) for t in (scale, shift)]
    maps = [_jit.array(t) for t in (kinds, _rows(inputs), _rows(z))]
    _kernels.forward(*arrays, *affine, *maps, _tile(z))


@torch.library.custom_op(
    "dnw_graph::static_backward", mutates_args=("to_inputs", "to_affine"), device_types="cpu"
)
def backward(
    grad: Tensor,
    output: Tensor,
    ptr: Tensor,
    source: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    kinds: Tensor,
    inputs: Tensor,
    z: Tensor,
    to_inputs: Tensor,
    to_affine: Tensor,
) -> None:
    """Write ``dL/dI [V, *features]``, and each tile's part of ``dL/da``, ``dL/db [tiles, 2, V]``.

    Arguments as for :func:`forward`. ``grad [outputs, *features]`` holds the gradients to the
    states of the nodes ``output [outputs]``.
    """
    arrays = [_jit.array(t) for t in (_rows(grad), output, ptr, source, weight)]
    affine = [_jit.array(weight[:0] if t is None else t) for t in (scale, shift)]
    maps = [_jit.array(t) for t in (kinds, _rows(inputs), _rows(z), _rows(to_inputs), to_affine)]
    _kernels.backward(*arrays, *affine, *maps, _tile(z))


def _edges(wiring: Wiring) -> tuple[Tensor, Tensor, Tensor]:
    return wiring.rowptr, wiring.edge_index[0], wide(wiring.edge_weight)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(len(x), x.shape[1:].numel())


def _tile(z: Tensor) -> int:
    """Return the number of columns of a tile, chosen so that all nodes' columns fit in cache."""
    columns = z[0].numel()
    fits = _CACHE // (len(z) * z.element_size())
    return max(16, min(fits, -(-columns // 4)) // 16 * 16)


def _tiles(z: Tensor) -> int:
    return -(-z[0].numel() // _tile(z))


_CACHE = 1 << 19  # bytes
