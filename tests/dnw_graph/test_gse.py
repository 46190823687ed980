"""Guided stochastic exploration: weights of real edges only, gradients of some others."""

import copy
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from dnw_graph import NeuralGraph, Topology, attach, edited, freeze, sparsify
from dnw_graph.wiring import GSE, Candidates, Sampler
from dnw_graph.wiring.sampling import gathered
from dnw_graph.wiring.wiring import Selection

LAYERED = Topology.layered([6, 8, 5])
BLOCK = [0] * 5 + [1] * 6 + [2] * 3
PAIRS = [(u, v) for u in range(14) for v in range(14) if BLOCK[u] < BLOCK[v] and (u + 2 * v) % 4]
SPARSE = Topology(torch.tensor(PAIRS).t(), torch.tensor(BLOCK), torch.tensor(BLOCK))
K = {19: 70, 14: 20}
"""Real edges, by number of nodes."""
TOPOLOGIES = pytest.mark.parametrize("topology", [LAYERED, SPARSE], ids=["complete", "other"])


def trained(
    topology: Topology, rule: str, steps: int, **kwargs: object
) -> tuple[NeuralGraph, torch.optim.Optimizer, Tensor]:
    """Return a graph after some steps of SGD with momentum, its optimizer, and the images."""
    torch.manual_seed(0)
    graph = NeuralGraph(topology, rule=rule, num_edges=K[topology.num_nodes], **kwargs)
    optimizer = torch.optim.SGD(graph.parameters(), lr=0.05, momentum=0.9)
    attach(graph, optimizer, total_steps=40)
    x = torch.randn(16, topology.num_inputs, 4, 4)
    for _ in range(steps):
        optimizer.zero_grad()
        (graph(x) - x.mean()).square().mean().backward()
        optimizer.step()
    return graph, optimizer, x


def ends(graph: NeuralGraph) -> set[tuple[int, int]]:
    return {(u, v) for u, v in graph.wiring().validate().edge_index.t().tolist()}


@TOPOLOGIES
def test_what_is_drawn_is_in_proportion_to_a_bound_of_the_gradient(topology: Topology) -> None:
    """A definition of NumPy, and the expected share of each edge among many draws."""
    generator, sizes = torch.Generator().manual_seed(1), torch.randn(19)[: topology.num_nodes].exp()
    block = topology.blocks[-1]
    states = [
        sizes[topology.blocks[i].nodes.start : topology.blocks[i].nodes.stop, None, None].expand(
            -1, 3, 2
        )
        for i in block.sources
    ]
    grad = -torch.randn(len(block.nodes), generator=generator).exp()[:, None, None].expand(-1, 3, 2)
    real = torch.tensor([block.edges[1]])
    source, target = topology.edges(torch.arange(block.edges.start, block.edges.stop)).numpy()
    loud = np.array([np.abs(np.full((3, 2), size)).sum() for size in sizes.tolist()])
    steep = np.abs(grad.numpy()).sum((1, 2))
    bound = loud[source] * steep[target - block.nodes.start]
    share = bound / bound.sum()
    draws, counts = 4000, np.zeros(len(share))
    number = round(len(share) / 2)
    for seed in range(draws):
        asked = round(number * topology.num_candidates / len(share))
        sampler = Sampler(topology, real, asked, torch.Generator().manual_seed(seed))
        sampler.observe(block, states, grad, lambda wiring: wiring.validate().edge_weight)
        ids, _ = sampler.result()
        assert bool((ids.diff() > 0).all())
        counts[ids.numpy() - block.edges.start] += 1
    wanted = draws * (1 - (1 - share) ** number)  # drawn at least once
    wanted[1] = 0  # the real edge never is
    spread = np.sqrt(wanted * (1 - wanted / draws)) + 1e-9
    assert np.abs(counts - wanted).max() < 5 * spread.max()
    assert (np.abs(counts - wanted) / spread).mean() < 1.3


@pytest.mark.parametrize(
    ("topology", "backend"),
    [  # dense products need complete blocks
        *((LAYERED, backend) for backend in ("sparse", "dense", "reference")),
        *((SPARSE, backend) for backend in ("sparse", "reference")),
    ],
)
@pytest.mark.parametrize("node", ["relu", "norm_relu_conv"])
def test_gradients_are_those_that_every_candidate_would_have(
    topology: Topology, backend: str, node: str
) -> None:
    graph, _, x = trained(topology, "gse(every=1, samples=9)", 0, node=node, backend=backend)
    graph.double()
    wiring = graph.wiring()
    other = NeuralGraph(topology, rule="dnw", num_edges=K[topology.num_nodes], node=node).double()
    other.nodes.load_state_dict(graph.nodes.state_dict())
    with torch.no_grad():
        other.weight.fill_(0)
        other.weight[wiring.edge_id] = graph.weight[wiring.slot]
    assert torch.equal(other.wiring().edge_id, wiring.edge_id)
    ys = [g(x.double()) for g in (graph, other)]
    for y in ys:
        y.pow(3).sum().backward()
    ids, grads = graph.selector._step_state.sampler.result()
    assert len(ids) >= 5
    assert not torch.isin(ids, wiring.edge_id).any()
    assert torch.allclose(grads, other.weight.grad[ids].to(grads), rtol=1e-5, atol=1e-6)
    assert torch.allclose(graph.weight.grad[wiring.slot], other.weight.grad[wiring.edge_id])
    assert torch.allclose(*ys)


