"""Exact selection of the k largest magnitudes: never sorts, never waits on the host."""

import numba
import numpy as np
import torch
from torch import Tensor

from dnw_graph import _jit


def top_k(weight: Tensor, k: int) -> Tensor:
    """Return the ids of the ``k`` entries of largest ``|w|``, ascending; among equals, the first.

    Args:
        weight: Weights ``[E]``, floating-point; nothing may change them meanwhile.
        k: How many, 1 to ``E``.

    Returns:
        Ids ``[k]``, int64.

    Raises:
        ValueError: ``k`` out of range, or weights of another shape or type. On a CPU, a weight that
            is not finite; a GPU is not made to wait for that check, which
            :meth:`NeuralGraph.validate` does there.
    """
    if weight.dim() != 1 or not weight.is_floating_point():
        raise ValueError(
            f"weights must be floating-point [E], got {weight.dtype} {list(weight.shape)}"
        )
    if not 1 <= k <= len(weight):
        raise ValueError(f"k must lie between 1 and the {len(weight):,} weights, got {k:,}")
    return _top_k(weight.detach(), k)


@torch.library.custom_op("dnw_graph::top_k", mutates_args=(), device_types="cpu")
def _top_k(weight: Tensor, k: int) -> Tensor:
    narrow = weight.dtype != torch.float64
    values = weight.to(torch.float32 if narrow else torch.float64).contiguous()
    # Not .numpy(), after which sharded training could no longer free the weights' memory.
    bits = np.from_dlpack(values.view(torch.int32 if narrow else torch.int64))
    # The bits of a positive float order like the float, those of infinity and NaN come last.
    infinity = 0x7F800000 if narrow else 0x7FF0000000000000
    among = _candidates(bits, k) if _jit.can_compile() else None
    given = bits if among is None else bits[among]
    if len(given) <= _FEW or not _jit.can_compile():
        ids = _largest_of_few(given, k, infinity)
    else:
        ids = np.empty(k, dtype=np.int64)
        shift = 15 if narrow else 47  # the top 16 of the sign-free bits give bins
        if not _largest(given, k, np.int64(shift), infinity >> shift, _jit.threads(), ids):
            ids = None
    if ids is None:
        at = int((~values.isfinite()).nonzero()[0])
        raise ValueError(
            f"every edge weight must be finite, but weight {at} is {float(values[at])}: the run "
            "diverged; go back to a checkpoint and lower the learning rate"
        )
    return torch.from_numpy(ids if among is None else among[ids])


def _candidates(bits: np.ndarray, k: int) -> np.ndarray | None:
    """Return ids, ascending, that hold the ``k`` largest for certain, or None for all.

    A sample says how large the k-th is, with a margin of eight deviations. Should that be wrong
    nonetheless, too few remain or too many, which is noticed, and all are looked at. What is
    sampled are lines of a cache, since fetching one takes as long for a number as for all in it.
    """
    step = len(bits) // _LINES
    if step < 8 * _LINE or k > len(bits) // 16:
        return None
    sample = bits[: _LINES * step].reshape(_LINES, step)[:, :_LINE].ravel()
    sample &= np.iinfo(bits.dtype).max
    share = len(sample) / len(bits)
    above = int(k * share + 8 * (k * share) ** 0.5 + 8)
    least = np.partition(sample, len(sample) - 1 - above)[len(sample) - 1 - above]
    ids = np.empty((_jit.threads(), int(2 * above / share)), dtype=np.int64)
    counts = _at_least(bits, least, ids)
    if counts.max() > ids.shape[1] or counts.sum() < k:
        return None
    return np.concatenate([row[:count] for row, count in zip(ids, counts, strict=True)])


_LINES, _LINE = 1 << 10, 16
_FEW = 1 << 18


def _largest_of_few(bits: np.ndarray, k: int, infinity: int) -> np.ndarray | None:
    """Return the ids of the k largest sign-free ``bits``, ascending; None if one is not finite."""
    size = bits & np.iinfo(bits.dtype).max
    ordered = np.partition(size, len(size) - k)
    if ordered[len(size) - k :].max() >= infinity:
        return None
    threshold = ordered[len(size) - k]
    kept = size > threshold
    ties = np.flatnonzero(size == threshold)
    kept[ties[: k - np.count_nonzero(kept)]] = True
    return np.flatnonzero(kept)


