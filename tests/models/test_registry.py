"""Every model in the registry, and what the registry refuses."""

from dataclasses import dataclass

import pytest
import torch

from dnw_graph import NeuralGraph
from models import ModelConfig, create_model, list_models, model_options, register_model
from models.mbv1 import MobileNetV1Config
from models.registry import _MODELS


@pytest.mark.parametrize("name", list_models())
def test_every_model_trains_and_evaluates(name: str) -> None:
    options = {"width": 0.25} if "width" in model_options(name) else {}
    model = create_model(name, num_classes=7, image_size=32, **options)
    images = torch.randn(2, 3, 32, 32)
    torch.nn.functional.cross_entropy(model(images), torch.tensor([1, 5])).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    model.eval()
    assert torch.equal(model(images), model(images))
    assert model(images[:1]).shape == (1, 7)


@pytest.mark.parametrize(
    ("name", "rule"),
    [("mbv1_dnw", "DNW"), ("mbv1_random", "Random"), ("mbv1_complete", "Complete")],
)
def test_a_model_has_its_own_rule_unless_told_another(name: str, rule: str) -> None:
    def rules(name: str, **options: object) -> set[str]:
        model = create_model(name, width=0.25, num_classes=7, image_size=32, **options)
        return {type(m.rule).__name__ for m in model.modules() if isinstance(m, NeuralGraph)}

    assert rules(name) == {rule}
    assert rules("mbv1_dnw", rule=rule.lower()) == {rule}


@pytest.mark.parametrize(("image_size", "stride"), [(32, 1), (64, 1), (65, 2), (224, 2)])
def test_the_stem_strides_over_large_images_only(image_size: int, stride: int) -> None:
    assert MobileNetV1Config(image_size=image_size).stride == stride
    assert MobileNetV1Config(image_size=image_size, stem_stride=3).stride == 3


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "mbv1_dwn",
            {},
            r"unknown model 'mbv1_dwn'; did you mean 'mbv1_dnw'\? \(known: mbv1, mbv1_",
        ),
        ("mbv1_dnw", {"widht": 1}, r"takes no option 'widht'; did you mean 'width'\? \(it takes: "),
        ("mbv1_dnw", {"width": 0}, r"width must be a number above 0, got 0"),
        ("mbv1_dnw", {"width": "0.2"}, r"width must be a number above 0, got '0.2'"),
        ("mbv1_dnw", {"width": float("inf")}, r"width must be a number above 0, got inf"),
        ("mbv1_dnw", {"backend": "sprase"}, r"unknown backend 'sprase'; did you mean 'sparse'"),
        ("mbv1_random", {"rule": "dnw"}, r"mbv1_random takes no option 'rule' \(it takes: num_c"),
        ("mbv1_dnw", {"stem_stride": 10**5}, r"use 800001 pixels or more"),
        ("mbv1_dnw", {"width": 3}, r"width 3 needs .* graph 0, which has 2,048 candidates"),
        ("mbv1_dnw", {"norm_eps": 0.0}, r"norm_eps must be a finite number above 0, got 0.0"),
        ("tiny_static", {"norm_eps": float("inf")}, r"norm_eps must be a finite number above 0"),
        ("mbv1_dnw", {"num_classes": 0}, r"num_classes must be 1 or more"),
        ("mbv1_dnw", {"image_size": 0}, r"image_size must be 1 pixel or more"),
        ("mbv1_dnw", {"stem_stride": "two"}, r"stem_stride must be \"auto\" or 1 or more"),
        ("mbv1_dnw", {"image_size": 8}, r"images of 8 pixels are too small.*use 9 pixels or more"),
        ("mbv1_dnw", {"rule": "dwn"}, r"unknown rule 'dwn'"),
        ("mbv1", {"rule": "dnw"}, r"mbv1 takes no option 'rule' \(it takes: num_classes, image"),
        ("resnet50", {"width": 0.5}, r"resnet50 takes no option 'width' \(it takes: num_classes, "),
        ("resnet18_dnw", {"density": 1.5}, r"density must be a share .* got 1.5"),
        (
            "resnet18_dnw",
            {"rule": "n_of_m"},
            r"n_of_m does not fit conv1 \(its number of input channels is not",
        ),
        ("mbv1", {"image_size": 16, "stem_stride": 2}, r"use 17 pixels or more"),
    ],
)
def test_errors(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model(name, **options)


@pytest.mark.parametrize("name", ["mbv1", "mbv1_dnw"])
def test_all_norms_have_the_same_eps(name: str) -> None:
    def eps(**options: object) -> set[float]:
        model = create_model(name, width=0.25, num_classes=7, image_size=32, **options)
        return {m.eps for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)}

    assert eps() == {1e-3}
    assert eps(norm_eps=1e-5) == {1e-5}


def test_a_name_is_given_once() -> None:
    with pytest.raises(ValueError, match="model 'mbv1' is already registered"):
        register_model("mbv1")(lambda config: torch.nn.Identity())


def test_what_cannot_be_a_model() -> None:
    @dataclass(frozen=True, kw_only=True)
    class NoDefault(ModelConfig):
        hidden: int

    class Bare(ModelConfig):
        hidden: int = 3

    with pytest.raises(TypeError, match="must be called with a name, got <function"):
        register_model(lambda config: torch.nn.Identity())
    with pytest.raises(TypeError, match=r"Bare is not a dataclass: decorate it with @dataclass"):
        register_model("bare", Bare)
    with pytest.raises(TypeError, match=r"each option of NoDefault needs a default, but hidden"):
        register_model("no_default", NoDefault)
    with pytest.raises(TypeError, match=r"is a subclass of ModelConfig, got \{\}"):
        register_model("no_config", {})
    register_model("nothing")(lambda config: None)
    try:
        with pytest.raises(TypeError, match=r"'nothing' must return an nn\.Module, got None"):
            create_model("nothing")
    finally:
        del _MODELS._entries["nothing"]


def test_an_image_smaller_than_promised_is_refused_when_it_comes() -> None:
    model = create_model("mbv1_dnw", width=0.25, num_classes=7, image_size=32)
    with pytest.raises(ValueError, match="too small for stride 2"):
        model(torch.randn(2, 3, 8, 8))