@pytest.mark.parametrize(
    "schedule", ["discrete(steps=3, input='held')", "continuous", "micro-batches"]
)
def test_gradients_of_several_passes_are_summed(schedule: str) -> None:
    static = schedule == "micro-batches"
    kwargs = {} if static else {"schedule": schedule, "node": "identity"}
    graph, _, x = trained(SPARSE, "gse(every=1, samples=9)", 0, **kwargs)
    parts = x.split(8) if static else [x[:, :, 0, 0]]
    wiring = graph.wiring()
    other = NeuralGraph(SPARSE, rule="dnw", num_edges=20, **kwargs)
    other.nodes.load_state_dict(graph.nodes.state_dict())
    with torch.no_grad():
        other.weight.fill_(0)
        other.weight[wiring.edge_id] = graph.weight[wiring.slot]
    for part in parts:
        for g in (graph, other):
            g(part).pow(3).sum().backward()
    ids, grads = graph.selector._step_state.sampler.result()
    for block in SPARSE.blocks[1:]:
        assert ((ids >= block.edges.start) & (ids < block.edges.stop)).sum() >= 3
    assert torch.allclose(grads, other.weight.grad[ids], rtol=1e-4, atol=1e-6)


def test_a_change_drops_the_smallest_and_grows_the_largest_gradients_drawn() -> None:
    """Step by step in NumPy; weights that stay keep their places and their momentum."""
    graph, optimizer, x = trained(LAYERED, "gse(every=3, fraction=0.5, until=0.8)", 2)
    before = {id: graph.weight.tolist()[s] for id, s in _slots(graph).items()}
    momentum = optimizer.state[graph.weight]["momentum_buffer"]
    optimizer.zero_grad()
    (graph(x) - x.mean()).square().mean().backward()
    ids, grads = graph.selector._step_state.sampler.result()
    grad = {id: graph.weight.grad.tolist()[s] for id, s in _slots(graph).items()}
    memory = {id: 0.9 * momentum.tolist()[s] + grad[id] for id, s in _slots(graph).items()}
    optimizer.step()
    moved = {id: w - 0.05 * memory[id] for id, w in before.items()}
    number = min(int(0.25 * (1 + math.cos(math.pi * 3 / 40 / 0.8)) * 70), len(ids))
    assert 2 <= number <= 35
    grown = ids.numpy()[np.argsort(-np.abs(grads.numpy()))[:number]]
    kept = sorted(moved, key=lambda id: -abs(moved[id]))[: 70 - number]
    after = {id: graph.weight.tolist()[s] for id, s in _slots(graph).items()}
    assert sorted(after) == sorted([*kept, *grown])
    assert all(after[id] == 0 for id in grown)
    assert np.allclose([after[id] for id in kept], [moved[id] for id in kept], atol=1e-6)
    left = {id: momentum.tolist()[s] for id, s in _slots(graph).items()}
    assert all(left[id] == 0 for id in grown)
    assert np.allclose([left[id] for id in kept], [memory[id] for id in kept], atol=1e-6)


def _slots(graph: NeuralGraph) -> dict[int, int]:
    wiring = graph.wiring()
    return dict(zip(wiring.edge_id.tolist(), wiring.slot.tolist(), strict=True))


@TOPOLOGIES
def test_between_changes_it_is_a_graph_with_these_edges(topology: Topology) -> None:
    graph, _, x = trained(topology, "gse(every=3)", 17)
    assert graph.weight.shape == (K[topology.num_nodes],)
    first = NeuralGraph(topology, rule="gse", num_edges=K[topology.num_nodes])
    torch.manual_seed(0)
    first.reset_parameters()
    assert ends(first) != ends(graph)
    assert not torch.equal(graph.wiring().slot, torch.arange(len(graph.weight)))
    same = edited(graph, graph.to_networkx(), rule="random")
    assert ends_by_name(same) == ends_by_name(graph)
    graph.eval(), same.eval()
    assert torch.allclose(same(x), graph(x), atol=1e-5)
    assert torch.allclose(freeze(graph)(x), graph(x), atol=1e-5)
    again = edited(graph, graph.to_networkx(candidates=True)).eval()
    assert torch.allclose(again(x), graph(x), atol=1e-5)
    loaded = NeuralGraph(topology, rule="gse(every=3)", num_edges=K[topology.num_nodes])
    loaded.load_state_dict(graph.state_dict())
    assert torch.allclose(loaded.eval()(x), graph(x))


