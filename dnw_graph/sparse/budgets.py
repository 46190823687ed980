"""Number of real weights of each layer."""

import fnmatch
import math
from collections.abc import Mapping
from typing import Literal

import torch

from dnw_graph.sparse.layers import Weight, check_names
from dnw_graph.wiring import top_k

Spread = Literal["uniform", "erk", "global"]
"""How a budget is distributed among layers; see :func:`sparsify`."""


def budgets_of(
    layers: Mapping[str, Weight], density: float | Mapping[str, float], spread: Spread
) -> dict[str, int]:
    """Return the number of real edges of each layer."""
    sizes = {name: layer.stored.numel() for name, layer in layers.items()}
    if isinstance(density, Mapping):
        if spread != "uniform":
            raise ValueError(
                f"spread {spread!r} needs one density for all layers: pass a number, or omit spread"
            )
        check_names(list(density), layers)
        densities = {name: _density_of(name, density) for name in layers}
        return {name: max(1, round(densities[name] * size)) for name, size in sizes.items()}
    _check_density(density)
    if spread == "uniform":
        return {name: max(1, round(density * size)) for name, size in sizes.items()}
    total = round(density * sum(sizes.values()))
    if total < len(sizes):
        raise ValueError(
            f"density {density} leaves {total} real weights for {len(sizes)} layers; increase it"
        )
    if spread == "erk":
        raw = {name: _erk(layer) for name, layer in layers.items()}
        return _allocate(total, sizes, raw)
    if spread == "global":
        weights = torch.cat([layer.stored.detach().flatten() for layer in layers.values()])
        starts = torch.tensor([0, *sizes.values()], device=weights.device).cumsum(0)
        counts = torch.searchsorted(top_k(weights, total), starts).diff().tolist()
        return _at_least_one(dict(zip(sizes, counts, strict=True)))
    raise ValueError(f"unknown spread {spread!r} (known: uniform, erk, global)")


def _at_least_one(budgets: dict[str, int]) -> dict[str, int]:
    """Change budgets of 0 to 1, taking the edge from the largest budget, and return them."""
    for name in [name for name, budget in budgets.items() if not budget]:
        budgets[max(budgets, key=lambda other: budgets[other])] -= 1
        budgets[name] = 1
    return budgets


def _check_density(density: object) -> None:
    """Raise TypeError or ValueError if a density is not a number above 0 and up to 1."""
    if isinstance(density, bool) or not isinstance(density, int | float):
        raise TypeError(f"density must be a number or a mapping from names, got {density!r}")
    if not 0 < density <= 1:
        raise ValueError(
            f"density must be a share of the weights, above 0 and up to 1, got {density!r}"
        )


def _density_of(name: str, densities: Mapping[str, float]) -> float:
    """Return the density of the first name or pattern that matches a layer."""
    for pattern, density in densities.items():
        if fnmatch.fnmatchcase(name, pattern):
            _check_density(density)
            return density
    raise ValueError(
        f'density has no entry for layer {name}; add one, or "*" for all other layers, or name it '
        "in keep_dense"
    )


def _erk(layer: Weight) -> float:
    """Return a layer's density before scaling: the sum of its dimensions over their product."""
    shape = layer.stored.shape
    return sum(shape) / math.prod(shape)


def _allocate(total: int, sizes: Mapping[str, int], raw: Mapping[str, float]) -> dict[str, int]:
    """Return budgets that sum to ``total``, with densities up to 1 in proportion to ``raw``."""
    full_layers: set[str] = set()
    while True:
        remaining = total - sum(sizes[name] for name in full_layers)
        weight = sum(raw[name] * sizes[name] for name in sizes if name not in full_layers)
        scale = remaining / weight if weight else 0.0
        new_full_layers = {
            name for name in sizes if name not in full_layers and scale * raw[name] >= 1
        }
        if not new_full_layers:
            break
        full_layers |= new_full_layers
    exact = {n: sizes[n] if n in full_layers else scale * raw[n] * sizes[n] for n in sizes}
    budgets = {name: math.floor(value) for name, value in exact.items()}
    for name in sorted(exact, key=lambda name: exact[name] - budgets[name], reverse=True):
        if sum(budgets.values()) < total and budgets[name] < sizes[name]:
            budgets[name] += 1
    return _at_least_one(budgets)
