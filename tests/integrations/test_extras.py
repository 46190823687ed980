"""Integrations are imported by those who use them only."""

import subprocess
import sys


def test_the_library_imports_none_of_them() -> None:
    others = ["lightning", "transformers", "huggingface_hub", "matplotlib"]
    imported = []
    for modules in ("torch_geometric", "dnw_graph, models"):  # PyTorch Geometric imports some
        script = f"import sys, {modules}; print([m for m in {others} if m in sys.modules])"
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        )
        imported.append(done.stdout)
    assert imported[0] == imported[1]
