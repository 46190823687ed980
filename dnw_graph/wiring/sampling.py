"""Gradients of some hallucinated edges, drawn while a gradient passes through."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch import distributed as dist

from dnw_graph.topology import Block, Topology
from dnw_graph.wiring.wiring import Wiring


class Sampler:
    r"""Draws hallucinated edges in a backward pass, and sums up their gradients.

    In each block, edges are drawn with a probability in proportion to a bound of their gradient,

    .. math:: p_{uv} \propto \lVert Z_u \rVert_1 \, \lVert \partial L / \partial I_v \rVert_1

    over batch and pixels, source and target apart from each other, so that no candidate is ever
    listed. Where a block sums several times (in time, or in several passes before a step), edges
    are drawn the first time, and their gradients are of all.

    Source: Heddes et al. 2024, section 4 (GraBo).

    Args:
        topology: The candidates.
        edge_id: Ids of the real edges ``[k]``, ascending; never drawn.
        number: How many are drawn, shared out among blocks by their candidates. What is drawn
            twice or is real is left out.
        generator: Random numbers.
    """

    def __init__(
        self, topology: Topology, edge_id: Tensor, number: int, generator: torch.Generator
    ) -> None:
        self._topology, self._edge_id, self._number = topology, edge_id, number
        self._generator = generator
        self._drawn: dict[int, tuple[Wiring, Tensor]] = {}

    def observe(
        self,
        block: Block,
        states: Sequence[Tensor],
        grad: Tensor,
        correlate: Callable[[Wiring], Tensor],
    ) -> None:
        """Add the gradients of a pass through a block.

        Args:
            block: The block.
            states: States of its source blocks ``Z``, each ``[nodes, *features]``.
            grad: ``dL/dI`` ``[nodes, *features]``.
            correlate: Returns ``<Z_u, dL/dI_v>`` of the edges of a wiring.
        """
        if block.index not in self._drawn:
            ids = self._draw(block, states, grad)
            wiring = self._wiring(block, ids)
            self._drawn[block.index] = wiring, correlate(wiring)
        else:
            wiring, total = self._drawn[block.index]
            self._drawn[block.index] = wiring, total + correlate(wiring)

    def result(self) -> tuple[Tensor, Tensor]:
        """Return ids, ascending, and gradients ``[n]``: those of all processes of a training."""
        drawn = [self._drawn[i] for i in sorted(self._drawn)]
        ids = torch.cat([wiring.edge_id for wiring, _ in drawn] or [self._edge_id[:0]])
        grads = torch.cat([grad for _, grad in drawn] or [torch.zeros(0, device=ids.device)])
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return ids, grads
        found: list[tuple[Tensor, Tensor]] = [(ids, grads)] * dist.get_world_size()
        dist.all_gather_object(found, (ids.cpu(), grads.cpu()))
        every, place = torch.cat([own for own, _ in found]).unique(return_inverse=True)
        total = torch.cat([own for _, own in found])
        summed = total.new_zeros(len(every)).index_add_(0, place, total)
        return every.to(ids.device), summed.to(ids.device)

    def _draw(self, block: Block, states: Sequence[Tensor], grad: Tensor) -> Tensor:
        """Return the ids of the edges drawn, ascending."""
        topology, edges = self._topology, block.edges
        number = round(self._number * len(edges) / topology.num_candidates)
        loud, steep = torch.cat([_size(z) for z in states]), _size(grad)
        if block.complete:
            source, target = self._categories(loud, number), self._categories(steep, number)
            some = min(len(source), len(target))  # none where all of either are 0
            ids = edges.start + target[:some] * len(loud) + source[:some]
        else:
            sizes = loud.new_zeros(topology.num_nodes)
            first = 0
            for i in block.sources:
                nodes = topology.blocks[i].nodes
                sizes[nodes.start : nodes.stop] = loud[first : first + len(nodes)]
                first += len(nodes)
            every = torch.arange(edges.start, edges.stop, device=grad.device)
            source, target = topology.edges(every)
            bound = sizes[source] * steep[target - block.nodes.start]
            ids = edges.start + self._categories(bound, number)
        ids, real = ids.unique(), self._edge_id
        at = torch.searchsorted(real, ids).clamp_max(len(real) - 1)
        return ids[real[at] != ids]

    def _categories(self, sizes: Tensor, number: int) -> Tensor:
        """Return categories drawn in proportion to sizes, none where all are 0."""
        upper = sizes.double().cumsum(0)
        device = self._generator.device
        drawn = torch.rand(number, generator=self._generator, dtype=torch.float64, device=device)
        found = torch.searchsorted(upper, drawn.to(upper.device) * upper[-1], right=True)
        return found[found < len(sizes)]

    def _wiring(self, block: Block, ids: Tensor) -> Wiring:
        """Return edges into one block as the only ones of a wiring, and the only weights."""
        edges, nodes = self._topology.edges(ids), block.nodes
        rowptr = ids.new_zeros(self._topology.num_nodes + 1)
        counts = torch.bincount(edges[1] - nodes.start, minlength=len(nodes))
        rowptr[nodes.start + 1 : nodes.stop + 1] = counts.cumsum(0)
        return Wiring(
            edge_id=ids,
            rowptr=rowptr,
            edge_weight=torch.zeros(len(ids), device=ids.device),
            topology=self._topology,
            straight_through=False,
            others=None,
            edges=edges,
            slot=torch.arange(len(ids), device=ids.device),
        )


def _size(x: Tensor) -> Tensor:
    """Return ``|x|`` summed up for each node."""
    return x.abs().flatten(1).sum(1, dtype=torch.float32)
