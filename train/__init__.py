"""The commands: ``python -m train.imagenet``, ``train.evaluate``, ``train.predict``."""

import os
from importlib.util import find_spec

_NEEDED = ("lightning", "psutil", "safetensors", "sklearn", "tensorboard", "torchmetrics", "tyro")
if missing := [name for name in _NEEDED if find_spec(name) is None]:
    raise ImportError(
        f"the training commands need {', '.join(missing)}: pip install 'dnw-graph[train]', "
        "or in a clone pip install '.[train]'"
    )

for _name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"):
    if os.environ.get(_name) == "":  # Lightning reads them as numbers when it is imported
        del os.environ[_name]
