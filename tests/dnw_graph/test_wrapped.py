"""Networks that are compiled, averaged or wrapped are those inside."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from torch import nn
from torch.optim.swa_utils import AveragedModel

from dnw_graph import NeuralGraph, Topology, cost, edited, freeze, inherit, sparsify, sparsity
from dnw_graph._wrapped import unwrapped, unwrapped_names
from dnw_graph.analysis import measure, real_edges


def network(rule: str = "dnw", seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    graph = NeuralGraph(Topology.layered([3, 6, 4]), rule=rule, num_edges=20, node="norm_relu_conv")
    return nn.Sequential(graph, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()


def fabric(model: nn.Module) -> nn.Module:
    return Fabric(accelerator="cpu", devices=1).setup_module(model)


WRAPPERS: list[Callable[[nn.Module], Any]] = [
    torch.compile,
    AveragedModel,
    nn.DataParallel,
    fabric,
    lambda model: torch.compile(AveragedModel(model)),
    lambda model: AveragedModel(nn.DataParallel(model)),
    lambda model: nn.DataParallel(torch.compile(model)),
]


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_wrapped_network_is_the_network_inside(wrap: Callable[[nn.Module], Any]) -> None:
    model, x = network(), torch.randn(2, 3, 5, 5)
    wrapped = wrap(copy.deepcopy(model))
    assert type(unwrapped(wrapped)) is nn.Sequential
    torch.testing.assert_close(freeze(wrapped)(x), freeze(model)(x))
    assert cost(wrapped, image_size=8) == cost(model, image_size=8)
    assert list(measure(wrapped, random=2)) == ["0"]
    assert list(real_edges(wrapped)) == ["0"]
    plain = unwrapped_names(wrapped.state_dict())
    assert plain.keys() == model.state_dict().keys()
    model.load_state_dict(plain)


def test_wrapped_modules_inside_a_network_are_frozen() -> None:
    model, x = network(), torch.randn(2, 3, 5, 5)
    inside = nn.Sequential(torch.compile(model[0]), torch.compile(nn.Sequential(*model[1:])))
    torch.testing.assert_close(freeze(inside)(x), freeze(model)(x))


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_wirings_are_inherited_from_wrapped_networks(wrap: Callable[[nn.Module], Any]) -> None:
    complete = network("complete")
    initial, trained = (wrap(copy.deepcopy(complete)) for _ in range(2))
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours, expected = network("lottery", seed=1), network("lottery", seed=1)
    wrapped = wrap(ours)
    inherit(wrapped, initial=initial.state_dict(), trained=trained.state_dict())
    plain = [unwrapped(model).state_dict() for model in (initial, trained)]
    inherit(expected, initial=plain[0], trained=plain[1])
    found = unwrapped(wrapped)[0]
    assert torch.equal(found.weight, expected[0].weight)
    assert torch.equal(found.wiring().edge_id, expected[0].wiring().edge_id)


def test_a_network_whose_only_child_is_called_module_inherits() -> None:
    nets = [nn.ModuleDict({"module": network(rule)}) for rule in ("complete", "lottery")]
    state = nets[0].state_dict()
    inherit(nets[1], initial=state, trained=state)
    wrapped = {f"module.{name}": value for name, value in state.items()}
    inherit(nets[1], initial=wrapped, trained=wrapped)
    assert len(nets[1]["module"][0].wiring().edge_id) == 20


def test_a_submodule_that_is_called_module_keeps_its_name() -> None:
    model = nn.ModuleDict({"module": nn.Linear(2, 2), "other": nn.Linear(2, 2)})
    assert unwrapped_names(model.state_dict()).keys() == model.state_dict().keys()
    compiled = torch.compile(model)
    assert unwrapped_names(compiled.state_dict()).keys() == model.state_dict().keys()


def test_compiled_graphs_are_edited() -> None:
    graph = network()[0]
    again = edited(torch.compile(graph), graph.to_networkx())
    assert torch.equal(again.wiring().edge_weight, graph.wiring().edge_weight)
    with pytest.raises(TypeError, match="takes a NeuralGraph, got a Linear"):
        edited(nn.Linear(2, 2), graph.to_networkx())


def test_compiled_sparse_layers_are_reported_by_their_names() -> None:
    model = sparsify(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)), 0.5)
    names = [layer.name for layer in sparsity(torch.compile(model)).layers]
    assert names == ["0", "2"]
