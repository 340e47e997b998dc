"""Unsupported setups are refused at construction, at setup or on the first batch, and the message says what to do."""

import math

import pytest
import torch
import torch.nn.functional as F
from models import Digits, fit, loader, trainer
from pytorch_lightning.callbacks import EarlyStopping
from pytorch_lightning.strategies import ModelParallelStrategy, SingleDeviceStrategy
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from lightning_sketch import Hessian, SpectrumMonitor, spectrum
from lightning_sketch.autodiff.losses import training_step_loss


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"curvature": "kfac"}, "curvature='kfac' is not known; use 'hessian', 'ggn', 'fisher'"),
        ({"method": "power"}, "method is 'lanczos' or 'projected', got 'power'"),
        ({"density_probes": -1}, "need density_probes >= 0 .* got -1 and 32"),
        ({"density_probes": 30}, "need dim >= 2112, .* got dim=1024"),
        ({"model_fn": len}, "Gauss-Newton matrix, got curvature='hessian'"),
        ({"data": "val"}, r"data='val'.* use 'train', or stages=\['validate'\] and trainer.validate"),
        ({"stages": "fit"}, "stages='fit'.* use a list of one or more of \\['fit', 'validate', 'test'\\]"),
        ({"stages": ["train"]}, "stages=\\['train'\\].* use a list"),
        ({"stages": []}, "stages=\\[\\].* use a list"),
        ({"on_error": "ignore"}, "on_error='ignore'.* use 'warn' or 'raise'"),
        ({"every_n_epochs": 1, "every_n_train_steps": 10}, "set every_n_epochs or every_n_train_steps, got both"),
        ({"every_n_epochs": 0}, "need every_n_epochs >= 1, got 0"),
        ({"every_n_train_steps": -1}, "need every_n_train_steps >= 1, got -1"),
        ({"num_batches": 0}, "need num_batches >= 1"),
        ({"top_k": 0}, "need top_k >= 1"),
        ({"num_matvecs": 5}, "num_matvecs=5 products .* top_k=10"),
        ({"bottom_k": -1}, "bottom_k=-1"),
        ({"dim": 100}, "need dim >= 192, twice num_matvecs .* got dim=100"),
        ({"tol": 1.0}, "need 0 <= tol < 1, got tol=1.0"),
    ],
)
def test_at_construction(arguments, message, untyped):
    with pytest.raises(ValueError, match=message):
        SpectrumMonitor(**arguments)


def test_manual_optimization_without_a_loss(tmp_path):
    class Manual(Digits):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self.net(batch[0]), batch[1]))
            optimizer.step()

    with pytest.raises(MisconfigurationException, match=r"manual optimization.*loss_fn"):
        fit(tmp_path, SpectrumMonitor(), model=Manual())
    watch = SpectrumMonitor(loss_fn=lambda m, batch: F.cross_entropy(m.net(batch[0]), batch[1]), num_batches=1)
    fit(tmp_path, watch, model=Manual(), max_epochs=1)
    assert watch.history[0].lambda_max > 0


def with_loss(loss):
    class Other(Digits):
        def training_step(self, batch, batch_idx):
            return loss(self, *batch)

    return Other()


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad.clone()


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (
            lambda m, x, y: F.cross_entropy(m.net(x), y, reduction="none"),
            ValueError,
            r"scalar tensor; got a tensor of shape",
        ),
        (lambda m, x, y: None, ValueError, "returned no loss"),
        (lambda m, x, y: torch.zeros(()), ValueError, "does not depend on the parameters"),
        (
            lambda m, x, y: F.cross_entropy(Rounded.apply(m.net(x)), y),
            ValueError,
            r"differentiate twice: Rounded is marked once_differentiable",
        ),
    ],
)
def test_on_the_first_batch(tmp_path, loss, error, message):
    model = with_loss(loss)
    with pytest.raises(error, match=message):
        fit(tmp_path, SpectrumMonitor(), model=model)
    assert model.trainer.global_step == 0


def test_no_trainable_parameter(tmp_path):
    model = Digits().requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        fit(tmp_path, SpectrumMonitor(), model=model)
    with pytest.raises(
        ValueError, match=r"no trainable parameter matches 'head\.\*'; the names start with net.0.weight"
    ):
        fit(tmp_path, SpectrumMonitor(parameters="head.*"))


def test_a_module_without_values(tmp_path):
    with torch.device("meta"):
        model = Digits()
    with pytest.raises(NotImplementedError) as caught:  # Lightning's own teardown fails after our error
        fit(tmp_path, SpectrumMonitor(), model=model)
    assert "on the meta device; create them in configure_model" in str(caught.value.__context__)


def test_early_stopping_on_a_value_that_may_be_nan(tmp_path):
    stopping = EarlyStopping(monitor="hessian/lambda_max", mode="min", check_finite=True)
    with pytest.raises(MisconfigurationException, match=r"not converged.*set check_finite=False"):
        fit(tmp_path, SpectrumMonitor(), stopping)
    stopping = EarlyStopping(monitor="hessian/lambda_max", mode="max", check_finite=False, patience=5)
    fit(tmp_path, SpectrumMonitor(num_batches=1), stopping)


