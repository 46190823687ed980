"""Collect the content of a report from a run folder, as plain values and arrays."""

import base64
import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from dnw_graph import NeuralGraph, cost
from dnw_graph.analysis import (
    History,
    Measures,
    Statistic,
    Structure,
    WiringHistory,
    load_history,
    measure,
    small_worldness,
)
from train.choices import Weights
from train.data import evaluation_transform, open_source
from train.metrics import Normalize
from train.report.pack import Pack
from train.run import RunConfig, RunFolder

SIDE = 14  # height and width of a feature map in the page, in pixels
MOST_NODES = 20_000  # maximum nodes of a run; with more, feature maps are left out
MOST_EDGES = 500_000  # maximum edges of a graph; with more, the graph is left out


class RunData:
    """The content of a report on one run; missing or damaged parts are left out and noted.

    Args:
        path: The run folder.
        weights: Which weights of the run to use.
        random: Number of random wirings to compare with.

    Attributes:
        notes: What was left out, and why.
        values: Plain values for the page.
        graphs: The graphs of the network, by name.

    Raises:
        ValueError: If the run has no readable configuration or weights.
    """

    def __init__(self, path: str | Path, weights: Weights, random: int) -> None:
        self.folder, self.notes = RunFolder(path), list[str]()
        self.config = self.folder.load_config()
        self.model = self.folder.load_model(weights)
        self.pack = Pack()
        self.graphs = {
            name or "graph": module
            for name, module in self.model.named_modules()
            if isinstance(module, NeuralGraph)
        }
        if not self.graphs:
            self.notes.append("the wiring: the network has no graph")
        for name, graph in list(self.graphs.items()):
            if graph.num_edges > MOST_EDGES:
                self.notes.append(f"{name}: it has {graph.num_edges:,} edges, too many for a page")
                del self.graphs[name]
        history = self._try("the history of the wiring", lambda: load_history(self.folder.path))
        image = self._try("feature maps of an image", lambda: _sample(self.config))
        maps: dict[str, Tensor] = {}
        if image is not None:
            maps = self._try("feature maps of an image", lambda: self._maps(image["images"])) or {}
        self.values: dict[str, Any] = {
            "name": self.folder.path.resolve().name,
            "about": self._about(),
            "curves": self._try("curves", self._curves) or {},
            "cost": self._try("cost", self._cost) or [],
            "image": image and {k: v for k, v in image.items() if k != "images"},
            "graphs": [
                self._graph(at, name, graph, history, maps.get(name), random)
                for at, (name, graph) in enumerate(self.graphs.items())
            ],
        }
        self.values["notes"] = self.notes

    def _try(self, part: str, read: Callable[[], Any]) -> Any:
        """Return what ``read`` returns; if it fails, note that a part is left out, return None."""
        try:
            return read()
        except (ValueError, TypeError, OSError, KeyError, IndexError, RuntimeError) as error:
            self.notes.append(f"{part}: {' '.join(str(error).split())}")
            return None

    def _about(self) -> list[list[str]]:
        """Return names and values of the main options."""
        flat = self.config.options.flat()
        shown = (
            *("graph", "rule", "width", "density", "schedule", "dataset", "image_size"),
            *("epochs", "batch_size", "lr", "seed"),
        )
        lines = [[name, str(flat[name])] for name in shown if flat.get(name) is not None]
        return [*lines, ["classes", ", ".join(self.config.classes[:10])]]

    def _curves(self) -> dict[str, list[float | None]]:
        """Return columns of ``metrics.csv``."""
        with (self.folder.path / "metrics.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        names = ("epoch", "train_loss", "loss", "train_top1", "top1", "edges_changed", "lr")
        return {
            name: [_number(float(row[name])) for row in rows] for name in names if name in rows[0]
        }

    def _cost(self) -> list[list[str]]:
        """Return names and values of the network's costs."""
        costs = cost(self.model, self.config.options.data.image_size)
        return [
            ["multiply-adds per image", f"{costs.macs:,}"],
            ["parameters", f"{costs.parameters:,}"],
            ["real edges", f"{costs.real_edges:,}"],
            ["candidate edges", f"{costs.candidate_edges:,}"],
            ["dead nodes", f"{costs.dead_nodes:,}"],
            ["unreachable nodes (no path to an output)", f"{costs.unreachable_nodes:,}"],
        ]

    @torch.no_grad()
    def _maps(self, images: Tensor) -> dict[str, Tensor]:
        """Return the feature maps of all nodes, scaled to ``[V, SIDE, SIDE]``, by graph."""
        states_of: dict[str, list[Tensor]] = {}
        hooks = []
        if sum(graph.topology.num_nodes for graph in self.graphs.values()) > MOST_NODES:
            raise ValueError(f"there are more than {MOST_NODES:,} nodes")
        for name, graph in self.graphs.items():
            states = states_of[name] = [torch.empty(0)] * len(graph.nodes)
            for block, node in enumerate(graph.nodes):
                hooks.append(node.register_forward_hook(_storing(states, block)))
        try:
            self.model(Normalize(self.config.mean, self.config.std)(images))
        finally:
            for hook in hooks:
                hook.remove()
        maps_of = {}
        for name, states in states_of.items():
            if all(state.dim() == 4 for state in states):
                small = [F.adaptive_avg_pool2d(s[:, :1], min(SIDE, *s.shape[2:])) for s in states]
                maps = torch.cat([F.interpolate(s, (SIDE, SIDE)) for s in small])[:, 0]
                nodes = self.graphs[name].grouping.original(range(len(maps)))
                maps_of[name] = torch.empty_like(maps).index_copy_(0, nodes.to(maps.device), maps)
        return maps_of

    def _graph(
        self,
        number: int,
        name: str,
        graph: NeuralGraph,
        history: History | None,
        maps: Tensor | None,
        random: int,
    ) -> dict[str, Any]:
        """Return the values of a graph for the page, and add its arrays to the pack.

        Args:
            number: Number of the graph.
            name: Name of the graph.
            graph: The graph.
            history: The recorded history of the run, if any.
            maps: Feature maps of the nodes, if any.
            random: Number of random wirings to compare with.
        """
        measures, key, pack = measure(graph, random=random), f"g{number}", self.pack
        s = measures.structure
        values: dict[str, Any] = {
            "name": name,
            "key": key,
            "nodes": s.num_nodes,
            "edges": s.num_edges,
            "blocks": [
                {
                    "role": block.role.name.lower(),
                    "first": block.nodes.start,
                    "past": block.nodes.stop,
                }
                for block in s.topology.blocks
            ],
            "statistics": _statistics(measures),
            "pairs": [
                [p.source, p.target, p.candidates, p.edges.value, p.edges.mean, _number(p.edges.z)]
                for p in measures.pairs
            ],
            "dead": {kind: len(nodes) for kind, nodes in vars(measures.dead).items()},
            "paths": sorted(measures.path_lengths.items()),
            "weights": _histogram(s.weight),
            "degrees": {
                "in": np.bincount(s.in_degree).tolist(),
                "out": np.bincount(s.out_degree).tolist(),
            },
        }
        pack.add(f"{key}.source", s.source.astype(np.uint32))
        pack.add(f"{key}.in", s.in_degree.astype(np.uint32))
        pack.add(f"{key}.weight", s.weight.astype(np.float32))
        pack.add(f"{key}.betweenness", measures.betweenness.astype(np.float32))
        if (filters := _filters(graph)) is not None:
            values["filters"] = pack.add(f"{key}.filters", filters)
        if maps is not None:
            values["maps"] = pack.add(f"{key}.maps", _bytes(maps))
        if history is not None and name in history:
            wiring_history = history[name]
            if self._ends_with(wiring_history, s):
                values["history"] = self._history(key, wiring_history, s)
            else:
                self.notes.append(
                    f"the history of {name}: it does not end with the wiring of these weights"
                )
        return values

    @staticmethod
    def _ends_with(history: WiringHistory, s: Structure) -> bool:
        """Return whether the last wiring of a history is this one."""
        if history.candidates != s.topology.num_candidates:
            return False
        source, target = s.topology.edges(torch.from_numpy(history.real())).numpy()
        return np.array_equal(source, s.source) and np.array_equal(target, s.target)

    def _history(self, key: str, history: WiringHistory, s: Structure) -> dict[str, Any]:
        """Return the values of a history, and add its edges, births and deaths to the pack."""
        pack, born = self.pack, [record.born for record in history.records]
        ever_real = np.unique(np.concatenate(born))
        source, target = s.topology.edges(torch.from_numpy(ever_real)).numpy()
        pack.add(f"{key}.ever.source", source.astype(np.uint32))
        pack.add_ids(f"{key}.ever.target", target)
        pairs, is_real = [], np.zeros(len(ever_real), dtype=bool)
        blocks = len(s.topology.blocks)
        for at, record in enumerate(history.records):
            for kind, ids in (("born", record.born), ("died", record.died)):
                places = np.searchsorted(ever_real, ids)
                is_real[places] = kind == "born"
                pack.add_ids(f"{key}.{kind}.{at}", places)
            counts = np.zeros((blocks, blocks), dtype=np.int64)
            np.add.at(counts, (s.block[source[is_real]], s.block[target[is_real]]), 1)
            pairs.append(counts.tolist())
        per_epoch = history.steps[-1] / history.epochs[-1] if history.epochs[-1] else 1.0
        settled = history.settled()
        return {
            "epochs": history.epochs,
            "births": history.births.tolist(),
            "deaths": history.deaths.tolist(),
            "pairs": pairs,
            "ages": _histogram(history.ages() / per_epoch, min(20, len(history.records))),
            "settled": None if settled is None else settled / per_epoch,
        }


def _histogram(values: NDArray[Any], bins: int = 60) -> list[list[float]]:
    """Return the counts of a histogram, and the centres of its bins."""
    counts, edges = np.histogram(values, bins)
    return [counts.tolist(), ((edges[1:] + edges[:-1]) / 2).tolist()]


def _storing(states: list[Tensor], index: int) -> Callable[..., None]:
    """Return a forward hook that stores a module's output at an index of a list."""

    def store(module: nn.Module, args: Any, out: Tensor) -> None:
        states[index] = out.detach().float()

    return store


def _sample(config: RunConfig) -> dict[str, Any]:
    """Return the first validation image as the network's input ``"images"`` and as PNG."""
    options = config.options.data
    source = open_source(training=False, classes=config.classes, **options.source())
    if not len(source.validation):
        raise ValueError(f"{options.data} has no validation images")
    transform = evaluation_transform(config.augmentation, options.image_size)
    image = transform(source.validation[0])
    thumbnail, file = Image.fromarray(image.permute(1, 2, 0).numpy()), io.BytesIO()
    thumbnail.thumbnail((112, 112))
    thumbnail.save(file, "PNG")
    return {
        "images": image.unsqueeze(0),
        "class": config.classes[int(source.validation.labels[0])],
        "png": base64.b64encode(file.getvalue()).decode(),
    }


def _statistics(measures: Measures) -> list[list[Any]]:
    """Return name, value, mean and z of each statistic."""
    rows = [[name, *statistic(s)] for name, s in measures.statistics.items()]
    return [*rows, ["small-worldness", _number(small_worldness(measures)), 1.0, None]]


def _number(value: float) -> float | None:
    """Return a number, or None if it is not finite, which JSON cannot represent."""
    return float(value) if np.isfinite(value) else None


def statistic(found: Statistic) -> list[float | None]:
    """Return value, mean and z of a statistic."""
    return [_number(found.value), _number(found.mean), _number(found.z)]


def _filters(graph: NeuralGraph) -> NDArray[Any] | None:
    """Return the 3x3 filter of each node ``[V, 9]``, else 0; None if no node has one."""
    rows, has_filters = [], False
    blocks = graph.grouping.topology.blocks
    for block, node, message in zip(blocks, graph.nodes, graph.messages, strict=True):
        conv = getattr(node, "conv", None) or getattr(message, "conv", None)
        if isinstance(conv, nn.Conv2d) and conv.weight.shape[1:].numel() == 9:
            rows.append(conv.weight.detach().float().reshape(-1, 9))
            has_filters = True
        else:
            rows.append(torch.zeros(len(block.nodes), 9))
    if not has_filters:
        return None
    filters = torch.cat(rows).cpu()
    nodes = graph.grouping.original(range(len(filters)))
    return torch.empty_like(filters).index_copy_(0, nodes, filters).numpy()


def _bytes(maps: Tensor) -> NDArray[Any]:
    """Return maps as bytes: 128 is 0, and 1 or 255 is the largest magnitude in a map."""
    largest = maps.abs().amax((1, 2), keepdim=True).clamp_min(1e-12)
    return (128 + 127 * maps / largest).round().clamp(1, 255).byte().numpy()
