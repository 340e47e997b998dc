"""Eigenvalues of large symmetric operators from matrix-vector products: Lanczos, Rayleigh-Ritz, quadrature.

Everything here knows a `LinearOperator` and nothing of models, losses or data.
"""

from lightning_sketch.linalg.deflated import Deflated
from lightning_sketch.linalg.eigenvectors import EigenPairs, eigenvectors
from lightning_sketch.linalg.lanczos import dot, extreme_ritz_values, lanczos, start_vector

__all__ = ["Deflated", "EigenPairs", "dot", "eigenvectors", "extreme_ritz_values", "lanczos", "start_vector"]
