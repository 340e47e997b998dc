"""How a loss weighs the examples of a batch: as the user says, or in one of the usual ways.

    L = sum_i w_i l_i / sum_i w_i        so        grad l_i = (sum_j w_j / w_i) (share of i in grad L)

l_i is the loss of example i alone, w_i its weight in the mean: 1 for a mean over examples, the number of its labels
that are not ignored for a mean over tokens, the number of ones for a mean over a mask. In a sum the share is the
gradient itself. Which of these ways it is, the gradients of single examples decide, see `example_sketches`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_sketch.autodiff.batches import BatchStructure, has_labels, labels_of, leaves_of

# What a loss does over the examples of a batch.
Reduction = Literal["mean", "sum"]

# A batch -> its weight in a mean over batches.
WeightFn = Callable[[Any], float]

_IGNORED = -100  # the label that losses of PyTorch ignore


@dataclass(frozen=True, eq=False)
class Weighing:
    """The weights of the examples of a batch in its loss.

    Args:
        name: The way of weighing, in words.
        weights: The weights, (examples,) in float64.
        summed: Whether the loss is a sum over examples, not a mean.
        of_tokens: Whether weights are numbers of tokens.
    """

    name: str
    weights: Float[Tensor, " examples"]
    summed: bool = False
    of_tokens: bool = False

    @property
    def scale(self) -> Float[Tensor, " examples"]:
        """The factors that turn shares of the batch's gradient into gradients of single examples; 0 without weight."""
        if self.summed:
            return torch.ones_like(self.weights)
        return torch.where(self.weights > 0, self.weights.sum() / self.weights, 0.0)


class Weighings:
    """A function: batch -> the ways in which the loss may weigh its examples, likely ones first.

    Args:
        module: The module, of which a causal language model of Hugging Face is recognized.
        weight_fn: batch -> its weight in a mean, called with single examples; then this is the only way.
        reduction: "mean" or "sum" over the examples of a batch; then this is the only way. None if it is to be found.
        structure: Where the examples are in a batch.

    Raises:
        ValueError: if the reduction is neither a mean nor a sum; on a batch, if `weight_fn` counts its keys.

    >>> [way.name for way in Weighings(nn.Linear(2, 2))((torch.randn(3, 2), torch.randn(3)))]
    ['a mean over examples', 'a sum over examples']
    """

    def __init__(
        self,
        module: nn.Module,
        weight_fn: WeightFn | None = None,
        reduction: Reduction | None = None,
        structure: BatchStructure | None = None,
    ):
        if reduction not in (None, *get_args(Reduction)):
            raise ValueError(
                f"reduction={reduction!r} is not known; a loss is a 'mean' or a 'sum' over its examples, None finds "
                "out which."
            )
        self.weight_fn, self.reduction, self.structure = weight_fn, reduction, structure or BatchStructure()
        self.shifted_first = any(_is_causal(part) for part in module.modules())

    @property
    def given(self) -> bool:
        """Whether the user says how the loss weighs examples."""
        return self.weight_fn is not None or self.reduction is not None

    def __call__(self, batch: Any) -> list[Weighing]:
        """Return the ways, some of which may be the same on this batch."""
        examples = self.structure.count(batch)
        ones = torch.ones(examples, dtype=torch.float64)
        if self.reduction == "sum":
            return [Weighing("a sum over examples", ones, summed=True)]
        if self.weight_fn is not None:
            if self.weight_fn is len and isinstance(batch, Mapping):
                raise ValueError("weight_fn=len counts the keys of a mapping; pass lambda batch: len(batch['labels']).")
            found = [float(self.weight_fn(example)) for example, _ in self.structure.parts(batch, 1, examples)]
            return [Weighing("weight_fn", torch.tensor(found, dtype=torch.float64))]
        mean = Weighing("a mean over examples", ones)
        if self.reduction == "mean":
            return [mean]
        labels, masks = self._counted(batch, examples)
        # Where an even batch tells no difference, a loss of texts counts texts, one of tokens counts tokens.
        of_tokens = [way for way in masks if way.of_tokens and not _has_classes(batch, examples)]
        others = [way for way in masks if way not in of_tokens]
        return [*labels, *of_tokens, mean, *others, Weighing("a sum over examples", ones, summed=True)]

    def _counted(self, batch: Any, examples: int) -> tuple[list[Weighing], list[Weighing]]:
        """Return the means over labels that are not ignored, and those over the ones of masks."""
        of_labels, of_masks = [], []
        labels = labels_of(batch) if has_labels(batch) else None
        if labels is not None and labels.ndim and len(labels) == examples and not labels.is_floating_point():
            if labels.ndim > 1 or bool((labels == _IGNORED).any()):
                of_labels = _both("a mean over labels", labels != _IGNORED)
        for name, _, leaf in leaves_of(batch):
            if isinstance(leaf, Tensor) and _is_mask(leaf, examples):
                of_masks += _both(f"a mean over ones of {name}", leaf != 0)
        return of_labels[::-1] if self.shifted_first else of_labels, of_masks


def _has_classes(batch: Any, examples: int) -> bool:
    """Return whether a batch has a label for each example: its labels, or else a column of repeated whole numbers."""
    if has_labels(batch):
        return labels_of(batch).ndim == 1
    columns = [leaf for _, _, leaf in leaves_of(batch) if isinstance(leaf, Tensor) and leaf.shape == (examples,)]
    return any(not column.is_floating_point() and len(column.unique()) < examples for column in columns)


def _both(name: str, counts: Tensor) -> list[Weighing]:
    """Return the mean over the true entries, and that without the first of each example, which shifted labels lack."""
    several = counts.ndim > 1
    found = [Weighing(name, counts.reshape(len(counts), -1).sum(1).double().cpu(), of_tokens=several)]
    if several:
        shifted = counts[:, 1:].reshape(len(counts), -1).sum(1).double().cpu()
        found.append(Weighing(name.replace("over", "over shifted", 1), shifted, of_tokens=True))
    return found


def _is_mask(tensor: Tensor, examples: int) -> bool:
    """Return whether a tensor has a one or a zero for each example, or for each of its tokens."""
    if tensor.ndim not in (1, 2) or len(tensor) != examples or tensor.layout != torch.strided or tensor.is_complex():
        return False
    return bool(((tensor == 0) | (tensor == 1)).all())


def _is_causal(part: nn.Module) -> bool:
    """Return whether a module is a language model of Hugging Face that predicts the next token from its labels."""
    return hasattr(part, "config") and type(part).__name__.endswith(("ForCausalLM", "LMHeadModel"))


class KnownWays:
    """Which ways of weighing agree with all batches so far, and the weights that they give to a batch."""

    def __init__(self) -> None:
        self.names: set[str] | None = None

    def narrow(self, fitting: list[Weighing]) -> Weighing | None:
        """Keep the ways that fit one more batch, and return the first; None if the loss weighs it in another way."""
        names = {way.name for way in fitting}
        left = names if self.names is None else names & self.names
        if not left:
            return None
        self.names = left
        return next(way for way in fitting if way.name in left)

    def of(self, ways: list[Weighing]) -> Weighing | None:
        """Return the first of the ways of a batch that fits all batches before it; None if none is known."""
        return next((way for way in ways if way.name in self.names), None) if self.names else None
