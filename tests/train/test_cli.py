"""Flags and recipes."""

import dataclasses
import os
import pickle
import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

import train
from models import list_models, model_options
from train.__main__ import COMMANDS
from train.__main__ import main as run_named
from train.cli import parse_options, run_command
from train.options import Options
from train.run import build_network
from train.table_rows import TABLES

ROOT = Path(__file__).parents[2]
RECIPES = sorted((Path(train.__file__).parent / "recipes").glob("*.yaml"))


def parse(*args: str) -> Options:
    return parse_options(args, "prog", "does something")


def test_defaults_are_the_papers_protocol_for_imagenet() -> None:
    flat = parse().resolved().flat()
    expected = {
        "graph": "mbv1_dnw",
        "width": 0.225,
        "epochs": 250,
        "batch_size": 512,
        "lr": 0.1,
        "momentum": 0.9,
        "weight_decay": 5e-5,
        "image_size": 224,
    }
    assert {name: flat[name] for name in expected} == expected


def test_options_survive_being_flattened() -> None:
    options = parse("--epochs", "3", "--stem-stride", "2", "--overwrite", "--data", "digits")
    assert Options.from_flat(options.flat()) == options
    changed = {"epochs", "stem_stride", "overwrite", "data", "dataset"}
    assert set(options.differences(Options())) == changed


def test_unknown_options_are_refused_in_python_too() -> None:
    with pytest.raises(ValueError, match="unknown option 'epoch'; did you mean 'epochs'"):
        Options.from_flat({"epoch": 1})
    with pytest.raises(ValueError, match="invalid epochs '3': str is not an instance of int"):
        Options.from_flat({"epochs": "3"})


def test_flags_override_a_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("epochs: 7\nlr: 5e-2\noverwrite: true\ngraph: mbv1\nrule: null\n")
    options = parse("--epochs", "3", "--recipe", str(recipe))
    assert options.optimization.epochs == 3
    assert options.optimization.lr == 0.05
    assert options.run.overwrite
    assert options.network.graph == "mbv1"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_builds_its_network(recipe: Path) -> None:
    network = build_network(parse("--recipe", str(recipe)), num_classes=10)
    assert list(network.parameters())
    table = recipe.stem.partition("_")[0]
    title = table.replace("table", "Table ").replace("resnet", "ResNet-")
    assert recipe.read_text().startswith(f"# {title}, ")


def test_there_is_a_recipe_for_each_row_of_each_table() -> None:
    rows = {row.recipe for table in TABLES.values() for row in table.rows}
    assert rows == {recipe.stem for recipe in RECIPES}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epcohs: 3", r"unknown option 'epcohs'; did you mean 'epochs'\?"),
        ("- epochs", r"must be a mapping"),
        ("epochs: [", r"cannot be read as YAML"),
    ],
)
def test_recipes_with_mistakes(tmp_path: Path, text: str, message: str) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(text)
    with pytest.raises(ValueError, match=message):
        parse("--recipe", str(recipe))
    with pytest.raises(ValueError, match=r"there is no recipe nowhere.yaml.*table3_dnw_0.225"):
        parse("--recipe", "nowhere.yaml")
    with pytest.raises(SystemExit):
        parse("--recipe")
    with pytest.raises(ValueError, match="resume is empty"):
        parse("--resume", "")
    assert parse("--recipe", "table3_dnw_0.49").network.width == 0.49


