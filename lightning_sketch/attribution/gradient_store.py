"""A store of sketched gradients with the functions of `attribution` as methods."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_sketch._arguments import check_data
from lightning_sketch._files import CorruptFile, check_folder
from lightning_sketch.attribution._selected import Queries
from lightning_sketch.attribution.curvature import Curvature, Damping
from lightning_sketch.attribution.ggn import fit_ggn
from lightning_sketch.attribution.preconditioner import FOLDER as PRECONDITIONERS
from lightning_sketch.attribution.preconditioner import Preconditioner
from lightning_sketch.attribution.report import report
from lightning_sketch.attribution.row_arguments import inherited
from lightning_sketch.attribution.scores import (
    FOLDER,
    CurvatureLike,
    Group,
    Method,
    TopK,
    scored_rows,
    scores,
    top_k,
)
from lightning_sketch.attribution.self_influence import SelfInfluence, SelfMethod, self_influence
from lightning_sketch.attribution.sketch_gradients import RowFn, sketch_gradients
from lightning_sketch.autodiff.fingerprint import module_fingerprint, short
from lightning_sketch.autodiff.losses import LossFn, OutputLoss, OutputLossName
from lightning_sketch.per_example.example_sketches import Engine
from lightning_sketch.per_example.weights import Reduction
from lightning_sketch.store.format import CorruptShard, read_runs
from lightning_sketch.store.row_store import RowStore
from lightning_sketch.store.sketched_gradients import NONE, OF_STEP, STAGES, SketchedGradients


class GradientStore(RowStore):
    """Sketched gradients on disk, as `GradientSketchWriter` writes them, with influence scores of their examples.

    `len`, `metadata`, `where` and `blocks` see the visible rows: those of the latest fit and of the runs that it
    resumed, each step once, and those taken at checkpoints; not the `queries`, which are stored beside them.

    Made by `open` or `create`, see `RowStore`.

    Args:
        snapshot: Which store, and which files of it.
        rows: Index of the visible rows.
        query_rows: Index of the visible rows of stored queries.

    Example::

        store = GradientStore.open("lightning_logs/version_0/sketches")
        queries = store.sketch_gradients(module, test_loader)
        store.fit_curvature(module, train_loader)
        print(store.top_k(queries, k=5, method="influence").example_ids)
    """

    @property
    def preconditioner(self) -> Preconditioner | None:
        """The preconditioner of the rows that were taken at a checkpoint; None if they have none.

        Raises:
            ValueError: if rows of several are visible; select some with `where`.
            CorruptFile: if a file of it is not what was written.
        """
        return self._preconditioner_of(self.rows.columns["stage"] != STAGES.index("fit"))

    def _preconditioner_of(self, rows: Tensor) -> Preconditioner | None:
        """Return the preconditioner of the rows of a mask."""
        found = self.rows.columns["preconditioner"][rows].unique().tolist()
        if len(found) > 1:
            raise ValueError(
                f"the rows have {len(found)} different preconditioners; choose with store.where(preconditioner=...) or "
                "store.where(stage=...)."
            )
        known = [id for id in found if id not in (NONE, OF_STEP)]
        try:
            return Preconditioner.load(self.path / PRECONDITIONERS, known[0]) if known else None
        except FileNotFoundError as error:
            raise CorruptFile(
                f"the preconditioner of the rows is gone from {self.path / PRECONDITIONERS}; restore it from a copy."
            ) from error

    def _inherited(self, module: nn.Module, given: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of queries, inherited where they are not given from the rows at the module's weights."""
        columns = self.rows.columns
        there = columns["fingerprint"] == module_fingerprint(module)
        attempts = columns["attempt"][there if there.any() else slice(None)].unique().tolist()
        return inherited([run for run in read_runs(self.snapshot) if run.number in attempts], given)

    def _preconditioner_at(self, module: nn.Module) -> Preconditioner | None:
        """Return the preconditioner of the rows at the module's present weights; None if there are no such rows."""
        there = self.rows.columns["fingerprint"] == module_fingerprint(module)
        return self._preconditioner_of(there & (self.rows.columns["stage"] != STAGES.index("fit")))

    def sketch_gradients(
        self,
        module: nn.Module,
        batches: Iterable[Any],
        *,
        loss_fn: LossFn | None = None,
        row_fn: RowFn | None = None,
        engine: Engine = "auto",
        weight_fn: Callable[[Any], float] | None = None,
        reduction: Reduction | None = None,
        index_key: str | int | None = None,
        num_examples: int | Callable[[Any], int] | None = None,
        batch_dim: int = 0,
        split_fn: Callable[[Any], Iterable[Any]] | None = None,
        per_token: bool = False,
        preconditioner: Preconditioner | None = None,
    ) -> SketchedGradients:
        """Compute sketched gradients of examples with the sketch and the parameters of the store, as queries.

        What is not given is that of the rows: their `loss_fn`, `row_fn`, `weight_fn`, `reduction`, `num_examples`,
        `batch_dim`, `split_fn` and preconditioner. Functions are known in the process that has written the rows, or if
        they have a name in a module that is imported; else a warning says which to pass.

        Args:
            module: The module, which is left as it was.
            batches: Batches of examples as the loss takes them, such as a data loader.
            loss_fn: (module, batch) -> the mean loss of the batch; the module's `training_step` by default.
            row_fn: (module, batch) -> (losses, probabilities of the true labels), one per example. It fills the columns
                `loss` and `prob_true`, which the curvatures "margin" and "trak" need.
            engine: "hooks", from the backward pass of a whole batch; "vmap"; "loop", one example at a time; "auto":
                hooks as long as they are exact, else the loop.
            weight_fn: batch -> the weight of the batch in a mean over batches, where no usual way fits.
            reduction: "mean", or "sum" if the loss is a sum over examples; found by itself if None.
            index_key: Where a batch has the ids of its examples, or "hash" to compute ids from their contents.
            num_examples: The number of examples of a batch, or batch -> this number, if its tensors disagree.
            batch_dim: The axis of the examples, 1 for (time, batch, ...), with the loop only.
            split_fn: batch -> batches of one example, for graphs, with the loop only.
            per_token: Whether to compute a row for each label that is not -100, of the loss of this token alone, with
                its position in the column `token`: which of my words was taught by what.
            preconditioner: What gradients are multiplied by; that of the rows at these weights if None.

        Returns:
            The rows, (examples, dim), in the order of the examples.

        Raises:
            TypeError: If the module or the batches are none.
            ValueError: If there are no batches, or no engine can split the gradients.
        """
        check_data(module, batches, "sketch_gradients")
        given = {
            "loss_fn": loss_fn,
            "row_fn": row_fn,
            "weight_fn": weight_fn,
            "reduction": reduction,
            "num_examples": num_examples,
            "batch_dim": batch_dim,
            "split_fn": split_fn,
        }
        return sketch_gradients(
            module,
            batches,
            self.sketch,
            engine=engine,
            parameters=list(self.spec.parameters.names),
            index_key=index_key,
            per_token=per_token,
            **self._inherited(module, given),
            preconditioner=preconditioner or self._preconditioner_at(module),
        )

    def fit_curvature(
        self,
        module: nn.Module,
        batches: Iterable[Any],
        *,
        curvature: Literal["ggn"] = "ggn",
        model_fn: Callable[[nn.Module, Any], Any] | None = None,
        output_loss_fn: OutputLossName | OutputLoss | None = None,
        max_classes: int = 32,
        draws: int | None = None,
        seed: int = 0,
        engine: Engine = "auto",
        loss_fn: LossFn | None = None,
        num_examples: int | Callable[[Any], int] | None = None,
        batch_dim: int = 0,
        split_fn: Callable[[Any], Iterable[Any]] | None = None,
        preconditioner: Preconditioner | None = None,
    ) -> Curvature:
        """Compute the Gauss-Newton matrix and save it in the store, where `method="influence"` reads it.

        It is the mean over examples, each with its own mean loss, and serves rows that were taken at the same weights.
        With language models it takes no more memory than training: labels are drawn, and nothing has the size of the
        vocabulary squared.

        Args:
            module: The module, with the weights at which the rows were taken; a warning says so at once if none was.
            batches: Batches of the training examples.
            curvature: "ggn"; the other kinds are made from the rows when scores are computed.
            model_fn: (module, batch) -> the output, (examples, classes) or (examples, tokens, classes); by default the
                module is called with the first item of the batch, or with its entries by name.
            output_loss_fn: The loss of the output: "cross_entropy", "binary_cross_entropy", "squared_error", or an
                object such as `CrossEntropy(shift=True)`, which says too which tokens have a loss (`ignore_index`,
                `labels_fn`). By default the one that has the value and the gradient of the trained loss.
            max_classes: With more classes, and for tokens always, `draws` labels are drawn for each example.
            draws: The number of labels to draw; None for 8, or 2 where an example has several tokens.
            seed: Seed of the draws.
            engine: "hooks", from the backward pass of a whole batch; "vmap"; "loop", one example at a time; "auto":
                hooks as long as they are exact, else the loop.
            loss_fn: The trained loss, (module, batch) -> mean loss; the module's `training_step` by default. The
                default loss of the output is compared with it.
            num_examples: The number of examples of a batch, or batch -> this number, if its tensors disagree.
            batch_dim: The axis of the examples, 1 for (time, batch, ...), with the loop only.
            split_fn: batch -> batches of one example, for graphs and packed sequences, with the loop only.
            preconditioner: What gradients are multiplied by; that of the rows at these weights if None.

        Returns:
            The curvature, which is also saved.

        Raises:
            ValueError: If `curvature` is not "ggn", the output does not have one row per example, or the loss of the
                output is not the trained loss or is ambiguous.
        """
        if curvature != "ggn":
            raise ValueError(f"curvature={curvature!r} is made from the rows and need not be fitted; fit 'ggn'.")
        check_data(module, batches, "fit_curvature")
        self._warn_if_no_rows_at(module_fingerprint(module))
        given = {"loss_fn": loss_fn, "num_examples": num_examples, "batch_dim": batch_dim, "split_fn": split_fn}
        found = fit_ggn(
            module,
            batches,
            self.sketch,
            self.spec.parameters,
            model_fn=model_fn,
            output_loss_fn=output_loss_fn,
            max_classes=max_classes,
            draws=draws,
            seed=seed,
            engine=engine,
            **self._inherited(module, given),
            preconditioner=preconditioner or self._preconditioner_at(module),
        )
        found.save(self.path / FOLDER)
        return found

    def _warn_if_no_rows_at(self, fingerprint: int) -> None:
        """Warn that no row can use a curvature at these weights."""
        found = self.metadata()["fingerprint"].unique().tolist()
        if fingerprint == 0 or fingerprint in found:
            return
        warnings.warn(
            f"fit_curvature is called at weights {short(fingerprint)}, at which the store has no rows (theirs: "
            f"{', '.join(map(short, found[:3]))}{', ...' if len(found) > 3 else ''}), so that no score can use what it "
            "computes; load the checkpoint that the rows were taken at, or take rows at these weights by "
            "trainer.validate(module, train_loader).",
            stacklevel=3,
        )

    def verify(self, on_file: Callable[[], object] | None = None) -> int:
        """Read every file, curvatures and preconditioners too, compare its checksum, and return the number of all rows.

        Args:
            on_file: Called after each file of rows, to show progress.

        Raises:
            CorruptFile: if files are truncated, changed, exchanged, foreign or missing; the message names all.
        """
        wrong, rows = [], 0
        try:
            rows = super().verify(on_file)
        except CorruptFile as error:
            wrong.append(str(error))
        for path in sorted((self.path / FOLDER).glob("*.safetensors")):
            try:
                check_folder(path.parent)
                Curvature.read(path)
            except CorruptFile as error:
                wrong.append(str(error))
        for path in Preconditioner.stored(self.path / PRECONDITIONERS):
            try:
                check_folder(path.parent)
                check_folder(path)
                Preconditioner.read(path, check=True)
            except CorruptFile as error:
                wrong.append(str(error))
        if wrong:
            raise CorruptShard("\n".join(wrong))
        return rows

    def scores(
        self,
        queries: Queries,
        *,
        method: Method = "dot",
        curvature: CurvatureLike = "ggn",
        damping: Damping = "auto",
        normalize: bool = False,
        weighted: bool = False,
        group: Group | None = None,
        batch_rows: int = 4096,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Compute the influence of each row on each query, positive if it helps; see `attribution.scores`.

        Args:
            queries: The rows of the queries; for tracin by the step of their checkpoint, {step: queries}.
            method: "dot", "cosine", "tracin" or "influence".
            curvature: The curvature for influence; "ggn" is the one that `fit_curvature` saved.
            damping: The damping for influence: "auto", a number, or several.
            normalize: Whether to divide by the lengths of row and query: relative influence, or the cosine for "dot".
            weighted: Whether to multiply by the column `weight` over its mean, as examples act on training under a
                mean over tokens.
            group: "example_id" sums over rows of equal id.
            batch_rows: Most rows in memory at a time.
            device: Where rows are multiplied, such as "cuda"; on the CPU if None.

        Returns:
            (queries, rows that are scored), in their order: those at the weights of the queries, whose positions
            `scored_rows(queries)` returns; or (queries, ids) with `group`; with several dampings, these along a first
            axis. In float32, or float64 if that cannot hold them.

        Raises:
            ValueError: as `attribution.scores`.
            FileNotFoundError: if `curvature="ggn"` was not fitted at these weights.
        """
        return scores(
            queries,
            self,
            method=method,
            curvature=curvature,
            damping=damping,
            normalize=normalize,
            weighted=weighted,
            group=group,
            batch_rows=batch_rows,
            device=device,
        )

    def scored_rows(self, queries: Queries) -> Tensor:
        """Return the positions of the rows that `scores` has columns for; see `attribution.scored_rows`.

        Args:
            queries: The queries; for tracin by the step of their checkpoint.

        Returns:
            int64, (columns,), so that `store.metadata()[name][store.scored_rows(queries)]` is the column of the scores.

        Raises:
            ValueError: as `attribution.scores`.
        """
        return scored_rows(queries, self)

    def top_k(
        self,
        queries: Queries,
        k: int = 10,
        *,
        largest: bool = True,
        method: Method = "dot",
        curvature: CurvatureLike = "ggn",
        damping: Damping = "auto",
        normalize: bool = False,
        weighted: bool = False,
        group: Group | None = "example_id",
        batch_rows: int = 4096,
        device: torch.device | str | None = None,
    ) -> TopK:
        """Find the examples that help each query most, or with `largest=False` hurt it most; see `attribution.top_k`.

        Args:
            queries: The rows of the queries; for tracin by the step of their checkpoint, {step: queries}.
            k: How many examples to return; fewer if there are fewer.
            largest: True for the examples that help most, False for those that hurt most.
            method: "dot", "cosine", "tracin" or "influence".
            curvature: The curvature for influence; "ggn" is the one that `fit_curvature` saved.
            damping: The damping for influence, "auto" or one number.
            normalize: Whether to rank by relative influence, so that outliers do not win every list.
            weighted: Whether to multiply by the weights of the rows.
            group: "example_id" sums over rows of one example; None ranks single rows.
            batch_rows: Most rows in memory at a time.
            device: Where rows are multiplied, such as "cuda"; on the CPU if None.

        Returns:
            `TopK(scores, example_ids)`, both (queries, k), with `reliability`, (queries,): how near the scores are to
            those of gradients that were never sketched, or None; see `attribution.reliability`.

        Raises:
            ValueError: as `attribution.top_k`.
            FileNotFoundError: if `curvature="ggn"` was not fitted at these weights.
        """
        return top_k(
            queries,
            self,
            k,
            largest=largest,
            method=method,
            curvature=curvature,
            damping=damping,
            normalize=normalize,
            weighted=weighted,
            group=group,
            batch_rows=batch_rows,
            device=device,
        )

    def report(
        self,
        path: str | Path,
        queries: SketchedGradients,
        *,
        train: Any = None,
        queries_of: Sequence[Any] | None = None,
        k: int = 10,
        method: Method = "dot",
        curvature: CurvatureLike = "ggn",
        damping: Damping = "auto",
        normalize: bool = True,
        weighted: bool = False,
        title: str = "Which examples taught what",
    ) -> Path:
        """Write one HTML file with the best and the worst examples of each query; see `attribution.report`.

        Args:
            path: The file, which is replaced.
            queries: The rows of the queries.
            train: The training examples by their ids, as a list, a dict or a data set: texts, images, or anything else,
                whose `str` is shown.
            queries_of: The same of the queries; for queries by token the tokens of each text, as strings.
            k: The number of examples on each side.
            method: As in `top_k`, as are `curvature`, `damping` and `weighted`.
            curvature: The curvature for influence.
            damping: The damping for influence.
            normalize: Whether scores are relative influence, since without it outliers are in all lists.
            weighted: Whether to multiply by the weights of the rows.
            title: The title of the page.

        Raises:
            ValueError: as `top_k`; if `queries_of` has another length than there are queries.
            KeyError: if `train` lacks an example.
        """
        return report(
            path,
            queries,
            self,
            train=train,
            queries_of=queries_of,
            k=k,
            method=method,
            curvature=curvature,
            damping=damping,
            normalize=normalize,
            weighted=weighted,
            title=title,
        )

    def self_influence(
        self,
        *,
        method: SelfMethod = "tracin",
        curvature: CurvatureLike = "ggn",
        damping: Damping = "auto",
        batch_rows: int = 4096,
    ) -> SelfInfluence:
        """Compute the influence of each example, or step, on its own loss; see `attribution.self_influence`.

        Args:
            method: "tracin", "influence" or "dot".
            curvature: The curvature for influence; "ggn" is the one that `fit_curvature` saved.
            damping: The damping for influence, "auto" or one number.
            batch_rows: Most rows in memory at a time.

        Returns:
            `SelfInfluence(scores, example_ids)`, both (rows,); for tracin the ids are in rising order, each once.

        Raises:
            ValueError: as `attribution.self_influence`.
            FileNotFoundError: if `curvature="ggn"` was not fitted at these weights.
        """
        return self_influence(self, method=method, curvature=curvature, damping=damping, batch_rows=batch_rows)
