"""Shared by all benchmarks: timing candidates in turns, with medians and ranges."""

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from train import provenance


@dataclass(frozen=True)
class Timing:
    """Times of several repetitions, in seconds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median time, in seconds."""
        return statistics.median(self.seconds)

    @property
    def low(self) -> float:
        """Shortest time, in seconds."""
        return min(self.seconds)

    @property
    def high(self) -> float:
        """Longest time, in seconds."""
        return max(self.seconds)

    def __truediv__(self, steps: int) -> "Timing":
        return Timing(tuple(t / steps for t in self.seconds))

    def __str__(self) -> str:
        low, median, high = (f"{1e3 * t:,.1f}" for t in (self.low, self.median, self.high))
        return f"{median} ({low}-{high})"


def alternate(
    candidates: Mapping[str, Callable[[], object]],
    repeats: int,
    device: str,
    warmup: int = 1,
    warm: float = 0.0,
    pause: float = 0.0,
) -> dict[str, Timing]:
    """Time every candidate ``repeats`` times, taking turns.

    Args:
        candidates: Functions to run, by name.
        repeats: Number of timed rounds.
        device: Device to wait for before and after each run.
        warmup: Number of rounds before the timed ones.
        warm: Seconds of untimed runs at the beginning of each turn, which fill the caches.
        pause: Seconds before each turn, in which the threads of the previous turn go to sleep.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(warmup + repeats):
        for name, run in candidates.items():
            time.sleep(pause)
            start = time.perf_counter()
            while time.perf_counter() - start < warm:
                run()
            wait(device)
            start = time.perf_counter()
            run()
            wait(device)
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: Timing(tuple(times)) for name, times in seconds.items()}


def wait(device: str) -> None:
    """Wait until a GPU has finished its work."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def machine(device: str) -> str:
    """Return versions, processor and threads in one line."""
    return (
        f"torch {torch.__version__}, numpy {np.__version__}, Python {platform.python_version()}, "
        f"{provenance.machine(device)}"
    )
