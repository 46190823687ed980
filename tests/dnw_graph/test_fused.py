"""The fused node function and the fused graph equal what they replace."""

import copy
import threading

import pytest
import torch
from torch import Tensor, nn

from dnw_graph import NeuralGraph, Topology
from dnw_graph.node import NormReluConv
from dnw_graph.schedule import ForwardPass, _blocks, _maps
from tests.conftest import relative_error

BF16 = 2.0**-8
"""Rounding to bfloat16 is off by 2^-9 of a number at most; two roundings in a row by twice that."""


def pair(**options: object) -> tuple[NormReluConv, NormReluConv]:
    """Return a fused node function and the same one made of PyTorch's layers."""
    one = NormReluConv(5, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.copy_(torch.randn_like(parameter))
    other = copy.deepcopy(one)
    other.use_fused = False
    return one, other


def everything(node: nn.Module, x: Tensor, mode: bool) -> list[Tensor]:
    """Return states, gradients and statistics."""
    node.train(mode)
    x = x.clone().requires_grad_()
    z = node(x)
    grad = torch.linspace(-1, 1, z.numel(), dtype=torch.float64).sin().view_as(z).to(z.dtype)
    grads = torch.autograd.grad(z, [x, *node.parameters()], grad)
    return [z, *grads, *(b.clone().double() for b in node.buffers())]


@pytest.mark.parametrize("norm", ["batch", "instance"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(7, 7), (9, 14), (1, 2), (70, 61)])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_one_operator_equals_three_layers(
    norm: str, stride: int, size: tuple[int, int], dtype: torch.dtype, bound: float
) -> None:
    one, other = (node.to(dtype) for node in pair(norm=norm, stride=stride, eps=1e-3))
    x = (torch.randn(5, 6, *size, dtype=torch.float64) + 0.5).to(dtype)
    for mode in (True, True, False):
        for got, expected in zip(everything(one, x, mode), everything(other, x, mode), strict=True):
            assert relative_error(got, expected) < bound


def test_cumulative_statistics_too() -> None:
    one, other = pair()
    one.norm.momentum = other.norm.momentum = None
    for _ in range(3):
        x = torch.randn(5, 4, 6, 6)
        one(x)
        other(x)
    assert relative_error(one.norm.running_var, other.norm.running_var) < 1e-6
    assert int(one.norm.num_batches_tracked) == 3


def test_bfloat16_is_off_by_its_rounding_and_no_more() -> None:
    one, other = pair(eps=1e-3)
    x = torch.randn(5, 6, 9, 8).bfloat16()
    other.double()
    with torch.autocast("cpu", torch.bfloat16):
        got = everything(one, x, True)
    assert got[0].dtype == torch.bfloat16
    # The gradient that is handed down is rounded as well, which the other is told.
    z = other.train()(precise := x.double().requires_grad_())
    grad = torch.linspace(-1, 1, z.numel(), dtype=torch.float64).sin().view_as(z).bfloat16()
    expected = [z, *torch.autograd.grad(z, [precise, *other.parameters()], grad.double())]
    for number, (ours, theirs) in enumerate(zip(got, expected, strict=False)):
        assert relative_error(ours.double(), theirs) < (BF16 if number < 2 else 1e-5)


def test_what_is_not_a_number_stays_so() -> None:
    one, _ = pair()
    x = torch.randn(5, 2, 4, 4)
    x[3, 1, 2, 2] = torch.nan
    z = one.eval()(x)
    assert z[3].isnan().any()
    assert not z[:3].isnan().any()


def test_no_statistics_of_a_single_value() -> None:
    one, _ = pair()
    with pytest.raises(ValueError, match=r"more than one value per node, got .*\[5, 1, 1, 1\]"):
        one(torch.randn(5, 1, 1, 1))
    assert one(torch.randn(5, 0, 3, 3)).shape == (5, 0, 3, 3)


def test_maps_need_not_be_contiguous() -> None:
    one, other = pair()
    x = torch.randn(6, 5, 4, 8).transpose(0, 1)[..., ::2]
    for got, expected in zip(everything(one, x, True), everything(other, x, True), strict=True):
        assert relative_error(got, expected) < 1e-5


def test_bfloat16_of_kernels_rounds_as_pytorch_does() -> None:
    node = NormReluConv(1, eps=1e-5).eval()
    with torch.no_grad():  # the middle tap alone, statistics given: a third of each, rounded
        node.conv.weight.zero_()
        node.conv.weight[0, 0, 1, 1] = 1
        node.norm.weight.fill_(1 / 3)
        third = node.norm.weight * (node.norm.running_var + 1e-5).rsqrt()
        x = (torch.rand(10_000) * 10.0 ** torch.randint(-30, 30, (10_000,))).bfloat16()
        z = node(x.view(1, 1, 100, 100)).flatten()
    assert torch.equal(z, (x.float() * third).bfloat16())


def run(graph: NeuralGraph, x: Tensor, mode: bool) -> list[Tensor]:
    graph.train(mode)
    x = x.clone().requires_grad_()
    y = graph(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).sin().view(y.shape)
    grads = torch.autograd.grad((y * weights.to(y.dtype)).sum(), [x, *graph.parameters()])
    return [y, *grads, *(b.clone().double() for b in graph.buffers())]


@pytest.mark.parametrize("rule", ["dnw", "random", "complete"])
@pytest.mark.parametrize("backend", ["auto", "sparse", "dense"])
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_graph_as_one_function_equals_it_block_by_block(
    rule: str, backend: str, skip: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    topology = Topology.layered([5, 7, 6, 8, 4], skip=skip)
    one = NeuralGraph(topology, rule=rule, num_edges=60, stride=2, backend=backend).to(dtype)
    other = copy.deepcopy(one)
    x = torch.randn(3, 5, 9, 8, dtype=dtype)
    monkeypatch.setattr(_maps, "run", lambda *_: None)  # which small blocks go to otherwise
    got = [t for mode in (True, False) for t in run(one, x, mode)]
    monkeypatch.setattr(_blocks, "run", lambda *_: None)
    expected = [t for mode in (True, False) for t in run(other, x, mode)]
    for ours, theirs in zip(got, expected, strict=True):
        assert relative_error(ours, theirs) < (1e-5 if dtype == torch.float32 else 1e-12)


def whole(graph: NeuralGraph, x: Tensor) -> bool:
    """Return whether a graph is run as one function."""
    modules = list(graph.nodes), list(graph.messages)
    flow = ForwardPass(graph.wiring(), graph.weight, graph.backend, *modules)
    return _blocks.run(flow, x.transpose(0, 1).contiguous()) is not None


def test_graphs_of_another_kind_are_run_block_by_block() -> None:
    topology, x = Topology.layered([4, 6, 3]), torch.randn(2, 4, 5, 5)
    assert whole(NeuralGraph(topology, num_edges=20), x)
    assert not whole(NeuralGraph(topology, num_edges=20, backend="reference"), x)
    assert not whole(NeuralGraph(topology, num_edges=20, output_node="relu"), x)
    assert not whole(NeuralGraph(topology, num_edges=20, node="relu"), x)
    some = Topology.from_edges([[0, 1, 2, 3], [2, 3, 4, 4]], inputs=[0, 1], outputs=[4])
    assert not whole(NeuralGraph(some, num_edges=3), torch.randn(2, 2, 5, 5))
    heard = NeuralGraph(topology, num_edges=20)
    calls: list[int] = []
    heard.nodes[1].register_forward_hook(lambda *_: calls.append(1))
    heard(x)
    assert calls == [1]


def test_memory_between_calls_is_nobodys() -> None:
    """Outputs and gradients stay what they are while other graphs, sizes and threads run."""
    small, large = (
        NeuralGraph(Topology.layered([4, w, w, 3]), num_edges=20, stride=2) for w in (6, 40)
    )
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    with torch.inference_mode():
        large(x)
    y = small(x)
    first = torch.autograd.grad(y.sum(), [x, *small.parameters()], retain_graph=True)
    kept = [t.clone() for t in (y, *first)]
    large(torch.randn(5, 4, 16, 16)).sum().backward()
    threads = [threading.Thread(target=lambda: large(x.detach()).sum().backward()) for _ in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    again = torch.autograd.grad(y.sum(), [x, *small.parameters()])
    for now, then in zip((y, *first), kept, strict=True):
        assert torch.equal(now, then)
    for now, then in zip(again, kept[1:], strict=True):
        assert torch.equal(now, then)
