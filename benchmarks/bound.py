"""Bound the error rate on new examples from the bits of w, on three tasks.

digits      scikit-learn's, 1,437 images to train on and 360 to test: a network of 55,210 parameters
made        make_classification: 10,000 examples of 20 inputs, 10 of which matter, in 4 classes; 12,604 parameters
teacher     10,000 examples of 20 inputs, labeled by a random network of 3 tanh units with 4 outputs; 12,604 parameters

Each is trained by Adam in subspaces; digits with three seeds of the directions.

train       error rate of the rounded w on the examples of the bound
test        that on 360, or 10,000, held-out examples
bits        what describes the rounded w, its levels, dim and seed
bound       on the error rate of new examples, confidence 95 %, with the rest of the row for the seed of the smallest;
            then the largest of the seeds. Since dim and seed are priced, the smallest of a task is a bound too
held out    the bound at 0 bits from the errors on the test examples

python benchmarks/bound.py [--quick]        --quick: one seed at dim 128, four minutes on one core
"""

import argparse
import itertools
import platform
import time

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits, make_classification
from torch import nn
from torch.utils.data import TensorDataset

from lightning_sketch.subspace import SubspaceModel, error_bound, generalization_bound

DIMS = (64, 128, 256)
BATCH, RATE = 64, 0.03


def network(inputs, width, classes):
    torch.manual_seed(0)
    layers = nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes)
    return nn.Sequential(*layers)


def digits():
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return torch.tensor(images, dtype=torch.float32)[order], torch.tensor(labels)[order], 1437


def made():
    x, y = make_classification(20_000, n_informative=10, n_redundant=5, n_classes=4, class_sep=2.0, random_state=0)
    return torch.tensor(x, dtype=torch.float32), torch.tensor(y), 10_000


def teacher():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(20_000, 20, generator=generator)
    first, last = torch.randn(20, 3, generator=generator) / 20**0.5, torch.randn(3, 4, generator=generator)
    return x, (torch.tanh(2 * x @ first) @ last).argmax(1), 10_000


TASKS = {
    "digits": (digits, (64, 200, 10), 35),
    "made": (made, (20, 100, 4), 15),
    "teacher": (teacher, (20, 100, 4), 15),
}


def trained(net, x, y, dim, seed, epochs):
    sub = SubspaceModel(net, dim, seed=seed)
    optimizer = torch.optim.Adam(sub.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * (len(x) // BATCH))
    generator = torch.Generator().manual_seed(seed)
    orders = itertools.chain.from_iterable(
        torch.randperm(len(x), generator=generator).split(BATCH)[:-1] for _ in range(epochs)
    )
    for batch in orders:
        optimizer.zero_grad()
        F.cross_entropy(sub(x[batch]), y[batch]).backward()
        optimizer.step()
        schedule.step()
    return sub


def test_errors(sub, w, x, y):
    sub.w.data.copy_(w)
    with torch.no_grad():
        return int((sub(x).argmax(1) != y).sum())


def row(name, dim, seeds):
    make, shape, epochs = TASKS[name]
    x, y, count = make()
    start, found, held_out = time.perf_counter(), [], []
    for seed in range(seeds):
        sub = trained(network(*shape), x[:count], y[:count], dim, seed, epochs)
        found.append(generalization_bound(sub, TensorDataset(x[:count], y[:count])))
        held_out.append(test_errors(sub, found[-1].quantized.w, x[count:], y[count:]))
    best = min(range(seeds), key=lambda seed: found[seed].error)
    bound, errors, rest = found[best], held_out[best], len(x) - count
    print(
        f"{name:<9}{dim:>5}{bound.levels:>8}{bound.bits:>7.0f}{bound.train_error:>8.3f}{errors / rest:>7.3f}"
        f"{bound.error:>8.3f} {max(one.error for one in found):.3f}{error_bound(errors, rest):>10.3f}"
        f"{(time.perf_counter() - start) / seeds:>7.0f} s",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed at dim 128")
    quick = parser.parse_args().quick
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'':<9}{'dim':>5}{'levels':>8}{'bits':>7}{'train':>8}{'test':>7}{'bound':>8}{'':6}{'held out':>10}")
    for name in TASKS:
        for dim in (128,) if quick else DIMS:
            row(name, dim, 3 if name == "digits" and not quick else 1)


if __name__ == "__main__":
    main()
