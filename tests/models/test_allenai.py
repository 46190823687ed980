"""Checkpoints of the published implementation."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchdiffeq import odeint

from models import create_model, load_allenai
from models.allenai import candidates, read_allenai
from models.mbv1_dnw import STAGES, Stage
from tests.conftest import relative_error

SMALL = [Stage(4, 6, 1, 1), Stage(6, 8, 2, 3)]


def norm(name: str, size: int) -> dict[str, Tensor]:
    return {
        f"{name}.weight": torch.rand(size) + 0.5,
        f"{name}.bias": torch.randn(size),
        f"{name}.running_mean": torch.randn(size),
        f"{name}.running_var": torch.rand(size) + 0.5,
        f"{name}.num_batches_tracked": torch.tensor(3),
    }


def checkpoint(stages: list[Stage], kind: str, classes: int = 5) -> dict[str, Tensor]:
    """Make up the tensors of a MobileNet of that implementation."""
    state = {"conv1.weight": torch.randn(stages[0].inputs, 3, 3, 3)}
    for i, stage in enumerate(stages):
        sources = stage.inputs + stage.width * (stage.blocks - 1)
        matrix = torch.randn(stage.width * stage.blocks, sources, 1, 1)
        state[f"layers.{i}.graph.weight"] = matrix
        if kind == "mbv1_random":
            allowed = torch.zeros_like(matrix[:, :, 0, 0])
            for j in range(stage.blocks):
                rows = slice(j * stage.width, (j + 1) * stage.width)
                allowed[rows, : stage.inputs + j * stage.width] = 1
            mask = (torch.rand_like(allowed) < 0.4) * allowed
            state[f"layers.{i}.graph.mask"] = mask[:, :, None, None]
        state[f"layers.{i}.downsample.0.weight"] = torch.randn(stage.inputs, 1, 3, 3)
        state |= norm(f"layers.{i}.norm.0", stage.inputs)
        for block in range(1, stage.blocks):
            state |= norm(f"layers.{i}.norm.{block}", stage.width)
        if stage.blocks > 1:
            state[f"layers.{i}.conv.weight"] = torch.randn(
                stage.width * (stage.blocks - 1), 1, 3, 3
            )
    width = stages[-1].width
    state |= norm("bn", width)
    if kind == "mbv1_dnw_small":
        state["linear.graph.weight"] = torch.randn(classes, width, 1, 1)
    else:
        state |= {"linear.weight": torch.randn(classes, width), "linear.bias": torch.randn(classes)}
    return state


def by_hand(state: dict[str, Tensor], stages: list[Stage], rate: float, x: Tensor) -> Tensor:
    """Compute the logits of such a network from its description, in evaluation."""

    def normed(name: str, x: Tensor) -> Tensor:
        parts = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(state[f"{name}.{part}"] for part in parts)).relu()

    def pruned(matrix: Tensor, drop: int) -> Tensor:
        flat = matrix.flatten().clone()
        flat[flat.abs().argsort()[:drop]] = 0
        return flat.view(matrix.shape)

    x = F.conv2d(x, state["conv1.weight"], stride=1, padding=1)
    for i, stage in enumerate(stages):
        matrix = state[f"layers.{i}.graph.weight"]
        if f"layers.{i}.graph.mask" in state:
            matrix = matrix * state[f"layers.{i}.graph.mask"]
        else:
            edges = stage.inputs * stage.width + (stage.blocks - 1) * stage.width**2
            share = 1 - edges * (1 - rate) ** 2 / matrix.numel()
            matrix = pruned(matrix, int(share * matrix.numel()))
        x = F.conv2d(
            normed(f"layers.{i}.norm.0", x),
            state[f"layers.{i}.downsample.0.weight"],
            stride=stage.stride,
            padding=1,
            groups=stage.inputs,
        )
        states = x
        for j in range(stage.blocks):
            rows = slice(j * stage.width, (j + 1) * stage.width)
            x = F.conv2d(states, matrix[rows, : states.shape[1]])
            if j + 1 < stage.blocks:
                filters = state[f"layers.{i}.conv.weight"][rows]
                x = F.conv2d(
                    normed(f"layers.{i}.norm.{j + 1}", x), filters, padding=1, groups=stage.width
                )
                states = torch.cat([states, x], dim=1)
    x = normed("bn", x).mean((2, 3))
    if "linear.graph.weight" in state:
        matrix = state["linear.graph.weight"]
        return x @ pruned(matrix, int(rate * matrix.numel()))[:, :, 0, 0].t()
    return F.linear(x, state["linear.weight"], state["linear.bias"])


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("kind", ["mbv1_dnw", "mbv1_dnw_small", "mbv1_random"])
def test_the_same_logits(kind: Any, prefix: str) -> None:
    state = checkpoint(SMALL, kind)
    model = load_allenai(
        {prefix + name: value for name, value in state.items()},
        kind=kind,
        prune_rate=0.4,
        image_size=16,
    )
    x = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        assert relative_error(model(x), by_hand(state, SMALL, 0.4, x)) < 1e-4


def test_candidates_are_read_in_order() -> None:
    matrix = torch.arange(24.0).view(6, 4)
    expected = [0, 1, 4, 5, 8, 9, 10, 11, 12, 13, 14, 15]
    assert candidates(Stage(2, 2, 1, 2), matrix[:4]).tolist() == [0, 1, 4, 5, *expected[4:]]


@pytest.mark.parametrize("kind", ["mbv1_dnw", "mbv1_random"])
def test_networks_of_the_published_sizes_can_be_built_by_name(kind: Any) -> None:
    state = checkpoint(list(STAGES), kind, classes=10)
    found = read_allenai(state, kind=kind, prune_rate=0.775, image_size=32)
    assert found.options is not None
    again = create_model(found.name, **found.options)
    again.load_state_dict(found.model.state_dict())
    assert [graph.num_edges for graph in again.graphs] == list(found.options["num_edges"])
    assert read_allenai(checkpoint(SMALL, kind), kind=kind, prune_rate=0.4).options is None


def tiny(
    kind: str, nodes: int = 20, inputs: int = 4, outputs: int = 6, classes: int = 3
) -> dict[str, Tensor]:
    half, inside = inputs // 2, "odesolve.odefunc." if kind == "continuous" else ""
    return {
        "zeros": torch.zeros(1, nodes - inputs, 8, 8),
        "downsample.0.weight": torch.randn(half, 3, 3, 3),
        "downsample.0.bias": torch.randn(half),
        **norm("downsample.1", half),
        "downsample.3.weight": torch.randn(half, 1, 3, 3),
        "downsample.3.bias": torch.randn(half),
        "downsample.4.weight": torch.randn(inputs, half, 1, 1),
        "downsample.4.bias": torch.randn(inputs),
        **norm("downsample.5", inputs),
        f"{inside}conv.weight": torch.randn(nodes, 1, 3, 3),
        f"{inside}graph.weight": torch.randn(nodes, nodes, 1, 1),
        f"{inside}norm.weight": torch.randn(nodes),
        f"{inside}norm.bias": torch.randn(nodes),
        "fc.weight": torch.randn(classes, outputs),
        "fc.bias": torch.randn(classes),
    }


def tiny_by_hand(
    state: dict[str, Tensor], kind: str, prune_rate: float, x: Tensor, layers: int
) -> Tensor:
    """Return what the published networks in time compute, in evaluation."""
    inside = "odesolve.odefunc." if kind == "continuous" else ""

    def normalized(z: Tensor, name: str) -> Tensor:
        parts = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(z, *(state[f"{name}.{part}"] for part in parts))

    def convolved(z: Tensor, name: str, **options: int) -> Tensor:
        return F.conv2d(z, state[f"{name}.weight"], state[f"{name}.bias"], **options)

    z = F.relu(normalized(convolved(x, "downsample.0", stride=2, padding=1), "downsample.1"))
    z = convolved(z, "downsample.3", stride=2, padding=1, groups=z.shape[1])
    z = normalized(convolved(z, "downsample.4"), "downsample.5")
    z = torch.cat([z, state["zeros"].expand(len(z), -1, -1, -1)], 1)
    weight = state[f"{inside}graph.weight"].clone()
    weight.view(-1)[weight.flatten().abs().argsort()[: int(prune_rate * weight.numel())]] = 0

    def step(t: Any, z: Tensor) -> Tensor:
        z = F.conv2d(z.relu_(), state[f"{inside}conv.weight"], padding=1, groups=z.shape[1])
        scale = state[f"{inside}norm.weight"], state[f"{inside}norm.bias"]
        return F.instance_norm(F.conv2d(z, weight), None, None, *scale)

    if kind == "continuous":
        z = odeint(step, z, torch.tensor([0.0, 1.0]), rtol=1e-3, atol=1e-3)[1]
    for _ in range(layers if kind == "discrete" else 0):
        z = step(None, z)
    half, classes = state["zeros"].shape[-1] // 2 - 1, state["fc.weight"].shape[1]
    z = F.avg_pool2d(z[:, -classes:, half - 1 : half + 2, half - 1 : half + 2], 2)
    return F.linear(z.flatten(1), state["fc.weight"], state["fc.bias"])


@pytest.mark.parametrize(("kind", "layers"), [("discrete", 5), ("discrete", 3), ("continuous", 5)])
def test_tiny_networks_compute_what_they_did(kind: Any, layers: int) -> None:
    torch.manual_seed(0)
    state = tiny(kind)
    model = load_allenai(state, kind=kind, prune_rate=0.9, image_size=32, layers=layers)
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        expected = tiny_by_hand(state, kind, 0.9, x, layers)
        assert relative_error(model(x), expected) < 1e-4


@pytest.mark.parametrize("kind", ["discrete", "continuous"])
@pytest.mark.parametrize("random", [False, True])
def test_tiny_networks_keep_every_tensor(kind: Any, random: bool) -> None:
    state = tiny(kind)
    name = next(n for n in state if n.endswith("graph.weight"))
    kept = state[name].flatten().abs().argsort()[360:].sort().values
    if random:
        mask = (torch.rand(400) < 0.1).float()
        state[name.replace("weight", "mask")] = mask.view(20, 20, 1, 1)
        kept = mask.nonzero().flatten()
    model = load_allenai(state, kind=kind, prune_rate=0.9, image_size=32)
    assert torch.equal(model.graph.wiring().edge_id, kept)
    ours = model.state_dict()
    sent = [ours[f"graph.messages.{i}.conv.weight"] for i in range(3)]
    assert torch.equal(torch.cat(sent), state[name.replace("graph", "conv")])
    assert torch.equal(ours["classifier.weight"], state["fc.weight"])
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 3)


@pytest.mark.parametrize(
    ("change", "given", "message"),
    [
        (
            {},
            {"kind": "mbv2"},
            r"unknown kind 'mbv2' \(known: mbv1_dnw, mbv1_dnw_small, mbv1_random",
        ),
        ({}, {"prune_rate": 1.0}, r"prune_rate must be a share, .* got 1.0"),
        (
            {},
            {"kind": "mbv1_dnw_small"},
            r"of kind 'mbv1_dnw_small': it has no 'linear.graph.weight'",
        ),
        (
            {},
            {"kind": "discrete"},
            r"of kind 'discrete': it has no 'graph.weight', but conv1.weight",
        ),
        ({"extra": torch.zeros(1)}, {}, r"of kind 'mbv1_dnw'; unknown: extra"),
        ({"bn.bias": None}, {}, r"of kind 'mbv1_dnw'; missing: bn.bias"),
        ({"bn.bias": torch.zeros(3)}, {}, r"bn.bias of the checkpoint has shape \[3\], which does"),
        (
            {"layers.1.conv.weight": torch.zeros(3, 1, 3, 3)},
            {},
            r"has 3 nodes, but 16 are expected",
        ),
        ({"layers.1.graph.weight": torch.tensor(1.0)}, {}, r"1.graph.weight .* a single number"),
        ({"bn.bias": torch.zeros(8).to_sparse()}, {}, r"bn.bias .* is of layout torch.sparse_coo"),
        ({"bn.bias": torch.full((8,), float("nan"))}, {}, r"bn.bias .* that are not finite"),
    ],
)
def test_errors(change: dict[str, Any], given: dict[str, Any], message: str) -> None:
    state = checkpoint(SMALL, "mbv1_dnw") | change
    state = {name: value for name, value in state.items() if value is not None}
    options: dict[str, Any] = {"kind": "mbv1_dnw", "prune_rate": 0.4, "image_size": 16} | given
    with pytest.raises(ValueError, match=message):
        load_allenai(state, **options)


def test_checkpoints_without_counts_of_batches_are_read() -> None:
    state = checkpoint(SMALL, "mbv1_dnw")
    old = {n: v for n, v in state.items() if not n.endswith("num_batches_tracked")}
    model = load_allenai(old, kind="mbv1_dnw", prune_rate=0.4, image_size=16)
    x = torch.randn(2, 3, 16, 16)
    assert relative_error(model(x), by_hand(state, SMALL, 0.4, x)) < 1e-4
