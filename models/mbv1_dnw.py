"""MobileNetV1-DNW: one graph per resolution over the nodes of MobileNetV1 (section 2.4)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn

from dnw_graph import NeuralGraph, Rule, Topology, precision
from dnw_graph.aggregation import BACKENDS, Backend
from dnw_graph.node import NormReluConv
from models.mbv1 import MobileNetV1Config
from models.registry import register_model
from models.strides import check_strides


class Stage(NamedTuple):
    """One graph: ``inputs`` input nodes, then ``blocks`` blocks of ``width`` nodes."""

    inputs: int
    width: int
    stride: int
    blocks: int

    def topology(self) -> Topology:
        """Return the candidate edges: from each block to all later ones; the last is the output."""
        return Topology.layered([self.inputs, *[self.width] * self.blocks])

    @property
    def num_candidates(self) -> int:
        """Number of candidate edges."""
        hidden = self.blocks * (self.blocks - 1) // 2 * self.width
        return self.width * (self.inputs * self.blocks + hidden)

    def num_edges(self, d: Fraction) -> int:
        """Return the edges of MobileNetV1 in this stage: ``(I C + (L - 1) C^2) d^2``."""
        edges = self.inputs * self.width + (self.blocks - 1) * self.width**2
        return math.ceil(edges * d**2)


STAGES = (
    Stage(32, 64, 1, 1),
    Stage(64, 128, 2, 2),
    Stage(128, 256, 2, 2),
    Stage(256, 512, 2, 6),
    Stage(512, 1024, 2, 2),
)


@dataclass(frozen=True, kw_only=True)
class MobileNetV1GraphConfig(MobileNetV1Config):
    """Options of MobileNetV1 with a wiring, in addition to those of MobileNetV1.

    Attributes:
        width: Width multiplier ``d``; in a graph it sets only the number of real edges.
        num_edges: Number of real edges of each graph, including a classifier's, instead of the
            numbers that follow from the width.
        backend: How messages are summed; see :class:`dnw_graph.NeuralGraph`.
    """

    width: float = 0.225
    num_edges: tuple[int, ...] | None = None
    backend: str | Backend | type[Backend] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        BACKENDS.resolve(self.backend)


@dataclass(frozen=True, kw_only=True)
class MobileNetV1DNWConfig(MobileNetV1GraphConfig):
    """Options of MobileNetV1-DNW, in addition to those of MobileNetV1 with a wiring.

    Attributes:
        rule: How edges are chosen, optionally with arguments, as in ``"rigl(every=50)"``; see
            docs/rules.md.
    """

    rule: str | Rule | type[Rule] = "dnw"


class MobileNetV1DNW(nn.Module):
    """A 3x3 convolution, one graph per resolution, then norm, ReLU, pool and classifier.

    Args:
        config: Width, classes, image size, stem, backend.
        rule: How edges are chosen.
        small: Whether the classifier is a graph too, with a share ``d`` of its candidate edges
            real and no bias.
        stages: The graphs.

    Shapes:
        - input ``[B, 3, H, W]``
        - output ``[B, num_classes]``
    """

    def __init__(
        self,
        config: MobileNetV1GraphConfig,
        rule: str | Rule | type[Rule] = "dnw",
        small: bool = False,
        stages: Sequence[Stage] = STAGES,
    ) -> None:
        super().__init__()
        check_strides(config.image_size, [config.stride, *(stage.stride for stage in stages)])
        d, features = config.exact_width, stages[-1].width
        num_edges: Sequence[int] | None = config.num_edges
        if num_edges is None:
            num_edges = [stage.num_edges(d) for stage in stages]
            num_edges += [math.ceil(features * config.num_classes * d)] if small else []
        if len(num_edges) != len(stages) + small:
            raise ValueError(f"num_edges needs {len(stages) + small} numbers, got {len(num_edges)}")
        self._check_budgets(stages, num_edges, config.width)
        self.stem = nn.Conv2d(3, stages[0].inputs, 3, config.stride, padding=1, bias=False)
        self.graphs = nn.Sequential(
            *(
                NeuralGraph(
                    stage.topology(),
                    rule=rule,
                    num_edges=k,
                    node=partial(NormReluConv, eps=config.norm_eps),
                    stride=stage.stride,
                    backend=config.backend,
                )
                for stage, k in zip(stages, num_edges, strict=False)
            )
        )
        self.norm = nn.BatchNorm2d(features, eps=config.norm_eps)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier: nn.Module = nn.Linear(features, config.num_classes)
        if small:
            self.classifier = NeuralGraph(
                Topology.layered([features, config.num_classes]),
                rule=rule,
                num_edges=num_edges[-1],
                node="identity",
                backend=config.backend,
            )

    @staticmethod
    def _check_budgets(stages: Sequence[Stage], num_edges: Sequence[int], width: float) -> None:
        """Raise ValueError if a graph has fewer candidate edges than its budget."""
        for number, (stage, k) in enumerate(zip(stages, num_edges, strict=False)):
            limit = stage.num_candidates
            if k > limit:
                raise ValueError(
                    f"width {width} needs {k:,} edges in graph {number}, which has {limit:,} "
                    "candidates; use a smaller width, or the rule complete"
                )

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[B, num_classes]`` for images ``[B, 3, H, W]``."""
        x = self.relu(self.norm(self.graphs(precision.call(self.stem, x))))
        logits = precision.call(self.classifier, self.flatten(self.pool(x)))
        return logits


@register_model("mbv1_dnw", MobileNetV1DNWConfig)
def mbv1_dnw(config: MobileNetV1DNWConfig) -> nn.Module:
    """Build MobileNetV1-DNW, whose wiring is learned by default."""
    return MobileNetV1DNW(config, config.rule)


@register_model("mbv1_dnw_small", MobileNetV1DNWConfig)
def mbv1_dnw_small(config: MobileNetV1DNWConfig) -> nn.Module:
    """Build MobileNetV1-DNW-Small, whose classifier is a graph as well."""
    return MobileNetV1DNW(config, config.rule, small=True)


@register_model("mbv1_random", MobileNetV1GraphConfig)
def mbv1_random(config: MobileNetV1GraphConfig) -> nn.Module:
    """Build MobileNetV1-DNW with a random wiring."""
    return MobileNetV1DNW(config, "random")


@register_model("mbv1_complete", MobileNetV1GraphConfig)
def mbv1_complete(config: MobileNetV1GraphConfig) -> nn.Module:
    """Build MobileNetV1-DNW with every candidate edge real, regardless of the width."""
    return MobileNetV1DNW(config, "complete")
