"""What a step does beside the network: parts, clipping, mixing, averaging, noticing nonsense."""

from pathlib import Path

import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from train.average import averaged
from train.data import open_source
from train.evaluate import evaluate
from train.imagenet import train
from train.learner import Learner, NotFiniteError
from train.loop import start_training
from train.metrics import Normalize
from train.options import OptimizationOptions, Options
from train.process_group import ProcessGroup
from train.run import RunConfig
from train.step import Gradients, Step, seed_step, why_not_finite

TINY = {
    **{"graph": "tiny_static", "data": "digits", "image_size": 8, "batch_size": 64, "epochs": 1},
    **{"train_images": 320, "validation_images": 90, "device": "cpu", "report": False, "lr": 0.05},
}


def options(out: Path, **changes: object) -> Options:
    return Options.from_flat({**TINY, "out": str(out), **changes})


def gradients(**fit: float) -> tuple[nn.Module, Gradients]:
    """Return a network whose images do not know of each other, and what computes its gradients."""
    torch.manual_seed(0)
    config = RunConfig.of(Options.from_flat(TINY), open_source("digits"))
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 10)).double()
    fabric = Fabric(accelerator="cpu", devices=1)
    wrapped, normalize = fabric.setup_module(model), Normalize(config.mean, config.std).double()
    options = OptimizationOptions(batch_size=50, **fit)
    return model, Gradients(fabric, wrapped, model, normalize, options, num_classes=10)


IMAGES = torch.randint(256, (50, 3, 8, 8), generator=torch.Generator().manual_seed(1)).byte()
LABELS = torch.arange(50) % 10


@pytest.mark.parametrize("size", [1, 7, 25, 50, 80])
def test_gradients_of_parts_add_up_to_those_of_the_whole(size: int) -> None:
    whole, once = gradients()
    expected = once(IMAGES, LABELS)
    model, in_parts = gradients(micro_batch_size=size)
    step = in_parts(IMAGES, LABELS)
    assert step.loss.item() == pytest.approx(expected.loss.item(), rel=1e-12)
    assert torch.allclose(step.logits, expected.logits)
    for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-10)


class Small(nn.Module):
    """A network for which memory suffices up to a number of images."""

    def __init__(self, most: int, details: str = "More") -> None:
        super().__init__()
        self.most, self.details, self.linear = most, details, nn.Linear(192, 10)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.most:
            message = "CUDA out of memory. Tried to allocate 3.00 GiB."
            raise torch.OutOfMemoryError(f"{message}\n{self.details}")
        logits: Tensor = self.linear(x.flatten(1))
        return logits


@pytest.mark.parametrize(
    ("most", "micro", "advice"),
    [
        (20, None, "12 images at a time fit: use --micro-batch-size 12"),
        (49, None, "25 images at a time fit: use --micro-batch-size 25"),
        (6, 25, "6 images at a time fit: use --micro-batch-size 6"),
        (0, None, "not even one image fits"),
    ],
)
def test_a_batch_that_does_not_fit_into_memory_is_told_what_would(
    most: int, micro: int | None, advice: str
) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    changes = {} if micro is None else {"micro_batch_size": micro}
    config = RunConfig.of(
        Options.from_flat({**TINY, "batch_size": 50, **changes}), open_source("digits")
    )
    learner = Learner(config, Small(most), fabric, ProcessGroup(fabric), steps_per_epoch=5)
    with pytest.raises(torch.OutOfMemoryError, match=rf"allocate 3.00 GiB. Of the batch, {advice}"):
        learner.step(IMAGES, LABELS)


@pytest.mark.parametrize("unused", ["5.25 GiB", "12.00 MiB"])
def test_memory_in_pieces_is_told(unused: str) -> None:
    """Check that a setting is advised if PyTorch holds much memory that it does not use."""
    fabric = Fabric(accelerator="cpu", devices=1)
    config = RunConfig.of(Options.from_flat({**TINY, "batch_size": 50}), open_source("digits"))
    details = f"Of the allocated memory 9.00 GiB is allocated by PyTorch, and {unused} is reserved "
    model = Small(20, details + "by PyTorch but unallocated.")
    learner = Learner(config, model, fabric, ProcessGroup(fabric), steps_per_epoch=5)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        learner.step(IMAGES, LABELS)
    advice = f"{unused} more are free, but not in one piece: the environment variable PYTORCH_ALLOC"
    assert (advice in str(caught.value)) == unused.endswith("GiB")


