"""Frozen graphs compute what they were made of, without what nobody needs."""

import copy
import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import onnxruntime
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dnw_graph import NeuralGraph, Topology, _jit
from dnw_graph.frozen import (
    FrozenGraph,
    _kernels,
    engine,
    freeze,
    load_frozen,
    save_frozen,
    to_exported,
    to_onnx,
)
from dnw_graph.frozen.file import FORMAT, _described, _digest
from dnw_graph.node import Formula, Norm, NormReluConv
from models import create_model
from tests.conftest import BUDGETED, ready, relative_error

INSTANCE = partial(NormReluConv, norm="instance", eps=1e-3)
GRAPHS: dict[str, dict[str, Any]] = {
    "batch norm": {"node": "norm_relu_conv"},
    "stride 2": {"node": "norm_relu_conv", "stride": 2},
    "stride 3": {"node": "norm_relu_conv", "stride": 3},
    "instance norm": {"node": INSTANCE},
    "plain inputs": {"node": "norm_relu_conv", "input_node": "identity"},
    "filtered outputs": {"node": "norm_relu_conv", "output_node": "norm_relu_conv"},
    "relu": {"node": "relu"},
    "norm": {"node": "norm"},
    "messages": {"node": "norm", "message": "relu_conv"},
    "steps": {"node": "norm_relu_conv", "schedule": "discrete(steps=4)"},
    "held": {"node": "norm_relu_conv", "schedule": "discrete(steps=4, input='held')"},
    "steps of their own": {
        "node": partial(Norm, norm="instance", eps=1e-3, steps=3),
        "output_node": partial(Norm, steps=2),
        "message": "relu_conv",
        "schedule": "discrete(steps=4)",
    },
}


KERNELS = {name: getattr(_kernels, name) for name in ("BY_TILE", "BY_NODE", "DENSE")}


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Sum all messages with one kernel."""
    name: str = request.param
    monkeypatch.setattr(engine, "kernel_of", lambda *_: KERNELS[name])
    return name


def lived_in(module: nn.Module) -> nn.Module:
    """Give norms statistics and parameters that a training might have left."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None:
            norm.running_mean.normal_(0, 0.3)
            norm.running_var.uniform_(0.5, 2)
        if isinstance(norm, nn.BatchNorm2d | nn.InstanceNorm2d):
            norm.weight.data.uniform_(0.5, 1.5)
            norm.bias.data.normal_(0, 0.3)
    return module.eval()


@settings(max_examples=25)
@given(st.data())
@pytest.mark.parametrize("kind", GRAPHS)
def test_outputs_are_those_of_the_graph(kind: str, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 99), label="seed"))
    options = GRAPHS[kind]
    in_time = "schedule" in options
    topology = Topology.complete(4, 9, 3) if in_time else Topology.layered([5, 7, 6, 3])
    k = data.draw(st.integers(1, 60), label="edges")
    graph = lived_in(NeuralGraph(topology, num_edges=k, **options))
    frozen = freeze(graph)
    size = data.draw(st.tuples(st.integers(3, 20), st.integers(3, 20)), label="maps")
    x = torch.randn(data.draw(st.integers(1, 4), label="images"), topology.num_inputs, *size)
    with torch.no_grad():
        expected = graph(x)
    name = data.draw(st.sampled_from(list(KERNELS)), label="kernel")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "kernel_of", lambda *_: KERNELS[name])
        outputs = frozen(x), frozen.forward_by_torch(x)
    for output in outputs:
        assert output.shape == expected.shape
        assert relative_error(output, expected) < 1e-5


@pytest.mark.parametrize("rule", BUDGETED)
def test_every_rule_can_be_frozen(rule: str) -> None:
    torch.manual_seed(0)
    graph = NeuralGraph(Topology.layered([6, 8, 5]), rule=rule, num_edges=31, node="relu")
    ready(graph)
    x = torch.randn(7, 6)
    assert relative_error(freeze(graph)(x), graph.eval()(x).detach()) < 1e-6


