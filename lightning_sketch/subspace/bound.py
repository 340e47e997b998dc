"""A bound on the error rate of a network on new examples, from the number of bits that describe its w.

A network θ₀ + Dᵀ w whose w is rounded to a few values is one of countably many. Each has a code of some b bits that
does not depend on the examples. With probability 1 - δ its error rate on new examples is then at most

    max { p : P[Binomial(N, p) ≤ k] ≥ δ 2^-b }                     k errors among the N examples

for all these networks at once, hence for the one that was found. The code, in bits:

    numbers   the indices i_j of w_j = Δ i_j, |i_j| ≤ m, by the estimator of Krichevsky & Trofimov for K = 2 m + 1
              symbols, c_s of them s:  log₂ Γ(dim + K/2) Γ(1/2)^K / (Γ(K/2) Π_s Γ(c_s + 1/2))
    levels    m, by the Elias γ code
    step      8, for Δ = 2^(e/4) with -128 ≤ e < 128
    dim, seed of the directions: each by the Elias γ code; so is max_dim, if there is one
    scale     its decimal digits, with their number and the exponent of ten by the Elias γ code
    choices   log₂ of the number of alternatives that the caller names
    others    buffers and parameters trained in full, all their bits, if asked for

Sources: Langford (2005), "Tutorial on practical prediction theory for classification", JMLR 6, section 4 (the bound);
Lotfi et al. (2022), "PAC-Bayes compression bounds so tight that they can explain generalization", NeurIPS 2022,
arXiv:2211.13609, section 3 (the code length of a quantized w that is fine-tuned); Krichevsky & Trofimov (1981),
doi:10.1109/TIT.1981.1056331; Elias (1975), doi:10.1109/TIT.1975.1055349.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_sketch.autodiff.content_hash import content_hash
from lightning_sketch.subspace.export import Quantized, trained_state

Others = Literal["refuse", "price", "fixed"]

_SHOWN = 5  # names in a message


@dataclass(frozen=True)
class GeneralizationBound:
    """An upper bound on the error rate of a network with a rounded w, which holds with probability 1 - delta.

    Attributes:
        error: The bound on the error rate on new examples, in [0, 1].
        train_error: The error rate on the examples.
        examples: The number of examples N.
        delta: The probability that the bound fails.
        parts: The length of the code in bits by its parts; their sum is `bits`.
        quantized: The rounded w that the bound is about; `save_subspace(sub, path, levels=bound.quantized)` writes it.

    >>> numbers = Quantized(torch.tensor([-1.0, 0.0, 1.0]), torch.zeros(8, dtype=torch.uint8))
    >>> print(GeneralizationBound(error_bound(100, 1000, 20), 0.1, 1000, 0.05, {"numbers": 20.0}, numbers))
    at confidence 95 %, at most 15.9 % of new examples are errors: 10.0 % of 1,000 are, and 20 bits describe the
    network, whose 8 numbers have 3 levels
    """

    error: float
    train_error: float
    examples: int
    delta: float
    parts: dict[str, float]
    quantized: Quantized = field(repr=False)

    @property
    def bits(self) -> float:
        """The length of the code of the network."""
        return sum(self.parts.values())

    @property
    def confidence(self) -> float:
        """The probability 1 - delta that the bound holds."""
        return 1 - self.delta

    @property
    def dim(self) -> int:
        """The number of trained numbers."""
        return len(self.quantized.indices)

    @property
    def levels(self) -> int:
        """The number of values that each of them can have."""
        return len(self.quantized.codebook)

    def __str__(self) -> str:
        return (
            f"at confidence {100 * self.confidence:g} %, at most {100 * self.error:.1f} % of new examples are errors: "
            f"{100 * self.train_error:.1f} % of {self.examples:,} are, and {self.bits:,.0f} bits describe the network, "
            f"whose {self.dim:,} numbers have {self.levels} levels"
        )

    def __repr__(self) -> str:
        return f"GeneralizationBound: {self}"


def error_bound(errors: int, examples: int, bits: float | int = 0, delta: float = 0.05) -> float:
    """Return an upper bound on the error rate of every hypothesis with a code of so many bits.

    With probability 1 - delta over independent examples, it holds for all hypotheses of a prefix code at once. With 0
    bits it is the bound of Clopper & Pearson, for one hypothesis that was fixed before.

    Args:
        errors: The number of errors among the examples.
        examples: The number of independent examples.
        bits: The length of the code of the hypothesis.
        delta: The probability that the bound fails.

    Raises:
        ValueError: If an argument is out of its range.

    >>> round(error_bound(50, 1000), 3), round(error_bound(50, 1000, bits=100), 3)
    (0.063, 0.173)

    Source: Langford (2005), JMLR 6, section 4.
    """
    if not (0 <= errors <= examples and examples > 0 and bits >= 0 and 0 < delta < 1):
        raise ValueError(
            "need 0 <= errors <= examples, at least one example, bits >= 0 and 0 < delta < 1, got "
            f"errors={errors}, examples={examples}, bits={bits}, delta={delta}."
        )
    below, above, nats = errors / examples, 1.0, _nats(bits, delta)
    while above - below > 1e-9:
        middle = (below + above) / 2
        below, above = (below, middle) if _log_tail(errors, examples, middle) < -nats else (middle, above)
    return above


def generalization_bound(
    sub: Any,
    data: DataLoader[Any] | Dataset[Any] | Iterable[Any],
    *,
    levels: Sequence[int] = (9, 15, 25),
    delta: float = 0.05,
    predict_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    epochs: int = 30,
    passes: int = 2,
    choices: int = 1,
    others: Others = "refuse",
) -> GeneralizationBound:
    """Bound the error rate on new examples of a trained subspace, with a w that is rounded for it.

    For each number of levels, w is rounded to multiples of a step, and trained on while it is rounded. Of the best, one
    number at a time is changed by one step wherever that lowers the bound. The bound is about this rounded w, which the
    result contains; the w of `sub` stays as it is.

    It is true under these conditions. What can be checked of them is checked.

    - The examples are independent draws from the distribution that new ones come from. Augmented copies are no new
      examples, and tokens of one text are not independent. They may have been trained on, in any order, and used to
      choose between runs; examples that were not trained on, as those of a validation, may be among them.
    - θ₀ and all that the code leaves out (architecture, kind of directions, which parameters they move) were chosen
      before these examples were seen. Weights pretrained on other data are right; on these, the bound is untrue. If
      the examples did choose among k alternatives listed before, say choices=k. Learning rates, numbers of steps and
      whatever else only decides which w is found cost nothing.
    - The network is in eval mode. The statistics of a batch norm, which the data set, belong to it, see `others`.

    Cost: len(levels) · epochs passes forward and backward through the data, and at most 2 · dim · passes forward, which
    take most of the time. The data are kept in memory. A held-out set of the same number of examples usually gives a
    lower bound, `error_bound(errors, examples)`; this one needs none.

    Args:
        sub: A trained `SubspaceModule` or `SubspaceModel`.
        data: The examples: a loader, whose data set is read once in its order, a data set, or a list of batches.
        levels: The numbers of values to round to; odd numbers, since one of the values is 0.
        delta: The probability that the bound fails.
        predict_fn: Returns from the module and a batch whether each example is right, in shape (examples,); None for
            batches (input, label), of which the largest output is the class.
        loss_fn: Returns from the module and a batch the loss by which w is trained on; None for the cross-entropy of
            such batches. With `predict_fn` alone, w is not trained on.
        epochs: How many times w is trained on through the data, by Adam; 0 for none.
        passes: How many times each number is tried one step up and down; 0 for none.
        choices: The number of alternatives among which these examples chose something else: architectures, kinds of
            directions, seeds of θ₀.
        others: What to do if buffers, such as the statistics of a batch norm, or parameters outside of the subspace may
            depend on the data: "refuse"; "price" to add all their bits to the code; "fixed" if the buffers were fixed
            before, as tables of positions or the statistics of a frozen backbone.

    Raises:
        ValueError: If a condition is seen to fail, or an argument is out of its range.

    >>> from lightning_sketch.subspace import SubspaceModel
    >>> torch.manual_seed(0) and None
    >>> x = torch.randn(500, 2)
    >>> data = torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long())
    >>> sub = SubspaceModel(nn.Linear(2, 2), 4)
    >>> _ = sub.w.data.copy_(torch.tensor([-1.0, 0.0, 1.0, 0.0]))
    >>> generalization_bound(sub, data, epochs=3).error < 0.15
    True

    Source: Langford (2005), JMLR 6, section 4; Lotfi et al. (2022), NeurIPS 2022, arXiv:2211.13609, section 3, who take
    a code book by k-means in place of steps.
    """
    if not levels or any(number < 3 or number % 2 == 0 or number > 255 for number in levels):
        raise ValueError(f"need odd numbers of levels from 3 to 255, got levels={tuple(levels)}.")
    if choices < 1:
        raise ValueError(f"need choices >= 1, the alternatives including the one that was taken, got {choices}.")
    w, batches = sub.coordinates().detach().clone(), _examples(data)
    if not w.isfinite().all() or not w.any():
        raise ValueError("w is zero or not finite, as before training or after one that diverged; train it first.")
    if predict_fn is not None and loss_fn is None:
        epochs = 0
    search = _Search(
        sub, batches, predict_fn or _right, loss_fn or _loss, delta, _besides_numbers(sub, choices, others)
    )
    modes = [(part, part.training) for part in sub.modules()]
    try:
        sub.eval()
        tried = [(number // 2, trained) for number in levels for trained in sorted({0, epochs})]
        found = min((search.rounded(w, *how) for how in tried), key=search.bound)
        for i in range(passes):
            found = search.improved(found, torch.randperm(len(w), generator=torch.Generator().manual_seed(i)).tolist())
        return search.result(found)
    finally:
        _set(sub, w)
        for part, mode in modes:
            part.training = mode


@dataclass(frozen=True)
class _Rounded:
    """A rounded w: whole numbers from -m to m, times a step."""

    indices: Int64[Tensor, " dim"]
    m: int
    exponent: int
    errors: int

    @property
    def step(self) -> float:
        return 2.0 ** (self.exponent / 4)

    @property
    def parts(self) -> dict[str, float]:
        counts = torch.bincount(self.indices + self.m, minlength=2 * self.m + 1).double()
        half = len(counts) / 2
        nats = math.lgamma(len(self.indices) + half) - math.lgamma(half)
        nats -= float((torch.lgamma(counts + 0.5) - math.lgamma(0.5)).sum())
        return {"numbers": nats / math.log(2), "levels": _elias(self.m), "step": 8.0}


@dataclass
class _Search:
    """The search for the rounded w with the lowest bound."""

    sub: Any
    batches: list[Any]
    predict_fn: Callable[[nn.Module, Any], Tensor]
    loss_fn: Callable[[nn.Module, Any], Tensor]
    delta: float
    besides: dict[str, float]
    examples: int = 0

    def bits(self, found: _Rounded) -> float:
        return sum(found.parts.values()) + sum(self.besides.values())

    def bound(self, found: _Rounded) -> float:
        return error_bound(found.errors, self.examples, self.bits(found), self.delta)

    @torch.no_grad()
    def evaluated(self, indices: Tensor, m: int, exponent: int) -> _Rounded:
        """Count the errors of a rounded w."""
        found = _Rounded(indices, m, exponent, 0)
        _set(self.sub, indices * found.step)
        right = [self.predict_fn(self.sub.module, batch) for batch in self.batches]
        if any(r.dtype != torch.bool or r.ndim != 1 for r in right):
            raise ValueError("predict_fn returns a boolean tensor of shape (examples,): whether each example is right.")
        self.examples = sum(map(len, right))
        return _Rounded(indices, m, exponent, self.examples - sum(int(r.sum()) for r in right))

    def rounded(self, w: Tensor, m: int, epochs: int) -> _Rounded:
        """Round w, and train it on: the gradient at the rounded w moves the one behind it, by at most m steps from 0.

        The rate of Adam begins at a quarter of the root mean square of w and falls to zero.
        """
        exponent = min(max(round(4 * math.log2(float(w.abs().max()) / m)), -128), 127)
        step, behind = 2.0 ** (exponent / 4), w.clone().requires_grad_()
        optimizer = torch.optim.Adam([behind], lr=float(w.square().mean().sqrt()) / 4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(epochs * len(self.batches), 1))
        generator = torch.Generator().manual_seed(0)
        for _ in range(epochs):
            for i in torch.randperm(len(self.batches), generator=generator).tolist():
                _set(self.sub, (behind.detach() / step).round().clamp(-m, m) * step)
                with self.sub.following():
                    loss = self.loss_fn(self.sub.module, self.batches[i])
                    gradient = torch.autograd.grad(loss, self.sub.blocks)
                behind.grad = torch.cat(gradient)[: len(w)]
                optimizer.step()
                schedule.step()
        return self.evaluated((behind.detach() / step).round().clamp(-m, m).long(), m, exponent)

    def improved(self, best: _Rounded, order: Sequence[int]) -> _Rounded:
        """Try each number one step up and down, and keep what lowers the bound."""
        error = self.bound(best)
        for j in order:
            for change in (1, -1):
                indices = best.indices.clone()
                indices[j] += change
                if abs(int(indices[j])) > best.m:
                    continue
                tried = self.evaluated(indices, best.m, best.exponent)
                if _log_tail(tried.errors, self.examples, error) < -_nats(self.bits(tried), self.delta):
                    best, error = tried, self.bound(tried)
                    break
        return best

    def result(self, found: _Rounded) -> GeneralizationBound:
        again = self.evaluated(found.indices, found.m, found.exponent).errors
        if again != found.errors:
            raise ValueError(
                f"the network makes {found.errors} errors and then {again} on the same examples; remove what is random "
                "in eval mode."
            )
        codebook = (torch.arange(-found.m, found.m + 1) * found.step).to(self.sub.coordinates())
        return GeneralizationBound(
            error=self.bound(found),
            train_error=found.errors / self.examples,
            examples=self.examples,
            delta=self.delta,
            parts={**found.parts, **self.besides},
            quantized=Quantized(codebook, (found.indices + found.m).to(torch.uint8)),
        )


def _nats(bits: float | int, delta: float) -> float:
    """Return -log(δ 2^-b)."""
    return bits * math.log(2) - math.log(delta)


def _log_tail(errors: int, examples: int, p: float) -> float:
    """Return log P[Binomial(examples, p) ≤ errors], for p < 1."""
    if errors == examples or not p:
        return 0.0
    k, n = torch.arange(errors + 1, dtype=torch.float64), float(examples)
    logs = math.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    return float(torch.logsumexp(logs + k * math.log(p) + (n - k) * math.log1p(-p), 0))


def _elias(number: int) -> float:
    """Return the length of the Elias γ code of a whole number from 1 on."""
    return 2.0 * number.bit_length() - 1


def _decimal(value: float) -> float:
    """Return the length of the code of a positive number in decimal digits: short if a person typed it."""
    _, digits, exponent = Decimal(repr(value)).normalize().as_tuple()
    exponent = 2 * abs(int(exponent)) + (int(exponent) < 0)  # 0, 1, -1, 2, -2, ... as 0, 2, 3, 4, 5, ...
    return _elias(len(digits)) + len(digits) * math.log2(10) + _elias(exponent + 1)


def _besides_numbers(sub: Any, choices: int, others: Others) -> dict[str, float]:
    """Return the lengths of the codes of all but the numbers.

    Raises:
        ValueError: If something depends on the data, or may, and is neither priced nor said to be fixed.
    """
    state, extra = trained_state(sub)
    state = {**{f"module.{name}": buffer for name, buffer in sub.module.named_buffers()}, **state}
    parameters = {f"module.{name}" for name, _ in sub.module.named_parameters()}
    outside = sorted(parameters & set(state))
    buffers = sorted(name for name in set(state) - parameters if state[name].ndim or state[name].is_floating_point())
    refused = {"refuse": [*outside, *buffers], "fixed": outside, "price": []}[others]
    if refused:
        names = ", ".join(name.removeprefix("module.") for name in refused[:_SHOWN])
        counts = {"parameters outside of the subspace": len(outside), "buffers": len(buffers)}
        what = " and ".join(f"{count} {kind}" for kind, count in counts.items() if count)
        raise ValueError(
            f"{what} may depend on the data, and w does not describe them: {names}"
            f"{', ...' if len(refused) > _SHOWN else ''}. Use a module without them "
            "(GroupNorm in place of BatchNorm, no head trained in full), add their bits by others='price', or, for "
            "buffers that were fixed before the data were seen, say others='fixed'."
        )
    spec, priced = extra["directions"], (*outside, *buffers) if others == "price" else ()
    return {
        "dim": _elias(len(sub.coordinates())) + (_elias(spec["dim"]) if spec["nested"] else 0.0),
        "seed": _elias(spec["seed"] + 1),
        "scale": _decimal(extra["scale"]),
        "choices": math.log2(choices),
        "others": 8.0 * sum(state[name].nbytes for name in priced),
    }


def _examples(data: Any) -> list[Any]:
    """Return the batches of the data, every example once, whatever the sampler of a loader is."""
    if isinstance(data, DataLoader) and not isinstance(data.dataset, IterableDataset):
        data = DataLoader(data.dataset, batch_size=data.batch_size or 64, collate_fn=data.collate_fn)
    elif isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        data = DataLoader(data, batch_size=64)
    batches = list(data)
    again = next(iter(data), None)
    if not batches or again is None:
        raise ValueError("data has no examples, or can be read only once; pass a loader, a data set or a list.")
    if content_hash(batches[0]) != content_hash(again):
        raise ValueError(
            "data gives other examples when it is read again, as by random augmentation or a shuffled iterable; pass "
            "the examples themselves."
        )
    return batches


def _set(sub: Any, w: Float[Tensor, " dim"]) -> None:
    """Set w, and the weights with it."""
    sub.refuse_computed_w("rounded")
    with torch.no_grad():
        for block, part in zip(sub.blocks, sub.cut(w), strict=True):
            block.copy_(part)
    sub.ready()


def _outputs_and_labels(module: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Return the outputs, (examples, classes), and the labels, (examples,), of a batch (input, label)."""
    if not isinstance(batch, list | tuple) or len(batch) != 2 or not isinstance(batch[1], Tensor) or batch[1].ndim != 1:
        raise ValueError(
            "data gives batches of another form than (input, label) with one label per example; pass predict_fn, and "
            "loss_fn to train w on while it is rounded. Labels per token are not independent."
        )
    device = next(module.parameters()).device
    outputs = module(batch[0].to(device) if isinstance(batch[0], Tensor) else batch[0])
    return getattr(outputs, "logits", outputs), batch[1].to(device)


def _right(module: nn.Module, batch: Any) -> Tensor:
    outputs, labels = _outputs_and_labels(module, batch)
    return outputs.argmax(dim=1) == labels


def _loss(module: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(*_outputs_and_labels(module, batch))
