"""Frozen networks as one file: weights, wirings, and how the layers follow one another."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from dnw_graph._registry import Registry
from dnw_graph.frozen.graph import FrozenGraph
from dnw_graph.frozen.layout import TENSORS, Part
from dnw_graph.frozen.model import FrozenModel
from dnw_graph.topology import Role

FORMAT = "dnw-graph frozen 1"
MOST = 2**20  # no option of a layer is larger
WORDS = ("zeros", "reflect", "replicate", "circular", "same", "valid")


class LayerKind(NamedTuple):
    """A layer that a file may hold: its class, and the attributes that it is built from again."""

    build: type[nn.Module]
    options: tuple[str, ...] = ()


LAYERS: Registry[LayerKind] = Registry("layer")
"""Layers that a file may hold, by name; no other code is ever run."""

for _kind in (
    LayerKind(
        nn.Conv2d,
        (
            *("in_channels", "out_channels", "kernel_size", "stride", "padding"),
            *("dilation", "groups", "bias", "padding_mode"),
        ),
    ),
    LayerKind(nn.Linear, ("in_features", "out_features", "bias")),
    LayerKind(nn.BatchNorm1d, ("num_features", "eps", "affine", "track_running_stats")),
    LayerKind(nn.BatchNorm2d, ("num_features", "eps", "affine", "track_running_stats")),
    LayerKind(nn.ReLU),
    LayerKind(nn.AdaptiveAvgPool2d, ("output_size",)),
    LayerKind(
        nn.AvgPool2d,
        (
            *("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad"),
            "divisor_override",
        ),
    ),
    LayerKind(nn.MaxPool2d, ("kernel_size", "stride", "padding", "dilation", "ceil_mode")),
    LayerKind(nn.Flatten, ("start_dim", "end_dim")),
):
    LAYERS.register(_kind.build.__name__)(_kind)


def save_frozen(
    model: FrozenModel, path: str | os.PathLike[str], notes: Mapping[str, str] | None = None
) -> None:
    """Write a frozen network to a safetensors file, which :func:`load_frozen` reads.

    Args:
        model: The network.
        path: The file.
        notes: What is to be known of it, as text by name; its own unless given.

    Raises:
        ValueError: A layer that a file cannot hold; the message lists those that it can.
    """
    if not isinstance(model, FrozenModel):
        raise TypeError(
            f"a file holds what freeze() returns, got {type(model).__name__}; keep what "
            "freeze_graphs() returns by torch.save, or export it"
        )
    layers = [_described(layer) for layer in model]
    tensors = {name: x.detach().cpu().contiguous() for name, x in model.state_dict().items()}
    text = json.dumps({"layers": layers, "notes": dict(model.notes if notes is None else notes)})
    metadata = {"format": FORMAT, "model": text, "sha256": _digest(text, tensors)}
    content = save({name: x.clone() for name, x in tensors.items()}, metadata)
    if Path(path).is_dir():
        raise ValueError(f"{os.fspath(path)} is a folder: name a file")
    temporary = Path(f"{os.fspath(path)}.part")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_frozen(path: str | os.PathLike[str]) -> FrozenModel:
    """Read what :func:`save_frozen` wrote; nothing in the file is executed.

    Returns:
        The network, on the CPU.

    Raises:
        ValueError: A file of something else, or a damaged one.
        FileNotFoundError: No such file.
    """
    content = Path(path).read_bytes()
    try:
        metadata, tensors = _metadata(content), load(content)
        if metadata.get("format") != FORMAT:
            raise ValueError(f"its format is {metadata.get('format')!r}, not {FORMAT!r}")
        text = str(metadata.get("model"))
        if metadata.get("sha256") != _digest(text, tensors):
            raise ValueError("its checksum is wrong")
        described = json.loads(text)
        model = _rebuilt(described["layers"], tensors)
        model.notes = {str(key): str(value) for key, value in described["notes"].items()}
        return model
    except (
        *(SafetensorError, ValueError, TypeError, KeyError, IndexError, AttributeError),
        *(RuntimeError, OverflowError, RecursionError),
    ) as error:
        raise ValueError(
            f"{os.fspath(path)} is no frozen network of this version, or it is damaged: {error}"
        ) from error


def _metadata(content: bytes) -> dict[str, Any]:
    """Return what a safetensors file says of itself."""
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or length > len(content) - 8:
        raise ValueError("it ends too early")
    header = json.loads(content[8 : 8 + length])
    metadata: dict[str, Any] = dict(header["__metadata__"])
    return metadata


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        x = tensors[name]
        digest.update(f"{name} {x.dtype} {list(x.shape)}".encode())
        digest.update(x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _described(layer: nn.Module) -> dict[str, Any]:
    if isinstance(layer, FrozenGraph):
        parts = [dataclasses.asdict(part) for part in layer.parts]
        return {"layer": "FrozenGraph", "parts": parts, "strides": layer.strides}
    name = type(layer).__name__
    if name not in LAYERS or LAYERS[name].build is not type(layer):
        raise ValueError(
            f"a file cannot hold the layer {name} (known: {', '.join(LAYERS)}); see "
            "dnw_graph.frozen.LAYERS"
        )
    options = {option: getattr(layer, option) for option in LAYERS[name].options}
    if "bias" in options:
        options["bias"] = options["bias"] is not None
    return {"layer": name, "options": options}


def _rebuilt(layers: list[dict[str, Any]], tensors: dict[str, Tensor]) -> FrozenModel:
    found = []
    for at, described in enumerate(layers):
        own = {k.removeprefix(f"{at}."): x for k, x in tensors.items() if k.startswith(f"{at}.")}
        found.append(_layer(described, own))
    unknown = tensors.keys() - FrozenModel(*found).state_dict().keys()
    if unknown:
        raise ValueError(f"it has tensors of no layer: {', '.join(sorted(unknown))}")
    return FrozenModel(*found).eval().requires_grad_(False)


def _layer(described: dict[str, Any], tensors: dict[str, Tensor]) -> nn.Module:
    name = described["layer"]
    if name == "FrozenGraph":
        parts = [Part(**{**part, "role": Role(part["role"])}) for part in described["parts"]]
        if tensors.keys() != set(TENSORS):
            raise ValueError(f"a graph has the tensors {', '.join(TENSORS)}")
        return FrozenGraph(parts, tuple(described["strides"]), **tensors)
    options = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in described["options"].items()
    }
    for key, value in options.items():
        for number in value if isinstance(value, tuple) else (value,):
            known = isinstance(number, int | float | None) and abs(number or 0) <= MOST
            if not known and number not in WORDS:
                raise ValueError(f"{key} of a layer {name} is {value!r}")
    with torch.device("meta"):  # sizes that do not fit the tensors take no memory
        layer = LAYERS[name].build(**options)
    layer.load_state_dict(tensors, assign=True)
    if any(x.is_floating_point() and x.dtype != torch.float32 for x in tensors.values()):
        raise ValueError(f"weights of a layer {name} are not float32")
    return layer
