"""What every rule promises, and what each one does."""

import copy
import math
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dnw_graph import NeuralGraph, Rule, Topology, attach, inherit, penalty, sparsify
from dnw_graph.wiring import (
    DNW,
    RULES,
    SET,
    Candidates,
    L1Anneal,
    RigL,
    TargetedDropout,
    top_k,
)
from dnw_graph.wiring.targeted_dropout import shares
from tests.conftest import BUDGETED, ready

TOPOLOGY = Topology.layered([6, 8, 5])  # 118 candidates
VARIANTS = [
    *BUDGETED,
    "constant_fan_in(m=3)",
    "dnw(hallucinate_every=3)",
    "dnw(move_from=0.3, freeze_at=0.6)",
    "targeted_dropout(rho=(0.0, 1.0), per_node=True)",
]
FALLING = {"l1_anneal", "soft_threshold"}  # from all edges down to the budget
ALWAYS = {"dnw", "dnw_factored", "sr_ste", "soft_threshold", "complete", "constant_fan_in(m=3)"}
"""Rules under which hallucinated edges have a gradient at every step."""
STILL = {"random", "lottery", "fine_tune", "complete"}
STEPS = 20


def make(rule: str | Rule, seed: int = 0) -> NeuralGraph:
    torch.manual_seed(seed)
    own = isinstance(rule, str) and rule.startswith("constant_fan_in")
    budget = None if own else 31
    return NeuralGraph(TOPOLOGY, rule=rule, num_edges=budget, node="relu", init="uniform")


def train(graph: NeuralGraph, optimizer: torch.optim.Optimizer, steps: int) -> Iterator[int]:
    """Take steps on fixed data, and yield before each."""
    generator = torch.Generator().manual_seed(7)
    data = torch.randn(STEPS, 4, 6, generator=generator)
    goals = torch.randn(STEPS, 4, 5, generator=generator)
    for step in range(STEPS - steps, STEPS):
        yield step
        optimizer.zero_grad()
        loss = (graph(data[step]) - goals[step]).square().sum() + penalty(graph)
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("rule", VARIANTS)
def test_every_rule_keeps_its_budget_at_every_step(rule: str) -> None:
    graph = make(rule)
    optimizer, wirings = ready(graph, STEPS), []
    exact = 118 if rule == "complete" else 39 if rule == "constant_fan_in(m=3)" else 31
    for _ in train(graph, optimizer, STEPS):
        for training in (True, False):
            wiring = graph.wiring(training).validate()
            again = graph.wiring(training)
            assert torch.equal(wiring.edge_id, again.edge_id)  # selecting changes nothing
            if rule in FALLING or (training and rule.startswith("targeted")):
                assert exact <= len(wiring.edge_id) <= 118
            else:
                assert len(wiring.edge_id) == exact
        wirings.append(graph.wiring().edge_id)
    assert len(graph.wiring().edge_id) == exact
    same = [torch.equal(a, b) for a, b in pairwise(wirings)]
    assert all(same) == (rule in STILL)


@pytest.mark.parametrize("rule", VARIANTS)
def test_the_same_seed_gives_the_same_wiring(rule: str) -> None:
    ends = []
    for _ in range(2):
        graph = make(rule, seed=3)
        list(train(graph, ready(graph, STEPS), STEPS))
        ends.append(graph.wiring().edge_id)
    assert torch.equal(*ends)


@pytest.mark.parametrize("rule", VARIANTS)
def test_saving_and_loading_in_the_middle_changes_nothing(rule: str) -> None:
    graph, other = make(rule), make(rule, seed=5)
    optimizer, elsewhere = ready(graph, STEPS), ready(other, STEPS)
    for step in train(graph, optimizer, STEPS):
        if step == 9:
            other.load_state_dict(copy.deepcopy(graph.state_dict()))
            elsewhere.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    list(train(other, elsewhere, STEPS - 9))
    assert torch.equal(graph.wiring(training=True).edge_id, other.wiring(training=True).edge_id)
    assert all(torch.equal(a, b) for a, b in zip(graph.buffers(), other.buffers(), strict=True))
    assert torch.equal(graph.weight, other.weight)


