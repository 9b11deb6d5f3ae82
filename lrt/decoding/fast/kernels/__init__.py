"""Triton kernels of one decoding step; imported only where triton is."""

from lrt.decoding.fast.kernels.attention import attention_kernel
from lrt.decoding.fast.kernels.first_and_last import memory_kernel, start_kernel
from lrt.decoding.fast.kernels.products import few_kernel, matrix_kernel, vector_kernel

__all__ = ["attention_kernel", "few_kernel", "matrix_kernel", "memory_kernel", "start_kernel", "vector_kernel"]
