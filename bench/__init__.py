"""Benchmarks: interleaved timing of every adapter path against the frozen layer and the public baselines."""
