"""Gradients of layers that multiply by a matrix or look up its rows.

    Linear       y_t = W x_t + b        grad W = sum_t g_t x_tᵀ,  grad b = sum_t g_t
    Conv1D       y_t = Wᵀ x_t + b       of Hugging Face's GPT-2: the factors are exchanged
    Embedding    y_t = W[i_t]           grad W[i_t] += g_t

x, y and g, the gradient of the loss with respect to y, have the examples along their first axis; t runs over all axes
between the first and the last.
"""

from typing import Literal, cast

from torch import Tensor, nn

from lightning_sketch.per_example.factors import Bias, Factor, LowRank, SparseRows, Unsupported, wide
from lightning_sketch.per_example.rules.registry import built_in


@built_in(nn.Linear)
def linear(module: nn.Module, input: Tensor, gradient: Tensor) -> list[Factor]:
    """Return the factors of `nn.Linear`."""
    return _products(module, input, gradient, transposed=False)


@built_in("transformers.pytorch_utils.Conv1D", "transformers.modeling_utils.Conv1D")
def transposed_linear(module: nn.Module, input: Tensor, gradient: Tensor) -> list[Factor]:
    """Return the factors of `transformers.pytorch_utils.Conv1D`."""
    return _products(module, input, gradient, transposed=True)


@built_in(nn.Embedding)
def embedding(module: nn.Embedding, input: Tensor, gradient: Tensor) -> list[Factor]:
    """Return the factors of `nn.Embedding`.

    Raises:
        Unsupported: with `scale_grad_by_freq` or `max_norm`.
    """
    return [looked_up(module, input.flatten(1) if input.ndim > 1 else input[:, None], gradient)]


def looked_up(module: nn.Embedding, index: Tensor, gradient: Tensor) -> SparseRows:
    """Return the gradients of the rows with these indices (examples, tokens); the padding row gets zero."""
    if module.scale_grad_by_freq:
        raise Unsupported(
            "scale_grad_by_freq divides by counts over the whole batch, so an example's gradient depends on the others"
        )
    if module.max_norm is not None:
        raise Unsupported("max_norm changes the table while it is read")
    values = wide(gradient).reshape(*index.shape, module.embedding_dim)
    if module.padding_idx is not None:
        values = values.masked_fill((index == module.padding_idx)[..., None], 0)
    return SparseRows(cast(nn.Parameter, module.weight), index, values)


def _products(module: nn.Module, input: Tensor, gradient: Tensor, transposed: bool) -> list[Factor]:
    if gradient.ndim < 2:
        raise Unsupported("its input has a single axis, hence no axis of examples")
    weight, bias = cast(nn.Parameter, module.weight), cast(nn.Parameter | None, module.bias)
    input, gradient = _tokens(wide(input)), _tokens(wide(gradient))
    left, right = (input, gradient) if transposed else (gradient, input)
    trained = bias is not None and bias.requires_grad
    side: Literal["left", "right"] = "right" if transposed else "left"
    return [LowRank(weight, left, right, bias=Bias(cast(nn.Parameter, bias), side) if trained else None)]


def _tokens(tensor: Tensor) -> Tensor:
    """Return the tensor in the shape (examples, tokens, numbers)."""
    return tensor[:, None] if tensor.ndim == 2 else tensor.flatten(1, -2)
