"""Plain formulas in place of operations whose higher derivatives PyTorch has wrong, lacks or forbids.

While a `PlainFormulas` is active, a call of such an operation computes the same value from operations that can be
differentiated any number of times:

    always                the second derivative is wrong: weight norm on CPU, linear_cross_entropy by chunks; or
                          missing: embedding bags, cdist, pdist, CTC and margin losses of classes, hardsigmoid,
                          fused attention
    derivative in loss    the third derivative is wrong: layer, batch and instance norm
    forward AD            through the backward pass is missing: mse, Huber and soft margin loss, silu, mish, logit,
                          group norm; or wrong: solve, det, slogdet, logdet

Not seen: operations called from C++, from TorchScript, or as torch.ops.aten.*.
"""

import math
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, no_type_check

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

_Table = dict[Callable[..., Any], Callable[..., Any]]


class PlainFormulas(TorchFunctionMode):
    """Replace, while active, operations with wrong or missing higher derivatives by plain ones of equal value.

    Gradients are equal too, but for two that are not those of their function: `scale_grad_by_freq` of embeddings is
    ignored, and that of CTC loss is right for any input, not of a log_softmax only. Enter it around the loss and all of
    its derivatives, since activation checkpointing computes the loss again in the backward pass.

    Args:
        derivative_in_loss: Whether the loss takes a derivative itself, as with forces, gradient penalties and
            physics-informed networks: its second derivatives are third ones of the layers. Norms are slower then.
        forward_ad: Whether derivatives along a direction are carried through the backward pass.

    Attributes:
        took_derivative: Whether a derivative was taken inside, in any way. Read it after the loss, before
            derivatives of your own; it may be set to False again.

    >>> layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(3, 1))
    >>> x = torch.randn(3, requires_grad=True)
    >>> with PlainFormulas() as formulas:
    ...     loss = layer(x).square().sum()
    ...     before = formulas.took_derivative
    ...     (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    >>> before, formulas.took_derivative
    (False, True)
    """

    def __init__(self, *, derivative_in_loss: bool = False, forward_ad: bool = False):
        super().__init__()
        self.took_derivative = False
        self._formulas: _Table = {**_ALWAYS}
        self.include(derivative_in_loss=derivative_in_loss, forward_ad=forward_ad)

    def include(self, *, derivative_in_loss: bool = False, forward_ad: bool = False) -> None:
        """Replace further operations from now on; the arguments are those of the class."""
        if derivative_in_loss:
            self._formulas |= _DERIVATIVE_IN_LOSS
        if forward_ad:
            self._formulas |= _FORWARD_AD

    @no_type_check  # by the tests, for which a check at each operation of a loss takes most of their time
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the formula in place of the operation, or the operation if there is none."""
        formula = self._formulas.get(func)
        if formula is None:
            return func(*args, **(kwargs or {}))
        if func in _DERIVATIVES:
            self.took_derivative = True
        if func in _BODIES:
            with self:
                return formula(*args, **(kwargs or {}))
        return formula(*args, **(kwargs or {}))


def _body(function: Any) -> Any:
    """Return a Python function of torch that does its work without asking modes first, so that one sees what it calls.

    A mode is off while it handles a call; a function called from it again with the mode on would ask it again.
    """
    asks = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    names = {**function.__globals__, **dict.fromkeys(asks, lambda *_: False)}
    body = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    body.__kwdefaults__ = function.__kwdefaults__
    return body


# Attention and lookups.


def _attention(*args: Any, **kwargs: Any) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*args, **kwargs)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _embedding(
    weight: Tensor, indices: Tensor, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False
) -> Tensor:
    return torch.embedding(weight, indices, padding_idx, False, sparse)


def _embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the bags and, as torch does, which one each index is in, their sizes, and the rows with the maxima."""
    bags = len(offsets) - include_last_offset
    position = torch.arange(len(indices), dtype=offsets.dtype, device=offsets.device)
    bag = torch.searchsorted(offsets, position, right=True) - 1  # that after the last one is cut off below
    counted = torch.ones_like(indices) if padding_idx is None else (indices != padding_idx % len(weight)).long()
    sizes = bag.new_zeros(len(offsets) + 1).index_add(0, bag, counted.to(bag.dtype))[:bags]
    if mode == 2:
        values = forward_ad.unpack_dual(weight.detach()).primal
        options = (False, mode, False, None, include_last_offset, padding_idx)
        rows = torch.embedding_bag(values, indices, offsets, *options)[3].long().clamp_min(0)
        return torch.where(sizes[:, None] > 0, weight.gather(0, rows), 0), bag, sizes, rows
    factors = counted if per_sample_weights is None else per_sample_weights * counted
    terms = _wide(F.embedding(indices, weight)) * factors[:, None]
    total = terms.new_zeros(len(offsets) + 1, weight.shape[1]).index_add(0, bag, terms)[:bags]
    means = total / sizes.clamp_min(1)[:, None] if mode == 1 else total
    return means.to(weight.dtype), bag, sizes, sizes


