"""What measurements share: candidates take turns in one process; medians come with their range."""

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
    """Seconds that each of several repetitions took."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median in seconds."""
        return statistics.median(self.seconds)

    @property
    def low(self) -> float:
        """Shortest in seconds."""
        return min(self.seconds)

    @property
    def high(self) -> float:
        """Longest in seconds."""
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
        candidates: What to run, by name.
        repeats: Timed rounds.
        device: Waited for before and after each run.
        warmup: Rounds before those.
        warm: Seconds of runs that are not timed at the beginning of each turn, after which caches
            hold what a candidate needs.
        pause: Seconds before each turn, in which threads of the one before go to sleep.
    """
    seen: dict[str, list[float]] = {name: [] for name in candidates}
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
                seen[name].append(time.perf_counter() - start)
    return {name: Timing(tuple(times)) for name, times in seen.items()}


def wait(device: str) -> None:
    """Wait until a GPU has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def machine(device: str) -> str:
    """Return versions, processor and threads in one line."""
    return (
        f"torch {torch.__version__}, numpy {np.__version__}, Python {platform.python_version()}, "
        f"{provenance.machine(device)}"
    )
