"""Steps of a training run on a GPU that is not there: see tests/fake_gpu.py."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, unset_fake_temporarily

from dnw_graph.analysis.history import HistoryWriter
from tests.fake_gpu import GPU, HostWaitsError, autocast, backward, fake_gpu
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

    precision: torch.dtype | None = None

    def autocast(self) -> Any:
        return autocast(self.precision)


class Processes:
    """A single process."""

    size, rank = 1, 0


def learner_on_gpu(**options: Any) -> Learner:
    """Return a learner whose network is on the fake GPU. Call it within ``fake_gpu``."""
    with unset_fake_temporarily():
        config = RunConfig.of(
            Options.from_flat({**TINY, "out": "run", **options}), open_source("digits")
        )
        network = build_network(config.options, 10)
    fabric: Any = Fabric()
    return Learner(config, network.to(GPU), fabric, ProcessGroup(fabric), 5)


def batch() -> tuple[Tensor, Tensor]:
    images = torch.zeros(64, 3, 8, 8, dtype=torch.uint8, device=GPU)
    return images, torch.zeros(64, dtype=torch.int64, device=GPU)


@pytest.mark.parametrize("rule", ["dnw", "dnw_factored", "rigl(every=2)", "l1_anneal", "random"])
def test_steps_do_not_wait(rule: str) -> None:
    with fake_gpu():
        learner = learner_on_gpu(rule=rule, clip_grad_norm=1.0, label_smoothing=0.1)
        for _ in range(LOOK_EVERY - 1):
            step = learner.step(*batch())
        assert step.loss.device == torch.device(GPU)
        with pytest.raises((HostWaitsError, DataDependentOutputException)):
            learner.step(*batch())  # looks whether results are finite


# A copy of a module asks for the address of each tensor, which is 0 on the fake GPU.
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("option", [{"ema_decay": 0.9}, {"micro_batch_size": 20}], ids=str)
def test_options_do_not_wait(option: dict[str, float]) -> None:
    with fake_gpu():
        learner = learner_on_gpu(**option)
        for _ in range(3):
            learner.step(*batch())
        networks = [learner.plain_model]
        if learner.average is not None:
            networks.append(learner.average.module)
        for network in networks:
            tensors = [*network.parameters(), *network.buffers()]
            assert {tensor.device for tensor in tensors} == {torch.device(GPU)}


def test_a_history_is_written_after_one_copy_of_each_wiring(tmp_path: Path) -> None:
    """Check that ids are sorted on the GPU, and that the copy is all that the host waits for."""
    with fake_gpu():
        learner = learner_on_gpu()
        history = HistoryWriter(tmp_path, learner.plain_model, 5)
        with pytest.raises(HostWaitsError, match=r"copies \[\d+\] from the GPU"):
            history.record(0)
