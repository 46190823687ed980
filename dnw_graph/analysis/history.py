"""Recording of how wirings change during training: births and deaths of edges."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dnw_graph._files import replacing
from dnw_graph._wrapped import unwrapped
from dnw_graph.wiring import selectors

Ids = NDArray[np.int64]
"""Ids of candidate edges, ascending."""

FOLDER = "history"
_ABOUT = "about"


@dataclass(frozen=True)
class Record:
    """Change of one wiring since the previous record.

    Attributes:
        step: Optimizer steps done.
        epoch: Epochs done.
        born: Ids of candidates that became real.
        died: Ids of candidates that are no longer real.
    """

    step: int
    epoch: float
    born: Ids
    died: Ids


class WiringHistory:
    """The real edges of one graph, or of one sparse layer, over a training run.

    Args:
        candidates: Number of candidate edges ``E``.
        records: Records in the order of steps; in the first, all real edges are born.
    """

    def __init__(self, candidates: int, records: list[Record]) -> None:
        self.candidates, self.records = candidates, records

    @property
    def steps(self) -> list[int]:
        """Optimizer steps at each record ``[T]``."""
        return [record.step for record in self.records]

    @property
    def epochs(self) -> list[float]:
        """Epochs at each record ``[T]``."""
        return [record.epoch for record in self.records]

    @property
    def births(self) -> NDArray[np.int64]:
        """Number of edges that became real since the previous record ``[T]``.

        For the first record, the number of all real edges.
        """
        return np.array([len(record.born) for record in self.records], dtype=np.int64)

    @property
    def deaths(self) -> NDArray[np.int64]:
        """Number of edges that ceased to be real since the previous record ``[T]``."""
        return np.array([len(record.died) for record in self.records], dtype=np.int64)

    def real(self, at: int = -1) -> Ids:
        """Return the ids of the real edges at a record, by default the last.

        Raises:
            IndexError: If there are fewer records.
        """
        last = range(len(self.records))[at]
        mask = np.zeros(self.candidates, dtype=bool)
        for record in self.records[: last + 1]:
            mask[record.died] = False
            mask[record.born] = True
        return np.flatnonzero(mask)

    @cached_property
    def lives(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
        """Intervals in which edges were real: start and end steps ``[L]``, and whether they ended.

        An edge that died and came back has several. The end of an interval that has not ended is
        the step of the last record.
        """
        since = np.full(self.candidates, -1, dtype=np.int64)
        begins, ends = [], []
        for record in self.records:
            begins.append(since[record.died])
            ends.append(np.full(len(record.died), record.step))
            since[record.died] = -1
            since[record.born] = record.step
        start_steps = since[since >= 0]
        num_ended = sum(map(len, ends))
        begins.append(start_steps)
        ends.append(np.full(len(start_steps), self.steps[-1] if self.records else 0))
        begin, end = np.concatenate(begins), np.concatenate(ends)
        return begin, end, np.arange(len(begin)) < num_ended

    def ages(self, at: int = -1) -> NDArray[np.int64]:
        """Return the age of each real edge at a record, in steps ``[k]``."""
        last = range(len(self.records))[at]
        since = np.full(self.candidates, -1, dtype=np.int64)
        for record in self.records[: last + 1]:
            since[record.died] = -1
            since[record.born] = record.step
        return self.records[last].step - since[since >= 0]

    def settled(self, share: float = 0.01) -> int | None:
        """Return the step after which no record changed more than a share of the real edges.

        Returns None if the last record still did, or if there are fewer than two records.
        """
        if len(self.records) < 2:
            return None
        real = np.cumsum(self.births - self.deaths)
        changed = np.maximum(self.births, self.deaths)
        large_changes = np.flatnonzero(changed[1:] > share * real[1:]) + 1
        if not len(large_changes):
            return self.records[0].step
        last = large_changes[-1]
        return None if last == len(self.records) - 1 else self.records[last].step


class History(Mapping[str, WiringHistory]):
    """Histories of a run's wirings, by name of the graph or layer; see :func:`load_history`."""

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
        """Optimizer steps at each record."""
        return next(iter(self._wirings.values())).steps if self._wirings else []

    @property
    def epochs(self) -> list[float]:
        """Epochs at each record."""
        return next(iter(self._wirings.values())).epochs if self._wirings else []


class HistoryWriter:
    """Records the wirings of a network in a folder, one file per record.

    A file holds the ids of the real edges, as compressed differences. It does not depend on others.

    Args:
        folder: The run folder; files are written to its subfolder ``history/``.
        model: The network.
        steps_per_epoch: Optimizer steps per epoch.
    """

    def __init__(self, folder: str | Path, model: nn.Module, steps_per_epoch: int) -> None:
        self._folder, self._model, self._per_epoch = Path(folder) / FOLDER, model, steps_per_epoch

    def record(self, step: int) -> None:
        """Write the real edges after a step; do nothing if the network has no wiring.

        Existing records of this step and later ones are removed: they are from before a run was
        resumed.
        """
        current = real_edges(self._model)
        if not current:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in self._folder.glob("*.npz"):
            if _step_of(path) >= step:
                path.unlink()
        arrays = {f"{name}/real": _pack(ids) for name, (ids, _) in current.items()}
        candidates = {name: number for name, (_, number) in current.items()}
        about = {"step": step, "epoch": step / self._per_epoch, "candidates": candidates}
        arrays[_ABOUT] = np.frombuffer(json.dumps(about).encode(), dtype=np.uint8)
        path = self._folder / f"{step:010d}.npz"
        with replacing(path) as partial, partial.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)


