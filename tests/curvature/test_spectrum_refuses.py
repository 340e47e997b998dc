"""What no spectrum can be had of is refused, and what may be misread is warned of."""

import pytest
import torch
from torch import nn

from lightning_sketch.curvature import Hessian, spectrum

X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))


class FreshHalf:
    """Batches that can be read again, and differ every time."""

    def __iter__(self):
        yield X[torch.randperm(len(X))[: len(X) // 2]]


CHANGES = r"not linear: A\(u \+ v\) differs .* by .*%.*drawn again.*pass a list of fixed batches"


def network(dropout=0.0):
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Dropout(dropout), nn.Linear(5, 1))


def quartic(module, x):
    return module(x).pow(4).mean()


def run(operator, **kwargs):
    return spectrum(operator, **{"num_matvecs": 64, "top_k": 5, "bottom_k": 1} | kwargs)


def test_batches_that_are_drawn_anew_are_refused():
    with pytest.raises(ValueError, match=CHANGES):
        run(Hessian(quartic, network(), FreshHalf()))


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_dropout_that_is_off_is_not_refused(mode):
    module = network(dropout=0.5)
    module[2].eval()
    assert run(Hessian(quartic, module, [X], mode=mode)).linearity_defect < 1e-5


def test_what_is_only_roughly_linear_is_warned_of(outliers):
    """Noise of 2 % in every product: a defect of about 3 %, between 3e-3 and 0.05. The outliers are still right."""
    with pytest.warns(UserWarning, match=r"linear only to [23]\.\de-02 .* mean nothing"):
        sp = run(outliers(noise=2e-2), num_matvecs=32, tol=0.0)
    assert 3e-3 < sp.linearity_defect < 0.05
    assert (sp.residuals >= sp.linearity_defect * sp.lambda_max * (1 - 1e-9)).all()
    torch.testing.assert_close(sp.top(4), torch.tensor([5.0, 4, 3, 2]).double(), rtol=1e-2, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_refused(bad):
    h = Hessian(lambda module, x: bad * quartic(module, x), network(), [X])
    with pytest.raises(ValueError, match=f"the loss of batch 0 is {bad} at these parameters"):
        run(h)


def test_a_product_that_overflows_on_the_way_is_refused(outliers):
    """Products are finite on the vectors that measure the defect, and not on a later one."""
    operator, products = outliers(), iter(range(100))
    finite = operator.matvec
    operator.matvec = lambda x: finite(x) * (float("nan") if next(products) > 8 else 1)
    with pytest.raises(ValueError, match="a product with the operator is NaN or infinite"):
        run(operator)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 127}, r"need dim >= 128, twice num_matvecs .* got dim=127"),
        ({"num_matvecs": 5}, r"5 products show at most 5 .* top_k=5 and bottom_k=1; raise num_matvecs"),
        ({"top_k": 0, "bottom_k": 0}, "one above 0, got top_k=0, bottom_k=0"),
        ({"top_k": -1}, "got top_k=-1"),
        ({"tol": -1.0}, "need 0 <= tol < 1, got tol=-1.0"),
        ({"tol": float("nan")}, "need 0 <= tol < 1, got tol=nan"),
    ],
)
def test_arguments_out_of_their_range(outliers, arguments, message):
    with pytest.raises(ValueError, match=message):
        run(outliers(), **arguments)


def test_an_unknown_method(outliers, untyped):
    with pytest.raises(ValueError, match="'lanczos' or 'projected', got 'power'"):
        run(outliers(), method="power")


def test_an_operator_that_is_not_square(dense_operator):
    with pytest.raises(ValueError, match=r"needs a square operator, got shape \(3, 4\)"):
        spectrum(dense_operator(torch.ones(3, 4)))