def test_what_no_output_needs_is_gone_and_what_no_input_reaches_is_a_constant() -> None:
    # 0, 1 inputs; 2 feeds nobody; 3 is fed by nobody and feeds 4; 5 is an output without an edge.
    topology = Topology.from_edges(
        [[0, 0, 1, 3, 4, 1, 2], [2, 4, 4, 4, 6, 2, 5]], inputs=[0, 1], outputs=[5, 6], num_nodes=7
    )
    graph = lived_in(NeuralGraph(topology, num_edges=7))
    with torch.no_grad():
        names = torch.tensor(topology.names)[topology.edge_index]
        graph.weight[(names[0] == 2) & (names[1] == 5)] = 0
    (only,) = freeze(graph).graphs
    kept = [topology.names[v] for v in only.node]
    assert sorted(kept) == [0, 1, 3, 4, 5, 6]
    assert [topology.names[v] for v in only.node[~only.reached]] == [3, 5]
    assert only.num_edges == 4
    assert only.engine.num_edges == 4  # 0 -> 4, 1 -> 4, 4 -> 6, and what 3 sends to 4
    x = torch.randn(2, 2, 6, 5)
    with torch.no_grad():
        assert relative_error(only(x), graph(x)) < 1e-6
        assert not bool(only(x)[:, 0].any())


def test_a_graph_without_a_live_path_and_one_with_a_single_node() -> None:
    topology = Topology.layered([2, 3, 2])
    graph = lived_in(NeuralGraph(topology, num_edges=4, stride=2))
    with torch.no_grad():
        graph.weight.zero_()
    x = torch.randn(3, 2, 7, 8)
    (dead,) = freeze(graph).graphs
    assert (dead.num_nodes, dead.num_edges) == (2, 0)
    assert torch.equal(dead(x), torch.zeros(3, 2, 4, 4))
    with torch.no_grad():
        graph.weight[topology.edge_index[1] == 5] = 1.0  # into one output only
    (some,) = freeze(graph).graphs
    with torch.no_grad():
        assert relative_error(some(x), graph(x)) < 1e-6
    assert some(x[:0]).shape == (0, 2, 4, 4)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("mbv1_dnw", 64),
        ("mbv1_random", 37),
        ("mbv1_dnw_small", 32),
        ("tiny_static", 32),
        ("tiny_discrete", 32),
    ],
)
def test_networks(name: str, size: int, kernel: str) -> None:
    torch.manual_seed(1)
    model = lived_in(create_model(name, num_classes=10, image_size=size))
    before = copy.deepcopy(model.state_dict())
    frozen = freeze(model)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in frozen.modules())
    for images in (1, 3):
        x = torch.randn(images, 3, size, size)
        with torch.no_grad():
            expected = model(x)
        assert relative_error(frozen(x), expected) < 1e-5
        assert relative_error(frozen.forward_by_torch(x), expected) < 1e-5
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
def test_a_bad_image_spoils_no_other(bad: float, kernel: str) -> None:
    for seed in range(4):
        torch.manual_seed(seed)
        graph = NeuralGraph(Topology.layered([4, 8, 8, 4]), num_edges=26, node="norm_relu_conv")
        frozen = freeze(lived_in(graph))
        good = torch.randn(1, 4, 6, 6)
        spoiled = good.clone()
        spoiled[0, 0, 0, 0] = bad
        frozen(spoiled)
        for x in (good, good):
            with torch.no_grad():
                assert relative_error(frozen(x), graph(x)) < 1e-5
            frozen(spoiled)
        batch = frozen(torch.cat([good, spoiled, good]))
        with torch.no_grad():
            assert relative_error(batch[::2], graph(torch.cat([good, good]))) < 1e-5


