"""torchvision's ResNets, dense or with every layer as a graph (section 3.4)."""

from dataclasses import dataclass

from torch import nn

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


def _dense(name: str, config: ModelConfig) -> nn.Module:
    """Return torchvision's network of a name."""
    from torchvision.models import get_model

    return get_model(name, num_classes=config.num_classes)


def _register(name: str) -> None:
    """Register torchvision's ``name``, and its sparse version as ``<name>_dnw``."""

    @register_model(name)
    def dense(config: ModelConfig) -> nn.Module:
        return _dense(name, config)

    @register_model(f"{name}_dnw", SparseResNetConfig)
    def sparse(config: SparseResNetConfig) -> nn.Module:
        net = _dense(name, config)
        keep_dense = ["conv1"] if config.first_layer_dense else []
        return sparsify(net, config.density, keep_dense=keep_dense, rule=config.rule)


_register("resnet18")
_register("resnet50")
