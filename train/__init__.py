"""The commands: ``python -m train.imagenet``, ``train.evaluate``, ``train.predict``.

``dnw-graph imagenet``, ``dnw-graph evaluate`` and so on run the same commands from any folder.
"""

import os
from importlib.util import find_spec
from pathlib import Path

_REQUIRED = ("lightning", "psutil", "safetensors", "sklearn", "tensorboard", "torchmetrics", "tyro")
if missing := [name for name in _REQUIRED if find_spec(name) is None]:
    raise ImportError(
        f"the training commands need {', '.join(missing)}: pip install 'dnw-graph[train]', "
        "or in a clone pip install '.[train]'"
    )

_models = find_spec("models")
_path = (_models.origin if _models else None) or "a folder"
if Path(_path).parent.parent != Path(__file__).parent.parent:
    raise ImportError(
        f"'models' would be imported from {_path}, not from the package that comes with "
        "dnw-graph: change to another folder, or run the command as dnw-graph imagenet, "
        "dnw-graph evaluate, ..., which does not search the current folder"
    )

for _name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"):
    if os.environ.get(_name) == "":  # Lightning parses them as numbers when it is imported
        del os.environ[_name]
