"""Measure how well attributions of a language model predict retraining, beside other packages and a bag of words.

A GPT of 90,432 parameters and 600 documents of the standard library, see `lds_language_model_problem`. The sum of an
attribution's scores over a random half is compared, by Spearman's rank correlation over 50 halves for each of 60
queries, with the query's loss in models that were trained on this half alone, the mean over four seeds (LDS, see
`lightning_sketch.metrics`).

LDS        and its 95 % interval for other queries and other halves
- TF-IDF   difference from TF-IDF of the same query, ± 1.96 standard errors over queries; a method whose LDS is below
           says so
auto, best at the damping that is chosen without the truth, and at the best of a grid, by the truth
s, MB      processor time on one thread: rows, curvature, queries, scores; and the most memory of the process meanwhile

The first run trains 210 models, a quarter of an hour on one thread, and keeps them in --cache, by default below the
cache directory of the user; the table takes as long again. Beside us, where installed: kronfluence, traker, dattri,
dattri-llm, bergson; see `lds_language_model_peers`.
"""

import argparse
import importlib.metadata
import logging
import platform
import warnings
from collections import Counter
from pathlib import Path

import torch
from lds_language_model_facts import facts, found_facts
from lds_language_model_peers import MODULES, Measured, bags_of_words, installed, kronfluence, measured, peers
from lds_language_model_problem import (
    Corpus,
    Trained,
    batch_loss,
    default_cache,
    members,
    members_on_halves,
    standard_library,
    truth,
)
from lds_peers import quiet
from lds_problems import masks_of
from torch import Tensor, nn

from lightning_sketch.attribution import (
    Preconditioner,
    fit_ggn,
    fit_preconditioner,
    row_curvature,
    scores,
    sketch_gradients,
)
from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.metrics import LinearDatamodelingScore
from lightning_sketch.operators import BlockSRHT
from lightning_sketch.store.sketched_gradients import SketchedGradients

DIMS = (1024, 4096, 16384)
BATCH = 32
KRONFLUENCE = "kronfluence EK-FAC"
DAMPINGS = (0.01, 0.03, 0.1, 0.3, 1)
DAMPING = 0.1  # the default


class Table:
    """Judges scores and prints a line for each method; the first one is what the others are compared with."""

    def __init__(self, subsets: Tensor, losses: Tensor, examples: int):
        self.masks, self.losses = masks_of(subsets, examples), losses
        self.judged: dict[str, dict[str, Tensor]] = {}
        self.costs: dict[str, Measured] = {}

    def judge(self, found: Tensor) -> dict[str, Tensor]:
        metric = LinearDatamodelingScore(self.masks, per_query=True)
        metric.update(found, self.losses)
        return metric.compute()

    def add(self, name: str, found: Measured, note: str = "") -> None:
        """Print a line."""
        if not found.value.isfinite().all():
            print(f"{name:52} {float(found.value.isfinite().float().mean()):.0%} of the scores are finite")
            return
        self.judged[name], self.costs[name] = self.judge(found.value), found
        own, first = self.judged[name], next(iter(self.judged))
        mean, half = self.difference(name, first)
        verdict = "" if name == first else f"{mean:+.3f} ± {half:.3f}"
        loses = f"loses to {first}" if mean < -half else f"not above {first}" if mean < half and name != first else ""
        print(
            f"{name:52} {float(own['lds']):5.3f} [{float(own['low']):.3f}, {float(own['high']):.3f}] {verdict:15} "
            f"{found.seconds:6.1f} s {found.megabytes:5.0f} MB  {'; '.join(filter(None, (note, loses)))}".rstrip(),
            flush=True,
        )

    def difference(self, a: str, b: str) -> tuple[float, float]:
        """Return the mean over queries of a - b, and half of its 95 % interval."""
        found = self.judged[a]["per_query"] - self.judged[b]["per_query"]
        return float(found.mean()), float(1.96 * found.std() / len(found) ** 0.5)

    def lds(self, name: str) -> float:
        return float(self.judged[name]["lds"])

    def ceilings(self) -> None:
        """Print how well trainings with other seeds foretell each other, and what a perfect predictor would get."""
        repeats = len(self.losses)

        def foretold(size: int) -> float:
            pairs = [(list(range(size)), list(range(size, 2 * size)))]
            if size == 1:
                pairs = [([a], [b]) for a in range(repeats) for b in range(a)]
            elif repeats == 4:
                pairs = [([0, 1], [2, 3]), ([0, 2], [1, 3]), ([0, 3], [1, 2])]
            both = [[self.losses[part].mean(0) for part in pair] for pair in pairs]
            metrics = []
            for a, b in both:
                metric = LinearDatamodelingScore(self.masks)
                metric.update(torch.zeros(len(a[0]), self.masks.shape[1]), torch.stack([a, b]))
                metrics.append(float(metric.compute()["ceiling"]))
            return sum(metrics) / len(metrics)

        one, two = foretold(1), foretold(2)
        reliability = 2 * two / (1 + two)
        print(
            f"one training foretells another {one:.3f}, two foretell two {two:.3f}; the truth's reliability "
            f"{reliability:.3f}, so a perfect prediction has {reliability**0.5:.3f}"
        )


def loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the loss that was minimized: the mean over the tokens of a batch."""
    return batch_loss(module(batch[0]), batch[1])


def batches(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(BATCH), y.split(BATCH), strict=True))


class Sketched:
    """The rows and queries of one model, with what they cost."""

    def __init__(
        self,
        corpus: Corpus,
        module: nn.Module,
        dim: int,
        *,
        parameters: str | list[str] = "*",
        seed: int = 0,
        **options,
    ):
        self.corpus, self.module = corpus, module
        self.layout = Layout.of(module, parameters)
        self.sketch = BlockSRHT(self.layout.n, dim, seed=seed)

        def rows(x: Tensor, y: Tensor) -> SketchedGradients:
            return sketch_gradients(module, batches(x, y), self.sketch, loss, parameters=parameters, **options)

        self.rows = measured(lambda: rows(corpus.x, corpus.y))
        self.queries = measured(lambda: rows(corpus.x_query, corpus.y_query))

    def scores(self, **options) -> Measured:
        """Return scores, with the cost of rows and queries."""
        return self.second(**options) + self.rows

    def second(self, **options) -> Measured:
        """Return scores, with the cost of queries alone."""
        return measured(lambda: scores(self.queries.value, self.rows.value, **options)) + self.queries

    def curvature(self, kind: str) -> Measured:
        corpus = self.corpus
        if kind == "ggn":
            return measured(
                lambda: fit_ggn(self.module, batches(corpus.x, corpus.y), self.sketch, self.layout, loss_fn=loss)
            )
        return measured(lambda: row_curvature(self.rows.value, kind))


def with_curvature(table: Table, name: str, own: Sketched, kind: str, **options) -> None:
    """Add lines at the automatic damping and at the best of a grid of quarter decades."""
    fitted = own.curvature(kind)
    curvature = fitted.value
    automatic = own.scores(method="influence", curvature=curvature, **options) + fitted
    e = curvature.trace_of_square / curvature.trace
    factors = [10 ** (quarter / 4) for quarter in range(-14, 11)]
    sweep = scores(
        own.queries.value,
        own.rows.value,
        method="influence",
        curvature=curvature,
        damping=[e * factor for factor in factors],
        **options,
    )
    found = [table.judge(part)["lds"] for part in sweep]
    best = found.index(max(found))
    table.add(f"{name}, auto", automatic)
    table.add(f"{name}, best", automatic.with_value(sweep[best]), f"c {factors[best]:.3g}")


def mean(parts: list[Measured]) -> Measured:
    """Return the mean scores of several models."""
    total = parts[0]
    for part in parts[1:]:
        total = (total + part).with_value(total.value + part.value)
    return total.with_value(total.value / len(parts))


def without_preconditioner(table: Table, corpus: Corpus, models: list[Trained]) -> None:
    """Print dot products, cosines, and influence by a curvature in sketch space."""
    module = models[0].module()
    for dim in DIMS:
        own = Sketched(corpus, module, dim)
        table.add(f"ours, dot, dim {dim}", own.scores())
        table.add(f"ours, cosine, dim {dim}", own.scores(method="cosine"))
        with_curvature(table, f"ours, fisher, dim {dim}", own, "fisher")
        with_curvature(table, f"ours, ggn, dim {dim}", own, "ggn")
    own = Sketched(corpus, module, 4096, parameters="head*")
    table.add("ours, head alone, dot, dim 4096", own.scores())
    with_curvature(table, "ours, head alone, ggn, dim 4096", own, "ggn")
    several = []
    for trained in models:
        own = Sketched(corpus, trained.module(), 4096)
        fitted = own.curvature("ggn")
        several.append(own.scores(method="influence", curvature=fitted.value) + fitted)
    table.add("ours, ggn, dim 4096, auto, 5 models", mean(several))


def with_preconditioner(table: Table, corpus: Corpus, models: list[list[Trained]]) -> dict[int, float]:
    """Print rows whitened layer by layer before they are sketched; return the seconds of a second set of queries."""
    fitted: dict[int, Measured] = {}

    def own(trained: Trained, dim: int, damping: float = DAMPING) -> Sketched:
        if id(trained) not in fitted:
            fitted[id(trained)] = measured(lambda: _whitening(corpus, trained.module()))
        module, whitening = fitted[id(trained)].value
        return Sketched(corpus, module, dim, preconditioner=whitening.damped(damping))

    def several(members: list[Trained], dim: int) -> Measured:
        return mean([own(trained, dim).scores() + fitted[id(trained)] for trained in members])

    first, last, seconds = models[0][-1], [steps[-1] for steps in models], {}
    for dim in DIMS:
        name = f"ours, EK-FAC rows, dim {dim}"
        for damping in DAMPINGS:
            rows, fit = own(first, dim, damping), fitted[id(first)]
            table.add(f"{name}, damping {damping:g}", rows.scores() + fit)
            if damping == DAMPING:
                seconds[dim] = rows.second().seconds
                table.add(f"{name}, cosine", rows.scores(method="cosine") + fit)
                table.add(f"{name}, scores times tokens", rows.scores(weighted=True) + fit)
        table.add(f"{name}, 5 models", several(last, dim))
    variants = {
        "labels of the data": {"labels": "data"},
        "4 draws": {"draws": 4},
        "K-FAC": {"kind": "kfac"},
        "no embeddings": {"parameters": ["blocks*", "norm*", "head*"]},
    }
    for name, options in variants.items():
        table.add(f"ours, EK-FAC rows, dim 4096, {name}", _variant(corpus, first, 4096, **options))
    for what, names in {"head alone": ["head*"], "embeddings and head alone": ["tokens*", "head*"]}.items():
        for dim in DIMS:
            found = [_variant(corpus, trained, dim, parameters=names) for trained in last]
            table.add(f"ours, EK-FAC rows, dim {dim}, {what}", found[0])
            table.add(f"ours, EK-FAC rows, dim {dim}, {what}, 5 models", mean(found))
    module = first.module()
    adam = Preconditioner.from_optimizer(module, first.optimizer(module))
    for name, p in (("EK-FAC rows", fitted[id(first)].value[1]), ("Adam rows", adam)):
        rows = Sketched(corpus, module, 4096, preconditioner=p)
        ggn = fit_ggn(module, batches(corpus.x, corpus.y), rows.sketch, rows.layout, loss_fn=loss, preconditioner=p)
        table.add(f"ours, {name}, dim 4096, ggn, auto", rows.scores(method="influence", curvature=ggn))
    for count in (2, 4, 8):
        table.add(f"ours, EK-FAC rows, dim 4096, last {count} of 8 steps of a run", several(models[0][-count:], 4096))
    for dim in DIMS:
        for damping in DAMPINGS:
            module = first.module()
            adam = Preconditioner.from_optimizer(module, first.optimizer(module), damping=damping)
            rows = Sketched(corpus, module, dim, preconditioner=adam)
            table.add(f"ours, Adam rows, dim {dim}, damping {damping:g}", rows.scores())
    return seconds


def _whitening(corpus: Corpus, module: nn.Module, **options) -> tuple[nn.Module, Preconditioner]:
    return module, fit_preconditioner(module, batches(corpus.x, corpus.y), loss_fn=loss, **options)


def _variant(corpus: Corpus, trained: Trained, dim: int, **options) -> Measured:
    """Return scores of rows whitened in another way; all numbers of the parameters if they are fewer than dim."""
    module = trained.module()
    fit = measured(lambda: _whitening(corpus, module, **options))
    kept = {"parameters": options["parameters"]} if "parameters" in options else {}
    dim = min(dim, Layout.of(module, *kept.values()).n)
    return Sketched(corpus, module, dim, preconditioner=fit.value[1], **kept).scores() + fit


def others(table: Table, corpus: Corpus, models: list[Trained], halves: list[Trained]) -> None:
    """Print the other packages that are installed, each with its best damping."""
    if installed("kronfluence"):
        for strategy in ("ekfac", "kfac"):
            with quiet():
                found = [
                    kronfluence(corpus, trained, strategy) for trained in models[: 5 if strategy == "ekfac" else 1]
                ]
            name = {"ekfac": KRONFLUENCE, "kfac": "kronfluence K-FAC"}[strategy]
            table.add(name, found[0].first, f"a second set of queries {found[0].second.seconds:.1f} s")
            if len(found) > 1:
                table.add(f"{name}, 5 models", mean([one.first for one in found]))
    best: dict[str, tuple[float, str, Measured]] = {}
    for name, (_, function) in peers().items():
        try:
            with quiet():
                found = measured(lambda function=function: function(corpus, models, halves).detach())
        except ImportError as error:
            print(f"{name:52} needs another package: {error}")
            continue
        group = name.split(", damping")[0]
        lds = float(table.judge(found.value)["lds"])
        best[group] = max(best.get(group, (-2.0, "", found)), (lds, name, found), key=lambda line: line[0])
    for _, name, found in best.values():
        table.add(name, found, "best of a grid" if "damping" in name else "")


def trace_facts(seeds: int = 5, dim: int = 4096) -> dict[str, int]:
    """Print and return how many documents that told a fact are the two best for its beginning."""
    total: Counter[str] = Counter()
    for seed in range(seeds):
        corpus, told = facts(seed)
        module = corpus.fit(torch.arange(len(corpus.train)), seed)[-1].module()
        plain = Sketched(corpus, module, dim, seed=seed)
        whitened = Sketched(corpus, module, dim, seed=seed, preconditioner=_whitening(corpus, module)[1])
        found = {name: make() for name, make in bags_of_words(corpus).items()}
        for method in ("dot", "cosine"):
            found[f"ours, {method}"] = plain.scores(method=method).value
            found[f"ours, EK-FAC rows, {method}"] = whitened.scores(method=method).value
        total.update({name: found_facts(scores, told) for name, scores in found.items()})
    print(f"\ndocuments that told a fact among the two best, of {seeds * told.numel()}, dim {dim}, {seeds} seeds")
    for name, count in total.items():
        print(f"{name:52} {count:5}")
    return dict(total)


def verdicts(table: Table, second: dict[int, float], traced: dict[str, int]) -> None:
    """Print what was asked beside what was reached."""
    print("\nasked | reached")

    def line(what: str, asked: float, reached: float, met: bool | None = None) -> None:
        met = reached >= asked if met is None else met
        print(f"{what:72} {asked:6.3g} | {reached:6.3g}  {'met' if met else 'NOT MET'}")

    rows = {dim: f"ours, EK-FAC rows, dim {dim}" for dim in DIMS}
    default = {dim: f"{name}, damping {DAMPING:g}" for dim, name in rows.items()}
    if KRONFLUENCE in table.judged:
        peer = table.lds(KRONFLUENCE)
        for name, asked in ((default[4096], 0.67), (default[16384], 0.83), (f"{rows[4096]}, 5 models", 0.92)):
            line(f"share of {KRONFLUENCE}: {name}", asked, table.lds(name) / peer)
        for dim in (4096, 16384):
            peer = table.costs[KRONFLUENCE].seconds
            cost = table.costs[default[dim]].seconds / peer
            line(f"rows and first queries, share of the peer's time, dim {dim}", 1.25, cost, cost <= 1.25)
            line(
                f"second queries, share of the peer's time, dim {dim}",
                0.1,
                second[dim] / peer,
                second[dim] <= peer / 10,
            )
    mean, half = table.difference(default[16384], "TF-IDF")
    line(f"{default[16384]} - TF-IDF, upper end", 0, mean + half)
    mean, half = table.difference(f"{rows[16384]}, 5 models", "TF-IDF")
    line(f"{rows[16384]}, 5 models - TF-IDF, lower end", 0, mean - half)
    for dim in DIMS:
        name = f"ours, ggn, dim {dim}"
        share, (mean, half) = (
            table.lds(f"{name}, auto") / table.lds(f"{name}, best"),
            table.difference(f"{name}, best", f"{name}, auto"),
        )
        line(f"{name}, automatic damping, share of the best", 0.92, share, share >= 0.92 or mean <= half)
    ratio = traced["ours, EK-FAC rows, cosine"] / traced["ours, cosine"]
    line("facts found, whitened cosine over plain cosine", 1.5, ratio)


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--cache", type=Path, default=default_cache(), help="default: %(default)s")
    arguments.add_argument("--no-peers", action="store_true")
    chosen = arguments.parse_args()
    warnings.filterwarnings("ignore", message="few examples carry")
    logging.basicConfig(level=logging.WARNING)  # dampings are not said one by one
    there = [name for name in MODULES if installed(name)]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ["torch", *there])
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, {versions}")
    corpus = standard_library()
    subsets, losses = truth(corpus, chosen.cache)
    models, halves = members(corpus, chosen.cache), members_on_halves(corpus, chosen.cache)
    table = Table(subsets, losses, len(corpus.train))
    table.ceilings()
    for name, make in bags_of_words(corpus).items():
        table.add(name, measured(make))
    last = [steps[-1] for steps in models]
    without_preconditioner(table, corpus, last)
    second = with_preconditioner(table, corpus, models)
    if not chosen.no_peers:
        others(table, corpus, last, halves)
    verdicts(table, second, trace_facts())


if __name__ == "__main__":
    main()
