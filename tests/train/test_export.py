"""Exported networks classify as the run does."""

import json
import shutil
from pathlib import Path

import onnxruntime
import pytest
import torch

from dnw_graph import load_frozen
from models.hub import HubModel
from tests.train.test_training import options
from train.data import make_batches, open_source
from train.export import export, notes, report
from train.imagenet import train
from train.metrics import Normalize
from train.run import RunFolder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("runs") / "small"
    train(options(out, graph="mbv1_dnw", width=0.225, image_size=32, epochs=1))
    return str(out)


def test_every_kind_of_file_classifies_as_the_run(run: str, tmp_path: Path) -> None:
    folder = RunFolder(run)
    config, model = folder.load_config(), folder.load_model()
    frozen = load_frozen(export(run, "safetensors"))
    assert frozen.notes == notes(config)
    session = onnxruntime.InferenceSession(export(run, "onnx", str(tmp_path / "a" / "model.onnx")))
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == list(
        config.classes
    )
    program = torch.export.load(export(run, "torch"))
    source = open_source("digits", training=False)
    batches = make_batches(
        source,
        image_size=config.options.data.image_size,
        batch_size=config.options.optimization.batch_size,
        seed=0,
        device=torch.device("cpu"),
    ).validation()
    normalize, seen = Normalize(config.mean, config.std), 0
    with torch.inference_mode():
        for images, _ in batches:
            x = normalize(images)
            expected = model(x).argmax(1)
            (onnx,) = session.run(None, {"images": x.numpy()})
            for logits in (frozen(x), torch.from_numpy(onnx), program.module()(x)):
                assert torch.equal(logits.argmax(1), expected)
            seen += len(x)
    assert seen > 300


def test_a_folder_for_the_hub(run: str) -> None:
    path, folder = export(run, "hub"), RunFolder(run)
    model = HubModel.from_pretrained(path).eval()
    x = torch.randn(3, 3, 32, 32)
    assert torch.equal(model(x), folder.load_model()(x))
    config = folder.load_config()
    assert model.classes == list(config.classes)
    assert (model.mean, model.std) == (list(config.mean), list(config.std))
    card, summary = (
        (path / "README.md").read_text(),
        json.loads((folder.path / "summary.json").read_text()),
    )
    assert f"| {summary['top1']:.2%} after the last epoch |" in card
    assert "| data | digits |" in card
    best = (export(run, "hub", weights="best") / "README.md").read_text()
    assert f"| {summary['best_top1']:.2%} after the best epoch |" in best
    assert "top-1" not in (export(run, "hub", weights="initial") / "README.md").read_text()


def test_a_card_does_not_tell_where_the_data_is(run: str, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    text = config.read_text().replace("dataset: digits", "dataset: imagenet")
    config.write_text(text.replace(" data: digits", " data: /home/someone/photos"))
    path = export(str(tmp_path / "run"), "hub", str(tmp_path / "hub"))
    card = (path / "README.md").read_text()
    assert "| data | photos |" in card
    assert "someone" not in card


def test_a_report_and_errors(run: str, tmp_path: Path) -> None:
    assert "edges; " in str(report(run))
    with pytest.raises(ValueError, match="is not a run folder"):
        export(str(tmp_path), "onnx")