def test_graphs_that_lead_nowhere_among_others() -> None:
    def graph(dead: bool = False) -> NeuralGraph:
        made = NeuralGraph(Topology.layered([4, 6, 6, 4]), num_edges=20, node="norm_relu_conv")
        if dead:
            made.weight.data.zero_()
        return made

    stem = nn.Conv2d(3, 4, 3, padding=1)
    for net in (
        nn.Sequential(graph(), graph(dead=True)),
        nn.Sequential(stem, graph(dead=True)),
        nn.Sequential(stem, graph(dead=True), graph()),
        nn.Sequential(stem, nn.BatchNorm2d(4, track_running_stats=False), graph()),
    ):
        net.eval()
        x = torch.randn(2, 3 if net[0] is stem else 4, 8, 8)
        with torch.no_grad():
            assert torch.allclose(freeze(net)(x), net(x), atol=1e-5)


def test_weights_may_be_loaded_and_gradients_asked_for_later() -> None:
    nets = [lived_in(create_model("mbv1_dnw", num_classes=3, image_size=32)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    with torch.no_grad():
        nets[1].graphs[2].nodes[0].conv.weight.mul_(2)
    one, other = map(freeze, nets)
    x = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        before = one(x).clone()
    given = x.clone().requires_grad_()
    one(given).sum().backward()
    assert given.grad.abs().sum() > 0
    one.load_state_dict(other.state_dict())
    assert not torch.allclose(one(x), before)
    assert torch.allclose(one(x), other(x), atol=1e-6)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 5, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 5, (3, 1), padding="same", dilation=2),
        nn.AvgPool2d(3, 2, 1, count_include_pad=False),
        nn.AvgPool2d(2, 2, ceil_mode=True, divisor_override=3),
        nn.MaxPool2d(2, 1, dilation=2),
        nn.MaxPool2d(2, 2, ceil_mode=True),
        nn.BatchNorm2d(4, track_running_stats=False),
    ],
)
def test_files_keep_every_option_of_a_layer(layer: nn.Module, tmp_path: Path) -> None:
    graph = NeuralGraph(Topology.layered([3, 6, 4]), num_edges=20, node="norm_relu_conv")
    frozen = freeze(lived_in(nn.Sequential(graph, layer)))
    save_frozen(frozen, tmp_path / "model.safetensors")
    x = torch.randn(2, 3, 9, 9)
    assert torch.equal(load_frozen(tmp_path / "model.safetensors")(x), frozen(x))
    with pytest.raises(ValueError, match="is a folder: pass the path"):
        save_frozen(frozen, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_convolution_before_the_graph(stride: int, threads: int) -> None:
    """Computed with the graph where its engine takes it, whatever the sizes."""
    torch.manual_seed(stride)
    graph = NeuralGraph(Topology.layered([13, 9, 6]), num_edges=60, node="norm_relu_conv", stride=2)
    net = lived_in(nn.Sequential(nn.Conv2d(5, 13, 3, stride, 1), nn.BatchNorm2d(13), graph))
    frozen = freeze(net)
    given = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for batch, height, width in ((1, 17, 33), (3, 5, 4), (2, 6, 6), (1, 32, 32), (5, 8, 31)):
            x = torch.randn(batch, 5, height, width)
            with torch.no_grad():
                expected, plain = net(x), frozen.forward_by_torch(x)
                assert relative_error(plain, expected) < 1e-5
                for _ in range(2):  # memory is used again
                    assert relative_error(frozen(x), expected) < 1e-5
        assert frozen[1].engine.takes(frozen[0]) == (stride < 3)
        with pytest.raises(RuntimeError, match="expected input"):
            frozen(torch.randn(1, 4, 8, 8))
    finally:
        torch.set_num_threads(given)


def test_other_types_gradients_and_copies() -> None:
    graph = lived_in(NeuralGraph(Topology.layered([3, 5, 2]), num_edges=12))
    frozen, x = freeze(graph), torch.randn(2, 3, 6, 6)
    expected = frozen(x)
    assert relative_error(copy.deepcopy(frozen)(x), expected) == 0
    x.requires_grad_()
    frozen(x).sum().backward()
    assert x.grad is not None
    assert bool(x.grad.any())
    assert relative_error(frozen.double()(x.detach().double()), expected.double()) < 1e-6
    assert relative_error(frozen.float()(x.detach()), expected) < 1e-6


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.graph = NeuralGraph(Topology.layered([2, 2]), num_edges=3, node="relu")

    def forward(self, x: Tensor) -> Tensor:
        return x + self.graph(x)


class Odd(nn.Module):
    def __init__(self, nodes: int) -> None:
        super().__init__()

    def forward(self, x: Tensor, t: float) -> Tensor:
        return x.sin()


def test_errors() -> None:
    topology = Topology.layered([2, 3, 2])
    continuous = NeuralGraph(topology, num_edges=5, node="relu", schedule="continuous")
    cases: list[tuple[nn.Module, str]] = [
        (continuous, r"static or in discrete time, got schedule Continuous"),
        (
            NeuralGraph(topology, num_edges=5, node=Odd),
            r"not support the node function Odd: .* a method formula\(t\)",
        ),
        (Twice(), r"modules follow one another, .* in this one, add \(call function\)"),
        (nn.Linear(2, 2), r"found no NeuralGraph in the network; bake\(\)"),
    ]
    for model, message in cases:
        with pytest.raises(ValueError, match=message):
            freeze(model)
    frozen = freeze(NeuralGraph(topology, num_edges=5, node="relu"))
    with pytest.raises(ValueError, match=r"a frozen model cannot be trained"):
        frozen.train()


@pytest.mark.parametrize("name", ["mbv1_dnw", "mbv1_dnw_small", "tiny_discrete"])
def test_a_file_holds_a_network(name: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    frozen = freeze(lived_in(create_model(name, num_classes=10, image_size=32)))
    save_frozen(frozen, tmp_path / "frozen.safetensors", {"classes": "some"})
    loaded, x = load_frozen(tmp_path / "frozen.safetensors"), torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(x), frozen(x))
    assert loaded.notes == {"classes": "some"}
    assert not list(tmp_path.glob(".*.half"))


def test_a_file_is_read_without_the_training_code(tmp_path: Path) -> None:
    frozen = freeze(lived_in(create_model("mbv1_dnw", num_classes=10, image_size=32)))
    save_frozen(frozen, tmp_path / "frozen.safetensors")
    script = (
        "import sys, torch, dnw_graph\n"
        f"print(dnw_graph.load_frozen({str(tmp_path / 'frozen.safetensors')!r})"
        "(torch.ones(1, 3, 32, 32)).shape)\n"
        "assert not {'train', 'models'} & sys.modules.keys()\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.stdout == "torch.Size([1, 10])\n", done.stderr


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    graph = lived_in(NeuralGraph(Topology.layered([3, 5, 2]), num_edges=12))
    path, x = tmp_path / "frozen.safetensors", torch.randn(1, 3, 5, 5)
    frozen = freeze(nn.Sequential(nn.Conv2d(3, 3, 3), graph, nn.Flatten(), nn.Linear(18, 2)))
    save_frozen(frozen, path)
    whole, expected = path.read_bytes(), frozen(x)
    random = Random(0)
    refused = 0
    for number in range(3000):
        content = bytearray(whole)
        kind = number % 4
        at = random.randrange(len(content))
        if kind == 0:
            content[at] ^= 1 << random.randrange(8)
        elif kind == 1:
            del content[at:]
        elif kind == 2:
            del content[at : at + random.randrange(1, 9)]
        else:
            content[at : at + 4] = random.randbytes(4)
        path.write_bytes(content)
        try:
            loaded = load_frozen(path)
        except ValueError:
            refused += 1
        else:  # what changed was of no meaning, such as a space
            assert torch.equal(loaded(x), expected)
    assert refused > 2900


def signed(layers: Any, tensors: dict[str, Tensor]) -> bytes:
    """Return a file whose checksum is right."""
    text = json.dumps({"layers": layers, "notes": {}})
    metadata = {"format": FORMAT, "model": text, "sha256": _digest(text, tensors)}
    return safetensors.torch.save(tensors, metadata)


def test_files_made_by_others_are_checked(tmp_path: Path) -> None:
    graph = lived_in(NeuralGraph(Topology.layered([3, 5, 2]), num_edges=12))
    path, frozen = tmp_path / "frozen.safetensors", freeze(graph)
    tensors, described = frozen.state_dict(), _described(frozen[0])
    path.write_bytes(signed([described], tensors))
    load_frozen(path)
    edges = tensors["0.edge_index"]
    parts = described["parts"]
    cases: list[tuple[Any, dict[str, Tensor], str]] = [
        ([described], {"0.edge_index": edges + 100}, "edge_index must hold numbers from 0"),
        ([described], {"0.edge_index": edges - 100}, "edge_index must hold numbers from 0"),
        ([described], {"0.edge_index": edges.flip(0)}, "lead from parts to later ones"),
        ([described], {"0.edge_index": edges.flip(1)}, "sorted by target"),
        ([described], {"0.edge_index": edges.int()}, "must not be torch.int32"),
        ([described], {"0.outputs": tensors["0.outputs"] + 9}, "outputs must hold numbers"),
        ([described], {"0.inputs": tensors["0.inputs"] - 9}, "inputs must hold numbers"),
        ([described], {"0.scale": torch.ones(3)}, r"scale must be \["),
        ([described], {"0.more": torch.ones(3)}, "a graph has the tensors"),
        ([{**described, "strides": [0]}], {}, "strides between levels must be 2 or more"),
        ([{**described, "strides": ["a"]}], {}, "must be whole numbers"),
        ([{**described, "strides": [2]}], {}, "outputs must be of the last level"),
        ([{**described, "parts": [{**parts[0], "level": 1}, *parts[1:]]}], {}, "levels must be"),
        (
            [{**described, "parts": [{**parts[0], "reads": 1}, *parts[1:]]}],
            {},
            "level of a part must be",
        ),
        ([{**described, "parts": parts[:-1]}], {}, "parts must follow one another"),
        ([{**described, "parts": parts[::-1]}], {}, "parts must follow one another"),
        ([{**described, "parts": [{**parts[0], "role": 7}, *parts[1:]]}], {}, "7"),
        ([described, {"layer": "system", "options": {}}], {}, "unknown layer 'system'"),
        ([described, {"layer": "Linear", "options": {"in_features": 2**40}}], {}, "in_features"),
        ([described, {"layer": "ReLU", "options": {"x": 1}}], {}, "x"),
        (7, {}, "damaged"),
    ]
    for layers, changed, message in cases:
        path.write_bytes(signed(layers, {**tensors, **changed}))
        with pytest.raises(ValueError, match=message):
            load_frozen(path)
    with pytest.raises(FileNotFoundError):
        load_frozen(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"a file cannot hold the layer Tanh \(known: .*Conv2d"):
        save_frozen(freeze(nn.Sequential(graph, nn.Tanh())), path)


def test_channels_that_do_not_fit_are_an_error() -> None:
    frozen = freeze(lived_in(NeuralGraph(Topology.layered([3, 5, 2]), rule="complete")))
    with pytest.raises(ValueError, match=r"channels .* got \[1, 2, 5, 5\]"):
        frozen(torch.randn(1, 2, 5, 5))
    with pytest.raises(ValueError, match=r"feature maps \[B, C, H, W\]"):
        frozen(torch.randn(1, 3))


@pytest.mark.parametrize("name", ["mbv1_dnw", "tiny_discrete"])
def test_exported_networks_compute_the_same(name: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    frozen = freeze(lived_in(create_model(name, num_classes=10, image_size=32)))
    example, x = torch.randn(1, 3, 32, 32), torch.randn(5, 3, 32, 32)
    to_onnx(frozen, example, tmp_path / "model.onnx", {"classes": "some"})
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert session.get_modelmeta().custom_metadata_map["classes"] == "some"
    (got,) = session.run(None, {"images": x.numpy()})
    assert relative_error(torch.from_numpy(got), frozen(x)) < 1e-5
    torch.export.save(to_exported(frozen, example), tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    assert relative_error(loaded(x), frozen(x)) < 1e-5


def test_an_export_that_computes_something_else_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen = freeze(lived_in(NeuralGraph(Topology.layered([3, 5, 2]), num_edges=12)))
    forward_by_torch = FrozenGraph.forward_by_torch
    monkeypatch.setattr(
        FrozenGraph, "forward_by_torch", lambda self, x: forward_by_torch(self, x) + 1e-2
    )
    with pytest.raises(
        ValueError, match=r"network in torch.export differ from those of the network by"
    ):
        to_onnx(frozen, torch.randn(1, 3, 5, 5), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_sums_are_the_same_with_each_kernel_and_the_report_says_which(kernel: str) -> None:
    torch.manual_seed(1)
    graph = lived_in(NeuralGraph(Topology.layered([6, 20, 6], skip=False), rule="complete"))
    frozen, x = freeze(graph), torch.randn(1, 6, 14, 14)
    with torch.no_grad():
        assert relative_error(frozen(x), graph(x)) < 1e-6
    report = frozen.report(example=x)
    assert report.parameters == 2 * 6 * 20 + 9 * (6 + 20)
    assert report.macs == 196 * report.parameters
    halved = freeze(lived_in(NeuralGraph(Topology.layered([6, 6]), rule="complete", stride=2)))
    assert halved.report(example=x).macs == 49 * (9 * 6 + 6 * 6)
    is_dense = kernel == "DENSE"
    assert f"{2 * (not is_dense)} sums sparse, {2 * is_dense} dense" in str(report)
    assert report.milliseconds > 0


@pytest.mark.parametrize("kind", ["batch norm", "stride 2", "instance norm"])
@pytest.mark.parametrize("images", [3, 4, 7])
def test_threads_compute_different_images(
    images: int, kind: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(images)
    monkeypatch.setattr(engine, "PIXELS_AT_ONCE", 2 * 9 * 8)  # two images at a time
    topology = Topology.from_edges(
        [[0, 0, 1, 2, 3, 3, 2], [2, 3, 3, 4, 4, 5, 6]], inputs=[0, 1], outputs=[4, 5, 6]
    )
    graph = lived_in(NeuralGraph(topology, num_edges=6, **GRAPHS[kind]))
    with torch.no_grad():
        names = torch.tensor(topology.names)[topology.edge_index]
        graph.weight[names[1] == 2] = 0  # so 2 and 6 are constant
    frozen, x, threads = freeze(graph), torch.randn(images, 2, 9, 8), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        output = frozen(x)
        plans = frozen.graphs[0].engine._plans.values()
        apart, available = [plan for plan in plans if plan.threads == 1], _jit.threads() == 2
    finally:
        torch.set_num_threads(threads)
    if available:
        assert len(apart) == (0 if images < 4 else 1 if kernel == "DENSE" else 2)
    assert relative_error(output, frozen.forward_by_torch(x)) < 1e-5


@pytest.mark.parametrize("seconds", [0.0, 0.05])
def test_the_report_says_which_of_two_networks_is_faster(seconds: float) -> None:
    frozen = freeze(NeuralGraph(Topology.layered([6, 20, 6]), rule="complete").eval())
    x = torch.randn(1, 6, 5, 5)
    assert frozen.report(example=x).ratio is None
    report = frozen.report(example=x, compared_with=lambda _: seconds and time.sleep(seconds))
    assert report.ratio == pytest.approx(report.milliseconds / report.other_milliseconds)
    faster = "this network" if seconds else "the other network"
    assert f"{faster} is faster on this machine: {report.ratio:.2f} times" in str(report)


@pytest.mark.parametrize("number", [6, 20])
def test_sizes_in_turn_are_planned_once(number: int) -> None:
    torch.manual_seed(0)
    graph = NeuralGraph(Topology.layered([3, 12, 5]), num_edges=40, node="norm_relu_conv").eval()
    frozen = freeze(graph)
    inputs = [torch.randn(1 + i % 3, 3, 5 + i, 4 + i) for i in range(number)]
    expected = [graph(x).detach() for x in inputs]
    planned: list[object] = []
    plan = engine._Plan.__init__

    def note(self: object, *args: object) -> None:
        planned.append(self)
        plan(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine._Plan, "__init__", note)
        for turn in range(3):
            for x, y in zip(inputs, expected, strict=True):
                torch.testing.assert_close(frozen(x), y, rtol=1e-4, atol=1e-4)
            if turn == 0:
                once = len(planned)
    assert len(planned) == once <= number + 2  # large images go through one after the other


def test_plans_take_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = NeuralGraph(Topology.layered([3, 12, 5]), num_edges=40, node="norm_relu_conv").eval()
    frozen = freeze(graph).graphs[0]
    frozen(torch.randn(1, 3, 8, 8))
    one = next(iter(frozen.engine._plans.values())).nbytes
    monkeypatch.setattr(engine, "PLAN_BYTES", 5 * one)
    for size in range(8, 28):
        frozen(torch.randn(1, 3, size, 8))
    plans = list(frozen.engine._plans.values())
    assert 1 <= len(plans) < 8
    assert sum(plan.nbytes for plan in plans[:-1]) <= 5 * one


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((64, 64 * 16, 128, 1), "BY_NODE"),
        ((64, 64 * 17, 128, 1), "BY_TILE"),
        ((64, 64 * 17, 128, 2), "BY_NODE"),
        ((256, 256 * 768, 768, 1), "DENSE"),
        ((256, 256 * 768, 768, 8), "DENSE"),
        ((256, 256 * 400, 512, 1), "BY_TILE"),
        ((64, 64 * 64, 64, 2), "BY_NODE"),
    ],
)
def test_kernels_follow_from_sizes(size: tuple[int, ...], expected: str) -> None:
    assert engine.kernel_of(*size) == KERNELS[expected]


def test_outputs_do_not_differ_from_process_to_process(tmp_path: Path) -> None:
    torch.manual_seed(0)
    frozen = freeze(lived_in(create_model("mbv1_dnw", width=0.1, num_classes=10)))
    save_frozen(frozen, tmp_path / "model.safetensors")
    script = """if True:
        import sys, torch
        from dnw_graph import load_frozen
        torch.set_num_threads(1)
        frozen = load_frozen(sys.argv[1])
        images = torch.linspace(-1, 1, 3 * 3 * 48 * 48).view(3, 3, 48, 48)
        print(frozen(images).numpy().tobytes().hex())
    """
    command = [sys.executable, "-c", script, tmp_path / "model.safetensors"]
    first, second = (
        subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2)
    )
    assert first == second
    assert len(first) > 3 * 10 * 4 * 2


class Shifted(nn.Module):
    """Adds a number to each input, and says so in a formula without a scale."""

    def __init__(self, num_nodes: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(num_nodes))

    def forward(self, x: Tensor, t: float) -> Tensor:
        return x + self.shift[:, None]

    def formula(self, t: float) -> Formula:
        return Formula(shift=self.shift)


def test_a_shift_alone_is_frozen_or_refused() -> None:
    topology, x = Topology.layered([4, 6, 3]), torch.randn(5, 4)
    for options in ({"node": Shifted}, {"node": "identity", "message": Shifted}):
        graph = NeuralGraph(topology, rule="complete", **options).eval()
        assert relative_error(freeze(graph)(x), graph(x)) < 1e-5
    graph = NeuralGraph(topology, rule="complete", node="relu", message=Shifted)
    with pytest.raises(
        ValueError, match=r"does not support this message function.* scale, shift or"
    ):
        freeze(graph.eval())


@pytest.mark.parametrize(
    ("formula", "message"),
    [
        ({"scale": torch.ones(3)}, r"function of block 0 must have scale \[4\] or None, got \[3\]"),
        ({"shift": 2.0}, r"must have shift \[4\] or None, got 2.0"),
        ({"filters": torch.ones(4, 3)}, r"must have filters \[4, 3, 3\] or None, got \[4, 3\]"),
    ],
)
def test_a_formula_has_an_entry_per_node(formula: dict[str, Any], message: str) -> None:
    node = type("Odd", (Shifted,), {"formula": lambda self, t: Formula(**formula)})
    graph = NeuralGraph(Topology.layered([4, 6, 3]), rule="complete", node=node).eval()
    with pytest.raises(ValueError, match=message):
        freeze(graph)
