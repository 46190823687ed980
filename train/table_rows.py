"""The rows of the paper's tables, with its results and those it quotes from others."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Row:
    """A row that can be trained.

    Attributes:
        name: Name of the row in commands and files.
        title: Name of the row in the table.
        recipe: Name of its recipe in ``train/recipes``.
        paper: The paper's top-1 accuracy, and top-5 if the table has it; None if the row is not in
            the paper's table.
        usual: Whether it is trained by default.
        needs: Name of the row whose run with the same seed this row starts from.
        paper_cost: The paper's parameters and multiply-adds.
        smoke: Options that the row needs in the preset ``smoke``, such as a rule that acts more
            often.
    """

    name: str
    title: str
    recipe: str
    paper: str | None
    needs: str | None = None
    paper_cost: str = ""
    usual: bool = True
    smoke: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Quoted:
    """A row quoted from other work, not trained: multiply-adds, parameters, accuracy as printed."""

    title: str
    macs: str
    accuracy: str
    parameters: str = ""
    source: str = "quoted there"


SMOKE = {"epochs": 3, "train_images": 5000, "validation_images": 2000}


@dataclass(frozen=True)
class Table:
    """A table of the paper, or one like it.

    Attributes:
        title: Title of the table.
        rows: Rows that can be trained, in order of training.
        seeds: Runs of each row, as in the paper.
        epochs: Epochs of each run, as in the paper.
        quoted: Rows quoted for comparison.
        classes: Number of classes in its data.
        finds_data: Whether images are downloaded if no folder is given.
        smoke: Options of the preset ``smoke``, which trains 2 seeds.
        top5: Whether it shows top-5 accuracy beside top-1.
        notes: Notes to print below it.
    """

    title: str
    rows: tuple[Row, ...]
    seeds: int
    epochs: int
    quoted: tuple[Quoted, ...] = ()
    classes: int = 1000
    finds_data: bool = True
    smoke: Mapping[str, int] = field(default_factory=lambda: SMOKE)
    top5: bool = False
    notes: tuple[str, ...] = ()


def _row1(name: str, title: str, paper: str | None) -> Row:
    return Row(name, title, f"table1_{name}", paper, usual=paper is not None)


def _row2(name: str, title: str, paper: str | None, needs: str | None = None) -> Row:
    return Row(name, title, f"table2_{name}", paper, needs, usual=paper is not None)


def _frequent2(name: str, title: str) -> Row:
    """Return a row of Table 2 whose rule acts every 10 instead of 100 steps in preset ``smoke``."""
    return Row(
        name, title, f"table2_{name}", None, usual=False, smoke={"rule": f"{name}(every=10)"}
    )


def _row3(name: str, title: str, paper: str, cost: str) -> Row:
    return Row(name, title, f"table3_{name}", paper, paper_cost=cost)


def _row4(name: str, title: str, paper: str) -> Row:
    return Row(name, title, f"table4_{name}", paper)


def _row18(name: str, title: str) -> Row:
    return Row(name, title, f"resnet18_{name}", None)


TABLES = {
    "1": Table(
        title="Table 1: tiny classifiers, CIFAR-10",
        rows=(
            _row1("static_random", "static, random graph", "76.1 ± 0.5"),
            _row1("static_dnw", "static, DNW", "80.9 ± 0.6"),
            _row1("static_dnw_factored", "static, DNW with factored gradients", None),
            _row1("discrete_random", "discrete time, random graph", "77.3 ± 0.7"),
            _row1("discrete_dnw", "discrete time, DNW", "82.3 ± 0.6"),
            _row1("continuous_random", "continuous time, random graph", "78.5 ± 1.2"),
            _row1("continuous_dnw", "continuous time, DNW", "83.1 ± 0.3"),
        ),
        seeds=5,
        epochs=160,
        smoke={"epochs": 2, "train_images": 1500, "validation_images": 500, "batch_size": 128},
    ),
    "2": Table(
        title="Table 2: ways of finding a wiring, CIFAR-10",
        rows=(
            _row2("dnw", "DNW ×0.225", "89.7 ± 0.2"),
            _row2("random", "random graph ×0.225", "87.2 ± 0.1"),
            _row2("mobilenetv1", "MobileNetV1 ×0.25", "86.3 ± 0.2"),
            _row2("no_update", "no update rule", "86.7 ± 0.5"),
            _row2("targeted_dropout", "targeted dropout, ρ = 0.95", "89.2 ± 0.4"),
            _row2("l1_anneal", "L1 + anneal", "84.3 ± 0.6"),
            _row2("complete", "complete graph, starting point of †", None),
            _row2("lottery", "lottery ticket, one shot †", "87.9 ± 0.3", "complete"),
            _row2("fine_tune_0.1", "fine-tune, α = 0.1 †", "89.4 ± 0.2", "complete"),
            _row2("fine_tune_0.01", "fine-tune, α = 0.01 †", "89.7 ± 0.1", "complete"),
            _row2("fine_tune_0.001", "fine-tune, α = 0.001 †", "88.7 ± 0.2", "complete"),
            _frequent2("set", "SET"),
            _frequent2("rigl", "RigL"),
            _frequent2("gse", "GSE"),
            _row2("dnw_factored", "DNW with factored gradients", None),
            _row2("sr_ste", "SR-STE", None),
            _row2("top_kast", "Top-KAST", None),
            _row2("soft_threshold", "ST-3", None),
        ),
        seeds=5,
        epochs=160,
    ),
    "3": Table(
        title="Table 3: ImageNet",
        rows=(
            _row3("mobilenetv1_0.25", "MobileNetV1 ×0.25", "50.6", "0.5M, 41M"),
            _row3("random_0.225", "MobileNetV1-RG ×0.225", "53.3", "1.2M, 55.7M"),
            _row3("dnw_small_0.15", "MobileNetV1-DNW-Small ×0.15", "50.3", "0.24M, 22.1M"),
            _row3("dnw_small_0.225", "MobileNetV1-DNW-Small ×0.225", "59.9", "0.4M, 41.2M"),
            _row3("dnw_0.225", "MobileNetV1-DNW ×0.225", "60.9", "1.1M, 42.1M"),
            _row3("dnw_0.3", "MobileNetV1-DNW ×0.3", "65.0", "1.3M, 66.7M"),
            _row3("mobilenetv1_0.5", "MobileNetV1 ×0.5", "63.7", "1.3M, 149M"),
            _row3("random_0.49", "MobileNetV1-RG ×0.49 (built as ×0.51)", "64.1", "1.8M, 170M"),
            _row3("dnw_0.49", "MobileNetV1-DNW ×0.49", "70.4", "1.8M, 154M"),
        ),
        seeds=1,
        epochs=250,
        quoted=(
            Quoted("X-4 MobileNetV1", "> 50M", "54.0"),
            Quoted("MobileNetV2 ×0.15", "39M", "44.9"),
            Quoted("MobileNetV2 ×0.4", "43M", "56.6"),
            Quoted("DenseNet ×0.5", "42M", "41.1"),
            Quoted("Xception ×0.5", "40M", "55.1"),
            Quoted("ShuffleNetV1 ×0.5", "38M", "56.8"),
            Quoted("ShuffleNetV2 ×0.5", "41M", "60.3", "1.4M"),
            Quoted("MnasNet-search1", "65M", "64.9", "1.9M"),
            Quoted("MobileNetV2 ×0.6", "141M", "66.6"),
            Quoted("MobileNetV2 ×0.75", "145M", "67.9"),
            Quoted("DenseNet ×1", "142M", "54.8"),
            Quoted("Xception ×1", "145M", "65.9"),
            Quoted("ShuffleNetV1 ×1", "140M", "67.4"),
            Quoted("ShuffleNetV2 ×1", "146M", "69.4", "2.3M"),
        ),
        finds_data=False,
    ),
    "4": Table(
        title="Table 4: ResNet-50 with every layer a graph, ImageNet",
        rows=(
            _row4("dense", "dense", "77.5 / 93.7"),
            _row4("dnw_10", "10 % of weights in all layers", "74.0 / 92.0"),
            _row4("dnw_10_first_dense", "10 %, first layer dense", "75.0 / 92.5"),
            _row4("dnw_20", "20 % of weights in all layers", "76.2 / 93.0"),
            _row4("dnw_20_first_dense", "20 %, first layer dense", "76.6 / 93.4"),
            _row4("dnw_30", "30 % of weights in all layers", "76.9 / 93.4"),
            _row4("dnw_30_first_dense", "30 %, first layer dense", "77.1 / 93.5"),
        ),
        seeds=1,
        epochs=100,
        quoted=(
            Quoted("sparse networks from scratch, dense", "", "77.0 / 93.5"),
            Quoted("sparse networks from scratch, 10 %", "", "72.9 / 91.5"),
            Quoted("sparse networks from scratch, 20 %", "", "74.9 / 92.5"),
            Quoted("sparse networks from scratch, 30 %", "", "75.9 / 92.9"),
            Quoted("RigL 1×, ERK, dense", "", "76.8", source="Evci et al. 2020"),
            Quoted("RigL 1×, ERK, 10 %", "", "73.1", source="Evci et al. 2020"),
            Quoted("RigL 1×, ERK, 20 %", "", "75.1", source="Evci et al. 2020"),
            Quoted("STR, dense", "", "77.0", source="Kusupati et al. 2020"),
            Quoted("STR, 9.8 %", "", "74.3", source="Kusupati et al. 2020"),
            Quoted("STR, 18.7 %", "", "76.1", source="Kusupati et al. 2020"),
        ),
        finds_data=False,
        top5=True,
        notes=(
            "Quoted results come from other training protocols. Sparse networks from scratch "
            "(Dettmers and Zettlemoyer 2019) are quoted as printed in the paper. RigL distributes "
            "its budget over layers by size (ERK), which takes nearly twice the multiply-adds of a "
            "uniform distribution (with that and a dense first layer it reaches 72.0 at 10 % and "
            "74.6 at 20 %), and trains real weights only. STR has the batch size, learning rate, "
            "weight decay, warm-up, label smoothing and epochs of this table, but learns how many "
            "weights each layer keeps.",
        ),
    ),
    "resnet18": Table(
        title="torchvision's ResNet-18 with every layer a graph, Imagenette, 64 pixels",
        rows=(
            _row18("dense", "dense"),
            _row18("dnw_20", "20 % of weights, learned"),
            _row18("dnw_factored_20", "20 % of weights, learned, factored gradients"),
            _row18("random_20", "20 % of weights, random"),
            _row18("dnw_5", "5 % of weights, learned"),
            _row18("dnw_factored_5", "5 % of weights, learned, factored gradients"),
            _row18("random_5", "5 % of weights, random"),
        ),
        seeds=2,
        epochs=5,
        classes=10,
        finds_data=False,
    ),
}
