"""Measure how well attributions predict retraining, here and in three other packages (8 minutes on one thread).

scikit-learn's digits: 1000 train, 200 test; models are trained on 50 random halves, and the sum of an attribution's
scores over a half is compared, by Spearman's rank correlation for each test example, with that example's loss (LDS,
see `lightning_sketch.metrics`). Logistic regression with 650 parameters, and a network 64-64-10 with 4,810, whose truth
is the mean of two trainings. All attributions of a network are of the same model, or the same ten.

EK-FAC rows: whitened layer by layer before the sketch, all classes summed exactly.

dim        of the sketch; 1024 is more than logistic regression has, and exact there
lds        mean over 200 test examples, and its 95 % interval for other tests and other halves
ceiling    the LDS of one training as a prediction of another one with another seed
share      LDS with automatic damping over the best of a grid of quarter decades; mean of two models (--all: all sets,
           three lengths of training; a quarter of an hour of CPU time)
AUC        of finding the 10 % of labels that are wrong, by self-influence

Beside us, where installed: dattri, traker, kronfluence (see `lds_peers`), the first with its best damping of five.
"""

import argparse
import copy
import importlib.metadata
import platform
import statistics
import time
import warnings
from dataclasses import replace

import torch
from lds_peers import MODULES, installed, peers, quiet
from lds_problems import PROBLEMS, Problem, flipped, halves, masks_of
from torch import Tensor, nn
from torchmetrics.functional.classification import binary_auroc

from lightning_sketch.attribution import (
    Curvature,
    calibrate,
    fit_ggn,
    fit_preconditioner,
    row_curvature,
    scores,
    self_influence,
    sketch_gradients,
)
from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.metrics import LinearDatamodelingScore
from lightning_sketch.operators import BlockSRHT
from lightning_sketch.store.sketched_gradients import SketchedGradients

SELECTED = ["digits LR", "digits", "breast_cancer", "wine", "diabetes", "mclass"]
ASKED = {
    "digits LR": {256: 0.84, 512: 0.92, 1024: 0.955},
    "digits": {256: 0.59, 512: 0.64, 1024: 0.68},
}


class Bench:
    """A problem, its truth, and ten models on all data and on halves of their own."""

    def __init__(self, given: Problem, members: int = 10):
        self.given, count = given, len(given.x)
        self.subsets = halves(count)
        start = time.perf_counter()
        self.losses = given.ground_truth(self.subsets)
        self.seconds = time.perf_counter() - start
        self.full = self._models(torch.arange(count).expand(members, -1))
        self.halves = self._models(halves(count, members, seed=7)) if members > 2 else []

    def _models(self, subsets: Tensor) -> list[nn.Module]:
        weights = self.given.train(subsets, list(range(len(subsets))))[-1]
        return [self.given.member(weights, i) for i in range(len(subsets))]

    def judge(self, found: Tensor) -> dict[str, Tensor]:
        metric = LinearDatamodelingScore(masks_of(self.subsets, len(self.given.x)))
        metric.update(found, self.losses)
        return metric.compute()

    def lds(self, found: Tensor) -> float:
        return float(self.judge(found)["lds"])


class Sketched:
    """The rows, queries and curvature of one model, whitened by EK-FAC if it has a damping."""

    def __init__(self, given: Problem, module: nn.Module, dim: int, seed: int = 0, ekfac: float | None = None):
        if (missing := dim - sum(p.numel() for p in module.parameters())) > 0:
            module = copy.deepcopy(module)  # unused zeros up to dim: one chunk, where the sketch is orthogonal
            module.register_parameter("padding", nn.Parameter(torch.zeros(missing)))
        layout = Layout.of(module)
        sketch = BlockSRHT(layout.n, dim, seed=seed)
        self.given, self.module, self.layout, self.sketch = given, module, layout, sketch
        self.preconditioner = None if ekfac is None else fit_preconditioner(module, [(given.x, given.y)], damping=ekfac)
        self.rows = self._rows(given.x, given.y)
        self.queries = self._rows(given.x_test, given.y_test)

    def _rows(self, x: Tensor, y: Tensor) -> SketchedGradients:
        given = self.given

        def loss(module, batch):
            return given.loss(module(batch[0]), batch[1])

        def row(module, batch):
            output = module(batch[0])
            return given.loss(output, batch[1]), output.softmax(1).gather(1, batch[1][:, None])[:, 0]

        by = None if y.is_floating_point() else row
        return sketch_gradients(self.module, [(x, y)], self.sketch, loss, row_fn=by, preconditioner=self.preconditioner)

    def curvature(self, kind: str) -> Curvature:
        if kind == "ggn":
            return fit_ggn(self.module, [(self.given.x, self.given.y)], self.sketch, self.layout)
        return row_curvature(self.rows, kind)

    def influence(self, kind: str, damping="auto") -> Tensor:
        return scores(self.queries, self.rows, method="influence", curvature=self.curvature(kind), damping=damping)


