"""Two classifiers of digits, at the start and trained, with the dense Hessian of each: the truth."""

import copy
import functools
from dataclasses import dataclass

import pytest
import torch
from marks import slow
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_sketch.curvature import Hessian, Spectrum, spectrum
from lightning_sketch.operators import LinearOperator


@dataclass(frozen=True)
class Case:
    """A network in float64 and evaluation mode, one batch, and its dense Hessian with its eigenvalues, falling."""

    name: str
    module: nn.Module
    batch: tuple[Tensor, Tensor]
    dense: Tensor
    eigenvalues: Tensor

    def hessian(self, dtype=torch.float64) -> Hessian:
        return Hessian(cross_entropy, copy.deepcopy(self.module).to(dtype), [self.batch])

    def spectrum(self, dtype, num_matvecs=64, seed=0) -> Spectrum:
        """Return a spectrum whose run does not stop early, computed once for all tests."""
        return measured(self.name, dtype, num_matvecs, seed)


@dataclass(frozen=True)
class Dense(LinearOperator):
    """A matrix as an operator."""

    matrix: Tensor

    @property
    def shape(self):
        return tuple(self.matrix.shape)

    @property
    def dtype(self):
        return self.matrix.dtype

    def matvec(self, x):
        return x @ self.matrix.T

    def rmatvec(self, y):
        return y @ self.matrix


class Diagonal(LinearOperator):
    """A diagonal matrix, with an error of relative size `noise` in every product."""

    def __init__(self, values: Tensor, noise: float = 0.0):
        self.values, self.dtype, self.noise = values, values.dtype, noise
        self.generator = torch.Generator().manual_seed(0)

    @property
    def shape(self):
        return len(self.values), len(self.values)

    def matvec(self, x):
        y = self.values * x
        noise = torch.randn(y.shape, dtype=y.dtype, generator=self.generator)
        return y + self.noise * y.norm() * noise / noise.norm()

    rmatvec = matvec


def cross_entropy(module, batch):
    x, y = batch
    return nn.functional.cross_entropy(module(x.to(next(module.parameters()).dtype)), y)


def mlp():
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def cnn():
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        *(nn.Conv2d(1, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.Conv2d(6, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU()),
        *(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(48, 10)),
    )


def digits():
    x, y = load_digits(return_X_y=True)
    x = torch.tensor(x, dtype=torch.float32)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(123))
    return ((x - x.mean()) / x.std())[order], torch.tensor(y)[order]


def train(module, x, y):
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
    for _ in range(15):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            cross_entropy(module, (x[rows], y[rows])).backward()
            optimizer.step()
    module.zero_grad()


def dense_hessian(module, batch):
    """Compute the Hessian by differentiating each entry of the gradient, 32 rows at a time."""
    parameters = list(module.parameters())
    gradients = torch.autograd.grad(cross_entropy(module, batch), parameters, create_graph=True)
    gradient = torch.cat([g.flatten() for g in gradients])
    blocks = (
        torch.autograd.grad(gradient, parameters, rows, retain_graph=True, is_grads_batched=True)
        for rows in torch.eye(len(gradient), dtype=gradient.dtype).split(32)
    )
    return torch.cat([torch.cat([part.flatten(1) for part in block], dim=1) for block in blocks])


@functools.cache
def make_case(name: str) -> Case:
    network, state = name.split()
    (x, y), examples = digits(), {"mlp": 300, "cnn": 60}[network]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = {"mlp": mlp, "cnn": cnn}[network]()
        module(x[:1437])  # running statistics that have seen data
        if state == "trained":
            train(module, x[:1437], y[:1437])
    module.double().eval()
    batch = x[:examples].double(), y[:examples]
    dense = dense_hessian(module, batch)
    return Case(name, module, batch, dense, torch.linalg.eigvalsh(dense).flip(0))


@functools.cache
def measured(name, dtype, num_matvecs, seed):
    h = make_case(name).hessian(dtype)
    return spectrum(h, num_matvecs=num_matvecs, seed=seed, top_k=num_matvecs - 10, bottom_k=10)


CASES = ["mlp start", "mlp trained", "cnn start", "cnn trained"]


def mostly_small(names):
    """Return these cases for a parametrization: those that are not MLPs run in `make test-all` only."""
    return [name if name.startswith("mlp") else slow(name) for name in names]


@pytest.fixture(params=mostly_small(CASES))
def case(request):
    return make_case(request.param)


@pytest.fixture
def cases():
    return [make_case(name) for name in CASES]


@pytest.fixture
def dense_operator():
    return Dense


@pytest.fixture
def outliers():
    """Return a function of the noise that makes an operator with eigenvalues 5, 4, 3, 2, -2 and a bulk in [-0.5, 1]."""
    values = torch.linspace(-0.5, 1, 3000, dtype=torch.float64)
    values[:5] = torch.tensor([5.0, 4, 3, 2, -2])
    return functools.partial(Diagonal, values)
