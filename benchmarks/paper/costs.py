"""What the paper's tables of costs share: a transformer whose gradients and products with its Hessian are sketched.

explicit   S ∇L(θ), and S H Sᵀ v by a product with the Hessian H of L
implicit   the same as derivatives by w at 0 of L(θ + Sᵀ w)

ms         the least of some calls, from the call to its result: the passes of the model and the sketch
GB         the most memory in use at once, beyond the model and its batch: with what a sketch stores
"""

import argparse
import ctypes
import gc
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from published import Published
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_sketch import Hessian, make_sketch
from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.operators import Sketch

sys.path.append(str(Path(__file__).parents[1]))
from sketch_speed import forget_high_water, high_water, machine, print_table


class Size(NamedTuple):
    width: int
    layers: int
    vocabulary: int
    rows: int
    tokens: int


SIZES = {
    "tiny": Size(16, 1, 50, 2, 8),
    "10M": Size(256, 6, 10000, 4, 64),
    "82M": Size(768, 6, 26000, 4, 512),  # of the size of DistilGPT-2
    "134M": Size(768, 12, 32000, 4, 512),
    "1.5B": Size(1600, 48, 16000, 1, 512),  # of the size of GPT-2 XL
}


class GPT(nn.Module):
    """A transformer that returns its loss on a batch of tokens (rows, tokens)."""

    def __init__(self, size: Size):
        super().__init__()
        self.size = size
        options = {"dropout": 0.0, "batch_first": True, "norm_first": True}
        layer = nn.TransformerEncoderLayer(size.width, max(1, size.width // 64), 4 * size.width, **options)
        self.embed = nn.Embedding(size.vocabulary, size.width)
        self.body = nn.TransformerEncoder(layer, size.layers, enable_nested_tensor=False)
        self.head = nn.Linear(size.width, size.vocabulary)

    def forward(self, x):
        logits = self.head(self.body(self.embed(x)))
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), x[:, 1:].flatten())

    def batch(self, rows):
        return torch.randint(0, self.size.vocabulary, (rows, self.size.tokens))


class Cost(NamedTuple):
    ms: float
    gb: float

    def __str__(self):
        return f"{self.ms:.{0 if self.ms >= 100 else 1}f} / {self.gb:.2f}"


class Sketched(NamedTuple):
    """A sketch that is measured, `published` or ours; of ours the transform is not a choice."""

    kind: str
    transform: str = ""

    def made(self, n: int, dim: int, device: str) -> Sketch | Published:
        return Published(*self, n, dim, device) if self.transform else make_sketch(self.kind, n=n, dim=dim, seed=0)

    def __str__(self):
        return f"{self.kind}, published, {self.transform}" if self.transform else f"{self.kind}, ours"


OURS = [Sketched(kind) for kind in ("block_srht", "count_sketch", "fjl", "affd", "ffd", "afjl", "qk")]
PUBLISHED = [Sketched(kind, transform) for kind in ("affd", "afjl") for transform in ("hadamard", "haar", "fft")]
PUBLISHED += [Sketched("qk", "haar")]


