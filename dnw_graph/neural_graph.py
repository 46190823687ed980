"""The graph as a layer, composed of topology, rule, backend, node functions and schedule."""

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch_geometric.data import Data
from typing_extensions import override

from dnw_graph._deprecated import warn_renamed
from dnw_graph.aggregation import BACKENDS, Backend
from dnw_graph.init import Init, Start, gain_of, resolve
from dnw_graph.node import make_node
from dnw_graph.node.base import NodeFactory
from dnw_graph.precision import check_autocast
from dnw_graph.schedule import (
    SCHEDULES,
    ForwardPass,
    RecurrentState,
    Schedule,
    checked_lengths,
)
from dnw_graph.schedule.checks import check_input_shape, check_input_type, check_state
from dnw_graph.topology import Role, Topology
from dnw_graph.wiring import RULES, CandidateModule, EdgeSelector, Rule, Wiring

if TYPE_CHECKING:
    import networkx as nx


class GraphState(NamedTuple):
    """The states of all nodes between two calls, in discrete time.

    Attributes:
        states: States of all nodes ``[B, V, *features]``, in the order of the topology.
        step: Number of steps done since the start.
    """

    states: Tensor
    step: int

    def detach(self) -> "GraphState":
        """Return the state without its autograd history, for truncated backpropagation."""
        return GraphState(self.states.detach(), self.step)


