"""What several tests share."""

import json
import os

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores: their threads must not spin
    os.environ["OMP_WAIT_POLICY"] = "passive"

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch

import dnw_graph  # first: it quiets what PyTorch Geometric warns of on import
from dnw_graph import NeuralGraph
from dnw_graph.wiring import RULES

OFTEN = {
    rule: f"{rule}(every=2)" for rule in ("set", "rigl", "gse")
}  # by default longer than tests are
OWN_BUDGET = ("constant_fan_in", "n_of_m")
BUDGETED = [OFTEN.get(rule, rule) for rule in RULES if rule not in OWN_BUDGET]
SHARED = Path(__file__).parents[2] / "shared"

hypothesis.settings.register_profile(
    "default",
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("default")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _compiled_anew() -> Iterator[None]:
    """Drop compiled code after each test, so that no test depends on those before it."""
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep decoded pictures out of the user's cache."""
    os.environ["DNW_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    """Each device there is."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU on this machine")
    return str(request.param)


@pytest.fixture
def reference() -> Any:
    """Load recorded numbers of the published implementation, by name."""

    def load(name: str) -> dict[str, Any]:
        path = SHARED / "reference" / f"{name}.npz"
        if not path.exists():
            if os.environ.get("CI"):
                pytest.fail(f"{path} is missing, and CI must run this test")
            pytest.skip(f"needs the recorded numbers {path}, which are not part of a clone")
        with np.load(path) as arrays:
            loaded = {
                key: torch.from_numpy(np.asarray(arrays[key])) for key in arrays if key != "meta"
            }
            return {**loaded, "meta": json.loads(str(arrays["meta"]))}

    return load


def ready(graph: NeuralGraph, total_steps: int = 20, lr: float = 0.1) -> torch.optim.SGD:
    """Let a graph's rule follow an optimizer, and start from another graph where it has to."""
    if graph.rule.starts_from != "itself":
        complete = NeuralGraph(graph.topology, rule="complete")
        trained = {**graph.state_dict(), "weight": torch.randn_like(complete.weight)}
        dnw_graph.inherit(graph, initial=graph.state_dict(), trained=trained)
    optimizer = torch.optim.SGD(graph.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4)
    dnw_graph.attach(graph, optimizer, total_steps=total_steps)
    return optimizer


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the difference over the norm of what is expected."""
    expected = expected.detach()
    scale = float(expected.norm())
    return float((got.detach() - expected).norm()) / (scale if scale > 0 else 1.0)
