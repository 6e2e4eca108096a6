"""Benchmarks, a page each (``srum.evaluation.benchmark``)."""
