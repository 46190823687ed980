"""Sampling of hallucinated edges and their gradients in a backward pass."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch import distributed as dist

from dnw_graph.topology import Block, Grouping, Topology
from dnw_graph.wiring.wiring import Wiring

Sample = tuple[Tensor, Tensor]
"""Ids of hallucinated edges ``[n]``, ascending, and their gradients ``[n]``."""


class Sampler:
    r"""Draws hallucinated edges in a backward pass, and sums their gradients.

    The edges into a block are drawn with probabilities proportional to a bound of their gradient,

    .. math:: p_{uv} \propto \lVert Z_u \rVert_1 \, \lVert \partial L / \partial I_v \rVert_1

    with norms over batch and pixels. In a complete block, source and target are drawn
    independently, and the candidates are never listed. If a block is evaluated several times (in
    time, or in several passes before a step), its edges are drawn when a gradient first reaches it,
    and their gradients are summed from then on.

    Source: Heddes et al. 2024, section 4 (GraBo).

    Args:
        topology: The candidates.
        edge_id: Ids of the real edges ``[k]``, ascending.
        number: Number of draws, distributed among blocks in proportion to their candidates.
            Duplicates and real edges are removed, so fewer edges may remain.
        generator: Generator of the random draws.
    """

    def __init__(
        self, topology: Topology, edge_id: Tensor, number: int, generator: torch.Generator
    ) -> None:
        self._topology, self._edge_id, self._generator = topology, edge_id, generator
        self._share = number / topology.num_candidates
        self._offset = float(torch.rand((), generator=generator, device=generator.device))
        self._samples: dict[int, Sample] = {}
        self._original_ids: Tensor | None = None

    def regrouped(self, grouping: Grouping) -> "Sampler":
        """Switch to the blocks of a grouping, and return the sampler itself."""
        if self._topology is not grouping.topology:
            self._original_ids = grouping.edge_on(self._edge_id.device)
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
        """Add the gradients of one evaluation of a block.

        Args:
            block: The block.
            states: States of its source blocks ``Z``, each ``[nodes, *features]``.
            grad: ``dL/dI`` ``[nodes, *features]``.
            correlate: Function that returns ``<Z_u, dL/dI_v>`` of the edges of a wiring.
        """
        if block.index in self._samples:
            ids, total = self._samples[block.index]
            self._samples[block.index] = ids, total + correlate(self.wiring(block, ids))
            return
        ids = self._draw(block, states, grad)
        if len(ids):
            self._samples[block.index] = ids, correlate(self.wiring(block, ids))

    def result(self) -> Sample:
        """Return the ids of the edges drawn so far, ascending, and their gradients."""
        samples = [self._samples[i] for i in sorted(self._samples)]
        ids = torch.cat([ids for ids, _ in samples] or [self._edge_id[:0]])
        grads = torch.cat([grad for _, grad in samples] or [ids.float()])
        if self._original_ids is None:
            return ids, grads
        ids, order = self._original_ids[ids].sort()
        return ids, grads[order]

    def wiring(self, block: Block, ids: Tensor) -> Wiring:
        """Return a wiring with only the edges of ``ids``, all into one block."""
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
        # Rounding cumulative numbers, with a random offset, keeps the total over all blocks right,
        # and small blocks get a draw in some steps.
        first, end = (int(e * self._share + self._offset) for e in (edges.start, edges.stop))
        source_norm, target_norm = torch.cat([_norm(z) for z in states]), _norm(grad)
        if block.complete:
            source = self._draw_proportional(source_norm, end - first)
            target = self._draw_proportional(target_norm, end - first)
            number = min(len(source), len(target))  # 0 if either norm is 0 everywhere
            ids = edges.start + target[:number] * len(source_norm) + source[:number]
        else:
            norms = source_norm.new_zeros(topology.num_nodes)
            parts = source_norm.split([len(z) for z in states])
            for i, part in zip(block.sources, parts, strict=True):
                norms[topology.blocks[i].rows] = part
            all_ids = torch.arange(edges.start, edges.stop, device=grad.device)
            source, target = topology.edges(all_ids)
            bound = norms[source] * target_norm[target - block.nodes.start]
            ids = edges.start + self._draw_proportional(bound, end - first)
        ids, real = ids.unique(), self._edge_id
        place = torch.searchsorted(real, ids).clamp_max(len(real) - 1)
        return ids[real[place] != ids]

    def _draw_proportional(self, sizes: Tensor, number: int) -> Tensor:
        """Return indices drawn in proportion to sizes; none if all are 0 or any is not finite."""
        upper = sizes.double().cumsum(0)
        device = self._generator.device
        uniform = torch.rand(number, generator=self._generator, dtype=torch.float64, device=device)
        indices = torch.searchsorted(upper, uniform.to(upper.device) * upper[-1], right=True)
        return indices[indices < len(sizes)]


def gathered(sample: Sample) -> Sample:
    """Return the edges drawn in any process, each with its mean gradient over these processes.

    With several processes, all of them must call this.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return sample
    device = sample[0].device
    samples = [sample] * dist.get_world_size()
    dist.all_gather_object(samples, (sample[0].cpu(), sample[1].cpu()))
    ids, place, counts = torch.cat([ids for ids, _ in samples]).unique(
        return_inverse=True, return_counts=True
    )
    grads = torch.cat([grad for _, grad in samples])
    total = grads.new_zeros(len(ids)).index_add_(0, place, grads)
    return ids.to(device), (total / counts).to(device)


def _norm(x: Tensor) -> Tensor:
    """Return the sum of ``|x|`` of each node."""
    return x.abs().flatten(1).sum(1, dtype=torch.float32)
