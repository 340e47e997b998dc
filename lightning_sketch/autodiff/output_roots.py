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
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor


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
        """Return random signs of this shape, on the CPU."""
        return torch.randint(0, 2, shape, generator=self.generator) * 2 - 1

    def number(self, outputs: int) -> int:
        """Return the number of random roots for this number of outputs; 0 if each output gets a root."""
        return self.count if outputs > self.max_classes else 0


def roots_of_examples(
    values: Float[Tensor, " examples *outputs"],
    counted: Bool[Tensor, " examples *tokens"] | Float[Tensor, " examples *tokens"] | None,
    draws: Draws,
    make: Callable[[Tensor, Draws, int], Tensor],
) -> Float[Tensor, " roots examples *outputs"]:
    """Return roots of each example's Hessian; random ones, over the tokens that have a loss, if examples have tokens.

    Args:
        values: The numbers that `make` computes roots from, at each output.
        counted: Which examples, or tokens, have a loss, or the weights of their losses; None if all have one.
        draws: How many roots each example gets.
        make: (values, draws, how many random roots, or 0 for all roots) -> roots of the rows of a matrix.
    """
    if values.ndim < 3:
        flat = values.reshape(len(values), -1)
        roots = make(flat, draws, draws.number(flat.shape[1])).view(-1, *values.shape)
        return roots if counted is None or values.ndim == 1 else roots * counted.to(roots).sqrt()[:, None]
    counted = torch.ones_like(values.select(-1, 0), dtype=torch.bool) if counted is None else counted
    flat, kept = values.flatten(0, -2), counted.flatten(1).double()
    number = kept.shape[1] if counted.is_floating_point() else kept.sum(1, keepdim=True).clamp(min=1)
    weights = (kept / number).flatten().sqrt().to(flat)
    roots = make(flat, draws, draws.count)
    return (roots * (draws.signs(draws.count, len(flat)).to(flat) * weights)[..., None]).view(-1, *values.shape)


def class_roots(p: Float[Tensor, "n classes"], draws: Draws, count: int) -> Float[Tensor, "roots n classes"]:
    """Return sqrt(p_c) (e_c - p) for each class, or for `count` random classes."""
    if not count:
        return p.sqrt().T[:, :, None] * (torch.eye(p.shape[1]).to(p)[:, None] - p)
    q = p.sqrt() / p.sqrt().sum(1, keepdim=True)
    chosen = torch.multinomial(q.cpu(), count, replacement=True, generator=draws.generator).to(p.device)
    scale = (p.gather(1, chosen) / (count * q.gather(1, chosen))).sqrt()
    return scale.T[:, :, None] * (torch.eye(p.shape[1]).to(p)[chosen.T] - p)


def separate_roots(root: Float[Tensor, "n outputs"], draws: Draws, count: int) -> Float[Tensor, "roots n outputs"]:
    """Return root_k e_k / sqrt(outputs) for each output, or `count` sums of them with random signs."""
    root = root / root.shape[1] ** 0.5
    if not count:
        return torch.eye(root.shape[1]).to(root)[:, None] * root
    return draws.signs(count, *root.shape).to(root) * root / count**0.5
