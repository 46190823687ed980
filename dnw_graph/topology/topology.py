"""The candidate graph: nodes in blocks, and the edges that a rule may choose from."""

import hashlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import index
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dnw_graph.topology import _networkx, builders
from dnw_graph.topology.builders import on_cpu
from dnw_graph.topology.order import check_edges, distances, levels, sorted_edges, walks
from dnw_graph.topology.role import Role
from dnw_graph.topology.svg import draw_blocks

if TYPE_CHECKING:
    import networkx as nx
    from torch_geometric.data import Data


@dataclass(frozen=True)
class Block:
    """Consecutive nodes of one role, evaluated together, and the candidate edges into them.

    Attributes:
        index: Position of the block in :attr:`Topology.blocks`.
        role: Role of all its nodes.
        nodes: Its nodes, ``range(first, last + 1)``.
        edges: Ids of the candidate edges into it, a contiguous range.
        sources: Indices of the blocks those edges come from, ascending.
        pairs: Number of pairs of a node of a source block and a node of this one.
    """

    index: int
    role: Role
    nodes: range
    edges: range
    sources: tuple[int, ...]
    pairs: int

    @property
    def rows(self) -> slice:
        """Its nodes as a slice, for tensors with one row per node."""
        return slice(self.nodes.start, self.nodes.stop)

    @property
    def complete(self) -> bool:
        """Whether every node of every source block may feed every node of this one.

        Its candidate weights then view as a matrix ``[len(nodes), number of source nodes]``.
        """
        return len(self.edges) == self.pairs


