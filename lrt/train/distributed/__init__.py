"""Processes, the parallel plan, CUDA graphs, and sums of gradients on one GPU."""
