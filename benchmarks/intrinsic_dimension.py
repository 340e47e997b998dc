"""Compare the dimensions that the Tuner finds, with defaults only, to the truth, and their cost to one rate for all.

toy 90 %, 99 %  Li et al., sec. 2: 1000 numbers, ten sums of a hundred of them are given; loss, mode="min"
teacher         1000 examples of a tanh network that sees 12 of 40 inputs; MLP 40-64-64-4, n = 7,044
wine, cancer    of scikit-learn; MLPs 13-64-64-3 and 30-64-64-2, n = 5,251 and 6,274
digits          of scikit-learn; MLP 64-64-64-10, n = 8,970

Adam at a constant rate of 3e-3, 0.01 for the toy; three seeds.

truth     of the toy by least squares: the smallest dim at which the mean over seeds of the best w reaches the target;
          of the others the smallest of 4, 8, 16, ... whose mean reaches it at the best of six rates from 0.1 to 30, as
          `--truth` measures by 216 runs for each task
one rate  a grid from 8 that stops at the first dim that is enough, at rate 1 alone: what a search costs without rates
runs      in subspaces, at any rate, and full training; steps of all of them, in thousands
spread    of the bisection, see `IntrinsicDimensionResult.spread`, and what contradicts itself

    python benchmarks/intrinsic_dimension.py [TASK ...] [--truth | --kinds]

--kinds   the d90 of digits along other kinds of directions, by bisection
"""

import argparse
import itertools
import logging
import tempfile
import time
import warnings

import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule, seed_everything
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from lightning_sketch import IntrinsicDimensionTuner, make_sketch