@pytest.mark.parametrize("rule", VARIANTS)
def test_averaged_weights_and_evaluation_choose_without_changing_anything(rule: str) -> None:
    graph = make(rule)
    optimizer = ready(graph, STEPS)
    average = torch.optim.swa_utils.AveragedModel(graph, avg_fn=lambda mean, new, _: new)
    for _ in train(graph, optimizer, STEPS):
        before = copy.deepcopy(graph.state_dict())
        average.eval()(torch.randn(2, 6))
        graph.eval()(torch.randn(2, 6))
        graph.train()
        after = graph.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)
        average.update_parameters(graph)
        assert torch.equal(average.module.wiring().edge_id, graph.wiring().edge_id)


@pytest.mark.parametrize("rule", VARIANTS)
def test_a_rule_says_whether_hallucinated_edges_have_a_gradient(rule: str) -> None:
    graph = make(rule)
    optimizer, seen = ready(graph, STEPS), []
    for _ in train(graph, optimizer, STEPS):
        wiring, x = graph.wiring(training=True), torch.randn(16, 6)
        (grad,) = torch.autograd.grad(graph(x).square().sum(), graph.weight)
        hallucinated = grad[:0] if graph.rule.compact else grad[~wiring.mask]
        seen.append(wiring.straight_through)
        if len(hallucinated):
            some = wiring.straight_through or wiring.others is not None
            assert bool(hallucinated.any()) == some
    always = rule in ALWAYS
    assert all(seen) == always
    if rule == "dnw(hallucinate_every=3)":
        assert seen == [step % 3 == 0 for step in range(STEPS)]
    elif rule == "rigl(every=2)":
        assert seen == [step % 2 == 1 and step < 14 for step in range(STEPS)]
    elif rule == "dnw(move_from=0.3, freeze_at=0.6)":
        assert seen == [6 <= step < 12 for step in range(STEPS)]
    elif not always:
        assert not any(seen)


@pytest.mark.parametrize(
    "rule", ["l1_anneal", "targeted_dropout", "set", "rigl", "dnw(hallucinate_every=2)"]
)
def test_a_timed_rule_asks_to_be_attached(rule: str) -> None:
    graph = make(rule)
    with pytest.raises(ValueError, match=r"call dnw_graph.attach\(model, optimizer, total_steps"):
        graph(torch.randn(2, 6))
    graph.eval()(torch.randn(2, 6))


