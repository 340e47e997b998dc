"""Computes the Gauss-Newton matrix of the loss in sketch space, the best curvature if the model has logits.

    A = (1/n) sum_i S J_iᵀ H_i J_i Sᵀ = (1/n) sum_i sum_v r rᵀ,     r = S grad_theta <v, z_i(theta)>

z_i, J_i   the model's output for example i, and its Jacobian
H_i        Hessian of the example's own mean loss with respect to its output, sum_v v vᵀ; see `autodiff.output_roots`

For cross-entropy the rows are sqrt(p_c) S (J_c - sum_k p_k J_k). Each example costs as many sketched gradients as there
are classes, or `draws` of them. One v at a time exists, formed in the pass that needs it: beside what the model itself
holds, one tensor of the size of its output.

Source: Schraudolph (2002), doi:10.1162/08997660260028683; for its use in sketch space our own measurements in
`benchmarks/lds.py`.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from lightning_sketch.attribution._directed import Directed, DirectedStructure, along, check_rows
from lightning_sketch.attribution.curvature import Curvature, CurvatureSum
from lightning_sketch.attribution.indexed_dataset import without_index
from lightning_sketch.attribution.preconditioner import Preconditioner
from lightning_sketch.autodiff.batches import BatchStructure, differentiable, on_device
from lightning_sketch.autodiff.fingerprint import module_fingerprint
from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.autodiff.losses import LossFn, OutputLoss, OutputLossName, OutputModel
from lightning_sketch.autodiff.output_roots import Draws
from lightning_sketch.autodiff.preserve_state import preserve_state
from lightning_sketch.operators.sketch import Sketch
from lightning_sketch.per_example.example_sketches import Engine, ExampleSketches

_DRAWS, _TOKEN_DRAWS = 8, 2


def fit_ggn(
    module: nn.Module,
    batches: Iterable[Any],
    sketch: Sketch,
    layout: Layout,
    *,
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
    """Compute the Gauss-Newton matrix over all examples of the batches, at the module's current weights.

    Args:
        module: The module, in evaluation mode during the computation and then left as it was.
        batches: Batches of the training examples, read once.
        sketch: The sketch of the rows that the curvature is for.
        layout: The parameters that these rows cover.
        model_fn: (module, batch) -> the output, (examples, classes), or (examples, tokens, classes) if the loss of an
            example is a mean over tokens. If None, the module is called as in `GGN`.
        output_loss_fn: The loss of the output: "cross_entropy", "binary_cross_entropy" or "squared_error", means over
            an example's outputs, or an object such as `CrossEntropy(shift=True)`, which says too which tokens have a
            loss: those with a label other than -100, or as `ignore_index` and `labels_fn` say. If None, the one that
            has the value and the gradient of the trained loss, or of the loss that the model itself returns, on every
            batch; if neither is known, cross-entropy for whole-number labels and squared error for real ones.
        max_classes: With more classes, and for tokens always, `draws` labels are drawn for each example.
        draws: The number of labels to draw; None for 8, or 2 where an example has several tokens. On a GPT of 90,000
            parameters, at dim 4096, 1, 2 and 8 had an LDS of .45, .47 and .49, and took 3, 5 and 17 seconds.
        seed: Seed of the draws.
        engine: How the sketched gradients are computed, as in `sketch_gradients`.
        loss_fn: The trained loss, (module, batch) -> mean loss, with which a default output loss is compared on every
            batch. If None, the module's own `training_step`, if it has one.
        num_examples: The number of examples of a batch, or batch -> this number, as in `sketch_gradients`; the output
            has one row for each.
        batch_dim: The axis of the examples in a batch, as in `sketch_gradients`.
        split_fn: batch -> batches of one example, as in `sketch_gradients`.
        preconditioner: That of the rows that the curvature is for.

    Returns:
        The curvature, at most dim x dim in float64.

    Raises:
        ValueError: if the output does not have one row per example; if the default loss of the output is not the
            trained loss or cannot be determined; if sketch and layout disagree.

    Cost: O(examples classes dim²) in float64, beside the gradients.

    >>> from lightning_sketch.operators import BlockSRHT
    >>> module = nn.Linear(3, 2)
    >>> layout = Layout.of(module)
    >>> batch = torch.eye(3), torch.tensor([0, 1, 1])
    >>> curvature = fit_ggn(module, [batch], BlockSRHT(layout.n, 4), layout)
    >>> curvature.examples, curvature.dense().shape
    (3, torch.Size([4, 4]))
    """
    if sketch.n != layout.n:
        raise ValueError(
            f"the sketch takes n={sketch.n} numbers, the layout has {layout.n}; build it with n={layout.n}."
        )
    model = OutputModel(module, model_fn, output_loss_fn, loss_fn)
    if model.given is not None and not hasattr(model.given, "roots"):
        raise ValueError(
            f"fit_ggn needs the method `roots` of an output loss, which {model.given!r} does not have; use "
            "'cross_entropy', 'binary_cross_entropy' or 'squared_error', or scores(..., curvature='margin') or "
            "'fisher', which are made from the rows."
        )
    generator = torch.Generator().manual_seed(seed)
    total = CurvatureSum(sketch.dim)
    structure = BatchStructure(num_examples, batch_dim, split_fn)

    mapped = None if preconditioner is None else preconditioner.of(layout, module_fingerprint(module))
    both = DirectedStructure(of_batch=structure)
    sketches = ExampleSketches(
        module,
        layout,
        sketch=sketch,
        loss_fn=along(model),
        engine=engine,
        reduction="sum",
        structure=both,
        gradient_map=mapped,
    )
    weights = layout.parameters(module)
    for batch in batches:
        with preserve_state(module):
            batch = on_device(differentiable(without_index(batch)), weights[0].device)
            output, loss = model.output_and_loss(batch)
            check_rows(output, structure.count(batch))
            count = draws or (_TOKEN_DRAWS if output.ndim > 2 else _DRAWS)
            roots = loss.roots(output, batch, Draws(generator, count, max_classes))
            del output  # a root needs it no more
            none = torch.zeros(structure.count(batch), sketch.dim, device=weights[0].device)
            rows = [sketches(Directed(batch, root))[0] if root.parts[0].any() else none for root in roots]
        total.add(torch.stack(rows, 1).cpu())
    return total.curvature("ggn", module_fingerprint(module), 0 if preconditioner is None else preconditioner.id)
