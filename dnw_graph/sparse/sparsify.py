"""Any network made sparse: every convolution and linear layer is a graph (section 3.4).

Each weight of such a layer is a candidate edge, from an input at one place of the filter to an
output channel; a rule chooses which of them are real, as in a :class:`NeuralGraph`.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.nn.utils import parametrize

from dnw_graph.sparse.budgets import Spread, budgets_of, patterned
from dnw_graph.sparse.layers import SparseWeight, check_names, layers_of, matches, sparse_layers_of
from dnw_graph.topology import Topology
from dnw_graph.wiring import RULES, Choice, NOfM, Rule


def sparsify(
    module: nn.Module,
    density: float | Mapping[str, float] | None = None,
    *,
    keep_dense: Sequence[str] = (),
    rule: str | Rule | type[Rule] = "dnw",
    spread: Spread = "uniform",
    initial: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Give every convolution and linear weight of a module its own ``k`` real edges, in place.

    Biases and normalisation stay dense. Of a layer with ``E`` weights and density ``d``, ``d E``
    are real, rounded, and at least one.

    Args:
        module: Any network.
        density: Share of weights that are real, 0.1 unless given; or of each layer, by name or
            pattern (``{"layer1.*": 0.5, "*": 0.1}``, the first that matches counts).
        keep_dense: Names or patterns (``"layer4.*"``) of layers that stay as they are.
        rule: How edges are chosen; see docs/rules.md. ``fine_tune`` keeps the largest of the
            weights that the module has now, and ``lottery`` starts from ``initial`` with them.
        spread: How one density is shared out: ``"uniform"``, the same in each layer, as in the
            paper; ``"erk"``, in proportion to inputs + outputs + filter size over their product
            (Mocanu et al. 2018, Evci et al. 2020); ``"global"``, by the magnitudes that weights
            have now, all layers ranked together.
        initial: ``state_dict`` of the module before its training, for the rule ``lottery``.

    Returns:
        The module.

    Raises:
        ValueError: A density outside (0, 1], a name that matches no layer, a module without
            weights, or one that is sparse already.
    """
    rule = RULES.resolve(rule)
    layers = dict(layers_of(module))
    if not layers:
        raise ValueError(
            "there is nothing to make sparse: the module has no convolution or linear layer"
        )
    check_names(keep_dense, layers)
    chosen = {name: layer for name, layer in layers.items() if not matches(name, keep_dense)}
    for name, layer in chosen.items():
        if parametrize.is_parametrized(layer, "weight"):
            raise ValueError(
                f"the weight of {name or 'the module'} is parametrized already: a module is made "
                "sparse once; bake() it first, or name the layer in keep_dense"
            )
    if not chosen:
        raise ValueError("keep_dense names every layer, so there is nothing left to make sparse")
    if isinstance(rule, NOfM):
        budgets = patterned(chosen, rule, density)
    else:
        budgets = budgets_of(chosen, 0.1 if density is None else density, spread)
    trained = {name: layer.weight.detach().clone() for name, layer in chosen.items()}
    if (rule.starts_from == "initial") != (initial is not None):
        raise ValueError(
            "rule lottery needs initial=, the state_dict of the module before its training"
            if initial is None
            else f"initial is for the rule lottery, not for {type(rule).__name__}"
        )
    if initial is not None:
        module.load_state_dict(initial)
    made: dict[int, SparseWeight] = {}  # by id of the parameter: layers may share one
    for name, layer in chosen.items():
        weight = layer.weight
        if id(weight) not in made:
            made[id(weight)] = _sparse_weight(weight, rule, budgets[name], trained[name])
        # Unsafe is what it calls not running the parametrization at once.
        parametrize.register_parametrization(layer, "weight", made[id(weight)], unsafe=True)
    return module


def _sparse_weight(weight: Tensor, rule: Rule, budget: int, trained: Tensor) -> SparseWeight:
    targets = weight.shape[0]
    topology = Topology.layered([weight.numel() // targets, targets])
    choice = Choice(rule, topology, rule.budget(budget, weight.numel()))
    choice.reset(weight)
    if rule.starts_from != "itself":
        rule.inherit(choice.candidates(weight, training=False), choice.flat(trained))
    return SparseWeight(choice)


def bake(module: nn.Module) -> nn.Module:
    """Make the zeros of a sparse module permanent, in place: plain layers, the same outputs.

    Returns:
        The module, whose layers are as they were before :func:`sparsify` but for their values.
    """
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    for _, layer in sparse_layers_of(module):
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    for part, mode in modes:
        part.training = mode
    return module
