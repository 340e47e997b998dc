"""See what each sketch costs in time and memory, beside a copy of its input and beside TRAK and dattri (5 minutes).

One table; a line is a kind at a size, float32 on the CPU. Times are for one vector of a batch:

ms        of matvec, S x: the median of several calls
GB/s      of x, read once
copies    the median of (time of a call) / (time of out.copy_(x) just after it): what does not depend on the machine
adjoint   rmatvec, Sᵀ y, in ms and in the same copies. It returns new memory, and touching that for the
          first time costs more than a copy: the line x.clone() does nothing else
extra MB  the most memory in use at once beyond x and the result, for matvec and rmatvec; in a fresh
          process, by the high-water mark that the system keeps

The projectors of TRAK and dattri multiply by a dense random matrix, made anew at every call as ours of
kind gaussian is, so they are measured at a smaller n; a batch shares the making. Without the packages
their lines say how to get them. Another program at work moves all numbers, copies the least.
"""

from collections.abc import Callable

import torch

from lightning_sketch import make_sketch

THREADS = 2
REPEATS = 15  # calls, fewer where they take over
SECONDS = 3.0  # in all, but at least three
MB = 1e6  # bytes

BIG, HUGE = 1 << 24, 1 << 26  # numbers in a vector: 67 and 268 MB
ROWS = [  # (kind, n, dim, batch)
    ("x.clone()", BIG, 1 << 12, 1),
    *((kind, BIG, 1 << bits, 1) for kind in ("block_srht", "count_sketch") for bits in (8, 10, 12, 15)),
    *((kind, HUGE, 1 << 12, 1) for kind in ("block_srht", "count_sketch")),
    *((kind, BIG, 1 << 12, 1) for kind in ("affd", "afjl", "qk", "ffd", "fjl")),
    *(
        (kind, *size)
        for size in ((1 << 20, 1 << 8, 1), (1 << 20, 1 << 8, 16), (1 << 18, 1 << 12, 1))
        for kind in ("block_srht", "gaussian", "traker normal", "traker rademacher", "dattri normal")
    ),
]


def product(kind: str, n: int, dim: int) -> tuple[Callable, Callable | None]:
    """S as a function of x of shape (batch, n), and Sᵀ of shape (batch, dim) where there is one."""
    package, _, entries = kind.partition(" ")
    if package == "traker":
        from trak.projectors import BasicProjector, ProjectionType

        projector = BasicProjector(n, dim, seed=0, proj_type=ProjectionType(entries), device="cpu")
        return lambda x: projector.project(x, model_id=0), None
    if package == "dattri":
        from dattri.func.projection import ProjectionType, make_random_projector

        projector = make_random_projector(
            [n], 1, dim, proj_max_batch_size=8, device=torch.device("cpu"), proj_type=ProjectionType(entries)
        )
        return lambda x: projector.project(x, ensemble_id=0), None
    if kind == "x.clone()":
        return torch.clone, lambda y: y.new_zeros(len(y), n)
    sketch = make_sketch(kind, n=n, dim=dim, seed=0)
    return sketch.matvec, sketch.rmatvec


def measure(row: tuple[str, int, int, int]) -> str:
    """The line of a row; to be called in a process of its own."""
    kind, n, dim, batch = row
    torch.set_num_threads(THREADS)
    for call, size in zip(product(kind, dim, dim), (dim, dim), strict=True):  # what the first call ever allocates
        if call:
            call(torch.ones(1, size))
    x, y, out = torch.randn(batch, n), torch.randn(batch, dim), torch.ones(batch, n)
