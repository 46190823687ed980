"""Wirings in a module of one's own, trained by Lightning's Trainer."""

import importlib
import sys
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dnw_graph.analysis import load_history
from dnw_graph.integrations.lightning import WiringCallback
from tests.integrations.digits import (
    BATCH,
    EPOCHS,
    RULES,
    digits,
    network,
    optimizer_of,
    trained_by_hand,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:.*does not have.*workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:.isinstance:FutureWarning"),
]


class Classifier(LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.model(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return optimizer_of(self.model)


def loader() -> DataLoader[Any]:
    return DataLoader(digits(), BATCH)


def trainer(folder: Path, callback: WiringCallback, **options: Any) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    quiet |= {"enable_checkpointing": False, "max_epochs": EPOCHS}
    return Trainer(
        default_root_dir=folder, accelerator="cpu", callbacks=[callback], **{**quiet, **options}
    )


@pytest.mark.parametrize("rule", RULES)
def test_a_trainer_learns_what_a_loop_by_hand_learns(rule: str, tmp_path: Path) -> None:
    module = Classifier(network(rule))
    trainer(tmp_path, WiringCallback()).fit(module, loader())
    for name, expected in trained_by_hand(rule).items():
        torch.testing.assert_close(module.model.state_dict()[name], expected, msg=name)


def test_what_is_logged_and_written(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    module = Classifier(network())
    trainer(tmp_path, WiringCallback(), logger=logger, log_every_n_steps=1).fit(module, loader())
    folder = Path(logger.log_dir) / "wiring"
    history = load_history(folder)
    (wiring,) = history.values()
    assert wiring.steps == [0, 10, 20, 30]
    lines = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("wiring/edges_changed")
    changed = [float(x) for line in lines[1:] if (x := line.split(",")[column])]
    assert changed == [len(record.born) for record in wiring.records[1:]]
    assert sum(changed) > 0
    for picture in ("blocks.png", "history-model.3.png"):
        assert matplotlib.image.imread(folder / picture).std() > 0.01, picture


def test_another_folder_and_two_runs_of_one_callback(tmp_path: Path) -> None:
    callback = WiringCallback(tmp_path / "here")
    for _ in range(2):
        trainer(tmp_path, callback, max_epochs=1).fit(
            Classifier(network("rigl(every=5)")), loader()
        )
    assert load_history(tmp_path / "here")["model.3"].steps == [0, 10]


def test_a_run_continues_from_a_checkpoint(tmp_path: Path) -> None:
    rule = "rigl(every=5)"
    first = trainer(tmp_path, WiringCallback(tmp_path / "wiring"))
    first.fit_loop.max_epochs = EPOCHS

    class Stop(WiringCallback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            super().on_train_epoch_end(trainer, pl_module)
            trainer.should_stop = trainer.current_epoch == 0

    stopped = trainer(tmp_path, Stop(tmp_path / "wiring"))
    stopped.fit(Classifier(network(rule)), loader())
    stopped.save_checkpoint(tmp_path / "last.ckpt")
    module = Classifier(network(rule))
    first.fit(module, loader(), ckpt_path=tmp_path / "last.ckpt", weights_only=False)
    for name, expected in trained_by_hand(rule).items():
        torch.testing.assert_close(module.model.state_dict()[name], expected, msg=name)
    assert load_history(tmp_path / "wiring")["model.3"].steps == [0, 10, 20, 30]


def test_mistakes(tmp_path: Path) -> None:
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(ValueError, match="the network has no wiring: expected a NeuralGraph"):
        trainer(tmp_path, WiringCallback()).fit(Classifier(plain), loader())
    with pytest.raises(ValueError, match="pass max_epochs or max_steps to Trainer"):
        trainer(tmp_path, WiringCallback(), max_epochs=-1).fit(Classifier(network()), loader())


@pytest.mark.parametrize("name", ["lightning", "transformers"])
def test_a_missing_extra_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, f"dnw_graph.integrations.{name}", raising=False)
    with pytest.raises(ModuleNotFoundError, match=rf'pip install "dnw-graph\[{name}\]"'):
        importlib.import_module(f"dnw_graph.integrations.{name}")
