"""Load MobileNetV1-DNW from a checkout of the published implementation."""

import importlib
import sys
from pathlib import Path

from torch import nn

_PACKAGES = ("models", "genutil", "data")


def load_original(path: Path, image_size: int) -> nn.Module:
    """Return the network of ``apps/large_scale/mobilenetv1_dnw_x225.yml`` for any image size.

    The published implementation reads its settings when it is imported and has a package ``models``
    like this project. Modules of those names are therefore replaced during the import and restored
    afterwards.

    Args:
        path: Checkout of https://github.com/allenai/dnw.
        image_size: Height and width, in pixels.

    Raises:
        ValueError: If the folder is not a checkout of it.
    """
    recipe = path / "apps/large_scale/mobilenetv1_dnw_x225.yml"
    if not recipe.is_file():
        raise ValueError(
            f"{path} is not a checkout of the published implementation: {recipe} is missing"
        )
    modules = {n: m for n, m in sys.modules.items() if n.split(".")[0] in _PACKAGES}
    for name in modules:
        del sys.modules[name]
    arguments = sys.argv
    sys.path.insert(0, str(path))
    sys.argv = [*arguments[:1], f"app:{recipe}"]
    try:
        flags = importlib.import_module("genutil.config").FLAGS
        flags.image_size = image_size
        module = importlib.import_module("models.graphs.mobilenetv1like")
        network: nn.Module = module.MobileNetV1Like()
        return network
    finally:
        sys.argv = arguments
        sys.path.remove(str(path))
        for name in [n for n in sys.modules if n.split(".")[0] in _PACKAGES]:
            del sys.modules[name]
        sys.modules.update(modules)