def test_long_gradients_are_cut_and_their_norm_is_told() -> None:
    whole, once = gradients()
    norm = once(IMAGES, LABELS).grad_norm
    flat = torch.cat([p.grad.flatten() for p in whole.parameters()])
    assert norm.item() == pytest.approx(flat.norm().item())
    model, cut = gradients(clip_grad_norm=float(norm) / 4)
    assert cut(IMAGES, LABELS).grad_norm.item() == pytest.approx(norm.item())
    shorter = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert torch.allclose(shorter, flat / 4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixed_images_have_mixed_labels(kind: str) -> None:
    _, mixed = gradients(**{kind: 1.0})
    seen = []
    mixed.model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    seed_step(0, 3, 0)
    loss = mixed(IMAGES, LABELS).loss
    inputs, plain = seen[0], mixed.normalize(IMAGES)
    other = plain.roll(1, 0)
    if kind == "mixup":
        share = float(((inputs - other) / (plain - other))[plain != other].median())
        assert torch.allclose(inputs, plain * share + other * (1 - share), atol=1e-6)
    else:
        own = (inputs == plain).all(1)
        assert ((inputs == plain) | (inputs == other)).all()
        share = float(own.double().mean())
    logits = mixed.model(inputs)
    targets = torch.eye(10)[LABELS] * share + torch.eye(10)[LABELS.roll(1)] * (1 - share)
    expected = torch.nn.functional.cross_entropy(logits, targets.double())
    assert loss.item() == pytest.approx(expected.item(), rel=0.02)
    seed_step(0, 3, 0)
    assert mixed(IMAGES, LABELS).loss == loss  # a step that is done again draws the same


def test_the_average_follows_the_weights(tmp_path: Path) -> None:
    training = start_training(options(tmp_path / "run", ema_decay=0.9))
    average, expected = training.learner.average, None
    assert average is not None
    for images, labels in training.batches.train(0):
        training.learner.step(images, labels)
        now = training.plain_model.state_dict()
        if expected is None:
            expected = {k: v.clone() for k, v in now.items()}
        else:
            expected = {
                k: 0.9 * v + 0.1 * now[k] if v.is_floating_point() else now[k].clone()
                for k, v in expected.items()
            }
    for name, value in average.module.state_dict().items():
        assert torch.allclose(value, expected[name], atol=1e-6), name


def test_edges_of_an_average_are_those_it_would_choose() -> None:
    from dnw_graph import NeuralGraph, Topology

    graph = NeuralGraph(Topology.layered([4, 6, 3]), num_edges=10, node="relu")
    average = averaged(graph, 0.5)
    average.update_parameters(graph)
    with torch.no_grad():
        graph.weight.copy_(torch.randn_like(graph.weight))
    average.update_parameters(graph)
    assert average.module.wiring().edge_id.tolist() == sorted(
        average.module.weight.abs().topk(10).indices.tolist()
    )


def test_the_average_is_measured_and_saved(tmp_path: Path) -> None:
    summary = train(options(tmp_path / "run", ema_decay=0.5))
    measured = evaluate(str(tmp_path / "run"), weights="ema", device="cpu")
    assert measured["top1"] == summary["ema_top1"]
    rows = (tmp_path / "run" / "metrics.csv").read_text()
    assert "ema_top1" in rows


def test_the_first_module_that_goes_wrong_is_named() -> None:
    class Root(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x - 1).log()

    model = nn.Sequential(nn.Linear(3, 3), Root(), nn.Linear(3, 2))
    nowhere = Step(torch.tensor(torch.nan), torch.zeros(1), torch.tensor(torch.nan))
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.zero_()
    told = why_not_finite(model, torch.ones(2, 3), nowhere)
    assert told == "the first output that is not finite is that of 1 (Root)"
    with torch.no_grad():
        model[2].bias[0] = torch.inf
    assert why_not_finite(model, torch.ones(2, 3), nowhere) == "the weights 2.bias are not finite"
    fine = Step(torch.tensor(1.0), torch.zeros(1), torch.tensor(torch.inf))
    told = why_not_finite(nn.Linear(3, 3), torch.ones(2, 3), fine)
    assert told == "all outputs are finite, and the loss is 1"


def test_weights_do_not_change_in_a_step_that_is_not_finite(tmp_path: Path) -> None:
    training = start_training(options(tmp_path / "run"))
    for parameter in training.plain_model.parameters():
        parameter.register_hook(lambda grad: grad * torch.inf)
        break
    before = {k: v.clone() for k, v in training.plain_model.named_parameters()}
    images, labels = next(iter(training.batches.train(0)))
    with pytest.raises(
        NotFiniteError, match=r"gradient is (nan|inf) in epoch 1 at step 1 \(1 in total\).* all out"
    ):
        training.learner.step(images, labels)
    for name, value in training.plain_model.named_parameters():
        assert torch.equal(value, before[name])
