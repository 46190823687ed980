"""Accumulate the training metrics of an epoch."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import MeanMetric

from dnw_graph.analysis import real_edges
from train.metrics import RealEdges, accuracy_metric, edges_changed
from train.step import Step


class EpochMeter:
    """Accumulates metrics over the steps of an epoch; its state is saved in checkpoints.

    Args:
        num_classes: Number of classes.
        device: Where losses and logits are.
        before: The real edges at the start of the epoch.

    Attributes:
        loss: Mean loss of the steps.
        accuracy: Share of training images that were classified correctly.
        grad_norm: Mean norm of the gradient.
        evaluations: Function evaluations of graphs in continuous time, by kind.
        seconds: Time so far: of ``training`` and, within it, ``stepping``.
    """

    def __init__(self, num_classes: int, device: torch.device, before: RealEdges) -> None:
        self.loss = MeanMetric(nan_strategy="disable").to(device)
        self.grad_norm = MeanMetric(nan_strategy="disable").to(device)
        self.accuracy = accuracy_metric(1, num_classes).to(device)
        self.before = before
        self.evaluations: Counter[str] = Counter()
        self.seconds = {"training": 0.0, "stepping": 0.0}

    @property
    def _metrics(self) -> dict[str, Any]:
        return {"loss": self.loss, "grad_norm": self.grad_norm, "accuracy": self.accuracy}

    def update(self, step: Step, labels: Tensor) -> None:
        """Add the results of a step.

        Args:
            step: The results.
            labels: Labels of the images ``[B]``.
        """
        self.loss.update(step.loss)
        self.grad_norm.update(step.grad_norm)
        self.accuracy.update(step.logits, labels)

    @contextmanager
    def summed(self) -> Iterator[None]:
        """Sum the metrics over processes within a ``with``; every process must enter it."""
        with ExitStack() as stack:
            for metric in self._metrics.values():
                if metric._update_count and dist.is_initialized():
                    stack.enter_context(metric.sync_context())
            yield

    def changed(self, model: torch.nn.Module) -> int:
        """Return the number of edges that became real since the start of the epoch."""
        return edges_changed(self.before, real_edges(model))

    def row(self, steps: int) -> dict[str, float]:
        """Return the training columns of the epoch's metrics.

        Args:
            steps: Number of steps of the epoch.
        """
        return {
            "train_loss": float(self.loss.compute()),
            "train_top1": float(self.accuracy.compute()),
            "grad_norm": float(self.grad_norm.compute()),
            **{name: count / steps for name, count in self.evaluations.items()},
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the state needed to continue within the epoch."""
        return {
            "metrics": {name: _state(metric) for name, metric in self._metrics.items()},
            "steps": self.loss._update_count,
            "before": {name: (torch.from_numpy(i), n) for name, (i, n) in self.before.items()},
            "evaluations": dict(self.evaluations),
            "seconds": dict(self.seconds),
        }

    def load_state_dict(self, state: Mapping[str, Any], rank: int = 0) -> None:
        """Restore a state returned by :meth:`state_dict`.

        Args:
            state: The state, summed over processes.
            rank: Rank of this process; rank 0 gets the sums, the others start from 0.
        """
        for name, metric in self._metrics.items():
            for key, value in state["metrics"][name].items():
                share = value if rank == 0 else torch.zeros_like(value)
                setattr(metric, key, share.to(metric.device))
            metric._update_count = state["steps"]
        self.before = {name: (ids.numpy(), n) for name, (ids, n) in state["before"].items()}
        self.evaluations = Counter(state["evaluations"])
        self.seconds = dict(state["seconds"])


def _state(metric: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in metric.metric_state.items()}
