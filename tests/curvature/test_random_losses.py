"""A loss that draws random numbers has a curvature once these are the same in every evaluation."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian

from lightning_sketch.curvature import GGN, EmpiricalFisher, Hessian, spectrum

X = torch.randn(12, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Autoencoder(nn.Module):
    """A variational autoencoder, whose noise the caller may give."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 4), nn.Linear(2, 6)

    def forward(self, x, noise):
        mean, log_variance = self.encoder(x).chunk(2, 1)
        rest = 0.1 * (mean.square() + log_variance.exp() - log_variance).mean()
        return (self.decoder(mean + noise * (log_variance / 2).exp()) - x).square().mean() + rest


def autoencoder():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Autoencoder().double()


DRAWS = {
    "torch": lambda shape: torch.randn(shape, dtype=torch.float64),
    "numpy": lambda shape: torch.from_numpy(np.random.randn(*shape)),
    "python": lambda shape: torch.tensor(
        [[random.gauss(0, 1) for _ in range(shape[1])] for _ in range(shape[0])], dtype=torch.float64
    ),
}


def dense(module, losses):
    """Return the Hessian of a mean of losses of (module as a function)."""
    named = {name: p.detach() for name, p in module.named_parameters()}
    flat = torch.cat([p.flatten() for p in named.values()])

    def loss(flat):
        parts = flat.split([p.numel() for p in named.values()])
        values = {name: part.view(p.shape) for (name, p), part in zip(named.items(), parts, strict=True)}
        found = [one(lambda *args: functional_call(module, values, args)) for one in losses]
        return sum(found) / len(found)

    return hessian(loss)(flat)


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
@pytest.mark.parametrize("hvp", ["double_backward", "forward_over_reverse", "finite_differences"])
def test_the_matrix_is_that_of_the_numbers_drawn(draw, hvp):
    """They are recorded as the loss draws them, batch by batch; a product, the loss and the gradient draw the same."""
    module, seen = autoencoder(), []

    def loss_fn(module, x):
        noise = draw((len(x), 2)).double()
        seen.append(noise)
        return module(x, noise)

    batches = [X[:8], X[8:]]
    h = Hessian(loss_fn, module, batches, hvp=hvp)
    matrix = h.as_matrix()
    used = {}
    for noise in seen:  # 8 examples in the first batch, 4 in the second
        used.setdefault(len(noise), set()).add(noise.numpy().tobytes())
    assert h.noise_samples == 1
    assert len(used[8]) <= 2  # the draw, and the other one by which it is found out that there are draws
    assert len(used[4]) == 1
    seen.clear()
    h.loss()
    first, second = seen
    expected = dense(module, [lambda f: (8 * f(X[:8], first) + 4 * f(X[8:], second)) / 12])
    torch.testing.assert_close(matrix, expected, rtol=0, atol=1e-7 * float(expected.abs().max()))
    before = torch.get_rng_state()
    h.gradient()
    assert torch.equal(torch.get_rng_state(), before)


def test_more_draws_are_averaged():
    module, seen = autoencoder(), []

    def loss_fn(module, x):
        seen.append(torch.randn(len(x), 2, dtype=torch.float64))
        return module(x, seen[-1])

    h = Hessian(loss_fn, module, [X], noise_samples=5)
    matrix = h.as_matrix()
    seen.clear()
    h.loss()
    assert len(seen) == 5
    expected = dense(module, [lambda f, noise=noise: f(X, noise) for noise in seen])
    torch.testing.assert_close(matrix, expected, rtol=0, atol=1e-10)
    sp = spectrum(h, top_k=3, bottom_k=1)
    torch.testing.assert_close(sp.top(3), torch.linalg.eigvalsh(expected).flip(0)[:3])
    assert sp.noise_samples == 5
    assert "5 draws" in repr(sp)


