"""Training: optimizers, the parallel plan, checkpoints, metrics and the loop that joins them."""
