"""Tiny classifiers through the commands."""

import csv
from pathlib import Path

from tests.train.test_training import options
from train.imagenet import train
from train.run import RunFolder

TINY = {"width": None, "epochs": 1, "train_images": 100, "validation_images": 20, "batch_size": 20}


def test_evaluations_of_continuous_time_are_logged(tmp_path: Path) -> None:
    train(options(tmp_path / "run", graph="tiny_continuous", **TINY))
    with (tmp_path / "run" / "metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert 8 <= float(row["evaluations_forward"]) <= 200
    assert float(row["evaluations_backward"]) == 0
    assert RunFolder(tmp_path / "run").load_model().graph.schedule.rtol == 1e-3
