"""One short run of Lanczos bounds the extreme eigenvalues from within, and has them after enough steps."""

import pytest
import torch

from lightning_sketch.linalg import extreme_ritz_values

VALUES = torch.cat([torch.linspace(1, 2, 40, dtype=torch.float64), torch.tensor([7.0, 0.1], dtype=torch.float64)])


@pytest.mark.parametrize("seed", range(4))
def test_they_lie_within_the_spectrum_and_reach_its_ends(dense_operator, seed):
    q, _ = torch.linalg.qr(torch.randn(42, 42, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))
    operator = dense_operator(q @ VALUES.diag() @ q.T)
    before = (1.0, 2.0)
    for steps in (4, 8, 42):
        low, high = extreme_ritz_values(operator, steps, seed=seed, dtype=torch.float64)
        assert 0.1 - 1e-12 <= low <= high <= 7.0 + 1e-12
        before = (low, high)
    assert before == pytest.approx((0.1, 7.0), rel=1e-9)


def test_more_steps_than_rows_are_not_made(dense_operator):
    class Counted(dense_operator):
        calls = 0

        def matvec(self, x):
            type(self).calls += 1
            return super().matvec(x)

    operator = Counted(torch.eye(3, dtype=torch.float64))
    assert extreme_ritz_values(operator, 30, dtype=torch.float64) == pytest.approx((1.0, 1.0))
    assert Counted.calls == 3
