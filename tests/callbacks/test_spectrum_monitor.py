"""SpectrumMonitor measures the right numbers, at the right steps, and logs them to every logger."""

import csv
import math

import pytest
import torch
import torch.nn.functional as F
from marks import slow
from models import Digits, dataset, fit, loader
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import ModelCheckpoint, RichProgressBar, TQDMProgressBar
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

from lightning_sketch import SpectrumMonitor
from lightning_sketch.callbacks.spectrum_monitor import Measurement
from lightning_sketch.callbacks.spectrum_monitor._scalars import Keys

SCALARS = {
    "hessian/lambda_max",
    "hessian/lambda_min",
    "hessian/rneg",
    "hessian/num_outliers",
    "hessian/rneg_error",
    "hessian/loss",
    "hessian/seconds",
}


def monitor(**arguments):
    return SpectrumMonitor(**{"num_matvecs": 32, "dim": 64, "num_batches": 2, "top_k": 3, "bottom_k": 1, **arguments})


def dense_hessian(model, images, labels):
    """Return the Hessian by autodiff, row by row, independently of the package."""
    model.eval()
    parameters = list(model.parameters())
    loss = F.cross_entropy(model.net(images), labels)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, create_graph=True)])
    rows = [torch.autograd.grad(g, parameters, retain_graph=True) for g in gradient]
    return torch.stack([torch.cat([r.flatten() for r in row]) for row in rows])


def test_the_eigenvalues_are_those_of_the_dense_hessian_on_the_first_batches(tmp_path):
    watch = monitor(num_matvecs=96, dim=512, tol=1e-3)
    model = fit(tmp_path, watch, data=loader(shuffle=False))
    images, labels = dataset()[:64]  # two batches of 32
    truth = torch.linalg.eigvalsh(dense_hessian(model, images, labels).double())
    last = watch.history[-1]
    torch.testing.assert_close(last.top(3), truth.flip(0)[:3], rtol=1e-3, atol=0)
    torch.testing.assert_close(last.bottom(1), truth[:1], rtol=1e-3, atol=0)
    assert last.loss == pytest.approx(F.cross_entropy(model.eval().net(images), labels).item(), rel=1e-5)


@pytest.mark.slow
def test_the_start_is_measured_at_the_initial_weights(tmp_path):
    """The measurement takes place two batches later, when all probe batches are there."""
    initial = {}

    class Remember(Digits):
        def on_train_start(self):
            initial.update({k: v.clone() for k, v in self.state_dict().items()})

    watch = monitor(num_matvecs=96, dim=512, tol=1e-3, at_start=True)
    model = fit(tmp_path, watch, model=Remember(), data=loader(shuffle=False), max_epochs=1)
    model.load_state_dict(initial)
    truth = torch.linalg.eigvalsh(dense_hessian(model, *dataset()[:64]).double())
    assert [m.step for m in watch.history] == [0, 8]
    torch.testing.assert_close(watch.history[0].top(3), truth.flip(0)[:3], rtol=1e-3, atol=0)


