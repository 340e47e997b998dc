"""Factors for an accumulator, and the flat gradients that they stand for, formed by `einsum` and `index_add_`."""

import torch
from torch import nn

from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.operators.kinds import KINDS
from lightning_sketch.per_example.accumulate import SketchAccumulator
from lightning_sketch.per_example.factors import Dense, LowRank, SparseRows

# With chunks of 33 to 128 numbers these parameters begin and end inside chunks, and several share one.
SHAPES = {"a": (3,), "b": (7, 5), "table": (11, 6), "c": (1,), "d": (40, 16), "e": (2, 3), "f": (33,)}


def module_of(shapes=SHAPES, dtype=torch.float64):
    module = nn.Module()
    for name, shape in shapes.items():
        module.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=dtype)))
    return module


def accumulator_of(kind, dim, module):
    layout = Layout.of(module)
    sketch = KINDS[kind](layout.n, dim, seed=3)
    return SketchAccumulator(sketch, layout, parameters=dict(module.named_parameters())), sketch


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def all_factors(module, examples, tokens=4, dtype=torch.float64):
    """Factors of every class, in backward order: some twice, some for a part of a parameter; indices repeat."""

    def draw(*shape, seed=0):
        return random(*shape, seed=seed, dtype=dtype)

    index = torch.randint(3, 11, (examples, tokens), generator=torch.Generator().manual_seed(1))
    index[:, 1] = index[:, 0]
    return [
        Dense(module.f, draw(examples, 33, seed=1)),
        LowRank(module.d, draw(examples, tokens, 40), draw(examples, tokens, 16, seed=2)),
        LowRank(module.d, draw(examples, 1, 9), draw(examples, 1, 16, seed=3), start=21),
        Dense(module.d, draw(examples, 100, seed=4), start=333),
        SparseRows(module.table, index, draw(examples, tokens, 6, seed=5)),
        LowRank(module.table, draw(examples, tokens, 11), draw(examples, tokens, 6, seed=6)),
        Dense(module.c, draw(examples, 1, seed=7)),
        LowRank(module.b, draw(examples, 2, 7), draw(examples, 2, 5, seed=8)),
        Dense(module.a, draw(examples, 3, seed=9)),
    ]


def dense(factor, module, examples, dtype=torch.float64):
    """Return the flat gradient of every example."""
    start = 0
    for p in module.parameters():
        if p is factor.parameter:
            break
        start += p.numel()
    out = torch.zeros(examples, sum(p.numel() for p in module.parameters()), dtype=dtype)
    if isinstance(factor, SparseRows):
        for row, index, values in zip(out, factor.index, factor.values.to(dtype), strict=True):
            row[start : start + factor.parameter.numel()].view(factor.parameter.shape).index_add_(0, index, values)
        return out
    if isinstance(factor, LowRank):
        values = torch.einsum("bto,bti->boi", factor.left.to(dtype), factor.right.to(dtype)).flatten(1)
    else:
        values = factor.values.to(dtype)
    out[:, start + factor.start : start + factor.start + values.shape[1]] = values
    return out


def assert_near(got, expected, tolerance):
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


def added(accumulator, factors, examples):
    accumulator.start(examples)
    for factor in factors:
        accumulator.add(factor)
    return accumulator.rows()


def assert_sketched(kind, dim, module, factors, examples):
    """The rows are the sketches of the whole gradients, whatever the order of the factors."""
    accumulator, sketch = accumulator_of(kind, dim, module)
    expected = sketch.matvec(sum(dense(factor, module, examples) for factor in factors))
    assert_near(added(accumulator, factors, examples), expected, 1e-10)
    if len(factors) > 1:
        assert_near(added(accumulator, factors[::-1], examples), expected, 1e-10)
