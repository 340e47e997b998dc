"""P is what a step of PyTorch's own optimizers divides the gradient by."""

import pytest
import torch
from torch import nn

from lightning_sketch.autodiff.optimizer_state import check_adaptive, divisors

# Without momentum a step is lr g / P, so that P can be read from how far the parameters went.
ADAPTIVE = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.0, 0.9)),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=0.1, betas=(0.0, 0.5), amsgrad=True, weight_decay=0),
    "l2": lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.0, 0.9), weight_decay=0.3),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.1, betas=(0.0, 0.9)),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, alpha=0.7),
    "centered": lambda p: torch.optim.RMSprop(p, lr=0.1, alpha=0.7, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, lr_decay=0.2, initial_accumulator_value=0.1),
}


@pytest.mark.parametrize("name", ADAPTIVE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_divides_by_p(name, dtype):
    """After the step from the state alone, before it from the state and the gradient."""
    torch.manual_seed(1)
    x = nn.Parameter(torch.randn(5, dtype=dtype))
    optimizer = ADAPTIVE[name]([x])
    assert not divisors(optimizer)  # Adagrad has a state before its first step, which has divided nothing
    for _ in range(4):
        x.grad = torch.randn(5, dtype=dtype)
        effective = x.grad + (0.3 * x.detach() if name == "l2" else 0)
        predicted = divisors(optimizer, {id(x): x.grad})[id(x)]
        before = x.detach().clone()
        optimizer.step()
        true = 0.1 * effective / (before - x.detach())
        close = {"rtol": 2e-4, "atol": 0} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 0}
        found = divisors(optimizer)[id(x)]
        assert found.dtype == dtype
        torch.testing.assert_close(found, true, **close)
        torch.testing.assert_close(predicted, true, **close)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("SGD", "divides its steps by nothing"),
        ("Lion", "by the sign of its momentum"),
        ("Muon", "makes the momentum of each matrix orthogonal"),
        ("DistributedShampoo", "from both sides"),
        ("LBFGS", "an inverse Hessian that is not diagonal"),
        ("Adam8bit", "in 8 bits"),
        ("Prodigy", "has no mean square of gradients that is known here"),
    ],
)
def test_an_optimizer_without_a_diagonal_is_refused_with_the_reason(kind, why):
    made = type(kind, (torch.optim.Optimizer,), {})([nn.Parameter(torch.ones(2, 2))], {})
    with pytest.raises(ValueError, match=f"^{kind} .*{why}.*known are PyTorch's own Adam, AdamW, NAdam"):
        check_adaptive(made)
