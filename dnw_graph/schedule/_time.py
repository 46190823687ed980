"""What schedules in time share: all nodes fire at once, from the states that all had before."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dnw_graph.schedule.base import AggregateFunction, ForwardPass, Schedule
from dnw_graph.topology import Grouping, Topology, by_role

States = list[Tensor]
"""States of each block ``[nodes, *features]``."""


class InTime(Schedule):
    r"""``Z(0)`` is what the graph is given on the inputs, and 0 elsewhere.

    Then :math:`f(A m(Z), t)` says what comes next: inputs may have parents, and a topology cycles.
    Node functions may have a stride: their maps are padded with zeros to the size of the states
    (Figure 2 of the paper).
    """

    keeps_size = True

    def check(self, topology: Topology) -> None:
        """See :meth:`Schedule.check`."""
        lost = topology.outputs[topology.distance[topology.outputs] < 0]
        if len(lost):
            raise ValueError(
                "no path of candidate edges leads from an input to output "
                f"{topology.describe(lost)}; add edges, or take the node out of the outputs"
            )

    def group(self, topology: Topology) -> Grouping:
        """Return one block per role: in time, all nodes fire at once."""
        return by_role(topology)


def start(forward_pass: ForwardPass, given: dict[int, Tensor]) -> States:
    """Return the first states: what is given, and 0 elsewhere."""
    like = next(iter(given.values()))
    return [
        given[b.index] if b.index in given else like.new_zeros(len(b.nodes), *like.shape[1:])
        for b in forward_pass.topology.blocks
    ]


def update(
    forward_pass: ForwardPass,
    aggregate: AggregateFunction,
    states: Sequence[Tensor],
    t: float,
    given: dict[int, Tensor] | None = None,
) -> States:
    """Return ``f(A m(Z) + X, t)`` of each block.

    Args:
        forward_pass: The graph.
        aggregate: Sums messages.
        states: ``Z``.
        t: The time.
        given: ``X``, what flows into the inputs now, by index of the block; nothing unless given.
    """
    blocks, features = forward_pass.topology.blocks, states[0].shape[2:]
    messages = [
        padded(forward_pass.send(b, z, t), features) for b, z in zip(blocks, states, strict=True)
    ]
    new = []
    for block in blocks:
        inputs = aggregate(block, messages)
        if given and block.index in given:
            inputs = inputs + given[block.index]
        new.append(padded(forward_pass.fire(block, inputs, t), features))
    return new


def padded(states: Tensor, features: Sequence[int]) -> Tensor:
    """Return maps of a size, with zeros past the end of smaller ones.

    Raises:
        ValueError: They are larger.
    """
    if states.shape[2:] == torch.Size(features):
        return states
    missing = [want - have for want, have in zip(features, states.shape[2:], strict=True)]
    if min(missing) < 0:
        raise ValueError(
            f"node functions must not enlarge feature maps: they had {list(features)} pixels, and "
            f"have {list(states.shape[2:])}"
        )
    return F.pad(states, [n for size in reversed(missing) for n in (0, size)])
