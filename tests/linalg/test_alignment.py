"""How much of a gradient lies in the top eigenvectors, and how far two such spaces overlap, from sketches alone."""

import math

import pytest
import torch
from marks import some

from lightning_sketch.curvature import Spectrum, spectrum
from lightning_sketch.linalg.alignment import overlap, shares, shares_by_dots

N, SEEDS = 3000, range(5)
SHARES = [0.02, 0.1, 0.15, 0.25, 0.5, 0.9, 1.0]


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gradient(share, k=4):
    """Return a vector with this share on the first k axes, which are the eigenvectors of `outliers`."""
    g = normal(N, seed=7)
    g[:k] *= math.sqrt(share) / g[:k].norm()
    g[k:] *= math.sqrt(1 - share) / g[k:].norm()
    return 3 * g


def run(operator, seed=0, g=None, **kwargs):
    options = {"num_matvecs": 48, "dim": 1024, "top_k": 4, "bottom_k": 1, "tol": 1e-4}
    return spectrum(operator, seed=seed, gradient=g, **options | kwargs)


def orthonormal(dim, k, seed=0):
    return torch.linalg.qr(normal(dim, k, seed=seed))[0]


@pytest.mark.parametrize("share", some(SHARES, [0.02, 0.5, 1.0]))
def test_the_share_is_right_from_sketches(outliers, share):
    """Mean of five seeds: within 0.03 where it is large, within 5 % of itself where it is small.

    So it is with the gradient at hand; a sketch that comes later, within 0.03 at any size.
    """
    g = gradient(share)
    runs = [run(outliers(), seed, g) for seed in SEEDS]
    found = sum(sp.gradient_in_top(4) for sp in runs) / len(runs)
    later = sum(sp.alignment(sp.sketch.matvec(g), 4) for sp in runs) / len(runs)
    assert abs(found - share) < (0.03 if share > 0.2 else 0.05 * share)
    assert abs(later - share) < 0.03


def test_the_share_is_that_of_the_first_k(outliers):
    g = torch.zeros(N, dtype=torch.float64)
    g[:4] = torch.tensor([1.0, 2, 3, 4])
    sp = run(outliers(), 0, g)
    for k, share in enumerate([1 / 30, 5 / 30, 14 / 30, 1.0], start=1):
        assert sp.gradient_in_top(k) == pytest.approx(share, rel=0.02, abs=0.04 if share > 0.2 else 0)


def test_without_a_sketch_it_is_exact(dense_operator):
    matrix = torch.cat([torch.tensor([5.0, 4, 3]), torch.linspace(-1, 1, 57)]).double().diag()
    g = normal(60)
    sp = run(dense_operator(matrix), g=g, top_k=3)
    assert sp.sketch is None
    for k in range(1, 4):
        share = float((g[:k] ** 2).sum() / (g**2).sum())
        assert sp.gradient_in_top(k) == pytest.approx(share, rel=1e-6)
        assert sp.alignment(g, k) == pytest.approx(share, rel=1e-6)
    assert sp.num_outliers() == 3
    assert sp.gradient_in_outliers == sp.gradient_in_top(3)


def test_vectors_at_an_angle_share_what_they_have_in_common():
    """The x = V c are neither orthogonal nor of length one: only their span matters."""
    v, c, g = orthonormal(30, 6), normal(6, 3), normal(30, seed=1)
    space = torch.linalg.qr(v @ c)[0]
    expected = (space.T @ g).square().cumsum(0) / (g @ g)
    torch.testing.assert_close(shares_by_dots(v @ c, c, v.T @ g, float(g.norm())), expected)


def test_the_length_of_the_gradient_does_not_matter(outliers):
    g = gradient(0.1)
    small, large = (run(outliers(), 0, s * g) for s in (1e-6, 1e6))
    assert small.gradient_in_top(4) == pytest.approx(large.gradient_in_top(4), rel=1e-9)