def ends_by_name(graph: NeuralGraph) -> set[tuple[object, object]]:
    return set(graph.to_networkx().edges)


def test_a_step_that_no_gradient_reached_changes_nothing() -> None:
    graph, optimizer, x = trained(LAYERED, "gse(every=1)", 0)
    before = ends(graph)
    graph(x).mul(0).sum().backward()
    optimizer.step()
    assert ends(graph) == before
    with torch.no_grad():
        graph(x)
    optimizer.step()
    assert ends(graph) == before


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # PyTorch means to hide it
def test_a_compiled_graph_samples_too() -> None:
    graphs = [trained(LAYERED, "gse(every=2)", 0)[0] for _ in range(2)]
    calls = [graphs[0], torch.compile(graphs[1])]
    x = torch.randn(16, 6, 4, 4)
    for graph, call in zip(graphs, calls, strict=True):
        optimizer = torch.optim.SGD(graph.parameters(), lr=0.05)
        torch.manual_seed(0)
        attach(graph, optimizer, total_steps=20)
        for _ in range(6):
            optimizer.zero_grad()
            call(x).square().mean().backward()
            optimizer.step()
    assert torch.equal(graphs[0].wiring().edge_id, graphs[1].wiring().edge_id)
    assert torch.allclose(graphs[0].weight, graphs[1].weight, atol=1e-6)


def test_gradients_that_were_cleared_are_forgotten() -> None:
    graph, optimizer, x = trained(LAYERED, "gse(every=1)", 0)
    graph(x).mul(1e6).sum().backward()
    loud = graph.selector._step_state.sampler.result()[1].abs().max()
    optimizer.zero_grad()
    graph(x).sum().backward()
    assert graph.selector._step_state.sampler.result()[1].abs().max() < loud / 1e3
    first = graph.selector._step_state.sampler
    graph(x).sum().backward()
    assert graph.selector._step_state.sampler is first
    attach(graph, optimizer, total_steps=9)
    assert graph.selector._step_state.sampler is None


def test_what_is_real_by_the_time_of_the_step_does_not_grow_again() -> None:
    """As where a checkpoint is loaded between a pass and its step."""
    graph, optimizer, x = trained(LAYERED, "gse(every=1, samples=9, fraction=1)", 0)
    torch.manual_seed(5)
    other = NeuralGraph(LAYERED, rule="gse", num_edges=70).state_dict()
    graph(x).square().sum().backward()
    loaded = {key: value for key, value in other.items() if key in ("weight", "selector.edge_id")}
    graph.load_state_dict(loaded, strict=False)
    optimizer.step()
    assert len(ends(graph)) == 70


