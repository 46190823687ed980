"""What an epoch's line of metrics is made of, while the epoch goes on."""

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
    """Counts what happens in the steps of an epoch; its state goes into checkpoints.

    Args:
        num_classes: Number of classes.
        device: Where losses and logits are.
        before: The real edges when the epoch began.

    Attributes:
        loss: Mean loss of the steps.
        accuracy: Share of training images that were classified right.
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
        """Count a step.

        Args:
            step: What came of it.
            labels: Labels of its images ``[B]``.
        """
        self.loss.update(step.loss)
        self.grad_norm.update(step.grad_norm)
        self.accuracy.update(step.logits, labels)

    @contextmanager
    def summed(self) -> Iterator[None]:
        """Sum over processes, for a while; all of them have to call it."""
        with ExitStack() as stack:
            for metric in self._metrics.values():
                if metric._update_count and dist.is_initialized():
                    stack.enter_context(metric.sync_context())
            yield

    def changed(self, model: torch.nn.Module) -> int:
        """Return how many edges are real now and were not when the epoch began."""
        return edges_changed(self.before, real_edges(model))

    def row(self, steps: int) -> dict[str, float]:
        """Return the columns that come of training.

        Args:
            steps: Steps of the epoch.
        """
        return {
            "train_loss": float(self.loss.compute()),
            "train_top1": float(self.accuracy.compute()),
            "grad_norm": float(self.grad_norm.compute()),
            **{name: count / steps for name, count in self.evaluations.items()},
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to go on within the epoch."""
        return {
            "metrics": {name: _state(metric) for name, metric in self._metrics.items()},
            "steps": self.loss._update_count,
            "before": {name: (torch.from_numpy(i), n) for name, (i, n) in self.before.items()},
            "evaluations": dict(self.evaluations),
            "seconds": dict(self.seconds),
        }

    def load_state_dict(self, state: Mapping[str, Any], rank: int = 0) -> None:
        """Go on where :meth:`state_dict` was called.

        Args:
            state: Its result, summed over processes.
            rank: Number of the process; the first goes on with what all had counted.
        """
        for name, metric in self._metrics.items():
            for key, value in state["metrics"][name].items():
                own = value if rank == 0 else torch.zeros_like(value)
                setattr(metric, key, own.to(metric.device))
            metric._update_count = state["steps"]
        self.before = {name: (ids.numpy(), n) for name, (ids, n) in state["before"].items()}
        self.evaluations = Counter(state["evaluations"])
        self.seconds = dict(state["seconds"])


def _state(metric: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in metric.metric_state.items()}
