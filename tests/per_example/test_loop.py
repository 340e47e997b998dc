"""One example at a time, in a loop or by vmap: the gradients that autograd gives for each example alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.autodiff.preserve_state import preserve_state
from lightning_sketch.operators import BlockSRHT
from lightning_sketch.per_example.loop import loop_sketches, vmap_sketches

ENGINES = [loop_sketches, vmap_sketches]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 3)).double()


def batch(examples=6):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(examples, 5, generator=generator, dtype=torch.float64)
    return {"x": x, "y": torch.randint(0, 3, (examples,), generator=generator), "scale": torch.tensor(2.0)}


def loss(module, batch):
    """A mean over the examples; "scale" has no axis of examples and goes to each."""
    return batch["scale"] * F.cross_entropy(module(batch["x"]), batch["y"])


@pytest.mark.parametrize("engine", ENGINES)
def test_rows_are_the_sketched_gradients_of_each_example_alone(engine):
    module, data = network(), batch()
    layout = Layout.of(module)
    sketch = BlockSRHT(layout.n, 32)
    with preserve_state(module):
        parameters = dict(zip(layout.names, layout.parameters(module), strict=True))
        rows, losses = engine(module, data, parameters, layout, sketch, loss)
        for i in range(6):
            alone = {"x": data["x"][i : i + 1], "y": data["y"][i : i + 1], "scale": data["scale"]}
            value = loss(module, alone)
            gradients = torch.autograd.grad(value, layout.parameters(module))
            truth = sketch.matvec(torch.cat([g.flatten() for g in gradients]))
            torch.testing.assert_close(rows[i], truth, rtol=1e-12, atol=1e-13)
            torch.testing.assert_close(losses[i], value.detach())


@pytest.mark.parametrize("engine", ENGINES)
def test_some_parameters_only(engine):
    """What is not asked for counts as zero, at its own place in the flat vector."""
    module, data = network(), batch()
    layout = Layout.of(module)
    sketch = BlockSRHT(layout.n, 32)
    with preserve_state(module):
        every = dict(zip(layout.names, layout.parameters(module), strict=True))
        first = {name: p for name, p in every.items() if name.startswith("0.")}
        rest = {name: p for name, p in every.items() if name not in first}
        whole, _ = engine(module, data, every, layout, sketch, loss)
        parts = [engine(module, data, some, layout, sketch, loss)[0] for some in (first, rest)]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=1e-13)
    assert all(part.norm() > 0 for part in parts)


@pytest.mark.parametrize("size", [724, 2048])
def test_large_gradients_are_computed_and_sketched_a_few_at_a_time(size):
    """Of 524,176 numbers four are sketched together; of 2^22 numbers four are computed together, sketched alone."""
    module, x = nn.Linear(size, size, bias=False), torch.randn(6, size)
    layout = Layout.of(module)
    sketch = BlockSRHT(layout.n, 32)
    with preserve_state(module):
        rows, losses = zip(
            *(
                engine(module, x, {"weight": module.weight}, layout, sketch, lambda m, x: m(x).square().sum())
                for engine in ENGINES
            ),
            strict=True,
        )
        gradients = 2 * torch.einsum("bo,bi->boi", module(x), x).detach()
    truth = torch.stack([sketch.matvec(g.flatten()) for g in gradients])
    for found, values in zip(rows, losses, strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-4 * float(truth.abs().max()))
        torch.testing.assert_close(values, module(x).square().sum(1).detach())


def test_what_depends_on_data_is_refused_by_vmap_with_the_way_out():
    module, data = network(), batch()
    layout = Layout.of(module)
    parameters = dict(zip(layout.names, layout.parameters(module), strict=True))

    def decides(module, batch):
        value = loss(module, batch)
        return value if value > 0 else -value

    with preserve_state(module), pytest.raises(ValueError, match="Use 'loop'"):
        vmap_sketches(module, data, parameters, layout, BlockSRHT(layout.n, 32), decides)
