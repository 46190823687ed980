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
from dnw_graph.wiring import Sampler

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
        sampler.observe(block, states, grad, lambda wiring: wiring.edge_weight)
        ids, _ = sampler.result()
        assert bool((ids.diff() > 0).all())
        counts[ids.numpy() - block.edges.start] += 1
    wanted = draws * (1 - (1 - share) ** number)  # drawn at least once
    wanted[1] = 0  # the real edge never is
    spread = np.sqrt(wanted * (1 - wanted / draws)) + 1e-9
    assert np.abs(counts - wanted).max() < 5 * spread.max()
    assert (np.abs(counts - wanted) / spread).mean() < 1.3


@TOPOLOGIES
@pytest.mark.parametrize("backend", ["sparse", "dense", "reference"])
@pytest.mark.parametrize("node", ["relu", "norm_relu_conv"])
def test_gradients_are_those_that_every_candidate_would_have(
    topology: Topology, backend: str, node: str
) -> None:
    if backend == "dense" and topology is SPARSE:
        pytest.skip("dense products need complete blocks")
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
    ids, grads = graph.choice._sampler.result()
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
    ids, grads = graph.choice._sampler.result()
    assert len(ids) >= 5
    assert torch.allclose(grads, other.weight.grad[ids], rtol=1e-4, atol=1e-6)


def test_a_change_drops_the_smallest_and_grows_the_largest_gradients_drawn() -> None:
    """Step by step in NumPy; weights that stay keep their places and their momentum."""
    graph, optimizer, x = trained(LAYERED, "gse(every=3, fraction=0.5, until=0.8)", 2)
    before = {id: graph.weight.tolist()[s] for id, s in _slots(graph).items()}
    momentum = optimizer.state[graph.weight]["momentum_buffer"]
    optimizer.zero_grad()
    (graph(x) - x.mean()).square().mean().backward()
    ids, grads = graph.choice._sampler.result()
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


def test_copies_sample_nothing_for_the_original() -> None:
    graph, _, x = trained(LAYERED, "gse(every=1)", 0)
    graph(x).sum().backward()
    assert graph.choice._sampler is not None
    assert copy.deepcopy(graph).choice._sampler is None


def test_layers_and_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"does not fit the layer \(only real edges have weights"):
        sparsify(nn.Linear(8, 8), 0.2, rule="gse")
    with pytest.raises(ValueError, match="samples must be a multiple of the edges, above 0, got 0"):
        NeuralGraph(LAYERED, rule="gse(samples=0)", num_edges=20)


def together(rank: int, world: int, wrap: str) -> NeuralGraph:
    """Train a graph on a process' share of the images, drawing practically every candidate."""
    torch.manual_seed(0)
    graph = NeuralGraph(LAYERED, rule="gse(every=2, samples=50)", num_edges=70, node="relu")
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
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_grow_the_edges_that_one_does(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(worker, args=(str(tmp_path),), nprocs=2)
    alone = together(0, 1, "alone").state_dict()
    torch.manual_seed(0)
    first = NeuralGraph(LAYERED, rule="gse", num_edges=70).wiring().edge_id
    assert int((~torch.isin(alone["choice.edge_id"], first)).sum()) > 5
    for name in ("replicated0", "replicated1", "sharded0"):
        state = torch.load(tmp_path / f"{name}.pt")
        for key, value in alone.items():
            assert torch.allclose(state[key], value, atol=1e-5), (name, key)


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
    assert kilobytes < 8e6
