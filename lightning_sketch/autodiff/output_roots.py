"""Vectors v at a model's output with sum v vᵀ = H, the Hessian of an example's loss with respect to its output.

    cross-entropy           v_c = sqrt(p_c) (e_c - p)               for each class c,  H = diag(p) - p pᵀ
    binary cross-entropy    v_k = sqrt(p_k (1 - p_k) / K) e_k       for each output k, H = diag(p (1 - p)) / K
    squared error           v_k = sqrt(2 / K) e_k                   for each output k, H = 2 / K I

With many classes or outputs, k random vectors for each example instead, with E sum v vᵀ = H:

    classes    c with probability q_c ~ sqrt(p_c),                  v = sqrt(p_c / (k q_c)) (e_c - p)
    outputs    random signs s,                                      v = sum_k s_k v_k / sqrt(k)

q draws rare labels more often than p: under p itself, the rare label that matters is almost never drawn from a
confident model.

Where an example has several outputs t, such as tokens, whose losses have a weighted mean, each vector covers all:

    tokens     random signs s_t,                                    v = sum_t s_t sqrt(w_t) v_t,  H = sum_t w_t H_t

A vector is as large as the output: with a vocabulary, the largest tensor there is. So it is kept as what it is made
from, a label and a weight for each token, and formed where the output is, one vector at a time.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

# The most numbers of an output that are in float64 at a time.
_PART = 1 << 20


@dataclass(frozen=True)
class Draws:
    """The number of roots that each example gets: one per class or output, or a number of random ones.

    Args:
        generator: The generator of the random roots, on the CPU.
        count: How many random roots an example gets.
        max_classes: The most classes or outputs that get a root each; with more, and for tokens, roots are random.
    """

    generator: torch.Generator
    count: int = 8
    max_classes: int = 32

    def signs(self, *shape: int) -> Tensor:
        """Return random signs of this shape, in int8 on the CPU."""
        return torch.randint(0, 2, shape, generator=self.generator, dtype=torch.int8) * 2 - 1

    def each(self, outputs: tuple[int, ...]) -> bool:
        """Return whether each class or output gets a root, for an output of this shape of an example."""
        return len(outputs) < 2 and sum(outputs) <= self.max_classes


@dataclass(frozen=True, eq=False)
class Root:
    """A vector v at the output of each example, kept as the small tensors that it is made from.

    Args:
        parts: Tensors with the examples along their first axis; v is zero where the first of them is.
        make: (output without a graph, *parts) -> v, in the shape of the output.
    """

    parts: tuple[Tensor, ...]
    make: Callable[..., Tensor]

    def of(self, *parts: Tensor) -> "Root":
        """Return the same vector made from other parts, such as those of some of the examples."""
        return replace(self, parts=parts)

    def vector(self, output: Tensor) -> Tensor:
        """Return v in the shape and the type of the output; one tensor of this size."""
        return self.make(output.detach(), *self.parts)


def token_weights(shape: tuple[int, ...], counts: Tensor | None) -> Float[Tensor, " examples *tokens"]:
    """Return the weights of the tokens in the mean loss of their example, in float64; of examples without tokens, 1.

    Args:
        shape: (examples, *tokens), the shape of the output without the axis of its classes.
        counts: Which examples, or tokens, have a loss, or the weights of their losses; None if all have one.
    """
    if counts is None:
        counts = torch.ones(shape, dtype=torch.bool)
    if len(shape) < 2:
        return counts.double()
    flat = counts.flatten(1).double()
    number = flat.shape[1] if counts.is_floating_point() else flat.sum(1, keepdim=True).clamp(min=1)
    return (flat / number).view(shape)


def class_roots(
    logits: Float[Tensor, "examples *tokens classes"],
    axis: int,
    weights: Float[Tensor, " examples *tokens"],
    draws: Draws,
) -> list[Root]:
    """Return roots of cross-entropy: of each class, or of random ones; see the module.

    Args:
        logits: The output, with its classes along the last axis.
        axis: Where the output has this axis, 1 or -1.
        weights: The weights of the tokens.
        draws: How many roots each example gets.

    The labels are drawn from a few tokens at a time, so that nothing in float64 has the size of the output.
    """
    weights = weights.to(logits.device)
    if draws.each(tuple(logits.shape[1:])):
        scales = (logits.double().softmax(-1) * weights[:, None]).sqrt()
        labels = torch.arange(logits.shape[-1], device=logits.device).expand_as(scales)
        chosen = zip(scales.unbind(1), labels.unbind(1), strict=True)
    else:
        flat = logits.reshape(-1, logits.shape[-1])
        uniform = torch.rand(len(flat), draws.count, generator=draws.generator, dtype=torch.float64)
        uniform = uniform.to(logits.device)
        size = max(1, _PART // flat.shape[1])
        drawn = map(_draw, flat.split(size), uniform.split(size))
        scales, labels = (torch.cat(found).T for found in zip(*drawn, strict=True))
        scales = scales * weights.sqrt().flatten()
        if weights.ndim > 1:
            scales = scales * draws.signs(*scales.shape).to(scales)
        chosen = zip(*(t.reshape(-1, *weights.shape) for t in (scales, labels)), strict=True)
    return [Root((scale, label), partial(label_less_mean, axis=axis)) for scale, label in chosen]


def separate_roots(
    output: Float[Tensor, " examples *outputs"],
    weights: Float[Tensor, " examples *tokens"],
    draws: Draws,
    root: Callable[[Tensor], Tensor],
) -> Iterator[Root]:
    """Yield roots of a loss whose Hessian is diagonal: of each output, or random ones; see the module.

    Args:
        output: The output; its shape alone is used.
        weights: The weights of the tokens.
        draws: How many roots each example gets.
        root: Output -> the square roots of the second derivatives, without the mean over outputs.
    """
    shape, outputs = output.shape, output.shape[-1] if output.ndim > 1 else 1
    scale = (weights / outputs).sqrt().to(output.device)
    del output  # not kept while roots are yielded

    def make(output: Tensor, signs: Tensor, scale: Tensor) -> Tensor:
        return root(output) * signs.to(output) * scale.to(output)[(...,) + (None,) * (output.ndim - scale.ndim)]

    if draws.each(tuple(shape[1:])):
        for signs in torch.eye(outputs, dtype=torch.int8, device=scale.device):
            yield Root((signs.expand(shape), scale), make)
        return
    for _ in range(draws.count):
        yield Root((draws.signs(*shape).to(scale.device), scale / draws.count**0.5), make)


def label_less_mean(output: Tensor, scale: Tensor, labels: Tensor, *, axis: int) -> Tensor:
    """Return scale (e_label - p) at each token, in one tensor of the size of the output.

    Args:
        output: The output z without a graph, p = softmax(z).
        scale: A number for each token.
        labels: A class for each token.
        axis: The axis of the classes.
    """
    v = output.movedim(axis, -1).softmax(-1).neg_()
    v.scatter_add_(-1, labels[..., None], torch.ones_like(labels[..., None], dtype=v.dtype))
    return v.mul_(scale.to(v)[..., None]).movedim(-1, axis)


def _draw(
    logits: Float[Tensor, "n classes"], uniform: Float[Tensor, "n count"]
) -> tuple[Float[Tensor, "n count"], Int[Tensor, "n count"]]:
    """Return sqrt(p_c / (count q_c)) of classes c that are drawn with probability q_c, and these classes."""
    roots = logits.double().log_softmax(-1).mul_(0.5).exp_()
    total = roots.cumsum(-1)
    chosen = torch.searchsorted(total, uniform * total[:, -1:]).clamp_(max=logits.shape[1] - 1)
    return (roots.gather(1, chosen) * total[:, -1:] / uniform.shape[1]).sqrt(), chosen
