"""Data flows one way: a test holds the import directions of the design."""

import ast
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ["dnw_graph", "models", "train"]  # later ones may import earlier ones
LIBRARY = [  # likewise, inside dnw_graph
    "_deprecated",
    "_evaluation",
    "_files",
    "_registry",
    "_wrapped",
    "_jit",
    "_arena",
    "precision",
    "topology",
    "wiring",
    "sparse",
    "aggregation",
    "node",
    "schedule",
    "init",
    "neural_graph",
    "edit",
    "_trace",
    "accounting",
    "frozen",
    "analysis",
    "integrations",
]
FILES = [p.relative_to(ROOT) for name in PACKAGES for p in sorted((ROOT / name).rglob("*.py"))]


def imported(path: Path) -> Iterator[str]:
    """Yield the dotted names a file imports, inside functions too."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_lead_one_way(path: Path) -> None:
    package, *inner = path.with_suffix("").parts
    for name in imported(path):
        top, *rest = name.split(".")
        if top not in PACKAGES:
            continue
        assert PACKAGES.index(top) <= PACKAGES.index(package), f"{path} imports {name}"
        if top == package == "dnw_graph" and inner != ["__init__"]:
            place = rest[0]
            assert place in LIBRARY, f"{path} imports {name}: import it from where it is defined"
            assert LIBRARY.index(place) <= LIBRARY.index(inner[0]), f"{path} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_private_modules_are_imported_in_their_own_folder_only(path: Path) -> None:
    folder = ".".join(path.parent.parts)
    for name in imported(path):
        above, _, private = name.partition("._")
        is_shared = above == "dnw_graph" or path.name == "_kernels.py"  # compiled code calls others
        if name.split(".")[0] in PACKAGES and private and not is_shared:
            assert above == folder, f"{path} imports {name}"


def test_every_part_of_the_library_has_a_place() -> None:
    parts = {p.parts[1].removesuffix(".py") for p in FILES if p.parts[0] == "dnw_graph"}
    assert parts - {"__init__"} == set(LIBRARY)


def test_no_modules_import_one_another() -> None:
    """Imports for type checkers count, and so do those inside functions."""
    names = {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}
    imports = nx.DiGraph()
    for name, path in names.items():
        for other in imported(path):
            while other not in names and "." in other:  # a name that a module defines
                other = other.rpartition(".")[0]
            if other in names and not name.startswith(f"{other}."):  # a package lists its parts
                imports.add_edge(name, other)
    circles = [sorted(circle) for circle in nx.strongly_connected_components(imports)]
    assert [circle for circle in circles if len(circle) > 1] == []
