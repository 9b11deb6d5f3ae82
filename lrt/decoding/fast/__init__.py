"""Decoding and prefill on the kernels and CUDA graphs of a native model."""
