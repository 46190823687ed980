"""Steps of a training run on a GPU that is not there: see tests/fake_gpu.py."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException

from tests.fake_gpu import GPU, HostWaitsError, backward, fake_gpu
from tests.train.test_step import TINY
from train.data import open_source
from train.learner import LOOK_EVERY, Learner
from train.options import Options
from train.process_group import ProcessGroup
from train.run import RunConfig, build_network


class Fabric:
    """What a learner needs of Lightning Fabric, on the fake GPU."""

    device, world_size, global_rank = torch.device(GPU), 1, 0

    def setup_module(self, module: nn.Module) -> nn.Module:
        return module  # it is there already

    def backward(self, loss: Tensor) -> None:
        backward(loss)

    @contextmanager
    def no_backward_sync(self, module: nn.Module, enabled: bool) -> Iterator[None]:
        yield

    def autocast(self) -> Any:
        return nullcontext()


class Processes:
    """A single process."""

    size, rank = 1, 0


@pytest.mark.parametrize("rule", ["dnw", "dnw_factored", "rigl(every=2)", "l1_anneal", "random"])
def test_steps_do_not_wait(rule: str) -> None:
    options = {"rule": rule, "clip_grad_norm": 1.0, "label_smoothing": 0.1}
    config = RunConfig.of(
        Options.from_flat({**TINY, "out": "run", **options}), open_source("digits")
    )
    network = build_network(config.options, 10)
    with fake_gpu():
        fabric: Any = Fabric()
        learner = Learner(config, network.to(GPU), fabric, ProcessGroup(fabric), 5)
        images = torch.zeros(64, 3, 8, 8, dtype=torch.uint8, device=GPU)
        labels = torch.zeros(64, dtype=torch.int64, device=GPU)
        for _ in range(LOOK_EVERY - 1):
            step = learner.step(images, labels)
        assert step.loss.device == torch.device(GPU)
        with pytest.raises((HostWaitsError, DataDependentOutputException)):
            learner.step(images, labels)  # looks whether results are finite
