"""Loads MobileNetV1-DNW from a user's own checkout of the published implementation."""

import importlib
import sys
from pathlib import Path

from torch import nn

_PACKAGES = ("models", "genutil", "data")


def load_original(path: Path, image_size: int) -> nn.Module:
    """Return the network of ``apps/large_scale/mobilenetv1_dnw_x225.yml``, on images of any size.

    That implementation reads its settings while it is imported, and has a package ``models`` as we
    do, so it is imported under its own names, which are given back afterwards.

    Args:
        path: Checkout of https://github.com/allenai/dnw.
        image_size: Height and width, in pixels.

    Raises:
        ValueError: The folder is no such checkout.
    """
    recipe = path / "apps/large_scale/mobilenetv1_dnw_x225.yml"
    if not recipe.is_file():
        raise ValueError(f"{path} is no checkout of the published implementation: no {recipe}")
    taken = {n: m for n, m in sys.modules.items() if n.split(".")[0] in _PACKAGES}
    for name in taken:
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
        sys.modules.update(taken)
