"""The processes of a run: only this one, or those that torchrun started."""

import hashlib
import os
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.fabric.strategies import DDPStrategy
from torch import nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from dnw_graph.analysis import real_edges
from dnw_graph.precision import warn_without_units
from dnw_graph.wiring import selectors


def launched() -> bool:
    """Return whether torchrun started this process."""
    return TorchElasticEnvironment.detect()


def restarted() -> bool:
    """Return whether torchrun restarted this process, after a process was lost."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0) > 0


def make_fabric(device: str, precision: str, many: bool = False) -> Fabric:
    """Return Lightning Fabric on a device, or on one device per process of torchrun.

    Args:
        device: As in :class:`train.options.RunOptions`.
        precision: As in :class:`train.options.RunOptions`.
        many: Whether processes that torchrun started train together.

    Raises:
        ValueError: If the device does not exist.
    """
    many = many and launched()
    available = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if device == "auto":
        device = "cuda" if len(available) > 1 else "cpu"
    if many and device.startswith("cuda:"):
        raise ValueError(
            f"--device {device} is one device, but torchrun needs one per process: use "
            "--device cuda"
        )
    name = "cuda:0" if device == "cuda" else device
    if name not in available:
        raise ValueError(f"there is no --device {device}; this machine has {', '.join(available)}")
    kind, _, index = name.partition(":")
    if kind == "cpu" and precision == "bf16":
        warn_without_units(torch.bfloat16)
    # For 64 bits, the learner converts the network itself.
    bits: Any = "bf16-mixed" if precision == "bf16" else "32-true"
    if not many:
        devices: Any = [int(index)] if index else 1
        environment = LightningEnvironment()  # one process, even within a cluster job
        return Fabric(accelerator=kind, devices=devices, precision=bits, plugins=[environment])
    backend = "gloo" if kind == "cpu" else "nccl"
    _initialise(backend)
    local_size = int(os.environ["LOCAL_WORLD_SIZE"])
    parameters = signature(DistributedDataParallel).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"
    sync: dict[str, Any] = {option: False}  # ProcessGroup.share_statistics does so once per epoch
    return Fabric(
        accelerator=kind,
        devices=local_size,
        num_nodes=int(os.environ["WORLD_SIZE"]) // local_size,
        strategy=DDPStrategy(process_group_backend=backend, **sync),
        precision=bits,
        plugins=[TorchElasticEnvironment()],
    )


def _initialise(backend: str) -> None:
    """Initialise the process group under a prefix that depends on the number of restarts.

    The store of torchrun may still contain entries of processes that a restart has replaced.
    """
    store, rank, size = next(rendezvous("env://"))
    prefixed = PrefixStore(f"restart-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(backend, store=prefixed, rank=rank, world_size=size)


class ProcessGroup:
    """Communication between the processes of a run, which may be only one.

    Args:
        fabric: Lightning Fabric, already launched.

    Attributes:
        fabric: Lightning Fabric.
        rank: Rank of this process.
        size: Number of processes.
    """

    def __init__(self, fabric: Fabric) -> None:
        self.fabric = fabric
        self.rank, self.size = fabric.global_rank, fabric.world_size
        # Small values are sent by the CPU, which does not wait for a GPU.
        self._group: Any = dist.new_group(backend="gloo") if self.size > 1 else None

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0

    def largest(self, *values: int) -> list[int]:
        """Return the maximum of each value over all processes.

        Raises:
            ConnectionError: If a process was lost.
        """
        if self.size == 1:
            return list(values)
        maxima = torch.tensor(values)
        self._call(dist.all_reduce, maxima, op=dist.ReduceOp.MAX)
        return [int(value) for value in maxima]

    def wait(self) -> None:
        """Wait until all processes have called this.

        Raises:
            ConnectionError: If a process was lost.
        """
        self.largest(0)

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, by rank.

        Raises:
            ConnectionError: If a process was lost.
        """
        values = [value] * self.size
        if self.size > 1:
            self._call(dist.all_gather_object, values, value)
        return values

    def share_statistics(self, model: nn.Module) -> None:
        """Copy the running statistics of normalisation from rank 0 to all processes.

        They differ, since each process has computed them on its images. The state of rules is not
        copied, because it must be the same already.
        """
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        for buffer in (b for norm in norms for b in norm.buffers() if self.size > 1):
            dist.broadcast(buffer, src=0)

    def check_wiring(self, model: nn.Module, step: int) -> None:
        """Raise ValueError if processes differ in their real edges, or in the buffers of rules.

        Args:
            model: The network.
            step: Number of optimizer steps done.
        """
        if self.size == 1:
            return
        hashes = self.gather(wiring_hash(model))
        different = [rank for rank, value in enumerate(hashes) if value != hashes[0]]
        if different:
            ranks = ", ".join(map(str, different))
            raise ValueError(
                f"after step {step} the real edges of rank {ranks} differ from those of rank 0 "
                f"(hashes {', '.join(hashes)}): a rule or layer there depends on more than "
                "weights, gradients and seed, or memory failed. Nothing was saved; continue from "
                "the previous checkpoint with --resume"
            )

    def _call(self, collective: Any, *args: Any, **kwargs: Any) -> None:
        """Run a collective; raise ConnectionError if a process was lost."""
        try:
            collective(*args, group=self._group, **kwargs)
        except RuntimeError as error:
            raise ConnectionError(
                f"rank {self.rank} has lost the other processes ({str(error).splitlines()[0]})"
            ) from error


def wiring_hash(model: nn.Module) -> str:
    """Return a hash of the real edges of a network, and of the state of its rules."""
    digest = hashlib.sha256()
    for name, (ids, _) in real_edges(model).items():
        digest.update(name.encode())
        digest.update(ids.tobytes())
    for entry in selectors(model):
        for name, buffer in entry.selector.named_buffers():
            digest.update(name.encode())
            digest.update(buffer.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
