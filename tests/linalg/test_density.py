"""The density of all eigenvalues from a few starts, and their sum with its standard error."""

import math

import pytest
import torch
from curvature_cases import cross_entropy

from lightning_sketch.curvature import Hessian, Spectrum, spectrum
from lightning_sketch.linalg.krylov import Krylov
from lightning_sketch.linalg.lanczos import start_vector
from lightning_sketch.linalg.quadrature import trace

# wide, one-sided, low rank, multiple; float64
SPECTRA = {
    "both signs": torch.linspace(-3, 5, 400),
    "positive": torch.logspace(-3, 1, 400),
    "low rank": torch.cat([torch.tensor([9.0, 5, 2, -1]), torch.zeros(396)]),
    "multiple": torch.tensor([3.0, 3, 1, -2]).repeat_interleave(100),
}


@pytest.fixture(params=SPECTRA.values(), ids=SPECTRA)
def values(request):
    return request.param.double()


def run(operator, **kwargs):
    return spectrum(operator, **{"num_matvecs": 32, "top_k": 20, "bottom_k": 10, "tol": 0.0} | kwargs)


def moment(nodes, weights, p):
    return float(weights @ nodes**p)


@pytest.mark.parametrize("probes", [0, 3])
@pytest.mark.parametrize("steps", [1, 7])
def test_polynomials_below_twice_the_steps_are_exact(dense_operator, values, probes, steps):
    """The mean over starts v of vᵀ p(A) v is exact to rounding up to degree 2 m - 1, and no further."""
    operator = dense_operator(values.diag())
    sp = run(operator, density_probes=probes, density_matvecs=steps, num_matvecs=30 if probes else steps, **few(probes))
    starts = [start_vector(operator, 0, name=f"{i}") for i in range(1 + probes)]
    nodes, weights = sp.quadrature
    assert weights.sum() == pytest.approx(1, rel=1e-12)
    for p in range(2 * steps):
        expected = sum(float(v**2 @ values**p) for v in starts) / len(starts)
        size = sum(float(v**2 @ values.abs() ** p) for v in starts) / len(starts)
        assert abs(moment(nodes, weights, p) - expected) < 1e-9 * size
    distinct = len(values.unique())
    p, beyond = 2 * steps, sum(float(v**2 @ values ** (2 * steps)) for v in starts) / len(starts)
    assert steps >= distinct or abs(moment(nodes, weights, p) - beyond) > 1e-9 * beyond


def few(probes):
    """The error is what so few products allow."""
    return {} if probes else {"top_k": 1, "bottom_k": 0}


def test_the_density_is_close_to_the_true_one(case):
    """Distance of Wasserstein over the range of eigenvalues, 4 starts of 32 steps in float32.

    Measured 3e-3 and 9e-4 (MLP, 2410 parameters), 6.4e-3 and 2.3e-3 (CNN, 1246): four starts say less of few.
    """
    bar = {"mlp start": 4e-3, "mlp trained": 2e-3, "cnn start": 1e-2, "cnn trained": 4e-3}[case.name]
    sp = spectrum(case.hessian(torch.float32), num_matvecs=32, dim=512, tol=0.0, density_probes=3)
    spread = float(case.eigenvalues[0] - case.eigenvalues[-1])
    assert wasserstein(case.eigenvalues, *sp.quadrature) < bar * spread


def wasserstein(eigenvalues, nodes, weights):
    """Return the area between two cumulative distributions."""
    points = torch.cat([eigenvalues, nodes])
    jumps = torch.cat([torch.full_like(eigenvalues, 1 / len(eigenvalues)), -weights])
    order = points.argsort()
    return float((jumps[order].cumsum(0)[:-1].abs() * points[order].diff()).sum())


def test_the_density_is_smooth_and_sums_to_one(dense_operator, values):
    sp = run(dense_operator(values.diag()), density_probes=3)
    grid = torch.linspace(-10, 20, 3001, dtype=torch.float64)
    for sigma in (0.1, 0.5):
        found = sp.density(grid, sigma)
        assert float(torch.trapezoid(found, grid)) == pytest.approx(1, rel=1e-6)
        mean = float(torch.trapezoid(found * grid, grid))
        spread = float(torch.trapezoid(found * (grid - mean) ** 2, grid))
        assert mean == pytest.approx(sp.quadrature.mean(sp.quadrature.nodes), abs=1e-6)
        variance = sp.quadrature.mean((sp.quadrature.nodes - mean) ** 2)
        assert spread == pytest.approx(variance + sigma**2, rel=1e-4)  # as Gaussians of that width


