"""MobileNetV1 (Howard et al. 2017), the network whose wiring DNW replaces by a learned one."""

import math
from collections import OrderedDict
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import ClassVar, Literal

from torch import nn

from models.registry import ModelConfig, check_norm_eps, register_model
from models.strides import check_strides

#: Output channels and stride of each depthwise-separable layer at width 1.
LAYERS = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    *[(512, 1)] * 5,
    (1024, 2),
    (1024, 1),
)
STEM = 32


@dataclass(frozen=True, kw_only=True)
class MobileNetV1Config(ModelConfig):
    """Options of MobileNetV1, in addition to those of every model.

    Attributes:
        width: Width multiplier ``d``.
        norm_eps: Value that normalisation adds to variances. The default is MobileNetV1's; PyTorch
            and the published implementation of DNW use 1e-5 (docs/training.md).
        stem_stride: Stride of the first convolution; ``"auto"`` is 1 for images of at most 64
            pixels and 2 for larger ones.
    """

    width: float = 1.0
    norm_eps: float = 1e-3
    stem_stride: int | Literal["auto"] = "auto"

    not_in_shapes: ClassVar[tuple[str, ...]] = ("norm_eps", "stem_stride")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.width, int | float) and 0 < self.width < math.inf):
            raise ValueError(f"width must be a number above 0, got {self.width!r}")
        check_norm_eps(self.norm_eps)
        if self.stem_stride != "auto" and not (
            isinstance(self.stem_stride, int) and self.stem_stride >= 1
        ):
            raise ValueError(f'stem_stride must be "auto" or 1 or more, got {self.stem_stride!r}')

    @property
    def stride(self) -> int:
        """Stride of the stem, in pixels."""
        if self.stem_stride == "auto":
            return 1 if self.image_size <= 64 else 2
        return self.stem_stride

    @property
    def exact_width(self) -> Fraction:
        """The width multiplier as a decimal fraction, without binary rounding."""
        return Fraction(str(self.width))


@register_model("mbv1", MobileNetV1Config)
def mbv1(config: MobileNetV1Config) -> nn.Module:
    """Build plain MobileNetV1; ``width`` multiplies the channels of every layer."""
    check_strides(config.image_size, [config.stride, *(stride for _, stride in LAYERS)])

    def scaled(channels: int) -> int:
        return max(1, round(channels * config.exact_width))

    conv_norm_relu = partial(_conv_norm_relu, eps=config.norm_eps)
    channels = scaled(STEM)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["stem"] = conv_norm_relu(3, channels, 3, config.stride)
    for i, (width, stride) in enumerate(LAYERS):
        depthwise = conv_norm_relu(channels, channels, 3, stride, groups=channels)
        layers[f"layer{i}"] = nn.Sequential(depthwise, conv_norm_relu(channels, scaled(width), 1))
        channels = scaled(width)
    layers["pool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["classifier"] = nn.Linear(channels, config.num_classes)
    return nn.Sequential(layers)


def _conv_norm_relu(
    inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1, *, eps: float
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs, eps=eps),
        nn.ReLU(inplace=True),
    )
