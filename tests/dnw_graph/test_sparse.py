"""Any network made sparse, layer by layer."""

import copy
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from dnw_graph import attach, bake, cost, inherit, penalty, sparsify, sparsity
from dnw_graph.analysis import measure
from dnw_graph.sparse import sparse_weights_of
from dnw_graph.wiring import Candidates, Rule, top_k
from tests.conftest import BUDGETED, OFTEN, relative_error

RULES_OF_WEIGHTS = sorted(set(BUDGETED) - {"complete", "lottery", "fine_tune", OFTEN["gse"]})


class Net(nn.Module):
    """Strided, grouped, pointwise and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.pointwise = nn.Conv2d(8, 16, 1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv1(x)).relu()
        x = self.pointwise(self.depthwise(x)).relu()
        return self.fc(x.mean((2, 3)))


SIZES = {"conv1": 216, "depthwise": 72, "pointwise": 128, "fc": 80}
IMAGES = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(1))


def counts(module: nn.Module) -> dict[str, int]:
    return {layer.name: layer.nonzero for layer in sparsity(module).layers}


@pytest.mark.parametrize("density", [0.1, 0.3, 1.0])
def test_every_layer_has_its_own_budget(density: float) -> None:
    net = Net()
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    assert sparsify(net, density) is net
    assert counts(net) == {name: round(density * size) for name, size in SIZES.items()}
    for name in SIZES:
        layer = net.get_submodule(name)
        original, used = before[f"{name}.weight"], layer.weight
        kept = top_k(original.flatten(), round(density * original.numel()))
        expected = torch.zeros(original.numel()).index_fill(0, kept, 1).view_as(original) * original
        assert torch.equal(used, expected)
    for name, value in net.named_parameters():
        if name in before:
            assert torch.equal(value, before[name])


def by_hand(net: Net, masks: dict[str, Tensor], x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the output of a plain network with masked weights, and these masked weights."""
    weights = {
        name: (net.get_submodule(name).weight.detach() * mask).requires_grad_()
        for name, mask in masks.items()
    }
    z = F.conv2d(x, weights["conv1"], net.conv1.bias, stride=2, padding=1)
    z = F.batch_norm(z, None, None, net.norm.weight, net.norm.bias, training=True).relu()
    z = F.conv2d(z, weights["depthwise"], padding=1, groups=8)
    z = F.conv2d(z, weights["pointwise"], net.pointwise.bias).relu()
    return F.linear(z.mean((2, 3)), weights["fc"], net.fc.bias), weights


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("rule", ["dnw", "random", "no_update"])
def test_gradients_equal_a_masked_network_with_dense_weight_gradients(
    rule: str, memory_format: torch.memory_format
) -> None:
    plain = Net().double()
    net = sparsify(copy.deepcopy(plain), 0.2, rule=rule).to(memory_format=memory_format)
    masks = {name: (net.get_submodule(name).weight != 0).double() for name in SIZES}
    assert {n: int(m.sum()) for n, m in masks.items()} == {
        n: round(0.2 * size) for n, size in SIZES.items()
    }
    x = IMAGES.double()
    expected, weights = by_hand(plain, masks, x)
    y = net(x.to(memory_format=memory_format))
    assert relative_error(y, expected) < 1e-12
    y.square().sum().backward()
    expected.square().sum().backward()
    for name, mask in masks.items():
        grad = net.get_submodule(name).parametrizations.weight.original.grad
        wanted = weights[name].grad if rule == "dnw" else weights[name].grad * mask
        assert relative_error(grad, wanted) < 1e-10


