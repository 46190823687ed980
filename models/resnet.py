"""torchvision's ResNets, dense and with every layer a graph (section 3.4)."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from torchvision.models import resnet18, resnet50

from dnw_graph import Rule, sparsify
from models.registry import ModelConfig, register_model


@dataclass(frozen=True, kw_only=True)
class SparseResNetConfig(ModelConfig):
    """What a sparse ResNet is built from, besides what every model is.

    Attributes:
        density: Share of the weights of each layer that are real, 0.1 unless given or the rule
            says; biases and normalisation are dense.
        first_layer_dense: Whether all weights of the first convolution are real.
        rule: How real weights are chosen, if need be with arguments, ``"rigl(every=50)"``; see
            docs/rules.md.
    """

    density: float | None = None
    first_layer_dense: bool = False
    rule: str | Rule | type[Rule] = "dnw"


def _register(name: str, resnet: Callable[..., nn.Module]) -> None:
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