# Distances: the root has no derivative at zero; there PyTorch's gradient is zero, and so is every derivative here.


def _power(x: Tensor, exponent: float | int) -> Tensor:
    """Return x^exponent for x >= 0, with all derivatives zero at x = 0."""
    zero = x <= 0
    return torch.where(zero, 0, torch.where(zero, 1, x).pow(exponent))


def _norm(x: Tensor, p: float | int) -> Tensor:
    if p == 2:
        return _power(x.square().sum(-1), 0.5)
    if p == math.inf:
        return x.abs().amax(-1)
    return _power(_power(x.abs(), p).sum(-1), 1 / p)


def _cdist(
    x1: Tensor, x2: Tensor, p: float | int = 2.0, compute_mode: str = "use_mm_for_euclid_dist_if_necessary"
) -> Tensor:
    if p == 0:  # piecewise constant
        return torch.cdist(x1, x2, p, compute_mode)
    large = max(x1.shape[-2], x2.shape[-2]) > 25
    by_product = {"use_mm_for_euclid_dist_if_necessary": large, "use_mm_for_euclid_dist": True}
    if p != 2 or not by_product.get(compute_mode, False):
        return _norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p)
    squares1, squares2 = (x.square().sum(-1, keepdim=True) for x in (x1, x2))
    left = torch.cat([-2 * x1, squares1, torch.ones_like(squares1)], -1)
    right = torch.cat([x2, torch.ones_like(squares2), squares2], -1)
    return _power(left @ right.mT, 0.5)


def _pdist(x: Tensor, p: float | int = 2.0) -> Tensor:
    if p == 0:
        return torch.pdist(x, p)
    i, j = torch.triu_indices(len(x), len(x), 1, device=x.device)
    return _norm(x[i] - x[j], p)


# Losses, from C++ names, which get `reduction` as a number.


def _reduced(losses: Tensor, reduction: int) -> Tensor:
    return losses.mean() if reduction == 1 else losses.sum() if reduction == 2 else losses


def _multi_margin_loss(
    x: Tensor,
    target: Tensor,
    p: float | int = 1,
    margin: float | int = 1.0,
    weight: Tensor | None = None,
    reduction: int = 1,
) -> Tensor:
    label = target.reshape(*x.shape[:-1], 1)
    losses = F.relu(margin - x.gather(-1, label) + x) ** p
    losses = losses * (torch.arange(x.shape[-1], device=x.device) != label)
    losses = losses if weight is None else losses * weight[label]
    return _reduced(losses.mean(-1), reduction)


def _multilabel_margin_loss(x: Tensor, target: Tensor, reduction: int = 1) -> Tensor:
    listed = (target >= 0).long().cumprod(-1)  # labels end at the first negative number
    width = int(listed.sum(-1).max())
    labels, listed = target[..., :width].clamp_min(0), listed[..., :width]
    others = torch.zeros_like(target).scatter_add(-1, labels, listed) == 0
    losses = F.relu(1 - x.gather(-1, labels).unsqueeze(-1) + x.unsqueeze(-2))
    losses = losses * listed.unsqueeze(-1) * others.unsqueeze(-2)
    return _reduced(losses.sum((-2, -1)) / x.shape[-1], reduction)


def _ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Any,
    target_lengths: Any,
    blank: int = 0,
    reduction: int = 1,
    zero_infinity: bool = False,
) -> Tensor:
    """Sum over alignments by the recursion of Graves et al. (2006), section 4.1, doi:10.1145/1143844.1143891."""
    emitted = _wide(log_probs if log_probs.dim() == 3 else log_probs[:, None])
    times, batch, classes = emitted.shape
    steps, sizes = (torch.as_tensor(n, device=emitted.device).reshape(-1, 1) for n in (input_lengths, target_lengths))
    if targets.dim() == 1:
        targets = torch.nn.utils.rnn.pad_sequence(list(targets.split(sizes.flatten().tolist())), batch_first=True)
    labels = targets.new_full((batch, 2 * targets.shape[1] + 1), blank).long()
    labels[:, 1::2] = targets.clamp(0, classes - 1)  # what comes after the end may be any number
    impossible = -1e30  # a logarithm that can be differentiated, unlike -inf
    emitted = emitted.gather(2, labels.expand(times, -1, -1)).clamp_min(impossible)
    width = labels.shape[1]
    distinct = labels != F.pad(labels, (2, 0), value=blank)[:, :width]
    paths = torch.where(torch.arange(width, device=labels.device) < 2, emitted[0], impossible)
    for t in range(1, times):
        one, two = (F.pad(paths, (back, 0), value=impossible)[:, :width] for back in (1, 2))
        further = torch.stack([paths, one, torch.where(distinct, two, impossible)]).logsumexp(0) + emitted[t]
        paths = torch.where(t < steps, further, paths)
    last_label = torch.where(sizes > 0, paths.gather(1, (2 * sizes - 1).clamp_min(0)), impossible)
    losses = -torch.cat([paths.gather(1, 2 * sizes), last_label], 1).logsumexp(1)
    losses = torch.where(losses > -impossible / 2, 0.0 if zero_infinity else math.inf, losses)
    losses = losses / sizes.flatten().clamp_min(1) if reduction == 1 else losses
    return _reduced(losses if log_probs.dim() == 3 else losses[0], reduction).to(log_probs.dtype)


