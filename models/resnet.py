"""torchvision's ResNets, dense or with every layer as a graph (section 3.4)."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from torchvision.models import resnet18, resnet50

from dnw_graph import Rule, sparsify
from models.registry import ModelConfig, register_model


@dataclass(frozen=True, kw_only=True)
class SparseResNetConfig(ModelConfig):
    """Options of a sparse ResNet, in addition to those of every model.

    Attributes:
        density: Share of the weights of each layer that are real. If None, the rule's default or
            0.1. Biases and normalisation are dense.
        first_layer_dense: Whether all weights of the first convolution are real.
        rule: How real weights are chosen, optionally with arguments, as in ``"rigl(every=50)"``;
            see docs/rules.md.
    """

    density: float | None = None
    first_layer_dense: bool = False
    rule: str | Rule | type[Rule] = "dnw"


def _register(name: str, resnet: Callable[..., nn.Module]) -> None:
    """Register a ResNet under ``name``, and its sparse version under ``<name>_dnw``."""

    @register_model(name)
    def dense(config: ModelConfig) -> nn.Module:
        return resnet(num_classes=config.num_classes)

    @register_model(f"{name}_dnw", SparseResNetConfig)
    def sparse(config: SparseResNetConfig) -> nn.Module:
        net = resnet(num_classes=config.num_classes)
        keep_dense = ["conv1"] if config.first_layer_dense else []
        return sparsify(net, config.density, keep_dense=keep_dense, rule=config.rule)


_register("resnet18", resnet18)
_register("resnet50", resnet50)
