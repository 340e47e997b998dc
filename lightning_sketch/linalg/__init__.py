"""Eigenvalues of large symmetric operators from matrix-vector products: Lanczos, Rayleigh-Ritz, quadrature.

All of it works on a `LinearOperator`; models, losses and data do not appear here.
"""

from lightning_sketch.linalg.deflated import Deflated
from lightning_sketch.linalg.eigenvectors import EigenPairs, eigenvectors
from lightning_sketch.linalg.lanczos import dot, extreme_ritz_values, lanczos, start_vector

__all__ = ["Deflated", "EigenPairs", "dot", "eigenvectors", "extreme_ritz_values", "lanczos", "start_vector"]