SEEDS = 3
RATES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
KINDS = ("block_srht", "affd", "afjl", "qk", "ffd", "count_sketch")
TRUTH = {"teacher": 512, "wine": 16, "cancer": 4, "digits": 256}
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Classifier(LightningModule):
    def __init__(self, *sizes):
        super().__init__()
        layers = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.Tanh())]
        self.net = nn.Sequential(*layers[:-1])

    def training_step(self, batch):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch):
        self.log("accuracy", (self.net(batch[0]).argmax(dim=1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=3e-3)


class Toy(LightningModule):
    """Let ten sums of a hundred numbers each be 1, 2, ..., 10."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(0.1 * torch.randn(1000))

    def loss(self):
        return (self.theta.view(10, 100).sum(dim=1) - torch.arange(1.0, 11.0)).square().mean()

    def training_step(self, batch):
        return self.loss()

    def validation_step(self, batch):
        self.log("loss", self.loss(), batch_size=1)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)

    @torch.no_grad()
    def truth(self, threshold):
        """Return the smallest dim whose directions contain a point that reaches the target, in the mean over seeds."""
        sums = torch.eye(10, dtype=torch.float64).repeat_interleave(100, dim=1)
        gap = torch.arange(1.0, 11.0, dtype=torch.float64) - sums @ self.theta.double()
        for dim in range(1, 20):
            left = 0.0
            for seed in range(SEEDS):
                along = sums @ make_sketch("block_srht", n=1000, dim=dim, seed=seed).as_matrix().double().T
                w = torch.linalg.lstsq(along, gap, driver="gelsd").solution
                left += float((along @ w - gap).square().mean()) / SEEDS
            if left <= (1 - threshold) * float(gap.square().mean()):
                return dim
        raise AssertionError("ten directions suffice")


def loaders(x, y, val):
    """Return loaders that take rows of a batch at once; the inputs of training have mean 0 and variance 1."""
    x, y = torch.as_tensor(x, dtype=torch.float32), torch.as_tensor(y)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, held = order[:-val], order[-val:]
    x = (x - x[train].mean(dim=0)) / (x[train].std(dim=0) + 1e-3)
    rows = TensorDataset(x[train], y[train])
    batches = BatchSampler(RandomSampler(rows), 32, drop_last=False)
    return DataLoader(rows, sampler=batches, batch_size=None), DataLoader(
        TensorDataset(x[held], y[held]), batch_size=val
    )


def teacher():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(3000, 40, generator=rng)
    first, second = 1.5 * torch.randn(12, 16, generator=rng) / 12**0.5, torch.randn(16, 4, generator=rng)
    return x, (torch.tanh(x[:, :12] @ first) @ second).argmax(dim=1)


def toy():
    points = DataLoader(torch.zeros(100, 1), batch_size=1)
    return points, DataLoader(torch.zeros(1, 1))


TASKS = {  # the data, the model, epochs, and what is asked
    "toy 90 %": (toy, Toy, 10, {"monitor": "loss", "mode": "min", "threshold": 0.9}),
    "toy 99 %": (toy, Toy, 10, {"monitor": "loss", "mode": "min", "threshold": 0.99}),
    "teacher": (lambda: loaders(*teacher(), 2000), lambda: Classifier(40, 64, 64, 4), 15, {"monitor": "accuracy"}),
    "wine": (
        lambda: loaders(*load_wine(return_X_y=True), 59),
        lambda: Classifier(13, 64, 64, 3),
        60,
        {"monitor": "accuracy"},
    ),
    "cancer": (
        lambda: loaders(*load_breast_cancer(return_X_y=True), 189),
        lambda: Classifier(30, 64, 64, 2),
        30,
        {"monitor": "accuracy"},
    ),
    "digits": (
        lambda: loaders(*load_digits(return_X_y=True), 360),
        lambda: Classifier(64, 64, 64, 10),
        15,
        {"monitor": "accuracy"},
    ),
}


def prepared(name, folder, **options):
    """Return a function that searches with a method, and the model."""
    data, model, epochs, ask = TASKS[name]
    seed_everything(0, verbose=False)
    module, data = model(), data()
    trainer = {**QUIET, "max_epochs": epochs, "check_val_every_n_epoch": epochs, "default_root_dir": folder}

    def find(rates=None, seeds=SEEDS, **more):
        tuner = IntrinsicDimensionTuner(trainer, rates=rates, **options)
        return tuner.find(module, *data, seeds=seeds, **ask, **more)

    return find, module


def cell(result, full, until=None):
    """Return the suggestion and the cost, of the runs up to a dimension."""
    columns = zip(result.results["dim"], result.results["steps"], strict=True)
    steps = [full, *(step for dim, step in columns if until is None or dim <= until)]
    return f"{result.suggestion() or '-':>10}{len(steps):>5}{sum(steps) / 1000:>6.1f}"


def compare(names):
    """Print the truth of each task, and what each method finds and spends."""
    methods = ("grid", "bisect", "doubling")
    columns = (f"{name:>10}{'runs':>5}{'steps':>6}" for name in ("one rate", *methods))
    print(f"{'':<10}{'truth':>6}{''.join(columns)}   spread")
    for name in names:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            find, module = prepared(name, folder)
            found = [find(method=method) for method in methods]
            alone = find(rates=1)
        truth, full = TRUTH.get(name) or module.truth(TASKS[name][3]["threshold"]), found[0].results["steps"][0]
        cells = [cell(alone, full, alone.suggestion()), *(cell(one, full) for one in found)]
        low, high = found[1].spread
        print(
            f"{name:<10}{truth:>6}{''.join(cells)}   {low} to {high}, {time.perf_counter() - start:.0f} s", flush=True
        )
        for method, one in zip(methods, found, strict=True):
            for sentence in one.contradictions().values():
                print(f"          {method}: {sentence}", flush=True)
            assert truth / 2 <= (one.suggestion() or 0) <= 2 * truth, (method, one)


def truths(names):
    """Print the mean over seeds at each dim and rate."""
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            find, module = prepared(name, folder)
            n = sum(p.numel() for p in module.parameters())
            dims = [1 << k for k in range(2, n.bit_length()) if 1 << k < n] + [n]
            by_rate = [find(rates=rate, dims=dims) for rate in RATES]
        print(f"\n{name}: target {by_rate[0].target:.3f}\n{'dim':>7}" + "".join(f"{rate:>8g}" for rate in RATES))
        for dim in dims:
            print(f"{dim:>7}" + "".join(f"{one.means()[dim]:>8.3f}" for one in by_rate), flush=True)
        best = {dim: max(one.means()[dim] for one in by_rate) for dim in dims}
        print("truth:", next(dim for dim in dims if best[dim] >= by_rate[0].target), flush=True)


def kinds():
    """Print the d90 of digits along each kind of directions."""
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            result = prepared("digits", folder, sketch=kind)[0](method="bisect")
        print(f"{kind:<13}{cell(result, result.results['steps'][0])}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", metavar="TASK", help="toy 90 %%, teacher, ...; all by default")
    parser.add_argument("--truth", action="store_true", help="measure the truth of the tasks other than the toy")
    parser.add_argument("--kinds", action="store_true", help="compare kinds of directions on digits")
    args = parser.parse_args()
    for name in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers|The number of training batches")
    truths(args.tasks or TRUTH) if args.truth else kinds() if args.kinds else compare(args.tasks or TASKS)


if __name__ == "__main__":
    main()