def test_other_seeds_draw_other_numbers_and_a_loss_without_any_is_averaged_over_none():
    def noisy(module, x):
        return module(x, torch.randn(len(x), 2, dtype=torch.float64))

    def plain(module, x):
        calls.append(1)
        return module(x, torch.ones(len(x), 2, dtype=torch.float64))

    calls: list = []
    values = [Hessian(noisy, autoencoder(), [X], noise_seed=seed).loss() for seed in (0, 0, 1)]
    assert values[0] == values[1] != values[2]
    h = Hessian(plain, autoencoder(), [X], noise_samples=50)
    h.loss()
    assert len(calls) == 4  # three to find out
    assert h.noise_samples == 0


def test_live_dropout_is_one_mask():
    """In mode "train" dropout is active: the matrix is that of the network without the units that were dropped."""
    module = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 1)).double().train()
    h = Hessian(lambda m, x: m(x).pow(4).mean(), module, [X, X + 1], mode="train")
    sp = spectrum(h, top_k=3, bottom_k=1)
    assert sp.linearity_defect < 1e-10
    torch.testing.assert_close(sp.top(3), torch.linalg.eigvalsh(h.as_matrix()).flip(0)[:3])
    g = GGN(module, [(X, X[:, :1])], mode="train")
    g.as_matrix()
    assert g.noise_samples == 1
    f = EmpiricalFisher(lambda m, x: m(x).square().squeeze(1), module, [X], mode="train")
    assert f.loss() == f.loss()


def test_a_generator_of_the_module_begins_anew_in_every_evaluation():
    class Masked(nn.Linear):
        def __init__(self):
            super().__init__(6, 2)
            self.generators = {"mask": torch.Generator().manual_seed(1), "noise": [np.random.default_rng(2)]}

        def forward(self, x):
            keep = torch.rand(x.shape, generator=self.generators["mask"]) < 0.7
            return super().forward(x * keep) + float(self.generators["noise"][0].normal())

    module = Masked().double()
    states = module.generators["mask"].get_state(), module.generators["noise"][0].bit_generator.state
    h = Hessian(lambda m, x: m(x).pow(4).mean(), module, [X])
    matrix = h.as_matrix()
    assert torch.equal(matrix, h.as_matrix())
    assert h.noise_samples == 1
    assert torch.equal(module.generators["mask"].get_state(), states[0])
    assert module.generators["noise"][0].bit_generator.state == states[1]


def test_a_count_of_calls_begins_anew_as_well():
    """A temperature that falls with each call of the model: state of the module, not of a generator."""

    class Annealed(nn.Linear):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x) / (1 + self.calls)

    module = Annealed(6, 2).double()
    h = Hessian(lambda m, x: m(x).pow(4).mean(), module, [X[:8], X[8:]])
    expected = dense(module, [lambda f: ((f(X) / 1).pow(4)).mean()])
    module.calls = 0
    matrix = h.as_matrix()
    assert module.calls == 0
    torch.testing.assert_close(matrix, expected, rtol=0, atol=1e-10 * float(expected.abs().max()))


def test_what_still_changes_is_refused_with_what_was_tried():
    outside = np.random.default_rng(0)
    h = Hessian(lambda m, x: m(x).square().mean() * (1 + outside.random()), nn.Linear(6, 2).double(), [X])
    with pytest.raises(ValueError, match=r"at one call and .* at the next.*torch, NumPy, Python.*outside the module"):
        h.matvec(torch.ones(14, dtype=torch.float64))


def test_a_noisy_batch_may_be_cut():
    """Its parts draw numbers of their own, so that the mean over draws is compared, within its error."""

    def loss_fn(module, x):
        return module(x, torch.randn(len(x), 2, dtype=torch.float64))

    module = autoencoder()
    cut = Hessian(loss_fn, module, [X], micro_batch_size=5)
    values = [Hessian(loss_fn, module, [X], noise_seed=seed).loss() for seed in range(40)]
    assert abs(cut.loss() - np.mean(values)) < 5 * np.std(values)

    def total(module, x):
        return len(x) * loss_fn(module, x)

    with pytest.raises(ValueError, match="is not the weighted mean"):
        Hessian(total, module, [X], micro_batch_size=5).loss()
