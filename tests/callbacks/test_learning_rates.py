"""A monitor says how far the learning rate is from being too high, with the optimizer that trains."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from marks import slow
from pytorch_lightning import Callback, LightningModule, Trainer, seed_everything
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_sketch import Hessian, SpectrumMonitor, SubspaceModule
from lightning_sketch.callbacks._optimizers import LastStep
from lightning_sketch.callbacks.spectrum_monitor._measurement import Measurement
from lightning_sketch.curvature import copy_weights, critical_learning_rate

RATES = (0.02, 0.005)


class Small(LightningModule):
    """A network of two layers, of which each has its own learning rate."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def groups(self):
        return [{"params": m.parameters(), "lr": lr} for m, lr in zip((self.first, self.second), RATES, strict=True)]

    def configure_optimizers(self):
        return torch.optim.Adam(self.groups(), betas=(0.8, 0.95))


class Descent(Small):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data(count=32):
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(count, 4, generator=generator), torch.randint(3, (count,), generator=generator))


def monitor(**arguments):
    return SpectrumMonitor(**{"num_matvecs": 40, "dim": 128, "num_batches": 1, "top_k": 2, "bottom_k": 0, **arguments})


def fit(model, *callbacks, loader=None, **arguments):
    run = Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **{"max_epochs": 2, **arguments},
    )
    run.fit(model, DataLoader(data(), batch_size=8) if loader is None else loader)
    return model


def made(kind=Small):
    seed_everything(5, verbose=False)
    return kind()


def dense(model):
    """Return the Hessian on the first batch, in the order of the parameters."""
    batch = tuple(t[:8] for t in data().tensors)
    loss = lambda module, batch: module.training_step(batch, 0)  # noqa: E731
    return Hessian(loss, model, [batch]).as_matrix().double(), Hessian(loss, model, [batch])


class Copies(Callback):
    """Copy the weights before each step."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step != getattr(self, "at", None):
            self.at, self.weights = trainer.global_step, copy_weights(pl_module)


def test_adam_with_two_groups(caplog):
    """Eigenvalues of P^-1/2 H P^-1/2 by the state of Adam, at the larger of both rates."""
    watch, copies = monitor(preconditioner="optimizer"), Copies()
    with caplog.at_level("INFO"):
        model = fit(made(), copies, watch)
    (optimizer,), last = model.trainer.optimizers, watch.history[-1]
    matrix, h = dense(model)
    p = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            t = int(state["step"])
            own = ((state["exp_avg_sq"] / (1 - 0.95**t)).sqrt() + 1e-8) * (1 - 0.8**t)
            p.append(own.flatten() * RATES[0] / group["lr"])
    d = torch.cat(p).double().rsqrt()
    top = float(torch.linalg.eigvalsh(d[:, None] * matrix * d)[-1])
    edge = (2 + 2 * 0.8) / (0.2 * RATES[0])
    assert last.lambda_max == pytest.approx(top, rel=1e-3)
    assert last.stable_below == pytest.approx(edge)
    metrics = model.trainer.callback_metrics
    assert metrics["hessian_preconditioned/stability_ratio"] == pytest.approx(top / edge, rel=1e-3)
    assert metrics["hessian_preconditioned/sharpness_lr"].isnan()
    true = critical_learning_rate(h, copies.weights, RATES[0])
    assert last.critical.factor == pytest.approx(true.factor)
    assert metrics["hessian_preconditioned/critical_learning_rate"] == pytest.approx(true.learning_rate)
    assert metrics["hessian_preconditioned/critical_sharpness"] == pytest.approx(2 / true.learning_rate)
    assert f"of the edge (Adam, lr {RATES[0]}); " in last.verdict
    again = Measurement.of_state(last.state())
    assert (again.critical, again.verdict, again.preconditioned) == (last.critical, last.verdict, True)
    assert f"hessian_preconditioned: {last.verdict}" in caplog.messages


def test_of_adam_without_preconditioner_the_edge_is_missing_and_said():
    watch = monitor()
    metrics = fit(made(), watch).trainer.callback_metrics
    assert metrics["hessian/stability_ratio"].isnan()
    assert metrics["hessian/sharpness_lr"].isnan()
    assert watch.history[-1].critical.factor > 0
    assert (
        "no edge is known (Adam, different learning rates), since Adam divides its steps by a diagonal; "
        "pass preconditioner='optimizer'" in watch.history[-1].verdict
    )


def test_of_plain_descent_the_ratio_is_half_of_sharpness_lr():
    watch = monitor()
    metrics = fit(made(Descent), watch).trainer.callback_metrics
    assert metrics["hessian/sharpness_lr"] == pytest.approx(float(metrics["hessian/lambda_max"]) * 0.1)
    assert metrics["hessian/stability_ratio"] == pytest.approx(float(metrics["hessian/sharpness_lr"]) / 2)
    factor = watch.history[-1].critical.factor or math.nan  # 0 if the step was not downhill
    assert metrics["hessian/critical_learning_rate"] == pytest.approx(0.1 * factor, nan_ok=True)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(data())


class Two(Descent):
    """Two optimizers, one step of each in every batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(m.parameters(), lr=0.1) for m in (self.first, self.second)]