def without_sketch(given: Problem, module: nn.Module, damping: float) -> Tensor:
    """Return the influence by EK-FAC with class sums that are exact, of gradients that are not sketched."""
    p = fit_preconditioner(module, [(given.x, given.y)], damping=damping)
    weights = dict(module.named_parameters())

    def whitened(x: Tensor, y: Tensor) -> Tensor:
        def loss(weights, x, y):
            return given.loss(torch.func.functional_call(module, weights, (x[None],)), y[None]).mean()

        gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(weights, x, y)
        found = []
        for i in range(len(x)):
            own = p.whiten({name: gradient[i] for name, gradient in gradients.items()})
            found.append(torch.cat([part.flatten() for part in own.values()]))
        return torch.stack(found)

    return whitened(given.x_test, given.y_test) @ whitened(given.x, given.y).T


def line(name: str, found: dict[str, Tensor], seconds: float, asked: float | None = None) -> None:
    verdict = "" if asked is None else f"asked {asked:.3g}: {'met' if float(found['lds']) >= asked else 'NOT MET'}"
    interval = f"[{float(found['low']):.3f}, {float(found['high']):.3f}]"
    print(f"  {name:48} {float(found['lds']):6.3f} {interval:16} {seconds:6.1f} s  {verdict}".rstrip())


def table(name: str, with_peers: bool) -> None:
    """Print the LDS of every method on digits."""
    bench = Bench(PROBLEMS[name]())
    linear = not bench.given.hidden
    print(f"\n{name}: truth in {bench.seconds:.0f} s")
    for dim in (256, 512, 1024):
        for kind in ("dot", "ggn", "margin", "fisher", "trak"):
            start, asked = time.perf_counter(), None
            found = []
            for seed in range(3):
                own = Sketched(bench.given, bench.full[0], dim, seed)
                found.append(bench.judge(scores(own.queries, own.rows) if kind == "dot" else own.influence(kind)))
            mean = {key: sum(f[key] for f in found) / 3 for key in found[0]}
            if kind == "ggn":
                asked = ASKED[name][dim]
            if (kind, dim, linear) == ("margin", 1024, False):
                asked = 0.64
            line(f"ours, {kind}, dim {dim}, 1 model", mean, (time.perf_counter() - start) / 3, asked)
    for dim in (256, 512, 1024):
        for damping in (0.1, 1.0):
            start = time.perf_counter()
            found = []
            for seed in range(3):
                own = Sketched(bench.given, bench.full[0], dim, seed, damping)
                found.append(bench.judge(scores(own.queries, own.rows)))
            mean = {key: sum(f[key] for f in found) / 3 for key in found[0]}
            name = f"ours, EK-FAC rows, damping {damping:g}, dim {dim}, 1 model"
            line(name, mean, (time.perf_counter() - start) / 3)
    for damping in (0.03, 0.1, 0.3, 1.0):
        start = time.perf_counter()
        found_whole = without_sketch(bench.given, bench.full[0], damping)
        name = f"EK-FAC of all classes, damping {damping:g}, no sketch"
        line(name, bench.judge(found_whole), time.perf_counter() - start)
    if not linear:
        print(f"  {'one training predicts another':48} {float(found[0]['ceiling']):6.3f}")
        ensembles(bench)
    best: dict[str, tuple[float, str, dict[str, Tensor], float]] = {}
    for peer, (_, function) in peers(linear).items() if with_peers else ():
        start = time.perf_counter()
        with quiet():
            result = function(bench.given, bench.full, bench.halves).detach()
        if not result.isfinite().all():
            print(f"  {peer:48} {float(result.isfinite().float().mean()):6.0%} of its scores are finite")
            continue
        judged, seconds = bench.judge(result), time.perf_counter() - start
        group = peer.split(", damping")[0]
        best[group] = max(best.get(group, (-2.0, "", {}, 0.0)), (float(judged["lds"]), peer, judged, seconds))
    for _, peer, judged, seconds in best.values():
        line(peer, judged, seconds)


def ensembles(bench: Bench, dim: int = 512) -> None:
    """Print the LDS of scores averaged over models; for ensembles the weight decay is the best damping."""
    full = [Sketched(bench.given, module, dim) for module in bench.full]
    half = [Sketched(bench.given, module, dim) for module in bench.halves]
    for members, kind, damping, asked, name in (
        (full[:5], "ggn", bench.given.decay, 0.75, "5 models, damping = decay"),
        (full, "ggn", bench.given.decay, 0.78, "10 models, damping = decay"),
        (full, "ggn", "auto", None, "10 models"),
        (half, "trak", "auto", 0.62, "10 models on halves"),
    ):
        start = time.perf_counter()
        found = sum(own.influence(kind, damping) for own in members) / len(members)
        line(f"ours, {kind}, dim {dim}, {name}", bench.judge(found), time.perf_counter() - start, asked)


