"""Derive fields, and so flags, from the options in the models' configurations."""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import reduce
from operator import or_
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import docstring_parser
import tyro

from dnw_graph import Rule
from dnw_graph._registry import PartRegistry
from dnw_graph.aggregation import BACKENDS, Backend
from dnw_graph.schedule import SCHEDULES, Schedule
from dnw_graph.wiring import RULES
from models import ModelConfig, list_models, model_config

T = TypeVar("T")

PARTS: Mapping[type, PartRegistry[Any]] = {Rule: RULES, Backend: BACKENDS, Schedule: SCHEDULES}
"""Parts of a graph that an option may name, with their registries."""


def network_options(base: type[T]) -> type[T]:
    """Return a frozen dataclass with a field for each option of the registered models.

    Fields default to None, so that each model keeps its own default; boolean fields have the
    models' default. Their descriptions are those in the docstrings of the models' configurations.

    Args:
        base: A dataclass with the options that all models share.
    """
    configs: dict[str, dict[str, type[ModelConfig]]] = {}  # by option, by model
    for model in list_models():
        config = model_config(model)
        for field in dataclasses.fields(config):
            if field.name not in ModelConfig.__dataclass_fields__:
                configs.setdefault(field.name, {})[model] = config
    fields = [_field(name, models) for name, models in configs.items()]
    options = dataclasses.make_dataclass(
        "NetworkOptions", fields, bases=(base,), frozen=True, kw_only=True
    )
    options.__module__, options.__doc__ = base.__module__, "Which network."
    return options


def _field(name: str, models: Mapping[str, type[ModelConfig]]) -> tuple[str, Any, Any]:
    """Return the name, annotation and default of an option's field.

    Args:
        name: Name of the option.
        models: Configurations that have the option, by model.
    """
    hints = [get_type_hints(config)[name] for config in models.values()]
    kinds = list(dict.fromkeys(kind for hint in hints for kind in _plain_types(hint)))
    defaults = Counter(_default(config, name) for config in models.values())
    common = defaults.most_common(1)[0][0]
    text = next(filter(None, (_description(config, name) for config in models.values())), "")
    for part, registry in PARTS.items():
        if any(part in get_args(hint) for hint in hints):
            text += f" Known: {', '.join(registry)}."
    if kinds == [bool]:
        return name, Annotated[bool, tyro.conf.arg(help=text)], common
    del defaults[common]
    others = "".join(
        f", {value} for {', '.join(m for m, c in models.items() if _default(c, name) == value)}"
        for value in defaults
    )
    text += f" Default: {common}{others}." if common is not None else ""
    return name, Annotated[reduce(or_, kinds) | None, tyro.conf.arg(help=text)], None


def _default(config: type[ModelConfig], name: str) -> Any:
    return config.__dataclass_fields__[name].default


def _plain_types(hint: Any) -> Iterator[Any]:
    """Yield the types of a union that a flag can be parsed as."""
    union = get_args(hint) if get_origin(hint) not in (None, Literal, tuple, type) else (hint,)
    for kind in union:
        if kind in (bool, int, float, str) or get_origin(kind) in (Literal, tuple):
            yield kind


def _description(config: type, name: str) -> str:
    """Return the description of an option in the docstring of a configuration or of its bases."""
    for base in config.__mro__:
        for entry in docstring_parser.parse(base.__doc__ or "").params:
            if entry.arg_name == name and entry.description:
                text = re.sub(r":\w+:`~?([^`]+)`", r"\1", entry.description)
                return " ".join(text.replace("``", "").split())
    return ""
