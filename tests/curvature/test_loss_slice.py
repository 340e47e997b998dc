"""Slices of the loss and Keskar's sharpness, where they are known exactly; nothing of the module changes."""

import itertools
import math

import pytest
import torch
from curvature_cases import cross_entropy, make_case
from symmetric_matrices import normal, symmetric
from torch import nn

from lightning_sketch import plots
from lightning_sketch.curvature import GGN, EmpiricalFisher, Hessian, keskar_sharpness, loss_slice, spectrum


class Quadratic(nn.Module):
    """L(θ) = θᵀ A θ / 2 + gᵀ θ, with θ in a matrix and a vector."""

    def __init__(self, matrix, slope=0.0):
        super().__init__()
        self.weight = nn.Parameter(normal(3, 2, seed=1))
        self.bias = nn.Parameter(normal(3, seed=2))
        self.matrix, self.slope = matrix, slope

    def forward(self, batch):
        theta = torch.cat([self.weight.flatten(), self.bias])
        return theta @ self.matrix @ theta / 2 + self.slope * theta.sum()


def value(module, batch):
    return module(batch)


def quadratic(eigenvalues=range(1, 10), slope=0.3):
    module = Quadratic(symmetric(torch.tensor(list(eigenvalues), dtype=torch.float64)), slope)
    return Hessian(value, module, [torch.zeros(1)])


def theta_of(operator):
    return torch.cat([p.detach().flatten() for p in operator.parameters])


def loss_at(operator, theta):
    module = operator.module
    return float(theta @ module.matrix @ theta / 2 + module.slope * theta.sum())


def test_a_line_and_a_plane_of_a_quadratic_loss_are_exact():
    h, d = quadratic(), normal(2, 9, seed=3)
    theta = theta_of(h)
    line = loss_slice(h, d[:1], points=5, distance=0.7)
    assert line.coordinates.tolist() == pytest.approx([-0.7, -0.35, 0, 0.35, 0.7])
    assert line.losses.tolist() == pytest.approx([loss_at(h, theta + a * d[0]) for a in line.coordinates])
    plane = loss_slice(h, d, points=4, distance=2.0)
    grid = plane.coordinates.tolist()
    true = [[loss_at(h, theta + a * d[0] + b * d[1]) for b in grid] for a in grid]
    torch.testing.assert_close(plane.losses, torch.tensor(true, dtype=torch.float64), rtol=1e-12, atol=0)
    assert (line.names, plane.names) == (("direction 1",), ("direction 1", "direction 2"))
    assert line.loss == plane.loss == pytest.approx(loss_at(h, theta))


def test_along_an_eigenvector_the_curvature_is_its_eigenvalue():
    """The second difference of the loss, from -1 to 1 in units of the eigenvector."""
    h = quadratic()
    sp = spectrum(h, num_matvecs=9, top_k=2, bottom_k=0)
    found = loss_slice(h, sp.eigenvectors(h, 2).vectors, points=3)
    middle = found.losses[1, 1]
    assert float(found.losses[0, 1] - 2 * middle + found.losses[2, 1]) == pytest.approx(sp.lambda_max)
    assert float(found.losses[1, 0] - 2 * middle + found.losses[1, 2]) == pytest.approx(float(sp.top(2)[1]))


