"""A GPU that is not there: tensors on ``cuda:0`` that have shapes, but no values.

PyTorch's fake tensors tell where a tensor is. Operations that mix devices raise an error, and so do
those for which the host would have to wait for values. This module adds what they miss: copies from
the GPU to the host, operators of this project without an implementation for GPUs, and a backward
pass, since PyTorch's engine needs a device.
"""

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.autograd.function import BackwardCFunction
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dnw_graph import Topology

GPU = "cuda:0"


class HostWaitsError(RuntimeError):
    """The host waits for values from the GPU."""


class _Watch(TorchDispatchMode):
    """Raises an error for copies to the host, and for operators that do not run on GPUs."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        inputs = _devices((args, kwargs))
        if "cuda" in inputs and func.namespace == "dnw_graph":
            has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
            if not has_kernel(func.name(), "CUDA") and not has_kernel(
                func.name(), "CompositeExplicitAutograd"
            ):
                raise NotImplementedError(f"{func.name()} has no implementation for GPUs")
        if func in _COPIES:
            source = args[1] if func is torch.ops.aten.copy_.default else args[0]
            target = args[0] if func is torch.ops.aten.copy_.default else result
            if source.device.type == "cuda" and target.device.type == "cpu":
                raise HostWaitsError(f"{func} copies {list(source.shape)} from the GPU to the host")
        if func is torch.ops.aten.index.Tensor and args[0].device.type == "cuda":
            for index in args[1]:
                if index is not None and index.device.type == "cpu":
                    raise RuntimeError("an index on the CPU selects from a tensor on the GPU")
        return result


_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


def _devices(values: object) -> set[str]:
    return {x.device.type for x in tree_leaves(values) if isinstance(x, Tensor)}


_Generator = torch.Generator


@contextmanager
def fake_gpu(watch: bool = True) -> Iterator[None]:
    """Make operations on ``cuda:0`` compute shapes, types and devices only.

    Modules are built outside and moved inside, by ``module.to(GPU)``.

    Args:
        watch: Whether to raise an error for copies to the host and for missing operators.
            ``torch.compile`` does not work within such a watch.

    Raises:
        HostWaitsError: In the context, a tensor is copied from the GPU to the host.
        torch._subclasses.fake_tensor.DataDependentOutputException: The host needs a value.
        torch._subclasses.fake_tensor.DynamicOutputShapeException: A shape depends on values.
        RuntimeError: Devices are mixed.
    """
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    copies_on = Topology.copies_on

    def copies_of_real(self: Topology, name: str, device: Any, make: Any) -> tuple[Tensor, ...]:
        """Compute the tables of a topology outside, on the CPU."""

        def real() -> tuple[Tensor, ...]:
            with unset_fake_temporarily():
                tables: tuple[Tensor, ...] = make()
            return tables

        return copies_on(self, name, device, real)

    def generator(device: Any = "cpu") -> torch.Generator:
        return _Generator("cpu")

    try:
        with (
            patch.object(Topology, "copies_on", copies_of_real),
            patch.object(torch, "Generator", generator),
            FakeTensorMode(allow_non_fake_inputs=True),
            _Watch() if watch else nullcontext(),
        ):
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)


class _Memory(TorchDispatchMode):
    """Adds up the memory of the tensors that exist, each counted with its storage."""

    def __init__(self) -> None:
        super().__init__()
        self.size = self.peak = 0
        self._tensors: dict[int, int] = defaultdict(int)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type == "cuda":
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if not self._tensors[key]:
                    self.size += size
                    self.peak = max(self.peak, self.size)
                self._tensors[key] += 1
                weakref.finalize(tensor, self._forget, key, size)
        return result

    def _forget(self, key: int, size: int) -> None:
        self._tensors[key] -= 1
        if not self._tensors[key]:
            self.size -= size


@contextmanager
def peak_memory() -> Iterator[Callable[[], int]]:
    """Yield a function that returns the most bytes that were allocated on the fake GPU so far."""
    with _Memory() as memory:
        yield lambda: memory.peak


@contextmanager
def autocast(dtype: torch.dtype | None) -> Iterator[None]:
    """Enable autocast on the fake GPU, as ``torch.autocast`` does if there is a GPU."""
    torch.set_autocast_enabled("cuda", dtype is not None)
    if dtype is not None:
        torch.set_autocast_dtype("cuda", dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()


def backward(loss: Tensor) -> None:
    """Run the backward pass of a loss as PyTorch's engine would, on the calling thread.

    Calls the functions of the autograd graph in order, and sums gradients to the shapes of the
    tensors that they belong to.
    """
    assert loss.grad_fn is not None
    grads: dict[Any, dict[int, Tensor]] = defaultdict(dict)
    grads[loss.grad_fn][0] = torch.ones_like(loss)
    for node in reversed(_in_order(loss.grad_fn)):
        if node not in grads:
            continue
        received = grads.pop(node)
        if type(node).__name__ == "AccumulateGrad":
            _accumulate(node.variable, received[0])
            continue
        arguments = [
            received[i] if i in received else torch.zeros(m.shape, dtype=m.dtype, device=m.device)
            for i, m in enumerate(node._input_metadata)
        ]
        for (following, place), grad in _results(node, arguments):
            metadata = following._input_metadata[place]
            assert grad.device == metadata.device, f"{node}: gradient on {grad.device}"
            grad = grad.sum_to_size(metadata.shape).to(metadata.dtype)
            others = grads[following]
            others[place] = others[place] + grad if place in others else grad


def _accumulate(leaf: Tensor, grad: Tensor) -> None:
    with torch.no_grad():
        leaf.grad = grad.detach() if leaf.grad is None else leaf.grad + grad.detach()
    for hook in (leaf._post_accumulate_grad_hooks or {}).values():
        hook(leaf)


def _results(node: Any, arguments: Sequence[Tensor]) -> Iterator[tuple[tuple[Any, int], Tensor]]:
    """Yield the gradients that a function of the autograd graph returns, with their edges."""
    edges = node.next_functions
    if isinstance(node, BackwardCFunction):
        outputs: Any = node.apply(*arguments)  # one per argument, including those without gradient
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        outputs = [o for o, needed in zip(outputs, node.needs_input_grad, strict=True) if needed]
        edges = [edge for edge in edges if edge[0] is not None]
    else:
        outputs = node(*arguments)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    for edge, output in zip(edges, outputs, strict=True):
        if edge[0] is not None and output is not None:
            yield edge, output


def _in_order(root: Any) -> list[Any]:
    """Return the functions that a function depends on, each after those it leads to."""
    order: list[Any] = []
    visited, stack = {root}, [(root, iter(root.next_functions))]
    while stack:
        node, edges = stack[-1]
        following = next((f for f, _ in edges if f is not None and f not in visited), None)
        if following is None:
            order.append(node)
            stack.pop()
        else:
            visited.add(following)
            stack.append((following, iter(following.next_functions)))
    return order
