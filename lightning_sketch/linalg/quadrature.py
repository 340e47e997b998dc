"""The density of all eigenvalues, and their sum, from random starts: stochastic Lanczos quadrature.

    n⁻¹ sum_i f(λ_i) ≈ mean over starts of sum_k w_k f(t_k),     t_k eigenvalues of T_m,  w_k = (e_1ᵀ y_k)²
    tr A ≈ n mean of α_1                                        Hutchinson: α_1 = v_1ᵀ A v_1, E v_1 v_1ᵀ = I / n

It is exact for polynomials f of degree below 2m, up to the draw of v_1. Loss of orthogonality does no harm:
copies of an eigenvalue share its weight.

The standard error of the trace is that of v_1 uniform on the sphere, 2 (||A||_F² - (tr A)² / n) n / (n + 2) for one
start, with ||A||_F² = n E sum_k w_k t_k² from the same run. The largest eigenvalues make most of it, and those are
known: X of them taken out, n v_1ᵀ(I - XXᵀ)A v_1 + tr XᵀAX has the same mean and the variance of what is left.

Sources: Ubaru, Chen & Saad (2017), "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature", SIAM J. Matrix
Anal. Appl. 38(4), doi:10.1137/16M1104974; Hutchinson (1990), doi:10.1080/03610919008812866.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lightning_sketch.linalg.krylov import SketchedRun

_ONE_SHARE = 12.0
"""n w of a single eigenvalue is χ² of one degree, beyond this once in two thousand; of many copies more."""

_SETTLED = 1e-4
"""A node this close to an eigenvalue, relative to it, does not stand for a neighbour as well."""

_TINY = 1e-30
"""A variance of rounding."""

_ON_ITS_WAY = 0.1
"""A node this close to an eigenvalue will settle on it."""

_ALONE = 0.05
"""Values this close, relative to them, may be copies of one that a short run has not told apart yet."""


class Quadrature(NamedTuple):
    """Points that stand for all eigenvalues: a fraction w of them at each t; float64, on the CPU."""

    nodes: Float[Tensor, " q"]
    """t, of all starts one after the other."""
    weights: Float[Tensor, " q"]
    """w, which sum to one."""

    def mean(self, values: Float[Tensor, " q"]) -> float:
        """Return the mean over all eigenvalues of f, given as f(t)."""
        return float(self.weights @ values)

    def density(self, grid: Float[Tensor, " g"], sigma: float) -> Float[Tensor, " g"]:
        """Return the share of eigenvalues per unit, each node smoothed to a Gaussian of width sigma."""
        distance = (grid[:, None].double() - self.nodes) / sigma
        return (-0.5 * distance**2).exp() @ self.weights / (sigma * math.sqrt(2 * math.pi))


class Trace(NamedTuple):
    """The sum of all eigenvalues."""

    value: float
    sem: float
    """Its standard error."""


def quadrature(runs: Sequence[SketchedRun], steps: int) -> Quadrature:
    """From the first steps of each run."""
    nodes, weights = [], []
    for run in runs:
        t, y = torch.linalg.eigh(run.tridiagonal(min(steps, len(run.alpha))))
        nodes.append(t)
        weights.append(y[0] ** 2 / len(runs))
    return Quadrature(torch.cat(nodes), torch.cat(weights))


def trace(
    runs: Sequence[SketchedRun],
    n: int,
    values: Float[Tensor, " r"] | None = None,
    errors: Float[Tensor, " r"] | None = None,
    converged: Bool[Tensor, " r"] | None = None,
) -> Trace:
    """From all runs, with what is known taken out of the draw; runs are weighted by what variance that leaves them.

    Where a run has settled on one of the `values` that have `converged`, its nodes there are replaced by the
    eigenvalue itself, whose error counts in full, and only the rest is estimated; not so where another value,
    converged or not, is near, or the weight is more than one eigenvalue is likely to have.

    What variance is left is estimated from all runs together: from its own draw alone, a run that happened to see
    little would seem sure of it, and pull the mean down.
    """
    if values is None or errors is None or converged is None:
        values = errors = torch.empty(0, dtype=torch.float64)
        converged = torch.empty(0, dtype=torch.bool)
    known = converged & ((values[:, None] - values).abs().le(_ALONE * values[:, None].abs()).sum(1) == 1)
    known, errors = values[known], errors[known]
    spectra, found = [], []
    for run in runs:
        t, y = torch.linalg.eigh(run.tridiagonal(len(run.alpha)))
        settled = _near(known, t) & (run.beta[-1] * y[-1].abs() <= _SETTLED * t.abs())
        few = n * (_near(known, t) * y[0] ** 2).sum(1) < _ONE_SHARE
        spectra.append((t, y[0] ** 2))
        found.append(settled.any(1) & few)
    total = precision = 0.0
    for (t, w), mine in zip(spectra, found, strict=True):
        rest = ~_near(known[mine], t).any(0)
        value = float(known[mine].sum()) + n * float(w[rest] @ t[rest])
        variance = _variance(spectra, runs, known[mine], n) + float(errors[mine].sum()) ** 2
        total += value / max(variance, _TINY)
        precision += 1 / max(variance, _TINY)
    return Trace(total / precision, math.sqrt(1 / precision) if precision < 1 / _TINY else 0.0)


def _variance(
    spectra: Sequence[tuple[Tensor, Tensor]], runs: Sequence[SketchedRun], without: Float[Tensor, " j"], n: int
) -> float:
    """Of n v_1ᵀ A v_1 for one start, A without these eigenvalues, nor what is on its way to them in short runs."""
    squares, trace = [], 0.0
    for (t, w), run in zip(spectra, runs, strict=True):
        rest = ~_near(without, t, _ON_ITS_WAY).any(0)
        squares.append(n * w[rest] * t[rest] ** 2 / len(runs))
        if len(t) == 1:
            squares.append(torch.tensor([n * run.beta[0] ** 2 / len(runs)], dtype=torch.float64))
        trace += n * float(w[rest] @ t[rest]) / len(runs)
    parts = torch.cat(squares)
    frobenius = float(parts.sum())
    unsure = 1 + 2 * float((parts**2).sum()) / max(frobenius**2, 1e-300)  # few nodes tell little of the spread
    return 2 * max(frobenius - trace**2 / n, 0.0) * n / (n + 2) * unsure


def _near(known: Float[Tensor, " k"], nodes: Float[Tensor, " m"], tol: float = _SETTLED) -> Bool[Tensor, "k m"]:
    """Which nodes stand for which eigenvalues."""
    return (known[:, None] - nodes).abs() <= tol * known[:, None].abs()
