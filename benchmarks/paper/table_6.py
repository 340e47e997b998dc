"""Table 6: how many numbers a sketch needs to keep the dot products of gradients.

    S∇L(x)·S∇L(z)        is compared with        ∇L(x)·∇L(z)

by Pearson's r over 2^12 pairs of sequences, see `language_model`; r is the mean over the seeds of S.

theirs, ours   the least log2 dim at which r is above .95, .98 and .99, of those measured; "-" where none is
random mask    dim coordinates, chosen at random
traker         TRAK's BasicProjector with normal entries, where installed
s/gradient     to sketch one of 128, products and r included, at the largest dim of its line; gaussian and traker make
               one matrix for all

What differs: their model is a pretrained GPT-2 that was fine-tuned on WikiText-103, ours is a sixteenth of it and
learned one epoch of sources, byte by byte. r depends on how much the exact dot products vary from pair to pair, so the
kinds of a column can be compared, and theirs with ours in their order only. Pairs of long gradients weigh most in r,
so that of cosines follows.

    python benchmarks/paper/table_6.py [--dense-log 10] [--seeds 2] [--small | --full] [--device cuda]

Dense kinds stop at --dense-log. Half an hour of one thread; 4 GB of memory, 6 with traker. Needs transformers.

Source: A. Schioppa, arXiv:2402.03994, table 6.
"""

import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from language_model import Dots, Problem, arguments, prepared, size_of
from sketch_speed import print_table
from torch import Tensor

from lightning_sketch import make_sketch

KINDS = ("block_srht", "count_sketch", "fjl", "affd", "ffd", "afjl", "qk", "gaussian")
DENSE = ("gaussian", "traker")
LEVELS = (0.95, 0.98, 0.99)
PAPER = {"fjl": (10, 12, 13), "affd": (10, 12, 13), "ffd": (10, 12, 14), "afjl": (12, 13, 15), "qk": (14, 16, 17)}


class Line(NamedTuple):
    """What was measured of one kind, at each of the first dims."""

    dots: Sequence[float]  # mean r of dot products
    cosines: Sequence[float]  # of cosines
    spread: Sequence[float]  # range over seeds of r of dot products
    seconds: float  # for one gradient, at the largest dim


def projection(kind: str, n: int, dim: int, seed: int, device: str) -> Callable[[Tensor], Float[Tensor, "rows dim"]]:
    if kind == "random mask":
        kept = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:dim].to(device)
        return lambda rows: rows[:, kept]
    if kind == "traker":
        from trak.projectors import BasicProjector, ProjectionType

        projector = BasicProjector(n, dim, seed, ProjectionType.normal, torch.device(device), block_size=64)
        return lambda rows: projector.project(rows, model_id=0)
    return make_sketch(kind, n=n, dim=dim, seed=seed).matvec


def measure(kind: str, problem: Problem, logs: Sequence[int], seeds: int, device: str) -> Line:
    dots, cosines, spread, seconds = [], [], [], 0.0
    for log in logs:
        start = time.perf_counter()
        projections = (projection(kind, problem.layout.n, 1 << log, seed, device) for seed in range(seeds))
        found = [Dots.of(project(problem.rows)).fidelity(problem.exact) for project in projections]
        seconds = (time.perf_counter() - start) / seeds / len(problem.rows)
        by_dots, by_cosines = zip(*found, strict=True)
        dots.append(statistics.mean(by_dots))
        cosines.append(statistics.mean(by_cosines))
        spread.append(max(by_dots) - min(by_dots))
    return Line(dots, cosines, spread, seconds)


def least(values: Sequence[float], logs: Sequence[int]) -> list[str]:
    """Return the least log2 dim with a value above each level."""
    known = list(zip(logs, values, strict=False))
    return [str(next((log for log, r in known if r > level), "-")) for level in LEVELS]


def shown(values: Sequence[float], logs: Sequence[int]) -> list[str]:
    return [f"{value:.3f}" for value in values] + ["-"] * (len(logs) - len(values))


def main():
    parser = arguments(__doc__)
    parser.add_argument("--dense-log", type=int, default=10, help="largest log2 dim of gaussian and traker")
    parser.add_argument("--seeds", type=int, default=2)
    asked = parser.parse_args()
    logs = range(4, 9) if asked.small else range(8, 17)
    dense_log = 6 if asked.small else asked.dense_log
    problem = prepared(size_of(asked), asked.device)
    found = {}
    for kind in [*KINDS, "random mask", *(["traker"] if importlib.util.find_spec("trak") else [])]:
        own = [log for log in logs if kind not in DENSE or log <= dense_log]
        found[kind] = measure(kind, problem, own, asked.seeds, asked.device)

    header = [f"{whose} r > {level:.2f}" for whose in ("theirs,", "ours,") for level in LEVELS]
    rows = [
        [kind, *map(str, PAPER.get(kind, "---")), *least(line.dots, logs), f"{line.seconds:.3f}"]
        for kind, line in found.items()
    ]
    print("The least log2 dim\n")
    print_table(["kind", *header, "s/gradient"], rows)
    dims = [f"2^{log}" for log in logs]
    print("Ours, r of dot products\n")
    apart = [max(found[kind].spread[i] for kind in KINDS if i < len(found[kind].spread)) for i in range(len(logs))]
    rows = [[kind, *shown(line.dots, logs)] for kind, line in found.items()]
    print_table(["kind", *dims], [*rows, ["seeds differ, at most", *shown(apart, logs)]])
    print("Ours, r of cosines\n")
    print_table(["kind", *dims], [[kind, *shown(line.cosines, logs)] for kind, line in found.items()])


if __name__ == "__main__":
    main()
