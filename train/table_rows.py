"""What the paper's tables hold: its rows, its figures, and what it quotes from others."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """A row that can be trained.

    Attributes:
        name: What it is called in commands and files.
        title: What it is called in the table.
        recipe: Of ``train/recipes``.
        paper: The paper's top-1 accuracy; None for what is not in the paper's table.
        needs: Row that each seed starts from.
        paper_cost: The paper's parameters and multiply-adds.
    """

    name: str
    title: str
    recipe: str
    paper: str | None
    needs: str | None = None
    paper_cost: str = ""


@dataclass(frozen=True)
class Quoted:
    """A row that the paper quotes: multiply-adds, parameters and accuracy as printed there."""

    title: str
    macs: str
    accuracy: str
    parameters: str = ""


@dataclass(frozen=True)
class Table:
    """A table of the paper.

    Attributes:
        title: What it shows.
        rows: What can be trained, in the order in which it is.
        seeds: Runs of each row in the paper.
        epochs: Epochs of each run in the paper.
        quoted: What it compares with.
        finds_data: Whether images are downloaded where no folder is given.
    """

    title: str
    rows: tuple[Row, ...]
    seeds: int
    epochs: int
    quoted: tuple[Quoted, ...] = ()
    finds_data: bool = True


def _row2(name: str, title: str, paper: str | None, needs: str | None = None) -> Row:
    return Row(name, title, f"table2_{name}", paper, needs)


def _row3(name: str, title: str, paper: str, cost: str) -> Row:
    return Row(name, title, f"table3_{name}", paper, paper_cost=cost)


TABLES = {
    "2": Table(
        title="Table 2: ways of finding a wiring, CIFAR-10",
        rows=(
            _row2("dnw", "DNW ×0.225", "89.7 ± 0.2"),
            _row2("random", "random graph ×0.225", "87.2 ± 0.1"),
            _row2("mobilenetv1", "MobileNetV1 ×0.25", "86.3 ± 0.2"),
            _row2("no_update", "no update rule", "86.7 ± 0.5"),
            _row2("targeted_dropout", "targeted dropout, ρ = 0.95", "89.2 ± 0.4"),
            _row2("l1_anneal", "L1 + anneal", "84.3 ± 0.6"),
            _row2("complete", "the complete graph that † start from", None),
            _row2("lottery", "lottery ticket, one shot †", "87.9 ± 0.3", "complete"),
            _row2("fine_tune_0.1", "fine-tune, α = 0.1 †", "89.4 ± 0.2", "complete"),
            _row2("fine_tune_0.01", "fine-tune, α = 0.01 †", "89.7 ± 0.1", "complete"),
            _row2("fine_tune_0.001", "fine-tune, α = 0.001 †", "88.7 ± 0.2", "complete"),
            _row2("set", "SET", None),
            _row2("rigl", "RigL", None),
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
}