class Topology:
    """Candidate edges between nodes in blocks: the edges from which a rule selects the real ones.

    Nodes are numbered block by block and edges sorted by ``(target, source)``, so the candidates
    into a block are contiguous. A topology is immutable, and copies share it. Complete blocks take
    memory for their nodes only; their edges are computed on demand.

    Args:
        edge_index: Candidate edges ``[2, E]``, row 0 the sources, row 1 the targets, in any order.
        block: Block of each node ``[V]``; must not decrease.
        role: :class:`Role` of each node ``[V]``; one role per block.
        names: Names of the nodes in errors and exports. Default: their numbers.
        inputs: Input nodes in the order of the input's channels. Default: ascending.
        outputs: Output nodes in the order of the output's channels. Default: ascending.

    Raises:
        ValueError: If a node of an edge does not exist, an edge is listed twice, a block has two
            roles, or there is no input or no output.
    """

    @on_cpu
    def __init__(
        self,
        edge_index: Tensor,
        block: Tensor,
        role: Tensor,
        names: Sequence[Any] | None = None,
        inputs: Tensor | None = None,
        outputs: Tensor | None = None,
    ) -> None:
        edge_index, block, role = map(torch.as_tensor, (edge_index, block, role))
        self._set_nodes(block.long().cpu(), role.long().cpu(), names, inputs, outputs)
        source, target = sorted_edges(edge_index, self.num_nodes, self.describe)
        counts = torch.bincount(target, minlength=self.num_nodes)
        per_block = torch.zeros(int(self.block[-1]) + 1, dtype=torch.int64, device="cpu")
        per_block.index_add_(0, self.block, counts)
        self._set_edges(counts, list(source.split(per_block.tolist())))

    @classmethod
    @on_cpu
    def from_blocks(
        cls,
        blocks: Iterable[tuple[int, Role | str, Iterable[int]]],
        names: Sequence[Any] | None = None,
        inputs: Tensor | None = None,
        outputs: Tensor | None = None,
    ) -> "Topology":
        """Return a topology in which the same sources feed every node of a block.

        A block whose sources are all nodes of some blocks takes memory for its nodes only, however
        many candidates it has::

            inputs, hidden = range(3), range(3, 11)
            Topology.from_blocks([(3, "input", []), (8, "hidden", inputs), (2, "output", hidden)])

        Args:
            blocks: Of each block, in the order of its nodes' numbers: the number of nodes, their
                role, and the nodes that feed all of them.
            names: See :class:`Topology`.
            inputs: See :class:`Topology`.
            outputs: See :class:`Topology`.

        Raises:
            ValueError: If a block is empty, or a source does not exist or is listed twice; or as
                for :class:`Topology`.
        """
        sizes, kinds, lists = [], [], []
        for block in blocks:
            size, role, sources = _checked_block(block)
            sizes.append(builders.checked_size(size))
            kinds.append(Role.of(role))
            lists.append(_as_nodes(sources))
        num_nodes = sum(sizes)
        for j, sources in enumerate(lists):
            _check_sources(j, sources, num_nodes)
        repeats = torch.tensor(sizes, dtype=torch.int64)
        topology = cls.__new__(cls)
        topology._set_nodes(
            torch.arange(len(sizes)).repeat_interleave(repeats),
            torch.tensor([int(kind) for kind in kinds]).repeat_interleave(repeats),
            names,
            inputs,
            outputs,
        )
        counts = torch.tensor([len(sources) for sources in lists]).repeat_interleave(repeats)
        for j, sources in enumerate(lists):
            members = topology.block[sources].bincount(minlength=len(sizes))
            if bool(((members > 0) & (members < repeats)).any()):  # some nodes of a source block
                lists[j] = sources.repeat(sizes[j])
        topology._set_edges(counts, lists)
        return topology

    @classmethod
    @on_cpu
    def from_edges(
        cls,
        edge_index: Tensor | Sequence[Sequence[int]],
        inputs: Iterable[int],
        outputs: Iterable[int],
        num_nodes: int | None = None,
        names: Sequence[Any] | None = None,
    ) -> "Topology":
        """Return the topology of any directed graph.

        Nodes whose longest path from a source has the same length, and which have the same role,
        form a block; in a graph with a cycle, all nodes of one role do. Nodes are renumbered block
        by block, and :attr:`names` keeps the numbers or names passed here.

        Args:
            edge_index: Candidate edges ``[2, E]``.
            inputs: Nodes that take the graph's input, in the order of its channels.
            outputs: Nodes whose states are the graph's output, in the order of its channels.
            num_nodes: Number of nodes. Default: one more than the largest number in the arguments.
            names: Names of the nodes. Default: their numbers.

        Raises:
            ValueError: If a node is both input and output; or as for :class:`Topology`.
            TypeError: If inputs or outputs are not a list of whole numbers.
        """
        for ends, nodes in (("inputs", inputs), ("outputs", outputs)):
            if not isinstance(nodes, Iterable):
                raise TypeError(
                    f"{ends} must be a list of nodes, such as [{nodes!r}], got {nodes!r}"
                )
        if hasattr(edge_index, "is_directed") and hasattr(edge_index, "adj"):
            raise TypeError("edge_index is a networkx graph: use Topology.from_networkx")
        try:
            inputs, outputs = [index(v) for v in inputs], [index(v) for v in outputs]
        except TypeError as error:
            raise TypeError(f"inputs and outputs must be numbers of nodes: {error}") from None
        edge_index = torch.as_tensor(edge_index, device="cpu")
        if not edge_index.numel() and edge_index.shape[:1] == (2,):
            edge_index = edge_index.long()  # of empty lists, which have no type
        if num_nodes is None:
            largest = int(edge_index.max()) if edge_index.numel() else -1
            num_nodes = max(largest, *inputs, *outputs, -1) + 1
        check_edges(edge_index, num_nodes)
        edge_index = edge_index.long()
        _check_ends(inputs, outputs, num_nodes, names)
        role = torch.full((num_nodes,), Role.HIDDEN, device="cpu")
        role[inputs], role[outputs] = Role.INPUT, Role.OUTPUT
        level = levels(edge_index, num_nodes)
        key = role.clone() if level is None else level * len(Role) + role
        order = torch.argsort(key, stable=True)
        number = torch.empty_like(order)
        number[order] = torch.arange(num_nodes, device="cpu")
        _, block = torch.unique(key[order], return_inverse=True)
        return cls(
            number[edge_index],
            block,
            role[order],
            names=order.tolist() if names is None else [names[v] for v in order.tolist()],
            inputs=number[inputs],
            outputs=number[outputs],
        )

    @classmethod
    @on_cpu
    def from_networkx(
        cls,
        graph: "nx.DiGraph",
        inputs: Iterable[Hashable] | None = None,
        outputs: Iterable[Hashable] | None = None,
    ) -> "Topology":
        """Return a topology with the edges of a directed networkx graph as candidates.

        Args:
            graph: The graph; :attr:`names` keeps its nodes. Nodes may have the attributes ``role``
                (``"input"``, ``"hidden"``, the default, or ``"output"``), ``block`` (all nodes or
                none) and, for inputs and outputs, ``channel`` (index in the input or output).
            inputs: Input nodes in the order of the input's channels, instead of roles.
            outputs: Output nodes in the order of the output's channels, instead of roles.

        Raises:
            ValueError: If the graph is undirected, a role is unknown, inputs or outputs are not
                nodes, or channels or blocks are invalid; or as for :class:`Topology`.
            TypeError: If inputs or outputs are not a list.
        """
        nodes = _networkx.nodes_of(graph, inputs, outputs)
        names, ends = nodes["names"], (nodes["inputs"], nodes["outputs"])
        if nodes["blocks"] is None:
            return cls.from_edges(nodes["edges"], *ends, num_nodes=len(names), names=names)
        role = torch.full((len(names),), Role.HIDDEN, device="cpu")
        role[ends[0]], role[ends[1]] = Role.INPUT, Role.OUTPUT
        block = torch.tensor(nodes["blocks"], dtype=torch.int64, device="cpu")
        order = torch.argsort(block, stable=True)
        number = order.argsort()
        return cls(
            number[nodes["edges"]],
            block[order],
            role[order],
            names=[names[v] for v in order.tolist()],
            inputs=number[ends[0]],
            outputs=number[ends[1]],
        )

    @classmethod
    @on_cpu
    def from_data(
        cls,
        data: "Data",
        inputs: Iterable[int] | None = None,
        outputs: Iterable[int] | None = None,
    ) -> "Topology":
        """Return a topology with the edges of a PyTorch Geometric graph as candidates.

        Args:
            data: The graph, with ``edge_index [2, E]``. It may have ``role [V]`` (:class:`Role`),
                ``channel [V]`` (index of inputs and outputs in the input and output; by default,
                they are in order) and ``name`` (one per node, kept as :attr:`names`; by default,
                the numbers of the nodes).
            inputs: Input nodes in the order of the input's channels, instead of roles.
            outputs: Output nodes in the order of the output's channels, instead of roles.

        Raises:
            ValueError: If there is no ``edge_index``, or neither ``role`` nor inputs and outputs;
                or as for :meth:`from_edges`.
            TypeError: If ``data`` has no nodes and edges, or as for :meth:`from_edges`.
        """
        if getattr(data, "edge_index", None) is None:
            raise ValueError(
                f"expected a torch_geometric.data.Data with edge_index, got {type(data).__name__} "
                "without it"
            )
        ends: list[Iterable[int]] = []
        for nodes, role in ((inputs, Role.INPUT), (outputs, Role.OUTPUT)):
            if nodes is None and "role" not in data:
                raise ValueError(
                    "expected data.role, with a Role for each node, or inputs and outputs: pass "
                    "inputs=[...] and outputs=[...]"
                )
            if nodes is None:
                nodes = (data.role == role).nonzero().flatten()
                if "channel" in data:
                    nodes = nodes[data.channel[nodes].argsort(stable=True)]
                nodes = nodes.tolist()
            ends.append(nodes)
        return cls.from_edges(
            data.edge_index.cpu(),
            inputs=ends[0],
            outputs=ends[1],
            num_nodes=data.num_nodes,
            names=list(data.name) if "name" in data else None,
        )

    @classmethod
    def layered(cls, sizes: Sequence[int], skip: bool = True) -> "Topology":
        """Return blocks in a row: the first holds the inputs, the last the outputs.

        Args:
            sizes: Number of nodes of each block, at least two blocks.
            skip: Whether any earlier block may feed any later one; otherwise only adjacent blocks.

        Raises:
            ValueError: If there are fewer than two blocks, or one is empty.
        """
        return cls.from_blocks(builders.layered(sizes, skip))

    @classmethod
    def bipartite(cls, inputs: int, outputs: int) -> "Topology":
        """Return a topology in which each input may feed each output, as in a linear layer.

        Args:
            inputs: Number of inputs.
            outputs: Number of outputs.

        Raises:
            ValueError: If there is no input or no output.
        """
        return cls.layered([inputs, outputs])

    @classmethod
    def complete(cls, inputs: int, hidden: int, outputs: int, acyclic: bool = False) -> "Topology":
        """Return a topology in which any node may feed any node, itself included.

        Args:
            inputs: Number of inputs.
            hidden: Number of hidden nodes.
            outputs: Number of outputs.
            acyclic: Whether edges lead to later nodes only. Each hidden node is then a block, and
                nothing feeds inputs or is fed by outputs.

        Raises:
            ValueError: If there is no input or no output, or the number of hidden nodes is
                negative.
        """
        return cls.from_blocks(builders.complete(inputs, hidden, outputs, acyclic))

    @classmethod
    def recurrent(cls, inputs: int, hidden: int, outputs: int) -> "Topology":
        """Return the topology of an Elman network (Elman 1990), for a schedule in time.

        Inputs may feed hidden nodes, and these each other, themselves and the outputs.

        Args:
            inputs: Number of inputs.
            hidden: Number of hidden nodes.
            outputs: Number of outputs.

        Raises:
            ValueError: If one of the numbers is less than 1.
        """
        return cls.from_blocks(builders.recurrent(inputs, hidden, outputs))

    @classmethod
    def grid(cls, rows: int, columns: int, reach: int = 1) -> "Topology":
        """Return columns of nodes, each fed by nearby nodes of the column before.

        Args:
            rows: Number of nodes in a column.
            columns: Number of columns; the first holds the inputs, the last the outputs.
            reach: Largest distance in rows between a node and one that feeds it.

        Raises:
            ValueError: If there are no rows or fewer than two columns, or the reach is negative.
        """
        return cls.from_edges(*builders.grid(rows, columns, reach))

    @classmethod
    def random_dag(
        cls, kind: str, nodes: int, inputs: int, outputs: int, *, seed: int = 0, **parameters: Any
    ) -> "Topology":
        """Return a random graph whose edges lead from lower to higher numbers (Xie et al. 2019).

        The first nodes are the inputs, the last the outputs. Edges into inputs and out of outputs
        are left out. All inputs feed a node that has no other source, and a node that feeds no
        other node feeds all outputs.

        Args:
            kind: ``"erdos_renyi"`` (``p``, probability of an edge), ``"watts_strogatz"`` (``k``
                neighbours, ``p``, probability of rewiring) or ``"barabasi_albert"`` (``m`` edges
                of each new node).
            nodes: Number of nodes, inputs and outputs included.
            inputs: Number of inputs.
            outputs: Number of outputs.
            seed: Seed of the random graph.
            parameters: Parameters of the random graph.

        Raises:
            ValueError: If the kind is unknown, a parameter is missing, unknown or out of range, or
                there are more inputs and outputs than nodes.
        """
        return cls.from_edges(
            *builders.random_dag(kind, nodes, inputs, outputs, seed=seed, **parameters)
        )

    def to_networkx(self) -> "nx.DiGraph":
        """Return the candidates as a directed graph.

        Nodes are named by :attr:`names` and have the attributes ``role`` and ``block``, inputs and
        outputs also ``channel``. :meth:`from_networkx` converts the result back.
        """
        graph, names = self.nodes_to_networkx(), self.names
        graph.add_edges_from((names[u], names[v]) for u, v in self.edge_index.t().tolist())
        return graph

    def nodes_to_networkx(self) -> "nx.DiGraph":
        """Return the nodes as a directed graph without edges; see :meth:`to_networkx`."""
        import networkx as nx

        names, graph = self.names, nx.DiGraph()
        channel = {int(v): i for ends in (self.inputs, self.outputs) for i, v in enumerate(ends)}
        for v, (role, block) in enumerate(
            zip(self.role.tolist(), self.block.tolist(), strict=True)
        ):
            graph.add_node(names[v], role=Role(role).name.lower(), block=block)
            if v in channel:
                graph.nodes[names[v]]["channel"] = channel[v]
        return graph

    @property
    def edge_index(self) -> Tensor:
        """Candidates ``[2, E]``, int64, sorted by ``(target, source)``; computed on each access."""
        return self.edges(torch.arange(self.num_candidates, device="cpu"))

    def edges(self, edge_id: Tensor, target: Tensor | None = None) -> Tensor:
        """Return sources and targets ``[2, n]``, int64, of candidates by id.

        Args:
            edge_id: Ids ``[n]``.
            target: Targets ``[n]``, if known.
        """
        rowptr, block, table, lists = self._on(edge_id.device)
        if target is None:
            target = torch.searchsorted(rowptr, edge_id, right=True) - 1
        first_edge, first, length = lists[:, block[target]]
        return torch.stack([table[first + (edge_id - first_edge) % length].long(), target])

    def rowptr_on(self, device: torch.device) -> Tensor:
        """Return :attr:`rowptr` on a device."""
        return self._on(device)[0]

    def source_lists_on(self, device: torch.device) -> tuple[Tensor, ...]:
        """Return the sources of the candidates into each block; if complete, into one node."""
        lengths = [
            len(b.edges) // len(b.nodes) if b.complete else len(b.edges) for b in self.blocks
        ]
        return self._on(device)[2].split(lengths)

    def out_degree_on(self, device: torch.device) -> Tensor:
        """Return the number of candidates out of each node ``[V]`` on a device."""

        def make() -> tuple[Tensor]:
            degree = torch.zeros(self.num_nodes, dtype=torch.int64, device="cpu")
            lists = self.source_lists_on(torch.device("cpu"))
            for block, sources in zip(self.blocks, lists, strict=True):
                times = len(block.nodes) if block.complete else 1
                degree += times * torch.bincount(sources, minlength=self.num_nodes)
            return (degree,)

        return self.copies_on("out-degree", device, make)[0]

    def by_source_on(self, block: Block, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the order of the candidates into a block by source, on a device.

        Returns:
            Indices ``[E of the block]`` that sort the candidates, and ``[V + 1]`` where those out
            of each node begin.
        """

        def make() -> tuple[Tensor, Tensor]:
            ids = torch.arange(block.edges.start, block.edges.stop, device="cpu")
            ordered, order = self.edges(ids)[0].sort(stable=True)
            ends = torch.searchsorted(ordered, torch.arange(self.num_nodes + 1, device="cpu"))
            return order, ends

        order, ends = self.copies_on(f"block {block.index} by source", device, make)
        return order, ends

    def places_on(self, block: Block, device: torch.device) -> Tensor:
        """Return the positions of the candidates into a block in its matrix, on a device.

        The matrix ``[len(block.nodes), sources]`` has a column for each node of a source block.

        Returns:
            Indices ``[E of the block]`` into the flattened matrix, ascending.
        """

        def make() -> tuple[Tensor]:
            ids = torch.arange(block.edges.start, block.edges.stop, device="cpu")
            source, target = self.edges(ids)
            column = torch.zeros(self.num_nodes, dtype=torch.int64, device="cpu")
            width = 0
            for i in block.sources:
                nodes = self.blocks[i].nodes
                columns = torch.arange(width, width + len(nodes), device="cpu")
                column[nodes.start : nodes.stop] = columns
                width += len(nodes)
            return ((target - block.nodes.start) * width + column[source],)

        return self.copies_on(f"places of block {block.index}", device, make)[0]

    def places_of_all_on(self, device: torch.device) -> Tensor:
        """Return the indices of candidates in a flattened matrix ``[V, V]``, targets by sources."""

        def make() -> tuple[Tensor]:
            source, target = self.edge_index
            return (target * self.num_nodes + source,)

        return self.copies_on("places", device, make)[0]

    def sources_of_all_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the ids of all candidates and their sources ``[E]`` each, on a device."""
        ids, sources = self.copies_on(
            "sources",
            device,
            lambda: (torch.arange(self.num_candidates, device="cpu"), self.edge_index[0]),
        )
        return ids, sources

    def copies_on(
        self, name: str, device: torch.device, make: Callable[[], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """Return tensors about the topology on a device; they are computed and copied there once.

        Args:
            name: Key under which they are stored.
            device: The device.
            make: Function that computes them on the CPU.
        """
        key = f"{name} on {device}"
        if key not in self._copies:
            self._copies[key] = tuple(x.to(device) for x in make())
        return self._copies[key]

    def _on(self, device: torch.device) -> tuple[Tensor, ...]:
        """Return the tables in which edges are looked up, on a device."""
        return self.copies_on(
            "edges", device, lambda: (self.rowptr, self.block, self._table, self._lists)
        )

    @property
    def num_inputs(self) -> int:
        """Number of input nodes."""
        return len(self.inputs)

    @property
    def num_outputs(self) -> int:
        """Number of output nodes."""
        return len(self.outputs)

    @property
    def num_sources(self) -> int:
        """Number of nodes with a candidate edge out, the ``n`` of the initial distribution."""
        return len(self._table.unique())

    @cached_property
    def depth(self) -> int | None:
        """Length in edges of the longest path of candidates; ``None`` if there is a cycle."""
        level = levels(self.edge_index, self.num_nodes)
        return None if level is None else int(level.max())

    @cached_property
    def distance(self) -> Tensor:
        """Number of edges on a shortest path from an input to each node ``[V]``; -1 without one."""
        return distances(self.edge_index, self.num_nodes, self.inputs)

    @cached_property
    def fingerprint(self) -> int:
        """A 63-bit hash of roles, blocks, candidates and channels; names do not change it."""
        digest = hashlib.sha256()
        parts = (self.block, self.role, self.inputs, self.outputs, self.rowptr, self._table.long())
        for part in parts:
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part.contiguous().numpy().tobytes())
        return int.from_bytes(digest.digest()[:8], "little") >> 1

    def walks_from_inputs(self, length: int) -> Tensor:
        """Return the nodes where walks of ``length`` edges from an input end, ascending."""
        return walks(self.edge_index, self.num_nodes, self.inputs, length)

    def describe(self, nodes: Iterable[int], most: int = 5) -> str:
        """Return the names of some nodes for an error message."""
        nodes = [int(v) for v in nodes]
        shown = ", ".join(repr(self.names[v]) for v in nodes[:most])
        return shown + (f" and {len(nodes) - most} more" if len(nodes) > most else "")

    def __repr__(self) -> str:
        sizes = [len(b.nodes) for b in self.blocks]
        blocks = f"{sizes}" if len(sizes) <= 20 else f"<{len(sizes)} of {self.num_nodes:,} nodes>"
        return f"Topology(blocks={blocks}, num_candidates={self.num_candidates:,})"

    def _repr_html_(self) -> str:
        edges = torch.zeros(len(self.blocks), len(self.blocks), dtype=torch.int64, device="cpu")
        for block in self.blocks:
            if len(block.sources) == 1:
                edges[block.sources[0], block.index] = len(block.edges)
            elif block.edges:
                ids = torch.arange(block.edges.start, block.edges.stop, device="cpu")
                sources = self.block[self.edges(ids)[0]]
                edges[:, block.index] = sources.bincount(minlength=len(self.blocks))
        return self.to_html(edges, f"{self.num_candidates:,} candidate edges")

    def to_html(self, edges: Tensor, caption: str) -> str:
        """Return HTML with a picture of the blocks.

        Args:
            edges: Number of edges from block to block.
            caption: Text above the picture.
        """
        sizes, roles = ([len(b.nodes) for b in self.blocks], [b.role for b in self.blocks])
        return draw_blocks(sizes, roles, edges.numpy(), caption)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_copies": {}}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Topology":
        return self

    def _set_nodes(
        self,
        block: Tensor,
        role: Tensor,
        names: Sequence[Any] | None = None,
        inputs: Tensor | None = None,
        outputs: Tensor | None = None,
    ) -> None:
        self.num_nodes = len(block)
        self._copies: dict[str, tuple[Tensor, ...]] = {}
        self.names: Sequence[Any] = range(self.num_nodes) if names is None else tuple(names)
        self._check_nodes(block, role)
        self.block, self.role = torch.unique_consecutive(block, return_inverse=True)[1], role
        self.inputs = self._nodes_of(Role.INPUT, inputs)
        self.outputs = self._nodes_of(Role.OUTPUT, outputs)

    def _set_edges(self, counts: Tensor, sources: Sequence[Tensor]) -> None:
        """Set the candidates.

        Args:
            counts: Number of edges into each node ``[V]``.
            sources: For each block, the sources of its edges, or those of one node if all its nodes
                have the same.
        """
        #: Candidates into node ``v`` are ``rowptr[v]`` to ``rowptr[v + 1] - 1``. ``[V + 1]``
        self.rowptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        self.num_candidates = int(self.rowptr[-1])
        self.blocks = tuple(self._blocks(sources))
        lists = [
            nodes[: len(block.edges) // len(block.nodes)] if block.complete else nodes
            for block, nodes in zip(self.blocks, sources, strict=True)
        ]
        # The edge with id e into block b comes from table[first + (e - first_edge) % length].
        self._table = torch.cat([nodes.int() for nodes in lists])
        lengths = torch.tensor([len(nodes) for nodes in lists], device="cpu")
        first_edge = torch.tensor([block.edges.start for block in self.blocks], device="cpu")
        self._lists = torch.stack([first_edge, lengths.cumsum(0) - lengths, lengths.clamp_min(1)])

    def _check_nodes(self, block: Tensor, role: Tensor) -> None:
        if block.shape != role.shape or block.dim() != 1 or len(self.names) != len(block):
            raise ValueError(
                "block, role and names must have one entry per node, got "
                f"{tuple(block.shape)}, {tuple(role.shape)} and {len(self.names)}"
            )
        if len(set(self.names)) < len(block):
            shared = [name for name, number in Counter(self.names).items() if number > 1]
            raise ValueError(f"names of nodes must be unique, but several are called {shared[:5]}")
        if not set(role.tolist()) <= set(Role):
            unknown = sorted(set(role.tolist()) - set(Role))
            raise ValueError(f"unknown roles {unknown}; known: {[f'{r.name}={r}' for r in Role]}")
        if Role.INPUT not in role or Role.OUTPUT not in role:
            raise ValueError(
                "a topology needs at least one input node and one output node: pass inputs and "
                'outputs, or set role="input" and role="output" on nodes of a networkx graph'
            )
        decreases = block.diff() < 0
        if bool(decreases.any()):
            v = int(decreases.nonzero()[0])
            raise ValueError(
                f"nodes must be numbered block by block, but node {self.describe([v])} of block "
                f"{int(block[v])} comes before node {self.describe([v + 1])} of block "
                f"{int(block[v + 1])}; Topology.from_edges renumbers them"
            )
        mixed = (block.diff() == 0) & (role.diff() != 0)
        if bool(mixed.any()):
            v = int(mixed.nonzero()[0])
            raise ValueError(
                f"block {int(block[v])} mixes roles: node {self.describe([v])} is "
                f"{Role(int(role[v])).name}, node {self.describe([v + 1])} is "
                f"{Role(int(role[v + 1])).name}; put them in different blocks (in a networkx "
                "graph, change the attribute block, or remove it from all nodes)"
            )

    def _nodes_of(self, role: Role, ordered: Tensor | None) -> Tensor:
        nodes = (self.role == role).nonzero().flatten()
        if ordered is None:
            return nodes
        if not torch.equal(ordered.sort().values, nodes):
            raise ValueError(
                f"{role.name.lower()}s must list each {role.name.lower()} node once: expected "
                f"{self.describe(nodes)} in any order, got {self.describe(ordered)}"
            )
        return ordered.long().cpu()

    def _blocks(self, source_lists: Sequence[Tensor]) -> Iterable[Block]:
        _, sizes = torch.unique_consecutive(self.block, return_counts=True)
        starts = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        member = torch.arange(len(sizes), device="cpu").repeat_interleave(sizes)
        for j in range(len(sizes)):
            nodes = range(int(starts[j]), int(starts[j + 1]))
            edges = range(int(self.rowptr[nodes.start]), int(self.rowptr[nodes.stop]))
            sources = tuple(member[source_lists[j]].unique().tolist())
            pairs = len(nodes) * sum(int(sizes[i]) for i in sources)
            yield Block(j, Role(int(self.role[nodes.start])), nodes, edges, sources, pairs)


def _check_ends(
    inputs: list[int], outputs: list[int], num_nodes: int, names: Sequence[Any] | None
) -> None:
    """Raise ValueError unless inputs and outputs are different nodes that exist and have names."""
    if names is not None and len(names) != num_nodes:
        raise ValueError(f"names must name each of the {num_nodes} nodes, got {len(names)}")
    if both := sorted(set(inputs) & set(outputs)):
        shown = [v if names is None else names[v] for v in both[:5]]
        raise ValueError(f"a node is either an input or an output, but {shown} are both")
    for ends, nodes in (("inputs", inputs), ("outputs", outputs)):
        if outside := [v for v in nodes if not 0 <= v < num_nodes]:
            raise ValueError(f"{ends} {outside[:5]} are not among the {num_nodes} nodes")


def _checked_block(block: Any) -> tuple[int, Role | str, Iterable[int]]:
    """Return a block of :meth:`Topology.from_blocks`; raise TypeError if it is not a triple."""
    if not isinstance(block, tuple | list) or len(block) != 3 or not isinstance(block[2], Iterable):
        raise TypeError(
            "a block must be (number of nodes, role, numbers of the nodes that feed it), such as "
            f'(8, "hidden", range(3)), got {block!r}'
        )
    size, role, sources = block
    return size, role, sources


def _as_nodes(nodes: Iterable[int]) -> Tensor:
    """Return numbers of nodes, ascending."""
    if isinstance(nodes, range):
        nodes = torch.arange(nodes.start, nodes.stop, nodes.step)
    numbers = nodes if isinstance(nodes, Tensor) else torch.tensor([index(v) for v in nodes])
    return numbers.long().cpu().sort().values


def _check_sources(block: int, sources: Tensor, num_nodes: int) -> None:
    """Raise ValueError unless ascending sources of a block exist, each listed once."""
    if len(sources) and not (int(sources[0]) >= 0 and int(sources[-1]) < num_nodes):
        raise ValueError(
            f"block {block} has sources from {int(sources[0])} to {int(sources[-1])}, but there "
            f"are {num_nodes} nodes, numbered from 0"
        )
    if bool((sources.diff() == 0).any()):
        repeated = int(sources[1:][sources.diff() == 0][0])
        raise ValueError(f"block {block} lists source {repeated} more than once")
