"""Rules follow trainings of every kind: restored, resumed, and with optimizers of others."""

import copy
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dnw_graph import NeuralGraph, Topology, attach

STEPS = 20


def make(rule: str = "l1_anneal", num_edges: int = 40) -> NeuralGraph:
    torch.manual_seed(0)
    return NeuralGraph(Topology.layered([6, 9, 5]), num_edges=num_edges, rule=rule, node="relu")


def step(graph: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    graph(torch.randn(4, 6)).square().mean().backward()
    optimizer.step()


def sgd(graph: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(graph.parameters(), lr=0.05)


@pytest.mark.parametrize("rule", ["l1_anneal", "rigl(every=2)", "dnw_factored"])
@pytest.mark.parametrize("restored_first", [True, False])
def test_a_training_goes_on_from_a_checkpoint_loaded_before_or_after(
    rule: str, restored_first: bool
) -> None:
    whole = make(rule)
    optimizer = sgd(whole)
    attach(whole, optimizer, total_steps=STEPS)
    for number in range(STEPS):
        if number == 12:
            saved = copy.deepcopy((whole.state_dict(), optimizer.state_dict()))
        torch.manual_seed(number)
        step(whole, optimizer)

    resumed = make(rule)
    optimizer = sgd(resumed)
    if restored_first:
        resumed.load_state_dict(saved[0])
        attach(resumed, optimizer, total_steps=STEPS)
    else:
        attach(resumed, optimizer, total_steps=STEPS)
        resumed.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    for number in range(12, STEPS):
        torch.manual_seed(number)
        step(resumed, optimizer)
    assert torch.equal(resumed.wiring().edge_id, whole.wiring().edge_id)
    assert torch.equal(resumed.weight, whole.weight)
    assert len(resumed.wiring().edge_id) == 40


class Training(lightning.LightningModule):
    """Attaches in ``configure_optimizers``, which Lightning calls after it restores the module."""

    def __init__(self) -> None:
        super().__init__()
        self.graph = make()

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return self.graph(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = sgd(self.graph)
        attach(self.graph, optimizer, total_steps=STEPS)
        return optimizer


@pytest.mark.filterwarnings("ignore")
def test_lightning_resumes_rules(tmp_path: Any) -> None:
    images = DataLoader(TensorDataset(torch.randn(40, 6)), batch_size=4)  # 10 steps per epoch
    quiet = {
        **{"logger": False, "enable_progress_bar": False, "enable_model_summary": False},
        **{"accelerator": "cpu", "default_root_dir": tmp_path},
    }
    first = lightning.Trainer(max_epochs=1, **quiet)
    first.fit(Training(), images)
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed = Training()
    trainer = lightning.Trainer(max_epochs=2, **quiet)
    trainer.fit(resumed, images, ckpt_path=tmp_path / "half.ckpt")
    assert int(resumed.graph.selector.clock[0]) == STEPS
    assert len(resumed.graph.wiring().edge_id) == 40


def trained(steps: int) -> NeuralGraph:
    graph = make()
    optimizer = sgd(graph)
    attach(graph, optimizer, total_steps=STEPS)
    for _ in range(steps):
        step(graph, optimizer)
    return graph


def loaded(steps: int) -> NeuralGraph:
    graph = make()
    graph.load_state_dict(trained(steps).state_dict())
    return graph


@pytest.mark.parametrize(
    ("graph", "total_steps", "restart", "clock", "warning"),
    [
        (lambda: loaded(12), STEPS, None, 12, None),
        (lambda: loaded(12), 30, None, 12, None),
        (lambda: loaded(STEPS), STEPS, None, 0, "step 20 of 20 and are set to 0"),
        (lambda: loaded(STEPS), 30, None, 0, "step 20 of 20 and are set to 0"),
        (lambda: loaded(STEPS), 30, False, STEPS, None),
        (lambda: loaded(12), 10, None, 0, "step 12 of 20 and are set to 0"),
        (lambda: loaded(12), STEPS, True, 0, None),
        (lambda: loaded(0), STEPS, None, 0, None),
        (lambda: trained(12), STEPS, None, 0, "step 12 of 20 and are set to 0"),
        (lambda: trained(12), STEPS, False, 12, None),
        (lambda: trained(12), STEPS, True, 0, None),
        (make, STEPS, None, 0, None),
    ],
)
def test_clocks_that_are_set_to_0_are_reported(
    graph: Callable[[], NeuralGraph],
    total_steps: int,
    restart: bool | None,
    clock: int,
    warning: str | None,
) -> None:
    model = graph()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attach(model, sgd(model), total_steps=total_steps, restart=restart)
    assert model.selector.clock[:2].tolist() == [clock, total_steps]
    assert [warning] * (warning is not None) == [
        warning if warning and warning in str(one.message) else str(one.message) for one in caught
    ]


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation as it is usually written: two steps, neither called ``step``."""

    def __init__(self, params: Iterable[nn.Parameter], rho: float = 0.05) -> None:
        super().__init__(params, {"rho": rho})
        self.base_optimizer = torch.optim.SGD(self.param_groups, lr=0.05)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["ascent"] = p.grad * group["rho"]
                p.add_(self.state[p]["ascent"])

    @torch.no_grad()
    def second_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(self.state[p]["ascent"])
        self.base_optimizer.step()


class Lookahead(torch.optim.Optimizer):
    """Wraps an optimizer, and is told of its steps by a method of another name."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def update(self) -> None:
        self.inner.step()


def sam_round(graph: NeuralGraph, sam: SAM) -> None:
    for move in (sam.first_step, sam.second_step):
        sam.zero_grad()
        graph(torch.randn(4, 6)).square().mean().backward()
        move()


@pytest.mark.parametrize("rule", ["rigl(every=2)", "l1_anneal", "gse(every=2)", "dnw_factored"])
def test_an_optimizer_whose_step_is_not_called_is_reported(rule: str) -> None:
    graph = make(rule)
    sam = SAM(graph.parameters())
    attach(graph, sam, total_steps=STEPS)
    sam_round(graph, sam)
    with pytest.warns(UserWarning, match=r"3 times without a step .* optimizer.base_optimizer"):
        sam_round(graph, sam)


def test_an_optimizer_that_wraps_another_one_is_reported() -> None:
    graph = make()
    lookahead = Lookahead(sgd(graph))
    attach(graph, lookahead, total_steps=STEPS)
    for _ in range(3):
        graph(torch.randn(4, 6)).square().mean().backward()
        lookahead.update()
    with pytest.warns(UserWarning, match=r"3 times without a step"):
        graph(torch.randn(4, 6)).square().mean().backward()


@pytest.mark.filterwarnings("error")
def test_the_inner_optimizer_can_be_attached() -> None:
    graph = make()
    sam = SAM(graph.parameters())
    attach(graph, sam.base_optimizer, total_steps=STEPS)
    for _ in range(STEPS):
        sam_round(graph, sam)
    assert len(graph.wiring().edge_id) == 40
    assert int(graph.selector.clock[0]) == STEPS


@pytest.mark.filterwarnings("error")
def test_nothing_is_reported_of_accumulated_gradients_closures_and_evaluation() -> None:
    graph = make()
    optimizer = torch.optim.LBFGS(graph.parameters(), lr=0.01, max_iter=8)
    attach(graph, optimizer, total_steps=STEPS)
    x = torch.randn(4, 6)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = graph(x).square().mean()
        loss.backward()
        return loss

    for _ in range(4):
        optimizer.step(closure)
    first = sgd(graph)
    attach(graph, first, total_steps=STEPS, restart=True)
    average = copy.deepcopy(graph.state_dict())
    for _ in range(6):
        for _ in range(10):  # many passes to a step
            graph(x).square().mean().backward()
        first.step()
        kept = copy.deepcopy(graph.state_dict())
        graph.load_state_dict(average)  # weights are swapped to evaluate an average
        graph.eval()(x)
        graph.load_state_dict(kept)
        graph.train()


def test_what_is_removed_looks_at_nothing() -> None:
    graph = make("rigl(every=2)")
    attach(graph, sgd(graph), total_steps=STEPS).remove()
    assert not graph.weight._post_accumulate_grad_hooks


def test_a_clock_that_was_loaded_long_ago_is_not_kept() -> None:
    graph = loaded(12)
    optimizer = sgd(graph)
    first = attach(graph, optimizer, total_steps=STEPS)
    step(graph, optimizer)
    first.remove()
    with pytest.warns(UserWarning, match="step 13 of 20 and are set to 0"):
        attach(graph, optimizer, total_steps=STEPS)


@pytest.mark.filterwarnings("error")
def test_weights_may_be_perturbed_several_times_between_steps() -> None:
    graph = make()
    optimizer = sgd(graph)
    attach(graph, optimizer, total_steps=STEPS)
    step(graph, optimizer)
    for _ in range(5):
        graph(torch.randn(4, 6)).square().mean().backward()
        with torch.no_grad():
            graph.weight.add_(0.01 * torch.randn_like(graph.weight))
    optimizer.step()
    assert int(graph.selector.clock[0]) == 2