def test_the_share_of_a_random_direction_is_subtracted_and_reported(outliers):
    """In a sketch of size dim, k directions have a share k / dim of any vector; without a sketch it is k / n."""
    vectors, found = orthonormal(256, 16), []
    for seed in range(200):
        g = normal(256, seed=seed)
        found.append([shares(vectors, g, exact)[-1] for exact in (False, True)])
    debiased, plain = torch.tensor(found).mean(0).tolist()
    assert plain == pytest.approx(16 / 256, rel=0.1)
    assert debiased < 0.25 * plain  # not zero: a share is not negative
    share = run(outliers(), 0, gradient(0.5)).gradient_in_top(4)
    assert share.chance == pytest.approx(4 / N)


def test_what_has_not_converged_has_no_share(outliers):
    """Outliers are all eigenvalues above a fifth of the largest."""
    g = gradient(0.5)
    sp = run(outliers(), 0, g, tol=1e-9, num_matvecs=24)
    assert sp.converged[0] or not sp.converged[:4].any()
    for k in (0, 5, 10_000):
        assert math.isnan(sp.gradient_in_top(k))
        assert math.isnan(sp.alignment(sp.sketch.matvec(g), k))
    assert math.isnan(run(outliers(), 0, g, tol=0.0).gradient_in_outliers)
    assert math.isnan(run(outliers()).gradient_in_top(1))
    assert math.isnan(run(outliers(), 0, 0 * g).gradient_in_top(1))


@pytest.mark.parametrize("exact", [True, False])
def test_overlap_is_the_mean_squared_cosine(exact):
    """One for the same space in another basis, nothing for an orthogonal one, cos² for a rotation."""
    q = orthonormal(512, 8)
    a, b, angle = q[:, :4], q[:, 4:], 0.7
    turned = math.cos(angle) * a + math.sin(angle) * b
    assert overlap(a, a @ normal(4, 4), exact) == pytest.approx(1, rel=1e-9)
    assert overlap(a, b, exact) == pytest.approx(0, abs=1e-9)
    assert overlap(a, turned, exact) == pytest.approx(math.cos(angle) ** 2, abs=1e-9 if exact else 4 / 512)


def test_two_spectra_overlap_as_their_spaces_do(outliers, dense_operator):
    """Two of the top three eigenvectors shared: 2 / 3, within 0.05; the sketch is the same, the starts are, too."""
    values = outliers().values
    other = values.clone()
    other[[2, 100]] = other[[100, 2]]
    a, b = run(outliers()), run(type(outliers())(other))
    for one, two, expected in ((a, a, 1.0), (a, b, 2 / 3), (b, a, 2 / 3)):
        assert one.overlap(two, 3) == pytest.approx(expected, abs=0.05)
    assert a.overlap(b, 2) == pytest.approx(1, abs=1e-3)
    assert a.overlap(b, 3).chance == pytest.approx(3 / N)
    assert math.isnan(a.overlap(b, 100))
    assert math.isnan(a.overlap(run(outliers(), tol=0.0), 3))
    assert math.isnan(run(outliers(), tol=0.0).overlap(a, 3))


@pytest.mark.parametrize("other", [{"seed": 1}, {"dim": 512}])
def test_spaces_in_different_sketches_cannot_be_compared(outliers, other):
    with pytest.raises(ValueError, match=r"cannot compare eigenvectors sketched by BlockSRHT.* with ones by BlockSRHT"):
        run(outliers()).overlap(run(outliers(), **other), 3)


def test_spaces_of_operators_of_different_size_cannot_be_compared(dense_operator):
    """Vectors that are kept without a sketch cannot be distinguished by it."""
    a, b = (run(dense_operator(torch.linspace(0, 1, n).double().diag()), top_k=1) for n in (20, 21))
    with pytest.raises(ValueError, match=r"cannot compare eigenvectors .* the same operator size"):
        a.overlap(b, 1)


def test_a_vector_of_another_size_is_refused(untyped, outliers):
    sp = run(outliers())
    with pytest.raises(
        ValueError, match=r"takes a vector of size 1024, got shape \(3000,\); pass sp\.sketch\.matvec\(g\)"
    ):
        sp.alignment(gradient(0.5), 3)
    bare = Spectrum(torch.ones(1).double(), torch.zeros(1).double(), tol=0.1, linearity_defect=0.0, num_products=1)
    with pytest.raises(ValueError, match="this spectrum kept no vectors"):
        bare.alignment(torch.ones(3), 1)
    with pytest.raises(ValueError, match="keep their vectors"):
        bare.overlap(sp, 1)
