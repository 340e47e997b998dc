"""The linear datamodeling score: how well scores predict the loss of a query after training on a part of the data.

    LDS = mean over queries q of Spearman over subsets s of ( sum_{i in s} score_qi , -loss_sq )

loss_sq    the query's loss in a model that was trained on subset s alone, or the mean over several such models
ceiling    mean Spearman of the losses of two models of one subset with different seeds: how well one predicts another
interval   of 95 %, over queries and subsets: LDS ± 1.96 sqrt(variance over queries / their number + jackknife
           variance over subsets)

The state is sums over queries, so that batches and processes add up; for the jackknife one sum per subset left out.
Only the values of single queries, if they are wanted, are kept one by one.

Source: Park et al. (2023), "TRAK: Attributing model behavior at scale", arXiv:2303.14186, section 2.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Real
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional import spearman_corrcoef

from lightning_sketch import plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = Tensor | np.ndarray
Result = Mapping[str, Tensor]


class LinearDatamodelingScore(Metric):
    """The linear datamodeling score (LDS) of attribution scores: 1 at best, 0 for chance.

    `update` takes the queries in batches. `compute` returns a dict of scalars: "lds"; "low" and "high", the ends of its
    95 % interval; "ceiling", NaN with one model per subset; "queries", how many are in the mean; and "constant", how
    many were excluded since their losses never change and have no ranks. With `per_query` it also has "per_query",
    the Spearman correlation of each query, (queries,), in the order of the updates, NaN for excluded ones.

    `MetricTracker(MetricCollection([metric]), maximize=True).best_metric()["lds"]` is the best of several; a tracker of
    the metric alone has no best of a dict.

    Args:
        subsets: The subsets that the models were trained on, 50 random halves or more; examples are in the order of the
            scores' columns. Either boolean masks, (subsets, examples), or with `num_examples` the indices of the
            examples in each subset: a list of 1-D tensors, arrays or lists, or rows of a tensor.
        num_examples: The number of examples, for subsets as indices.
        per_query: Whether `compute` also returns the value of each query; keeps 8 bytes per query.
        **kwargs: Further arguments of `torchmetrics.Metric`, such as `dist_sync_on_step`.

    Raises:
        TypeError: if integers may be masks or indices; if subsets are neither booleans nor integers.
        ValueError: if there are fewer than three subsets, if shapes disagree, if an index is out of range or twice in a
            subset, or if a number is not finite.

    >>> masks = torch.rand(50, 20, generator=torch.Generator().manual_seed(0)) < 0.5
    >>> metric = LinearDatamodelingScore(masks)
    >>> scores = torch.randn(4, 20)
    >>> metric.update(scores, losses=-masks.float() @ scores.T)  # a model that is linear in the subsets
    >>> round(float(metric.compute()["lds"]), 3)
    1.0
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    masks: Tensor
    total: Tensor
    squares: Tensor
    queries: Tensor
    constant: Tensor
    agreement: Tensor
    repeated: Tensor
    without: Tensor
    correlations: list[Tensor] | Tensor  # a tensor while processes are gathered

    def __init__(
        self,
        subsets: Array | Sequence[Any],
        num_examples: int | None = None,
        *,
        per_query: bool = False,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        masks = _masks(subsets, num_examples)
        if len(masks) < 3:
            raise ValueError(f"an LDS needs three subsets at least, got {len(masks)}; use 50 or more.")
        self.register_buffer("masks", masks, persistent=False)
        self.per_query = per_query
        if per_query:
            self.add_state("correlations", [], "cat")
        for name in ("total", "squares", "queries", "constant", "agreement", "repeated"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), "sum")
        self.add_state("without", torch.zeros(len(masks), dtype=torch.float64), "sum")

    def update(
        self,
        scores: Real[Array, "queries examples"],
        losses: Real[Array, "subsets queries"] | Real[Array, "repeats subsets queries"],
    ) -> None:
        """Add a batch of queries.

        Args:
            scores: The scores of all training examples for each query, positive if the example helps the query; a
                tensor or an array.
            losses: The losses of the queries in a model of each subset, or in several models of each subset. For an
                output that is larger if the query is helped, such as a margin, pass its negative.

        Raises:
            ValueError: if shapes disagree, or a number is not finite.
        """
        scores, losses = (torch.as_tensor(t, dtype=torch.float64, device=self.masks.device) for t in (scores, losses))
        losses = losses[None] if losses.ndim == 2 else losses
        self._check(scores, losses)
        predicted, true = self.masks.double() @ scores.T, -losses.mean(0)
        changes = (true != true[:1]).any(0)
        self.constant += (~changes).sum()
        predicted, true, repeats = predicted[:, changes], true[:, changes], losses[:, :, changes]
        rho, without = _spearman_and_without(predicted, true)
        self.total += rho.sum()
        self.squares += rho.square().sum()
        self.queries += len(rho)
        self.without += without
        if self.per_query:
            own = rho.new_full((len(changes),), torch.nan)
            own[changes] = rho
            cast(list[Tensor], self.correlations).append(own)
        pairs = list(itertools.combinations(repeats, 2))
        if pairs:
            self.agreement += sum(_spearman(a, b).sum() for a, b in pairs) / len(pairs)
            self.repeated += len(rho)

    def compute(self) -> dict[str, Tensor]:
        """Return the LDS, its interval and the ceiling, over all queries so far, and with `per_query` each value."""
        n, subsets = self.queries, len(self.masks)
        mean = self.total / n
        over_queries = (self.squares / n - mean**2).clamp(min=0) / (n - 1)
        left_out = self.without / n
        over_subsets = (left_out - left_out.mean()).square().sum() * (subsets - 1) / subsets
        half = 1.96 * (over_queries + over_subsets).sqrt()
        found = {
            "lds": mean,
            "low": mean - half,
            "high": mean + half,
            "ceiling": self.agreement / self.repeated,
            "queries": n.clone(),
            "constant": self.constant.clone(),
        }
        if self.per_query:
            gathered = [self.correlations] if isinstance(self.correlations, Tensor) else self.correlations
            found["per_query"] = torch.cat([self.total.new_zeros(0), *gathered])
        return found

    def plot(
        self, val: Result | Sequence[Result] | None = None, ax: "Axes | None" = None
    ) -> "tuple[Figure | None, Axes]":
        """Draw the LDS with its interval and ceiling, or the course of several results, as torchmetrics does.

        Args:
            val: A result of `compute` or `forward`, or several of them; by default that of `compute()`.
            ax: The axes to draw in; by default those of a new figure.

        Returns:
            The figure, None if `ax` is given, and the axes.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        val = self.compute() if val is None else val
        results = [val] if isinstance(val, Mapping) else list(val)
        figure = plots.new_figure(5, 3.5) if ax is None else None
        axes = figure.subplots() if figure else cast("Axes", ax)
        columns = {name: [float(r[name]) for r in results] for name in ("lds", "low", "high", "ceiling")}
        per_query = [r["per_query"].tolist() if "per_query" in r else [] for r in results]
        plots.datamodeling_scores(axes, **columns, per_query=per_query)
        return figure, axes

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the states of all processes, as torchmetrics does; a process may have had no query at all."""
        if self.per_query and isinstance(self.correlations, list):
            self.correlations.append(self.total.new_zeros(0))  # torchmetrics would send float32, or nothing
        super().sync(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]  # as torchmetrics
        """Return the state that is persistent, with the subsets that it belongs to."""
        found = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        if f"{prefix}total" in found:
            found[f"{prefix}masks"] = self.masks.clone()
        return found

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        """Refuse the state of other subsets, as torch does a weight of another shape."""
        masks = state_dict.pop(f"{prefix}masks", None)
        if masks is not None and not torch.equal(masks.to(self.masks.device), self.masks):
            for name in [name for name in state_dict if name.startswith(prefix)]:
                del state_dict[name]
            args[-1].append(
                f"the state is that of other subsets, {tuple(masks.shape)} in place of {tuple(self.masks.shape)} or of "
                f"other examples, and cannot be continued; make the metric with state_dict['{prefix}masks']."
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _check(self, scores: Tensor, losses: Tensor) -> None:
        """Refuse shapes that disagree with the masks, and numbers that are not finite."""
        subsets, examples = self.masks.shape
        if scores.shape[1] != examples or losses.shape[1:] != (subsets, len(scores)):
            raise ValueError(
                f"{subsets} subsets of {examples} examples take scores (queries, {examples}) and losses ({subsets}, "
                f"queries), got {tuple(scores.shape)} and {tuple(losses.shape)}."
            )
        for name, values in (("scores", scores), ("losses", losses)):
            if not values.isfinite().all():
                raise ValueError(f"{int((~values.isfinite()).sum())} of the {name} are not finite; drop their queries.")


def _spearman_and_without(
    a: Float[Tensor, "subsets queries"], b: Float[Tensor, "subsets queries"]
) -> tuple[Float[Tensor, " queries"], Float[Tensor, " subsets"]]:
    """Return Spearman for each query, and for each subset the sum over queries of Spearman without this subset."""
    others = ~torch.eye(len(a), dtype=torch.bool, device=a.device)
    return _spearman(a, b), torch.stack([_spearman(a[rest], b[rest]).sum() for rest in others])


def _spearman(a: Float[Tensor, "subsets queries"], b: Float[Tensor, "subsets queries"]) -> Float[Tensor, " queries"]:
    """Return Spearman for each query; zero if one side is constant, since it predicts nothing."""
    if a.shape[1] < 2:  # torchmetrics expects one output to have no axis of its own
        return torch.stack([spearman_corrcoef(a[:, 0], b[:, 0])]).double() if a.numel() else a.new_zeros(0)
    return spearman_corrcoef(a, b).double()


def _masks(subsets: Array | Sequence[Any], num_examples: int | None) -> Bool[Tensor, "subsets examples"]:
    """Return subsets as masks, from masks or from indices; integers without a number of examples are neither."""
    rows = [torch.as_tensor(subset) for subset in subsets]
    if any(row.ndim != 1 for row in rows):
        raise ValueError("subsets are rows of a table or a list of 1-D tensors or lists; got other shapes.")
    dtypes = {row.dtype for row in rows if row.numel()}
    if dtypes <= {torch.bool}:
        sizes = {len(row) for row in rows} | ({num_examples} if num_examples is not None else set())
        if len(sizes) > 1:
            raise ValueError(f"masks must have one entry for each example; got lengths {sorted(sizes)}.")
        return torch.stack(rows)
    if any(d.is_floating_point or d.is_complex or d == torch.bool for d in dtypes):
        raise TypeError(f"subsets are boolean masks or integer indices, got {', '.join(sorted(map(str, dtypes)))}.")
    if num_examples is None:
        raise TypeError(
            "subsets of integers may be masks or indices: pass masks as booleans, masks.bool(), or indices with "
            "num_examples=..."
        )
    masks = torch.zeros(len(rows), num_examples, dtype=torch.bool)
    for number, (mask, row) in enumerate(zip(masks, rows, strict=True)):
        indices = row.long().cpu()
        if len(indices.unique()) < len(indices) or ((indices < 0) | (indices >= num_examples)).any():
            raise ValueError(
                f"subset {number} has an index twice or outside 0 to {num_examples - 1}; are these masks? Pass them as "
                "booleans, without num_examples."
            )
        mask[indices] = True
    return masks
