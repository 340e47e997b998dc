"""How far the largest eigenvalue depends on the batches: against dense eigenvalues without each batch in turn."""

import math
import sys

import pytest
import torch
from curvature_cases import Dense, cross_entropy, dense_hessian, digits
from forks import Started
from marks import pairs, slow
from torch import nn

from lightning_sketch.curvature import (
    GGN,
    EmpiricalFisher,
    Hessian,
    Preconditioned,
    load_spectrum,
    save_spectrum,
    spectrum,
)
from lightning_sketch.curvature.data_error import jackknife


def network():
    """145 parameters, on digits of 4 x 4."""
    torch.manual_seed(1)
    smaller = nn.Sequential(nn.Unflatten(1, (1, 8, 8)), nn.AvgPool2d(2), nn.Flatten())
    return nn.Sequential(smaller, nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, 10)).double()


def measured(matrix, **options):
    """A spectrum whose vectors are sketched, though the matrix is small."""
    return spectrum(
        matrix, **{"num_matvecs": 40, "dim": 100, "top_k": 6, "bottom_k": 1, "over_batches": True} | options
    )


def cut(*sizes, start=512):
    x, y = digits()
    rows = torch.arange(start, start + sum(sizes)).split(list(sizes))
    return [(x[r].double(), y[r]) for r in rows]


def trained(module, steps=100):
    (batch,) = cut(512, start=0)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(module, batch).backward()
        optimizer.step()
    module.zero_grad()
    return module


def dense_truth(module, batches):
    """λ_max of the mean, and without each batch in turn, and of each alone, from dense matrices."""
    matrices = [dense_hessian(module, batch) for batch in batches]
    weights = [float(len(batch[1])) for batch in batches]
    total = sum(w * m for w, m in zip(weights, matrices, strict=True))

    def top(matrix):
        return float(torch.linalg.eigvalsh(matrix)[-1])

    without = [top((total - w * m) / (sum(weights) - w)) for w, m in zip(weights, matrices, strict=True)]
    return top(total / sum(weights)), without, [top(m) for m in matrices], weights


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(("sizes", "steps"), pairs([(24, 24, 24, 24), (40, 10, 25, 30, 16)], [0, 100]))
def test_the_error_is_that_of_dense_leave_one_out_eigenvalues(sizes, steps):
    """Equal and unequal batches, at random weights and trained.

    The bias is of second order in the change that one batch makes, and is approximate outside of the span: measured,
    it is right to 5 %, and the error to 1.3 %.
    """
    module, batches = trained(network(), steps), cut(*sizes)
    value, without, alone, weights = dense_truth(module, batches)
    error, bias = jackknife(value, without, weights)
    sp = measured(Hessian(cross_entropy, module, batches))
    assert sp.data_error == pytest.approx(error, rel=0.04)
    assert sp.data_bias == pytest.approx(bias, rel=0.15)
    torch.testing.assert_close(sp.batch_lambda_max, torch.tensor(alone, dtype=torch.float64), rtol=1e-3, atol=0)


def test_the_jackknife_of_a_weighted_mean_is_its_textbook_error():
    """For the mean of B equal parts it is the standard deviation over √B, without bias; weights are examples."""
    values = torch.tensor([3.0, 5.0, 4.0, 9.0, 1.0], dtype=torch.float64)
    left = [float((values.sum() - v) / 4) for v in values]
    error, bias = jackknife(float(values.mean()), left, [7.0] * 5)
    assert error == pytest.approx(float(values.std()) / 5**0.5)
    assert bias == pytest.approx(0, abs=1e-12)
    weights = torch.tensor([1.0, 2.0, 3.0, 1.0, 5.0], dtype=torch.float64)
    total, mean = weights.sum(), float(weights @ values / weights.sum())
    left = [float((weights @ values - w * v) / (total - w)) for w, v in zip(weights, values, strict=True)]
    error, bias = jackknife(mean, left, weights.tolist())
    h = total / weights
    assert error == pytest.approx(float((((values - mean) ** 2) / (h - 1)).mean().sqrt()))
    assert bias == pytest.approx(0, abs=1e-12)


