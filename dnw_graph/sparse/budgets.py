"""How many weights of each layer are real."""

import fnmatch
import math
from collections.abc import Mapping
from typing import Literal

import torch

from dnw_graph.sparse.layers import Weight, check_names
from dnw_graph.wiring import top_k

Spread = Literal["uniform", "erk", "global"]
"""How a budget is shared out among layers; see :func:`sparsify`."""


def budgets_of(
    layers: Mapping[str, Weight], density: float | Mapping[str, float], spread: Spread
) -> dict[str, int]:
    """Return the number of real edges of each layer."""
    sizes = {name: layer.stored.numel() for name, layer in layers.items()}
    if isinstance(density, Mapping):
        if spread != "uniform":
            raise ValueError("densities by layer are not spread: give one density, or no spread")
        check_names(list(density), layers)
        each = {name: _density_of(name, density) for name in layers}
        return {name: max(1, round(each[name] * size)) for name, size in sizes.items()}
    _check_density(density)
    if spread == "uniform":
        return {name: max(1, round(density * size)) for name, size in sizes.items()}
    total = round(density * sum(sizes.values()))
    if total < len(sizes):
        raise ValueError(
            f"density {density} leaves {total} real weights for {len(sizes)} layers; give more"
        )
    if spread == "erk":
        raw = {name: _erk(layer) for name, layer in layers.items()}
        return _shared_out(total, sizes, raw)
    if spread == "global":
        everything = torch.cat([layer.stored.detach().flatten() for layer in layers.values()])
        starts = torch.tensor([0, *sizes.values()], device=everything.device).cumsum(0)
        counts = torch.searchsorted(top_k(everything, total), starts).diff().tolist()
        return _at_least_one(dict(zip(sizes, counts, strict=True)))
    raise ValueError(f"unknown spread {spread!r} (known: uniform, erk, global)")


def _at_least_one(budgets: dict[str, int]) -> dict[str, int]:
    """Give each layer an edge, taken from the largest budget."""
    for name in [name for name, budget in budgets.items() if not budget]:
        budgets[max(budgets, key=lambda other: budgets[other])] -= 1
        budgets[name] = 1
    return budgets


def _check_density(density: object) -> None:
    if isinstance(density, bool) or not isinstance(density, int | float):
        raise TypeError(f"density must be a number or a mapping from names, got {density!r}")
    if not 0 < density <= 1:
        raise ValueError(f"density must be a share of the weights, above 0 to 1, got {density!r}")


def _density_of(name: str, densities: Mapping[str, float]) -> float:
    for pattern, density in densities.items():
        if fnmatch.fnmatchcase(name, pattern):
            _check_density(density)
            return density
    raise ValueError(
        f'no density is given for layer {name}; add it, or "*" for all others, or name it in '
        "keep_dense"
    )


def _erk(layer: Weight) -> float:
    """Return a layer's density before scaling: the sum of its sizes over their product."""
    shape = layer.stored.shape
    return sum(shape) / math.prod(shape)


def _shared_out(total: int, sizes: Mapping[str, int], raw: Mapping[str, float]) -> dict[str, int]:
    """Share a budget out in proportion to ``raw`` densities, none above 1, exactly ``total``."""
    full: set[str] = set()
    while True:
        left = total - sum(sizes[name] for name in full)
        weight = sum(raw[name] * sizes[name] for name in sizes if name not in full)
        scale = left / weight if weight else 0.0
        over = {name for name in sizes if name not in full and scale * raw[name] >= 1}
        if not over:
            break
        full |= over
    exact = {n: sizes[n] if n in full else scale * raw[n] * sizes[n] for n in sizes}
    budgets = {name: math.floor(value) for name, value in exact.items()}
    for name in sorted(exact, key=lambda name: exact[name] - budgets[name], reverse=True):
        if sum(budgets.values()) < total and budgets[name] < sizes[name]:
            budgets[name] += 1
    return _at_least_one(budgets)
