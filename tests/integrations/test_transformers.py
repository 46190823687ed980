"""Wirings in a network of one's own, trained by the Trainer of Hugging Face Transformers."""

from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import SequentialSampler

from dnw_graph.analysis import load_history
from tests.integrations.digits import (
    BATCH,
    EPOCHS,
    RULES,
    digits,
    network,
    optimizer_of,
    trained_by_hand,
)

transformers = pytest.importorskip("transformers", reason="Transformers is not installed")
from dnw_graph.integrations.transformers import WiringCallback  # noqa: E402


class Classifier(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.model(images)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class InOrder(transformers.Trainer):  # type: ignore[misc]
    """Does not shuffle the images."""

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def trainer(folder: Path, model: nn.Module, callback: WiringCallback, **options: Any) -> Any:
    images, labels = digits()[:]
    data = [{"images": x, "labels": y} for x, y in zip(images, labels, strict=True)]
    options = {"num_train_epochs": EPOCHS, "max_grad_norm": 0.0, "save_strategy": "no"} | options
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    optimizer = optimizer_of(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    return InOrder(
        model=model,
        args=arguments,
        train_dataset=data,
        optimizers=(optimizer, schedule),
        callbacks=[callback],
    )


@pytest.mark.parametrize("rule", RULES)
def test_a_trainer_learns_what_a_loop_by_hand_learns(rule: str, tmp_path: Path) -> None:
    model = Classifier(network(rule))
    trainer(tmp_path, model, WiringCallback()).train()
    for name, expected in trained_by_hand(rule).items():
        torch.testing.assert_close(model.model.state_dict()[name], expected, msg=name)


def test_what_is_logged_and_written(tmp_path: Path) -> None:
    model = Classifier(network())
    training = trainer(tmp_path, model, WiringCallback())
    training.train()
    (wiring,) = load_history(tmp_path / "wiring").values()
    assert wiring.steps == [0, 10, 20, 30]
    log = [line for line in training.state.log_history if "wiring/edges_changed" in line]
    assert [line["step"] for line in log] == [10, 20, 30]
    assert [line["wiring/edges_changed"] for line in log] == wiring.births[1:].tolist()
    for picture in ("blocks.png", "history-model.3.png"):
        assert matplotlib.image.imread(tmp_path / "wiring" / picture).std() > 0.01, picture


def test_mistakes(tmp_path: Path) -> None:
    plain = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    with pytest.raises(ValueError, match="the network has no wiring: expected a NeuralGraph"):
        trainer(tmp_path, plain, WiringCallback()).train()
