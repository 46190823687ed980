"""Gradients of some hallucinated edges, drawn in a backward pass."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch import distributed as dist

from dnw_graph.topology import Block, Grouping, Topology
from dnw_graph.wiring.wiring import Wiring

Sample = tuple[Tensor, Tensor]
"""Ids of hallucinated edges ``[n]``, ascending, and their gradients ``[n]``."""


class Sampler:
    r"""Draws hallucinated edges in a backward pass, and sums up their gradients.

    The edges into a block are drawn with probabilities in proportion to a bound of their gradient,

    .. math:: p_{uv} \propto \lVert Z_u \rVert_1 \, \lVert \partial L / \partial I_v \rVert_1

    with norms over batch and pixels. In a complete block, source and target are drawn
    independently, and its candidates are never listed. Where a block sums several times (in time,
    or in several passes before a step), its edges are drawn the first time that a gradient reaches
    it, and their gradients are summed from then on.

    Source: Heddes et al. 2024, section 4 (GraBo).

    Args:
        topology: The candidates.
        edge_id: Ids of the real edges ``[k]``, ascending.
        number: Number of draws, shared out among blocks in proportion to their candidates.
            Duplicates and real edges are removed, so fewer edges may remain.
        generator: Random numbers.
    """

    def __init__(
        self, topology: Topology, edge_id: Tensor, number: int, generator: torch.Generator
    ) -> None:
        self._topology, self._edge_id, self._generator = topology, edge_id, generator
        self._share = number / topology.num_candidates
        self._offset = float(torch.rand((), generator=generator, device=generator.device))
        self._drawn: dict[int, Sample] = {}
        self._original: Tensor | None = None

    def regrouped(self, grouping: Grouping) -> "Sampler":
        """Draw from the blocks of a grouping from now on, and return the sampler itself."""
        if self._topology is not grouping.topology:
            self._original = grouping.edge_on(self._edge_id.device)
            self._edge_id, _ = grouping.regrouped(self._edge_id)
            self._topology = grouping.topology
        return self

    def observe(
        self,
        block: Block,
        states: Sequence[Tensor],
        grad: Tensor,
        correlate: Callable[[Wiring], Tensor],
    ) -> None:
        """Add the gradients of one sum over the edges into a block.

        Args:
            block: The block.
            states: States of its source blocks ``Z``, each ``[nodes, *features]``.
            grad: ``dL/dI`` ``[nodes, *features]``.
            correlate: Returns ``<Z_u, dL/dI_v>`` of the edges of a wiring.
        """
        if block.index in self._drawn:
            ids, total = self._drawn[block.index]
            self._drawn[block.index] = ids, total + correlate(self.wiring(block, ids))
            return
        ids = self._draw(block, states, grad)
        if len(ids):
            self._drawn[block.index] = ids, correlate(self.wiring(block, ids))

    def result(self) -> Sample:
        """Return what was drawn, and its gradients."""
        drawn = [self._drawn[i] for i in sorted(self._drawn)]
        ids = torch.cat([ids for ids, _ in drawn] or [self._edge_id[:0]])
        grads = torch.cat([grad for _, grad in drawn] or [ids.float()])
        if self._original is None:
            return ids, grads
        ids, order = self._original[ids].sort()
        return ids, grads[order]

    def wiring(self, block: Block, ids: Tensor) -> Wiring:
        """Return a wiring whose only edges, and only weights, are those of some ids."""
        topology, nodes = self._topology, block.nodes
        edges = topology.edges(ids)
        rowptr = ids.new_zeros(topology.num_nodes + 1)
        counts = torch.bincount(edges[1] - nodes.start, minlength=len(nodes))
        rowptr[nodes.start + 1 : nodes.stop + 1] = counts.cumsum(0)
        rowptr[nodes.stop + 1 :] = len(ids)
        before, after = block.index + 1, len(topology.blocks) - block.index
        return Wiring(
            edge_id=ids,
            rowptr=rowptr,
            edge_weight=torch.zeros(len(ids), device=ids.device),
            topology=topology,
            straight_through=False,
            others=None,
            edges=edges,
            slot=torch.arange(len(ids), device=ids.device),
            ends=(*[0] * before, *[len(ids)] * after),
        )

    def _draw(self, block: Block, states: Sequence[Tensor], grad: Tensor) -> Tensor:
        """Return the ids of the edges drawn, ascending."""
        topology, edges = self._topology, block.edges
        # Rounded so that all blocks together have the number, and small ones their turn.
        first, past = (int(e * self._share + self._offset) for e in (edges.start, edges.stop))
        source_norm, target_norm = torch.cat([_norm(z) for z in states]), _norm(grad)
        if block.complete:
            source = self._draw_proportional(source_norm, past - first)
            target = self._draw_proportional(target_norm, past - first)
            some = min(len(source), len(target))  # none where either is 0 everywhere
            ids = edges.start + target[:some] * len(source_norm) + source[:some]
        else:
            norms = source_norm.new_zeros(topology.num_nodes)
            parts = source_norm.split([len(z) for z in states])
            for i, part in zip(block.sources, parts, strict=True):
                nodes = topology.blocks[i].nodes
                norms[nodes.start : nodes.stop] = part
            every = torch.arange(edges.start, edges.stop, device=grad.device)
            source, target = topology.edges(every)
            bound = norms[source] * target_norm[target - block.nodes.start]
            ids = edges.start + self._draw_proportional(bound, past - first)
        ids, real = ids.unique(), self._edge_id
        at = torch.searchsorted(real, ids).clamp_max(len(real) - 1)
        return ids[real[at] != ids]

    def _draw_proportional(self, sizes: Tensor, number: int) -> Tensor:
        """Return indices drawn in proportion to sizes, none where these are all 0 or not finite."""
        upper = sizes.double().cumsum(0)
        device = self._generator.device
        drawn = torch.rand(number, generator=self._generator, dtype=torch.float64, device=device)
        found = torch.searchsorted(upper, drawn.to(upper.device) * upper[-1], right=True)
        return found[found < len(sizes)]


def gathered(sample: Sample) -> Sample:
    """Return what all processes drew, with the mean gradient of those that drew an edge.

    Where there are several, each has to call it.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return sample
    device = sample[0].device
    found = [sample] * dist.get_world_size()
    dist.all_gather_object(found, (sample[0].cpu(), sample[1].cpu()))
    ids, place, times = torch.cat([own for own, _ in found]).unique(
        return_inverse=True, return_counts=True
    )
    grads = torch.cat([own for _, own in found])
    total = grads.new_zeros(len(ids)).index_add_(0, place, grads)
    return ids.to(device), (total / times).to(device)


def _norm(x: Tensor) -> Tensor:
    """Return ``|x|`` summed up for each node."""
    return x.abs().flatten(1).sum(1, dtype=torch.float32)