def _linear_cross_entropy(*args: Any, options: Any = None, **kwargs: Any) -> Tensor:
    return F.linear_cross_entropy(*args, **kwargs)  # without the options by which it goes through chunks


def _mse_loss(x: Tensor, target: Tensor, reduction: int = 1) -> Tensor:
    return _reduced((x - target).square(), reduction)


def _huber_loss(x: Tensor, target: Tensor, reduction: int = 1, delta: float | int = 1.0) -> Tensor:
    gap = x - target
    losses = torch.where(gap.abs() < delta, 0.5 * gap.square(), delta * (gap.abs() - 0.5 * delta))
    return _reduced(losses, reduction)


def _soft_margin_loss(x: Tensor, target: Tensor, reduction: int = 1) -> Tensor:
    return _reduced(-F.logsigmoid(x * target), reduction)


# Activations.


def _hardsigmoid(x: Tensor) -> Tensor:
    return F.relu6(x + 3) / 6


def _silu(x: Tensor) -> Tensor:
    return x * x.sigmoid()


def _mish(x: Tensor) -> Tensor:
    return x * F.softplus(x).tanh()


def _logit(x: Tensor, eps: float | None = None) -> Tensor:
    x = x if eps is None else x.clamp(eps, 1 - eps)
    return (x / (1 - x)).log()


def _in_place(formula: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: x.copy_(formula(x.clone()))


# Norms.


def _wide(x: Tensor) -> Tensor:
    """Return x in float32, in which torch computes norms and sums of narrower types, or in its own wider type."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _standardized(x: Tensor, dims: list[int], eps: float | int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (x - mean) / sqrt(variance + eps) over these dimensions, the mean, and the factor."""
    mean = _wide(x).mean(dims, keepdim=True)
    centered = _wide(x) - mean
    factor = (centered.square().mean(dims, keepdim=True) + eps).rsqrt()
    return centered * factor, mean, factor


def _scaled(z: Tensor, weight: Tensor | None, bias: Tensor | None, x: Tensor) -> Tensor:
    """Return weight z + bias in the type of x."""
    z = z if weight is None else z * weight
    return (z if bias is None else z + bias).to(x.dtype)


def _per_channel(vector: Tensor | None, x: Tensor) -> Tensor | None:
    return None if vector is None else vector.view(-1, *[1] * (x.dim() - 2))


def _native_layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float | int
) -> tuple[Tensor, Tensor, Tensor]:
    z, mean, factor = _standardized(x, list(range(-len(shape), 0)), eps)
    return _scaled(z, weight, bias, x), mean.detach(), factor.detach()  # torch has no derivative of these two


def _layer_norm(
    x: Tensor,
    shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | int = 1e-5,
    cudnn: bool = True,
) -> Tensor:
    return _native_layer_norm(x, shape, weight, bias, eps)[0]


def _group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | int = 1e-5,
    cudnn: bool = True,
) -> Tensor:
    z = _standardized(x.reshape(len(x), groups, -1), [-1], eps)[0].view_as(x)
    return _scaled(z, _per_channel(weight, x), _per_channel(bias, x), x)


def _by_statistics_of(norm: Callable[..., Tensor], dims_of: Callable[[Tensor], list[int]]) -> Callable[..., Tensor]:
    """Return a formula for batch or instance norm; running statistics are updated by torch's own operation.

    Where these statistics are used, and not those of the input, torch's derivatives are right.
    """

    def formula(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        of_input: bool,
        momentum: float | int,
        eps: float | int,
        cudnn: bool,
    ) -> Tensor:
        if not of_input:
            return norm(x, weight, bias, running_mean, running_var, of_input, momentum, eps, cudnn)
        if running_mean is not None:
            with torch.no_grad():
                norm(x, None, None, running_mean, running_var, of_input, momentum, eps, cudnn)
        return _scaled(_standardized(x, dims_of(x), eps)[0], _per_channel(weight, x), _per_channel(bias, x), x)

    return formula