@_top_k.register_kernel("cuda")
def _top_k_cuda(weight: Tensor, k: int) -> Tensor:
    magnitude = weight.abs()
    threshold = magnitude.topk(k, sorted=False).values.amin()
    above, tied = magnitude > threshold, magnitude == threshold
    kept = above | (tied & (tied.cumsum(0) <= k - above.sum()))
    # Each kept edge writes its id at its rank, all others one past the end: sizes need no host.
    place = torch.where(kept, kept.cumsum(0) - 1, k)
    ids = torch.zeros(k + 1, dtype=torch.int64, device=weight.device)
    ids.scatter_(0, place, torch.arange(weight.numel(), device=weight.device))
    return ids[:k].clone()


@_top_k.register_fake
def _(weight: Tensor, k: int) -> Tensor:
    return weight.new_empty(k, dtype=torch.int64)


@_jit.Kernel
def _at_least(bits, least, ids):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Write the ids of sign-free ``bits`` from ``least`` up, a row a part, as far as there is room.

    Return how many there are in each part.
    """
    chunks, room = ids.shape
    size = (len(bits) + chunks - 1) // chunks
    sign_free = bits.dtype.type((np.int64(1) << (bits.itemsize * 8 - 1)) - 1)
    counts = np.zeros(chunks, dtype=np.int64)
    for c in numba.prange(chunks):
        part, row, at = bits[c * size : (c + 1) * size], ids[c], 0
        for i in range(len(part)):
            if (part[i] & sign_free) >= least:
                if at < room:
                    row[at] = c * size + i
                at += 1
        counts[c] = at
    return counts


@_jit.Kernel
def _largest(bits, k, shift, infinity, chunks, ids):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Write the ids of the k largest sign-free ``bits``, ascending; False if one is not finite."""
    size = (len(bits) + chunks - 1) // chunks
    sign_free = (np.int64(1) << (shift + 16)) - 1
    # 1. Count the numbers by their leading bits, and find the bin that holds the k-th.
    histogram = np.zeros((chunks, 1 << 16), dtype=np.int64)
    for c in numba.prange(chunks):
        for i in range(c * size, min(c * size + size, len(bits))):
            histogram[c, (bits[i] & sign_free) >> shift] += 1
    total = histogram.sum(axis=0)
    if total[infinity:].sum() > 0:
        return False
    split, above = (1 << 16) - 1, np.int64(0)
    while above + total[split] < k:
        above += total[split]
        split -= 1
    # 2. Within that bin, find the k-th number itself.
    first = np.zeros(chunks + 1, dtype=np.int64)
    first[1:] = np.cumsum(histogram[:, split])
    inside = np.empty(first[chunks], dtype=bits.dtype)
    for c in numba.prange(chunks):
        at = first[c]
        for i in range(c * size, min(c * size + size, len(bits))):
            key = bits[i] & sign_free
            if key >> shift == split and at < first[c + 1]:
                inside[at] = key
                at += 1
    needed = k - above
    threshold = np.partition(inside, len(inside) - needed)[len(inside) - needed]
    # 3. Each chunk knows how many it keeps; ties go to the lowest ids.
    ties = needed - (inside > threshold).sum()
    quota, start = np.zeros(chunks, dtype=np.int64), np.zeros(chunks + 1, dtype=np.int64)
    for c in range(chunks):
        own = inside[first[c] : first[c + 1]]
        quota[c] = min(ties, (own == threshold).sum())
        ties -= quota[c]
        kept = histogram[c, split + 1 :].sum() + (own > threshold).sum() + quota[c]
        start[c + 1] = start[c] + kept
    for c in numba.prange(chunks):
        i, at, left = c * size, start[c], quota[c]
        while at < start[c + 1] and i < len(
            bits
        ):  # no branch on what is kept: the rest is written over
            key = bits[i] & sign_free
            tie = (key == threshold) & (left > 0)
            ids[at] = i
            at += (key > threshold) | tie
            left -= tie
            i += 1
    return True