def test_equal_batches_have_no_error():
    (batch,) = cut(30)
    sp = measured(Hessian(cross_entropy, network(), [batch] * 3))
    assert sp.data_error < 1e-6 * sp.lambda_max
    assert abs(sp.data_bias) < 1e-6 * sp.lambda_max
    torch.testing.assert_close(
        sp.batch_lambda_max, torch.full((3,), sp.lambda_max, dtype=torch.float64), rtol=1e-3, atol=0
    )


class Two(nn.Module):
    """Two parameters whose loss on batch (a, b) is (a p² + b q²) / 2: the Hessian of a batch is diag(a, b)."""

    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self, batch):
        return (batch.mean(0) * self.p**2).sum() / 2


def two_batches(*pairs):
    return Hessian(lambda module, batch: module(batch), Two(), [torch.tensor([p], dtype=torch.float64) for p in pairs])


def test_the_top_eigenvector_may_change_with_the_batches():
    """diag(5, 1) and diag(1, 4): without the first the other coordinate is on top, which one vector cannot know."""
    sp = spectrum(two_batches((5, 1), (1, 4)), num_matvecs=2, top_k=1, bottom_k=1, over_batches=True)
    assert sp.batch_lambda_max.tolist() == pytest.approx([5, 4])
    error, bias = jackknife(3.0, [4.0, 5.0], [1.0, 1.0])
    assert (sp.data_error, sp.data_bias) == (pytest.approx(error), pytest.approx(bias))


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("kind", ["ggn", slow("fisher")])
def test_other_matrices_have_batches_too(kind):
    module, batches = trained(network()), cut(16, 16, 16)
    matrix = GGN if kind == "ggn" else lambda m, b: EmpiricalFisher(cross_entropy, m, b)
    parts = [matrix(module, [batch]).as_matrix() for batch in batches]
    without = [float(torch.linalg.eigvalsh((sum(parts) - part) / 2)[-1]) for part in parts]
    value = float(torch.linalg.eigvalsh(sum(parts) / 3)[-1])
    error, _ = jackknife(value, without, [1.0] * 3)
    sp = measured(matrix(module, batches))
    assert sp.data_error == pytest.approx(error, rel=0.04)