_batch_norm = _by_statistics_of(torch.batch_norm, lambda x: [0, *range(2, x.dim())])
_instance_norm = _by_statistics_of(torch.instance_norm, lambda x: [*range(2, x.dim())])


# Linear algebra by the LU decomposition, as torch's own.


def _solve(a: Tensor, b: Tensor, *, left: bool = True) -> Tensor:
    if b.dim() == 1 or b.shape == a.shape[:-1]:
        return _solve(a, b.unsqueeze(-1), left=left).squeeze(-1)
    return torch.linalg.lu_solve(*torch.linalg.lu_factor(a), b, left=left)


def _det(a: Tensor) -> Tensor:
    permutation, _, upper = torch.linalg.lu(a)
    return torch.linalg.det(permutation) * upper.diagonal(dim1=-2, dim2=-1).prod(-1)


def _slogdet(a: Tensor) -> Any:
    permutation, _, upper = torch.linalg.lu(a)
    diagonal = upper.diagonal(dim1=-2, dim2=-1)
    sign = torch.linalg.det(permutation) * diagonal.sgn().prod(-1)
    return torch.return_types.linalg_slogdet((sign, diagonal.abs().log().sum(-1)))  # type: ignore[attr-defined]


def _logdet(a: Tensor) -> Tensor:
    sign, logarithm = _slogdet(a)
    return logarithm + sign.log()


def _bodies(*functions: Any) -> _Table:
    return {function: _body(function) for function in functions}


_nn = torch._C._nn
_DERIVATIVES = frozenset({torch.autograd.grad, torch.autograd.backward, Tensor.backward, torch._make_dual})

_ALWAYS: _Table = {
    **_bodies(torch.autograd.grad, torch.autograd.backward, Tensor.backward),
    **_bodies(F.multi_head_attention_forward, F.triplet_margin_with_distance_loss),
    **_bodies(F.embedding, F.embedding_bag, F.ctc_loss, F.multi_margin_loss, F.multilabel_margin_loss, F.hardsigmoid),
    torch._make_dual: torch._make_dual,
    F.scaled_dot_product_attention: _attention,
    torch._weight_norm: _weight_norm,
    torch.embedding: _embedding,
    torch.embedding_bag: _embedding_bag,
    torch.cdist: _cdist,
    torch.pdist: _pdist,
    torch.ctc_loss: _ctc_loss,
    _nn.multi_margin_loss: _multi_margin_loss,
    _nn.multilabel_margin_loss: _multilabel_margin_loss,
    _nn.hardsigmoid: _hardsigmoid,
    _nn.hardsigmoid_: _in_place(_hardsigmoid),
}
if hasattr(F, "linear_cross_entropy"):  # torch >= 2.13
    _ALWAYS[F.linear_cross_entropy] = _linear_cross_entropy

_DERIVATIVE_IN_LOSS: _Table = {
    **_bodies(F.layer_norm, F.batch_norm, F.instance_norm),
    torch.layer_norm: _layer_norm,
    torch.native_layer_norm: _native_layer_norm,
    torch.batch_norm: _batch_norm,
    torch.instance_norm: _instance_norm,
}
_FORWARD_AD: _Table = {
    **_bodies(F.mse_loss, F.huber_loss, F.soft_margin_loss, F.silu, F.mish, F.group_norm),
    _nn.mse_loss: _mse_loss,
    _nn.huber_loss: _huber_loss,
    _nn.soft_margin_loss: _soft_margin_loss,
    _nn.silu: _silu,
    _nn.silu_: _in_place(_silu),
    _nn.mish: _mish,
    _nn.mish_: _in_place(_mish),
    **dict.fromkeys((torch.logit, torch.special.logit, Tensor.logit), _logit),
    torch.group_norm: _group_norm,
    torch.linalg.solve: _solve,
    **dict.fromkeys((torch.det, torch.linalg.det, Tensor.det), _det),
    **dict.fromkeys((torch.slogdet, torch.linalg.slogdet, Tensor.slogdet), _slogdet),
    **dict.fromkeys((torch.logdet, Tensor.logdet), _logdet),
}
_BODIES = frozenset(
    function
    for table in (_ALWAYS, _DERIVATIVE_IN_LOSS, _FORWARD_AD)
    for function, formula in table.items()
    if isinstance(function, FunctionType) and formula.__code__ is function.__code__
)
