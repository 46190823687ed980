"""Networks, rules and schedules on a GPU that is not there: see tests/fake_gpu.py."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)
from typing_extensions import override

from benchmarks.scaling import large
from dnw_graph import NeuralGraph, Topology, attach, penalty, sparsify
from dnw_graph.wiring import DNW, Candidates, TrainingProgress
from models import create_model, list_models
from tests.conftest import BUDGETED
from tests.fake_gpu import GPU, HostWaitsError, autocast, backward, fake_gpu, peak_memory

STEPS = 20
pytestmark = pytest.mark.filterwarnings("ignore:Triton is not installed")


def train_steps(
    model: nn.Module, x: Tensor, steps: int = 3, precision: torch.dtype | None = None
) -> None:
    """Train a network that is on the fake GPU of ``x`` for some steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    attach(model, optimizer, total_steps=STEPS)
    for _ in range(steps):
        optimizer.zero_grad()
        with autocast(precision):
            loss = model(x).float().square().mean()
        backward(loss + penalty(model))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.device == x.device, name


@pytest.mark.parametrize("precision", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [name for name in list_models() if name != "tiny_continuous"])
def test_models_train(name: str, precision: torch.dtype | None) -> None:
    model = create_model(name, num_classes=10, image_size=32)
    with fake_gpu():
        model = model.to(GPU)
        train_steps(model, torch.randn(2, 3, 32, 32, device=GPU), 2, precision)
        with torch.no_grad():
            assert model.eval()(torch.randn(2, 3, 32, 32, device=GPU)).device == torch.device(GPU)


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["mbv1_dnw", "tiny_discrete", "resnet18_dnw"])
def test_another_gpu_of_several(name: str, format: torch.memory_format) -> None:
    model, other = create_model(name, num_classes=10, image_size=32), "cuda:1"
    with fake_gpu():
        model = model.to(other)
        images = torch.randn(2, 3, 32, 32, device=other).to(memory_format=format)
        train_steps(model, images, 2, torch.bfloat16)
        with torch.no_grad():
            assert model.eval()(images).device == torch.device(other)


@pytest.mark.parametrize("name", ["mbv1_dnw", "tiny_static", "tiny_discrete", "resnet18_dnw"])
def test_networks_compile_in_one_piece_for_the_gpu(name: str) -> None:
    """Check what CUDA graphs need: one graph, of the same size each time, without CPU tensors."""
    model, graphs = create_model(name, num_classes=10, image_size=32), []

    def collect(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    with fake_gpu(watch=False):
        model, x = model.to(GPU), torch.randn(2, 3, 32, 32, device=GPU)
        model(x)  # a topology copies its tables to a device once
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=collect, fullgraph=True, dynamic=False)
        for _ in range(2):
            assert compiled(x).device == torch.device(GPU)
    assert len(graphs) == 1
    tensors = [node.meta.get("example_value") for node in graphs[0].graph.nodes]
    assert {x.device for x in tensors if isinstance(x, Tensor)} == {torch.device(GPU)}


@pytest.mark.parametrize("rule", ["dnw_factored", "rigl(every=2)", "l1_anneal"])
def test_wirings_on_another_gpu(rule: str) -> None:
    graph = NeuralGraph(SPARSE, rule=rule, num_edges=6, node="relu", backend="sparse")
    with fake_gpu():
        train_steps(graph.to("cuda:1"), torch.randn(3, 2, device="cuda:1"), 4)


def test_triton_runs_on_the_gpu_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that kernels are launched where their tensors are, not on the current GPU."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from dnw_graph.aggregation import _kernels, _triton
    from dnw_graph.node import _triton as node_kernels
    from dnw_graph.node import fused

    entered: list[Tensor] = []

    @contextmanager
    def device_of(x: Tensor) -> Iterator[None]:
        entered.append(x)
        yield
        entered.clear()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    first = torch.zeros(3)
    operators = {name: (_triton, name) for name in ("gather", "spread", "correlate", "dots")}
    operators |= {name: (node_kernels, name) for name in ("forward", "backward")}
    launched: list[bool] = []

    def launch(*args: Tensor) -> None:
        launched.append(entered == [args[0]])

    for operator, (module, name) in operators.items():
        monkeypatch.setattr(module, name, launch)
        kernels = getattr(fused if module is node_kernels else _kernels, operator)._backend_fns
        kernels["cuda"](first)
    assert launched == [True] * len(operators)


WAITS = {
    "gse(every=2)": "the number of distinct edges that are drawn is random",
    "targeted_dropout": "the number of edges that are kept is random",
}
"""Rules for which the host waits for the GPU in each forward pass, with the reason."""
WAITING = (HostWaitsError, DataDependentOutputException, DynamicOutputShapeException)


@pytest.mark.parametrize("rule", BUDGETED)
def test_rules_act(rule: str) -> None:
    graph = NeuralGraph(Topology.layered([6, 8, 5]), rule=rule, num_edges=31, node="relu")
    with fake_gpu():
        graph, x = graph.to(GPU), torch.randn(4, 6, device=GPU)
        if rule in WAITS:
            with pytest.raises(WAITING):
                train_steps(graph, x, 4)
        else:
            train_steps(graph, x, 4)


@pytest.mark.parametrize("rule", [rule for rule in BUDGETED if rule not in WAITS])
def test_rules_act_on_sparse_layers(rule: str) -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 5))
    sparsify(network, None if rule == "complete" else 0.3, rule=rule)
    with fake_gpu():
        train_steps(network.to(GPU), torch.randn(4, 3, 4, 4, device=GPU), 4)


