"""Models and frozen networks in folders of the format of the Hugging Face Hub."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dnw_graph import freeze
from dnw_graph.integrations import hub as frozen_hub
from dnw_graph.integrations.hub import FILE, HubFrozenModel
from models import list_models, model_options
from models.hub import HubModel
from tests.dnw_graph.test_frozen import lived_in

X = torch.randn(2, 3, 32, 32)


@pytest.mark.parametrize("name", list_models())
def test_every_model_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    width = {"width": 0.1} if "width" in model_options(name) else {}
    model = lived_in(HubModel(name, num_classes=10, image_size=32, **width))
    model.save_pretrained(tmp_path)
    again = HubModel.from_pretrained(tmp_path).eval()
    assert torch.equal(again(X), model(X))
    assert again.options == {"num_classes": 10, "image_size": 32, **width}
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "model.safetensors",
        "README.md",
    }


def test_the_config_and_the_card(tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_classes": 2, "image_size": 32}
    model = HubModel("tiny_static", classes=["a", "b"], mean=[0.5] * 3, std=[0.2] * 3, **options)
    model.save_pretrained(tmp_path, model_card_kwargs={"facts": {"top-1": "91 % of 100 images"}})
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == {"name": "tiny_static", "classes": ["a", "b"], "mean": [0.5] * 3} | {
        "std": [0.2] * 3,
        **options,
    }
    again = HubModel.from_pretrained(tmp_path)
    assert (again.classes, again.mean, again.std) == (["a", "b"], [0.5] * 3, [0.2] * 3)
    card = (tmp_path / "README.md").read_text()
    for text in (
        "library_name: dnw-graph",
        "license: apache-2.0",
        "| model | tiny_static |",
        "| options | num_classes 2, image_size 32 |",
        "| top-1 | 91 % of 100 images |",
        "multiply-adds per image",
        'HubModel.from_pretrained("',
    ):
        assert text in card, text


def test_a_frozen_network_is_saved_and_loaded(tmp_path: Path) -> None:
    frozen = freeze(lived_in(HubModel("tiny_static", num_classes=10, image_size=32)).network)
    frozen.notes = {"classes": "a b c"}
    HubFrozenModel(frozen).save_pretrained(tmp_path, model_card_kwargs={"facts": ["91 % top-1"]})
    assert (tmp_path / FILE).exists()
    again = HubFrozenModel.from_pretrained(tmp_path)
    assert torch.equal(again(X), frozen(X))
    assert again.frozen.notes == {"classes": "a b c"}
    card = (tmp_path / "README.md").read_text()
    edges = frozen.graphs[0].num_edges
    assert f"- {edges:,} real edges\n- classes: a b c\n- 91 % top-1" in card


def test_a_frozen_network_of_a_repository_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen = freeze(lived_in(HubModel("tiny_static", num_classes=10, image_size=32)).network)
    HubFrozenModel(frozen).save_pretrained(tmp_path)
    asked: list[dict[str, Any]] = []

    def download(**options: Any) -> str:
        asked.append(options)
        return str(tmp_path / options["filename"])

    monkeypatch.setattr(frozen_hub, "hf_hub_download", download)
    again = HubFrozenModel._from_pretrained(
        model_id="somebody/network", revision="main", token=None
    )
    assert torch.equal(again(X), frozen(X))
    assert asked == [
        {"repo_id": "somebody/network", "filename": FILE, "revision": "main", "token": None}
    ]


@pytest.mark.parametrize("module", ["models.hub", "dnw_graph.integrations.hub"])
def test_a_missing_extra_is_named(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "dnw-graph\[hub\]"'):
        importlib.import_module(module)
