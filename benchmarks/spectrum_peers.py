"""The ten largest eigenvalues of a Hessian of a million rows: what they cost here and in three other packages (5 minutes).

One network for all: 512-1024-448-10 with GELU, n = 989,002 float32 parameters, three epochs of Adam on scikit-learn's
digits (8 x 8 pixels through a fixed random map and tanh to 512 inputs); the Hessian is that of 300 digits, one batch.
One thread. All lines are measured in turn, five times over, each time in a new process; a number is the median.

products   Hessian-vector products, all of them: ours include 6 that measure how linear the operator is, and those
           of the short second run that looks for copies of eigenvalues
seconds    of CPU time, from the module and the batch to ten eigenvalues
ratio      seconds / (products x one bare product). The bare product is double backward with its graph built anew,
           timed in the same process before and after; keeping the graph, as we and PyHessian do, can bring the
           ratio below 1
vectors    the most memory in use at once above that of two bare products, in vectors of n float32 numbers
error      the largest relative error of the ten, against Lanczos in float64 with all its vectors kept and
           re-orthogonalized twice, 120 steps
sure       how many of the ten the method itself calls converged; PyHessian makes no such claim

"fewest" is the shortest run of ours whose error is at most 1e-3 from three seeds out of three; nobody knows that
number beforehand, so the default, which stops itself, is what a user gets. Memory is read as Linux shows it.
"""

import contextlib
import importlib
import importlib.util
import io
import multiprocessing
import os
import platform
import re
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_sketch.curvature import Hessian, spectrum

EXAMPLES = 300
STEPS = 120  # of the reference
ERROR = 1e-3
PASSES = 1  # through the table
BARE = 4  # bare products timed before the method, and after it

PEERS = {"hessian-eigenthings": "hessian_eigenthings", "PyHessian": "pyhessian", "curvlinops": "curvlinops"}
INSTALL = {"curvlinops": "curvlinops-for-pytorch scipy"}


