"""The three products of a whole graph, with a backward that visits blocks by source."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from dnw_graph._arena import empty
from dnw_graph.aggregation import _kernels, _matmul
from dnw_graph.topology import Block
from dnw_graph.wiring import Wiring

PAIRS = 16
"""Largest number of pairs of nodes per candidate for which dense products are faster."""


def suits_dense_products(candidates: int, pairs: int) -> bool:
    """Return whether enough pairs of nodes are candidates for dense products to be faster."""
    return PAIRS * candidates >= pairs


ByBlock = Mapping[int, Tensor]
"""States, or gradients to inputs, ``[nodes, *features]`` by index of the block."""


class WholeGraph(ABC):
    """The products that :class:`Backend` computes by target block; here the backward is by source.

    The gradient to a block's states is then one sum over all blocks that it feeds, without partial
    sums, and its states are needed only once. Blocks must be complete.

    Args:
        wiring: The real edges.
    """

    def __init__(self, wiring: Wiring) -> None:
        self.wiring, self.topology = wiring, wiring.topology

    @abstractmethod
    def aggregate(self, block: Block, states: ByBlock) -> Tensor:
        """Return the inputs ``I`` of a block, given the states of the blocks that feed it."""

    def edges_by_source(self) -> Any:
        """Return data for :meth:`push` and :meth:`correlate`, once per backward pass."""
        return None

    @abstractmethod
    def push(self, block: Block, grads: ByBlock, edges: Any, out: Tensor) -> None:
        """Write ``dL/dZ`` of a block into ``out``, given ``dL/dI`` of all blocks that it feeds."""

    @abstractmethod
    def correlate(
        self, block: Block, state: Tensor, grads: ByBlock, edges: Any, out: Tensor
    ) -> None:
        """Write the gradients to the trained weights of edges out of a block into ``out``.

        These are the edges in the wiring's :attr:`~Wiring.with_gradient`, or all candidates if that
        is None. ``out`` must be 0 elsewhere.
        """

    def _correlate_all(self, block: Block, state: Tensor, grads: ByBlock, out: Tensor) -> None:
        """Write ``dL/dI Z^T`` of every candidate, as one large product per target block."""
        products = _matmul.outer([state], list(grads.values()), out.dtype)
        rows = products.split([len(grad) for grad in grads.values()])
        for target, product in zip(grads, rows, strict=True):
            self._between(out, block.index, target).copy_(product)

    def _between(self, values: Tensor, source: int, target: int) -> Tensor:
        """Return the entries of ``[E]`` between two blocks, as a view ``[targets, sources]``."""
        blocks = self.topology.blocks
        to = blocks[target]
        before = sum(len(blocks[i].nodes) for i in to.sources if i < source)
        rows = values[to.edges.start : to.edges.stop].view(len(to.nodes), -1)
        return rows[:, before : before + len(blocks[source].nodes)]


class SparseWholeGraph(WholeGraph):
    """Products over real edges only."""

    @override
    def aggregate(self, block: Block, states: ByBlock) -> Tensor:
        wiring = self.wiring
        edges = wiring.edge_weight, wiring.edge_index[0], wiring.rowptr
        return _kernels.gather(*edges, _range(block), *self._listed(states))

    @override
    def edges_by_source(self) -> Any:
        """Return the edges for ``push`` and ``correlate``, sorted by ``(source, target)``."""
        wiring, trained = self.wiring, self.wiring.with_gradient
        ptr, target, order = _by_source(wiring)
        real = wiring.edge_weight[order], ptr, target
        if trained is None or trained is wiring:
            return real, (ptr, target, wiring.position[order])
        ptr, target, order = _by_source(trained)
        return real, (ptr, target, trained.position[order])

    @override
    def push(self, block: Block, grads: ByBlock, edges: Any, out: Tensor) -> None:
        _kernels.push(*edges[0], _range(block), *self._listed(grads), out)

    @override
    def correlate(
        self, block: Block, state: Tensor, grads: ByBlock, edges: Any, out: Tensor
    ) -> None:
        if self.wiring.straight_through:
            self._correlate_all(block, state, grads, out)
        else:
            _kernels.dots(out, *edges[1], _range(block), state, *self._listed(grads))

    def _listed(self, tensors: ByBlock) -> tuple[list[int], list[Tensor]]:
        """Return first nodes and tensors of the blocks, in block order."""
        indices = sorted(tensors)
        starts = [self.topology.blocks[i].nodes.start for i in indices]
        return starts, [tensors[i] for i in indices]


class DenseWholeGraph(WholeGraph):
    """Dense products with zeros at hallucinated edges; never waits for the device."""

    def __init__(self, wiring: Wiring) -> None:
        super().__init__(wiring)
        self._weight = wiring.candidate_weight
        trained = wiring.with_gradient
        self._mask = None if trained is None else trained.mask

    @override
    def aggregate(self, block: Block, states: ByBlock) -> Tensor:
        weights = {i: self._real(i, block.index, z.dtype) for i, z in states.items()}
        like = next(iter(states.values()))
        out = empty(like, (len(block.nodes), *like.shape[1:]))
        _sum_of_products(weights, states, out)
        return out

    @override
    def push(self, block: Block, grads: ByBlock, edges: Any, out: Tensor) -> None:
        weights = {j: self._real(block.index, j, g.dtype).t() for j, g in grads.items()}
        _sum_of_products(weights, grads, out)

    @override
    def correlate(
        self, block: Block, state: Tensor, grads: ByBlock, edges: Any, out: Tensor
    ) -> None:
        self._correlate_all(block, state, grads, out)
        if self._mask is not None:
            for target in grads:
                mask = self._between(self._mask, block.index, target)
                self._between(out, block.index, target).mul_(mask)

    def _real(self, source: int, target: int, dtype: torch.dtype) -> Tensor:
        """Return the weights between two blocks ``[targets, sources]``, 0 without a real edge."""
        return self._between(self._weight, source, target).to(dtype)


class Correlation:
    """Computes ``<Z_u, dL/dI_v>`` of the trained weights of a whole graph at once.

    Args:
        wiring: The real edges. Gradients are computed for the edges in its
            :attr:`~Wiring.with_gradient`, or for all candidates if that is None.
    """

    def __init__(self, wiring: Wiring) -> None:
        topology, trained = wiring.topology, wiring.with_gradient
        self._nodes = topology.num_nodes
        self._size = topology.num_candidates if wiring.slot is None else len(wiring.edge_id)
        device = wiring.edge_id.device
        self._places = self._edges = None
        if trained is not None:
            self._edges = trained.position, trained.edge_index[0], trained.rowptr
        elif suits_dense_products(topology.num_candidates, topology.num_nodes**2):
            self._places = topology.places_of_all_on(device)
        else:
            ids, sources = topology.sources_of_all_on(device)
            self._edges = ids, sources, topology.rowptr_on(device)

    def __call__(self, states: Tensor, grads: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the gradients ``[E]``, or ``[k]`` if only real edges have weights; 0 elsewhere.

        Args:
            states: ``Z [V, *features]``.
            grads: ``dL/dI [V, *features]``.
            dtype: Type of the result.
        """
        if self._places is not None:
            return _matmul.outer([states], [grads], dtype).flatten()[self._places]
        assert self._edges is not None
        out = torch.zeros(self._size, dtype=dtype, device=states.device)
        return _kernels.correlate(out, *self._edges, [0, self._nodes, 0], [0], [states], grads)


def _by_source(wiring: Wiring) -> tuple[Tensor, Tensor, Tensor]:
    return _kernels.by_source(wiring.edge_index[0], wiring.rowptr)


def _range(block: Block) -> list[int]:
    return [block.nodes.start, block.nodes.stop]


def _sum_of_products(weights: ByBlock, maps: ByBlock, out: Tensor) -> None:
    """Write the sum of ``weights[i] @ maps[i]`` into ``out [rows, *features]``."""
    flat = _matmul.matrix(out)
    for number, (i, x) in enumerate(maps.items()):
        _matmul.add_product(weights[i], _matmul.matrix(x), flat, first=number == 0)