def shares(names: list[str], lengths: bool) -> None:
    """Print the share of the best LDS that the automatic damping reaches, and on two sets the effect of calibration."""
    print("\nshare of the best LDS, ggn, dim 256    steps  best LDS  best c      v   auto   margin, auto")
    found = []
    for name in names:
        usual = PROBLEMS[name]()
        for steps in sorted({40, usual.steps, 1000}) if lengths and usual.hidden else [usual.steps]:
            bench = Bench(replace(usual, steps=steps), members=2)
            numbers = {
                kind: share(bench, kind) for kind in ("ggn", "margin") if kind == "ggn" or bench.given.outputs > 1
            }
            best, c, v, own = numbers["ggn"]
            margin = f"{numbers['margin'][3]:14.2f}" if "margin" in numbers else ""
            print(f"  {name:36} {steps:5} {best:9.2f} {c:7.3f} {v:6.2f} {own:6.2f} {margin}", flush=True)
            found.append(own)
    print(f"  worst {min(found):.2f} (asked .87), mean {statistics.mean(found):.2f} (asked .95)")


def share(bench: Bench, kind: str) -> tuple[float, float, float, float]:
    """Return the best LDS, its c and v, and the share at automatic damping, for two models."""
    exponents = [quarter / 4 for quarter in range(-14, 8)]
    sweeps, automatic, noise = [], [], []
    for seed, module in enumerate(bench.full[:2]):
        own = Sketched(bench.given, module, 256, seed)
        curvature = own.curvature(kind)
        e = curvature.trace_of_square / curvature.trace
        sweep = scores(
            own.queries,
            own.rows,
            method="influence",
            curvature=curvature,
            damping=[e * 10**exponent for exponent in exponents],
        )
        sweeps.append([bench.lds(found) for found in sweep])
        automatic.append(bench.lds(scores(own.queries, own.rows, method="influence", curvature=curvature)))
        noise.append(curvature.half_noise / curvature.trace_of_square)
    means = [statistics.mean(pair) for pair in zip(*sweeps, strict=True)]
    best = max(means)
    return best, 10 ** exponents[means.index(best)], statistics.mean(noise), statistics.mean(automatic) / best


def calibrated(name: str, dim: int, asked: float) -> None:
    """Calibrate by eight trainings on halves other than those of the truth, and by eight short ones."""
    bench = Bench(PROBLEMS[name](), members=2)
    given, own = bench.given, Sketched(bench.given, bench.full[0], dim)
    curvature = own.curvature("ggn")
    for what, start, steps in (("retrained", None, given.steps), ("short", own.module, max(20, given.steps // 10))):

        def trained(ids, start=start, steps=steps):
            return given.test_losses(given.train(ids[None], [77], start, steps)[-1])[0]

        begin = time.perf_counter()
        found = calibrate(trained, own.queries, own.rows, curvature=curvature, seed=99)
        judged = bench.judge(own.influence("ggn", found.damping))
        goal = asked if what == "retrained" else None
        line(f"{name}, ggn, dim {dim}, 8 halves {what}", judged, time.perf_counter() - begin, goal)


def mislabeled(name: str, dim: int = 64) -> None:
    """Return the AUC of self-influence, and of the loss."""
    given = flipped(PROBLEMS[name](), 0.1)
    count = len(given.x)
    kept = given.train(torch.arange(count)[None], [0], keep=10)
    parts = []
    for number, weights in enumerate(kept):
        own = Sketched(given, given.member(weights), dim)
        known = {"step": torch.full((count,), number), "lr": torch.full((count,), given.lr)}
        parts.append(replace(own.rows, columns=own.rows.columns | known | {"example_id": torch.arange(count)}))
    wrong = (torch.arange(count) < int(0.1 * count)).long()
    found = {"loss": parts[-1].loss, "tracin": self_influence(SketchedGradients.cat(parts)).scores}
    for kind in ("ggn", "margin", "fisher", "trak"):
        found[kind] = self_influence(own.rows, method="influence", curvature=own.curvature(kind)).scores
    numbers = "  ".join(f"{method} {float(binary_auroc(values, wrong)):.3f}" for method, values in found.items())
    print(f"  {name:16} {numbers}")


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--all", action="store_true", help="all sets, three lengths of training")
    arguments.add_argument("--no-peers", action="store_true")
    chosen = arguments.parse_args()
    warnings.filterwarnings("ignore", message="few examples carry|the curvature is noisy")
    warnings.filterwarnings("ignore", message="no example has a gradient of padding")
    there = [name for name in MODULES if installed(name)]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ["torch", *there])
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, {versions}")
    for name in ASKED:
        table(name, not chosen.no_peers)
    print("\ndamping calibrated by trainings on halves")
    calibrated("digits", 1024, 0.69)
    calibrated("breast_cancer", 512, 0.64)
    shares(list(PROBLEMS) if chosen.all else SELECTED, chosen.all)
    print("\nAUC of wrong labels, dim 64")
    for name in ("digits LR", "digits", "breast_cancer"):
        mislabeled(name)


if __name__ == "__main__":
    main()
