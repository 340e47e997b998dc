"""Sketched Rayleigh-Ritz: eigenvalues from the sketches of the Krylov vectors alone.

    min_M || S (A V - V M) ||   =>   M = (S V_m)⁺ (S V_{m+1}) T̄_m

V_m     Lanczos vectors v_1 ... v_m, of which only S v_j is known; A V_m = V_{m+1} T̄_m
S       a sketch that is injective on their span (dim at least twice its rank)
⁺       pseudo-inverse that drops singular values of S V_m below τ times the largest

In floating point V_m loses rank: the tridiagonal matrix then has ghosts, copies of converged eigenvalues that
cannot be distinguished from true multiplicity. The sketch shows the rank, so there are no ghosts. If A x = θ x
with x in the span, then S A x = θ S x for any injective S: converged values are exact, the sketch's error
multiplies the residual only.

Source: Nakatsukasa & Tropp (2024), "Fast and accurate randomized algorithms for linear systems and
eigenvalue problems", SIAM J. Matrix Anal. Appl. 45(2), arXiv:2111.00113, section 6 (sRR).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_sketch.linalg.krylov import SketchedRun


class RitzPairs(NamedTuple):
    """Approximate eigenpairs in falling order, all in float64 on the CPU.

    Attributes:
        values: Ritz values θ, (r,). They are real parts: complex pairs arise among values that have not converged,
            and among equal ones.
        residuals: c ||S (A x - θ x)|| / ||S x|| plus the errors of the products, (r,); some eigenvalue lies within this
            distance of θ. Errors e_j that are known of single products count as independent: (sum_j |c_j e_j|²)^1/2.
        vectors: Sketched eigenvectors S x of length one as columns, (dim, r).
        coefficients: Columns c with x = V c, V the Lanczos vectors of all runs one after the other, (m, r).
    """

    values: Float[Tensor, " r"]
    residuals: Float[Tensor, " r"]
    vectors: Float[Tensor, "dim r"]
    coefficients: Float[Tensor, "m r"]


def rayleigh_ritz(runs: Sequence[SketchedRun], tau: float, defect: float, exact: bool) -> RitzPairs:
    """Return the Ritz pairs of A on the span of the Lanczos vectors of all runs together.

    With a sketch, residuals are multiplied by c = √((1 + e) / (1 - e)), e = √(r / dim): the basis was
    fitted inside the sketch, which makes them too small.

    Args:
        runs: Records of runs on one operator with one sketch, from independent start vectors.
        tau: Singular values of S V below tau times the largest are dropped.
        defect: The relative error of a product A v. In A x, with x = V c, it is multiplied by ||c|| / ||x||.
        exact: Whether S is the identity, so that residuals are exact.
    """
    basis = torch.cat([run.basis() for run in runs], dim=1)
    u, s, wh = torch.linalg.svd(basis, full_matrices=False)
    r = int((s > tau * s[0]).sum())
    u = u[:, :r]
    whitened = wh[:r].T / s[:r]
    image = torch.cat([run.image() for run in runs], dim=1) @ whitened
    theta, y = torch.linalg.eig(u.T @ image)
    rest = image.to(y.dtype) @ y - u.to(y.dtype) @ y * theta
    residuals = rest.norm(dim=0) / y.norm(dim=0)
    if not exact:
        e = math.sqrt(r / len(basis))
        residuals *= math.sqrt((1 + e) / (1 - e))
    residuals += defect * theta.abs().max() * ((whitened.to(y.dtype) @ y).norm(dim=0) / y.norm(dim=0)).clamp(min=1)
    errors = torch.tensor(
        [error for run in runs for error in run.errors or [0.0] * len(run.alpha)], dtype=torch.float64
    )
    if errors.any():
        residuals += ((whitened.to(y.dtype) @ y).abs() * errors[:, None]).norm(dim=0) / y.norm(dim=0)
    # Both of a complex pair, as equal eigenvalues give, have one real part: it and the imaginary one span their plane.
    y = torch.where(theta.imag < 0, y.imag, y.real)
    y /= y.norm(dim=0)
    order = theta.real.argsort(descending=True, stable=True)
    y = y[:, order]
    return RitzPairs(theta.real[order], residuals[order], u @ y, whitened @ y)
