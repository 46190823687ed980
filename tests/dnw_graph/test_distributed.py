"""Weights made sparse, trained by two processes: replicated, and fully sharded."""

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from dnw_graph import attach, bake, penalty, sparsify, sparsity

RULES = (
    "dnw",
    "random",
    "no_update",
    "set(every=2)",
    "rigl(every=2)",
    "l1_anneal",
    "dnw(freeze_at=0.5)",
    "dnw_factored",
)
COUNTS = [43, 230, 16]
STEPS = 5


def network(rule: str) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)),
    )
    sparsify(net, 0.2, rule=rule)
    return net


def replicated(net: nn.Sequential) -> nn.Module:
    return DistributedDataParallel(net)


def sharded(net: nn.Sequential) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in net:
        if list(layer.parameters()):
            fully_shard(layer, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def trained(net: nn.Sequential, call: nn.Module, rank: int = 0, world: int = 1) -> nn.Sequential:
    """Train on this process' share of the same batches."""
    optimizer = torch.optim.SGD(call.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    torch.manual_seed(1)
    attach(net, optimizer, total_steps=STEPS)
    for step in range(STEPS):
        images = torch.randn(8, 3, 9, 9, generator=torch.Generator().manual_seed(step))
        labels = torch.arange(8) % 5
        optimizer.zero_grad()
        loss = F.cross_entropy(call(images[rank::world]), labels[rank::world])
        (loss + penalty(net)).backward()
        optimizer.step()
    return net


def worker(rank: int, folder: str) -> None:
    """Be one of two processes; write what came of each rule."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found: dict[str, Any] = {}
    for rule in RULES:
        alone = trained(*2 * [network(rule)])
        for wrap in (replicated, sharded):
            net = network(rule)
            trained(net, wrap(net), rank, world=2)
            counts = [layer.nonzero for layer in sparsity(net).layers]
            state = get_model_state_dict(net, options=StateDictOptions(full_state_dict=True))
            error = max(
                float((state[name] - value).abs().max())
                for name, value in alone.state_dict().items()
            )
            again = network(rule)
            again.load_state_dict(state)
            baked = [layer.nonzero for layer in sparsity(bake(again)).layers]
            found[f"{rule} {wrap.__name__}"] = [counts, baked, error]
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_find_what_one_does(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(worker, args=(str(tmp_path),), nprocs=2)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0].keys() == ranks[1].keys()
    assert len(ranks[0]) == 2 * len(RULES)
    for name, (counts, baked, error) in ranks[0].items():
        assert error < 1e-6, name
        assert ranks[1][name][:2] == [counts, baked]
        assert counts == COUNTS, name
        if not name.startswith(("set", "rigl")):  # an edge that has just grown is 0
            assert baked == counts
        assert all(a <= b for a, b in zip(baked, counts, strict=True)), name