def test_small_blocks_have_their_turn() -> None:
    graph = NeuralGraph(Topology.layered([3] * 30, skip=False), rule="gse(every=1)", num_edges=20)
    seen = set()
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        sampler = Sampler(graph.topology, graph.wiring().edge_id, 20, generator)
        for block in graph.topology.blocks[1:]:
            z = grad = torch.ones(3, 2)
            sampler.observe(block, [z], grad, lambda wiring: wiring.validate().edge_weight)
        ids = sampler.result()[0]
        assert 10 <= len(ids) <= 20
        seen |= {int(id) // 9 for id in ids}
    assert seen == set(range(29))


@pytest.mark.parametrize("unscaled", [False, True])
def test_steps_that_overflow_are_none(unscaled: bool) -> None:
    graph, _, x = trained(LAYERED, "gse(every=1)", 0)
    optimizer = torch.optim.SGD(graph.parameters(), lr=0.05, fused=True)
    attach(graph, optimizer, total_steps=9)
    scaler, before = torch.amp.GradScaler("cpu", init_scale=1e38), ends(graph)
    scaler.scale(graph(x).mul(1e9).sum()).backward()
    if unscaled:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert ends(graph) == before
    assert int(graph.selector.clock[0]) == 0


def test_candidates_without_a_weight_are_drawn_one_when_edited() -> None:
    graph, _, _ = trained(LAYERED, "gse(every=3)", 4)
    full = graph.to_networkx(candidates=True)
    assert sum("weight" in data for _, _, data in full.edges(data=True)) == 70
    learning = edited(graph, full, rule="dnw")
    assert bool((learning.weight != 0).all())
    more = graph.to_networkx()
    absent = [edge for edge in full.edges if edge not in more.edges][:9]
    more.add_edges_from(absent)
    again = edited(graph, more)
    weights = again.to_networkx()
    assert all(weights.edges[edge]["weight"] != 0 for edge in absent)


def test_the_adjoint_is_refused() -> None:
    graph = NeuralGraph(
        SPARSE, rule="gse", num_edges=20, node="identity", schedule="continuous(adjoint=True)"
    )
    with pytest.raises(ValueError, match="pass adjoint=False, or use another rule"):
        graph.eval()(torch.randn(2, 5))


class NoSlot(GSE):
    """Forgets to say which weight is whose."""

    def selection(self, candidates: Candidates) -> Selection:
        return Selection(self.select(candidates), straight_through=False)


def test_a_compact_rule_has_to_say_which_weight_is_whose() -> None:
    with pytest.raises(ValueError, match="NoSlot has compact = True, so its selection must have"):
        NeuralGraph(LAYERED, rule=NoSlot(), num_edges=9).wiring()


def test_copies_sample_nothing_for_the_original() -> None:
    graph, _, x = trained(LAYERED, "gse(every=1)", 0)
    graph(x).sum().backward()
    assert graph.selector._step_state.sampler is not None
    assert copy.deepcopy(graph).selector._step_state.sampler is None
    averaged = torch.optim.swa_utils.AveragedModel(graph)
    torch.optim.swa_utils.update_bn([x], averaged)
    assert averaged.module.nodes[0].norm.num_batches_tracked == 1


def test_layers_and_bad_arguments_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"does not fit the layer \(the rule stores weights of real"
    ):
        sparsify(nn.Linear(8, 8), 0.2, rule="gse")
    with pytest.raises(
        ValueError, match="samples must be a multiple of the number of edges, above 0, got 0"
    ):
        NeuralGraph(LAYERED, rule="gse(samples=0)", num_edges=20)


def together(rank: int, world: int, wrap: str) -> NeuralGraph:
    """Train a graph on a process' share of the images."""
    torch.manual_seed(0)
    graph = NeuralGraph(LAYERED, rule="gse(every=2, samples=2)", num_edges=70, node="relu")
    call: nn.Module = graph
    if wrap == "replicated":
        call = DistributedDataParallel(graph)
    elif wrap == "sharded":
        call = fully_shard(graph, mesh=init_device_mesh("cpu", (world,)))
    optimizer = torch.optim.SGD(call.parameters(), lr=0.5, momentum=0.9)
    torch.manual_seed(0)
    attach(graph, optimizer, total_steps=12)
    for step in range(12):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))[rank::world]
        optimizer.zero_grad()
        (call(x) - x[:, :5]).square().mean().backward()
        optimizer.step()
    return graph


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for wrap in ("replicated", "sharded"):
        graph = together(rank, 2, wrap)
        state = get_model_state_dict(graph, options=StateDictOptions(full_state_dict=True))
        torch.save(state, Path(folder) / f"{wrap}{rank}.pt")
    own = [([2, 5], [1.0, 2.0]), ([3, 5, 8], [6.0, 4.0, 2.0])][rank]
    found = gathered((torch.tensor(own[0]), torch.tensor(own[1])))
    torch.save(found, Path(folder) / f"gathered{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_processes_look_at_all_that_any_drew(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(worker, args=(str(tmp_path),), nprocs=2)
    torch.manual_seed(0)
    first = NeuralGraph(LAYERED, rule="gse", num_edges=70).wiring().edge_id
    state = torch.load(tmp_path / "replicated0.pt")
    assert int((~torch.isin(state["selector.edge_id"], first)).sum()) > 5
    for name in ("replicated1", "sharded0"):
        other = torch.load(tmp_path / f"{name}.pt")
        for key, value in state.items():
            assert torch.allclose(other[key], value, atol=1e-5), (name, key)
    ids, grads = torch.load(tmp_path / "gathered1.pt")
    assert ids.tolist() == [2, 3, 5, 8]
    assert grads.tolist() == [1.0, 6.0, 3.0, 2.0]  # means of those that drew an edge


SCRIPT = """
import resource

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.scaling import huge, make_step


class Largest(TorchDispatchMode):
    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.numbers = max([self.numbers, *sizes])
        return out


with Largest() as largest:
    size = huge()
    assert size.topology.num_candidates == 100_000_000
    step = make_step(size, "cpu")
    step()
    step()
print(largest.numbers, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # kilobytes
"""


def test_no_tensor_has_a_number_for_each_of_a_hundred_million_candidates() -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    numbers, kilobytes = map(int, done.stdout.split())
    assert 500_000 <= numbers < 10_000_000
    assert kilobytes < 2.5e6
