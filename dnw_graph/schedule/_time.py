"""Common code of schedules in time, where all nodes fire at once, from their previous states."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from dnw_graph.schedule.base import AggregateFunction, ForwardPass, Schedule, check_outputs
from dnw_graph.topology import Grouping, Topology, by_role

States = list[Tensor]
"""States of each block ``[nodes, *features]``."""


class InTime(Schedule):
    r"""Base class of schedules in time, with ``Z(0)`` set on the inputs and 0 elsewhere.

    :math:`f(A m(Z), t)` determines the next states, so inputs may have parents, and a topology may
    have cycles. Node functions may have a stride: their maps are padded with zeros to the size of
    the states (Figure 2 of the paper).
    """

    keeps_size = True

    @override
    def check(self, topology: Topology) -> None:
        if not self.allows_constant_outputs:
            check_outputs(topology, topology.distance >= 0)

    @override
    def group(self, topology: Topology) -> Grouping:
        """Return one block per role: in time, all nodes fire at once."""
        return by_role(topology)


def start(forward_pass: ForwardPass, states: dict[int, Tensor]) -> States:
    """Return the first states of each block: those in ``states``, and 0 for other blocks."""
    like = next(iter(states.values()))
    return [
        states[b.index] if b.index in states else like.new_zeros(len(b.nodes), *like.shape[1:])
        for b in forward_pass.topology.blocks
    ]


def update(
    forward_pass: ForwardPass,
    aggregate: AggregateFunction,
    states: Sequence[Tensor],
    t: float,
    x: dict[int, Tensor] | None = None,
) -> States:
    """Return ``f(A m(Z) + X, t)`` of each block.

    Args:
        forward_pass: The graph.
        aggregate: Sums messages.
        states: ``Z``.
        t: The time.
        x: ``X``, which is added to the inputs of input nodes, by index of the block; None for 0.
    """
    blocks, features = forward_pass.topology.blocks, states[0].shape[2:]
    messages = [
        padded(forward_pass.send(b, z, t), features) for b, z in zip(blocks, states, strict=True)
    ]
    new = []
    for block in blocks:
        inputs = aggregate(block, messages)
        if x and block.index in x:
            inputs = inputs + x[block.index]
        new.append(padded(forward_pass.fire(block, inputs, t), features))
    return new


def padded(states: Tensor, features: Sequence[int]) -> Tensor:
    """Return maps padded with zeros at the end to the size ``features``.

    Raises:
        ValueError: If the maps are larger.
    """
    if states.shape[2:] == torch.Size(features):
        return states
    missing = [want - have for want, have in zip(features, states.shape[2:], strict=True)]
    if min(missing) < 0:
        raise ValueError(
            f"node functions must not enlarge feature maps: expected at most {list(features)} "
            f"pixels, got {list(states.shape[2:])}"
        )
    return F.pad(states, [n for size in reversed(missing) for n in (0, size)])
