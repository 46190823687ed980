"""Sequences of several lengths, and states handed from one call to the next."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from dnw_graph import GraphState, NeuralGraph, Topology, attach
from dnw_graph.node import NormReluConv, Relu, Tanh
from tests.dnw_graph.test_grouping import EARLY_OUTPUT

READER = "discrete(steps=9, input='new', read='every')"


def reader(schedule: str = READER, topology: Topology = EARLY_OUTPUT) -> NeuralGraph:
    torch.manual_seed(0)
    return NeuralGraph(
        topology,
        num_edges=topology.num_candidates - 1,
        node=Tanh,
        output_node=Tanh,
        schedule=schedule,
    ).double()


def sequence(frames: int, batch: int = 3, inputs: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.randn(batch, frames, inputs, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    "topology", [EARLY_OUTPUT, Topology.recurrent(2, 9, 3)], ids=["renumbered", "recurrent"]
)
@pytest.mark.parametrize("cut", [1, 3, 6])
def test_a_sequence_in_parts_is_the_sequence(topology: Topology, cut: int) -> None:
    graph, x = reader(topology=topology), sequence(7)
    whole, last = graph(x, graph.initial_state(x))
    first, state = graph(x[:, :cut], graph.initial_state(x))
    second, end = graph(x[:, cut:], state)
    assert torch.allclose(torch.cat([first, second], 1), whole, atol=1e-12)
    assert torch.allclose(end.states, last.states, atol=1e-12)
    assert end.step == last.step == 7
    # Without a state, the first frame is the start, and steps go on after the last one.
    assert torch.allclose(graph(x)[:, :6], whole[:, 1:], atol=1e-12)
    outputs = last.states[:, topology.outputs]
    assert torch.allclose(outputs, whole[:, -1], atol=1e-12)


def test_what_is_read_at_the_end_is_the_last_of_what_is_read_at_every_step() -> None:
    every, end = reader(), reader("discrete(steps=9, input='new')")
    x = sequence(5)
    outputs, state = every(x, every.initial_state(x))
    last, same = end(x, end.initial_state(x))
    assert torch.equal(outputs[:, -1], last)
    assert torch.equal(state.states, same.states)


def test_padded_sequences_are_those_of_their_lengths() -> None:
    graph, x = reader(), sequence(7)
    lengths = torch.tensor([7, 2, 5])
    padded = x.clone()
    for row, length in zip(padded, lengths.tolist(), strict=True):
        row[length:] = torch.nan
    found, plain = graph(padded, lengths=lengths), graph(padded, graph.initial_state(x), lengths)
    for i, length in enumerate(lengths.tolist()):
        alone = x[i : i + 1, :length]
        assert torch.allclose(found[i], graph(alone)[0], atol=1e-12)
        outputs, state = graph(alone, graph.initial_state(alone))
        assert torch.allclose(plain[0][i, :length], outputs[0], atol=1e-12)
        assert torch.equal(plain[0][i, length:], outputs[0, -1:].expand(7 - length, -1))
        assert torch.allclose(plain[1].states[i], state.states[0], atol=1e-12)


def test_states_at_the_start_and_held_inputs() -> None:
    for words in ("input='start', read='every'", "input='held'"):
        short, long = (reader(f"discrete(steps={n}, {words})") for n in (3, 6))
        x = sequence(1)[:, 0]
        _, middle = short(x, short.initial_state(x))
        _, expected = long(x, long.initial_state(x))
        if "held" in words:
            _, found = short(x, middle)
            assert torch.allclose(found.states, expected.states, atol=1e-12)
        else:  # the inputs' states are set again
            inputs = short.topology.inputs
            kept = GraphState(middle.states.clone(), middle.step)
            _, found = short(x, kept)
            kept.states[:, inputs] = x
            assert torch.allclose(short(x, kept)[1].states, found.states, atol=1e-12)


def test_gradients_stop_where_a_state_is_detached() -> None:
    graph, x = reader(), sequence(6).requires_grad_()
    _, state = graph(x[:, :3], graph.initial_state(x))
    graph(x[:, 3:], state)[0].sum().backward()
    assert x.grad is not None
    assert bool(x.grad[:, :3].any())
    x.grad = None
    _, state = graph(x[:, :3], graph.initial_state(x))
    graph(x[:, 3:], state.detach())[0].sum().backward()
    assert not bool(x.grad[:, :3].any())
    assert bool(x.grad[:, 3:].any())


def test_a_graph_learns_to_count_by_truncated_backpropagation() -> None:
    """Whether the sum of all frames so far is positive, in chunks of 5 of sequences of 20."""
    torch.manual_seed(0)
    graph = NeuralGraph(
        Topology.recurrent(1, 24, 2),
        num_edges=300,
        node=partial(Relu, bias=True),
        input_node="identity",
        schedule="discrete(steps=9, input='new', read='every')",
    )
    optimizer = torch.optim.Adam(graph.parameters(), lr=3e-3)
    attach(graph, optimizer, total_steps=600)
    right = torch.zeros(2)
    for episode in range(150):
        x = torch.randn(32, 20, 1)
        goal = (x.cumsum(1)[..., 0] > 0).long()
        state = graph.initial_state(x)
        for part in range(0, 20, 5):
            optimizer.zero_grad()
            y, state = graph(x[:, part : part + 5], state.detach())
            late = y[:, 2:], goal[:, part : part + 3]  # two edges lead to the outputs
            nn.functional.cross_entropy(late[0].flatten(0, 1), late[1].flatten()).backward()
            nn.utils.clip_grad_norm_(graph.parameters(), 1.0)
            optimizer.step()
            if episode >= 140:
                hits = (late[0].argmax(2) == late[1]).float()
                right += torch.tensor([hits.sum(), hits.numel()])
    assert right[0] / right[1] > 0.85


def test_maps_are_carried_too() -> None:
    graph = NeuralGraph(
        Topology.recurrent(2, 5, 2),
        num_edges=20,
        node=partial(NormReluConv, norm="instance"),
        schedule="discrete(steps=4, input='new')",
    )
    x = torch.randn(2, 4, 2, 5, 5)
    y, state = graph(x, graph.initial_state(x))
    assert y.shape == (2, 2, 5, 5)
    assert state.states.shape == (2, 9, 5, 5)
    y, state = graph(x, state, torch.tensor([4, 2]))
    assert state.step == 8


def test_errors() -> None:
    graph, x = reader(), sequence(4)
    with pytest.raises(ValueError, match=r"lengths must be whole numbers \[3\] from 1 to 4"):
        graph(x, lengths=torch.tensor([4, 5, 1]))
    with pytest.raises(ValueError, match=r"lengths must be whole numbers"):
        graph(x, lengths=torch.tensor([4.0, 2.0, 1.0]))
    with pytest.raises(
        ValueError, match=r"expected a state .* states \[3, 7\] of torch.float64, got \[2, 7\]"
    ):
        graph(x, graph.initial_state(x[:2]))
    with pytest.raises(ValueError, match=r"begin with graph.initial_state"):
        graph(x, torch.zeros(3, 7))
    static = NeuralGraph(Topology.layered([2, 3]), num_edges=4, node="relu")
    with pytest.raises(ValueError, match="states are for discrete time"):
        static(torch.randn(1, 2), static.initial_state(torch.randn(1, 2)))
    with pytest.raises(ValueError, match="lengths are those of sequences"):
        static(torch.randn(1, 2), lengths=torch.tensor([1]))
