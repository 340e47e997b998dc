"""The reliability of scores, from the halves of a sketch, is the correlation with the scores of dense gradients."""

import argparse
import ast
import difflib
import doctest
import inspect
import logging
import pdb
import tarfile
import typing

import pytest
import torch
import torch.nn.functional as F
from lds_problems import PROBLEMS
from marks import pairs, some
from rows import random_rows
from torch import nn
from torch.func import functional_call, grad, vmap

from lightning_sketch.attribution import reliability, scores, suggest_dim, top_k
from lightning_sketch.operators import BlockSRHT, make_sketch
from lightning_sketch.store.sketched_gradients import SketchedGradients

N, ROWS = 6000, 600


def made(noise, rows=ROWS, queries=40, seed=0):
    """Dense gradients: a common part of a few dimensions, noise of this share, and sizes that differ by five times."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    common = normal(30, N) * torch.arange(1, 31)[:, None] ** -0.5
    sizes = 0.5 + 2 * torch.rand(rows + queries, 1, generator=generator)
    gradients = sizes * (normal(rows + queries, 30) @ common + noise * normal(rows + queries, N))
    return gradients[:rows], gradients[rows:]


def correlation(a, b):
    a, b = (x - x.mean(1, keepdim=True) for x in (a.double(), b.double()))
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))


def table(gradients, sketch, **columns):
    return SketchedGradients(sketch.matvec(gradients), sketch, columns)


def exact(queries, train, cosine=False):
    found = queries.double() @ train.double().T
    return found / train.double().norm(dim=1) if cosine else found


def honest(estimate, true):
    """Within .05 of the truth on average over the queries, and never above it by more than .03."""
    difference = float(estimate.mean() - true.mean())
    return -0.05 < difference < 0.03


@pytest.mark.parametrize("noise", [1.0, 6.0])
@pytest.mark.parametrize("dim", some([256, 1024, 4096], [1024]))
@pytest.mark.parametrize("kind", some(["block_srht", "fjl", "gaussian"], ["block_srht"]))
def test_it_is_the_correlation_with_scores_without_a_sketch(kind, dim, noise):
    """From .4 to .99; with dim 4096 of 6000 parameters most of what a Block SRHT multiplies is in one chunk."""
    train, queries = made(noise)
    for method in ("dot", "cosine"):
        found, true = [], []
        for seed in range(3 if dim < 4096 else 1):
            own = [table(x, make_sketch(kind, n=N, dim=dim, seed=seed)) for x in (queries, train)]
            found.append(reliability(*own, method=method))
            true.append(correlation(scores(*own, method=method), exact(queries, train, method == "cosine")))
        assert honest(torch.cat(found), torch.cat(true))


def test_a_sketch_that_is_a_rotation_is_exact():
    """Of gradients that have nothing in common, whose halves agree on little."""
    generator = torch.Generator().manual_seed(0)
    train, queries = torch.randn(200, 4096, generator=generator), torch.randn(9, 4096, generator=generator)
    sketch = BlockSRHT(4096, 4096)
    torch.testing.assert_close(reliability(table(queries, sketch), table(train, sketch)), torch.ones(9))


def test_it_is_the_formula_of_spearman_and_brown():
    """sqrt(2 r / (1 + r)), r the correlation of the halves, which a common variance stands for here."""
    train, queries = made(0.5, rows=300)
    sketch = make_sketch("gaussian", n=N, dim=64)
    own, rows = table(queries, sketch), table(train, sketch)
    a, b = (q @ g.T for q, g in zip(own.sketches.chunk(2, 1), rows.sketches.chunk(2, 1), strict=True))
    covariance = ((a - a.mean(1, keepdim=True)) * (b - b.mean(1, keepdim=True))).mean(1)
    r = 2 * covariance / (a.var(1, correction=0) + b.var(1, correction=0))
    torch.testing.assert_close(reliability(own, rows), (2 * r / (1 + r)).clamp(min=0).sqrt(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch_rows", [1, 7, 97, 4096])
def test_blocks_and_parts_of_queries_give_the_same(batch_rows, monkeypatch):
    train, queries = made(0.5, rows=100)
    own = table(queries, BlockSRHT(N, 64)), table(train + 40 * queries[0], BlockSRHT(N, 64))  # scores far from zero
    whole = reliability(*own)
    monkeypatch.setattr("lightning_sketch.attribution.split_half._AT_ONCE", 100)
    torch.testing.assert_close(reliability(*own, batch_rows=batch_rows), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(top_k(*own, 3, batch_rows=batch_rows).reliability, whole, rtol=1e-4, atol=1e-4)


def test_sums_over_checkpoints_and_means_over_models():
    """Of the sum, not of its terms: these have errors of their own, so that the sum is more reliable than they are."""
    steps, sketch = [1, 2, 3, 4], BlockSRHT(N, 256)
    common, common_queries = made(0.3)
    own = [made(0.8, seed=5 + step) for step in steps]
    own = [(common + train, common_queries + queries) for train, queries in own]
    true = sum(exact(queries, train) for train, queries in own)
    columns = {"lr": torch.full((ROWS,), 0.1), "stage": torch.full((ROWS,), 1), "example_id": torch.arange(ROWS)}
    rows = SketchedGradients.cat(
        [
            table(train, sketch, **columns, step=torch.full((ROWS,), step))
            for step, (train, _) in zip(steps, own, strict=True)
        ]
    )
    asked = {step: table(queries, sketch) for step, (_, queries) in zip(steps, own, strict=True)}
    found = scores(asked, rows, method="tracin", group="example_id")
    tracin = reliability(asked, rows, method="tracin", group="example_id")
    assert honest(tracin, correlation(found, true))
    torch.testing.assert_close(top_k(asked, rows, 3, method="tracin").reliability, tracin)
    single = reliability(table(own[0][1], sketch), table(own[0][0], sketch))
    assert tracin.mean() > single.mean() + 0.02
    sketches = [BlockSRHT(N, 256, seed=step) for step in steps]
    members = [table(train, each) for (train, _), each in zip(own, sketches, strict=True)]
    models = [table(queries, each) for (_, queries), each in zip(own, sketches, strict=True)]
    assert honest(reliability(models, members), correlation(scores(models, members), true))


def test_contradicting_halves_are_worth_nothing():
    rows = random_rows(60, dim=64, seed=1)
    turned = rows.sketches.clone()
    turned[:, 32:] = -rows.sketches[:, :32]
    queries = rows.sketches[:5].clone()
    queries[:, 32:] = queries[:, :32]
    own = SketchedGradients(queries, rows.sketch), SketchedGradients(turned + 0.1 * rows.sketches, rows.sketch)
    assert reliability(*own).tolist() == [0.0] * 5


def test_scores_that_do_not_vary_and_rows_that_are_not_finite():
    train, queries = made(0.5, rows=50)
    sketch = BlockSRHT(N, 64)
    rows, own = table(train, sketch), table(queries[:3], sketch)
    with pytest.warns(UserWarning, match="1 of 4 queries are zero"):
        found = reliability(table(torch.cat([queries[:3], torch.zeros(1, N)]), sketch), rows)
    torch.testing.assert_close(found[:3], reliability(own, rows))
    assert found[3].isnan()
    broken = torch.cat([rows.sketches, torch.full((1, 64), float("nan"))])
    broken = SketchedGradients(broken, sketch, {"finite": torch.ones(51, dtype=torch.bool)})
    with pytest.warns(UserWarning, match="not finite"):
        torch.testing.assert_close(reliability(own, broken), reliability(own, rows), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["count_sketch", "qk", "ffd", "affd", "afjl"])
def test_halves_that_are_no_sketches_are_refused(kind):
    """Their estimates would be up to .1 below the truth (count_sketch, afjl), or .2 above it (qk, ffd, affd)."""
    train, queries = made(0.5, rows=50)
    own = [table(x, make_sketch(kind, n=N, dim=64)) for x in (queries, train)]
    assert top_k(*own, 2).reliability is None
    with pytest.raises(ValueError, match="block_srht, fjl, gaussian"):
        reliability(*own)
    with pytest.raises(ValueError, match="block_srht, fjl, gaussian"):
        suggest_dim(own[1])


def test_few_rows_and_a_curvature_are_refused():
    query = random_rows(3, seed=1)
    assert top_k(query, random_rows(29), 2).reliability is None
    assert "exact" not in repr(top_k(query, random_rows(29), 2))
    with pytest.raises(ValueError, match="needs 30 rows with finite scores, got 29"):
        reliability(query, random_rows(29))
    with pytest.raises(ValueError, match="needs 30 rows"):
        suggest_dim(random_rows(29))
    assert top_k(query, random_rows(40), 2, method="influence", curvature="fisher", damping=1.0).reliability is None


def test_it_is_said(caplog):
    train, queries = made(0.3)
    good = top_k(*(table(x, BlockSRHT(N, 1024)) for x in (queries, train)), 2)
    mean = float(good.reliability.mean())
    assert repr(good).endswith(f"\n    scores at dim 1024 are {mean:.2f} of exact")
    train, queries = made(6.0)
    own = [table(x, BlockSRHT(N, 256, seed=8)) for x in (queries, train)]  # not said by another test
    mean = float(reliability(*own).mean())
    said = f"scores at dim 256 are {mean:.2f} of exact (correlation, by the halves of the sketch): use dim >= "
    assert said in repr(top_k(*own, 2))
    with caplog.at_level(logging.WARNING, "lightning_sketch"):
        scores(*own)
    assert [record.message[: len(said)] for record in caplog.records] == [said]


@pytest.mark.parametrize(("start", "noise"), pairs([64, 256, 1024], [1.0, 3.0, 6.0]))
def test_the_dim_that_is_suggested_is_the_one_that_is_needed(start, noise):
    """The true reliability at the suggested dim is the wanted one, and at a quarter of it is not."""
    train, queries = made(noise)
    dim = suggest_dim(table(train, BlockSRHT(N, start)), reliability=0.9)

    def true(dim):
        sketch = BlockSRHT(N, dim, seed=1)
        return correlation(scores(table(queries, sketch), table(train, sketch)), exact(queries, train)).mean()

    assert dim & (dim - 1) == 0
    assert true(dim) > 0.87
    assert true(dim // 4) < 0.9


def test_rows_that_say_nothing_suggest_nothing():
    """The products of the second halves are minus nine tenths of those of the first."""
    first = random_rows(40, dim=40).sketches.double()
    gram = first @ first.T
    second = torch.linalg.cholesky((torch.linalg.eigvalsh(gram).max() + 1) * torch.eye(40).double() - gram)
    rows = torch.cat([first, 0.9**0.5 * second], 1).float()
    with pytest.raises(ValueError, match=r"at dim 80 are all error.* at dim 320, and ask again"):
        suggest_dim(SketchedGradients(rows, BlockSRHT(200, 80)))
    with pytest.raises(ValueError, match=r"between 0 and 1, got 1\.5"):
        suggest_dim(random_rows(100), reliability=1.5)


def test_of_several_checkpoints_the_last_is_taken():
    train, _ = made(0.3)
    rows = table(train, BlockSRHT(N, 256))
    noise = table(made(6.0)[0], rows.sketch, stage=torch.full((ROWS,), 1), fingerprint=torch.full((ROWS,), 5))
    columns = {"stage": torch.full((ROWS,), 1), "fingerprint": torch.full((ROWS,), 7)}
    last = SketchedGradients(rows.sketches, rows.sketch, columns)
    assert suggest_dim(SketchedGradients.cat([noise, last])) == suggest_dim(last)


def dense(module, loss, x, y):
    """The gradient of each example by autodiff."""
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    own = grad(lambda p, x, y: loss(functional_call(module, p, (x[None],)), y[None]))
    found = [vmap(own, (None, 0, 0))(parameters, *part) for part in zip(x.split(20), y.split(20), strict=True)]
    return torch.cat([torch.cat([g.flatten(1) for g in part.values()], 1) for part in found])


def classifier():
    """A network 64-64-10 on digits, of 4,810 parameters."""
    given = PROBLEMS["digits"]()
    module = given.member(given.train(torch.arange(600)[None], [0], steps=100)[-1])
    pairs = (given.x[:600], given.y[:600]), (given.x_test[:60], given.y_test[:60])
    return [dense(module, F.cross_entropy, *pair) for pair in pairs]


class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        q, k, v = self.qkv(self.before(x)).unflatten(2, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        attention = (q @ k.mT * q.shape[3] ** -0.5).masked_fill(future, -1e9).softmax(3)
        x = x + self.out((attention @ v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.between(x))))


class GPT(nn.Module):
    def __init__(self, width=48, time=48):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(128, width), nn.Embedding(time, width)
        self.layers = nn.Sequential(Layer(width), Layer(width))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 128, bias=False)

    def forward(self, x):
        return self.head(self.norm(self.layers(self.tokens(x) + self.positions(torch.arange(x.shape[1])))))


def language_model():
    """A GPT of 71,520 parameters on 48 characters each of the sources of modules."""
    modules = argparse, ast, difflib, doctest, inspect, pdb, tarfile, typing
    text = "".join(inspect.getsource(module) for module in modules).encode("ascii", "ignore")
    starts = torch.linspace(0, len(text) - 50, 660).long()
    windows = torch.frombuffer(bytearray(text), dtype=torch.uint8)[starts[:, None] + torch.arange(49)].long()
    windows = windows[torch.randperm(660, generator=torch.Generator().manual_seed(0))]
    x, y = windows[:, :-1], windows[:, 1:]

    def loss(output, y):
        return F.cross_entropy(output.flatten(0, 1), y.flatten())

    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = GPT()
        optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
        for _ in range(200):
            chosen = torch.randint(600, (32,))
            optimizer.zero_grad()
            loss(module(x[chosen]), y[chosen]).backward()
            optimizer.step()
    return [dense(module, loss, *pair) for pair in ((x[:600], y[:600]), (x[600:], y[600:]))]


@pytest.mark.slow
@pytest.mark.parametrize("gradients", [classifier, language_model])
def test_it_is_honest_about_trained_networks(gradients):
    """Reliability at each dim, and the dim that is suggested from the smallest one."""
    train, queries = gradients()
    count = train.shape[1]
    for dim in (dim for dim in (256, 1024, 4096, 16384) if dim < count):
        for method in ("dot", "cosine"):
            found, true = [], []
            for seed in range(2):
                own = [table(x, BlockSRHT(count, dim, seed=seed)) for x in (queries, train)]
                found.append(reliability(*own, method=method))
                true.append(correlation(scores(*own, method=method), exact(queries, train, method == "cosine")))
            assert honest(torch.cat(found), torch.cat(true))
    for start in (256, 1024):
        dim = suggest_dim(table(train, BlockSRHT(count, start)), reliability=0.95)
        own = [table(x, BlockSRHT(count, dim, seed=9)) for x in (queries, train)]
        true = correlation(scores(*own), exact(queries, train)).mean()
        assert true > 0.93
        own = [table(x, BlockSRHT(count, dim // 4, seed=9)) for x in (queries, train)]
        assert correlation(scores(*own), exact(queries, train)).mean() < 0.95
