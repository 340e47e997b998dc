"""Per-example gradients as layers give them: factors, not yet formed where forming would be large.

    Dense(p, v)           grad_b = v_b
    LowRank(p, l, r)      grad_b = sum_t l_bt r_btᵀ              as a matrix, rows of l, columns of r
    SparseRows(p, i, v)   grad_b[i_bt] += v_bt for each t        rows of an embedding's table

b runs over the examples. All factors of a parameter add up to its gradients. What a factor is added to, an
accumulator, knows sketches and buffers; what makes it, a layer's rule, knows neither.
"""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor, nn

from lightning_sketch.autodiff.batches import HALF


@dataclass(frozen=True, eq=False)
class Dense:
    """Gradients as they are: for biases, norms, and whatever is small.

    `start` is where they begin within the flat parameter; they may cover a part of it, as one of three stacked
    projections does.
    """

    parameter: nn.Parameter
    values: Float[Tensor, "examples numbers"]
    start: int = 0


@dataclass(frozen=True, eq=False)
class LowRank:
    """Gradients of a matrix, as factors: sum_t left_t right_tᵀ, row-major, from `start` in the flat parameter."""

    parameter: nn.Parameter
    left: Float[Tensor, "examples tokens rows"]
    right: Float[Tensor, "examples tokens columns"]
    start: int = 0


@dataclass(frozen=True, eq=False)
class SparseRows:
    """Gradients of a table, as the rows that each example looked up; an index may repeat."""

    parameter: nn.Parameter
    index: Int[Tensor, "examples tokens"]
    values: Float[Tensor, "examples tokens columns"]


Factor = Dense | LowRank | SparseRows


class Unsupported(Exception):
    """Raised by what makes factors: this cannot be split into examples, for the reason that the message tells."""


def wide(tensor: Tensor) -> Tensor:
    """Return the tensor, in float32 if it is of half precision."""
    return tensor.float() if tensor.dtype in HALF else tensor
