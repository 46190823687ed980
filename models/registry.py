"""The registry of models, and what they can all be told."""

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

from torch import nn

from dnw_graph._registry import Registry


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What a model is built from; families of models add options of their own to these.

    Attributes:
        num_classes: Number of classes.
        image_size: Height and width of the images, in pixels.
    """

    num_classes: int = 1000
    image_size: int = 224

    #: Options by which the paper trains the model on CIFAR-10, where they are not Table 2's.
    cifar10: ClassVar[Mapping[str, Any]] = {}

    def __post_init__(self) -> None:
        if self.num_classes < 1:
            raise ValueError(f"num_classes must be 1 or more, got {self.num_classes}")
        if self.image_size < 1:
            raise ValueError(f"image_size must be 1 pixel or more, got {self.image_size}")


def check_norm_eps(norm_eps: float) -> None:
    """Raise where what normalisation adds to variances is out of range."""
    if not 0 < norm_eps < math.inf:
        raise ValueError(f"norm_eps must be a finite number above 0, got {norm_eps}")


Config = TypeVar("Config", bound=ModelConfig)
ModelBuilder = Callable[[Config], nn.Module]


class _Model(NamedTuple):
    build: ModelBuilder[Any]
    config: type[ModelConfig]


_MODELS: Registry[_Model] = Registry("model")


def register_model(
    name: str,
    config: type[Config] = ModelConfig,  # type: ignore[assignment]
) -> Callable[[ModelBuilder[Config]], ModelBuilder[Config]]:
    """Return a decorator that registers a function from a configuration to a network.

    Args:
        name: What the model is called from then on.
        config: What it is built from: :class:`ModelConfig`, or a subclass with more options.

    Raises:
        ValueError: The name is taken.
    """

    def add(build: ModelBuilder[Config]) -> ModelBuilder[Config]:
        _MODELS.register(name)(_Model(build, config))
        return build

    return add


def list_models() -> list[str]:
    """Return the names of all models."""
    return list(_MODELS)


def model_options(name: str) -> dict[str, Any]:
    """Return what a model can be told, with what it is unless told.

    Raises:
        ValueError: An unknown name.
    """
    return {field.name: field.default for field in dataclasses.fields(_MODELS[name].config)}


def model_config(name: str) -> type[ModelConfig]:
    """Return the class of a model's configuration.

    Raises:
        ValueError: An unknown name.
    """
    return _MODELS[name].config


def create_model(name: str, **options: Any) -> nn.Module:
    """Build a model.

    Args:
        name: One of :func:`list_models`.
        options: Those of :func:`model_options`.

    Returns:
        A network from images ``[B, 3, H, W]`` to logits ``[B, num_classes]``.

    Raises:
        ValueError: An unknown name or option, or an option outside its range.
    """
    known = model_options(name)
    for option in options:
        if option not in known:
            close = difflib.get_close_matches(option, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(
                f"{name} takes no option {option!r}{hint} (it takes: {', '.join(known)})"
            )
    build, config = _MODELS[name]
    return build(config(**options))