def test_a_loss_fn_and_a_pattern_of_parameters(tmp_path):
    """Half the squared logits are quadratic in the last layer; the Hessian is the Gram matrix of its inputs."""

    def loss_fn(module, batch):
        return module.net(batch[0]).square().sum(1).mean() / 2

    watch = monitor(loss_fn=loss_fn, parameters="net.5.weight", num_batches=1, num_matvecs=64, dim=512, bottom_k=0)
    model = fit(tmp_path, watch, data=loader(shuffle=False))
    features = model.eval().net[:5](dataset()[:32][0]).detach().double()
    truth = torch.linalg.eigvalsh(features.T @ features / 32).flip(0)
    assert watch.history[-1].lambda_max == pytest.approx(truth[0].item(), rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "trainer_arguments", "steps"),
    [
        ({}, {"max_epochs": 3}, [8, 16, 24]),
        ({"every_n_train_steps": 3}, {"max_epochs": 2}, [3, 6, 9, 12, 15]),
        slow({"every_n_epochs": 2}, {"max_epochs": 5}, [16, 32]),
        slow({"every_n_train_steps": 2}, {"max_epochs": 2, "accumulate_grad_batches": 2}, [2, 4, 6, 8]),
        slow({"every_n_train_steps": 2, "num_batches": 1}, {"max_epochs": 1, "accumulate_grad_batches": 2}, [2, 4]),
        slow({"every_n_train_steps": 1, "num_batches": 4}, {"max_steps": 6, "max_epochs": -1}, [4, 5, 6]),
        slow({"every_n_train_steps": 4, "num_batches": 50}, {"max_epochs": 2}, [8, 12, 16]),
    ],
)
def test_it_measures_when_it_should(tmp_path, arguments, trainer_arguments, steps):
    """Intervals count optimizer steps, also under accumulation; the first waits for all probe batches."""
    logger = CSVLogger(tmp_path)
    watch = monitor(**{"num_matvecs": 4, "top_k": 1, "bottom_k": 0, **arguments})
    fit(tmp_path, watch, logger=logger, log_every_n_steps=1000, **trainer_arguments)
    assert [m.step for m in watch.history] == steps
    with open(f"{logger.log_dir}/metrics.csv") as file:
        assert sum(bool(row["hessian/seconds"]) for row in csv.DictReader(file)) == len(steps)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [16, 128])
def test_a_second_fit_has_its_own_history_and_its_own_batches(tmp_path, batch_size):
    watch = monitor()
    fit(tmp_path, watch, data=loader(shuffle=False, batch_size=batch_size), max_epochs=3)
    with pytest.warns(UserWarning, match="a new training begins, so its history replaces the 3 measurements"):
        model = fit(tmp_path, watch, data=loader(shuffle=False, batch_size=64), max_epochs=2)
    assert [m.step for m in watch.history] == [4, 8]
    images, labels = dataset()[:128]  # two batches of 64
    loss = F.cross_entropy(model.eval().net(images), labels).item()
    assert watch.history[-1].loss == pytest.approx(loss, rel=1e-5)


def test_without_a_logger_the_values_are_in_callback_metrics(tmp_path):
    watch = monitor()
    metrics = fit(tmp_path, watch).trainer.callback_metrics
    assert SCALARS <= metrics.keys()
    assert metrics["hessian/lambda_max"] == pytest.approx(watch.history[-1].lambda_max)
    assert metrics["hessian_eigenvalues/top_02"] == pytest.approx(watch.history[-1].eigenvalues[1].item())


def test_a_checkpoint_can_be_chosen_by_sharpness(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, monitor="hessian/lambda_max", filename="sharp", mode="max")
    watch = monitor()
    fit(tmp_path, watch, checkpoint, enable_checkpointing=True)
    assert checkpoint.best_model_score == pytest.approx(max(m.lambda_max for m in watch.history))


def test_csv(tmp_path):
    logger = CSVLogger(tmp_path)
    watch = monitor()
    fit(tmp_path, watch, logger=logger)
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["hessian/lambda_max"]]
    assert [int(row["step"]) for row in rows] == [8, 16]
    assert [int(row["epoch"]) for row in rows] == [0, 1]
    assert [float(row["hessian/lambda_max"]) for row in rows] == pytest.approx([m.lambda_max for m in watch.history])
    assert SCALARS <= rows[0].keys()


def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    watch = monitor()
    fit(tmp_path, watch, logger=logger)
    logger.finalize("success")
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    got = [event.value for event in events.Scalars("hessian/lambda_max")]
    assert got == pytest.approx([m.lambda_max for m in watch.history])


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_the_progress_bar_shows_the_progress_and_the_cost_of_a_measurement(tmp_path, capsys, bar, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # without a terminal rich draws no bar
    run = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[bar(), monitor()],
        default_root_dir=tmp_path,
    )
    run.fit(Digits(), loader())
    shown = capsys.readouterr()
    text = shown.out + shown.err
    assert "hessian 7/32:" in text
    assert "products" in text
    assert "every_n_epochs=" in text
    assert "Epoch 0" in text[text.rindex("hessian ") :]  # the bar's own text is back


