"""Kernels in numba, for CPUs. Importing this package does not import numba; its modules do."""

__all__: list[str] = []
