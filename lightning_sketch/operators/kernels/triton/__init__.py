"""Kernels in Triton, for CUDA devices. Importing this package does not import triton; its modules do."""

__all__: list[str] = []
