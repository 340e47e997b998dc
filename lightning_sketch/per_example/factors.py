"""Per-example gradients as layers give them: factors, not yet formed where forming would be large.

    Dense(p, v)           grad_b = v_b
    LowRank(p, l, r)      grad_b = sum_t l_bt r_btᵀ              as a matrix, rows of l, columns of r; times `scale`
    SparseRows(p, i, v)   grad_b[i_bt] += v_bt for each t        rows of an embedding's table

b runs over the examples. All factors of a parameter add up to its gradients. The rule of a layer makes factors and
knows nothing of sketches; an accumulator adds factors up and knows nothing of layers.
"""

from dataclasses import dataclass, replace
from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor, nn

from lightning_sketch.autodiff.batches import HALF


@dataclass(frozen=True, eq=False)
class Dense:
    """The gradients themselves, one row per example: for biases, normalizations and whatever is small.

    Attributes:
        parameter: The parameter that the gradients belong to.
        values: The gradients of the examples, (examples, numbers).
        start: Where the row begins in the flat parameter; it may cover only a part, as one of three stacked
            projections does.
    """

    parameter: nn.Parameter
    values: Float[Tensor, "examples numbers"]
    start: int = 0


@dataclass(frozen=True, eq=False)
class Bias:
    """The bias of a layer whose matrix has products as its gradient; its own is the sum of one factor over tokens.

    Attributes:
        parameter: The bias.
        side: Which factor is the gradient of the layer's output, "left" or "right".
        start: Where its numbers begin in the flat bias; they may be a part of it.
    """

    parameter: nn.Parameter
    side: Literal["left", "right"] = "left"
    start: int = 0


@dataclass(frozen=True, eq=False)
class LowRank:
    """The gradients of a matrix as products: sum_t left_t right_tᵀ for each example, row-major.

    Attributes:
        parameter: The parameter that the gradients belong to.
        left: The left factors, (examples, tokens, rows).
        right: The right factors, (examples, tokens, columns).
        start: Where the matrix begins in the flat parameter; it may cover only a part.
        scale: Numbers that multiply the products elementwise, the same for all examples; None for ones.
        bias: The bias of the layer, whose gradient this factor has too, see `separate`; None for none.
    """

    parameter: nn.Parameter
    left: Float[Tensor, "examples tokens rows"]
    right: Float[Tensor, "examples tokens columns"]
    start: int = 0
    scale: Float[Tensor, "rows columns"] | None = None
    bias: Bias | None = None


@dataclass(frozen=True, eq=False)
class SparseRows:
    """The gradients of a table as the rows that each example looked up.

    Attributes:
        parameter: The table, (rows, columns).
        index: Which rows were looked up, (examples, tokens); an index may repeat, and repeated rows add up.
        values: The gradient of each looked-up row, (examples, tokens, columns).
    """

    parameter: nn.Parameter
    index: Int[Tensor, "examples tokens"]
    values: Float[Tensor, "examples tokens columns"]


Factor = Dense | LowRank | SparseRows


class Unsupported(Exception):
    """Raised where a gradient cannot be split into examples; the message gives the reason."""


def separate(factor: Factor) -> list[Factor]:
    """Return the factor as one for each parameter: that of the matrix, and that of the layer's bias if it has one."""
    if not isinstance(factor, LowRank) or factor.bias is None:
        return [factor]
    bias, own = factor.bias, factor.left if factor.bias.side == "left" else factor.right
    return [replace(factor, bias=None), Dense(bias.parameter, own.sum(1), bias.start)]


def wide(tensor: Tensor) -> Tensor:
    """Return the tensor in float32 if it has half precision, and unchanged otherwise."""
    return tensor.float() if tensor.dtype in HALF else tensor
