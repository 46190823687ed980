"""Checks of inputs and states, shared by graphs and frozen graphs."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dnw_graph.schedule.base import Schedule


def check_input_shape(schedule: Schedule, num_inputs: int, x: Tensor) -> None:
    """Raise ValueError unless ``x`` is ``[B, inputs, ...]``, or for sequences ``[B, T, ...]``."""
    at = 2 if schedule.takes_sequence else 1
    if x.dim() <= at or x.shape[at] != num_inputs or (at == 2 and not x.shape[1]):
        shape = f"[B, {'T, ' * (at - 1)}{num_inputs}, ...]"
        raise ValueError(f"expected input {shape}, one channel per input node, got {list(x.shape)}")


def check_input_type(weight: Tensor, x: Tensor, network: str) -> None:
    """Raise ValueError unless ``x`` has the type of the weights, or autocast converts it."""
    floating = x.is_floating_point()
    if x.dtype != weight.dtype and not (floating and torch.is_autocast_enabled(x.device.type)):
        other = f", or {network} with .to({x.dtype})" if floating else ""
        raise ValueError(
            f"expected input of the weights' type {weight.dtype}, got {x.dtype}; "
            f"convert the input{other}"
        )


def check_state(
    state: Any, kind: type[Any], shape: Sequence[int], dtype: torch.dtype | None = None
) -> None:
    """Raise ValueError unless a state is as expected.

    Args:
        state: The state.
        kind: Its class, which has an attribute ``states``.
        shape: Shape of ``states``.
        dtype: Type of ``states``; any unless passed.
    """
    expected = f"{list(shape)}" if dtype is None else f"{list(shape)} of {dtype}"
    got = repr(state)[:60]
    if isinstance(state, kind):
        states: Tensor = state.states
        if list(states.shape) == list(shape) and dtype in (None, states.dtype):
            return
        got = f"{list(states.shape)} of {states.dtype}"
    raise ValueError(
        f"expected a state returned by an earlier call, with states {expected}, got {got}; begin "
        "with graph.initial_state(x)"
    )
