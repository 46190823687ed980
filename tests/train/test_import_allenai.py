"""Checkpoints of the published implementation as runs."""

import pickle
import random
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from models import load_allenai
from models.allenai import Kind
from models.mbv1_dnw import STAGES
from models.tiny import INPUTS, NODES, OUTPUTS
from tests.models.test_allenai import SMALL, by_hand, checkpoint, tiny
from tests.train.test_data import small
from train.evaluate import evaluate
from train.imagenet import train
from train.import_allenai import main, read_checkpoint
from train.options import Options
from train.run import RunFolder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("imported")
    small(place / "images", number=8)
    classes = len(list((place / "images" / "train").iterdir()))
    state = checkpoint(list(STAGES), "mbv1_dnw", classes=classes)
    torch.save({"model": {f"module.{n}": v for n, v in state.items()}}, place / "best.pt")
    torch.save({"model": checkpoint(SMALL, "mbv1_dnw", classes)}, place / "small.pt")
    return place


def flags(place: Path, **changes: object) -> list[str]:
    given = {"kind": "mbv1_dnw", "prune-rate": 0.775, "data": place / "images", "image-size": 32}
    return [f"--{name}={value}" for name, value in {**given, **changes}.items()]


def test_an_imported_run_is_a_run(place: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "run"
    main([str(place / "best.pt"), *flags(place, out=out)])
    assert f"next: python -m train.evaluate {out}" in capsys.readouterr().out
    model = RunFolder(out).load_model()
    state = torch.load(place / "best.pt", weights_only=True)["model"]
    state = {name.removeprefix("module."): value for name, value in state.items()}
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(
            model(x), by_hand(state, list(STAGES), 0.775, x), rtol=1e-3, atol=1e-3
        )
    assert 0 <= evaluate(str(out), device="cpu")["top1"] <= 1
    config = RunFolder(out).load_config().options
    given = {"graph": "mbv1_dnw", "init": str(out), "data": config.data.data, "image_size": 32}
    given |= {"num_edges": config.network.num_edges, "norm_eps": 1e-5, "width": 0.225}
    given |= {"epochs": 1, "batch_size": 4, "device": "cpu", "out": str(tmp_path / "tuned")}
    train(Options.from_flat(given))


@pytest.mark.parametrize("kind", get_args(Kind))
def test_every_kind_can_be_imported_measured_and_trained_on(
    place: Path, tmp_path: Path, kind: str
) -> None:
    if kind in ("discrete", "continuous"):
        state, rate, size = tiny(kind, NODES, INPUTS, OUTPUTS, classes=2), 0.95, 32
    else:
        state, rate, size = checkpoint(list(STAGES), kind, classes=2), 0.775, 32
    torch.save({"model": state}, tmp_path / "best.pt")
    out = tmp_path / "run"
    layers = {"layers": 3} if kind == "discrete" else {}
    changes = {"kind": kind, "prune-rate": rate, "out": out, **layers}
    if kind in ("discrete", "continuous"):
        changes["dataset"] = "cifar10"
    main([str(tmp_path / "best.pt"), *flags(place, **changes)])
    x = torch.randn(2, 3, size, size)
    direct = load_allenai(state, kind=kind, prune_rate=rate, image_size=size, **layers)
    with torch.no_grad():
        assert torch.equal(RunFolder(out).load_model()(x), direct(x))
    assert 0 <= evaluate(str(out), device="cpu")["top1"] <= 1
    config = RunFolder(out).load_config().options.flat()
    if kind == "discrete":
        assert config["schedule"] == "discrete(steps=3)"
    config |= {"init": str(out), "epochs": 1, "batch_size": 4, "device": "cpu", "report": False}
    train(Options.from_flat({**config, "out": str(tmp_path / "tuned")}))


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("nothing.pt", {}, r"there is no checkpoint .*nothing.pt"),
        (
            "small.pt",
            {"prune-rate": 0.4},
            r"differ from those of mbv1_dnw; use models.load_allenai",
        ),
        ("best.pt", {"kind": "discrete"}, r"not a checkpoint of kind 'discrete'"),
        ("best.pt", {"data": "nowhere"}, r"--data nowhere: there is no such folder"),
        ("best.pt", {"data": "digits"}, r"has \d classes, but digits has 10"),
        ("list.pt", {}, r"it has no named tensors under \"model\""),
        ("words.pt", {}, r"list.pt|'epoch' is not a tensor"),
        ("code.pt", {}, r"cannot be read: it is damaged, or contains more than tensors"),
    ],
)
def test_errors(
    place: Path, tmp_path: Path, file: str, changes: dict[str, object], message: str
) -> None:
    torch.save([1, 2], place / "list.pt")
    torch.save({"epoch": 3}, place / "words.pt")
    (place / "code.pt").write_bytes(pickle.dumps(Path("/"), protocol=2))
    with pytest.raises(ValueError, match=message):
        main([str(place / file), *flags(place, **changes), f"--out={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()


def test_damaged_checkpoints_are_refused_or_read(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.randn(3, 3), "b": torch.randn(2)}}, tmp_path / "best.pt")
    data, chance, refused = (tmp_path / "best.pt").read_bytes(), random.Random(1), 0
    for _ in range(500):
        damaged = bytearray(data)
        for _ in range(chance.choice([1, 2, 8])):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        (tmp_path / "damaged.pt").write_bytes(damaged)
        try:
            read_checkpoint(tmp_path / "damaged.pt")
        except ValueError:
            refused += 1
    assert 100 < refused < 500
