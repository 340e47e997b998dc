"""A store of rows that answers questions about them."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from lightning_sketch.attribution.curvature import Curvature
from lightning_sketch.attribution.ggn import fit_ggn
from lightning_sketch.attribution.scores import FOLDER, Queries, scores
from lightning_sketch.attribution.self_influence import SelfInfluence, self_influence
from lightning_sketch.attribution.sketch_gradients import sketch_gradients
from lightning_sketch.attribution.top_k import TopK, top_k
from lightning_sketch.store.row_store import RowStore
from lightning_sketch.store.sketched_gradients import SketchedGradients


class GradientStore(RowStore):
    """Sketched gradients on disk, as `GradientSketchWriter` left them, with the questions that can be asked of them.

    `len`, `metadata`, `where` and `blocks` see the visible rows: those of the latest fit and what it resumed from,
    each step once, and those taken at checkpoints; not the `queries` stored beside them.

    Example::

        store = GradientStore.open("lightning_logs/version_0/sketches")
        queries = store.sketch_gradients(module, test_loader)
        store.fit_curvature(module, train_loader)
        print(store.top_k(queries, k=5, method="influence").example_ids)
    """

    def sketch_gradients(self, module: nn.Module, batches: Iterable[Any], **options: Any) -> SketchedGradients:
        """Queries that fit the rows: by the store's own sketch, of its own parameters; see `sketch_gradients`."""
        return sketch_gradients(module, batches, self.sketch, parameters=list(self.spec.parameters.names), **options)

    def fit_curvature(
        self, module: nn.Module, batches: Iterable[Any], curvature: str = "ggn", **options: Any
    ) -> Curvature:
        """The Gauss-Newton matrix at the module's weights, kept beside the rows: method="influence" finds it there.

        Args:
            module: with the weights that the rows were taken at.
            batches: of the training examples.
            curvature: "ggn"; the others are made from the rows when they are asked for.
            **options: model_fn and more, see `fit_ggn`.

        Raises:
            ValueError: for another curvature, and as `fit_ggn`.
        """
        if curvature != "ggn":
            raise ValueError(f"curvature={curvature!r} is made from the rows and need not be fitted; fit 'ggn'.")
        found = fit_ggn(module, batches, self.sketch, self.spec.parameters, **options)
        found.save(self.path / FOLDER)
        return found

    def scores(self, queries: Queries, **options: Any) -> Tensor:
        """A score for each query and row, positive for what helped: see `scoring.scores`."""
        return scores(queries, self, **options)

    def top_k(self, queries: Queries, k: int = 10, **options: Any) -> TopK:
        """The examples that helped each query most, or with largest=False hurt it most: see `top_k.top_k`."""
        return top_k(queries, self, k, **options)

    def self_influence(self, method: str = "tracin", **options: Any) -> SelfInfluence:
        """How much each example helps itself: see `self_influence.self_influence`."""
        return self_influence(self, method, **options)
