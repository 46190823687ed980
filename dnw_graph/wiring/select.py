"""Exact selection of the k largest magnitudes, without sorting and without waiting for a GPU."""

import numba
import numpy as np
import torch
from torch import Tensor

from dnw_graph import _jit


def top_k(weight: Tensor, k: int) -> Tensor:
    """Return the ids of the ``k`` entries of largest ``|w|``, ascending; of equals, the first.

    Args:
        weight: Weights ``[E]``, floating-point. They must not be changed during the call.
        k: Number of ids, 1 to ``E``.

    Returns:
        Ids ``[k]``, int64.

    Raises:
        ValueError: If ``k`` is out of range, or ``weight`` has another shape or type. On a CPU,
            also if a weight is not finite. On a GPU, where this check would make the host wait,
            :meth:`NeuralGraph.validate` does it.
    """
    if weight.dim() != 1 or not weight.is_floating_point():
        raise ValueError(
            "weight must be a floating-point tensor of shape [E], got "
            f"{weight.dtype} {list(weight.shape)}"
        )
    if not 1 <= k <= len(weight):
        raise ValueError(
            f"k must be between 1 and the number of weights, {len(weight):,}, got {k:,}"
        )
    return _top_k(weight.detach(), k)


@torch.library.custom_op("dnw_graph::top_k", mutates_args=(), device_types="cpu")
def _top_k(weight: Tensor, k: int) -> Tensor:
    is_narrow = weight.dtype != torch.float64
    values = weight.to(torch.float32 if is_narrow else torch.float64).contiguous()
    # Not .numpy(), after which sharded training could no longer free the weights' memory.
    bits = np.from_dlpack(values.view(torch.int32 if is_narrow else torch.int64))
    # Without their signs, bits have the order of the magnitudes; infinity and NaN come last.
    infinity = 0x7F800000 if is_narrow else 0x7FF0000000000000
    shortlist = _shortlist(bits, k) if _jit.can_compile() else None
    if shortlist is not None:
        bits = bits[shortlist]
    if len(bits) <= _SMALL or not _jit.can_compile():
        ids = _largest_by_partition(bits, k, infinity)
    else:
        ids = np.empty(k, dtype=np.int64)
        shift = 15 if is_narrow else 47  # the top 16 of the sign-free bits are the bin
        if not _largest(bits, k, np.int64(shift), infinity >> shift, _jit.threads(), ids):
            ids = None
    if ids is None:
        index = int((~values.isfinite()).nonzero()[0])
        raise ValueError(
            f"every edge weight must be finite, but weight {index} is {float(values[index])}: the "
            "run diverged; go back to a checkpoint and lower the learning rate (or, if the rule "
            "passes other values to top_k, make these finite)"
        )
    return torch.from_numpy(ids if shortlist is None else shortlist[ids])


def _shortlist(bits: np.ndarray, k: int) -> np.ndarray | None:
    """Return ids, ascending, that include those of the ``k`` largest, or None if all must be read.

    A sample estimates the k-th largest, with a margin of eight standard deviations. If the estimate
    is still wrong, too few or too many ids result, and None is returned. Whole cache lines are
    sampled, since reading one number takes as long as reading its cache line.
    """
    step = len(bits) // _NUM_LINES
    if step < 8 * _LINE_SIZE or k > len(bits) // 16:
        return None
    sample = bits[: _NUM_LINES * step].reshape(_NUM_LINES, step)[:, :_LINE_SIZE].ravel()
    sample &= np.iinfo(bits.dtype).max
    share = len(sample) / len(bits)
    rank = int(k * share + 8 * (k * share) ** 0.5 + 8)
    minimum = np.partition(sample, len(sample) - 1 - rank)[len(sample) - 1 - rank]
    ids = np.empty((_jit.threads(), int(2 * rank / share)), dtype=np.int64)
    counts = _at_least(bits, minimum, ids)
    if counts.max() > ids.shape[1] or counts.sum() < k:
        return None
    return np.concatenate([row[:count] for row, count in zip(ids, counts, strict=True)])


_NUM_LINES, _LINE_SIZE = 1 << 10, 16  # number of cache lines sampled, and numbers in each
_PART = 1 << 20  # number of weights whose ranks are computed at a time on a GPU
_SMALL = 1 << 18  # up to this many numbers, np.partition is used


def _largest_by_partition(bits: np.ndarray, k: int, infinity: int) -> np.ndarray | None:
    """Return the ids of the k largest sign-free ``bits``, ascending; None if one is not finite."""
    magnitude = bits & np.iinfo(bits.dtype).max
    ordered = np.partition(magnitude, len(bits) - k)
    if ordered[len(bits) - k :].max() >= infinity:
        return None
    threshold = ordered[len(bits) - k]
    is_selected = magnitude > threshold
    ties = np.flatnonzero(magnitude == threshold)
    is_selected[ties[: k - np.count_nonzero(is_selected)]] = True
    return np.flatnonzero(is_selected)