def cross_entropy(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


def make_problem() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """The network, lightly trained, and the batch."""
    torch.manual_seed(0)
    pixels, labels = map(torch.tensor, load_digits(return_X_y=True))
    x = torch.tanh(pixels.float() / 16 @ torch.randn(64, 512) / 2)
    x = (x - x.mean()) / x.std()
    module = nn.Sequential(nn.Linear(512, 1024), nn.GELU(), nn.Linear(1024, 448), nn.GELU(), nn.Linear(448, 10))
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
    for rows in [rows for _ in range(3) for rows in torch.randperm(len(x)).split(64)]:
        optimizer.zero_grad()
        cross_entropy(module, (x[rows], labels[rows])).backward()
        optimizer.step()
    optimizer.zero_grad()
    return module, (x[:EXAMPLES].clone(), labels[:EXAMPLES].clone())


def reference(path: Path) -> tuple[list[float], int]:
    """The ten largest eigenvalues, and the first step of that same run at which they were right to 1e-3."""
    module, batch = torch.load(path, weights_only=False)
    h = Hessian(cross_entropy, module.double(), [(batch[0].double(), batch[1])])
    basis, alpha, beta = torch.zeros(STEPS + 1, h.shape[0], dtype=torch.float64), [], []
    basis[0] = torch.randn(h.shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    basis[0] /= basis[0].norm()
    with h.hold():
        for j in range(STEPS):
            w = h.matvec(basis[j])
            alpha.append(w @ basis[j])
            for _ in range(2):
                w -= basis[: j + 1].T @ (basis[: j + 1] @ w)
            beta.append(w.norm())
            basis[j + 1] = w / beta[-1]
    alpha, beta = torch.stack(alpha), torch.stack(beta)
    tridiagonal = alpha.diag() + beta[:-1].diag(1) + beta[:-1].diag(-1)
    ritz = [torch.linalg.eigvalsh(tridiagonal[:m, :m]).flip(0)[:10] for m in range(10, STEPS + 1)]
    true = ritz[-1].tolist()
    return true, 10 + next(i for i, values in enumerate(ritz) if worst(values, true) <= ERROR)


def fewest(path: Path, true: list[float]) -> int:
    """The smallest num_matvecs with which three seeds out of three are right to 1e-3."""
    module, batch = torch.load(path, weights_only=False)
    h = Hessian(cross_entropy, module, [batch])
    good = 0
    for m in range(48, 9, -2):
        runs = (spectrum(h, num_matvecs=m, seed=seed, top_k=10, bottom_k=0, tol=0.0) for seed in range(3))
        if not all(worst(run.top(10), true) <= ERROR for run in runs):
            break
        good = m
    return good


def worst(found: Sequence[float] | Tensor, true: list[float]) -> float:
    """The largest relative error; `found` may be in any order."""
    found, true = torch.as_tensor(found).double().sort(descending=True).values, torch.tensor(true, dtype=torch.float64)
    return float(((found - true) / true).abs().max())


def ours(module, batch, **options) -> tuple[Tensor, int, int]:
    """Eigenvalues, products, how many of the eigenvalues are called converged."""
    sp = spectrum(Hessian(cross_entropy, module, [batch]), top_k=10, bottom_k=0, **options)
    return sp.top(10), sp.num_products, int(replace(sp, tol=1e-2).converged[:10].sum())


def eigenthings(module, batch, **options) -> tuple[Tensor, int, int]:
    from hessian_eigenthings.algorithms.lanczos import lanczos
    from hessian_eigenthings.operators.hessian import HessianOperator

    found = lanczos(HessianOperator(module, [batch], cross_entropy), k=10, which="LA", seed=0, **options)
    return found.eigenvalues, found.iterations, int(found.converged.sum())


def pyhessian(module, batch) -> tuple[list[float], int, None]:
    package, products = importlib.import_module("pyhessian.hessian"), []
    product = package.hessian_vector_product
    package.hessian_vector_product = lambda *arguments: products.append(1) or product(*arguments)
    values, _ = package.hessian(module, nn.functional.cross_entropy, data=batch, cuda=False).eigenvalues(top_n=10)
    return values, len(products), None


def curvlinops(module, batch, **options) -> tuple[Tensor, int, int]:
    from curvlinops import HessianLinearOperator
    from scipy.sparse.linalg import LinearOperator, eigsh

    loss, products = nn.CrossEntropyLoss(), []
    h = HessianLinearOperator(module, loss, list(module.parameters()), [batch], check_deterministic=False).to_scipy()
    counted = LinearOperator(h.shape, matvec=lambda v: products.append(1) or h.matvec(v), dtype="float32")
    values = eigsh(counted, k=10, which="LA", tol=1e-3, return_eigenvectors=False, **options)
    return values.copy(), len(products), len(values)


METHODS = {"ours": ours, "hessian-eigenthings": eigenthings, "PyHessian": pyhessian, "curvlinops": curvlinops}


def measure(task: tuple[Path, list[float], str, dict]) -> list[float] | None:
    """Products, seconds, ratio, vectors, error, sure; None if the package is missing. Call it in a new process."""
    path, true, package, options = task
    if package in PEERS and not importlib.util.find_spec(PEERS[package]):
        return None
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    module, batch = torch.load(path, weights_only=False)
    n = sum(p.numel() for p in module.parameters())
    if package in PEERS:
        importlib.import_module(PEERS[package])
    forget_high_water()
    bare = [bare_product(module, batch) for _ in range(2 + BARE)][2:]
    before, start = high_water(), time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        values, products, sure = METHODS[package](module, batch, **options)
    seconds, after = time.process_time() - start, high_water()
    bare += [bare_product(module, batch) for _ in range(BARE)]
    ratio = seconds / (products * statistics.median(bare))
    nan = float("nan")
    return [products, seconds, ratio, (after - before) / (4 * n), worst(values, true), nan if sure is None else sure]


def bare_product(module: nn.Module, batch: tuple[Tensor, Tensor]) -> float:
    """Seconds of CPU time of one product by double backward, its graph built anew."""
    parameters = list(module.parameters())
    direction = [torch.ones_like(p) for p in parameters]
    start = time.process_time()
    gradients = torch.autograd.grad(cross_entropy(module, batch), parameters, create_graph=True)
    torch.autograd.grad(gradients, parameters, direction)
    return time.process_time() - start


def forget_high_water() -> None:
    """Let the high-water mark of memory be what is in use now."""
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def high_water() -> float:
    """The most bytes in use at once. Not ru_maxrss, which a process inherits from the one that started it."""
    if sys.platform != "linux":
        return float("nan")
    return 1024 * int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def cpu() -> str:
    info = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    return next((line.split(": ")[1] for line in info if line.startswith("model name")), platform.processor())


def main():
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes started below
    names = ["torch", *(INSTALL.get(name, name).split()[0] for name in PEERS if importlib.util.find_spec(PEERS[name]))]
    print(f"{cpu()}, 1 thread, {', '.join(f'{name} {version(name)}' for name in names)}")
    with (
        tempfile.TemporaryDirectory() as folder,
        multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool,
    ):
        path = Path(folder) / "problem.pt"
        torch.set_num_threads(1)
        torch.save(make_problem(), path)
        true, full = pool.apply(reference, [path])
        few = pool.apply(fewest, [path, true])
        print("true:", *(f"{value:.3f}" for value in true))
        print(f"Lanczos in float64 with all vectors kept is right to {ERROR:.0e} after {full} products.")
        rows = {
            f"ours, fewest ({few} + 8 + 6)": ("ours", {"num_matvecs": few, "tol": 0.0}),
            "ours, default": ("ours", {}),
            "ours, 128 products in all": ("ours", {"num_matvecs": 98, "tol": 0.0}),
            "hessian-eigenthings, default": ("hessian-eigenthings", {}),
            "  max_iter=64": ("hessian-eigenthings", {"max_iter": 64}),
            "  128, re-orthogonalized": ("hessian-eigenthings", {"max_iter": 128, "reorthogonalize": True}),
            "PyHessian, default": ("PyHessian", {}),
            "curvlinops + eigsh, tol=1e-3": ("curvlinops", {}),
        }
        found = {name: [] for name in rows}
        tasks = [(path, true, *row) for row in rows.values()] * PASSES
        for name, numbers in zip(list(rows) * PASSES, pool.imap(measure, tasks), strict=True):
            found[name].append(numbers)

    print(f"\n{'':30} products  seconds  ratio  vectors    error  sure")
    medians = {}
    for name, (package, _) in rows.items():
        if found[name][0] is None:
            print(f"{name:30} not installed: pip install {INSTALL.get(package, package.lower())}")
            continue
        medians[name] = products, seconds, ratio, vectors, error, sure = map_medians(found[name])
        flags = f"{sure:5.0f}".replace("nan", "  -")
        print(f"{name:30} {products:8.0f} {seconds:8.2f} {ratio:6.2f} {vectors:8.1f} {error:8.1e} {flags}")
    pass


def map_medians(runs: list[list[float]]) -> list[float]:
    return [statistics.median(column) for column in zip(*runs, strict=True)]


if __name__ == "__main__":
    main()
