"""Log metrics to TensorBoard, and optionally to Weights & Biases."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from train.options import Options
from train.run import RunConfig


class Curves:
    """Logs the metrics of each epoch.

    Args:
        folder: The run folder.
        config: The configuration of the run.

    Attributes:
        run_id: ID of the run at Weights & Biases; set it to continue a run.
    """

    def __init__(self, folder: Path, config: RunConfig) -> None:
        self.run_id: str | None = None
        self._folder, self._config = folder, config
        self._board: SummaryWriter | None = None
        self._wandb: Any = None

    def add(self, row: Mapping[str, Any]) -> None:
        """Log the metrics of an epoch; the first call drops those logged for later epochs."""
        if self._board is None:
            self._board = SummaryWriter(self._folder / "tensorboard", purge_step=row["epoch"] - 1)
            if self._config.options.run.wandb:
                self._wandb = _wandb(self._folder, self._config, self.run_id)
                self.run_id = str(self._wandb.version)
        for name, value in row.items():
            self._board.add_scalar(name, value, row["epoch"])
        self._board.flush()
        if self._wandb is not None:
            self._wandb.log_metrics(dict(row), step=row["epoch"])

    def close(self) -> None:
        """Write pending metrics, and close the loggers."""
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.experiment.finish()


def check_curves(options: Options) -> None:
    """Raise ValueError if ``--wandb`` is set but Weights & Biases is not installed."""
    if options.run.wandb and find_spec("wandb") is None:
        raise ValueError(
            "--wandb needs Weights & Biases, which is not installed: pip install wandb"
        )


def _wandb(folder: Path, config: RunConfig, run_id: str | None) -> Any:
    """Return a logger for Weights & Biases that starts a run, or continues one."""
    from lightning.pytorch.loggers import WandbLogger  # takes seconds to import

    logger = WandbLogger(
        project=config.options.run.wandb,
        name=folder.name,
        save_dir=folder,
        id=run_id,
        resume="allow",
    )
    logger.experiment.config.update(config.options.flat(), allow_val_change=True)
    return logger