@pytest.mark.parametrize("shape", [(8, 6, 3, 3), (4, 2, 1, 5), (7, 9)])
@pytest.mark.parametrize("rule", RULES_OF_WEIGHTS)
def test_counts_are_exact_whatever_the_memory_format(shape: tuple[int, ...], rule: str) -> None:
    layer: nn.Module
    if len(shape) == 2:
        layer = nn.Linear(shape[1], shape[0])
    else:
        layer = nn.Conv2d(shape[1], shape[0], shape[2:])
        layer = layer.to(memory_format=torch.channels_last)
    sparsify(layer, 0.25, rule=rule)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5, momentum=0.9)
    attach(layer, optimizer, total_steps=6)
    x = torch.randn(3, shape[1], *(9 for _ in shape[2:]))
    expected = round(0.25 * math.prod(shape))
    for _ in range(6):
        optimizer.zero_grad()
        (layer(x).square().mean() + penalty(layer)).backward()
        optimizer.step()
        if rule not in ("l1_anneal", "soft_threshold"):
            assert sparsity(layer).nonzero <= expected
    if rule not in OFTEN.values():  # an edge that has just grown is 0
        assert sparsity(layer).nonzero == expected
    if len(shape) == 4:
        assert layer.weight.is_contiguous(memory_format=torch.channels_last)


def test_rewiring_reaches_weights_that_are_not_contiguous() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 8, 3).to(memory_format=torch.channels_last)
    sparsify(layer, 0.3, rule="rigl(every=1, fraction=0.5)")
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    attach(layer, optimizer, total_steps=4)
    original = layer.parametrizations.weight.original
    before = layer.parametrizations.weight[0].selector.edge_id.clone()
    layer(torch.randn(2, 6, 5, 5)).square().mean().backward()
    grad = original.grad.reshape(-1).abs()
    optimizer.step()
    after = layer.parametrizations.weight[0].selector.edge_id
    born = after[~torch.isin(after, before)]
    assert len(born) > 10
    assert not original.detach().reshape(-1)[born].any()
    assert not optimizer.state[original]["momentum_buffer"].reshape(-1)[born].any()
    others = torch.ones(432, dtype=torch.bool).index_fill(0, torch.cat([before, born]), False)
    assert float(grad[born].min()) >= float(grad[others].max())


def test_shared_weights_stay_shared() -> None:
    first, second = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
    second.weight = first.weight
    net = sparsify(nn.Sequential(first, nn.ReLU(), second), 0.5)
    assert len(list(net.parameters())) == 1
    assert torch.equal(first.weight, second.weight)
    assert (sparsity(net).nonzero, sparsity(net).total) == (18, 36)
    counted = cost(net, example=torch.randn(1, 6))
    assert (counted.macs, counted.parameters, counted.candidate_edges) == (36, 18, 36)
    net(torch.randn(3, 6)).sum().backward()
    bake(net)
    assert torch.equal(first.weight, second.weight)
    assert int(torch.count_nonzero(first.weight)) == 18


def test_baking_leaves_alone_what_shares_a_weight_and_is_dense() -> None:
    embedding, first = nn.Embedding(20, 8), nn.Linear(8, 20)
    first.weight = embedding.weight
    net = sparsify(nn.Sequential(embedding, first), 0.25)
    before, x = embedding.weight.detach().clone(), torch.arange(6)
    expected = net(x)
    bake(net)
    assert torch.equal(net(x), expected)
    assert torch.equal(embedding.weight, before)
    assert int(torch.count_nonzero(first.weight)) == 40


@pytest.mark.parametrize("rule", ["set(every=1)", "rigl(every=1)", "dnw", "l1_anneal"])
def test_frozen_layers_stay_as_they_are(rule: str) -> None:
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    net[0].requires_grad_(False)
    sparsify(net, 0.25, rule=rule)
    weight = net[0].parametrizations.weight.original
    before = weight.detach().clone()
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    attach(net, optimizer, total_steps=8)
    for _ in range(4):
        optimizer.zero_grad()
        net(torch.randn(3, 8)).square().sum().backward()
        optimizer.step()
    assert torch.equal(weight, before)


