"""The registry of models, and the options that all models share."""

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
    """Options of every model; subclasses add the options of a family of models.

    Attributes:
        num_classes: Number of classes.
        image_size: Height and width of the images, in pixels.
    """

    num_classes: int = 1000
    image_size: int = 224

    #: Options with which the paper trains the model on CIFAR-10, if they differ from Table 2's.
    cifar10: ClassVar[Mapping[str, Any]] = {}

    #: Options that change what a network computes, but not the shapes of its weights. A network
    #: that starts from the weights of another must have the same.
    not_in_shapes: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if self.num_classes < 1:
            raise ValueError(f"num_classes must be 1 or more, got {self.num_classes}")
        if self.image_size < 1:
            raise ValueError(f"image_size must be 1 pixel or more, got {self.image_size}")


def check_norm_eps(norm_eps: float) -> None:
    """Raise ValueError if ``norm_eps`` is not a finite number above 0."""
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
        name: Name of the model.
        config: Its configuration: :class:`ModelConfig`, or a subclass with more options.

    Raises:
        ValueError: If the name is taken.
        TypeError: If an argument is of another kind, or an option of the configuration has no
            default.
    """
    add_model = _MODELS.register(name)
    _check_config(config)

    def add(build: ModelBuilder[Config]) -> ModelBuilder[Config]:
        add_model(_Model(build, config))
        return build

    return add


def _check_config(config: Any) -> None:
    """Raise TypeError unless this is a subclass of ModelConfig whose options have defaults."""
    if not isinstance(config, type) or not issubclass(config, ModelConfig):
        raise TypeError(
            f"the configuration of a model is a subclass of ModelConfig, got {config!r}"
        )
    if "__dataclass_fields__" not in vars(config):
        raise TypeError(
            f"{config.__name__} is not a dataclass: decorate it with "
            "@dataclass(frozen=True, kw_only=True)"
        )
    fields = dataclasses.fields(config)
    none = dataclasses.MISSING
    missing = [f.name for f in fields if f.default is none and f.default_factory is none]
    if missing:
        raise TypeError(
            f"each option of {config.__name__} needs a default, but {', '.join(missing)} has none"
        )


def list_models() -> list[str]:
    """Return the names of all models."""
    return list(_MODELS)


def model_options(name: str) -> dict[str, Any]:
    """Return the options of a model with their defaults.

    Raises:
        ValueError: If the name is unknown.
    """
    return {field.name: field.default for field in dataclasses.fields(_MODELS[name].config)}


def model_config(name: str) -> type[ModelConfig]:
    """Return the class of a model's configuration.

    Raises:
        ValueError: If the name is unknown.
    """
    return _MODELS[name].config


def create_model(name: str, **options: Any) -> nn.Module:
    """Build a model.

    Args:
        name: One of :func:`list_models`.
        options: Options of the model, as listed by :func:`model_options`.

    Returns:
        A network from images ``[B, 3, H, W]`` to logits ``[B, num_classes]``.

    Raises:
        ValueError: If the name or an option is unknown, or an option is out of range.
    """
    defaults = model_options(name)
    for option in options:
        if option not in defaults:
            matches = difflib.get_close_matches(option, defaults, n=1)
            hint = f"; did you mean {matches[0]!r}?" if matches else ""
            raise ValueError(
                f"{name} takes no option {option!r}{hint} (it takes: {', '.join(defaults)})"
            )
    build, config = _MODELS[name]
    model = build(config(**options))
    if not isinstance(model, nn.Module):
        raise TypeError(f"the function of model {name!r} must return an nn.Module, got {model!r}")
    return model
