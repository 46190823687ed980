"""Selection and rules."""

import dataclasses
import time

import numba
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dnw_graph import NeuralGraph, Topology
from dnw_graph.wiring import select, top_k
from dnw_graph.wiring.select import _top_k_by_bits
from tests.fake_gpu import GPU, fake_gpu, peak_memory


def by_sorting(weight: Tensor, k: int) -> Tensor:
    order = torch.sort(weight.abs(), descending=True, stable=True).indices
    return order[:k].sort().values


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    size = draw(st.integers(1, 300))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    values = torch.randn(size, generator=generator, dtype=torch.float64)
    if draw(st.booleans()):  # many ties, zeros of both signs among them
        values = (values * 2).round() * draw(st.sampled_from([0.0, 1.0, 1e-41, 1e30]))
    return values.to(dtype).clamp(-1e4, 1e4) if dtype is torch.float16 else values.to(dtype)


def by_kernels(weight: Tensor, k: int) -> Tensor:
    """Return what :func:`top_k` does where there are many weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select, "_SMALL", 0)
        return top_k(weight, k)


@given(weights(), st.data())
@pytest.mark.parametrize(
    "ways", [top_k, by_kernels, _top_k_by_bits], ids=["cpu", "many, on a cpu", "on a gpu"]
)
def test_top_k_equals_a_stable_sort(ways, weight: Tensor, data: st.DataObject) -> None:  # noqa: ANN001
    k = data.draw(st.integers(1, len(weight)))
    assert torch.equal(ways(weight, k), by_sorting(weight, k))


@pytest.mark.parametrize("kind", ["random", "hidden from the sample", "in the sample", "equal"])
@pytest.mark.parametrize("k", [1, 700, 20_000])
def test_top_k_among_many(kind: str, k: int) -> None:
    """Beyond 131,072 weights a sample is asked first; right or wrong, the result is exact."""
    size = 400_000
    step = size // select._NUM_LINES
    weight = torch.randn(size)
    sampled = torch.arange(size) % step < select._LINE_SIZE
    if kind == "hidden from the sample":
        weight[~sampled & (torch.arange(size) % step < 2 * select._LINE_SIZE)] *= 1e6
    elif kind == "in the sample":
        weight[sampled] *= 1e6
    elif kind == "equal":
        weight = weight.sign()
    expected = by_sorting(weight, k)
    assert torch.equal(top_k(weight, k), expected)
    assert torch.equal(by_kernels(weight, k), expected)


@pytest.mark.parametrize("kind", ["random", "equal", "two values"])
@pytest.mark.parametrize("k", [1, 70_000, 250_000])
def test_top_k_on_a_gpu_goes_through_parts(
    kind: str, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(select, "_PART", 60_000)
    weight = torch.randn(250_000)
    if kind != "random":
        weight = weight.sign() if kind == "equal" else (weight > 0.5) + 0.1 * weight.sign()
    assert torch.equal(_top_k_by_bits(weight, k), by_sorting(weight, k))


def test_top_k_on_a_gpu_needs_little_memory() -> None:
    size, k = 8_650_000, 1_730_000
    with fake_gpu(), peak_memory() as peak:
        weight = torch.randn(size, device=GPU)
        before = peak()
        _top_k_by_bits(weight, k)
    # A copy of the weights, a mask, the ids twice, and the ranks of one part.
    assert peak() - before < 4 * size + size + 2 * 8 * k + 64 * select._PART


def test_top_k_on_each_device_waits_for_nothing(device: str) -> None:
    weight = torch.randn(50_000)
    weight[::3] = weight[0]
    on_device = weight.to(device)
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        chosen = top_k(on_device, 20_000)
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(chosen.cpu(), by_sorting(weight, 20_000))


def test_top_k_does_not_depend_on_the_number_of_threads() -> None:
    weight = torch.randint(-3, 4, (600_000,)).float()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = top_k(weight, 300_000)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, top_k(weight, 300_000))


@pytest.mark.parametrize(
    ("weight", "k", "message"),
    [
        (torch.randn(10), 11, r"k must be between 1 and the number of weights, 10, got 11"),
        (torch.randn(10), 0, r"got 0"),
        (torch.randn(2, 5), 3, r"floating-point tensor of shape \[E\], got torch.float32 \[2, 5\]"),
        (torch.arange(10), 3, r"got torch.int64"),
    ],
)
def test_top_k_of_what_cannot_be_ranked(weight: Tensor, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        top_k(weight, k)


def test_kernels_obey_torchs_thread_count() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        by_kernels(torch.randn(100), 5)
        assert numba.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("choose", [top_k, by_kernels])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named(value: float, choose) -> None:  # noqa: ANN001
    weight = torch.randn(1000)
    weight[321] = value
    with pytest.raises(ValueError, match=r"weight 321 is .*lower the learning rate"):
        choose(weight, 5)


def test_selection_is_many_times_faster_than_torch_topk() -> None:
    """8.65 million weights: 9 ms against 136 ms on two cores (benchmarks/selection.md)."""
    weight = torch.randn(8_650_000)

    def best(run) -> float:  # noqa: ANN001
        seen = []
        for _ in range(5):
            start = time.perf_counter()
            run()
            seen.append(time.perf_counter() - start)
        return min(seen)

    k, threads = 200_000, torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for each other measure what else is running
    try:
        ours, theirs = best(lambda: top_k(weight, k)), best(lambda: weight.abs().topk(k))
    finally:
        torch.set_num_threads(threads)
    assert ours * 4 < theirs


def test_random_wirings_differ_by_seed_only_and_survive_a_checkpoint() -> None:
    def make(seed: int) -> NeuralGraph:
        torch.manual_seed(seed)
        return NeuralGraph(Topology.layered([6, 8, 5]), rule="random", num_edges=31)

    first, again, other = make(1), make(1), make(2)
    assert torch.equal(first.wiring().edge_id, again.wiring().edge_id)
    assert not torch.equal(first.wiring().edge_id, other.wiring().edge_id)
    other.load_state_dict(first.state_dict())
    assert torch.equal(first.wiring().edge_id, other.wiring().edge_id)


def test_random_wirings_are_uniform() -> None:
    """Each candidate is drawn with probability k / E; false alarm below 1e-6 over all of them."""
    topology = Topology.layered([3, 3, 3])
    drawn = torch.zeros(topology.num_candidates)
    graph, turns = NeuralGraph(topology, rule="random", num_edges=9), 2000
    for _ in range(turns):
        graph.reset_parameters()
        drawn[graph.wiring().edge_id] += 1
    expected = turns * 9 / topology.num_candidates
    deviation = (turns * (1 / 3) * (2 / 3)) ** 0.5
    assert float((drawn - expected).abs().max()) < 6 * deviation


def test_validate_notices_a_wiring_at_odds_with_its_topology() -> None:
    graph = NeuralGraph(Topology.layered([6, 8, 5]), num_edges=31)
    good = graph.wiring()
    for change, message in [
        ({"edge_id": good.edge_id.flip(0)}, "ascending"),
        ({"edge_id": good.edge_id + 118}, r"from 0 to 117"),
        ({"rowptr": good.rowptr.flip(0)}, "rowptr of the wiring does not match"),
        ({"edges": good.edges.flip(0)}, "edge_index of the wiring does not match"),
        (
            {"edge_weight": good.edge_weight[1:]},
            r"edge_weight must have shape \[31\], one number per real edge",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(good, **change).validate()


def test_a_wiring_lists_its_edges_in_three_ways() -> None:
    graph = NeuralGraph(Topology.layered([6, 8, 5]), num_edges=31)
    wiring, everything = graph.wiring(), graph.topology.edge_index
    assert torch.equal(wiring.mask.nonzero().flatten(), wiring.edge_id)
    assert torch.equal(wiring.edge_index, everything[:, wiring.edge_id])
    for v in range(graph.topology.num_nodes):
        into = wiring.edge_index[:, wiring.rowptr[v] : wiring.rowptr[v + 1]]
        assert torch.equal(into, wiring.edge_index[:, wiring.edge_index[1] == v])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_edges": 119}, r"between 1 and the number of candidate .* 118, got 119"),
        ({"num_edges": 0}, r"between 1 and the number of candidate .* 118, got 0"),
        ({}, r"num_edges.*is missing.*complete"),
        (
            {"rule": "dwn", "num_edges": 3},
            r"unknown rule 'dwn'; did you mean 'dnw'\? \(known: complete, constant_fan_in, dnw",
        ),
    ],
)
def test_errors(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NeuralGraph(Topology.layered([6, 8, 5]), **options)
    with pytest.raises(TypeError, match="rule must be a name"):
        NeuralGraph(Topology.layered([6, 8, 5]), rule=3, num_edges=3)