class Problem:
    """A transformer with a batch.

    Args:
        size: A key of SIZES.
        device: "cpu" or "cuda".
        dtype: The type of its parameters.
    """

    def __init__(self, size: str, device: str = "cpu", dtype: torch.dtype = torch.float32):
        torch.manual_seed(0)
        with torch.device(device):
            self.module = GPT(SIZES[size]).to(dtype)
            self.tokens = self.module.batch(SIZES[size].rows)
        self.device, self.dtype, self.layout = device, dtype, Layout.of(self.module)
        self.n, self.parameters = self.layout.n, self.layout.parameters(self.module)
        self.hessian = Hessian(lambda module, batch: module(batch), self.module, [self.tokens])

    def gradient(self) -> dict[str, Tensor]:
        return dict(zip(self.layout.names, torch.autograd.grad(self.module(self.tokens), self.parameters), strict=True))

    def sketched_gradient(self, sketch: Sketch | Published) -> Tensor:
        if isinstance(sketch, Published):
            return sketch.matvec(torch.cat([g.flatten() for g in self.gradient().values()]))
        return self.layout.sketch(sketch, self.gradient())

    def product(self, v: Tensor) -> Tensor:
        return self.hessian.matvec(v)

    def sketched_product(self, sketch: Sketch | Published, v: Tensor) -> Tensor:
        return sketch.matvec(self.product(sketch.rmatvec(v)))

    def implicit_gradient(self, sketch: Sketch | Published, graph: bool = False) -> tuple[Tensor, Tensor]:
        """Return the gradient by w at 0, and w."""
        w = torch.zeros(sketch.dim, device=self.device, requires_grad=True)
        moves = zip(self.layout.names, self.parameters, self.layout.unflatten(sketch.rmatvec(w)), strict=True)
        moved = {name: p + move.to(p.dtype) for name, p, move in moves}
        return torch.autograd.grad(functional_call(self.module, moved, (self.tokens,)), w, create_graph=graph)[0], w

    def implicit_product(self, sketch: Sketch | Published, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):  # other ways of attention cannot be differentiated twice
            gradient, w = self.implicit_gradient(sketch, graph=True)
            return torch.autograd.grad(gradient @ v, w)[0]

    def calls(self, sketched: Sketched, dim: int) -> tuple[dict[str, Callable[[], Any]], int]:
        """Return what is measured, the gradient and the product, both ways, and the bytes that the sketch stores."""
        sketch, v = sketched.made(self.n, dim, self.device), torch.ones(dim, device=self.device)
        calls = {
            "gradient": lambda: self.sketched_gradient(sketch),
            "implicit gradient": lambda: self.implicit_gradient(sketch),
            "product": lambda: self.sketched_product(sketch, v),
            "implicit product": lambda: self.implicit_product(sketch, v),
        }
        return calls, sketch.nbytes if isinstance(sketch, Published) else 0

    def cost(self, call: Callable[[], Any], repeats: int = 3, stored: float = 0.0) -> Cost:
        """Return what a call costs, with bytes that are stored for it."""
        call()
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            if self.device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        before = self._forget()
        call()
        most = (torch.cuda.max_memory_allocated() if self.device == "cuda" else high_water()) - before
        return Cost(1e3 * min(times), (most + stored) / 1e9)

    def _forget(self) -> int:
        """Begin to note the most memory in use, and return what is in use now."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        if sys.platform == "linux":
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # or what was freed would count as in use
        forget_high_water()
        return 1024 * int(re.search(r"VmRSS:\s*(\d+)", Path("/proc/self/status").read_text())[1])

    def plain(self, names: Iterable[str] = ("gradient", "product")) -> dict[str, Cost]:
        """Return the costs without a sketch."""
        v = torch.ones(self.n, device=self.device)
        calls = {"gradient": self.gradient, "product": lambda: self.product(v)}
        return {name: self.cost(calls[name]) for name in names}

    def costs(
        self, every: Iterable[Sketched], dims: Sequence[int], names: Sequence[str], repeats: int = 3
    ) -> Iterator[tuple[Sketched, int, dict[str, Cost]]]:
        """Measure sketches to some dims: of each the calls of these names."""
        for sketched in every:
            for dim in dims:
                calls, stored = self.calls(sketched, dim)
                yield sketched, dim, {name: self.cost(calls[name], repeats, stored) for name in names}


def arguments(doc: str) -> argparse.Namespace:
    """Return the arguments of a script, and print what its numbers depend on."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--size", choices=SIZES, help="of the model; 10M on a CPU, 82M on a GPU, if not given")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--small", action="store_true", help="tries the script out; the numbers say nothing")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    asked.size = "tiny" if asked.small else asked.size or ("82M" if asked.device == "cuda" else "10M")
    where = f"{torch.cuda.get_device_name()}, " if asked.device == "cuda" else f"{asked.threads} threads, "
    print(f"{where}{machine()}, {asked.dtype}\n")
    return asked


def problem_of(asked: argparse.Namespace) -> Problem:
    """Return the problem that the arguments of a script ask for, and print its size."""
    problem = Problem(asked.size, asked.device, getattr(torch, asked.dtype))
    print(f"{problem.n:,} parameters, a batch of {' x '.join(map(str, problem.tokens.shape))} tokens\n")
    return problem


def show(header: Sequence[str], lines: Iterable[Sequence[Any]]) -> None:
    print_table(header, [[str(cell) for cell in line] for line in lines])
