"""The tiny classifiers of Table 1: one graph that is static, or in discrete or continuous time."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from dnw_graph import NeuralGraph, Rule, Topology, frozen, precision
from dnw_graph.aggregation import BACKENDS, Backend
from dnw_graph.node import Norm, NormReluConv
from dnw_graph.schedule import SCHEDULES, Schedule
from models.registry import ModelConfig, check_norm_eps, register_model

INPUTS, OUTPUTS, NODES, EDGES = 32, 100, 800, 32_000
LAYERS = 5


@dataclass(frozen=True, kw_only=True)
class TinyConfig(ModelConfig):
    """Options of a tiny classifier, in addition to those of every model.

    Attributes:
        rule: How edges are chosen, optionally with arguments, as in ``"rigl(every=50)"``; see
            docs/rules.md.
        norm_eps: Value that the nodes' normalisation adds to variances.
        backend: How messages are summed; see :class:`dnw_graph.NeuralGraph`.
        schedule: When nodes fire, as in ``"discrete(steps=3)"``; see docs/time.md. If None, the
            schedule that the model is named after.
    """

    rule: str | Rule | type[Rule] = "dnw"
    norm_eps: float = 1e-5
    backend: str | Backend | type[Backend] = "auto"
    schedule: str | Schedule | type[Schedule] | None = None

    not_in_shapes: ClassVar[tuple[str, ...]] = ("norm_eps",)
    cifar10: ClassVar[Mapping[str, Any]] = {"batch_size": 512, "lr_schedule": "steps"}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_norm_eps(self.norm_eps)
        BACKENDS.resolve(self.backend)
        if self.schedule is not None:
            SCHEDULES.resolve(self.schedule)
        if self.image_size < 8:
            raise ValueError(
                f"images of {self.image_size} pixels are too small for a tiny classifier: use 8 "
                "pixels or more"
            )


class CentrePool(nn.Module):
    """Averages four pixels near the centre, in rows and columns ``n/2 - 2`` and ``n/2 - 1``."""

    def forward(self, x: Tensor) -> Tensor:
        """Return means ``[B, C]`` of maps ``[B, C, H, W]``; ``H`` and ``W`` must be 2 or more."""
        rows, columns = (slice(max(size // 2 - 2, 0), size // 2) for size in x.shape[2:])
        return x[:, :, rows, columns].mean((2, 3))


frozen.LAYERS.register("CentrePool")(frozen.LayerKind(CentrePool))  # needed to freeze the network


class TinyClassifier(nn.Module):
    """A stem to a quarter of the resolution, a graph of 800 nodes and 32,000 edges, a classifier.

    Args:
        config: Classes, image size.
        graph: The graph.

    Shapes:
        - input ``[B, 3, H, W]``
        - output ``[B, num_classes]``
    """

    def __init__(self, config: TinyConfig, graph: NeuralGraph) -> None:
        super().__init__()
        inputs, outputs = graph.topology.num_inputs, graph.topology.num_outputs
        half = inputs // 2
        self.stem = nn.Sequential(
            nn.Conv2d(3, half, 3, 2, padding=1),
            nn.BatchNorm2d(half),
            nn.ReLU(),
            nn.Conv2d(half, half, 3, 2, padding=1, groups=half),
            nn.Conv2d(half, inputs, 1),
            nn.BatchNorm2d(inputs),
        )
        self.graph = graph
        self.pool = CentrePool()
        self.classifier = nn.Linear(outputs, config.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[B, num_classes]`` for images ``[B, 3, H, W]``."""
        states = self.graph(precision.call(self.stem, x))
        logits = precision.call(self.classifier, self.pool(states))
        return logits


@register_model("tiny_static", TinyConfig)
def tiny_static(config: TinyConfig) -> nn.Module:
    """Build the static classifier: inputs, four blocks of 167 nodes, outputs.

    Its longest path has five edges, equal to the number of steps of the discrete classifier. The
    static network of the published implementation is cyclic within its last block, so there is no
    acyclic equivalent.
    """
    width = (NODES - INPUTS - OUTPUTS) // (LAYERS - 1)
    graph = NeuralGraph(
        Topology.layered([INPUTS, *[width] * (LAYERS - 1), OUTPUTS]),
        rule=config.rule,
        num_edges=EDGES,
        node=partial(NormReluConv, norm="instance", eps=config.norm_eps),
        schedule=config.schedule or "static",
        backend=config.backend,
    )
    return TinyClassifier(config, graph)


IN_TIME = {
    "tiny_discrete": f"discrete(steps={LAYERS})",
    "tiny_continuous": "continuous(rtol=1e-3, atol=1e-3)",
}


@register_model("tiny_discrete", TinyConfig)
def tiny_discrete(config: TinyConfig) -> nn.Module:
    """Build the classifier in discrete time: five steps of ``norm(A conv(relu(Z)))``."""
    return TinyClassifier(config, in_time(config, "tiny_discrete"))


@register_model("tiny_continuous", TinyConfig)
def tiny_continuous(config: TinyConfig) -> nn.Module:
    """Build the classifier in continuous time: ``dZ / dt = norm(A conv(relu(Z)))``, t to 1."""
    return TinyClassifier(config, in_time(config, "tiny_continuous"))


def in_time(
    config: TinyConfig,
    name: str,
    sizes: tuple[int, int, int] = (INPUTS, NODES - INPUTS - OUTPUTS, OUTPUTS),
    num_edges: int = EDGES,
) -> NeuralGraph:
    """Return the graph of a classifier in time, whose candidate edges are all pairs of nodes.

    A node may also have an edge to itself.

    Args:
        config: Rule, eps, backend.
        name: Name of the classifier.
        sizes: Numbers of inputs, hidden nodes and outputs.
        num_edges: Budget k, the number of real edges.
    """
    norm = partial(Norm, norm="instance", eps=config.norm_eps)
    return NeuralGraph(
        Topology.complete(*sizes),
        rule=config.rule,
        num_edges=num_edges,
        node=norm,
        output_node=norm,
        message="relu_conv",
        schedule=config.schedule or IN_TIME[name],
        backend=config.backend,
    )