def test_random_directions_have_filters_as_long_as_those_of_the_parameters():
    """Of a loss that reports its parameters: rows and output channels have equal lengths, vectors do not move."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 4)).double().eval()
    seen = []

    def loss_fn(module, batch):
        seen.append([p.detach().clone() for p in module.parameters()])
        return module(batch).square().mean()

    h = Hessian(loss_fn, module, [normal(5, 2, 4, 4)])
    h.loss()
    here = seen[-1]
    loss_slice(h, 1, points=2, distance=0.5)
    moved = seen[-1]
    for before, after in zip(here, moved, strict=True):
        if before.ndim < 2:
            assert torch.equal(before, after)
            continue
        step = (after - before).flatten(1)
        torch.testing.assert_close(step.norm(dim=1), 0.5 * before.flatten(1).norm(dim=1), rtol=1e-12, atol=0)
        assert (torch.nn.functional.cosine_similarity(step, before.flatten(1)).abs() < 0.9).all()
    again = loss_slice(h, 1, points=2, distance=0.5).losses
    assert torch.equal(again, loss_slice(h, 1, points=2, distance=0.5).losses)
    assert not torch.equal(again, loss_slice(h, 1, points=2, distance=0.5, seed=1).losses)


@pytest.mark.parametrize("kind", ["hessian", "ggn", "fisher"])
def test_every_matrix_has_the_slice_of_its_loss(kind):
    case = make_case("mlp trained")
    make = {
        "hessian": lambda: case.hessian(),
        "ggn": lambda: GGN(case.module, [case.batch]),
        "fisher": lambda: EmpiricalFisher(cross_entropy, case.module, [case.batch]),
    }
    found = loss_slice(make[kind](), 1, points=3)
    torch.testing.assert_close(found.losses, loss_slice(case.hessian(), 1, points=3).losses, rtol=1e-9, atol=0)
    assert float(found.losses[1]) == pytest.approx(cross_entropy(case.module, case.batch).item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_gradients_and_buffers_keep_their_bits(dtype):
    """Also in half precision, whose losses are those of float32 copies, and after an error in the middle."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)
    module[0].weight.grad = torch.ones_like(module[0].weight)
    parameters, state = list(module.parameters()), {k: v.clone() for k, v in module.state_dict().items()}
    calls = itertools.count()

    def loss_fn(module, batch):
        if next(calls) == fails_at:
            raise KeyError("in the middle")
        return module(batch).float().square().mean()

    def unchanged():
        same = all(torch.equal(state[k], v) for k, v in module.state_dict().items())
        ones = bool((module[0].weight.grad == 1).all())
        kept = all(old is new for old, new in zip(parameters, module.parameters(), strict=True))
        return same and ones and kept and module.training and parameters[0]._version == version

    version = parameters[0]._version
    h = Hessian(loss_fn, module, [torch.randn(8, 6)])
    fails_at = -1
    loss_slice(h, 2, points=3)
    keskar_sharpness(h, num_steps=2)
    assert unchanged()
    for ahead in (7, 12):
        for function in (lambda: loss_slice(h, 2, points=5), lambda: keskar_sharpness(h, num_steps=9)):
            fails_at = next(calls) + ahead
            with pytest.raises(KeyError, match="in the middle"):
                function()
            assert unchanged()
    fails_at = -1
    assert h.matvec(torch.ones(h.shape[1])).isfinite().all()


def test_a_loss_that_draws_noise_is_seen_with_the_same_draw_everywhere():
    """L(θ) = (θ + e)² with one draw of e for all points: a parabola through L(0), whose second difference is exact."""
    module = nn.Linear(1, 1, bias=False).double()
    h = Hessian(
        lambda m, x: (m(x) + torch.randn(1, dtype=x.dtype)).square().mean(), module, [torch.ones(2, 1).double()]
    )
    found = loss_slice(h, torch.ones(1, 1), points=5, distance=2.0)
    second = found.losses[2:] - 2 * found.losses[1:-1] + found.losses[:-2]
    assert second.tolist() == pytest.approx([2.0] * 3)
    assert float(found.losses[2]) == found.loss == h.loss()


def test_a_loss_that_is_infinite_far_away_is_part_of_the_slice():
    module = nn.Linear(1, 1, bias=False)
    nn.init.ones_(module.weight)
    h = Hessian(lambda module, batch: -module(batch).log().mean(), module, [torch.ones(2, 1)])
    found = loss_slice(h, torch.ones(1, 1), points=5, distance=2.0).losses
    assert found.isfinite().tolist() == [False, False, True, True, True]
    assert math.isnan(found[0])


def corners_of(operator, epsilon):
    """The 512 corners of the box; a convex loss is largest at one of them."""
    theta = theta_of(operator)
    side = epsilon * (theta.abs() + 1)
    return [theta + side * torch.tensor(c, dtype=torch.float64) for c in itertools.product((-1, 1), repeat=9)]


