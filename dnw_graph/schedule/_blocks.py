"""A static graph of ``norm_relu_conv`` nodes as one function that does not store states.

This is the schedule ``static`` for the node function of the paper's image networks, computed as a
whole: the forward runs the same operators in the same order, and the backward visits blocks by
source. Of the maps, only the inputs of nodes are stored for the backward; the node function's
backward, which reads those inputs anyway, computes the states again.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dnw_graph._arena import empty
from dnw_graph.aggregation.whole import WholeGraph
from dnw_graph.node import NormReluConv, fused
from dnw_graph.precision import accepted_dtype
from dnw_graph.schedule.base import ForwardPass, is_identity, is_observed
from dnw_graph.topology import Block, Role


def run(forward_pass: ForwardPass, x: Tensor) -> Tensor | None:
    """Return the states of the output nodes, or None if the graph is not of this kind.

    Args:
        forward_pass: The graph.
        x: Inputs of the input nodes ``[inputs, B, H, W]``, in node order.

    Returns:
        States ``[outputs, B, H / stride, W / stride]``, in node order.
    """
    blocks, nodes = forward_pass.topology.blocks, forward_pass.nodes
    if x.dim() != 4 or forward_pass.wiring.sampler is not None:
        return None
    ends = {block.index for block in blocks if block.role == Role.OUTPUT}
    if not all(map(_supports, blocks, nodes, forward_pass.messages)):
        return None
    if any(ends.intersection(block.sources) for block in blocks):  # outputs that feed others
        return None
    products = forward_pass.backend.whole_graph(forward_pass.wiring)
    if products is None:
        return None
    x, stride = x.to(accepted_dtype(x)), int(nodes[0].stride)  # type: ignore[arg-type]
    plans: list[fused.Plan] = []
    nodes_and_maps: list[tuple[NormReluConv, Tensor]] = []
    for block, node in zip(blocks, nodes, strict=True):
        if isinstance(node, NormReluConv):
            maps = _like_inputs(x, block, stride)
            plan = node.plan(maps)
            if plan is None:
                return None
            plans.append(plan)
            nodes_and_maps.append((node, maps))
    tensors = [t for p in plans for t in (p.scale, p.shift, p.filters, p.mean, p.rstd)]
    settings = [(p.stride, p.eps, p.given) for p in plans]
    y, *statistics = _Function.apply(products, settings, forward_pass.weight, x, *tensors)
    for i, (node, maps) in enumerate(nodes_and_maps):
        mean, rstd = statistics[2 * i : 2 * i + 2]
        node.update_statistics(mean, rstd, maps[0].numel())
    result: Tensor = y
    return result


def _supports(block: Block, node: nn.Module, message: nn.Module) -> bool:
    """Return whether the function below supports a block, whose modules must have no hooks."""
    if is_observed(node) or is_observed(message):
        return False
    if not is_identity(message):
        return False
    if block.role == Role.INPUT:
        return type(node) is NormReluConv
    supported = is_identity(node) if block.role == Role.OUTPUT else type(node) is NormReluConv
    return supported and block.complete and len(block.edges) > 0


def _like_inputs(x: Tensor, block: Block, stride: int) -> Tensor:
    """Return a tensor with the shape of a block's inputs that uses almost no memory."""
    _, batch, height, width = x.shape
    if block.role != Role.INPUT:
        height, width = -(-height // stride), -(-width // stride)
    return x.new_empty(1).expand(len(block.nodes), batch, height, width)


class _Function(torch.autograd.Function):
    """Computes all blocks, with the products of a backend; the backward goes in reverse order."""

    @staticmethod
    def forward(
        ctx: Any,
        products: WholeGraph,
        settings: list[tuple[int, float, bool]],
        weight: Tensor,
        x: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        blocks = products.topology.blocks
        states: dict[int, Tensor] = {}
        inputs: list[Tensor] = []
        outputs: list[Tensor] = []
        statistics: list[Tensor] = []
        row = 0
        for block in blocks:
            if block.role == Role.INPUT:
                maps = x[row : row + len(block.nodes)]
                row += len(block.nodes)
            else:
                maps = products.aggregate(block, {i: states[i] for i in block.sources})
            if block.role == Role.OUTPUT:
                outputs.append(maps)
                continue
            i = len(inputs)
            arguments = tensors[5 * i : 5 * i + 5]
            mean, rstd = (t.clone() for t in arguments[3:])
            z = empty(maps, fused.shape(maps, settings[i][0]))
            fused.forward(maps, *arguments[:3], mean, rstd, z, *settings[i])
            states[block.index] = z
            inputs.append(maps)
            statistics += [mean, rstd]
        ctx.products, ctx.settings = products, settings
        parameters = [t for i in range(len(inputs)) for t in tensors[5 * i : 5 * i + 3]]
        ctx.save_for_backward(weight, *inputs, *parameters, *statistics)
        ctx.mark_non_differentiable(*statistics)
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return y, *statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        products, settings = ctx.products, ctx.settings
        weight, *saved = ctx.saved_tensors
        number = len(settings)
        inputs, parameters = saved[:number], saved[number : 4 * number]
        statistics = saved[4 * number :]
        blocks = products.topology.blocks
        others = [block for block in blocks if block.role != Role.OUTPUT]
        to_inputs: dict[int, Tensor] = {}
        grad, row = grad.contiguous(), 0
        for block in blocks:
            if block.role == Role.OUTPUT:
                to_inputs[block.index] = grad[row : row + len(block.nodes)]
                row += len(block.nodes)
        needs_weight = ctx.needs_input_grad[2]
        to_weight = torch.zeros_like(weight) if needs_weight else None
        to_tensors: list[Tensor | None] = [None] * (5 * number)
        edges = products.edges_by_source()
        for i in reversed(range(number)):
            block = others[i]
            target_grads = {j: g for j, g in to_inputs.items() if block.index in blocks[j].sources}
            (stride, _, given), maps = settings[i], inputs[i]
            to_maps = empty(maps, maps.shape)
            state_grad = empty(maps, fused.shape(maps, stride))
            state = empty(maps, state_grad.shape) if needs_weight else None
            if target_grads:
                products.push(block, target_grads, edges, state_grad)
            else:
                state_grad.zero_()
            grads = [torch.empty_like(t) for t in parameters[3 * i : 3 * i + 3]]
            arguments = maps, *parameters[3 * i : 3 * i + 3], *statistics[2 * i : 2 * i + 2]
            fused.backward(state_grad, *arguments, to_maps, *grads, state, stride, given)
            to_inputs[block.index], to_tensors[5 * i : 5 * i + 3] = to_maps, grads
            if to_weight is not None and target_grads:
                products.correlate(block, state, target_grads, edges, to_weight)
            del state_grad, state  # so that the next block's gradients can reuse their memory
        to_x = [to_inputs[block.index] for block in others if block.role == Role.INPUT]
        return None, None, to_weight, to_x[0] if len(to_x) == 1 else torch.cat(to_x), *to_tensors
