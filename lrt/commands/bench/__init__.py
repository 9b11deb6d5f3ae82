"""Benchmarks: training steps, decoding, and the tolerance of prefill."""