@_top_k.register_kernel("cuda")
def _top_k_by_bits(weight: Tensor, k: int) -> Tensor:
    is_narrow = weight.dtype != torch.float64
    bits = weight.abs().to(torch.float32 if is_narrow else torch.float64)
    bits = bits.view(torch.int32 if is_narrow else torch.int64)
    # The k-th largest is the largest number that at least k are not below; its bits are found one
    # after another, without waiting, and without memory beyond a mask.
    threshold = bits.new_zeros(())
    for bit in reversed(range(31 if is_narrow else 63)):
        higher = threshold | (1 << bit)
        threshold = torch.where((bits >= higher).sum() >= k, higher, threshold)
    ties_left = k - (bits > threshold).sum()
    # Selected edges write their ids at their ranks, all others at index k, so that sizes are fixed.
    ids = torch.empty(k + 1, dtype=torch.int64, device=weight.device)
    rank = torch.zeros_like(ties_left)
    for start in range(0, len(bits), _PART):
        part = bits[start : start + _PART]
        is_tied = part == threshold
        is_selected = (part > threshold) | (is_tied & (is_tied.cumsum(0) <= ties_left))
        place = torch.where(is_selected, rank + is_selected.cumsum(0) - 1, k)
        ids.scatter_(0, place, torch.arange(start, start + len(part), device=weight.device))
        ties_left, rank = ties_left - is_tied.sum(), rank + is_selected.sum()
    return ids[:k].clone()


@_top_k.register_fake
def _(weight: Tensor, k: int) -> Tensor:
    return weight.new_empty(k, dtype=torch.int64)


@_jit.Kernel
def _at_least(bits, minimum, ids):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Write the ids of sign-free ``bits`` of at least ``minimum``, and return how many there are.

    Each row of ``ids``, and each count, is for one part of the bits. Ids beyond the capacity of a
    row are only counted.
    """
    chunks, capacity = ids.shape
    size = (len(bits) + chunks - 1) // chunks
    sign_free = bits.dtype.type((np.int64(1) << (bits.itemsize * 8 - 1)) - 1)
    counts = np.zeros(chunks, dtype=np.int64)
    for c in numba.prange(chunks):
        part, row, count = bits[c * size : (c + 1) * size], ids[c], 0
        for i in range(len(part)):
            if (part[i] & sign_free) >= minimum:
                if count < capacity:
                    row[count] = c * size + i
                count += 1
        counts[c] = count
    return counts


@_jit.Kernel
def _largest(bits, k, shift, infinity, chunks, ids):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Write the ids of the k largest sign-free ``bits``, ascending; return False if not finite."""
    size = (len(bits) + chunks - 1) // chunks
    sign_free = (np.int64(1) << (shift + 16)) - 1
    # 1. Count the numbers by their leading bits, and find the bin of the k-th largest.
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
    # 2. Find the k-th largest number in that bin.
    first = np.zeros(chunks + 1, dtype=np.int64)
    first[1:] = np.cumsum(histogram[:, split])
    inside = np.empty(first[chunks], dtype=bits.dtype)
    for c in numba.prange(chunks):
        position = first[c]
        for i in range(c * size, min(c * size + size, len(bits))):
            key = bits[i] & sign_free
            if key >> shift == split and position < first[c + 1]:
                inside[position] = key
                position += 1
    needed = k - above
    threshold = np.partition(inside, len(inside) - needed)[len(inside) - needed]
    # 3. Write the selected ids of each chunk; of equal numbers, those of lowest ids.
    ties = needed - (inside > threshold).sum()
    quota, start = np.zeros(chunks, dtype=np.int64), np.zeros(chunks + 1, dtype=np.int64)
    for c in range(chunks):
        part = inside[first[c] : first[c + 1]]
        quota[c] = min(ties, (part == threshold).sum())
        ties -= quota[c]
        count = histogram[c, split + 1 :].sum() + (part > threshold).sum() + quota[c]
        start[c + 1] = start[c] + count
    for c in numba.prange(chunks):
        i, position, ties_left = c * size, start[c], quota[c]
        # Ids are written without a branch: one that is not selected is overwritten.
        while position < start[c + 1] and i < len(bits):
            key = bits[i] & sign_free
            tie = (key == threshold) & (ties_left > 0)
            ids[position] = i
            position += (key > threshold) | tie
            ties_left -= tie
            i += 1
    return True
