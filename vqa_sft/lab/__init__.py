"""Benchmarks and ablations that maintainers run. Nobody imports it."""