def test_what_a_rule_selects_is_checked_in_layers_too() -> None:
    class Wrong(Rule):
        def __init__(self, chosen: Any) -> None:
            self.chosen = chosen

        def select(self, candidates: Candidates) -> Tensor:
            return self.chosen

    for chosen, message in (
        (torch.zeros(40, dtype=torch.int64), r"in ascending order without duplicates"),
        ([1, 2], r"edge ids, int64 .* got \[1, 2\]"),
        (torch.ones(4), r"edge ids, int64 .* got torch.float32 \[4\]"),
        (
            torch.tensor([3, 128]),
            r"returned edge ids from 3 to 128, but candidates have ids from 0",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            sparsify(nn.Linear(8, 16), 0.25, rule=Wrong(chosen))(torch.randn(2, 8))


def test_a_shared_weight_takes_of_a_budget_once() -> None:
    net = nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(4)))
    net[2].weight = net[1].weight
    sparsify(net, 1 / 3, spread="erk")
    assert [layer.nonzero for layer in sparsity(net).layers] == [12, 12, 12]  # 0, 1 and 3


def test_empty_layers_are_left_alone() -> None:
    with pytest.warns(UserWarning, match="zero-element"):
        empty = nn.Linear(0, 4)
    net = nn.ModuleList([empty, nn.Linear(4, 4)])
    sparsify(net, 0.5)
    assert counts(net) == {"1": 8}


def test_names_and_patterns_stay_dense() -> None:
    net = sparsify(Net(), 0.1, keep_dense=["conv1", "*wise"])
    assert counts(net) == {"conv1": 216, "depthwise": 72, "pointwise": 128, "fc": 8}


def test_densities_by_layer() -> None:
    net = sparsify(Net(), {"conv1": 1.0, "*wise": 0.5, "*": 0.1})
    assert counts(net) == {"conv1": 216, "depthwise": 36, "pointwise": 64, "fc": 8}


def test_one_budget_is_spread_by_size_or_over_all() -> None:
    total = round(0.2 * sum(SIZES.values()))
    by_size = counts(sparsify(Net(), 0.2, spread="erk"))
    assert sum(by_size.values()) == total
    shares = {n: by_size[n] / SIZES[n] for n in SIZES}
    raw = {"conv1": 17 / 216, "depthwise": 15 / 72, "pointwise": 26 / 128, "fc": 21 / 80}
    scale = shares["fc"] / raw["fc"]
    for name, share in shares.items():
        assert share == pytest.approx(scale * raw[name], abs=1.5 / SIZES[name])
    net = Net()
    everything = torch.cat([net.get_submodule(n).weight.detach().abs().flatten() for n in SIZES])
    threshold = everything.topk(total).values[-1]
    expected = {n: int((net.get_submodule(n).weight.abs() >= threshold).sum()) for n in SIZES}
    found = counts(sparsify(net, 0.2, spread="global"))
    assert sum(found.values()) == total
    assert all(abs(found[n] - max(1, expected[n])) <= 1 for n in SIZES)
    crowded = counts(sparsify(Net(), 0.7, spread="erk"))
    assert sum(crowded.values()) == round(0.7 * sum(SIZES.values()))
    assert crowded["fc"] <= SIZES["fc"]


def test_baked_layers_are_plain_and_give_the_same() -> None:
    net = sparsify(Net(), 0.2).eval()
    expected, found = net(IMAGES), counts(net)
    bake(net)
    assert type(net.conv1) is nn.Conv2d
    assert set(net.state_dict()) == set(Net().state_dict())
    assert torch.equal(net(IMAGES), expected)
    assert counts(net) == found
    assert str(sparsity(net)).splitlines()[-1].split() == ["total", "99", "496", "19.96%"]


def test_cost_counts_what_is_not_zero() -> None:
    dense, net = cost(Net(), 8), sparsify(Net(), 0.25)
    sparse = cost(net, 8)
    assert sparse.parameters == sparse.real_edges == sum(counts(net).values())
    assert sparse.candidate_edges == dense.parameters == sum(SIZES.values())
    expected = (54 + 18 + 32) * 16 + 20
    assert sparse.macs == expected
    baked = cost(bake(net), 8)
    assert (baked.macs, baked.parameters) == (sparse.macs, sparse.parameters)
    assert baked.real_edges == 0


