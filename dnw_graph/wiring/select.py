"""Exact selection of the k largest magnitudes: never sorts, never waits on the host."""

import numba
import numpy as np
import torch
from torch import Tensor

from dnw_graph import _jit


def top_k(weight: Tensor, k: int) -> Tensor:
    """Return the ids of the ``k`` entries of largest ``|w|``, ascending; among equals, the first.

    Args:
        weight: Weights ``[E]``.
        k: How many, 1 to ``E``.

    Returns:
        Ids ``[k]``, int64.

    Raises:
        ValueError: On a CPU, a weight that is not finite. A GPU is not made to wait for that check;
            :meth:`NeuralGraph.validate` does it there.
    """
    return _top_k(weight.detach(), k)


@torch.library.custom_op("dnw_graph::top_k", mutates_args=(), device_types="cpu")
def _top_k(weight: Tensor, k: int) -> Tensor:
    double = weight.dtype == torch.float64
    magnitude = weight.to(torch.float64 if double else torch.float32).contiguous()
    bits = magnitude.view(torch.int64 if double else torch.int32).numpy()
    ids = np.empty(k, dtype=np.int64)
    # The bits of a positive float order like the float: the top 16 of the sign-free ones give bins.
    _largest(bits, k, np.int64(64 - 17 if double else 32 - 17), _jit.use_torch_threads(), ids)
    chosen = torch.from_numpy(ids)
    # Infinity and NaN have the largest bits of all, so a single one would have been chosen.
    if not bool(magnitude[chosen].isfinite().all()):
        at = int(chosen[~magnitude[chosen].isfinite()][0])
        raise ValueError(
            f"every edge weight must be finite, but weight {at} is {float(weight[at])}: the run "
            "diverged; go back to a checkpoint and lower the learning rate"
        )
    return chosen


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


@_jit.kernel
def _largest(bits, k, shift, chunks, ids):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Write the ids of the k largest sign-free ``bits``, ascending, chunk by chunk."""
    size = (len(bits) + chunks - 1) // chunks
    sign_free = (np.int64(1) << (shift + 16)) - 1
    # 1. Count the numbers by their leading bits, and find the bin that holds the k-th.
    histogram = np.zeros((chunks, 1 << 16), dtype=np.int64)
    for c in numba.prange(chunks):
        for i in range(c * size, min(c * size + size, len(bits))):
            histogram[c, (bits[i] & sign_free) >> shift] += 1
    split, above = (1 << 16) - 1, np.int64(0)
    total = histogram.sum(axis=0)
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
            if key >> shift == split:
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
        at, left = start[c], quota[c]
        for i in range(c * size, min(c * size + size, len(bits))):
            key = bits[i] & sign_free
            tie = key == threshold and left > 0
            if key > threshold or tie:
                ids[at] = i
                at += 1
                left -= tie
