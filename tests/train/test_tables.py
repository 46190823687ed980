"""The table runner: what is missing is trained, what is there is kept."""

import csv
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

import train.tables
from benchmarks.kills import environment
from dnw_graph.wiring import NeverActsWarning, selectors
from tests.train.test_data import small
from train.checkpoint import Checkpoints
from train.loop import Training
from train.options import Options
from train.results import Results, as_markdown
from train.run import RunFolder, build_network
from train.table_rows import TABLES
from train.tables import Arguments, main, plan


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    return small(tmp_path / "cifar", number=8)


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the recipes of table 2 have batches of 8 images."""
    load = train.tables.load_recipe
    monkeypatch.setattr(train.tables, "load_recipe", lambda name: load(name).replace(batch_size=8))


def run(place: Path, data: Path, *args: str, epochs: int = 1) -> list[dict[str, str]]:
    """Run a cut-down table 2, and return the lines of its CSV file."""
    folders = [f"--runs={place / 'runs'}", f"--results={place / 'results'}"]
    cut = [f"--epochs={epochs}", "--image-size=16", "--seeds=2", "--device=cpu"]
    main(["2", f"--data={data}", *folders, *cut, *args])
    path = place / "results" / f"table2-e{epochs}-s16.csv"
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def test_missing_cells_are_trained_and_others_kept(
    tmp_path: Path, cifar: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = run(tmp_path, cifar, "--rows", "random", "lottery")
    assert [(line["row"], line["seed"]) for line in lines] == [
        *(("complete", "0"), ("complete", "1")),
        *(("lottery", "0"), ("lottery", "1"), ("random", "0"), ("random", "1")),
    ]
    assert all(line["epochs"] == "1" and float(line["accuracy"]) <= 100 for line in lines)
    assert all(line["versions"] and line["machine"] for line in lines)
    folder = tmp_path / "runs" / "table2-e1-s16"
    config = RunFolder(folder / "lottery-seed1").load_config()
    assert config.options.run.from_run == str(folder / "complete-seed1")
    out = capsys.readouterr().out
    assert "Table 2: ways of finding a wiring, CIFAR-10, reduced: epochs 1, image size 16" in out
    assert re.search(r"random graph ×0.225 \| [\d.]+ ± [\d.]+ \| 2 \| 87.2 ± 0.1 \|", out)
    assert re.search(r"DNW ×0.225 \| not run \| 0 \| 89.7 ± 0.2", out)

    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*.safetensors")}
    assert run(tmp_path, cifar, "--rows", "random", "lottery") == lines
    assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("*.safetensors")}


def test_a_table_that_was_stopped_goes_on(
    tmp_path: Path, cifar: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run(tmp_path / "whole", cifar, "--rows", "random", epochs=2)
    assert not run(tmp_path, cifar, "--rows", "random", "--time-budget=0", epochs=2)
    assert (
        "2 of 2 runs are not finished; the same command continues them" in capsys.readouterr().out
    )
    original = Training.advance

    def stop_after_one(self: Training) -> None:
        original(self)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "advance", stop_after_one)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, cifar, "--rows", "random", epochs=2)
    again = run(tmp_path, cifar, "--rows", "random", epochs=2)
    assert [line["accuracy"] for line in again] == [line["accuracy"] for line in whole]


def test_rows_whose_complete_run_is_unfinished_wait(
    tmp_path: Path, cifar: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not run(tmp_path, cifar, "--rows", "lottery", "--time-budget=0")
    assert "4 of 4 runs are not finished" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_interrupt_saves_and_ends_what_runs_side_by_side(
    number: int, tmp_path: Path, cifar: Path
) -> None:
    given = ["2", f"--data={cifar}", f"--runs={tmp_path / 'runs'}", "--image-size=16"]
    given += [f"--results={tmp_path / 'results'}", "--epochs=500", "--seeds=2", "--batch-size=8"]
    given += ["--device=cpu", "--rows", "mobilenetv1", "--parallel=2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "train.tables", *given],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while len(list(tmp_path.rglob("metrics.csv"))) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    started = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    _, told = process.communicate(timeout=30)
    assert psutil.wait_procs(started, timeout=30)[1] == []
    assert process.returncode == (143 if number == signal.SIGTERM else -signal.SIGKILL)
    if number == signal.SIGTERM:
        told = told.splitlines()[-1]
        assert told == "stopped by SIGTERM: all runs are saved; the same command continues them"
    for run in tmp_path.rglob("metrics.csv"):
        assert Checkpoints(run.parent).load()["steps"] > 0


def test_a_table_cut_to_few_epochs_warms_up_in_fewer(tmp_path: Path) -> None:
    given = Arguments(table="4", epochs=3, data="digits")
    assert {cell.options.optimization.warmup_epochs for cell in plan(given, TABLES["4"])} == {2}


def test_cells_may_be_trained_side_by_side(
    tmp_path: Path, cifar: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = run(tmp_path, cifar, "--rows", "mobilenetv1", "--parallel=2")
    assert [line["row"] for line in lines] == ["mobilenetv1"] * 2


def test_runs_of_other_options_are_not_continued(tmp_path: Path, cifar: Path) -> None:
    run(tmp_path, cifar, "--rows", "random")
    (tmp_path / "results" / "table2-e1-s16.csv").unlink()
    folder = tmp_path / "runs" / "table2-e1-s16" / "random-seed0"
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("lr: 0.1", "lr: 0.2"))
    with pytest.raises(
        ValueError, match=r"random-seed0 is a run with other options \(lr\); move it"
    ):
        run(tmp_path, cifar, "--rows", "random")


def test_table_3_counts_without_any_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["3", f"--results={tmp_path}"])
    out = capsys.readouterr().out
    assert "Table 3: ImageNet" in out
    counted = r"MobileNetV1 ×0.25 \| not run \| 0 \| 50.6 \| [\d,]+ \* \| 41,\d+,\d+ \*"
    assert re.search(counted, out)
    assert re.search(r"ShuffleNetV2 ×1 \|  \|  \| 69.4 \(quoted there\) \|", out)
    assert "runs are not finished" not in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["2", "--rows", "dwn"], r"unknown row 'dwn' of table 2 \(known: dnw, random"),
        (["2", "--seeds=0"], r"seeds must be 1 or more, got 0"),
        (["2", "--time-budget=nan"], r"time-budget must be 0 minutes or more, got nan"),
        (["2", "--parallel=0"], r"parallel must be 1 or more, got 0"),
        (["2", "--epochs=0"], r"epochs must be 1 or more"),
        (["2", "--data=nowhere"], r"--data nowhere: there is no such folder"),
    ],
)
def test_errors(tmp_path: Path, args: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        main([*args, f"--runs={tmp_path}", f"--results={tmp_path}"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text + "random,0\n", r"line 3 of .* is damaged .*: remove it"),
        (lambda text: text.replace("10.00", "abc"), r"line 2 of .* is damaged .*'abc'"),
        (
            lambda text: text + text.splitlines()[1] + "\n",
            r"has two lines of run dense with seed 0",
        ),
        (lambda text: "", r"the columns of .* are not those of results"),
        (lambda text: "\0", r"the columns of|is not a CSV file"),
    ],
)
def test_damaged_results_are_named(
    tmp_path: Path, change: Callable[[str], str], message: str
) -> None:
    path = tmp_path / "table4.csv"
    summary = {"top1": 0.1, "top5": 0.9, "epochs": 100, "parameters": 7, "macs": 8}
    Results(path).add("dense", 0, {**summary, "seconds": 9.0, "device": "cpu"}, Options())
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=message):
        Results(path)


def test_a_file_of_something_else_is_left_alone(tmp_path: Path, cifar: Path) -> None:
    results = tmp_path / "results"
    results.mkdir()
    (results / "table2-e1-s16.csv").write_text("name,age\nfoo,3\n")
    with pytest.raises(
        ValueError, match=r"the columns of .* are not those of results .*move it away"
    ):
        run(tmp_path, cifar, "--rows", "random")
    assert (results / "table2-e1-s16.csv").read_text() == "name,age\nfoo,3\n"


def test_table_4_shows_top_5_and_what_others_have_reached(tmp_path: Path) -> None:
    results, table = Results(tmp_path / "table4.csv"), TABLES["4"]
    for seed, top1 in ((0, 0.70), (1, 0.72)):
        summary = {"top1": top1, "top5": 0.9, "epochs": 100, "parameters": 7, "macs": 8}
        summary |= {"seconds": 9.0, "device": "cpu"}
        results.add("dense", seed, summary, Options())
    text = as_markdown(table, Results(tmp_path / "table4.csv"), {}, "command", {})
    assert "| dense | 71.0 ± 1.4 / 90.0 ± 0.0 | 2 | 77.5 / 93.7 | 7 | 8 |" in text
    assert "| 10 %, first layer dense | not run | 0 | 75.0 / 92.5 |" in text
    assert "| RigL 1×, ERK, 10 % |  |  | 73.1 (Evci et al. 2020) |" in text
    assert "Quoted results come from other training protocols." in text


def test_a_study_of_ones_own_has_no_column_for_the_paper(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["resnet18", f"--results={tmp_path}"])
    assert (tmp_path / "resnet18.md").exists()
    out = capsys.readouterr().out
    assert "| row | top-1, % | n | parameters | MACs |" in out
    assert "| 5 % of weights, random | not run | 0 | 558,601 * | 7,404,012 * |" in out


@pytest.mark.parametrize("row", ["set", "rigl", "gse"])
def test_a_row_whose_rule_would_never_act_is_not_trained(
    tmp_path: Path, cifar: Path, row: str
) -> None:
    with pytest.raises(ValueError, match=rf"rule of row {row} would have no effect \(rule {row}"):
        run(tmp_path, cifar, "--rows", row)
    assert not (tmp_path / "results" / "table2-e1-s16.csv").exists()


def test_the_preset_smoke_lets_every_rule_act() -> None:
    for name, table in TABLES.items():
        rows = tuple(row.name for row in table.rows)
        for cell in plan(Arguments(table=name, preset="smoke", data="digits", rows=rows), table):
            fit, data = cell.options.optimization, cell.options.data
            steps = fit.epochs * (data.train_images // fit.batch_size)
            with torch.device("meta"):
                network = build_network(cell.options, num_classes=10)
            with warnings.catch_warnings():
                warnings.simplefilter("error", NeverActsWarning)
                for entry in selectors(network):
                    entry.selector.rule.check_length(steps)


def test_other_presets_keep_the_rules_of_the_recipes() -> None:
    cells = plan(Arguments(table="2", rows=("rigl",)), TABLES["2"])
    assert {cell.options.network.rule for cell in cells} == {"rigl"}


def test_rows_whose_rule_never_acts_are_refused_before_others_are_trained() -> None:
    args = Arguments(table="2", rows=("dnw", "set"), epochs=3, train_images=300)
    with pytest.raises(ValueError, match=r"row set would have no effect .* within 111"):
        plan(args, TABLES["2"])
    assert len(plan(Arguments(table="2", rows=("dnw", "set"), epochs=6), TABLES["2"])) == 10