def test_counting_does_not_need_a_training() -> None:
    net = sparsify(Net(), 0.25, rule="rigl")
    assert sparsity(net).nonzero == cost(net, 8).parameters == sum(counts(net).values())
    net.norm.eval()
    bake(net)
    assert net.conv1.training
    assert not net.norm.training  # a norm that was frozen stays so


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "torchvision resnet50": torchvision.models.resnet50,
    "torchvision mobilenet_v3_small": torchvision.models.mobilenet_v3_small,
    **{
        f"timm {name}": partial(timm.create_model, name)
        for name in ("nf_regnet_b0", "convnext_atto")
    },
    "timm vit": partial(timm.create_model, "vit_tiny_patch16_224", img_size=64),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_counts_are_exact_in_networks_of_others(name: str) -> None:
    net = sparsify(NETWORKS[name](), 0.1).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0, momentum=0.9)
    F.cross_entropy(net(torch.randn(2, 3, 64, 64)), torch.tensor([1, 2])).backward()
    before = [conv.weight.detach().clone() for _, (conv, _) in sparse_weights_of(net)]
    optimizer.step()
    report = sparsity(net)
    assert len(before) == len(report.layers) > 20
    for layer in report.layers:
        assert layer.nonzero == max(1, round(0.1 * layer.total)), layer.name
    moved = [
        int(((conv.weight != 0) != (old != 0)).sum())
        for (_, (conv, _)), old in zip(sparse_weights_of(net), before, strict=True)
    ]
    assert sum(moved) > 0
    twin = copy.deepcopy(net.eval())
    assert sparsity(bake(twin)) == report
    x = torch.randn(1, 3, 64, 64)
    assert torch.allclose(twin(x), net(x), rtol=1e-4, atol=1e-5)


def test_state_dict_deepcopy_and_autocast() -> None:
    net, other = sparsify(Net(), 0.2), sparsify(Net(), 0.2)
    other.load_state_dict(net.state_dict())
    twin = copy.deepcopy(net)
    for one in (other, twin):
        assert torch.equal(one.eval()(IMAGES), net.eval()(IMAGES))
    with torch.autocast("cpu", torch.bfloat16):
        y = net(IMAGES)
    assert y.dtype == torch.bfloat16
    assert relative_error(y.float(), net(IMAGES)) < 0.05


def test_compiles_and_trains_the_same() -> None:
    net = sparsify(Net(), 0.2)
    other = copy.deepcopy(net)
    compiled = torch.compile(other, fullgraph=True)
    for module, call in ((net, net), (other, compiled)):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            call(IMAGES).square().sum().backward()
            optimizer.step()
    assert counts(net) == counts(other)
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5)


