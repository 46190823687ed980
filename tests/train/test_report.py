"""Reports say what is in the run folders, whatever is in there, and work in a browser."""

import base64
import gzip
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dnw_graph import NeuralGraph
from dnw_graph.analysis import load_history, measure, structure_of
from tests.train.test_data import small
from train.imagenet import train
from train.options import Options
from train.report.__main__ import main
from train.report.page import _in_script, write_report
from train.run import RunFolder

NASTY = "<img src=x onerror=\"document.title='owned'\">"
LIMIT = 10_000_000  # bytes


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with two runs that end with reports, of classes with nasty names."""
    place = tmp_path_factory.mktemp("reports")
    small(place / "images", number=8)
    for split in ("train", "test"):
        (place / "images" / split / "cat").rename(place / "images" / split / NASTY)
    for seed in (0, 1):
        given = {"graph": "mbv1_dnw", "data": str(place / "images"), "dataset": "cifar10"}
        given |= {"image_size": 32, "epochs": 2, "batch_size": 8, "device": "cpu", "seed": seed}
        train(Options.from_flat({**given, "out": str(place / f"<b>run{seed}")}))
    return place


def page_values(path: Path) -> Any:
    """Return the plain values in a page."""
    found = re.search(r'id="values">(.*?)</script>', path.read_text(), re.DOTALL)
    assert found
    return json.loads(found[1])


def page_arrays(path: Path, run: int) -> dict[str, np.ndarray]:
    """Return the arrays in a page, as its script reads them."""
    found = re.search(r'id="packs">(.*?)</script>', path.read_text(), re.DOTALL)
    assert found
    raw = gzip.decompress(base64.b64decode(json.loads(found[1])[run]))
    head, _, body = raw.partition(b"\n")
    return {
        name: np.frombuffer(body, kind, size, offset)
        for name, (kind, offset, size) in json.loads(head).items()
    }


def test_a_run_ends_with_a_report(place: Path) -> None:
    run = place / "<b>run0"
    report = run / "report.html"
    assert report.stat().st_size < LIMIT
    (values,) = page_values(report)["runs"]
    assert values["notes"] == []
    assert values["name"] == "<b>run0"
    assert len(values["curves"]["top1"]) == 2
    model, arrays = RunFolder(run).load_model(), page_arrays(report, 0)
    graphs = {n: m for n, m in model.named_modules() if isinstance(m, NeuralGraph)}
    assert [graph["name"] for graph in values["graphs"]] == list(graphs)
    for told, (name, graph) in zip(values["graphs"], graphs.items(), strict=True):
        s, key = structure_of(graph), told["key"]
        assert arrays[f"{key}.source"].tolist() == s.source.tolist()
        assert arrays[f"{key}.in"].tolist() == s.in_degree.tolist()
        assert np.allclose(arrays[f"{key}.weight"], s.weight)
        filters = arrays[told["filters"]].reshape(-1, 3, 3)
        assert np.allclose(filters[:32], graph.nodes[0].conv.weight.detach()[:32, 0])
        assert arrays[told["maps"]].size == s.num_nodes * 14 * 14
        history = load_history(run)[name]
        real = np.zeros(len(arrays[f"{key}.ever.source"]), dtype=bool)
        for at in range(3):
            real[arrays[f"{key}.died.{at}"].cumsum()] = False
            real[arrays[f"{key}.born.{at}"].cumsum()] = True
            told_pairs = np.array(told["history"]["pairs"][at])
            assert told_pairs.sum() == real.sum() == len(history.real(at))
        assert arrays[f"{key}.ever.source"][real].tolist() == s.source.tolist()
        assert arrays[f"{key}.ever.target"].cumsum()[real].tolist() == s.target.tolist()
    found = measure(graphs["graphs.1"], random=10)
    for (name, value, *_), statistic in zip(
        values["graphs"][1]["statistics"][:-1], found.statistics.items(), strict=True
    ):
        assert (name, value) == (statistic[0], pytest.approx(statistic[1].value))


def test_what_is_missing_or_damaged_is_left_out_and_said(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(place / "<b>run0", run)
    (run / "metrics.csv").unlink()
    (run / "history" / "0000000002.npz").write_bytes(b"nothing")
    config = (run / "config.yaml").read_text().replace(str(place / "images"), "/nowhere")
    (run / "config.yaml").write_text(config)
    main([str(run), "--random=2"])
    out = capsys.readouterr().out
    for what in ("curves", "the history of the wiring", "feature maps of an image"):
        assert f"left out: {run}: {what}: " in out
    (values,) = page_values(run / "report.html")["runs"]
    assert len(values["notes"]) == 3
    assert len(values["graphs"]) == 5
    assert all("history" not in graph and "maps" not in graph for graph in values["graphs"])
    with (run / "metrics.csv").open("w") as file:
        file.write("epoch,loss,top1\n1,nan,0.5\n2,0.3\n")
    assert any("curves: " in note for note in write_report([run], run / "a.html", random=2))
    (run / "metrics.csv").write_text("epoch,loss,top1\n1,nan,0.5\n")
    write_report([run], run / "b.html", random=2)
    assert page_values(run / "b.html")["runs"][0]["curves"]["loss"] == [None]
    shutil.copytree(place / "<b>run0" / "history", run / "history", dirs_exist_ok=True)
    notes = write_report([run], run / "c.html", random=2, weights="initial")
    assert any("does not end with the wiring of these weights" in note for note in notes)
    shutil.rmtree(run / "history")
    notes = write_report([run], tmp_path / "again.html", random=2)
    assert any("has no history of its wiring" in note for note in notes)
    old = tmp_path / "old"
    shutil.copytree(place / "<b>run1", old)
    (old / "config.yaml").write_text("options: {}\n")
    notes = write_report([old, run], tmp_path / "rest.html", random=2)
    assert any("config.yaml is damaged or of another version" in note for note in notes)
    assert len(page_values(tmp_path / "rest.html")["runs"]) == 1
    with pytest.raises(ValueError, match="of another version"):
        write_report([old], tmp_path / "none.html")
    with pytest.raises(ValueError, match="none of the runs can be read"):
        write_report([old, old], tmp_path / "none.html")
    with pytest.raises(ValueError, match="no run: use"):
        main([])
    with pytest.raises(ValueError, match="nothing is not a run folder"):
        main([str(tmp_path / "nothing")])


def test_a_network_without_a_graph_has_curves_only(tmp_path: Path) -> None:
    given = {"graph": "mbv1", "width": 0.25, "data": "digits", "image_size": 16, "epochs": 1}
    run = tmp_path / "run"
    train(Options.from_flat({**given, "batch_size": 64, "device": "cpu", "out": str(run)}))
    (values,) = page_values(run / "report.html")["runs"]
    assert values["graphs"] == []
    assert "the wiring: the network has no graph" in values["notes"]
    quiet = tmp_path / "quiet"
    train(Options.from_flat({**given, "batch_size": 64, "report": False, "out": str(quiet)}))
    assert not (quiet / "report.html").exists()


def test_graphs_with_too_many_edges_for_a_page_are_left_out(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.report.collect.MOST_EDGES", 5000)
    notes = write_report([place / "<b>run0"], tmp_path / "few.html", random=2)
    assert [note.split(": ", 1)[1] for note in notes] == [
        "graphs.3: it has 72,991 edges, too many for a page",
        "graphs.4: it has 79,627 edges, too many for a page",
    ]
    (values,) = page_values(tmp_path / "few.html")["runs"]
    assert [graph["name"] for graph in values["graphs"]] == ["graphs.0", "graphs.1", "graphs.2"]


def test_text_cannot_end_the_script_it_stands_in() -> None:
    text = {"name": "</script><script>alert(1)</script><!-- \u2028 &amp;"}
    safe = _in_script(text)
    assert not set("<>&\u2028") & set(safe)
    assert json.loads(safe) == text


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A real one, without a window."""
    found = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]
    binary, driver = next(filter(None, found), None), shutil.which("chromedriver")
    if not binary or not driver:
        pytest.skip("needs a browser: apt-get install chromium chromium-driver")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (
        *("headless=new", "no-sandbox", "disable-gpu", "no-first-run", "window-size=1200,1000"),
        *("disable-background-networking", "disable-component-update", "disable-sync"),
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options=options, service=Service(driver))
    yield opened
    opened.quit()


