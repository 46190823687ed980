"""Metrics for programs that draw curves: TensorBoard, and Weights & Biases if asked for."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from train.options import Options
from train.run import RunConfig


class Curves:
    """Writes the metrics of each epoch.

    Args:
        folder: The run folder.
        config: What is trained.
        epoch: Epochs done; what was written of later ones is dropped.
        run_id: Of the run at Weights & Biases that this one continues.
    """

    def __init__(
        self, folder: Path, config: RunConfig, epoch: int, run_id: str | None = None
    ) -> None:
        self._board = SummaryWriter(folder / "tensorboard", purge_step=epoch)
        self._wandb = _wandb(folder, config, run_id) if config.options.run.wandb else None

    @property
    def run_id(self) -> str | None:
        """The run at Weights & Biases."""
        return None if self._wandb is None else str(self._wandb.version)

    def add(self, row: Mapping[str, Any]) -> None:
        """Write the metrics of an epoch."""
        for name, value in row.items():
            self._board.add_scalar(name, value, row["epoch"])
        self._board.flush()
        if self._wandb is not None:
            self._wandb.log_metrics(dict(row), step=row["epoch"])

    def close(self) -> None:
        """Write what is left."""
        self._board.close()
        if self._wandb is not None:
            self._wandb.experiment.finish()


def check_curves(options: Options) -> None:
    """Raise a ``ValueError`` where what is asked for is not installed."""
    if options.run.wandb and find_spec("wandb") is None:
        raise ValueError(
            "--wandb needs Weights & Biases, which is not installed: pip install wandb"
        )


def _wandb(folder: Path, config: RunConfig, run_id: str | None) -> Any:
    from lightning.pytorch.loggers import WandbLogger  # takes seconds

    logger = WandbLogger(
        project=config.options.run.wandb,
        name=folder.name,
        save_dir=folder,
        id=run_id,
        resume="allow",
    )
    logger.experiment.config.update(config.options.flat(), allow_val_change=True)
    return logger