@pytest.mark.parametrize("name", ["both signs", "multiple"])
def test_the_trace_is_right_to_its_standard_error(dense_operator, name):
    """From one start of 100 seeds: within one error in 68 %, within two in 95 %, less 3.5 binomial errors.

    That holds where many eigenvalues matter, as here, since then the estimate is normal.
    """
    values = SPECTRA[name].double()
    operator, errors = dense_operator(values.diag()), []
    for seed in range(100):
        krylov = Krylov(seed, None)
        for _ in zip(range(8), krylov.grow(operator), strict=False):
            pass
        found = trace(krylov.runs, len(values))
        errors.append((found.value - float(values.sum())) / found.sem)
    errors = torch.tensor(errors)
    assert abs(errors.mean()) < 3.5 / math.sqrt(100)
    for width, share in ((1, 0.683), (2, 0.954)):
        slack = 3.5 * math.sqrt(share * (1 - share) / 100)
        assert abs(float((errors.abs() < width).double().mean()) - share) < slack


def test_the_trace_comes_with_every_spectrum(dense_operator, values):
    """The trace uses all starts, also those that searched for copies; more starts give a smaller error."""
    operator = dense_operator(values.diag())
    one, more = run(operator, tol=1e-2), run(operator, tol=1e-2, density_probes=12, density_matvecs=8)
    for sp in (one, more):
        assert abs(sp.trace - float(values.sum())) < 4 * sp.trace_sem + 1e-9 * float(values.abs().sum())
    assert more.trace_sem < one.trace_sem + 1e-9


def test_of_a_multiple_of_the_identity_nothing_is_left_to_chance(dense_operator):
    sp = run(dense_operator(2.5 * torch.eye(50, dtype=torch.float64)), top_k=1, bottom_k=0)
    assert sp.trace == pytest.approx(125, rel=1e-12)
    assert sp.trace_sem < 1e-5 * 125
    assert sp.effective_rank == pytest.approx(50, rel=1e-9)
    assert sp.negative_mass == 0


def test_negative_mass_and_effective_rank(dense_operator, values):
    """Both are functions of the density; with 12 further starts they are right within a tenth of their range."""
    sp = run(dense_operator(values.diag()), density_probes=12, density_matvecs=16)
    negative, rank = (
        float(-values.clamp(max=0).sum() / values.abs().sum()),
        float(values.abs().sum() / values.abs().max()),
    )
    assert sp.negative_mass == pytest.approx(negative, abs=0.1)
    assert sp.effective_rank == pytest.approx(rank, rel=0.35)


def test_of_nothing_there_is_no_density(dense_operator):
    sp = run(dense_operator(torch.zeros(30, 30, dtype=torch.float64)), top_k=1, bottom_k=0)
    assert (sp.trace, sp.negative_mass, sp.effective_rank) == (0, 0, 0)
    assert sp.trace_sem < 1e-12


def test_a_spectrum_that_was_not_measured_has_none():
    bare = Spectrum(torch.ones(1).double(), torch.zeros(1).double(), tol=0.1, linearity_defect=0.0, num_products=1)
    for of in (lambda: bare.density(torch.zeros(1), 1.0), lambda: bare.negative_mass, lambda: bare.effective_rank):
        with pytest.raises(ValueError, match=r"no nodes and weights; compute it with spectrum\(\.\.\.\)"):
            of()
    assert math.isnan(bare.trace)


@pytest.mark.parametrize("options", [{"density_probes": -1}, {"density_matvecs": 0}])
def test_probes_out_of_range(dense_operator, options):
    with pytest.raises(ValueError, match=r"need density_probes >= 0 and density_matvecs >= 1, got .*; 3 and 32"):
        run(dense_operator(torch.eye(50)), **options)


@pytest.mark.parametrize("options", [{}, {"density_probes": 3, "density_matvecs": 16}])
def test_a_small_block_has_its_exact_density(dense_operator, options):
    """A block of a few parameters, as of a bias: all eigenvalues are known, and so is what the density says."""
    values = torch.tensor([4.0, 2.5, 1.25, 0.5, 0.25, -0.5], dtype=torch.float64)
    sp = spectrum(dense_operator(values.diag()), top_k=1, bottom_k=0, num_matvecs=32, **options)
    assert sp.converged.all()
    assert sp.quadrature.nodes.tolist() == pytest.approx(values.tolist())
    assert sp.quadrature.weights.tolist() == pytest.approx([1 / 6] * 6)
    assert sp.effective_rank == pytest.approx(9 / 4)
    assert sp.negative_mass == pytest.approx(0.5 / 9)


def test_a_layer_is_measured_by_few_products(case):
    """What a monitor logs of each block with probes, by at most 70 products: the norm within four standard errors."""
    names = [name for name, _ in case.module.named_parameters()]
    last = [name for name in names if name.split(".")[0] == names[-1].split(".")[0]]
    block = Hessian(cross_entropy, case.module, [case.batch], parameters=last)
    sp = spectrum(block, num_matvecs=32, dim=1024, top_k=1, bottom_k=0, density_probes=3, density_matvecs=16)
    n = block.shape[0]
    true = torch.linalg.eigvalsh(case.dense[-n:, -n:])  # the last layer has the last rows
    assert sp.num_products <= 70
    assert abs(sp.trace_of_square - float(true.square().sum())) < 4 * sp.trace_of_square_sem
    assert sp.negative_mass < 1e-6
    assert 0.5 < sp.effective_rank / float(true.abs().sum() / true.abs().max()) < 1.5
