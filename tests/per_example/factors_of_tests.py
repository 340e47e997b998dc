"""Pieces for a sink, and the flat gradients that they stand for, formed by `einsum` and `index_add_`."""

import torch
from torch import nn

from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.operators.kinds import KINDS
from lightning_sketch.per_example.accumulate import SketchAccumulator
from lightning_sketch.per_example.factors import Dense, LowRank, SparseRows

SHAPES = {"a": (3,), "b": (7, 5), "table": (11, 6), "c": (1,), "d": (40, 16), "e": (2, 3), "f": (33,)}
"""Of parameters: with chunks of 33 to 128 numbers, they begin and end inside chunks, and several share one."""


def module(shapes=SHAPES, dtype=torch.float64):
    made = nn.Module()
    for name, shape in shapes.items():
        made.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=dtype)))
    return made


def sink(kind, dim, made):
    layout = Layout.of(made)
    sketch = KINDS[kind](layout.n, dim, seed=3)
    return SketchAccumulator(sketch, layout, dict(made.named_parameters())), sketch


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pieces(made, examples, tokens=4, dtype=torch.float64):
    """Of every sort, in backward order: some twice, some for a part of the parameter; indices repeat, unordered."""
    index = torch.randint(3, 11, (examples, tokens), generator=torch.Generator().manual_seed(1))
    index[:, 1] = index[:, 0]
    return [
        Dense(made.f, random(examples, 33, seed=1, dtype=dtype)),
        LowRank(made.d, random(examples, tokens, 40, dtype=dtype), random(examples, tokens, 16, seed=2, dtype=dtype)),
        LowRank(made.d, random(examples, 1, 9, dtype=dtype), random(examples, 1, 16, seed=3, dtype=dtype), start=21),
        Dense(made.d, random(examples, 100, seed=4, dtype=dtype), start=333),
        SparseRows(made.table, index, random(examples, tokens, 6, seed=5, dtype=dtype)),
        LowRank(
            made.table, random(examples, tokens, 11, dtype=dtype), random(examples, tokens, 6, seed=6, dtype=dtype)
        ),
        Dense(made.c, random(examples, 1, seed=7, dtype=dtype)),
        LowRank(made.b, random(examples, 2, 7, dtype=dtype), random(examples, 2, 5, seed=8, dtype=dtype)),
        Dense(made.a, random(examples, 3, seed=9, dtype=dtype)),
    ]


def dense(piece, made, examples, dtype=torch.float64):
    """The flat gradient of every example."""
    sizes = {id(p): p.numel() for p in made.parameters()}
    start = 0
    for p in made.parameters():
        if p is piece.parameter:
            break
        start += p.numel()
    out = torch.zeros(examples, sum(sizes.values()), dtype=dtype)
    if isinstance(piece, SparseRows):
        for row, index, values in zip(out, piece.index, piece.values.to(dtype), strict=True):
            row[start : start + piece.parameter.numel()].view(piece.parameter.shape).index_add_(0, index, values)
        return out
    if isinstance(piece, LowRank):
        values = torch.einsum("bto,bti->boi", piece.left.to(dtype), piece.right.to(dtype)).flatten(1)
    else:
        values = piece.values.to(dtype)
    out[:, start + piece.start : start + piece.start + values.shape[1]] = values
    return out


def assert_near(got, expected, tolerance):
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


def added(target, parts, examples):
    target.start(examples)
    for part in parts:
        target.add(part)
    return target.rows()