def test_fine_tune_and_lottery_keep_the_largest_weights_there_are() -> None:
    initial = Net()
    trained = copy.deepcopy(initial)
    for p in trained.parameters():
        p.data += 0.5 * torch.randn_like(p)
    kept = top_k(trained.fc.weight.detach().flatten(), 8)
    tuned = sparsify(copy.deepcopy(trained), 0.1, rule="fine_tune")
    ticket, late = sparsify(Net(), 0.1, rule="lottery"), sparsify(Net(), 0.1, rule="fine_tune")
    with pytest.raises(ValueError, match=r"rule lottery keeps the largest .* call dnw_graph.inher"):
        ticket(IMAGES)
    complete = sparsify(copy.deepcopy(trained), rule="complete").state_dict()
    other = {**trained.state_dict(), "fc.weight": torch.randn(3, 9)}
    with pytest.raises(ValueError, match=r"weights of another model: they differ at fc\."):
        inherit(ticket, initial=initial.state_dict(), trained=other)
    inherit(ticket, initial=initial.state_dict(), trained=trained.state_dict())
    inherit(late, initial=initial.state_dict(), trained=complete)
    for net, source in ((tuned, trained), (ticket, initial), (late, trained)):
        assert torch.equal(net.fc.weight.flatten().nonzero().flatten(), kept)
        assert torch.equal(net.fc.weight.flatten()[kept], source.fc.weight.flatten()[kept])
        assert torch.equal(net.fc.bias, source.fc.bias)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 2)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_patterns_keep_n_of_m_input_channels(
    n: int, m: int, memory_format: torch.memory_format
) -> None:
    conv = nn.Conv2d(16, 6, 3).to(memory_format=memory_format)
    net = nn.Sequential(conv, nn.Flatten(), nn.Linear(24, 8))
    sparsify(net, rule=f"n_of_m(n={n}, m={m})")
    net(torch.randn(2, 16, 4, 4)).square().sum().backward()
    for layer in (net[0], net[2]):
        weight, original = layer.weight, layer.parametrizations.weight.original
        assert bool(original.grad.all())
        groups = weight.movedim(1, -1).reshape(-1, m)
        assert bool(((groups != 0).sum(1) == n).all())
        largest = original.detach().movedim(1, -1).reshape(-1, m).abs().topk(n, dim=1).values
        assert torch.equal(groups.detach().abs().topk(n, dim=1).values, largest)
    assert net[0].weight.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"rule": "n_of_m"},
            r"rule n_of_m does not fit conv1 \(its number of input channels is not .* them dense",
        ),
        (
            {"rule": "n_of_m", "density": 0.3, "keep_dense": ["conv1", "depthwise"]},
            r"2 of 4 edges are 64 of 128, not 38: do not pass",
        ),
        ({"rule": "n_of_m(n=5)"}, r"1 <= n <= m <= 255, got 5 of 4"),
    ],
)
def test_patterns_that_do_not_fit(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sparsify(Net(), **options)


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (Net(), {"density": 0.0}, r"density must be a share .*above 0 and up to 1, got 0.0"),
        (Net(), {"density": 1.5}, r"above 0 and up to 1, got 1.5"),
        (Net(), {"density": {"*": 2}}, r"above 0 and up to 1, got 2"),
        (Net(), {"density": {"fc": 0.5}}, r"density has no entry for layer conv1; .*\"\*\""),
        (Net(), {"density": {"*": 0.5}, "spread": "erk"}, r"pass a number, or omit spread"),
        (
            Net(),
            {"keep_dense": ["conv"]},
            r"no layer or .* 'conv'; the closest is 'conv1'",
        ),
        (Net(), {"keep_dense": ["*"]}, r"nothing to make sparse"),
        (nn.ReLU(), {}, r"nothing to make sparse: no convolution"),
        (sparsify(Net()), {}, r"conv1 is sparse already: .*bake\(\) first"),
        (
            prune.random_unstructured(nn.Linear(4, 4), "weight", 0.5),
            {},
            r"weight of the module is computed .*remove",
        ),
        (parametrizations.weight_norm(nn.Linear(4, 4)), {}, r"is computed .* remove that first"),
        (Net(), {"density": 0.2, "rule": "complete"}, r"complete keeps .* do not pass density"),
        (nn.LazyLinear(3), {}, r"has no shape yet: run the module once"),
        (Net(), {"rule": "dwn"}, r"unknown rule 'dwn'; did you mean 'dnw'"),
        (Net(), {"density": 0.002, "spread": "erk"}, r"leaves 1 real weights for 4 layers"),
        (Net(), {"spread": "even"}, r"unknown spread 'even' \(known: uniform, erk, global\)"),
    ],
)
def test_errors(module: nn.Module, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sparsify(module, **options)
    with pytest.raises(TypeError, match=r"keep_dense must be a list of names, such as \['conv1'\]"):
        sparsify(Net(), keep_dense="conv1")


class Sequences(nn.Module):
    """Embedding, recurrent layer, attention, linear layer."""

    def __init__(self, recurrent: type[nn.RNNBase]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.recurrent = recurrent(8, 8, num_layers=2, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x, _ = self.recurrent(self.embedding(tokens))
        x = x + self.attention(x, x, x)[0]
        out: Tensor = self.head(x.mean(1))
        return out


NAMES = [
    *("recurrent.weight_ih_l0", "recurrent.weight_hh_l0"),
    *("recurrent.weight_ih_l1", "recurrent.weight_hh_l1"),
    *("attention.in_proj_weight", "attention.out_proj", "head"),
]


@pytest.mark.parametrize("recurrent", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("rule", ["dnw", "random"])
def test_attention_and_recurrent_layers_are_sparse(
    recurrent: type[nn.RNNBase], rule: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    net = sparsify(Sequences(recurrent), 0.25, rule=rule)
    report = sparsity(net)
    assert [layer.name for layer in report.layers] == NAMES
    assert all(layer.density == pytest.approx(0.25, abs=0.02) for layer in report.layers)
    tokens, labels = torch.randint(20, (16, 5)), torch.randint(3, (16,))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    attach(net, optimizer, total_steps=60)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(tokens), labels)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    stored: Any = net.recurrent.parametrizations
    grad = stored.weight_hh_l0.original.grad
    assert bool((grad != 0).float().mean() > (0.9 if rule == "dnw" else 0.2))
    assert bool((grad != 0).float().mean() < 0.3) == (rule == "random")

    net.eval()
    expected = net(tokens)
    twin = copy.deepcopy(net)
    assert torch.equal(twin(tokens), expected)
    torch.save(net.state_dict(), tmp_path / "weights.pt")
    other = sparsify(Sequences(recurrent), 0.25, rule=rule).eval()
    assert not torch.allclose(other(tokens), expected)
    other.load_state_dict(torch.load(tmp_path / "weights.pt"))
    assert torch.equal(other(tokens), expected)
    bake(twin)
    assert torch.equal(twin(tokens), expected)
    assert not twin.recurrent._forward_pre_hooks
    assert not twin.recurrent._forward_hooks
    plain = Sequences(recurrent)
    plain.load_state_dict(twin.state_dict())
    assert torch.equal(plain.eval()(tokens), expected)
    assert sparsity(plain).nonzero == report.nonzero


def test_embeddings_are_sparse_where_asked() -> None:
    net = sparsify(Sequences(nn.GRU), {"embedding": 0.5, "*": 0.2}, embeddings=True)
    report = {layer.name: layer.density for layer in sparsity(net).layers}
    assert report["embedding"] == 0.5
    assert int((net.embedding.weight == 0).sum()) == 80
    assert net(torch.randint(20, (2, 4))).shape == (2, 3)
    assert "embedding" not in {layer.name for layer in sparsity(Sequences(nn.GRU)).layers}


def test_separate_projections_and_cells_are_sparse() -> None:
    attention = sparsify(nn.MultiheadAttention(8, 2, kdim=6, vdim=4), 0.5)
    names = {layer.name: layer.shape for layer in sparsity(attention).layers}
    assert names == {
        "q_proj_weight": (8, 8),
        "k_proj_weight": (8, 6),
        "v_proj_weight": (8, 4),
        "out_proj": (8, 8),
    }
    x = torch.randn(3, 2, 8)
    attention(x, torch.randn(5, 2, 6), torch.randn(5, 2, 4))[0].sum().backward()
    cell = sparsify(nn.LSTMCell(4, 6), 0.5, keep_dense=["weight_hh"])
    assert [layer.name for layer in sparsity(cell).layers] == ["weight_ih", "weight_hh"]
    assert cell(torch.randn(2, 4))[0].shape == (2, 6)
    with pytest.raises(ValueError, match=r"no layer or weight .* 'weigth_hh'; the closest is"):
        sparsify(nn.LSTMCell(4, 6), 0.5, keep_dense=["weigth_hh"])


def test_wirings_of_recurrent_layers_are_inherited() -> None:
    torch.manual_seed(0)
    dense = Sequences(nn.LSTM)
    first = copy.deepcopy(dense.state_dict())
    with torch.no_grad():
        dense.recurrent.weight_hh_l0[0, 0] = 9
    net = sparsify(Sequences(nn.LSTM), 0.25, rule="lottery")
    inherit(net, initial=first, trained=dense.state_dict())
    weight: Any = net.recurrent.weight_hh_l0
    assert weight[0, 0] == first["recurrent.weight_hh_l0"][0, 0]
    assert measure(net, random=2)["recurrent.weight_hh_l0"].structure.num_edges == 64


def test_an_error_leaves_modules_in_training_mode() -> None:
    layers = nn.Sequential(nn.Linear(4, 4), nn.Dropout())
    sparsify(layers, rule="lottery")
    with pytest.raises(ValueError, match="inherit"):
        bake(layers)
    assert all(module.training for module in layers.modules())
