"""Gradients of layers that multiply by a matrix or look up its rows.

    Linear       y_t = W x_t + b        grad W = sum_t g_t x_tᵀ,  grad b = sum_t g_t
    Conv1D       y_t = Wᵀ x_t + b       of Hugging Face's GPT-2: the factors change places
    Embedding    y_t = W[i_t]           grad W[i_t] += g_t

x, y and g, the gradient of the loss with respect to y, have the examples along their first axis; t runs over all axes
between the first and the last.
"""

from torch import Tensor, nn

from lightning_sketch.gradients.pieces import Full, NotServed, Outer, Piece, Rows, wide


def linear(module: nn.Module, input: Tensor, gradient: Tensor) -> list[Piece]:
    """Pieces of `nn.Linear`."""
    return _products(module, input, gradient, transposed=False)


def transposed_linear(module: nn.Module, input: Tensor, gradient: Tensor) -> list[Piece]:
    """Pieces of `transformers.pytorch_utils.Conv1D`."""
    return _products(module, input, gradient, transposed=True)


def embedding(module: nn.Embedding, input: Tensor, gradient: Tensor) -> list[Piece]:
    """Pieces of `nn.Embedding`.

    Raises:
        NotServed: with `scale_grad_by_freq` or `max_norm`.
    """
    return [looked_up(module, input.flatten(1) if input.ndim > 1 else input[:, None], gradient)]


def looked_up(module: nn.Embedding, index: Tensor, gradient: Tensor) -> Rows:
    """What the rows with these indices (examples, tokens) got; the padding row gets nothing through its table."""
    if module.scale_grad_by_freq:
        raise NotServed("scale_grad_by_freq divides by counts over all examples, which no example has alone")
    if module.max_norm is not None:
        raise NotServed("max_norm changes the table while it is read")
    values = wide(gradient).reshape(*index.shape, module.embedding_dim)
    if module.padding_idx is not None:
        values = values.masked_fill((index == module.padding_idx)[..., None], 0)
    return Rows(module.weight, index, values)


def _products(module: nn.Module, input: Tensor, gradient: Tensor, transposed: bool) -> list[Piece]:
    if gradient.ndim < 2:
        raise NotServed("its input has a single axis, hence no axis of examples")
    input, gradient = _tokens(wide(input)), _tokens(wide(gradient))
    left, right = (input, gradient) if transposed else (gradient, input)
    pieces: list[Piece] = [Outer(module.weight, left, right)]
    if module.bias is not None and module.bias.requires_grad:
        pieces.append(Full(module.bias, gradient.sum(1)))
    return pieces


def _tokens(tensor: Tensor) -> Tensor:
    """(examples, tokens, numbers)."""
    return tensor[:, None] if tensor.ndim == 2 else tensor.flatten(1, -2)
