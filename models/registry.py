"""The registry of models, and what they can all be told."""

import dataclasses
import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from torch import nn

from dnw_graph import Rule
from dnw_graph._registry import Registry
from dnw_graph.aggregation import BACKENDS, Aggregation


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What a model is built from.

    Attributes:
        width: Width multiplier ``d``. Of a graph model it sets the number of real edges only.
        rule: How edges are chosen; the model's own rule unless given.
        num_classes: Number of classes.
        image_size: Height and width of the images, in pixels.
        norm_eps: Added to variances by normalisation. The default is MobileNetV1's own; that of
            PyTorch and of the published implementation of DNW is 1e-5 (docs/training.md).
        stem_stride: Stride of the first convolution; ``"auto"`` is 1 for images of at most 64
            pixels and 2 for larger ones.
        backend: How messages are summed; see :class:`dnw_graph.NeuralGraph`.
    """

    width: float = 1.0
    rule: str | Rule | type[Rule] | None = None
    num_classes: int = 1000
    image_size: int = 224
    norm_eps: float = 1e-3
    stem_stride: int | Literal["auto"] = "auto"
    backend: str | Aggregation | type[Aggregation] = "auto"

    def __post_init__(self) -> None:
        if not (isinstance(self.width, int | float) and 0 < self.width < math.inf):
            raise ValueError(f"width must be a number above 0, got {self.width!r}")
        BACKENDS.resolve(self.backend)
        if not self.norm_eps > 0:
            raise ValueError(f"norm_eps must be above 0, got {self.norm_eps}")
        if self.num_classes < 1:
            raise ValueError(f"num_classes must be 1 or more, got {self.num_classes}")
        if self.image_size < 1:
            raise ValueError(f"image_size must be 1 pixel or more, got {self.image_size}")
        if self.stem_stride != "auto" and not (
            isinstance(self.stem_stride, int) and self.stem_stride >= 1
        ):
            raise ValueError(f'stem_stride must be "auto" or 1 or more, got {self.stem_stride!r}')

    @property
    def stride(self) -> int:
        """The stem's stride in pixels."""
        if self.stem_stride == "auto":
            return 1 if self.image_size <= 64 else 2
        return self.stem_stride

    @property
    def exact_width(self) -> Fraction:
        """The width multiplier as it was written, without binary rounding."""
        return Fraction(str(self.width))


ModelBuilder = Callable[[ModelConfig], nn.Module]
_MODELS: Registry[ModelBuilder] = Registry("model")


def register_model(name: str) -> Callable[[ModelBuilder], ModelBuilder]:
    """Return a decorator that registers a function from :class:`ModelConfig` to a network."""
    return _MODELS.register(name)


def list_models() -> list[str]:
    """Return the names of all models."""
    return list(_MODELS)


def create_model(name: str, **options: Any) -> nn.Module:
    """Build a model.

    Args:
        name: One of :func:`list_models`.
        options: The attributes of :class:`ModelConfig`.

    Returns:
        A network from images ``[B, 3, H, W]`` to logits ``[B, num_classes]``.

    Raises:
        ValueError: An unknown name or option, or an option outside its range.
    """
    builder = _MODELS[name]
    known = [field.name for field in dataclasses.fields(ModelConfig)]
    for option in options:
        if option not in known:
            close = difflib.get_close_matches(option, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"unknown model option {option!r}{hint} (known: {', '.join(known)})")
    return builder(ModelConfig(**options))
