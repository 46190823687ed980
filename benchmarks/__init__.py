"""Measurements: ``python -m benchmarks.training_step``, and so on; results lie beside them."""