def test_a_scaled_or_preconditioned_matrix_has_the_batches_of_what_it_is_made_of():
    module, batches = trained(network()), cut(30, 30, 30)
    scale = torch.rand(145, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.5
    scaled = [scale[:, None] * dense_hessian(module, batch) * scale for batch in batches]
    without = [float(torch.linalg.eigvalsh((sum(scaled) - part) / 2)[-1]) for part in scaled]
    error, bias = jackknife(float(torch.linalg.eigvalsh(sum(scaled) / 3)[-1]), without, [1.0] * 3)
    sp = measured(Preconditioned(0.5 * Hessian(cross_entropy, module, batches), scale))
    assert sp.data_error == pytest.approx(0.5 * error, rel=0.04)
    assert sp.data_bias == pytest.approx(0.5 * bias, rel=0.15)
    tops = [0.5 * float(torch.linalg.eigvalsh(part)[-1]) for part in scaled]
    assert sp.batch_lambda_max.tolist() == pytest.approx(tops, rel=1e-3)


def test_it_changes_nothing_else_and_counts_its_products():
    """The same eigenvalues to the bit; products of a batch count by its share of the examples."""
    module, batches = network(), cut(24, 48)
    plain = measured(Hessian(cross_entropy, module, batches), over_batches=False)
    counted = Counted(cross_entropy, module, batches)
    sp = measured(counted)
    assert torch.equal(sp.eigenvalues, plain.eigenvalues)
    assert math.isnan(plain.data_error)
    assert plain.batch_lambda_max is None
    assert sp.num_products == math.ceil(Counted.examples / 72)
    assert "over batches: largest ± " in repr(sp)
    assert "over batches" not in repr(plain)


class Counted(Hessian):
    """Count the examples of all products."""

    examples = 0

    def _product(self, batch):
        def product(pieces):
            Counted.examples += len(batch[1])
            return made(pieces)

        made = super()._product(batch)
        return product


@pytest.mark.usefixtures("untyped")
def test_a_random_loss_has_errors_for_its_draws():
    """The number of draws is kept and printed; it is that of the matrix inside a scaled one; batches keep theirs."""
    module, batches = network(), cut(20, 20)
    noisy = Hessian(lambda m, b: cross_entropy(m, (b[0] + 0.1 * torch.randn_like(b[0]), b[1])), module, batches)
    sp = measured(noisy)
    assert sp.noise_samples == measured(2 * noisy, over_batches=False).noise_samples == 1
    assert "for 1 draw of the loss's random numbers" in repr(sp)
    assert "draw" not in repr(measured(Hessian(cross_entropy, module, batches), over_batches=False))
    total = sum(matrix.as_matrix() for _, matrix in noisy.per_batch()) / 2
    torch.testing.assert_close(total, noisy.as_matrix())


def test_what_has_not_converged_is_nan():
    sp = spectrum(Hessian(cross_entropy, network(), cut(30, 30)), num_matvecs=2, top_k=1, bottom_k=0, over_batches=True)
    assert not sp.converged[0]
    assert math.isnan(sp.data_error)
    assert len(sp.batch_lambda_max) == 2


def test_what_it_refuses():
    module, batches = network(), cut(8, 8)
    h = Hessian(cross_entropy, module, batches)
    with pytest.raises(ValueError, match="depends on the batches, but a Dense has none"):
        spectrum(Dense(torch.eye(20)), num_matvecs=10, top_k=1, over_batches=True)
    with pytest.raises(ValueError, match="but a Sum has none"):
        spectrum(h + h, over_batches=True)
    with pytest.raises(ValueError, match="one batch after the other, got 1"):
        spectrum(Hessian(cross_entropy, module, batches[:1]), over_batches=True)
    with pytest.raises(ValueError, match="use 'lanczos'"):
        spectrum(h, over_batches=True, method="projected")


def test_it_survives_a_file(tmp_path):
    sp = measured(Hessian(cross_entropy, network(), cut(16, 16)))
    save_spectrum(sp, tmp_path / "spectrum.safetensors")
    read = load_spectrum(tmp_path / "spectrum.safetensors")
    assert (read.data_error, read.data_bias, read.noise_samples) == (sp.data_error, sp.data_bias, 0)
    assert torch.equal(read.batch_lambda_max, sp.batch_lambda_max)
    assert (read.trace_of_square, read.trace_of_square_sem) == (sp.trace_of_square, sp.trace_of_square_sem)


@pytest.mark.slow
@pytest.mark.parametrize("fails", [False, True])
def test_two_processes_find_what_one_does_with_all_batches(tmp_path, fails):
    """Rank 0 has one batch and rank 1 three; one that fails on one batch alone stops both."""
    module, batches = network(), cut(20, 12, 30, 16)
    ranks = [Started(__file__, rank, tmp_path, "fails" if fails else "works") for rank in (0, 1)]
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    if fails:
        assert "another rank could not take its part" in errors[0]
        assert "ValueError: this batch alone" in errors[1]
        return
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    one = measured(Hessian(cross_entropy, module, batches))
    for rank in (0, 1):
        error, bias, tops = torch.load(tmp_path / f"{rank}.pt")
        assert error == pytest.approx(one.data_error, rel=1e-6)
        assert bias == pytest.approx(one.data_bias, rel=1e-6)
        assert tops == pytest.approx(one.batch_lambda_max.tolist())


class Failing(Hessian):
    """Refuse a batch where it stands alone."""

    def matvec(self, x):
        if not self.batches.distributed:
            raise ValueError("this batch alone")
        return super().matvec(x)


def main(rank, folder, how):
    """One of two processes, with its own batches."""
    store = torch.distributed.FileStore(f"{folder}/meet", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    kind = Failing if how == "fails" and rank == 1 else Hessian
    own = cut(20, 12, 30, 16)[:1] if rank == 0 else cut(20, 12, 30, 16)[1:]
    sp = measured(kind(cross_entropy, network(), own, distributed=True))
    torch.save((sp.data_error, sp.data_bias, sp.batch_lambda_max.tolist()), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), *sys.argv[2:])
