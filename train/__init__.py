"""The commands: ``python -m train.imagenet``, ``train.evaluate``, ``train.predict``.

``dnw-graph imagenet``, ``dnw-graph evaluate`` and so on run the same commands from any folder.
"""

import os
from importlib import import_module
from importlib.util import find_spec

_REQUIRED = ("lightning", "psutil", "safetensors", "sklearn", "tensorboard", "torchmetrics", "tyro")
if missing := [name for name in _REQUIRED if find_spec(name) is None]:
    raise ImportError(
        f"the training commands need {', '.join(missing)}: pip install 'dnw-graph[train]', "
        "or in a clone pip install '.[train]'"
    )

_models = import_module("models")
if not hasattr(_models, "list_models"):
    raise ImportError(
        f"'models' was imported from {_models.__file__ or 'a folder'}, not from the package that "
        "comes with dnw-graph: change to another folder, or run the command as dnw-graph imagenet, "
        "dnw-graph evaluate, ..., which does not search the current folder"
    )

for _name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"):
    if os.environ.get(_name) == "":  # Lightning parses them as numbers when it is imported
        del os.environ[_name]