def test_the_sharpness_of_a_convex_loss_is_that_of_the_best_corner():
    """Where the gradient decides, in a small box and for a linear loss; in a large box it is a bound from below."""
    for h, epsilon, least in ((quadratic(), 1e-4, 1.0), (quadratic([0] * 9, 2.0), 0.1, 1.0), (quadratic(), 0.1, 0.9)):
        here = loss_at(h, theta_of(h))
        best = 100 * (max(loss_at(h, corner) for corner in corners_of(h, epsilon)) - here) / (1 + here)
        assert best * least * (1 - 1e-9) <= keskar_sharpness(h, epsilon) <= best * (1 + 1e-9)


def test_the_sharpness_starts_where_the_gradient_is_zero_too():
    """At the minimum, in a box with one large eigenvalue."""
    h = quadratic([30, 2, 1, 1, 1, 1, 1, 1, 1], slope=0.0)
    with torch.no_grad():
        for p in h.module.parameters():
            p.zero_()
    best = 100 * max(loss_at(h, corner) for corner in corners_of(h, 1e-2))
    for seed in range(5):
        assert 0.95 * best < keskar_sharpness(h, 1e-2, seed=seed) <= best * (1 + 1e-9)


def test_it_is_at_least_zero_and_nan_below_a_loss_of_minus_one():
    h = quadratic([0] * 9, slope=0.0)
    assert keskar_sharpness(h) == 0
    below = quadratic([-9] * 9, slope=0.0)
    assert loss_at(below, theta_of(below)) < -1
    assert math.isnan(keskar_sharpness(below))


def test_what_it_refuses():
    h = quadratic()
    with pytest.raises(ValueError, match="1 or 2 directions, got 3"):
        loss_slice(h, 3)
    with pytest.raises(ValueError, match=r"vectors of size 9 as rows, got shape \(1, 8\)"):
        loss_slice(h, torch.ones(1, 8))
    with pytest.raises(ValueError, match=r"need points >= 2 and distance > 0, got 1 and 1\.0"):
        loss_slice(h, points=1)
    with pytest.raises(ValueError, match=r"need epsilon > 0 and num_steps >= 1, got 0\.0 and 10"):
        keskar_sharpness(h, 0.0)
    biases = Hessian(value, h.module, [torch.zeros(1)], parameters="bias")
    with pytest.raises(ValueError, match="there are none among the parameters bias; pass directions as vectors"):
        loss_slice(biases)
    weight = h.module.weight
    closure = Hessian(lambda module, batch: module(batch) + weight.square().sum(), h.module, [torch.zeros(1)])
    for function in (loss_slice, keskar_sharpness):
        with pytest.raises(ValueError, match="uses a parameter without its module"):
            function(closure)


def test_what_it_prints_and_draws():
    h = quadratic()
    line, plane = loss_slice(h, 1, points=5), loss_slice(h, 2, points=3)
    assert repr(plane).startswith("LossSlice of 3 x 3 points along random direction 1 and random direction 2: ")
    assert repr(line).endswith(f", {line.loss:.4g} in the middle")
    curve, middle = line.plot().axes[0].get_lines()
    assert curve.get_ydata().tolist() == line.losses.tolist()
    assert middle.get_ydata().tolist() == [line.loss]
    figure = plane.plot()
    figure.canvas.draw()
    assert figure.axes[0].get_xlabel() == "random direction 1"


def test_contours_have_the_first_direction_to_the_right():
    """The loss rises along the first direction only, so that contours are upright."""
    losses = [[float(a)] * 4 for a in range(4)]
    axes = plots.loss_slice([-1.5, -0.5, 0.5, 1.5], losses, names=("a", "b"), loss=1.5).axes[0]
    segments = [segment for group in axes.collections[1].get_paths() for segment in [group.vertices] if len(segment)]
    assert segments
    assert all(float(segment[:, 0].std()) < 1e-9 < float(segment[:, 1].std()) for segment in segments)
    assert plots.loss_slice([0.0, 1.0], [[math.nan, math.inf], [1.0, 1.0]], names=("a", "b"), loss=1.0).axes
