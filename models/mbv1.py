"""MobileNetV1 (Howard et al. 2017), the network whose wiring DNW learns anew."""

from collections import OrderedDict
from functools import partial

from torch import nn

from models.registry import ModelConfig, register_model
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


@register_model("mbv1")
def mbv1(config: ModelConfig) -> nn.Module:
    """Build plain MobileNetV1; ``width`` multiplies the channels of every layer."""
    if config.rule is not None:
        raise ValueError(
            f"mbv1 has no wiring to apply rule {config.rule!r} to; "
            "mbv1_dnw has, with the same nodes"
        )
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
