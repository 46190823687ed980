"""MobileNetV1-DNW against the published implementation's numbers and the paper's counts."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dnw_graph import cost
from dnw_graph.aggregation import BACKENDS
from models import create_model, load_allenai
from models.allenai import candidates
from models.mbv1_dnw import STAGES, MobileNetV1DNW, MobileNetV1DNWConfig, Stage
from tests.conftest import relative_error


def to_ours(stages: list[Stage], theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the published implementation's tensors, and drop what no forward pass reads."""
    ours = {}
    for name, value in theirs.items():
        match name.split("."):
            case ["conv1", *rest]:
                ours[".".join(["stem", *rest])] = value
            case ["bn", *rest]:
                ours[".".join(["norm", *rest])] = value
            case ["linear", *rest]:
                ours[".".join(["classifier", *rest])] = value
            case ["layers", i, "graph", "weight"]:
                ours[f"graphs.{i}.weight"] = candidates(stages[int(i)], value)
            case ["layers", i, "downsample", "0", "weight"]:
                ours[f"graphs.{i}.nodes.0.conv.weight"] = value
            case ["layers", i, "norm", block, *rest]:
                ours[".".join(["graphs", i, "nodes", block, "norm", *rest])] = value
            case ["layers", i, "conv", "weight"]:
                for block, part in enumerate(value.split(stages[int(i)].width), start=1):
                    ours[f"graphs.{i}.nodes.{block}.conv.weight"] = part
    return ours


@pytest.mark.parametrize("backend", ["auto", "reference", "dense", "sparse"])
def test_equals_the_published_implementation(reference: Any, backend: str, device: str) -> None:
    if device == "cuda" and backend == "sparse":
        pytest.skip("the sparse backend is for CPUs")
    recorded = reference("mbv1_dnw")
    meta = recorded["meta"]
    stages = [Stage(*s) for s in meta["stages"]]
    state = {k.removeprefix("state/"): v for k, v in recorded.items() if k.startswith("state/")}
    given = {"prune_rate": meta["prune_rate"], "image_size": meta["image_size"]}
    model = load_allenai(state, kind="mbv1_dnw", **given).train()
    for graph in model.graphs:
        graph.backend = BACKENDS.resolve(backend)
    model.to(device)

    logits = model(recorded["input"].to(device))
    F.cross_entropy(logits, recorded["target"].to(device)).backward()

    assert relative_error(logits.cpu(), recorded["train_logits"]) < 1e-4
    grads = {k.removeprefix("grad/"): v for k, v in recorded.items() if k.startswith("grad/")}
    expected = to_ours(stages, grads)
    got = dict(model.named_parameters())
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        assert relative_error(got[name].grad.cpu(), value) < 1e-4, name
    after = {k.removeprefix("after/"): v for k, v in recorded.items() if k.startswith("after/")}
    for name, value in to_ours(stages, after).items():
        assert relative_error(model.state_dict()[name].cpu(), value) < 1e-4, name
    model.eval()
    assert relative_error(model(recorded["input"].to(device)).cpu(), recorded["eval_logits"]) < 1e-4


@pytest.mark.parametrize(
    ("d", "edges"),
    [
        (0.225, [104, 1_245, 4_977, 72_991, 79_627]),
        # 2,048 / 100 and so on rounded up; nothing more for 0.1 not being a binary fraction
        (0.1, [21, 246, 984, 14_418, 15_729]),
        (1.0, [2_048, 24_576, 98_304, 1_441_792, 1_572_864]),
    ],
)
def test_edges_of_each_graph(d: float, edges: list[int]) -> None:
    exact = MobileNetV1DNWConfig(width=d).exact_width
    assert [stage.num_edges(exact) for stage in STAGES] == edges


def test_longest_paths_are_those_of_mobilenet() -> None:
    assert [stage.topology().depth for stage in STAGES] == [1, 2, 2, 6, 2]


UNREAD_STEM_CHANNEL = (27 + 9) * 112**2  # its 3x3x3 convolution and its node function


def by_hand(model: MobileNetV1DNW) -> tuple[int, int]:
    """Count multiply-adds and parameters at 224 pixels, edge by edge."""
    wirings = [graph.wiring().edge_index for graph in model.graphs]
    macs = parameters = 27 * len({u for u in wirings[0][0].tolist() if u < 32})
    macs *= 112**2
    for edges, side in zip(wirings, (112, 56, 28, 14, 7), strict=True):
        once = edges.shape[1] + 9 * len(edges[0].unique())
        macs, parameters = macs + once * side**2, parameters + once
    last = model.graphs[-1].topology.outputs
    outputs = int(torch.isin(last, wirings[-1][1]).sum())
    return macs + outputs * (49 + 1000), parameters + outputs * 1000


@pytest.mark.parametrize(
    ("d", "macs", "parameters", "unread"),
    [(0.225, 55_706_808, 1_228_371, 2), (0.51, 169_620_132, 1_886_107, 0)],
)
def test_costs_of_random_wirings(d: float, macs: int, parameters: int, unread: int) -> None:
    """A stem channel that happens to be unread is 0.8 % of the cost at 0.225; the draw had two."""
    model = create_model("mbv1_random", width=d)
    assert by_hand(model) == (cost(model).macs, cost(model).parameters)
    within = 0
    for _ in range(12):
        model.graphs[0].reset_parameters()
        counted = cost(model, image_size=224)
        unread_here = 32 - len(model.graphs[0].wiring().edge_index[0].unique())
        like_theirs = counted.macs + (unread_here - unread) * UNREAD_STEM_CHANNEL
        assert abs(like_theirs / macs - 1) < 0.005
        assert abs(counted.parameters / parameters - 1) < 0.005
        within += abs(counted.macs / macs - 1) < 0.005
    assert within > 0


def test_small_replaces_the_classifier_by_a_graph() -> None:
    small = create_model("mbv1_dnw_small", width=0.225)
    assert small.classifier.num_edges == 230_400  # 0.225 of 1024 x 1000
    assert small(torch.randn(2, 3, 224, 224)).shape == (2, 1000)
    whole, reduced = cost(create_model("mbv1_dnw", width=0.225)), cost(small)
    assert 750_000 < whole.parameters - reduced.parameters < 810_000