def load_history(run: str | Path) -> History:
    """Return the history of the wirings in a run folder.

    Raises:
        ValueError: If there is no history, or a file is damaged.
    """
    history = _load(Path(run) / FOLDER)
    if not history:
        raise ValueError(
            f"{run} has no history of its wiring: it is not a run folder, it is of a version that "
            "did not record histories, or its network has no graph"
        )
    return history


def _load(folder: Path) -> History:
    """Return the history in a folder, empty if there is none; raise ValueError if damaged."""
    histories: dict[str, WiringHistory] = {}
    real: dict[str, Ids] = {}
    for path in sorted(folder.glob("*.npz")):
        try:
            for name, candidates, record in _read(path, real):
                history = histories.setdefault(name, WiringHistory(candidates, []))
                if history.candidates != candidates:
                    raise ValueError(f"{name} has another number of candidates in earlier records")
                history.records.append(record)
        except Exception as error:  # NumPy and zlib raise many types of errors for damaged files
            raise ValueError(
                f"{path} is damaged, or not a record of this run: {error}; records of this "
                "version can be read without it"
            ) from error
    return History(histories)


def _read(path: Path, real: dict[str, Ids]) -> Iterator[tuple[str, int, Record]]:
    """Yield name, number of candidates and record of each wiring.

    Args:
        path: The file.
        real: The real edges at the record before it, by name of the wiring; updated.
    """
    with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
        about = json.loads(bytes(file[_ABOUT]))
        step, epoch = int(about["step"]), float(about["epoch"])
        if step != _step_of(path):
            raise ValueError(f"it is the record of step {step}")
        for name, candidates in about["candidates"].items():
            before = real.get(name, np.zeros(0, dtype=np.int64))
            if f"{name}/real" in file:
                ids = _unpack(file[f"{name}/real"], candidates)
            else:
                born, died = (_unpack(file[f"{name}/{k}"], candidates) for k in ("born", "died"))
                ids = _changed(before, born, died, int(about["real"][name]))
            born = np.setdiff1d(ids, before, assume_unique=True)
            died = np.setdiff1d(before, ids, assume_unique=True)
            real[name] = ids
            yield name, int(candidates), Record(step, epoch, born, died)


def _changed(before: Ids, born: Ids, died: Ids, real: int) -> Ids:
    """Return the real edges after a record of version 0.1, which holds changes only.

    Raises:
        ValueError: If a record before it is missing.
    """
    ids = np.union1d(np.setdiff1d(before, died, assume_unique=True), born)
    if len(ids) != real or len(ids) != len(before) - len(died) + len(born):
        raise ValueError("it does not match the records before it, so one of them is missing")
    return ids


def _step_of(path: Path) -> int:
    """Return the step in a file's name, or -1 if there is none."""
    return int(path.stem) if path.stem.isdigit() else -1


def _pack(ids: Ids) -> NDArray[Any]:
    """Return ascending ids as differences, in the smallest unsigned type that can hold them."""
    steps = np.diff(ids, prepend=0)
    largest = int(steps.max(initial=0))
    return steps.astype(
        np.uint16 if largest < 2**16 else np.uint32 if largest < 2**32 else np.uint64
    )


def _unpack(steps: NDArray[Any], candidates: int) -> Ids:
    """Return the ids that :func:`_pack` turned into differences; raise ValueError if invalid."""
    if steps.ndim != 1 or steps.dtype.kind != "u":
        raise ValueError("edge ids must be a one-dimensional array of unsigned integers")
    ids = steps.astype(np.int64).cumsum()
    if len(ids) and (ids[-1] >= candidates or (np.diff(ids) < 1).any() or ids[0] < 0):
        raise ValueError(f"edge ids must ascend and be below {candidates:,}")
    return ids


def real_edges(model: nn.Module) -> dict[str, tuple[Ids, int]]:
    """Return the ids of real edges and the number of candidates of each graph and sparse layer.

    Keys are names of modules; a graph that is the whole network has the name ``"graph"``.
    """
    edges_by_name = {}
    for name, selector, weight in selectors(unwrapped(model)):
        edge_id = selector.select(weight.detach(), training=False).edge_id
        ids = torch.sort(edge_id).values.cpu().numpy().astype(np.int64)
        edges_by_name[name or "graph"] = ids, selector.topology.num_candidates
    return edges_by_name