class NeuralGraph(CandidateModule):
    r"""A graph whose nodes are channels and whose edges are learned along with their weights.

    .. math::
        I_v = \sum_{(u,v) \in E} w_{uv} Z_u, \qquad Z_v = f_v(I_v)

    where a rule chooses the real edges :math:`E` from the candidates of a topology on every forward
    pass (sections 2.1 and 2.2 of the paper). The input of the graph is the :math:`I` of its input
    nodes, or in time their :math:`Z` at the start; the output is the :math:`Z` of its output nodes.

    Shapes:
        - input ``[B, inputs, *features]``; for ``norm_relu_conv`` the features are ``H, W``.
          Sequences, for schedules that take or return them, are ``[B, T, ...]``.
        - output ``[B, outputs, *features]``, ``H`` and ``W`` divided by ``stride``, rounded up; a
          view with node-major memory, so use ``reshape`` rather than ``view``.

    Args:
        topology: The candidate edges.
        rule: How real edges are chosen: a name (``"dnw"``, ``"random"``, ``"complete"``, ...),
            optionally with arguments (``"rigl(every=50)"``), a class or an object.
        num_edges: The budget ``k`` of real edges; not needed for ``rule="complete"``.
        node: Node function of hidden nodes, and of input nodes unless ``input_node`` is passed: a
            name (``"identity"``, ``"relu"``, ``"norm_relu_conv"``) or a callable that builds one
            for a number of nodes.
        schedule: When nodes fire: a name (``"static"``, ``"discrete(steps=5)"``,
            ``"continuous"``), class or object.
        stride: Distance between outputs in pixels, applied at the input nodes.
        input_node: Node function of input nodes, if different. Equation 1 has none: pass
            ``"identity"``.
        output_node: Node function of output nodes.
        message: Function of a node's state that is sent along its edges in place of the state,
            built like a node function.
        init: Initial size of the weights: ``"uniform"`` as in the paper, ``"fan_in"``, which
            keeps the scale of states, an object, or a function (see docs/wirings.md). By default
            ``fan_in`` if no node function normalises or filters maps, else ``uniform``.
        backend: How messages are summed: ``"auto"``, ``"reference"``, ``"dense"``, ``"sparse"``, or
            an object.

    Attributes:
        weight: Candidate weights ``[E]``, in the order of ``topology.edge_index``; with a compact
            rule (``"gse"``), the weights of real edges ``[k]``, in the order of the wiring's
            ``slot``.
        evaluations: In continuous time, the number of evaluations of the graph in the last pass,
            ``"forward"`` and ``"backward"``.

    Raises:
        ValueError: If the budget cannot be met, the schedule cannot run the topology, or a name is
            unknown; on a forward pass, if the number of channels is wrong, an image is too small,
            or the result of the rule or of a node function is invalid.
        TypeError: If an argument has the wrong type.
    """

    fingerprint: Tensor
    input_order: Tensor | None
    output_order: Tensor | None

    def __init__(
        self,
        topology: Topology,
        *,
        rule: str | Rule | type[Rule] = "dnw",
        num_edges: int | None = None,
        node: str | NodeFactory = "norm_relu_conv",
        schedule: str | Schedule | type[Schedule] = "static",
        stride: int = 1,
        input_node: str | NodeFactory | None = None,
        output_node: str | NodeFactory = "identity",
        message: str | NodeFactory = "identity",
        init: str | Init | type[Init] | Callable[[Start], Tensor | float] | None = None,
        backend: str | Backend | type[Backend] = "auto",
    ) -> None:
        super().__init__()
        if not isinstance(topology, Topology):
            raise TypeError(
                f"topology must be a Topology, such as Topology.layered([32, 64, 10]), "
                f"got {topology!r}"
            )
        if isinstance(stride, bool) or not isinstance(stride, int):
            raise TypeError(f"stride must be a whole number of pixels, got {stride!r}")
        self.topology, self.stride = topology, stride
        rule = RULES.resolve(rule)
        self.schedule = SCHEDULES.resolve(schedule)
        self.backend = BACKENDS.resolve(backend)
        self.schedule.check(topology)
        #: The blocks whose nodes fire together and share one node function module.
        self.grouping = self.schedule.group(topology)
        self._check_backend()
        self.selector = EdgeSelector(rule, topology, rule.budget(num_edges, topology))
        self.weight = nn.Parameter(torch.empty(self.selector.num_weights))
        #: The arguments for node and message functions, by name.
        self.functions: dict[str, Any] = {
            "node": node,
            "input_node": input_node,
            "output_node": output_node,
            "message": message,
        }
        functions = {Role.INPUT: input_node or node, Role.HIDDEN: node, Role.OUTPUT: output_node}
        self.nodes = nn.ModuleList(
            make_node(functions[b.role], len(b.nodes), stride if b.role == Role.INPUT else 1)
            for b in self.grouping.topology.blocks
        )
        self.messages = nn.ModuleList(
            make_node(message, len(b.nodes)) for b in self.grouping.topology.blocks
        )
        self.init = resolve(init, self.nodes)  # type: ignore[arg-type]
        self.evaluations: dict[str, int] = {}
        fingerprint = torch.tensor(topology.fingerprint, dtype=torch.int64, device="cpu")
        self.register_buffer("fingerprint", fingerprint)
        self._reset_wiring()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self._check_fingerprint(state_dict, prefix, errors=args[-1])
        if self.grouping.topology is not self.topology:
            for kind, modules in (("nodes", self.nodes), ("messages", self.messages)):
                shapes = {f"{prefix}{kind}.{n}": v.shape for n, v in modules.state_dict().items()}
                _merge_functions(state_dict, f"{prefix}{kind}.", shapes, self)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _check_fingerprint(
        self, state_dict: dict[str, Any], prefix: str, errors: list[str]
    ) -> None:
        """Add an error if a state is of another topology, which shapes may not reveal."""
        # States saved by earlier code have no fingerprint and are not checked.
        saved = state_dict.setdefault(f"{prefix}fingerprint", self.fingerprint)
        if not saved.is_meta and int(saved) != self.topology.fingerprint:
            errors.append(
                f"{prefix}weight belongs to another topology than {self.topology}, with other "
                "candidates, roles or channels: build the graph from the topology it was saved with"
            )

    def __getstate__(self) -> dict[str, Any]:
        # Local functions cannot be pickled.
        functions = {
            k: f for k, f in self.functions.items() if "<" not in getattr(f, "__qualname__", "")
        }
        return {**self.__dict__, "functions": functions}

    def reset_parameters(self) -> None:
        """Initialise the weights, the state of the rule and the node functions again."""
        self._reset_wiring()
        _reset(self.nodes)
        _reset(self.messages)

    def _reset_wiring(self) -> None:
        bound = self.bounds()
        largest = float(bound.max())
        nn.init.uniform_(self.weight, -largest, largest)
        equal = bool((bound == largest).all())
        if not equal and not self.rule.compact:
            factor = (bound / largest).repeat_interleave(self.topology.rowptr.diff())
            self.weight.detach().mul_(factor.to(self.weight))
        self.selector.reset(self.weight)
        if not equal and self.rule.compact:  # its real edges exist only now
            wiring = self.wiring()
            factor = (bound / largest).repeat_interleave(wiring.rowptr.diff().cpu())
            self.weight.detach()[wiring.slot] *= factor.to(self.weight)
        # Schedules order maps by node number. ``input_order`` is the channel of each input node,
        # ``output_order`` the row of each output channel; None if they are in order.
        topology = self.grouping.topology
        inputs, outputs = topology.inputs.argsort(), topology.outputs.argsort().argsort()
        for name, order in (("input_order", inputs), ("output_order", outputs)):
            ordered = bool((order.diff() > 0).all())
            channels = None if ordered else order.to(self.weight.device)
            self.register_buffer(name, channels, persistent=False)

    def bounds(self) -> Tensor:
        """Return the largest initial weight of the edges into each node ``[V]``, float64."""
        topology = self.grouping.topology
        gain = torch.empty(topology.num_nodes, dtype=torch.float64, device="cpu")
        for block, node in zip(topology.blocks, self.nodes, strict=True):
            gain[self.grouping.original(block.nodes)] = gain_of(node)
        return self.init.bound(Start(self.topology, self.rule, self.num_edges, gain))

    @property
    def rule(self) -> Rule:
        """The rule that chooses the real edges."""
        return self.selector.rule

    @property
    def num_edges(self) -> int:
        """The budget ``k``."""
        return self.selector.num_edges

    @property
    @override
    def candidate_weight(self) -> nn.Parameter:
        return self.weight

    def wiring(self, training: bool = False) -> Wiring:
        """Return the real edges for the current weights, in evaluation unless ``training``."""
        return self.selector.wiring(self.weight, training)

    def forward(
        self, x: Tensor, state: GraphState | None = None, lengths: Tensor | None = None
    ) -> Tensor | tuple[Tensor, GraphState]:
        """Return the states of the output nodes; see the class for shapes.

        Args:
            x: Inputs of the input nodes.
            state: States of all nodes to start from, in discrete time: returned by an earlier call
                or by :meth:`initial_state`.
            lengths: Number of frames of each sequence ``[B]``, if they are padded to one length.
                Frames after the end of a sequence are ignored.

        Returns:
            The states of the output nodes; if ``state`` was passed, also the new state, which for
            sequences is the state after the last frame of each.

        Raises:
            ValueError: If the input, state or lengths do not fit, or the schedule does not take
                them.
            TypeError: If ``x`` is not a tensor.
        """
        self._check_input(x)
        self.evaluations = {}
        if lengths is not None:
            x = self._without_padding(x, lengths)
        recurrent = None if state is None else self._recurrent_state(state, x, lengths)
        wiring = self.wiring(self.training).regrouped(self.grouping)
        forward_pass = ForwardPass(
            wiring=wiring,
            weight=wiring.trained(self.weight),
            backend=self.backend,
            nodes=list(self.nodes),
            messages=list(self.messages),
            evaluations=self.evaluations,
            state=recurrent,
        )
        frames = [
            self._node_major(f) for f in (x.unbind(1) if self.schedule.takes_sequence else [x])
        ]
        states_of_outputs = self.schedule.run(forward_pass, frames)
        self._check_outputs(states_of_outputs)
        outputs = [self._batch_major(y) for y in states_of_outputs]
        y = torch.stack(outputs, dim=1) if self.schedule.gives_sequence else outputs[0]
        if recurrent is None:
            return y
        states, node = torch.cat(recurrent.states), self.grouping.node
        if node is not None:
            states = states[node.argsort().to(states.device)]
        return y, GraphState(states.transpose(0, 1), recurrent.step)

    def _check_outputs(self, outputs: Any) -> None:
        """Raise ValueError if a schedule did not return a list of states of the outputs."""
        expected = len(self.topology.outputs)
        if not isinstance(outputs, list | tuple):
            found = type(outputs).__name__
        elif not all(isinstance(y, Tensor) for y in outputs):
            found = f"a list of {', '.join(sorted({type(y).__name__ for y in outputs}))}"
        elif not outputs or (len(outputs) > 1 and not self.schedule.gives_sequence):
            found = f"a list of {len(outputs)}"
        elif any(len(y) != expected for y in outputs):
            found = str([list(y.shape) for y in outputs[:3]])
        else:
            return
        number = "one per step" if self.schedule.gives_sequence else "one tensor"
        raise ValueError(
            f"run of schedule {SCHEDULES.name_of(self.schedule)} must return a list of states "
            f"[{expected}, B, ...] of the outputs, {number}, got {found}"
        )

    @property
    def aggregation(self) -> Backend:
        """Deprecated name of :attr:`backend`."""
        warn_renamed("aggregation", "backend")
        return self.backend

    def initial_state(self, x: Tensor) -> GraphState:
        """Return the state before the first step, 0 everywhere, for inputs like ``x``."""
        batch, features = x.shape[0], x.shape[2 + self.schedule.takes_sequence :]
        return GraphState(x.new_zeros(batch, self.topology.num_nodes, *features), 0)

    def _without_padding(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Return sequences with 0 after their ends."""
        lengths, (batch, frames) = checked_lengths(self.schedule, x, lengths), x.shape[:2]
        mask = torch.arange(frames, device=x.device) < lengths[:, None]
        return torch.where(mask.view(batch, frames, *[1] * (x.dim() - 2)), x, 0)

    def _recurrent_state(
        self, state: GraphState, x: Tensor, lengths: Tensor | None
    ) -> RecurrentState:
        """Return a state in the form that schedules use: by block, node-major."""
        if not self.schedule.carries_state:
            raise ValueError(
                f"schedule {SCHEDULES.name_of(self.schedule)} does not take a state: states are "
                'for discrete time, schedule="discrete(...)"'
            )
        features = x.shape[2 + self.schedule.takes_sequence :]
        shape = [x.shape[0], self.topology.num_nodes, *features]
        check_state(state, GraphState, shape, x.dtype)
        states, node = state.states.transpose(0, 1), self.grouping.node
        if node is not None:
            states = states[node.to(states.device)]
        sizes = [len(block.nodes) for block in self.grouping.topology.blocks]
        lengths = None if lengths is None else torch.as_tensor(lengths, device=x.device)
        return RecurrentState(list(states.contiguous().split(sizes)), state.step, lengths)

    # Maps inside are node-major: a graph's output is a view, which the next graph reads without a
    # copy.

    def _node_major(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        return x.contiguous() if self.input_order is None else x[self.input_order]

    def _batch_major(self, y: Tensor) -> Tensor:
        return (y if self.output_order is None else y[self.output_order]).transpose(0, 1)

    @classmethod
    def from_data(
        cls,
        data: Data,
        inputs: Iterable[int] | None = None,
        outputs: Iterable[int] | None = None,
        **options: Any,
    ) -> "NeuralGraph":
        """Return a graph whose candidate edges are the edges of a PyTorch Geometric graph.

        Args:
            data: The graph; see :meth:`Topology.from_data`. If it has ``edge_weight [E]``, these
                are the weights; otherwise they are newly drawn.
            inputs: Input nodes in the order of the input's channels, instead of ``data.role``.
            outputs: Output nodes in the order of the output's channels, instead of ``data.role``.
            options: Options of :class:`NeuralGraph`. By default, ``num_edges`` is the number of
                edges, so all of them are real.

        Raises:
            ValueError: If a weight is not a finite number, their number is not that of the edges,
                or as for :meth:`Topology.from_data` and :class:`NeuralGraph`.
        """
        topology = Topology.from_data(data, inputs, outputs)
        graph = cls(topology, **{"num_edges": topology.num_candidates, **options})
        weights = data.get("edge_weight")
        if weights is None:
            return graph
        if weights.shape != (topology.num_candidates,) or not bool(weights.isfinite().all()):
            raise ValueError(
                f"edge_weight must be {topology.num_candidates} finite numbers, one per edge, got "
                f"{list(weights.shape)} of them, {int((~weights.isfinite()).sum())} not finite"
            )
        names = data.name if "name" in data else range(topology.num_nodes)
        number = {name: v for v, name in enumerate(names)}
        of_data = torch.tensor([number[name] for name in topology.names], device="cpu")
        source, target = of_data[topology.edge_index]
        keys = data.edge_index.cpu() * torch.tensor([[topology.num_nodes], [1]], device="cpu")
        keys, order = keys.sum(0).sort()
        place = order[torch.searchsorted(keys, source * topology.num_nodes + target)]
        with torch.no_grad():
            graph.selector.set_weights_of_candidates(graph.weight, weights.cpu()[place].float())
        return graph

    def to_data(self) -> Data:
        """Return the real edges as a PyTorch Geometric graph.

        Returns:
            ``Data`` with ``edge_index [2, k]``, ``edge_weight [k]``, ``block [V]``, ``role [V]``
            (:class:`Role`), ``channel [V]`` (index of inputs and outputs in the input and output;
            -1 for hidden nodes), ``name`` (:attr:`Topology.names`) and ``num_nodes``, validated, on
            the CPU; changing it does not affect the graph. :meth:`from_data` is the inverse, but
            for hallucinated edges and node functions.
        """
        wiring, topology = self.wiring(), self.topology
        channel = torch.full((topology.num_nodes,), -1, device="cpu")
        for ends in (topology.inputs, topology.outputs):
            channel[ends] = torch.arange(len(ends), device="cpu")
        data = Data(
            edge_index=topology.edges(wiring.edge_id.cpu()),
            edge_weight=wiring.edge_weight.cpu(),
            block=topology.block.clone(),
            role=topology.role.clone(),
            channel=channel,
            name=list(topology.names),
            num_nodes=topology.num_nodes,
        )
        data.validate()
        return data

    def to_networkx(self, candidates: bool = False) -> "nx.DiGraph":
        """Return the real edges as a directed graph.

        Nodes are named by :attr:`Topology.names` and have the attributes ``role``, ``block``,
        ``alive`` (whether the node has a real edge out or is an output), and for inputs and outputs
        ``channel``. Edges have ``weight``, as used in a forward pass. :func:`dnw_graph.edited`
        converts the result back to a graph.

        Args:
            candidates: Whether to include hallucinated edges. Edges then have an attribute
                ``real``, and ``weight`` is the trained weight, which a rule may replace in a pass
                (:meth:`Rule.edge_weight`); with a compact rule, only real edges have one.
        """
        graph, wiring = self.topology.nodes_to_networkx(), self.wiring()
        names, source = self.topology.names, wiring.edge_index[0].cpu()
        alive = torch.isin(torch.arange(self.topology.num_nodes, device="cpu"), source)
        alive |= self.topology.role == Role.OUTPUT
        for name, is_alive in zip(names, alive.tolist(), strict=True):
            graph.nodes[name]["alive"] = is_alive
        if candidates:
            ids = torch.arange(self.topology.num_candidates, device="cpu")
            weights = self.selector.weights_of_candidates(self.weight)
        else:
            ids, weights = wiring.edge_id.cpu(), wiring.edge_weight
        edges = self.topology.edges(ids).t().tolist()
        for (u, v), weight in zip(edges, weights.tolist(), strict=True):
            attributes = {} if candidates and math.isnan(weight) else {"weight": weight}
            graph.add_edge(names[u], names[v], **attributes)
        if candidates:
            for (u, v), real in zip(edges, wiring.mask.tolist(), strict=True):
                graph.edges[names[u], names[v]]["real"] = real
        return graph

    def validate(self) -> None:
        """Check weights and wiring; waits for the device.

        Raises:
            ValueError: If a weight is not finite, or the wiring contradicts the topology.
        """
        invalid = (~self.weight.isfinite()).nonzero().flatten()
        if len(invalid):
            raise ValueError(
                f"every edge weight must be finite, but {len(invalid):,} are not, the first at "
                f"weight[{int(invalid[0])}]"
            )
        self.wiring().validate()

    def extra_repr(self) -> str:
        """Show the topology, the rule and the budget."""
        return (
            f"{self.topology}, rule={RULES.name_of(self.rule)}, num_edges={self.num_edges:,}, "
            f"schedule={SCHEDULES.name_of(self.schedule)}, stride={self.stride}"
        )

    def _repr_html_(self) -> str:
        topology, number = self.topology, len(self.topology.blocks)
        source, target = topology.block[topology.edges(self.wiring().edge_id.cpu())]
        edges = (source * number + target).bincount(minlength=number**2).view(number, number)
        return topology.to_html(
            edges,
            f"{type(self).__name__}: {self.num_edges:,} of {topology.num_candidates:,} candidate "
            f"edges are real, rule {RULES.name_of(self.rule)}, schedule "
            f"{SCHEDULES.name_of(self.schedule)}",
        )

    def _check_backend(self) -> None:
        for block in self.grouping.topology.blocks:
            if block.edges and not self.backend.supports(block):
                raise ValueError(
                    f"backend {BACKENDS.name_of(self.backend)} does not support block "
                    f"{block.index}, where {len(block.edges):,} of {block.pairs:,} pairs of nodes "
                    'are candidates; use backend="auto"'
                )

    def _check_input(self, x: Tensor) -> None:
        expected = self.topology.num_inputs
        if not isinstance(x, Tensor):
            raise TypeError(f"expected a tensor [B, {expected}, ...], got {type(x).__name__}")
        if not torch.compiler.is_compiling():
            check_autocast(x.device)
        check_input_type(self.weight, x, "the graph")
        check_input_shape(self.schedule, expected, x)
        axis = 2 if self.schedule.takes_sequence else 1
        if x.dim() == axis + 3 and min(x.shape[axis + 1 :]) < self.stride:
            raise ValueError(
                f"feature maps of {x.shape[-2]}x{x.shape[-1]} pixels are too small for stride "
                f"{self.stride}: pass larger images, or use smaller strides in earlier layers"
            )


def _merge_functions(
    state: dict[str, Any], prefix: str, shapes: dict[str, torch.Size], graph: NeuralGraph
) -> None:
    """Merge node functions that were saved per block of the topology into those of a graph in time.

    Tensors with one row per node are concatenated; of shared tensors, the first is used.

    Args:
        state: The state to load; changed in place.
        prefix: Prefix of the functions' names.
        shapes: Shapes of the graph's own tensors, by name; if the state has these, it is unchanged.
        graph: The graph.
    """
    names = [name for name in state if name.startswith(prefix)]
    if {name: state[name].shape for name in names} == shapes:
        return
    topology, grouping, blocks = graph.topology, graph.grouping, graph.topology.blocks
    saved: dict[str, dict[int, Tensor]] = {}
    for name in names:
        index, _, parameter = name.removeprefix(prefix).partition(".")
        saved.setdefault(parameter, {})[int(index)] = state.pop(name)
    for group in grouping.topology.blocks:
        members = topology.block[grouping.original(group.nodes)].unique().tolist()
        for parameter, values in saved.items():
            parts = {i: values[i] for i in members if i in values}
            by_node = all(v.dim() and len(v) == len(blocks[i].nodes) for i, v in parts.items())
            if parts:
                whole = torch.cat([*parts.values()]) if by_node else next(iter(parts.values()))
                state[f"{prefix}{group.index}.{parameter}"] = whole


def _reset(module: nn.Module) -> None:
    """Reset the parameters of a module, or of its children if it has no ``reset_parameters``."""
    reset = getattr(module, "reset_parameters", None)
    if callable(reset):
        reset()
    else:
        for child in module.children():
            _reset(child)