def test_what_has_not_converged_is_nan_in_scalars_and_marked_in_the_history(tmp_path):
    watch = monitor(num_matvecs=4, top_k=2, bottom_k=1, tol=1e-9)
    metrics = fit(tmp_path, watch, max_epochs=1).trainer.callback_metrics
    (measured,) = watch.history
    assert not measured.converged.any()
    assert math.isfinite(measured.lambda_max)
    for key in ("lambda_max", "lambda_min"):
        assert math.isnan(metrics[f"hessian/{key}"])
    assert (metrics["hessian/num_outliers"], metrics["hessian/num_outliers_exact"]) == (0, 0)  # at least 0
    assert math.isfinite(metrics["hessian/rneg_error"])


def test_rneg_is_judged_by_its_own_error():
    """The ratio is accurate to 0.5 %, although the smallest eigenvalue is accurate only to half its size."""
    values = torch.tensor([10.0, 5.0, -0.1], dtype=torch.float64)
    residuals = torch.tensor([1e-6, 1e-6, 0.05], dtype=torch.float64)
    rest = {
        "tol": 1e-2,
        "linearity_defect": 1e-7,
        "num_products": 9,
        "epoch": 0,
        "step": 1,
        "loss": 1.0,
        "seconds": 1.0,
    }
    scalars = Keys("hessian", 2, 1).values(Measurement(values, residuals, **rest))
    assert math.isnan(scalars["hessian/lambda_min"])
    assert scalars["hessian/rneg"] == pytest.approx(0.01)
    assert scalars["hessian/rneg_error"] == pytest.approx(0.005, rel=1e-3)
    residuals[-1] = 0.5
    assert math.isnan(Keys("hessian", 2, 1).values(Measurement(values, residuals, **rest))["hessian/rneg"])


def test_after_a_failure_no_value_of_an_earlier_measurement_remains(tmp_path):
    class Diverging(Digits):
        def on_train_epoch_end(self):
            with torch.no_grad():
                self.net[5].bias.fill_(float("nan"))

    with pytest.warns(UserWarning, match="no measurement at step 16"):
        metrics = fit(tmp_path, monitor(), model=Diverging()).trainer.callback_metrics
    ours = {key: value for key, value in metrics.items() if key.startswith("hessian")}
    assert ours.keys() >= {"hessian/loss", "hessian_eigenvalues/top_03", "hessian_eigenvalues/bottom_01"}
    assert all(math.isnan(value) for value in ours.values())


@pytest.mark.slow
def test_two_monitors_with_two_names(tmp_path):
    head, all_of_it = monitor(name="head", parameters="net.5.*"), monitor()
    metrics = fit(tmp_path, head, all_of_it).trainer.callback_metrics
    assert 0 < metrics["head/lambda_max"] <= metrics["hessian/lambda_max"] * (1 + 1e-5)  # a principal submatrix


@pytest.mark.slow
def test_plot_draws_every_measurement(tmp_path):
    watch = monitor()
    with pytest.raises(ValueError, match="nothing to plot"):
        watch.plot()
    fit(tmp_path, watch, max_epochs=3)
    figure = watch.plot()
    upper, _ = figure.axes
    assert upper.lines[0].get_xdata() == pytest.approx([8, 16, 24])
    assert upper.lines[0].get_ydata() == pytest.approx([m.lambda_max for m in watch.history])
    figure.savefig(tmp_path / "spectrum.png")
    assert (tmp_path / "spectrum.png").stat().st_size > 10_000


def test_fast_dev_run(tmp_path):
    watch = monitor()
    fit(tmp_path, watch, fast_dev_run=True)
    assert len(watch.history) == 1
    assert not list(tmp_path.iterdir())