def test_attach_refuses_what_it_cannot_follow() -> None:
    model = nn.Sequential(nn.Linear(6, 6), make("set(every=2)"))
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with pytest.raises(ValueError, match="does not hold the edge weights of 1; pass it"):
        attach(model, optimizer, total_steps=5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(
        ValueError, match=r"total_steps must be a whole number of steps, 1 or more, got 0"
    ):
        attach(model, optimizer, total_steps=0)
    with pytest.warns(UserWarning, match=r"set changes edges every 100 steps .* never within 50"):
        ready(make("set"), 50)


def test_the_last_optimizer_attached_counts_and_copies_are_on_their_own() -> None:
    graph = make("dnw(hallucinate_every=2)")
    first, second = ready(graph), ready(graph)
    graph(torch.randn(2, 6)).sum().backward()
    twin = copy.deepcopy(graph)
    first.step()
    assert graph.selector.progress(training=True).step == 0
    second.step()
    second.step()
    assert graph.selector.progress(training=True).step == 2
    with pytest.raises(ValueError, match=r"rule dnw needs to follow the steps"):
        twin(torch.randn(2, 6))  # in training, where nobody would count its steps
    ready(twin)
    assert twin.selector.progress(training=True).step == 0


def test_a_state_that_is_loaded_has_to_be_attached_too() -> None:
    graph = make("rigl(every=2)")
    ready(graph)
    other = make("rigl(every=2)")
    other.load_state_dict(graph.state_dict())
    with pytest.raises(ValueError, match=r"rule rigl needs to follow the steps"):
        other(torch.randn(2, 6))
    assert other.eval()(torch.randn(2, 6)).shape == (2, 5)


def test_no_update_lets_decay_and_momentum_act_on_every_candidate() -> None:
    graph = make("no_update")
    hallucinated, before = ~graph.wiring().mask, graph.weight.detach().clone()
    optimizer = torch.optim.SGD(graph.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    graph(torch.randn(2, 6)).sum().backward()
    assert not graph.weight.grad[hallucinated].any()
    optimizer.step()
    shrunk = before[hallucinated] * (1 - 0.1 * 0.01)
    assert torch.allclose(graph.weight.detach()[hallucinated], shrunk, atol=0)


def test_l1_anneal_removes_for_good_and_adds_its_penalty() -> None:
    graph = make(L1Anneal(l1=0.01, until=0.5))
    optimizer, alive, numbers = ready(graph, STEPS), torch.ones(118, dtype=torch.bool), []
    for step in train(graph, optimizer, STEPS):
        mask = graph.wiring(training=True).mask
        assert not (mask & ~alive).any()
        assert not graph.weight[~mask].any()
        numbers.append(int(mask.sum()))
        alive = mask
        left = max(0.0, 1 - step / STEPS / 0.5) ** 3
        assert numbers[-1] == 31 + round(87 * left)
        assert float(penalty(graph).detach()) == pytest.approx(
            0.01 * float(graph.weight.detach().abs().sum())
        )
    assert numbers[0] == 118
    assert numbers[10:] == [31] * 10


def false_alarm(deviations: float) -> float:
    return math.erfc(deviations / math.sqrt(2))


@pytest.mark.parametrize("rho", [0.0, 0.2, 0.95, 1.0])
def test_targeted_dropout_keeps_each_target_with_probability_one_minus_rho(rho: float) -> None:
    """Over 4,000 steps of 87 targets each; false alarm below 1e-4 for all targets together."""
    graph, turns = make(TargetedDropout(rho)), 4000
    optimizer = ready(graph, turns)
    times, pairs, kept = torch.zeros(118), 0, torch.zeros(118, dtype=torch.bool)
    largest = graph.wiring().mask
    for _ in range(turns):
        mask = graph.wiring(training=True).mask
        assert mask[largest].all()
        times += mask
        pairs += int((mask[:-1] & mask[1:] & ~largest[:-1] & ~largest[1:]).sum())
        kept = mask
        optimizer.step()  # without gradients: only the clock moves
    assert kept.any()
    targets = times[~largest]
    deviation = math.sqrt(turns * rho * (1 - rho))
    assert 88 * false_alarm(5.5) < 1e-4
    assert float((targets - turns * (1 - rho)).abs().max()) <= 5.5 * deviation
    # Neighbours are drawn independently: as many pairs as their probability says.
    number = int((~largest[:-1] & ~largest[1:]).sum())
    expected = turns * number * (1 - rho) ** 2
    assert abs(pairs - expected) <= 8 * math.sqrt(2 * turns * number) * (1 - rho)


def test_targeted_dropout_ramps_and_keeps_signs() -> None:
    rule = TargetedDropout(rho=(0.0, 1.0))
    graph = make(rule)
    optimizer, rhos = ready(graph, STEPS), []
    for _ in range(STEPS):
        rhos.append(rule.rho(graph.selector.progress(training=True)))
        optimizer.step()
    assert rhos == pytest.approx([step / STEPS for step in range(STEPS)])
    x = torch.eye(6)
    single = NeuralGraph(Topology.layered([6, 5]), rule=rule, num_edges=30, node="identity").eval()
    assert torch.allclose(single(x).t(), single.weight.view(5, 6))


@given(st.lists(st.integers(1, 6), min_size=2, max_size=4), st.data())
def test_targeted_dropout_per_node_keeps_the_largest_of_each(
    sizes: list[int], data: st.DataObject
) -> None:
    topology = Topology.layered(sizes)
    k = data.draw(st.integers(1, topology.num_candidates))
    graph = NeuralGraph(topology, rule=TargetedDropout(0.5, per_node=True), num_edges=k)
    share, mask = shares(topology, k), graph.wiring().mask
    assert int(share.sum()) == int(mask.sum()) == k
    exact = topology.rowptr.diff() * k / topology.num_candidates
    assert float((share - exact).abs().max()) < 1
    for v in range(topology.num_nodes):
        own = slice(int(topology.rowptr[v]), int(topology.rowptr[v + 1]))
        if share[v]:
            expected = top_k(graph.weight.detach()[own], int(share[v]))
            assert torch.equal(mask[own].nonzero().flatten(), expected)
        else:
            assert not mask[own].any()


@pytest.mark.parametrize("rule", [SET(every=4, fraction=0.4), RigL(every=4, fraction=0.4)])
def test_rewiring_grows_what_it_drops_and_starts_anew(rule: SET | RigL) -> None:
    graph = make(rule)
    optimizer = ready(graph, STEPS)
    mask, changes = graph.wiring().mask, []
    for step in train(graph, optimizer, STEPS):
        now = graph.wiring().mask
        born, died = now & ~mask, mask & ~now
        assert int(born.sum()) == int(died.sum())
        if step in (4, 8, 12):
            share = 0.4 if isinstance(rule, SET) else 0.2 * (1 + math.cos(math.pi * step / 15))
            assert int(born.sum()) == int(share * 31)
            assert not graph.weight[born].any()
            assert not optimizer.state[graph.weight]["momentum_buffer"][born].any()
            survivors = graph.weight.detach()[mask & now].abs()
            assert float(graph.weight.detach()[died].abs().max()) <= float(survivors.min())
        changes.append(int(born.sum()))
        mask = now
    assert [step for step, n in enumerate(changes) if n] == [4, 8, 12]  # until 15


def test_rigl_grows_where_the_gradient_is_largest() -> None:
    graph = make(RigL(every=1, fraction=0.5))
    ready_ = ready(graph, STEPS)
    x, before = torch.randn(9, 6), graph.wiring().mask
    graph(x).square().sum().backward()
    size = graph.weight.grad.abs()
    ready_.step()
    born = graph.wiring().mask & ~before
    share = 0.25 * (1 + math.cos(math.pi / 15))
    assert int(born.sum()) == int(share * 31)
    assert float(size[born].min()) >= float(size[~before & ~born].max())


def test_set_grows_every_candidate_alike() -> None:
    """False alarm below 1e-4 over all 118 candidates."""
    grown, turns = torch.zeros(118), 600
    expected = torch.zeros(118)
    for seed in range(turns):
        graph = make(SET(every=1, fraction=0.3), seed)
        optimizer, before = ready(graph, STEPS), graph.wiring().mask
        optimizer.step()
        grown += graph.wiring().mask & ~before
        expected += ~before * (9 / 87)
    assert 118 * false_alarm(5.5) < 1e-4
    assert bool(((grown - expected).abs() < 5.5 * expected.sqrt()).all())


def complete_model() -> nn.Sequential:
    graph = NeuralGraph(TOPOLOGY, rule="complete", node="norm_relu_conv")
    return nn.Sequential(graph, nn.Flatten(), nn.Linear(125, 3))


@pytest.mark.parametrize(("rule", "start"), [("lottery", "initial"), ("fine_tune", "trained")])
def test_inherited_wirings_keep_the_largest_trained_weights(rule: str, start: str) -> None:
    x = torch.randn(4, 6, 5, 5)
    complete = complete_model()
    complete(x)
    initial = copy.deepcopy(complete.state_dict())
    optimizer = torch.optim.SGD(complete.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        complete(x).square().sum().backward()
        optimizer.step()
    trained = copy.deepcopy(complete.state_dict())
    model = complete_model()
    model[0] = NeuralGraph(TOPOLOGY, rule=rule, num_edges=31)
    with pytest.raises(ValueError, match=r"trained complete graph: call dnw_graph.inherit first"):
        model(x)
    inherit(model, initial=initial, trained=trained)
    assert torch.equal(model[0].wiring().edge_id, top_k(trained["0.weight"], 31))
    given = {"initial": initial, "trained": trained}[start]
    assert all(torch.equal(v, given[k]) for k, v in model.state_dict().items() if k in given)


def test_inherit_refuses_other_models_and_rules() -> None:
    graph = make("lottery")
    other = NeuralGraph(Topology.layered([6, 9, 5]), rule="complete", node="relu").state_dict()
    with pytest.raises(ValueError, match="weights of another model: they differ at weight"):
        inherit(graph, initial=other, trained=other)
    with pytest.raises(ValueError, match="only models with rule lottery or fine_tune"):
        inherit(make("dnw"), initial=other, trained=other)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("targeted_dropout(rho=1.5)", r"rho must be a probability.*got 1.5"),
        ("targeted_dropout(rho=(0, 0.5, 1))", r"a pair of first and last"),
        ("rigl(fraction=0)", r"fraction must be a share of the edges.*got 0"),
        ("set(every=0)", r"every must be a whole number of steps, 1 or more, got 0"),
        ("set(until=2)", r"until must be a share of the training.*got 2"),
        ("l1_anneal(l1=-1)", r"l1 must be 0 or more, got -1"),
        ("l1_anneal(until=0)", r"until must be a share.*got 0"),
        ("dnw(hallucinate_every=0)", r"hallucinate_every must be a whole number .* got 0"),
        ("dnw(move_from=0.5, freeze_at=0.5)", r"0 <= move_from < freeze_at <= 1, got 0.5 and 0.5"),
        (
            "dnw(freeze=0.5)",
            r"dnw has no argument 'freeze' \(known: hallucinate_every, move_from, freeze",
        ),
        ("random(seed=3)", r"random has no argument 'seed' \(known: none\)"),
        ("rigl(every=x)", r"cannot be parsed; write rigl\(argument=value, ...\)"),
        ("rigl(50)", r"cannot be parsed; write rigl"),
        ("rigl(every='a')", r"every must be a whole number of steps, .* got 'a'"),
        ("rigll(every=5)", r"unknown rule 'rigll'; did you mean 'rigl'"),
    ],
)
def test_errors(rule: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(rule)


class Loudest(Rule):
    """A rule of a user's, with a state, a penalty and something to do after a step."""

    timed = True

    def init_state(self, candidates: Candidates) -> dict[str, Tensor]:
        return {"loud": torch.zeros_like(candidates.weight)}

    def select(self, candidates: Candidates) -> Tensor:
        return top_k(candidates.state["loud"] + 1e-3 * candidates.weight, candidates.num_edges)

    def after_step(self, candidates: Candidates, grad: Tensor | None, forget: object) -> None:
        candidates.state["loud"].lerp_(grad.abs(), 1 / candidates.progress.step)


class ReplacesState(Loudest):
    def after_step(self, candidates: Candidates, grad: Tensor | None, forget: object) -> None:
        candidates.state["loud"] = candidates.state["loud"] + 1


@pytest.mark.parametrize(
    ("method", "value", "message"),
    [
        ("init_state", None, r"init_state of rule Wrong must return a dictionary of tensors"),
        ("init_state", {"loud": 0.0}, r"must return a dictionary of tensors.*got \{'loud': 0.0\}"),
        ("init_state", {"clock": torch.zeros(3)}, r"cannot name a tensor 'clock'"),
        (
            "edge_weight",
            torch.ones(3),
            r"edge_weight of rule Wrong must return weights \[\d+\], got",
        ),
        ("hallucinated_weight", torch.ones(3), r"must return weights \[118\], got \[3\]"),
        ("penalty", torch.ones(3), r"must return one number, as a tensor .* got \[3\]"),
        ("penalty", 0.1, r"must return one number, as a tensor of shape \[\], or None, got 0.1"),
    ],
)
def test_methods_that_return_something_else(method: str, value: object, message: str) -> None:
    wrong = type("Wrong", (Loudest,), {method: lambda *_: value})

    def step() -> None:
        graph = make(wrong())
        for _ in train(graph, ready(graph, STEPS), 1):
            penalty(graph)

    with pytest.raises((ValueError, TypeError), match=message):
        step()


def test_state_changes_in_place_only() -> None:
    graph = make(ReplacesState())
    with pytest.raises(
        ValueError, match=r"assigned candidates.state\['loud'\].*change .* in place"
    ):
        list(train(graph, ready(graph, STEPS), 1))


def test_a_state_is_not_the_weights() -> None:
    rule = type("Alias", (Loudest,), {"init_state": lambda _, c: {"loud": c.weight}})()
    graph = make(rule)
    assert graph.selector.loud.data_ptr() != graph.weight.data_ptr()


def test_what_cannot_be_registered() -> None:
    with pytest.raises(TypeError, match="registers a rule must be called with a name, got <class"):
        RULES.register(Loudest)
    with pytest.raises(TypeError, match="a rule is a subclass of Rule, got <class"):
        RULES.register("relu")(nn.ReLU)
    with pytest.raises(ValueError, match="to use a custom one, import its module first"):
        make("my_own_one")


def test_a_rule_of_ones_own_may_ask_for_the_same() -> None:
    graph = make(Loudest())
    optimizer, grads = ready(graph, STEPS), []
    for _ in train(graph, optimizer, STEPS):
        if graph.weight.grad is not None:
            grads.append(graph.weight.grad.abs().clone())
            mean = torch.stack(grads).mean(0)
            assert torch.allclose(graph.selector.loud, mean, rtol=1e-4, atol=1e-6)


def test_a_clock_is_read_from_its_device_after_loading_only() -> None:
    graph = make(DNW(hallucinate_every=2))
    optimizer = ready(graph, STEPS)
    read = []
    clock = graph.selector._buffers["clock"] = graph.selector.clock.as_subclass(Noted)
    clock.read = read
    list(train(graph, optimizer, 5))
    clock.copy_(clock.clone())  # as DDP does in each forward pass
    list(train(graph, optimizer, 2))
    assert read == []
    graph.load_state_dict(graph.state_dict())
    graph(torch.randn(2, 6))
    assert read == [1]


@pytest.mark.parametrize("writes", range(1, 9))
def test_the_clock_of_a_copy_is_what_was_written_to_it(writes: int) -> None:
    graph = make(DNW(hallucinate_every=2))
    optimizer = ready(graph, STEPS)
    list(train(graph, optimizer, 2))
    average = copy.deepcopy(graph)
    for step in range(1, writes + 1):
        average.selector.clock.copy_(torch.tensor([10 + step, STEPS, 0]))
    assert average.selector.progress(training=False).step == 10 + writes


class Noted(torch.Tensor):
    """A tensor that notes when the host asks for its values."""

    def tolist(self) -> list[int]:
        self.read.append(1)
        return super().tolist()


@pytest.mark.filterwarnings("ignore")  # of the compiler's own
@pytest.mark.parametrize("rule", ["dnw(hallucinate_every=3)", "rigl(every=2)", "targeted_dropout"])
def test_timed_rules_survive_compilation(rule: str) -> None:
    plain = make(rule)
    compiled = copy.deepcopy(plain)
    for graph, call in ((plain, plain), (compiled, torch.compile(compiled))):
        optimizer = ready(graph, STEPS)
        for step in range(6):
            optimizer.zero_grad()
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
            call(x).square().sum().backward()
            optimizer.step()
    assert torch.equal(plain.wiring().edge_id, compiled.wiring().edge_id)
    assert torch.allclose(plain.weight, compiled.weight, rtol=1e-4, atol=1e-6)


def test_n_of_m_in_a_graph() -> None:
    graph = NeuralGraph(Topology.layered([8, 8, 4]), rule="n_of_m(n=1, m=4)", node="relu")
    mask = graph.wiring().mask.view(-1, 4)
    assert bool((mask.sum(1) == 1).all())
    assert graph.num_edges == graph.topology.num_candidates // 4
    graph.weight.data.fill_(0.5)
    assert graph.wiring().mask.view(-1, 4)[:, 0].all()  # among equals, the first
    with pytest.raises(ValueError, match=r"groups of 4 at each node, but node '?\w+'? has 6"):
        NeuralGraph(TOPOLOGY, rule="n_of_m")
    with pytest.raises(
        ValueError, match=r"2 of 4 edges are 64 of 128, not 5: do not pass num_edges"
    ):
        NeuralGraph(Topology.layered([8, 8, 4]), rule="n_of_m", num_edges=5)


def test_constant_fan_in_keeps_the_largest_into_each_node() -> None:
    topology = Topology.random_dag("erdos_renyi", 30, 4, 5, p=0.4)
    graph = NeuralGraph(topology, rule="constant_fan_in(m=3)", node="relu")
    counts = topology.rowptr.diff()
    assert graph.num_edges == int(counts.clamp_max(3).sum())
    assert f"num_edges={graph.num_edges:,}" in repr(graph)
    wiring = graph.wiring().validate()
    assert torch.equal(wiring.rowptr.diff(), counts.clamp_max(3))
    for v in range(topology.num_nodes):
        first, past = topology.rowptr[v : v + 2].tolist()
        sizes = graph.weight[first:past].detach().abs().numpy()
        largest = first + np.argsort(-sizes, kind="stable")[:3]
        chosen = wiring.edge_id[wiring.rowptr[v] : wiring.rowptr[v + 1]]
        assert chosen.tolist() == sorted(largest.tolist())
    with torch.no_grad():
        graph.weight.fill_(0.5)  # equal ones: the first
    assert graph.wiring().edge_id[:3].tolist() == list(range(min(3, int(counts.max()))))[:3]
    with pytest.raises(ValueError, match=r"3 edges into each node are .* not 7"):
        NeuralGraph(topology, rule="constant_fan_in(m=3)", num_edges=7)
    with pytest.raises(ValueError, match="m must be a whole number of edges"):
        NeuralGraph(topology, rule="constant_fan_in(m=0)")
    layer = sparsify(nn.Conv2d(8, 6, 3), rule="constant_fan_in(m=5)")
    assert (layer.weight != 0).flatten(1).sum(1).tolist() == [5] * 6
