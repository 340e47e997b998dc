"""Vectors v at a model's output with sum v vᵀ = H, the Hessian of an example's loss with respect to its output.

    cross-entropy           v_c = sqrt(p_c) (e_c - p)               for each class c,  H = diag(p) - p pᵀ
    binary cross-entropy    v_k = sqrt(p_k (1 - p_k) / K) e_k       for each output k, H = diag(p (1 - p)) / K
    squared error           v_k = sqrt(2 / K) e_k                   for each output k, H = 2 / K I

With many classes or outputs, drawn ones instead, k for each example, with E sum v vᵀ = H:

    classes    c with probability q_c ~ sqrt(p_c),                  v = sqrt(p_c / (k q_c)) (e_c - p)
    outputs    random signs s,                                      v = sum_k s_k v_k / sqrt(k)

q evens out what is large: under p itself, the rare label that matters is almost never drawn from a confident model.

Where an example has several outputs t, such as tokens, whose losses have a weighted mean, all get a drawn one at once:

    tokens     random signs s_t,                                    v = sum_t s_t sqrt(w_t) v_t,  H = sum_t w_t H_t
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lightning_sketch.autodiff.batches import labels_of

LOSSES = ("cross_entropy", "binary_cross_entropy", "squared_error")


def output_loss_of(batch: Any) -> str:
    """Cross-entropy where labels are whole numbers, squared error where they are real."""
    return "squared_error" if labels_of(batch).is_floating_point() else "cross_entropy"


def check_output(output: Any, output_loss: str, examples: int) -> None:
    """Refuse an output of which this is no loss, or that has not one row for each example.

    Raises:
        ValueError: saying what to pass instead.
    """
    if output_loss not in LOSSES:
        raise ValueError(f"output_loss={output_loss!r} is not known; use one of {', '.join(LOSSES)}.")
    got = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"type {type(output).__name__}"
    if not isinstance(output, Tensor) or not output.ndim or len(output) != examples:
        raise ValueError(
            f"ggn needs an output of shape (examples, classes) or (examples, tokens, classes) of {examples} examples, "
            f"got {got}; pass model_fn=lambda module, batch: ... that gives it, or use curvature='margin' or 'fisher', "
            "which need none."
        )
    if output_loss == "cross_entropy" and (output.ndim == 1 or output.shape[-1] == 1):
        raise ValueError(
            f"an output of {got} has one class, whose cross-entropy is zero; pass "
            "output_loss='binary_cross_entropy' or 'squared_error'."
        )


def output_roots(
    output: Float[Tensor, "examples outputs"],
    output_loss: str,
    max_classes: int,
    draws: int,
    generator: torch.Generator,
) -> Float[Tensor, "roots examples outputs"]:
    """The vectors v of each example: one per class or output, or `draws` of them above `max_classes`."""
    outputs = output.shape[1]
    draws = draws if outputs > max_classes else 0
    if output_loss == "cross_entropy":
        p = output.softmax(1)
        return _drawn_classes(p, draws, generator) if draws else _all_classes(p)
    p = output.sigmoid()
    roots = (
        (p * (1 - p) / outputs).sqrt() if output_loss != "squared_error" else torch.full_like(p, (2 / outputs) ** 0.5)
    )
    if not draws:
        return torch.eye(outputs).to(roots)[:, None] * roots
    signs = torch.randint(0, 2, (draws, *roots.shape), generator=generator).to(roots) * 2 - 1
    return signs * roots / draws**0.5


def token_roots(
    output: Float[Tensor, "examples *tokens outputs"],
    counted: Bool[Tensor, "examples *tokens"],
    output_loss: str,
    draws: int,
    generator: torch.Generator,
) -> Float[Tensor, "draws examples *tokens outputs"]:
    """Drawn vectors v of each example over all its counted tokens, whose losses have a mean."""
    flat, kept = output.flatten(0, -2), counted.flatten(1).double()
    weights = (kept / kept.sum(1, keepdim=True).clamp(min=1)).flatten().sqrt().to(flat)
    roots = output_roots(flat, output_loss, 0, draws, generator)
    signs = torch.randint(0, 2, (draws, len(flat)), generator=generator).to(flat) * 2 - 1
    return (roots * (signs * weights)[..., None]).view(draws, *output.shape)


def _all_classes(p: Float[Tensor, "examples classes"]) -> Float[Tensor, "classes examples classes"]:
    return p.sqrt().T[:, :, None] * (torch.eye(p.shape[1]).to(p)[:, None] - p)


def _drawn_classes(
    p: Float[Tensor, "examples classes"], draws: int, generator: torch.Generator
) -> Float[Tensor, "draws examples classes"]:
    q = p.sqrt() / p.sqrt().sum(1, keepdim=True)
    chosen = torch.multinomial(q.cpu(), draws, replacement=True, generator=generator).to(p.device)
    scale = (p.gather(1, chosen) / (draws * q.gather(1, chosen))).sqrt()
    return scale.T[:, :, None] * (torch.eye(p.shape[1]).to(p)[chosen.T] - p)
