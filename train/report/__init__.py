"""One HTML file about a run, or several: curves, cost, the wiring to look at and walk through.

    python -m train.report RUN [RUN …] [--out report.html]

It opens without a network. ``train.imagenet`` and ``train.cifar10`` write one at the end of a run.
"""

from train.report.page import write_report

__all__ = ["write_report"]
