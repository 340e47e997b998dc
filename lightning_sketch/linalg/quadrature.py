"""The density of all eigenvalues, their sum and that of their squares, by stochastic Lanczos quadrature.

    n⁻¹ sum_i f(λ_i) ≈ mean over starts of sum_k w_k f(t_k),     t_k eigenvalues of T_m,  w_k = (e_1ᵀ y_k)²
    tr A ≈ n mean of α_1                                        Hutchinson: α_1 = v_1ᵀ A v_1, E v_1 v_1ᵀ = I / n
    tr A² ≈ n mean of α_1² + β_1²                               ||A v_1||²

The sum is exact for polynomials f of degree below 2m, up to the draw of v_1. Loss of orthogonality does no harm:
copies of an eigenvalue share its weight.

For B = A or A², the variance of one start, v_1 uniform on the sphere, is 2 (||B||_F² - (tr B)² / n) n / (n + 2), with
||B||_F² from the same run. Most of it comes from the largest eigenvalues, which are known: with their eigenvectors X,
n v_1ᵀ(I - XXᵀ)B v_1 + tr XᵀBX has the same mean, and the variance of the rest only.

Sources: Ubaru, Chen & Saad (2017), "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature", SIAM J. Matrix
Anal. Appl. 38(4), doi:10.1137/16M1104974; Hutchinson (1990), doi:10.1080/03610919008812866.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lightning_sketch.linalg.krylov import SketchedRun

_ONE_SHARE = 12.0  # n w of a simple eigenvalue is χ² of one degree, above this once in 2000; that of copies is larger
_CONVERGED = 1e-4  # a node this close to an eigenvalue, relative to it, does not represent a neighbor as well
_TINY = 1e-30  # a variance that is due to rounding
_CONVERGING = 0.1  # a node this close to an eigenvalue, relative to it, would converge to it in a longer run
_ALONE = 0.05  # values this close to each other, relative to them, may be copies that a short run has not separated


class Quadrature(NamedTuple):
    """Points that represent all eigenvalues: a fraction w of them at each t.

    Attributes:
        nodes: The points t, run after run; (q,), float64, on the CPU.
        weights: The fractions w, which sum to one; (q,), float64, on the CPU.
    """

    nodes: Float[Tensor, " q"]
    weights: Float[Tensor, " q"]

    def mean(self, values: Float[Tensor, " q"]) -> float:
        """Return the mean of a function f over all eigenvalues, from its values f(t) at the nodes."""
        return float(self.weights @ values)

    def density(self, grid: Float[Tensor, " g"], sigma: float) -> Float[Tensor, " g"]:
        """Return the share of all eigenvalues per unit at each grid point, with nodes smoothed to width sigma."""
        distance = (grid[:, None].double() - self.nodes) / sigma
        return (-0.5 * distance**2).exp() @ self.weights / (sigma * math.sqrt(2 * math.pi))


class Trace(NamedTuple):
    """An estimate of the sum of all eigenvalues, or of their squares.

    Attributes:
        value: The estimate.
        sem: Its standard error.
    """

    value: float
    sem: float


def quadrature(runs: Sequence[SketchedRun], steps: int) -> Quadrature:
    """Return nodes and weights from the first `steps` steps of each run."""
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
    *,
    power: Literal[1, 2] = 1,
) -> Trace:
    """Return the sum of all eigenvalues or of their squares, from all runs and the eigenvalues that are known.

    Where a run has converged to a known eigenvalue, its nodes there are replaced by the eigenvalue itself, whose error
    is added in full, and only the rest is estimated. This is not done where another value, converged or not, is near,
    or the weight is more than a simple eigenvalue is likely to have. Runs are weighted by the inverse of the variance
    that remains.

    That variance is estimated from all runs together: estimated from one run alone, a run with small weights by chance
    would have too small a variance, and pull the mean down.

    Args:
        runs: Records of runs on one operator, from independent random start vectors.
        n: The size of the operator.
        values: Ritz values of the operator; without them, `errors` and `converged`, no eigenvalue counts as known.
        errors: How far each value may be off.
        converged: Which of the values are known.
        power: 1 for tr A, 2 for tr A².
    """
    if values is None or errors is None or converged is None:
        values = errors = torch.empty(0, dtype=torch.float64)
        converged = torch.empty(0, dtype=torch.bool)
    known = converged & ((values[:, None] - values).abs().le(_ALONE * values[:, None].abs()).sum(1) == 1)
    known, errors = values[known], errors[known]
    spectra, found = [], []
    for run in runs:
        t, y = torch.linalg.eigh(run.tridiagonal(len(run.alpha)))
        reached = _near(known, t) & (run.beta[-1] * y[-1].abs() <= _CONVERGED * t.abs())
        few = n * (_near(known, t) * y[0] ** 2).sum(1) < _ONE_SHARE
        spectra.append((t, y[0] ** 2))
        found.append(reached.any(1) & few)
    total = precision = 0.0
    for (t, w), run, mine in zip(spectra, runs, found, strict=True):
        rest = ~_near(known[mine], t).any(0)
        value = float((known[mine] ** power).sum()) + n * float(w[rest] @ t[rest] ** power)
        if power == 2:
            value += n * _missing_square(run)
        error = float((power * known[mine].abs() ** (power - 1) * errors[mine]).sum())
        variance = _variance(spectra, runs, known[mine], n, power) + error**2
        total += value / max(variance, _TINY)
        precision += 1 / max(variance, _TINY)
    return Trace(total / precision, math.sqrt(1 / precision) if precision < 1 / _TINY else 0.0)


def _variance(
    spectra: Sequence[tuple[Tensor, Tensor]],
    runs: Sequence[SketchedRun],
    without: Float[Tensor, " j"],
    n: int,
    power: int,
) -> float:
    """Return the variance of n v_1ᵀ B v_1 for one start, B = A or A² with these eigenvalues taken out.

    Nodes that would converge to them in a longer run are left out too.
    """
    squares, trace = [], 0.0
    for (t, w), run in zip(spectra, runs, strict=True):
        rest = ~_near(without, t, _CONVERGING).any(0)
        squares.append(n * w[rest] * t[rest] ** (2 * power) / len(runs))
        squares.append(torch.tensor([n * _missing_square(run) ** power / len(runs)], dtype=torch.float64))
        trace += n * float(w[rest] @ t[rest] ** power) / len(runs)
    parts = torch.cat(squares)
    frobenius = float(parts.sum())
    margin = 1 + 2 * float((parts**2).sum()) / max(frobenius**2, 1e-300)  # few nodes say little about the variance
    return 2 * max(frobenius - trace**2 / n, 0.0) * n / (n + 2) * margin


def _missing_square(run: SketchedRun) -> float:
    """Return β_1² = ||A v_1||² - α_1² of a run of one product, whose single node α_1 does not represent it; else 0."""
    return run.beta[0] ** 2 if len(run.alpha) == 1 else 0.0


def _near(known: Float[Tensor, " k"], nodes: Float[Tensor, " m"], tol: float = _CONVERGED) -> Bool[Tensor, "k m"]:
    """Return which nodes represent which eigenvalues."""
    return (known[:, None] - nodes).abs() <= tol * known[:, None].abs()
