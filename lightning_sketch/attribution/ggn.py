"""The Gauss-Newton matrix of the loss in sketch space: the curvature of choice where logits are to be had.

    A = (1/n) sum_i S J_iᵀ H_i J_i Sᵀ = (1/n) sum_i sum_v r rᵀ,     r = S grad_theta <v, z_i(theta)>

z_i, J_i   the model's output for example i, and its Jacobian
H_i        Hessian of the example's loss with respect to its output, sum_v v vᵀ; see `output_curvature`

For cross-entropy the rows are sqrt(p_c) S (J_c - sum_k p_k J_k). It costs as many sketched gradients per example as
there are classes, or `draws` of them.

Source: Schraudolph (2002), doi:10.1162/08997660260028683; for its use in sketch space our own measurements in
`benchmarks/lds.py`.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sketch.attribution.curvature import Curvature, CurvatureSum
from lightning_sketch.attribution.indexed_dataset import without_index
from lightning_sketch.autodiff.batches import differentiable, labels_of, num_examples, on_device
from lightning_sketch.autodiff.fingerprint import fingerprint
from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.autodiff.output_curvature import check_output, output_loss_of, output_roots, token_roots
from lightning_sketch.autodiff.preserve_state import preserve_state
from lightning_sketch.operators.sketch import Sketch
from lightning_sketch.per_example.example_sketches import ExampleSketches


def fit_ggn(
    module: nn.Module,
    batches: Iterable[Any],
    sketch: Sketch,
    layout: Layout,
    model_fn: Callable[[nn.Module, Any], Any] | None = None,
    output_loss: str | None = None,
    max_classes: int = 32,
    draws: int = 8,
    seed: int = 0,
    engine: str = "auto",
    counted: Callable[[Any], Tensor] | None = None,
) -> Curvature:
    """The Gauss-Newton matrix over all examples of the batches, at the module's present parameters.

    Args:
        module: in evaluation mode while it is looked at, and left as it was.
        batches: read once.
        sketch: as of the rows that the curvature is for.
        layout: the parameters; as of these rows.
        model_fn: (module, batch) -> output (examples, classes), or (examples, tokens, classes) where an example's loss
            is a mean over tokens; by default that of `module(**batch)` for a mapping, else of `module(x)` with x the
            first item of the batch; of what a Hugging Face model returns, the logits.
        output_loss: "cross_entropy", "binary_cross_entropy" or "squared_error", means over an example's outputs; by
            default cross-entropy for whole-number labels, squared error for real ones.
        max_classes: above it, `draws` labels are drawn for each example; for tokens always.
        draws: how many.
        seed: of the draws.
        engine: what makes the sketched gradients, as in `sketch_gradients`.
        counted: batch -> (examples, tokens), which tokens have a loss, for instance
            `lambda batch: batch["labels"][:, 1:] != -100` beside a `model_fn` that leaves the last logits out.

    Raises:
        ValueError: if the output does not have one row per example, or not one for each token in `counted`; if labels
            of -100 are among those of tokens and `counted` is not given; if sketch and layout disagree.

    O(examples classes dim²) in float64 beside the gradients.

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
    model_fn = model_fn or _call
    generator = torch.Generator().manual_seed(seed)
    total = CurvatureSum(sketch.dim)

    def along(module: nn.Module, pair: tuple[Any, Tensor]) -> Tensor:
        """The sum over examples of <v, output>, whose gradient per example is a row."""
        batch, v = pair
        return (_output(model_fn, module, batch) * v).sum()

    sketches = ExampleSketches(module, layout, sketch, along, engine, reduction="sum")
    weights = layout.parameters(module)
    for batch in batches:
        with preserve_state(module):
            batch = on_device(differentiable(without_index(batch)), weights[0].device)
            with torch.no_grad():
                output = _output(model_fn, module, batch)
            loss = output_loss or output_loss_of(batch)
            check_output(output, loss, num_examples(batch))
            if output.ndim > 2:
                roots = token_roots(output.double(), _counted(counted, batch, output), loss, draws, generator)
            else:
                flat = output.double().view(len(output), -1)
                roots = output_roots(flat, loss, max_classes, draws, generator)
            rows = [sketches((batch, v.view(output.shape).to(output)))[0] for v in roots]
        total.add(torch.stack(rows, 1).cpu())
    return total.curvature("ggn", fingerprint(weights))


def _output(model_fn: Callable[[nn.Module, Any], Any], module: nn.Module, batch: Any) -> Any:
    returned = model_fn(module, batch)
    return getattr(returned, "logits", returned)


def _counted(counted: Callable[[Any], Tensor] | None, batch: Any, output: Tensor) -> Tensor:
    """Which tokens have a loss: all, unless it is said."""
    if counted is None:
        labels = labels_of(batch)
        if not labels.is_floating_point() and (labels == -100).any():
            raise ValueError(
                "some labels are -100, so that not every token has a loss; pass counted=lambda batch: "
                'batch["labels"] != -100, shifted as the loss of your model shifts them.'
            )
        return torch.ones(output.shape[:-1], dtype=torch.bool, device=output.device)
    kept = counted(batch)
    if kept.shape != output.shape[:-1]:
        raise ValueError(
            f"counted gives shape {tuple(kept.shape)}, the output has tokens {tuple(output.shape[:-1])}; make both of "
            "one length, e.g. by model_fn=lambda module, batch: module(**batch).logits[:, :-1]."
        )
    return kept.bool().to(output.device)


def _call(module: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return module(**batch)
    return module(batch[0] if isinstance(batch, list | tuple) else batch)
