"""Train wirings with the Trainer of Hugging Face Transformers."""

from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from dnw_graph.integrations.tracker import (
    WiringTracker,
    add_penalty_gradients,
    optimizer_of_edges,
)
from dnw_graph.wiring import Attachment, attach

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        'WiringCallback needs Transformers: pip install "dnw-graph[transformers]"'
    ) from error


class WiringCallback(TrainerCallback):  # type: ignore[misc]  # likewise untyped
    """Trains the wirings of a network, and follows them.

    It attaches the rules of all graphs and sparse layers to the optimizer, and adds the gradients
    of their penalties before each step, after gradients were clipped. After each epoch it adds
    ``wiring/edges_changed`` and ``wiring/dead_nodes`` to the trainer's ``state.log_history`` and
    records the real edges. At the end it draws them. Only the main process writes files.

    Args:
        folder: Folder for the history and the pictures; if None, ``wiring`` in the trainer's output
            folder.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self._folder = None if folder is None else Path(folder)
        self._attachment: Attachment | None = None
        self._tracker: WiringTracker | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """Attach the rules, and record the first wiring.

        Raises:
            ValueError: If the network has no wiring.
        """
        model: nn.Module = others["model"]
        optimizer = optimizer_of_edges(model, [_inner(others["optimizer"])])
        self._attachment = attach(model, optimizer, total_steps=state.max_steps)
        folder = self._folder or Path(args.output_dir) / "wiring"
        per_epoch = max(1, round(state.max_steps / max(state.num_train_epochs, 1)))
        self._tracker = WiringTracker(
            model, folder if state.is_world_process_zero else None, per_epoch
        )
        self._tracker.record(state.global_step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """Add the gradients of the rules' penalties."""
        add_penalty_gradients(others["model"], _inner(others["optimizer"]))

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """Add how the wirings changed to the log, and record them."""
        if self._tracker is not None:
            values = self._tracker.record(state.global_step)
            state.log_history.append({**values, "epoch": state.epoch, "step": state.global_step})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """Draw the wirings, and detach the rules."""
        if self._tracker is not None:
            self._tracker.draw()
        if self._attachment is not None:
            self._attachment.remove()
        self._attachment = self._tracker = None


def _inner(optimizer: Any) -> Optimizer:
    """Return the optimizer that does the steps, which Accelerate wraps."""
    return getattr(optimizer, "optimizer", optimizer)
