import threading
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dnw_graph import NeuralGraph, Topology, _arena
from dnw_graph._arena import Arena, empty

pytestmark = pytest.mark.skipif(_arena._make() is None, reason="an arena needs Linux")


def held(arena: Arena) -> int:
    """Return how many bytes are in use."""
    arena.take(0)  # notes what was returned
    holes = arena._holes
    assert all(start < end for start, end in holes)
    assert all(a[1] < b[0] for a, b in pairwise(holes))
    return len(arena._region) - sum(end - start for start, end in holes)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3000), st.integers(0, 5)), max_size=40))
def test_pieces_never_overlap_and_all_come_back(requests: list[tuple[int, int]]) -> None:
    arena, pieces = Arena(1 << 14), []
    for number, (size, drop) in enumerate(requests):
        piece = arena.take(size)
        if piece is not None:
            assert len(piece) == size
            pieces.append((number % 256, piece.fill_(number % 256)))
        del piece
        if drop < len(pieces):
            del pieces[drop]
        assert all(bool((piece == value).all()) for value, piece in pieces)
    pieces.clear()
    assert held(arena) == 0


def test_a_piece_lives_as_long_as_any_view_of_it() -> None:
    arena = Arena(1 << 12)
    view = arena.take(1 << 12).view(torch.float32)[5:7]
    assert arena.take(1) is None
    del view
    assert arena.take(1 << 12) is not None


def test_pieces_may_be_taken_and_dropped_in_many_threads() -> None:
    arena, wrong = Arena(1 << 20), []

    def work(value: int) -> None:
        for _ in range(300):
            piece = arena.take(5000)
            if piece is not None and not bool((piece.fill_(value) == value).all()):
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert held(arena) == 0


def test_small_tensors_and_full_arenas_leave_it_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_arena, "_arena", Arena(1 << 21))
    like = torch.zeros(1, dtype=torch.float64)
    in_it, too_much, small = empty(like, (1 << 17,)), empty(like, (1 << 18,)), empty(like, (3,))
    assert held(_arena._arena) == 1 << 20
    assert in_it.shape == (1 << 17,)
    assert too_much.shape == (1 << 18,)
    assert small.shape == (3,)
    assert {t.dtype for t in (in_it, too_much, small)} == {torch.float64}


def test_a_step_gives_back_all_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_arena, "_arena", Arena(1 << 28))
    graph = NeuralGraph(Topology.layered([8, 16, 16, 8]), num_edges=100)
    for _ in range(2):
        y = graph(torch.randn(16, 8, 64, 64))
        assert held(_arena._arena) > 0
        y.sum().backward()
        del y
        assert held(_arena._arena) == 0
