"""How a wiring changed while it was learned: births and deaths of edges, kept as they happen."""

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dnw_graph._wrapped import unwrapped
from dnw_graph.wiring import selectors

Ids = NDArray[np.int64]
"""Ids of candidate edges, ascending."""

FOLDER = "history"
_log = logging.getLogger(__name__)
_ABOUT = "about"


@dataclass(frozen=True)
class Record:
    """What changed in one wiring since the record before.

    Attributes:
        step: Steps of the optimizer done.
        epoch: The same in epochs.
        born: Candidates that became real.
        died: Candidates that no longer are.
    """

    step: int
    epoch: float
    born: Ids
    died: Ids


class WiringHistory:
    """The real edges of one graph, or of one sparse layer, over a training run.

    Args:
        candidates: Number of candidate edges ``E``.
        records: In the order of steps; in the first, all real edges are born.
    """

    def __init__(self, candidates: int, records: list[Record]) -> None:
        self.candidates, self.records = candidates, records

    @property
    def steps(self) -> list[int]:
        """Steps of the optimizer at each record ``[T]``."""
        return [record.step for record in self.records]

    @property
    def epochs(self) -> list[float]:
        """Epochs at each record ``[T]``."""
        return [record.epoch for record in self.records]

    @property
    def births(self) -> Ids:
        """How many edges became real since the record before ``[T]``; in the first, all."""
        return np.array([len(record.born) for record in self.records], dtype=np.int64)

    @property
    def deaths(self) -> Ids:
        """How many edges no longer were real ``[T]``."""
        return np.array([len(record.died) for record in self.records], dtype=np.int64)

    def real(self, at: int = -1) -> Ids:
        """Return the ids of the edges that were real at a record, the last unless given.

        Raises:
            IndexError: There are fewer records.
        """
        last = range(len(self.records))[at]
        mask = np.zeros(self.candidates, dtype=bool)
        for record in self.records[: last + 1]:
            mask[record.died] = False
            mask[record.born] = True
        return np.flatnonzero(mask)

    @cached_property
    def lives(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
        """Return begin and end of every life of an edge, in steps ``[L]``, and whether it ended.

        An edge that died and came back has several. The end of one that goes on is the last record.
        """
        since = np.full(self.candidates, -1, dtype=np.int64)
        begins, ends = [], []
        for record in self.records:
            begins.append(since[record.died])
            ends.append(np.full(len(record.died), record.step))
            since[record.died] = -1
            since[record.born] = record.step
        going = since[since >= 0]
        over = sum(map(len, ends))
        begins.append(going)
        ends.append(np.full(len(going), self.steps[-1] if self.records else 0))
        begin, end = np.concatenate(begins), np.concatenate(ends)
        return begin, end, np.arange(len(begin)) < over

    def ages(self, at: int = -1) -> NDArray[np.int64]:
        """Return how many steps each real edge had been real for at a record ``[k]``."""
        last = range(len(self.records))[at]
        since = np.full(self.candidates, -1, dtype=np.int64)
        for record in self.records[: last + 1]:
            since[record.died] = -1
            since[record.born] = record.step
        return self.records[last].step - since[since >= 0]

    def settled(self, share: float = 0.01) -> int | None:
        """Return the step after which no record changed more than a share of the real edges.

        None if the last one still did, or if nothing was recorded but the start.
        """
        if len(self.records) < 2:
            return None
        real = np.cumsum(self.births - self.deaths)
        changed = np.maximum(self.births, self.deaths)
        moved = np.flatnonzero(changed[1:] > share * real[1:]) + 1
        if not len(moved):
            return self.records[0].step
        return None if moved[-1] == len(self.records) - 1 else self.records[moved[-1]].step


class History(Mapping[str, WiringHistory]):
    """The wirings of a run by name of the graph or layer; see :func:`load_history`."""

    def __init__(self, wirings: Mapping[str, WiringHistory]) -> None:
        self._wirings = dict(wirings)

    def __getitem__(self, name: str) -> WiringHistory:
        return self._wirings[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._wirings)

    def __len__(self) -> int:
        return len(self._wirings)

    @property
    def steps(self) -> list[int]:
        """Steps of the optimizer at each record."""
        return next(iter(self._wirings.values())).steps if self._wirings else []

    @property
    def epochs(self) -> list[float]:
        """Epochs at each record."""
        return next(iter(self._wirings.values())).epochs if self._wirings else []


class HistoryWriter:
    """Records the wirings of a network in a folder, a file a record.

    A file holds what changed since the one before, ids as differences in compressed form.

    Args:
        folder: The run folder; files go to ``history/`` in it.
        model: The network.
        steps_per_epoch: Of the training.
    """

    def __init__(self, folder: str | Path, model: nn.Module, steps_per_epoch: int) -> None:
        self._folder, self._model, self._per_epoch = Path(folder) / FOLDER, model, steps_per_epoch
        self._before: dict[str, Ids] | None = None

    def record(self, step: int) -> None:
        """Write what changed by some step; nothing for a network without a wiring.

        Records of this and later steps, of a run that went on from before, are removed.
        """
        now, arrays = real_edges(self._model), {}
        if not now:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in self._folder.glob("*.npz"):
            if _step_of(path) >= step:
                path.unlink()
                self._before = None
        before = self._before
        if before is None:
            past = self._past()
            before = {name: past[name].real() if past[name].records else _NONE for name in past}
        about: dict[str, Any] = {"step": step, "epoch": step / self._per_epoch}
        about |= {"candidates": {}, "real": {}}
        for name, (ids, candidates) in now.items():
            old = before.get(name, _NONE)
            born = np.setdiff1d(ids, old, assume_unique=True)
            died = np.setdiff1d(old, ids, assume_unique=True)
            arrays[f"{name}/born"], arrays[f"{name}/died"] = _packed(born), _packed(died)
            about["candidates"][name] = candidates
            about["real"][name] = len(ids)
        arrays[_ABOUT] = np.frombuffer(json.dumps(about).encode(), dtype=np.uint8)
        path = self._folder / f"{step:010d}.npz"
        half = path.with_name(f".{path.name}.half")
        with half.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
        half.replace(path)
        self._before = {name: ids for name, (ids, _) in now.items()}

    def _past(self) -> History:
        """Return what was recorded before; where that is damaged, put it aside and begin anew."""
        try:
            return _load(self._folder)
        except ValueError as error:
            number = 1 + len(list(self._folder.parent.glob(f"{FOLDER}-damaged-*")))
            aside = self._folder.rename(self._folder.with_name(f"{FOLDER}-damaged-{number}"))
            self._folder.mkdir()
            _log.warning("%s; the history is kept in %s, and begins anew", error, aside.name)
            return History({})


def load_history(run: str | Path) -> History:
    """Return what a run folder recorded of its wirings.

    Raises:
        ValueError: Nothing was recorded, or a file is damaged.
    """
    history = _load(Path(run) / FOLDER)
    if not history:
        raise ValueError(
            f"{run} has no history of its wiring: it is no run folder, one of before histories "
            "were recorded, or a network without a graph"
        )
    return history


_NONE: Ids = np.zeros(0, dtype=np.int64)


def _load(folder: Path) -> History:
    records: dict[str, list[Record]] = {}
    living: dict[str, NDArray[np.bool_]] = {}
    candidates: dict[str, int] = {}
    for path in sorted(folder.glob("*.npz")):
        for name, number, real, record in _read(path):
            if candidates.setdefault(name, number) != number:
                raise ValueError(f"{path} is damaged: {name} has {number:,} candidates in it")
            records.setdefault(name, []).append(record)
            alive = living.setdefault(name, np.zeros(number, dtype=bool))
            odd = bool(alive[record.born].any()) or not bool(alive[record.died].all())
            alive[record.died] = False
            alive[record.born] = True
            left = int(alive.sum())
            if odd or left != real or record.step != _step_of(path):
                raise ValueError(
                    f"{path} does not follow from the records before it: one is missing, or this "
                    f"one is another's (after it {name} has {left:,} real edges, not {real:,})"
                )
    return History({name: WiringHistory(candidates[name], records[name]) for name in records})


def _read(path: Path) -> Iterator[tuple[str, int, int, Record]]:
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            about = json.loads(bytes(file[_ABOUT]))
            found: list[tuple[str, int, int, Record]] = []
            for name, number in about["candidates"].items():
                born, died = (_unpacked(file[f"{name}/{kind}"], number) for kind in _KINDS)
                step, epoch = int(about["step"]), float(about["epoch"])
                real = int(about["real"][name])
                found.append((name, int(number), real, Record(step, epoch, born, died)))
    except Exception as error:  # whatever NumPy and zlib make of a file that is not their own
        raise ValueError(f"{path} is damaged, or no record of a wiring: {error}") from error
    yield from found


_KINDS = ("born", "died")


def _step_of(path: Path) -> int:
    return int(path.stem) if path.stem.isdigit() else -1


def _packed(ids: Ids) -> NDArray[Any]:
    """Return ascending ids as differences, in as few bytes as will do."""
    steps = np.diff(ids, prepend=0)
    most = int(steps.max(initial=0))
    return steps.astype(np.uint16 if most < 2**16 else np.uint32 if most < 2**32 else np.uint64)


def _unpacked(steps: NDArray[Any], candidates: int) -> Ids:
    if steps.ndim != 1 or steps.dtype.kind != "u":
        raise ValueError("ids of edges are a row of numbers")
    ids = steps.astype(np.int64).cumsum()
    if len(ids) and (ids[-1] >= candidates or (np.diff(ids) < 1).any() or ids[0] < 0):
        raise ValueError(f"ids of edges must ascend below {candidates:,}")
    return ids


def real_edges(model: nn.Module) -> dict[str, tuple[Ids, int]]:
    """Return the ids of real edges, and the number of candidates, of each graph and sparse layer.

    By name of the module; of a graph that is the whole network, ``"graph"``.
    """
    found = {}
    for name, selector, weight in selectors(unwrapped(model)):
        edge_id = selector.select(weight.detach(), training=False).edge_id
        ids = torch.sort(edge_id).values.cpu().numpy().astype(np.int64)
        found[name or "graph"] = ids, selector.topology.num_candidates
    return found
