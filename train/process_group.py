"""The processes of a run: this one alone, or those that torchrun started."""

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
from dnw_graph.wiring import selectors


def launched() -> bool:
    """Return whether torchrun started this process."""
    return TorchElasticEnvironment.detect()


def restarted() -> bool:
    """Return whether torchrun started it again, after a process was lost."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0) > 0


def make_fabric(device: str, precision: str, many: bool = False) -> Fabric:
    """Return Lightning Fabric on a device, or on one for each process of torchrun.

    Args:
        device: As in :class:`train.options.RunOptions`.
        precision: Likewise.
        many: Whether the processes that torchrun started work together, if it did.

    Raises:
        ValueError: The device is not there.
    """
    many = many and launched()
    there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if device == "auto":
        device = "cuda" if len(there) > 1 else "cpu"
    if many and device.startswith("cuda:"):
        raise ValueError(f"--device {device} is one device; with torchrun give --device cuda")
    wanted = "cuda:0" if device == "cuda" else device
    if wanted not in there:
        raise ValueError(f"--device {device} is not there; this machine has {', '.join(there)}")
    kind, _, index = wanted.partition(":")
    bits: Any = "bf16-mixed" if precision == "bf16" else "32-true"  # 64 is of the network itself
    if not many:
        devices: Any = [int(index)] if index else 1
        alone = LightningEnvironment()  # also within a job of a cluster
        return Fabric(accelerator=kind, devices=devices, precision=bits, plugins=[alone])
    backend = "gloo" if kind == "cpu" else "nccl"
    _meet(backend)
    here = int(os.environ["LOCAL_WORLD_SIZE"])
    known = signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    sync: dict[str, Any] = {name: False}  # once an epoch is enough: ProcessGroup.share_statistics
    return Fabric(
        accelerator=kind,
        devices=here,
        num_nodes=int(os.environ["WORLD_SIZE"]) // here,
        strategy=DDPStrategy(process_group_backend=backend, **sync),
        precision=bits,
        plugins=[TorchElasticEnvironment()],
    )


def _meet(backend: str) -> None:
    """Let processes find each other, and not those that a restart has replaced.

    What these wrote into the store of torchrun may still be there.
    """
    store, rank, size = next(rendezvous("env://"))
    again = PrefixStore(f"restart-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(backend, store=again, rank=rank, world_size=size)


class ProcessGroup:
    """What the processes of a run agree on; alone, a process agrees with itself.

    Args:
        fabric: Launched.

    Attributes:
        rank: Number of this process.
        size: How many there are.
    """

    def __init__(self, fabric: Fabric) -> None:
        self.rank, self.size = fabric.global_rank, fabric.world_size
        # Small things go by the CPU, so that nothing waits for a GPU.
        self._group: Any = dist.new_group(backend="gloo") if self.size > 1 else None

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0

    def largest(self, *values: int) -> list[int]:
        """Return the largest of each value over all processes.

        Raises:
            ConnectionError: A process is gone.
        """
        if self.size == 1:
            return list(values)
        together = torch.tensor(values)
        self._call(dist.all_reduce, together, op=dist.ReduceOp.MAX)
        return [int(value) for value in together]

    def wait(self) -> None:
        """Wait until all processes are here.

        Raises:
            ConnectionError: A process is gone.
        """
        self.largest(0)

    def gather(self, value: Any) -> list[Any]:
        """Return the values that processes have, by rank.

        Raises:
            ConnectionError: A process is gone.
        """
        found = [value] * self.size
        if self.size > 1:
            self._call(dist.all_gather_object, found, value)
        return found

    def share_statistics(self, model: nn.Module) -> None:
        """Give every process the first one's running statistics of normalisation.

        Each took its own, of its images. What rules remember is left alone: it has to be the same.
        """
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        for buffer in (b for norm in norms for b in norm.buffers() if self.size > 1):
            dist.broadcast(buffer, src=0)

    def check_wiring(self, model: nn.Module, step: int) -> None:
        """Raise a ``ValueError`` where processes have other real edges, or other buffers of rules.

        Args:
            model: The network.
            step: Steps of the optimizer done.
        """
        if self.size == 1:
            return
        found = self.gather(wiring_hash(model))
        apart = [rank for rank, value in enumerate(found) if value != found[0]]
        if apart:
            ranks = ", ".join(map(str, apart))
            raise ValueError(
                f"after step {step} rank {ranks} has other real edges than rank 0 (hashes "
                f"{', '.join(found)}): a rule or layer there depends on more than weights, "
                "gradients and seed, or memory failed. Nothing was saved; go on from the "
                "checkpoint before with --resume"
            )

    def _call(self, collective: Any, *args: Any, **kwargs: Any) -> None:
        try:
            collective(*args, group=self._group, **kwargs)
        except RuntimeError as error:
            raise ConnectionError(
                f"rank {self.rank} has lost the other processes ({str(error).splitlines()[0]})"
            ) from error


def wiring_hash(model: nn.Module) -> str:
    """Return a hash of the real edges of a network, and of what its rules remember."""
    digest = hashlib.sha256()
    for name, (ids, _) in real_edges(model).items():
        digest.update(name.encode())
        digest.update(ids.tobytes())
    for entry in selectors(model):
        for name, buffer in entry.selector.named_buffers():
            digest.update(name.encode())
            digest.update(buffer.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
