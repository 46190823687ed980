"""An HTML report on one or several runs: curves, cost, and an interactive view of the wiring.

    python -m train.report RUN [RUN …] [--out report.html]

The file opens offline. ``train.imagenet`` and ``train.cifar10`` write one at the end of a run.
"""