@pytest.mark.parametrize(
    ("args", "shown"),
    [
        (["--epcohs", "3"], "--epochs"),
        (["--epochs", "many"], "invalid literal for int"),
        (["--precision", "8"], "'bf16'"),
    ],
)
def test_flags_with_mistakes(
    args: list[str], shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(*args)
    captured = capsys.readouterr()
    assert shown in captured.out + captured.err


def test_a_recipe_value_of_the_wrong_type_names_the_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("epochs: many")
    with pytest.raises(ValueError, match=r"recipe .*mine.yaml has the error above"):
        parse(f"--recipe={recipe}")
    assert "--epochs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--epochs", "0"], "epochs must be 1 or more"),
        (["--lr", "-1"], "lr must be a finite number, and not negative"),
        (["--lr", "nan"], "lr must be a finite number"),
        (["--momentum", "1"], "momentum must be below 1"),
        (["--workers", "-1"], "workers must be 0 or more"),
        (["--batch-size", "1"], "batch_size must be 2 or more"),
        (["--seed", "-1"], "seed must be from 0"),
        (["--init", ""], "init is empty"),
    ],
)
def test_values_out_of_range(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((SystemExit, ValueError)) as raised:
        parse(*args)
    captured = capsys.readouterr()
    assert message in str(raised.value) + captured.out + captured.err


def test_help_groups_options_and_shows_defaults_and_units() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "train.imagenet", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    text = " ".join(done.stdout.replace("│", " ").split())
    for part in ("network options", "data options", "--recipe", "in pixels. (default: 224)"):
        assert part in text


def test_help_and_mistakes_import_little() -> None:
    """They take little longer than importing PyTorch Geometric, as does importing dnw_graph."""
    script = """
import sys
from contextlib import suppress
from train.__main__ import COMMANDS, main

def check(args, *slow):
    with suppress(SystemExit):
        main(args)
    if found := [name for name in slow if name in sys.modules]:
        sys.exit(f"{args} imports {found}")

check([], "torch")
check(["imgenet"], "torch")
import torch_geometric
slow = [name for name in sys.argv[1:] if name not in sys.modules]  # it may import PIL itself
mistakes = [["--graph", "mbv1_dmw"], ["--grph", "mbv1"], ["--lr", "-1"]]
for args in [[name, "--help"] for name in COMMANDS] + [["imagenet", *args] for args in mistakes]:
    check(args, *slow)
"""
    slow = ["PIL", "lightning", "matplotlib", "networkx", "plotly", "rustworkx", "scipy.integrate"]
    slow += ["sklearn", "tensorboard", "torchdiffeq", "torchmetrics", "torchvision", "train.data"]
    done = subprocess.run([sys.executable, "-c", script, *slow], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "unknown model 'mbv1_dmw'; did you mean 'mbv1_dnw'?" in done.stderr


@pytest.mark.parametrize(
    ("message", "is_told"), [('pip install "dnw-graph[hub]"', True), ("No module named 'x'", False)]
)
def test_a_missing_extra_is_told_in_a_line(
    message: str, is_told: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> None:
        raise ModuleNotFoundError(message)

    with pytest.raises(SystemExit if is_told else ModuleNotFoundError):
        run_command(command)
    assert (capsys.readouterr().err == f"error: {message}\n") == is_told


@pytest.mark.parametrize("rank", ["", "0"])
def test_training_starts_whatever_rank_says(rank: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import train.loop"],
        env={**os.environ, "RANK": rank, "SLURM_PROCID": rank, "TORCHELASTIC_RESTART_COUNT": ""},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
def crowded(tmp_path: Path) -> Path:
    """Return a folder with a train.py and a models package of someone else's."""
    (tmp_path / "train.py").write_text("raise SystemExit('the wrong train.py')\n")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("")
    return tmp_path


def start(folder: Path, *args: str) -> "subprocess.CompletedProcess[str]":
    path = str(Path(train.__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, *args], cwd=folder, env=env, capture_output=True, text=True
    )


def test_the_console_command_ignores_the_current_folder(crowded: Path) -> None:
    project = tomllib.loads((Path(train.__file__).parents[1] / "pyproject.toml").read_text())
    module, _, function = project["project"]["scripts"]["dnw-graph"].partition(":")
    script = f"import sys; from {module} import {function}; {function}()"  # what pip installs
    flags = ["--data=digits", "--graph=tiny_static", "--image-size=8", "--batch-size=64"]
    flags += ["--epochs=1", "--train-images=128", "--out=run", "--no-report"]
    done = start(crowded, "-P", "-c", script, "imagenet", *flags)
    assert done.returncode == 0, done.stderr
    assert "next: dnw-graph evaluate run" in done.stdout
    done = start(crowded, "-P", "-c", script, "evaluate", "run")
    assert done.returncode == 0, done.stderr
    assert "top1" in done.stdout


def test_a_models_package_in_the_way_is_named(crowded: Path) -> None:
    (crowded / "train.py").unlink()
    done = start(crowded, "-m", "train.imagenet", "--help")
    assert done.returncode == 1
    assert (
        f"'models' would be imported from {crowded / 'models' / '__init__.py'}, not" in done.stderr
    )
    assert "run the command as dnw-graph imagenet" in done.stderr


def test_the_console_command_lists_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for name in COMMANDS:
        assert find_spec(f"train.{name}") is not None
    run_named([])
    assert "import-allenai  make a run" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        run_named(["tarin"])
    assert "unknown command 'tarin'" in capsys.readouterr().err


def test_options_of_a_new_model_become_flags() -> None:
    """Nothing in ``train`` names them; their description is that of the configuration."""
    script = """
import sys
from dataclasses import dataclass
from typing import Any, ClassVar, Literal
from torch import nn
from models import ModelConfig, register_model

@dataclass(frozen=True, kw_only=True)
class HopsConfig(ModelConfig):
    '''What it is built from.

    Attributes:
        hops: How far edges lead, in ``blocks``.
        closed: Whether they lead back.
    '''
    hops: int | Literal["all"] = "all"
    closed: bool = False
    cifar10: ClassVar[dict[str, Any]] = {"lr": 0.25}

@register_model("hops", HopsConfig)
def hops(config):
    return nn.Linear(config.hops, 2)

from train import cifar10
from train.cli import parse_options
from train.run import build_network
flags = ["--graph", "hops", *sys.argv[1:]]
options = parse_options(flags, "prog", "", cifar10.defaults)
print(options.network, options.optimization.lr, build_network(options, 2))
"""
    command = [sys.executable, "-c", script]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def run(*flags: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [*command, *flags], env=environment, capture_output=True, text=True, check=False
        )

    done = run("--hops", "3", "--closed")
    assert done.returncode == 0, done.stderr
    assert "hops, hops 3, closed True 0.25 Linear(in_features=3" in done.stdout
    helped = " ".join(run("--help").stdout.replace("│", " ").split())
    assert "How far edges lead, in blocks. Default: all." in helped
    assert "hops" in re.findall(r"Model: (.*?)\.", helped)[0].split(", ")
    wrong = run("--hops", "far")
    assert wrong.returncode == 2
    assert "hops" in wrong.stderr + wrong.stdout


def test_options_can_be_sent_to_another_process() -> None:
    given = parse("--graph", "tiny_static", "--rule", "rigl(every=50)")
    assert pickle.loads(pickle.dumps(given)) == given


@pytest.mark.parametrize("model", list_models())
def test_every_option_of_a_model_is_a_flag(model: str) -> None:
    fields = dataclasses.fields(Options().network)
    known = {field.name for field in fields} | {"image_size", "num_classes"}
    assert model_options(model).keys() <= known