SPARSE = Topology.from_edges(
    [[0, 1, 0, 2, 3, 2, 4], [2, 3, 4, 4, 5, 5, 5]], inputs=[0, 1], outputs=[5]
)
TOPOLOGIES = {
    "blocks": Topology.layered([4, 6, 6, 3]),
    "acyclic": Topology.complete(4, 9, 3, acyclic=True),
    "any": SPARSE,
    "cyclic": Topology.recurrent(3, 7, 2),
}
SCHEDULES = [
    "static",
    "discrete(steps=3)",
    "discrete(steps=3, input='held')",
    "discrete(steps=5, input='new', read='every')",
    "continuous(method='rk4', step_size=0.5)",
]


def waits(backend: str, schedule: str) -> bool:
    """Return whether the host waits for the GPU in each forward pass.

    The reference backend waits for the number of real edges into each block, and the solvers of
    torchdiffeq look at their times.
    """
    return backend == "reference" or schedule.startswith("continuous")


@pytest.mark.parametrize("node", ["relu", "norm_relu_conv", "linear"])
@pytest.mark.parametrize("backend", ["auto", "reference", "dense", "sparse"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", TOPOLOGIES)
def test_schedules_and_backends(kind: str, schedule: str, backend: str, node: str) -> None:
    topology = TOPOLOGIES[kind]
    if schedule == "static" and kind == "cyclic":
        schedule = "discrete(steps=3, input='held')"
    graph = NeuralGraph(
        topology,
        num_edges=topology.num_candidates - 1,
        schedule=schedule,
        backend=backend,
        node=node,
    )
    frames = (3,) if graph.schedule.takes_sequence else ()
    features = (5, 4) if "conv" in node or node == "norm" else ()
    with fake_gpu():
        x = torch.randn(2, *frames, topology.num_inputs, *features, device=GPU)
        graph = graph.to(GPU)
        if waits(backend, schedule):
            with pytest.raises(WAITING):
                graph(x)
        else:
            train_steps(graph, x, 1)


class Planted(nn.Module):
    """A network with a fault that shows on a GPU only."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault, self.linear = fault, nn.Linear(4, 4)
        self.order = torch.arange(4)  # not a buffer, so to() does not move it

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        if self.fault == "index":
            return x[:, self.order]
        if self.fault == "item":
            return x * (1 if x.sum().item() > 0 else 2)
        if self.fault == "copy":
            return x * float(x.detach().cpu().sum())
        if self.fault == "buffer":
            return x + self.order
        if self.fault == "shape":
            return x[x > 0]
        return x


@pytest.mark.parametrize("fault", ["index", "item", "copy", "buffer", "shape", "none"])
def test_planted_faults_are_found(fault: str) -> None:
    network = Planted(fault)
    with fake_gpu():
        network, x = network.to(GPU), torch.randn(3, 4, device=GPU)
        if fault == "none":
            train_steps(network, x)
        else:
            with pytest.raises((*WAITING, RuntimeError)):
                network(x)


class MaskOnTheHost(DNW):
    """A rule that makes a mask on the CPU in ``after_step``."""

    @override
    def acts(self, progress: TrainingProgress) -> bool:
        return True

    @override
    def after_step(self, candidates: Candidates, grad: Tensor | None, forget: Any) -> None:
        candidates.weight.mul_(torch.ones(len(candidates.weight), device="cpu"))


def test_a_planted_mask_on_the_cpu_is_found() -> None:
    graph = NeuralGraph(Topology.layered([6, 5]), rule=MaskOnTheHost(), num_edges=12, node="relu")
    with fake_gpu(), pytest.raises(RuntimeError, match="device"):
        train_steps(graph.to(GPU), torch.randn(4, 6, device=GPU))


@torch.library.custom_op("dnw_graph::planted", mutates_args=(), device_types="cpu")
def _planted(x: Tensor) -> Tensor:
    return x.clone()


@_planted.register_fake
def _(x: Tensor) -> Tensor:
    return x.clone()


def test_operators_without_an_implementation_for_gpus_are_found() -> None:
    with fake_gpu(), pytest.raises(NotImplementedError, match="dnw_graph::planted"):
        _planted(torch.ones(1, device=GPU))


def test_sparse_without_triton_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dnw_graph._jit.has_triton", lambda: False)
    graph = NeuralGraph(SPARSE, num_edges=6, node="relu", backend="sparse")
    with fake_gpu(), pytest.raises(ValueError, match=r"needs Triton on cuda:0.*pip install"):
        graph.to(GPU)(torch.randn(3, 2, device=GPU))


def test_large_graphs_need_no_message_per_edge() -> None:
    size = large(20_000, 1_000_000)
    topology = size.topology
    graph = NeuralGraph(topology, num_edges=size.edges, node="relu")
    features = size.batch, size.side, size.side
    states = 4 * topology.num_nodes * math.prod(features)  # bytes
    with fake_gpu(), peak_memory() as peak:
        graph = graph.to(GPU)
        x = torch.randn(size.batch, topology.num_inputs, size.side, size.side, device=GPU)
        train_steps(graph, x, 1)
    messages = 4 * topology.num_candidates * math.prod(features)
    assert peak() < 50 * topology.num_candidates + 4 * states < messages / 3