class Quasi(Small):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=2)


TIMES = {
    "steps": {"every_n_train_steps": 3},
    "accumulated steps": {"every_n_train_steps": 2, "accumulate_grad_batches": 2},
    "epochs": {},
    "epochs of accumulated steps": {"accumulate_grad_batches": 3},
    "second epochs": {"every_n_epochs": 2},
    "an end amid an epoch": {"max_steps": 6},
    "a limit": {"limit_train_batches": 3},
    "two optimizers": {"kind": Two, "every_n_train_steps": 4, "loss_fn": lambda m, b: F.cross_entropy(m(b[0]), b[1])},
    "closures": {"kind": Quasi},
}


@pytest.mark.parametrize("case", ["steps", *(slow(case) for case in TIMES if case != "steps")])
def test_the_weights_before_a_measurement_are_those_of_the_last_step(case):
    """Whatever comes between: accumulation, several optimizers in a batch, closures that are called twice."""
    own = dict(TIMES[case])
    kind = own.pop("kind", Small)
    watch = monitor(**{k: own.pop(k) for k in ("every_n_train_steps", "every_n_epochs", "loss_fn") if k in own})
    copies, seen, true_critical = Copies(), [], LastStep.critical

    def critical(self, operator, step):
        seen.append((dict(self.weights), dict(copies.weights)))
        return true_critical(self, operator, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LastStep, "critical", critical)
        fit(made(kind), copies, watch, **own)
    assert seen
    for kept, true in seen:
        assert kept.keys() == true.keys()
        assert all(torch.equal(kept[name], true[name]) for name in true)
    assert not any(m.critical.reason for m in watch.history)


def test_a_stream_of_unknown_length_has_no_critical_learning_rate():
    watch = monitor()
    fit(made(), watch, loader=DataLoader(Stream(), batch_size=8))
    assert len(watch.history) == 2
    for m in watch.history:
        assert math.isnan(m.critical.factor)
        assert "no critical learning rate, since the weights before the last step were not copied" in m.verdict


def test_training_is_the_same_to_the_bit():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = fit(made())
        watched = fit(made(), monitor(preconditioner="optimizer", every_n_train_steps=2))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))


def test_layers_are_preconditioned_too():
    watch = monitor(preconditioner="optimizer", per_layer=True)
    model = fit(made(), watch)
    (optimizer,), (matrix, _) = model.trainer.optimizers, dense(model)
    p = torch.cat([optimizer.state[q]["exp_avg_sq"].flatten() for q in model.first.parameters()]).double()
    t = int(optimizer.state[model.first.weight]["step"])
    d = (((p / (1 - 0.95**t)).sqrt() + 1e-8) * (1 - 0.8**t)).rsqrt()
    top = float(torch.linalg.eigvalsh(d[:, None] * matrix[:25, :25] * d)[-1])
    assert watch.history[-1].layers["first"].lambda_max == pytest.approx(top, rel=1e-2)


def test_in_a_subspace_the_optimizer_is_that_of_w():
    """Ten coordinates, along directions that are ten times as long as usual."""

    class One(Small):
        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=2e-3, betas=(0.8, 0.95))

    seed_everything(5, verbose=False)
    watch = monitor(preconditioner="optimizer", top_k=1)
    sub = fit(SubspaceModule(One(), 10, scale=10), watch)
    (optimizer,), last = sub.trainer.optimizers, watch.history[-1]
    batch = tuple(t[:8] for t in data().tensors)
    matrix = Hessian(lambda module, batch: module.training_step(batch, 0), sub, [batch]).as_matrix().double()
    state = optimizer.state[sub.w]
    t = int(state["step"])
    d = (((state["exp_avg_sq"].double() / (1 - 0.95**t)).sqrt() + 1e-8) * (1 - 0.8**t)).rsqrt()
    assert last.lambda_max == pytest.approx(float(torch.linalg.eigvalsh(d[:, None] * matrix * d)[-1]), rel=1e-3)
    assert last.lr == pytest.approx(0.002)
    assert last.stable_below == pytest.approx(3.6 / (0.2 * 0.002))
    assert last.critical.factor > 0


@pytest.mark.usefixtures("untyped")
def test_what_cannot_be_preconditioned_is_refused_before_training():
    with pytest.raises(MisconfigurationException, match=r"preconditioner='optimizer': LBFGS multiplies the gradient"):
        fit(made(Quasi), monitor(preconditioner="optimizer"))
    wrong = {
        "is not known; use 'optimizer' or None": {"preconditioner": "kfac"},
        r"got stages=\['validate'\]": {"preconditioner": "optimizer", "stages": ["validate"]},
        "got at_start=True": {"preconditioner": "optimizer", "at_start": True},
    }
    for message, arguments in wrong.items():
        with pytest.raises(ValueError, match=message):
            monitor(**arguments)
