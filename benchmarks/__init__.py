"""Benchmarks, run as ``python -m benchmarks.training_step`` etc.; results are in this folder."""