def test_a_strategy_that_hides_its_shards(tmp_path):
    """FSDP1 needs a GPU to be set up, and DeepSpeed to be installed; their names are what is looked at."""

    class FSDPStrategy(SingleDeviceStrategy):
        pass

    run = trainer(tmp_path, strategy=FSDPStrategy())
    with pytest.raises(MisconfigurationException, match=r"under FSDPStrategy.*ModelParallelStrategy.*ddp.*validate"):
        SpectrumMonitor().setup(run, Digits(), "fit")


@pytest.mark.parametrize(
    "argument",
    [
        {"curvature": "ggn"},
        {"method": "projected"},
        {"hvp": "double_backward"},
        {"over_batches": True, "num_batches": 4},
        {"micro_batch_size": 2},
    ],
    ids=lambda argument: next(iter(argument)),
)
def test_what_a_hessian_of_shards_cannot_do(tmp_path, argument):
    """Refused by name before training; with the defaults it is measured."""
    run = trainer(tmp_path, strategy=ModelParallelStrategy(), devices=1)
    name = next(iter(argument))
    with pytest.raises(MisconfigurationException, match=rf"SpectrumMonitor\({name}=.* under ModelParallelStrategy"):
        SpectrumMonitor(**argument).setup(run, Digits(), "fit")
    SpectrumMonitor().setup(run, Digits(), "fit")


@pytest.mark.parametrize("on_error", ["warn", "raise"])
def test_a_loss_that_turns_nan_later(tmp_path, on_error):
    """By default NaN is logged and training continues; on_error="raise" stops it."""

    class Diverging(Digits):
        def on_train_epoch_end(self):
            with torch.no_grad():
                self.net[5].bias.fill_(float("nan"))

    watch = SpectrumMonitor(num_batches=1, on_error=on_error)
    if on_error == "raise":
        with pytest.raises(ValueError, match="the loss of batch 0 is nan"):
            fit(tmp_path, watch, model=Diverging(), max_epochs=2)
    else:
        with pytest.warns(UserWarning, match="hessian: no measurement at step 16"):
            metrics = fit(tmp_path, watch, model=Diverging(), max_epochs=2).trainer.callback_metrics
        assert math.isnan(metrics["hessian/lambda_max"])
    assert [m.step for m in watch.history] == [8]


def test_half_precision_is_measured_in_float32(tmp_path):
    watch = SpectrumMonitor(num_batches=1)
    model = fit(tmp_path, watch, precision="bf16-true", data=loader(), max_epochs=1)
    assert watch.history[0].linearity_defect < 5e-6
    assert model.net[0].weight.dtype == torch.bfloat16


def test_autocast_is_off_inside(tmp_path):
    watch = SpectrumMonitor(num_batches=1)
    fit(tmp_path, watch, precision="bf16-mixed", max_epochs=1)
    assert watch.history[0].linearity_defect < 5e-6


class Lists(Digits):
    """A network that trains on lists of images of different sizes."""

    def __init__(self):
        super().__init__(dropout=0.0)
        self.net = torch.nn.Conv2d(1, 2, 3)

    def training_step(self, batch, batch_idx):
        return torch.stack([self.net(x).square().mean() for x in batch]).mean()


def test_batches_of_unknown_weight_are_refused_before_the_first_measurement(tmp_path):
    """The error comes after the second batch, not at the first measurement; `num_examples` avoids it."""
    images = [torch.randn(1, 6 + i % 3, 8) for i in range(12)]
    data = DataLoader(images, batch_sampler=[[0], [1, 2, 3], *[[4, 5]] * 4], collate_fn=list)
    with pytest.raises(ValueError, match="pass num_examples="):
        fit(tmp_path, SpectrumMonitor(num_batches=2), model=Lists, data=data, max_epochs=1)
    monitor = SpectrumMonitor(num_batches=2, num_examples=len, top_k=2)
    fit(tmp_path, monitor, model=Lists, data=data, max_epochs=1)
    assert len(monitor.history) == 1


@pytest.mark.slow
def test_the_monitor_weighs_and_splits_batches_as_the_operators_do(tmp_path):
    """Lists of two images need `num_examples`; a mapping has tensors of the examples and one that all share."""

    class Images(Lists):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Conv2d(2, 2, 3)

    class Encoded(Digits):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(64, 10)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch["x"] + batch["position"]), batch["y"])

    images = [torch.randn(2, 6, 8) for _ in range(8)]
    encoded = [{"x": torch.rand(n, 64), "position": torch.rand(1, 64), "y": torch.arange(n)} for n in (4, 7)]
    for model, data, arguments in (
        (Images, DataLoader(images, batch_size=2, collate_fn=list), {"num_examples": len, "micro_batch_size": 1}),
        (Encoded, DataLoader(encoded, batch_size=None), {"micro_batch_size": 3}),
    ):
        watch = SpectrumMonitor(num_batches=2, top_k=2, **arguments)
        fitted = fit(tmp_path, watch, model=model, data=data, max_epochs=1)
        whole = Hessian(training_step_loss, fitted, list(data)[:2], num_examples=arguments.get("num_examples"))
        expected = spectrum(whole, top_k=2).eigenvalues
        torch.testing.assert_close(watch.history[0].eigenvalues[:2], expected[:2], rtol=1e-3, atol=1e-5)
