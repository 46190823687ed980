"""Train wirings with the Trainer of Lightning."""

import math
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from dnw_graph.integrations.tracker import (
    WiringTracker,
    add_penalty_gradients,
    optimizer_of_edges,
)
from dnw_graph.wiring import Attachment, attach

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        'WiringCallback needs Lightning: pip install "dnw-graph[lightning]"'
    ) from error


class WiringCallback(Callback):  # type: ignore[misc]  # Lightning has no types here
    """Trains the wirings of a module, and follows them.

    It attaches the rules of all graphs and sparse layers to the optimizer, adds the gradients of
    their penalties before each step, and after each epoch logs ``wiring/edges_changed`` and
    ``wiring/dead_nodes`` and records the real edges. At the end it draws them. Only the process
    of rank 0 writes files.

    Args:
        folder: Folder for the history and the pictures. If None, ``wiring`` in the folder of the
            logger, or in the trainer's ``default_root_dir`` without a logger.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self._folder = None if folder is None else Path(folder)
        self._attachment: Attachment | None = None
        self._optimizer: Optimizer | None = None
        self._tracker: WiringTracker | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach the rules, and record the first wiring.

        Raises:
            ValueError: If the module has no wiring, or the number of steps is not known.
        """
        steps = trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise ValueError(
                "rules need the number of training steps: pass max_epochs or max_steps to Trainer"
            )
        self._optimizer = optimizer_of_edges(pl_module, trainer.optimizers)
        self._attachment = attach(pl_module, self._optimizer, total_steps=int(steps))
        folder = self._folder or Path(trainer.log_dir or trainer.default_root_dir) / "wiring"
        batches = trainer.num_training_batches / trainer.accumulate_grad_batches
        self._tracker = WiringTracker(
            pl_module, folder if trainer.is_global_zero else None, max(1, math.ceil(batches))
        )
        self._tracker.record(trainer.global_step)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Add the gradients of the rules' penalties."""
        if optimizer is self._optimizer:
            add_penalty_gradients(pl_module, optimizer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log how the wirings changed, and record them."""
        if self._tracker is not None:
            pl_module.log_dict(self._tracker.record(trainer.global_step))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the wirings."""
        if self._tracker is not None:
            self._tracker.draw()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Detach the rules."""
        if self._attachment is not None:
            self._attachment.remove()
        self._attachment = self._optimizer = self._tracker = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_attachment": None, "_optimizer": None, "_tracker": None}
