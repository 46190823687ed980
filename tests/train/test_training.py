"""Runs from start to end: fit, resume, evaluate, predict, and refuse in time."""

import csv
import dataclasses
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dnw_graph.wiring import top_k
from models import list_models, model_options
from train.checkpoint import Checkpoints
from train.data import open_source
from train.data.images import MemoryImages
from train.evaluate import evaluate
from train.imagenet import main, resume, train
from train.learner import make_schedule
from train.loop import start_training
from train.options import OptimizationOptions, Options
from train.predict import Predictor
from train.predict import main as predict_main
from train.process_group import make_fabric
from train.run import RunConfig, RunFolder
from train.start import check_network

SMALL = {  # a network that trains in seconds
    "graph": "mbv1",
    "width": 0.25,
    "data": "digits",
    "image_size": 16,
    "batch_size": 64,
    "lr": 0.05,
    "epochs": 2,
    "device": "cpu",
    "report": False,
}


def options(out: Path, **changes: object) -> Options:
    return Options.from_flat({**SMALL, "out": str(out), **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "small"
    train(options(out))
    return out


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_mbv1_dnw_learns_the_digits(seed: int, tmp_path: Path) -> None:
    summary = train(
        options(tmp_path / "run", graph="mbv1_dnw", width=0.225, image_size=32, epochs=3, seed=seed)
    )
    assert summary["top1"] >= 0.9
    assert summary["real_edges"] == 158_944
    assert summary["candidate_edges"] == 6_981_632
    with (tmp_path / "run" / "metrics.csv").open() as file:
        changed = [int(row["edges_changed"]) for row in csv.DictReader(file)]
    assert changed[0] > changed[-1] > 0


RESNET = {"graph": "resnet18_dnw", "width": None, "density": 0.1, "first_layer_dense": True}


def test_a_sparse_resnet_trains_and_resumes(tmp_path: Path) -> None:
    given = {**RESNET, "warmup_epochs": 1, "label_smoothing": 0.1, "train_images": 300}
    summary = train(options(tmp_path / "whole", **given))
    assert summary["candidate_edges"] == 11_176_512 + 5_120 - 9_408 - 9_600
    assert summary["real_edges"] == pytest.approx(0.1 * summary["candidate_edges"], rel=1e-4)
    whole = RunFolder(tmp_path / "whole")
    with (whole.path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert all(int(row["edges_changed"]) > 0 for row in rows)
    stopped = start_training(options(tmp_path / "stopped", **given))
    stopped.advance()
    del stopped
    resume(tmp_path / "stopped")
    resumed = RunFolder(tmp_path / "stopped")
    assert same(whole.load_weights("last"), resumed.load_weights("last"))


def test_a_dense_resnet_is_a_complete_graph_to_start_from(tmp_path: Path) -> None:
    dense = {"graph": "resnet18", "width": None, "epochs": 1, "train_images": 200}
    train(options(tmp_path / "dense", **dense))
    given = {
        **RESNET,
        **dense,
        "graph": "resnet18_dnw",
        "rule": "lottery",
        "from_run": str(tmp_path / "dense"),
    }
    training = start_training(options(tmp_path / "ticket", **given))
    initial, last = (RunFolder(tmp_path / "dense").load_weights(n) for n in ("initial", "last"))
    weight = training.plain_model.get_parameter("fc.parametrizations.weight.original")
    assert torch.equal(weight, initial["fc.weight"])
    kept = training.plain_model.get_submodule("fc").weight.flatten().nonzero().flatten()
    assert torch.equal(kept, top_k(last["fc.weight"].flatten(), 512))


def rates_of(fit: OptimizationOptions, steps: int) -> list[float]:
    """Return the learning rate of each step, and the one after the last."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=fit.lr)
    schedule, rates = make_schedule(optimizer, fit, steps), []
    for _ in range(fit.epochs * steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return [*rates, optimizer.param_groups[0]["lr"]]


def test_the_learning_rate_rises_then_falls_along_a_cosine() -> None:
    rates = rates_of(OptimizationOptions(epochs=6, warmup_epochs=2, lr=0.3), steps=5)
    assert rates[:10] == pytest.approx([0.03 * (i + 1) for i in range(10)])
    assert rates[10] == rates[9] == 0.3
    assert rates[10:] == pytest.approx([0.15 * (1 + math.cos(math.pi * i / 20)) for i in range(21)])


def test_the_learning_rate_may_fall_in_steps() -> None:
    rates = rates_of(OptimizationOptions(epochs=8, lr=0.3, lr_schedule="steps"), steps=2)
    assert rates[:-1] == pytest.approx([0.3] * 8 + [0.03] * 4 + [0.003] * 4)


def test_smoothed_labels_raise_the_training_loss_only(tmp_path: Path) -> None:
    def first_loss(smoothing: float) -> float:
        training = start_training(options(tmp_path / f"{smoothing}", label_smoothing=smoothing))
        images, labels = next(iter(training.batches.train(0)))
        loss, logits, _ = training.learner.step(images, labels)
        expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing)
        assert float(loss) == pytest.approx(expected.item())
        return loss.item()

    assert first_loss(0.5) != first_loss(0.0)


def test_a_run_leaves_what_it_promises(finished: Path) -> None:
    files = {p.name for p in finished.iterdir()}
    assert files == {
        "config.yaml",
        "initial.safetensors",
        "last.safetensors",
        "best.safetensors",
        "checkpoints",
        "metrics.csv",
        "summary.json",
        "tensorboard",
    }
    summary = json.loads((finished / "summary.json").read_text())
    for key in (
        *("top1", "top5", "parameters", "macs", "real_edges", "candidate_edges", "dead_nodes"),
        *("seconds", "images_per_second", "best_chosen_on"),
    ):
        assert key in summary
    with (finished / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert float(rows[-1]["top1"]) == summary["top1"]
    with safe_open(finished / "last.safetensors", "pt") as file:
        config = RunConfig.from_dict(json.loads(file.metadata()["config"]))
    assert config.options.network.graph == "mbv1"
    assert config.classes == tuple("0123456789")
    assert "torch" in (finished / "config.yaml").read_text()
    initial, last = (RunFolder(finished).load_weights(n) for n in ("initial", "last"))
    assert not torch.equal(initial["classifier.weight"], last["classifier.weight"])


def test_a_folder_is_prepared_as_the_images_of_the_run_were(finished: Path, tmp_path: Path) -> None:
    images = open_source("digits", training=False).validation
    for index in range(60):
        place = tmp_path / "val" / str(int(images.labels[index]))
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[index].permute(1, 2, 0).numpy()).save(place / f"{index}.png")
    predict = Predictor(str(finished), device="cpu")
    correct = sum(predict(path)[0][0] == path.parent.name for path in tmp_path.rglob("*.png"))
    assert evaluate(str(finished), data=str(tmp_path), device="cpu")["top1"] == pytest.approx(
        correct / 60
    )


def test_evaluate_reproduces_the_summary_exactly(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    measured = evaluate(str(finished), device="cpu")
    assert measured["top1"] == summary["top1"]
    assert measured["top5"] == summary["top5"]
    best = evaluate(str(finished), weights="best", device="cpu")
    assert best["top1"] == summary["best_top1"]
    assert evaluate(str(finished), weights="initial", device="cpu")["top1"] < 0.5


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_resuming_a_finished_run_changes_nothing(finished: Path) -> None:
    before = (finished / "last.safetensors").read_bytes()
    assert resume(finished) == json.loads((finished / "summary.json").read_text())
    main(["--resume", str(finished)])
    assert (finished / "last.safetensors").read_bytes() == before


def test_a_run_is_never_overwritten_unasked(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"exists: continue it with --resume .* --overwrite"):
        train(options(finished))
    (tmp_path / "thesis.txt").write_text("precious")
    (tmp_path / "config.yaml").write_text("mine: too")
    with pytest.raises(ValueError, match=r"is not overwritten: .*thesis.txt is not part of a run"):
        train(options(tmp_path, overwrite=True))
    assert (tmp_path / "thesis.txt").read_text() == "precious"
    (tmp_path / "thesis.txt").unlink()
    with pytest.raises(ValueError, match=r"is not overwritten: .*config.yaml is damaged or of"):
        train(options(tmp_path, overwrite=True))
    assert (tmp_path / "config.yaml").read_text() == "mine: too"
    with pytest.raises(ValueError, match=r"--init .* would be overwritten"):
        train(options(finished, init=str(finished), overwrite=True))
    train(options(tmp_path / "again", epochs=1))
    train(options(tmp_path / "again", epochs=1, overwrite=True))


def test_init_takes_the_network_and_not_the_classifier(finished: Path, tmp_path: Path) -> None:
    started = start_training(options(tmp_path / "new", init=str(finished)))
    ours, theirs = started.plain_model.state_dict(), RunFolder(finished).load_weights("last")
    apart = {name for name in ours if not torch.equal(ours[name], theirs[name])}
    assert apart == {"classifier.weight", "classifier.bias"}
    started.advance()
    del started
    (tmp_path / "new" / "config.yaml").write_text(
        (tmp_path / "new" / "config.yaml").read_text().replace(str(finished), "moved-away")
    )
    main(["--resume", str(tmp_path / "new")])
    with pytest.raises(ValueError, match=r"the network of --init .* \(mbv1, width 0.25, norm"):
        start_training(options(tmp_path / "other", init=str(finished), width=0.5))


def test_the_number_of_classes_is_not_assumed_to_be_small(tmp_path: Path) -> None:
    edges = (10, 10, 10, 10, 10, 5000)  # of 2,048 candidates of the classifier for two classes
    changes = {"graph": "mbv1_dnw_small", "num_edges": edges, "width": None, "image_size": 32}
    check_network(options(tmp_path, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"graph": "mbv1_dwn"}, r"unknown model 'mbv1_dwn'; did you mean 'mbv1_dnw'"),
        ({"rule": "dnw"}, r"mbv1 takes no option 'rule'"),
        ({"data": "nowhere"}, r"--data nowhere: there is no such folder"),
        ({"image_size": 4}, r"images of 4 pixels are too small"),
        ({"batch_size": 5000}, r"--batch-size 5000 is larger than the 1438 training images"),
        ({"device": "cuda:77"}, r"there is no --device cuda:77; this machine has cpu"),
        ({"device": "gpu"}, r"there is no --device gpu"),
        ({"resume": "nowhere"}, r"nowhere is not a run folder"),
        ({"init": "nowhere"}, r"nowhere has no weights|nowhere is not a run folder"),
        (
            {"graph": "resnet18"},
            r"resnet18 takes no option 'width' \(it takes: num_classes, image_",
        ),
        ({"warmup_epochs": 2}, r"warmup_epochs must be 0 or more, and fewer than epochs"),
        ({"label_smoothing": 1.0}, r"label_smoothing must be a share, 0 or more and below 1"),
        ({"graph": "mbv1_dnw", "width": 100.0}, r"width 100.0 needs .* edges in graph 0"),
    ],
)
def test_errors_come_before_anything_is_written(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        start_training(options(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "complete"
    train(options(out, graph="mbv1_dnw", width=0.225, rule="complete", epochs=1))
    return out


LEARNED = Options.from_flat({"graph": "mbv1_dnw", "data": "digits"}).resolved()


@pytest.mark.parametrize(("rule", "weights"), [("lottery", "initial"), ("fine_tune", "last")])
def test_rules_that_start_from_a_complete_run(
    complete: Path, tmp_path: Path, rule: str, weights: str
) -> None:
    out = tmp_path / rule
    given = {"graph": "mbv1_dnw", "width": 0.225, "rule": rule, "from_run": str(complete)}
    train(options(out, **given, epochs=1))
    theirs = RunFolder(complete).load_weights(weights)
    trained = RunFolder(complete).load_weights("last")
    ours, after = RunFolder(out).load_weights("initial"), RunFolder(out).load_weights("last")
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    for name, ids in ((n, v) for n, v in after.items() if n.endswith("edge_id")):
        size = trained[name.replace("selector.edge_id", "weight")].abs()
        assert float(size[ids].min()) >= float(size.index_fill(0, ids, 0).max())
        assert torch.equal(ids, ours[name])
    assert not torch.equal(ours["stem.weight"], after["stem.weight"])


def test_a_run_of_lottery_is_resumed(complete: Path, tmp_path: Path) -> None:
    given = {"graph": "mbv1_dnw", "width": 0.225, "rule": "lottery", "from_run": str(complete)}
    stopped = start_training(options(tmp_path / "stopped", **given, train_images=200))
    stopped.advance()
    del stopped
    assert resume(tmp_path / "stopped")["epochs"] == 2


def test_a_resnet_starts_from_another_with_a_new_classifier(tmp_path: Path) -> None:
    given = {"graph": "resnet18", "width": None, "train_images": 100, "epochs": 1}
    train(options(tmp_path / "first", **given))
    training = start_training(options(tmp_path / "second", **given, init=str(tmp_path / "first")))
    last = RunFolder(tmp_path / "first").load_weights("last")
    ours = training.plain_model.state_dict()
    assert torch.equal(ours["layer4.1.conv2.weight"], last["layer4.1.conv2.weight"])
    assert not torch.equal(ours["fc.weight"], last["fc.weight"])
    with pytest.raises(ValueError, match=r"nowhere is not a run folder"):
        start_training(options(tmp_path / "third", **given, init="nowhere"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rule": "lottery"}, r"rule lottery keeps the largest .*--rule complete.*--from"),
        ({"rule": "lottery", "from_run": "nowhere"}, r"nowhere is not a run folder"),
        ({"rule": "lottery", "from_run": "FINISHED"}, r"weights of another model: they differ at"),
        (
            {"rule": "lottery", "from_run": "LEARNED"},
            r"is a run of mbv1_dnw, .*rule dnw.* complete",
        ),
        ({"rule": "dnw", "from_run": "COMPLETE"}, r"for the rules lottery and fine_tune, not for"),
        (
            {"rule": "lottery", "from_run": "COMPLETE", "norm_eps": 1e-5},
            r"trained with norm_eps 0.001, not 1e-05; use the same",
        ),
        (
            {"rule": "fine_tune", "from_run": "COMPLETE", "init": "COMPLETE"},
            r"takes its weights from --from, so leave out --init",
        ),
        ({"rule": "rigl(fraction=2)"}, r"fraction must be a share of the edges"),
        ({"rule": "lotery"}, r"did you mean 'lottery'"),
    ],
)
def test_rules_and_runs_that_do_not_go_together(
    complete: Path, finished: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    learned = tmp_path / "learned"
    RunFolder(learned).create(RunConfig.of(LEARNED, open_source("digits")), overwrite=False)
    places = {"COMPLETE": str(complete), "FINISHED": str(finished), "LEARNED": str(learned)}
    given = {k: places.get(str(v), v) for k, v in changes.items()}
    with pytest.raises(ValueError, match=message):
        train(options(tmp_path / "run", graph="mbv1_dnw", width=0.225, **given))
    assert not (tmp_path / "run").exists()


def test_an_unfinished_complete_run_is_no_start(complete: Path, tmp_path: Path) -> None:
    run = tmp_path / "unfinished"
    shutil.copytree(complete, run)
    (run / "summary.json").unlink()
    with pytest.raises(ValueError, match=r"is not finished; finish it with --resume"):
        train(options(tmp_path / "run", graph="mbv1_dnw", rule="lottery", from_run=str(run)))


def test_a_run_of_another_model_is_not_resumed(finished: Path) -> None:
    with pytest.raises(ValueError, match=r"was trained with graph 'mbv1' \(now: 'mbv1_dnw'\)"):
        main([f"--resume={finished}", "--graph", "mbv1_dnw"])
    with pytest.raises(ValueError, match=r"was trained with epochs 2 \(now: 3\)"):
        resume(finished, epochs=3)
    with pytest.raises(ValueError, match=r"is continued in place"):
        main(["--resume", str(finished), "--out", "elsewhere"])


def test_a_run_is_not_resumed_on_other_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_training(options(tmp_path / "run")).advance()
    whole = open_source("digits")
    fewer = dataclasses.replace(
        whole, train=MemoryImages(list(whole.train)[:-1], whole.train.labels[:-1])
    )
    monkeypatch.setattr("train.loop.open_source", lambda *_, **__: fewer)
    with pytest.raises(ValueError, match=r"other images \(1438 images, .* now 1437 images"):
        resume(tmp_path / "run")
    inverted = dataclasses.replace(
        whole, train=MemoryImages([255 - x for x in whole.train], whole.train.labels)
    )
    monkeypatch.setattr("train.loop.open_source", lambda *_, **__: inverted)
    with pytest.raises(ValueError, match=r"other images \(1438 images, .* now 1438 images"):
        resume(tmp_path / "run")
    other = dataclasses.replace(whole, classes=("zero", *whole.classes[1:]))
    monkeypatch.setattr("train.loop.open_source", lambda *_, **__: other)
    with pytest.raises(ValueError, match=r"the first to differ are '0' and 'zero'"):
        resume(tmp_path / "run")


def test_a_loss_that_is_not_finite_stops_before_anything_is_overwritten(tmp_path: Path) -> None:
    training = start_training(options(tmp_path / "run"))
    training.advance()
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.is_file()}
    training.learner.schedule.base_lrs = [1e30]
    training.learner.optimizer.param_groups[0]["lr"] = 1e30
    message = (
        r"the loss is nan in epoch 2 at step 2 \(24 in total\), at a learning rate of 4.\d+e\+29: "
        r"the first output that is not finite is that of layer0.0.0 \(Conv2d\); "
        r".* still holds .* lower"
    )
    with pytest.raises(ValueError, match=message):
        training.advance()
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.is_file()} == before
    assert Checkpoints(tmp_path / "run").load()["steps"] == 22
    with pytest.raises(ValueError, match=r"validation images is nan in epoch 1 at step 1"):
        train(options(tmp_path / "one-step", batch_size=1400, lr=1e30))


def test_a_run_whose_configuration_was_edited_is_not_resumed(tmp_path: Path) -> None:
    start_training(options(tmp_path / "run")).advance()
    file = tmp_path / "run" / "config.yaml"
    file.write_text(file.read_text().replace("epochs: 2", "epochs: 9"))
    with pytest.raises(ValueError, match=r"config.yaml was changed .* epochs 2 \(now: 9\)"):
        resume(tmp_path / "run")


def test_the_configuration_says_where_everything_is(finished: Path) -> None:
    kept = RunFolder(finished).load_config().options
    assert kept.data.data == "digits"
    assert kept.run.out == str(finished)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs permissions as on Unix")
def test_others_may_read_a_run_as_the_umask_says(finished: Path) -> None:
    modes = {p.name: p.stat().st_mode & 0o777 for p in finished.iterdir() if p.is_file()}
    assert set(modes.values()) == {modes["config.yaml"]}


def test_a_full_disk_is_said_in_one_line(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, model = RunFolder(tmp_path), RunFolder(finished).load_model()
    config = RunFolder(finished).load_config()
    folder.save_weights("last", model, config)
    before = (tmp_path / "last.safetensors").read_bytes()

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("No space left")

    monkeypatch.setattr("train.run.save_file", full)
    with pytest.raises(OSError, match=r"could not be written .* MB are free there"):
        folder.save_weights("last", model, config)
    assert [p.name for p in tmp_path.iterdir()] == ["last.safetensors"]
    assert (tmp_path / "last.safetensors").read_bytes() == before


def test_damaged_files_are_refused(finished: Path, tmp_path: Path) -> None:
    for name in ("config.yaml", "last.safetensors"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    folder = RunFolder(tmp_path)
    (tmp_path / "last.safetensors").write_bytes(b"\x10\x00garbage")
    with pytest.raises(ValueError, match=r"last.safetensors is damaged"):
        folder.load_model()
    save_file({"weight": torch.zeros(3)}, tmp_path / "last.safetensors")
    with pytest.raises(ValueError, match=r"last.safetensors does not fit mbv1, width 0.25, norm"):
        folder.load_model()
    state = Checkpoints(finished).load()
    Checkpoints(tmp_path).save({**state, "model": 7}, 1)
    with pytest.raises(ValueError, match=r"checkpoints belongs to another run"):
        resume(tmp_path)
    for text in ("options: {}", "", "7", "options: [", "options: {epochs: many}\nclasses: 3"):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"config.yaml is damaged or of another version"):
            folder.load_config()


def test_a_half_written_file_is_never_seen(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path)
    folder.save_summary({"top1": 0.5})
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match=r"summary.json could not be written \(disk full; .* still"):
        folder.save_summary({"top1": 0.7})
    monkeypatch.undo()
    assert json.loads((tmp_path / "summary.json").read_text()) == {"top1": 0.5}


def test_predict_names_the_likeliest_classes(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = open_source("digits")
    image = Image.fromarray(source.validation[7].permute(1, 2, 0).numpy())
    image.save(tmp_path / "seven.png")
    image.convert("L").save(tmp_path / "grey.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    guesses = Predictor(finished, device="cpu")(tmp_path / "seven.png")
    assert len(guesses) == 5
    assert guesses[0][0] == source.classes[int(source.validation.labels[7])]
    assert [p for _, p in guesses] == sorted((p for _, p in guesses), reverse=True)
    assert 0.99 < sum(p for _, p in Predictor(finished)(tmp_path / "seven.png", most=10)) < 1.01
    assert np.allclose(guesses[0][1], Predictor(finished)(tmp_path / "grey.png")[0][1])
    with pytest.raises(SystemExit) as raised:
        predict_main([str(finished), *(str(tmp_path / n) for n in ("broken.png", "seven.png"))])
    assert raised.value.code == 1
    captured = capsys.readouterr()
    assert "broken.png cannot be read as an image" in captured.err
    assert "seven.png\n" in captured.out


@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_a_compiled_network_learns_the_same(tmp_path: Path) -> None:
    # Edges that stay, and maps of more than a pixel: else rounding grows from step to step.
    fixed = {"graph": "mbv1_dnw", "width": 0.1, "rule": "random", "epochs": 1}
    plain = train(options(tmp_path / "plain", **fixed))
    compiled = train(options(tmp_path / "compiled", compile=True, **fixed))
    assert compiled["macs"] == plain["macs"]
    losses = [
        float(next(csv.DictReader((tmp_path / name / "metrics.csv").open()))["train_loss"])
        for name in ("plain", "compiled")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    measured = evaluate(tmp_path / "compiled")["top1"]
    assert measured == pytest.approx(compiled["top1"], abs=0.01)


def test_mixed_precision_trains(tmp_path: Path) -> None:
    summary = train(options(tmp_path / "run", epochs=1, precision="bf16"))
    assert np.isfinite(summary["top1"])


def test_every_model_can_be_trained_and_loaded_again(tmp_path: Path) -> None:
    for name in list_models():
        width = 0.1 if "width" in model_options(name) else None
        training = start_training(options(tmp_path / name, graph=name, width=width))
        restored = RunFolder(tmp_path / name).load_model("initial")
        ours = training.plain_model.state_dict()
        assert same(ours, restored.state_dict())


def test_auto_finds_a_device() -> None:
    assert make_fabric("auto", "32").device.type in ("cpu", "cuda")


@pytest.mark.parametrize(("device", "number"), [("cuda", 0), ("cuda:1", 1), ("auto", 0)])
def test_one_of_several_gpus_is_used(
    device: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed: dict[str, Any] = {}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("train.process_group.Fabric", lambda **options: passed.update(options))
    make_fabric(device, "32")
    assert passed["accelerator"] == "cuda"
    assert passed["devices"] == [number]
    with pytest.raises(ValueError, match="cuda:2; this machine has cpu, cuda:0, cuda:1"):
        make_fabric("cuda:2", "32")


@pytest.mark.parametrize("change", [{"num_edges": None, "width": 0.2}, {"norm_eps": 1e-5}])
def test_a_network_that_is_begun_from_another_one_says_what_differs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: dict[str, object]
) -> None:
    graph = {"graph": "mbv1_dnw", "width": 0.1, "epochs": 1, "train_images": 128}
    train(options(tmp_path / "first", **graph))
    begun = {**graph, "init": str(tmp_path / "first")}
    train(options(tmp_path / "same", **begun))
    assert "something else" not in caplog.text
    train(options(tmp_path / "other", **{**begun, **change}))
    name, value = next((n, v) for n, v in change.items() if v is not None)
    assert f"{name} " in caplog.text
    assert f"(here: {value!r}): the new run's network" in caplog.text