def opened(browser: Any, path: Path) -> None:
    """Open a page, and wait until its script is done."""
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get(path.as_uri())
    ready = "return document.body.dataset.ready === 'yes'"
    WebDriverWait(browser, 60).until(lambda page: page.execute_script(ready))


def text_of(browser: Any, name: str) -> str:
    text: str = browser.execute_script(f"return document.getElementById('{name}').innerText")
    return text


def put(browser: Any, name: str, value: object, event: str) -> None:
    """Set a control as a user does: the value, then the event."""
    browser.execute_script(
        "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
        "e.dispatchEvent(new Event(arguments[2]));",
        *(name, value, event),
    )


def test_in_a_browser(place: Path, tmp_path: Path, browser: Any) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    runs = [place / "<b>run0", place / "<b>run1"]
    page = tmp_path / "two.html"
    assert write_report(runs, page, random=2) == []
    assert page.stat().st_size < LIMIT
    opened(browser, page)
    assert browser.title == "<b>run0 and <b>run1"
    assert not browser.find_elements(By.CSS_SELECTOR, "b, img[onerror], main img[src=x]")
    assert NASTY in text_of(browser, "about")

    # The comparison.
    compared = text_of(browser, "compared")
    assert [f"graphs.{i}" in compared for i in range(5)] == [True] * 5

    # The node picker: what it says of a node is what the run says.
    put(browser, "graph", 1, "change")
    s = structure_of(RunFolder(runs[0]).load_model().graphs[1])
    node = int(np.argmax(s.out_degree))
    put(browser, "node", node, "change")
    details = text_of(browser, "details")
    assert f"Node {node} of graphs.1" in details
    assert f"edges out: {s.out_degree[node]}" in " ".join(details.lower().split())
    strongest = np.flatnonzero(s.source == node)
    strongest = strongest[np.argmax(np.abs(s.weight[strongest]))]
    assert f"node {s.target[strongest]}" in details
    assert NASTY in details
    assert browser.find_elements(By.CSS_SELECTOR, "#details canvas")

    # By keyboard: from the node's number to the next button.
    browser.find_element(By.ID, "node").send_keys(Keys.TAB)
    browser.switch_to.active_element.send_keys(Keys.TAB)
    active = browser.switch_to.active_element
    assert active.get_attribute("id") == "next"
    active.send_keys(Keys.ENTER)
    assert f"Node {node + 1} of graphs.1" in text_of(browser, "details")

    # The slider over recorded epochs.
    assert text_of(browser, "epoch") == "epoch 2"
    first = structure_at(runs[0], "graphs.1", 0)
    put(browser, "record", 0, "input")
    assert text_of(browser, "epoch") == "epoch 0"
    put(browser, "node", node, "change")
    out = int((first[0] == node).sum())
    assert f"edges out {out} " in " ".join(text_of(browser, "details").lower().split())
    browser.find_element(By.ID, "record").send_keys(Keys.ARROW_RIGHT)
    assert text_of(browser, "epoch") == "epoch 1"

    # The other run, and the node with most edges.
    put(browser, "run", 1, "change")
    put(browser, "record", 2, "input")
    browser.find_element(By.ID, "hub").click()
    other = structure_of(RunFolder(runs[1]).load_model().graphs[1])
    hub = int(np.argmax(other.in_degree + other.out_degree))
    assert f"Node {hub} of graphs.1" in text_of(browser, "details")

    # A narrow screen needs no scrolling sideways.
    browser.set_window_size(500, 900)
    opened(browser, page)
    width = "return document.documentElement.scrollWidth <= window.innerWidth"
    assert browser.execute_script(width)
    assert browser.title == "<b>run0 and <b>run1"  # nothing in names ran as a script
    assert browser.get_log("browser") == []


def structure_at(run: Path, name: str, at: int) -> tuple[np.ndarray, np.ndarray]:
    """Return sources and targets of the edges that were real at a record."""
    import torch

    topology = RunFolder(run).load_model().get_submodule(name).topology
    source, target = topology.edges(torch.from_numpy(load_history(run)[name].real(at))).numpy()
    return source, target
