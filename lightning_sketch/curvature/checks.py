"""Refuse what no spectrum can be measured with: arguments, and operators that are not linear or not symmetric."""

from jaxtyping import Float
from torch import Tensor

from lightning_sketch.curvature.krylov import NOT_FINITE
from lightning_sketch.curvature.lanczos import defect
from lightning_sketch.operators.base import LinearOperator

_REFUSED = 0.05
_ASYMMETRIC = 30  # times the defect of linearity; both are rounding where all is well


def checked_defect(
    operator: LinearOperator, u: Float[Tensor, " n"], v: Float[Tensor, " n"], random: bool = False
) -> float:
    """How far the operator is from linear on u and v; refused above 0.05, as is one far less symmetric than linear.

    `random`: u and v are independent, so that uᵀA v is smaller than ||A v|| by √n, and with it what is asymmetric.
    """
    linearity, symmetry = defect(operator, u, v)
    symmetry *= len(u) ** 0.5 if random else 1
    if not linearity < float("inf"):
        raise ValueError(NOT_FINITE)
    if linearity > _REFUSED:
        raise ValueError(
            f"the operator is not linear: A(u + v) differs from A u + A v by {linearity:.1%}. A loss that changes "
            "between calls does this: live dropout, batches that are drawn anew at each pass. Fix the batches and use "
            "mode='eval'."
        )
    if symmetry > _ASYMMETRIC * max(linearity, 1e-5):
        raise ValueError(
            f"the operator is not symmetric: uᵀA v and vᵀA u differ by {symmetry:.1%}. A custom autograd function "
            "whose backward cannot be differentiated itself does this (a fused kernel); write it with plain "
            "operations, or mark it with once_differentiable to have it named."
        )
    return linearity


def check_hvp(hvp: str) -> None:
    """Refuse an unknown way to a Hessian product."""
    ways = ("auto", "double_backward", "forward_over_reverse", "finite_differences")
    if hvp not in ways:
        raise ValueError(f"hvp is one of {', '.join(ways)}, got {hvp!r}.")


def check_arguments(
    num_matvecs: int,
    dim: int,
    top_k: int,
    bottom_k: int,
    tol: float,
    density_probes: int = 0,
    density_matvecs: int = 32,
    method: str = "lanczos",
    n: int | None = None,
) -> None:
    """Refuse what no spectrum can be measured with; n is the size of the operator, where it is known."""
    if method not in ("lanczos", "projected"):
        raise ValueError(f"method is 'lanczos' or 'projected', got {method!r}.")
    if min(top_k, bottom_k) < 0 or top_k + bottom_k == 0:
        raise ValueError(f"need top_k, bottom_k >= 0 and one above 0, got top_k={top_k}, bottom_k={bottom_k}.")
    if num_matvecs < top_k + bottom_k:
        raise ValueError(
            f"num_matvecs={num_matvecs} products show at most {num_matvecs} eigenvalues, asked for top_k={top_k} and "
            f"bottom_k={bottom_k}; raise num_matvecs, 96 is usual."
        )
    if density_probes < 0 or density_matvecs < 1:
        raise ValueError(
            f"need density_probes >= 0 and density_matvecs >= 1, got {density_probes} and {density_matvecs}; "
            "3 and 32 are usual."
        )
    vectors = num_matvecs + density_probes * max(density_matvecs, num_matvecs // 4)
    if method == "lanczos" and dim < min(n or dim + 1, 2 * vectors):
        raise ValueError(
            f"need dim >= {2 * vectors}, twice num_matvecs + density_probes density_matvecs, to tell the Lanczos "
            f"vectors apart, got dim={dim}."
        )
    if not 0 <= tol < 1:
        raise ValueError(f"need 0 <= tol < 1, got tol={tol}; 1e-2 is usual.")
