"""Dense per-example gradients by hooks, and the same by autograd, one example at a time."""

import torch

from lightning_sketch.per_example.hooks import ExampleHooks
from lightning_sketch.testing.layer_rules import DenseRows

EXACT = {torch.float64: 1e-12, torch.float32: 5e-6}


def trained(module):
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def losses_of(output):
    """Return a loss of each example that depends on each of its outputs in a different way."""
    output = output.flatten(1)
    return (output.tanh() * torch.linspace(1, 2, output.shape[1], dtype=output.dtype)).sum(1)


def rows_by_hooks(module, run, *inputs, hooks=None, examples=None):
    """Return the rows from one backward pass of the sum of losses, and the hooks."""
    examples = len(inputs[0]) if examples is None else examples
    hooks = hooks or ExampleHooks(module, trained(module))
    accumulator = DenseRows(hooks._parameters, examples)
    with hooks.recording(accumulator, examples):
        loss = losses_of(run(*inputs)).sum()
        hooks.before_backward(loss)
        loss.backward()
    return accumulator.rows, hooks


def rows_by_autograd(module, run, *inputs):
    """Return the rows from a forward and a backward pass of each example alone."""
    rows = {name: [] for name in trained(module)}
    for b in range(len(inputs[0])):
        loss = losses_of(run(*(x[b : b + 1] for x in inputs))).sum()
        for name, gradient in zip(rows, gradients(loss, module), strict=True):
            rows[name].append(gradient)
    return {name: torch.stack(found) for name, found in rows.items()}


def gradients(loss, module, **options):
    """Return the flat gradients of all trainable parameters; zero where the loss does not depend on one."""
    own = list(trained(module).values())
    found = torch.autograd.grad(loss, own, allow_unused=True, **options)
    dense = (torch.zeros_like(p) if g is None else g.to_dense() for p, g in zip(own, found, strict=True))
    return [g.double().flatten() for g in dense]


def error(rows, truth):
    """Return the largest relative error of a parameter."""
    return max(float((rows[name] - truth[name]).norm() / truth[name].norm().clamp(min=1e-30)) for name in truth)


def sum_error(rows, module):
    """Return the largest relative difference between the sum of a parameter's rows and its `.grad`."""
    worst = 0.0
    for name, p in trained(module).items():
        grad = p.grad.to_dense().double().flatten()
        worst = max(worst, float((rows[name].sum(0) - grad).norm() / grad.norm().clamp(min=1e-30)))
    return worst


def assert_exact(module, run, *inputs):
    """Rows are the gradients of each example alone, their sum is that of the batch, and no parameter is missing."""
    module.zero_grad()
    rows, hooks = rows_by_hooks(module, run, *inputs)
    assert hooks.reasons == {}
    assert hooks.supported == set(rows)
    limit = EXACT[next(iter(rows and trained(module).values())).dtype]
    assert sum_error(rows, module) < limit
    assert error(rows, rows_by_autograd(module, run, *inputs)) < limit
    return hooks
