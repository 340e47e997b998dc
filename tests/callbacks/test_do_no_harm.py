"""With the monitor training is the same, bit for bit: weights, buffers, optimizer, logs, lists, random numbers."""

import copy
import csv

import numpy as np
import pytest
import torch
from marks import slow
from models import Digits, DigitsData, fit, loader
from pytorch_lightning.loggers import CSVLogger, WandbLogger

from lightning_sketch import SpectrumMonitor


def outcome(model):
    """Return everything that a fit changes."""
    optimizer = model.trainer.optimizers[0].state_dict()
    return {
        "weights": model.state_dict(),
        "optimizer": optimizer["state"],
        "losses": model.losses,
        "calls": model.calls,
        "modes": {name: part.training for name, part in model.named_modules()},
        "metrics": {k: v for k, v in model.trainer.callback_metrics.items() if not k.startswith("hessian")},
        # not Python's own generator, which the type checks of the test run use
        "random": (torch.get_rng_state(), np.random.get_state()[1].tolist()),
        "gradients": [p.grad for p in model.parameters()],
    }


def assert_same(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def monitor(**arguments):
    return SpectrumMonitor(num_matvecs=14, dim=64, num_batches=2, **arguments)


CADENCES = [{"at_start": True}, slow({"every_n_train_steps": 3})]


@pytest.mark.parametrize("cadence", CADENCES, ids=str)
@pytest.mark.parametrize("workers", [0, slow(2)])
def test_a_shuffled_loader_with_dropout_and_batchnorm(tmp_path, workers, cadence):
    watch = monitor(**cadence)
    watched = fit(tmp_path, watch, data=loader(workers))
    assert len(watch.history) >= 3
    assert_same(outcome(watched), outcome(fit(tmp_path, data=loader(workers))))


@pytest.mark.parametrize("cadence", CADENCES, ids=str)
def test_gradient_accumulation_and_clipping(tmp_path, cadence):
    arguments = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}
    watched = fit(tmp_path, monitor(**cadence), **arguments)
    assert_same(outcome(watched), outcome(fit(tmp_path, **arguments)))


def test_a_datamodule(tmp_path):
    watched = fit(tmp_path, monitor(), data=DigitsData())
    assert_same(outcome(watched), outcome(fit(tmp_path, data=DigitsData())))


@pytest.mark.slow
def test_an_offline_wandb_run_in_both_arms(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")

    def run(name, *callbacks):
        logger = WandbLogger(name=name, save_dir=tmp_path, offline=True)
        model = fit(tmp_path, *callbacks, logger=logger, log_every_n_steps=1)
        logger.experiment.finish()
        return outcome(model)

    assert_same(run("watched", monitor()), run("alone"))


@pytest.mark.slow
def test_what_the_user_logs_is_logged_as_before(tmp_path):
    """A further call of training_step would overwrite `train_loss` if its logging were not disabled."""

    def rows(name, *callbacks):
        logger = CSVLogger(tmp_path, name=name)
        fit(tmp_path, *callbacks, logger=logger, log_every_n_steps=1)
        with open(f"{logger.log_dir}/metrics.csv") as file:
            rows = [{k: v for k, v in row.items() if v and not k.startswith("hessian")} for row in csv.DictReader(file)]
        return [row for row in rows if row.keys() - {"epoch", "step"}]

    watched = rows("watched", monitor(every_n_train_steps=3))
    assert watched == rows("alone")
    assert any("train_loss_epoch" in row for row in watched)
    assert any("train_acc" in row for row in watched)


def test_a_frozen_batchnorm_stays_frozen(tmp_path):
    """The mode of each submodule is restored: `module.train()` would undo the user's `eval()`."""

    class Frozen(Digits):
        def on_train_batch_start(self, batch, batch_idx):
            self.net[1].eval()

    assert_same(outcome(fit(tmp_path, monitor(), model=Frozen)), outcome(fit(tmp_path, model=Frozen)))


def test_a_step_that_draws_random_numbers(tmp_path):
    """The generators of torch and numpy continue as without the monitor."""

    class Drawing(Digits):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + 0 * (torch.rand(()) + np.random.rand())

    assert_same(outcome(fit(tmp_path, monitor(), model=Drawing)), outcome(fit(tmp_path, model=Drawing)))


@pytest.mark.slow
def test_a_step_that_changes_its_batch_in_place(tmp_path):
    """The monitor's copies are independent of the batches of training, in both directions."""

    class InPlace(Digits):
        def training_step(self, batch, batch_idx):
            batch[0].mul_(0.5)
            return super().training_step(batch, batch_idx)

    watch = monitor()
    watched = fit(tmp_path, watch, model=InPlace)
    assert_same(outcome(watched), outcome(fit(tmp_path, model=InPlace)))
    before = copy.deepcopy(watch._probes.batches)
    watch.measure(watched)
    assert_same(watch._probes.batches, before)


def test_a_teacher_that_follows_in_the_step(tmp_path):
    """The training_step itself updates frozen parameters, in place or by a new tensor."""

    class Teacher(Digits):
        def __init__(self):
            super().__init__()
            self.teacher = copy.deepcopy(self.net).requires_grad_(False)

        def training_step(self, batch, batch_idx):
            for old, new in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                old.data.mul_(0.9).add_(new.data, alpha=0.1)
            self.teacher[5].bias.data = self.net[5].bias.data * 0.5
            return super().training_step(batch, batch_idx)

    assert_same(outcome(fit(tmp_path, monitor(), model=Teacher)), outcome(fit(tmp_path, model=Teacher)))


@pytest.mark.slow
def test_a_module_that_wandb_watches(tmp_path, monkeypatch):
    """Hooks of W&B do not count the monitor's products: the histograms are logged at the same steps without it."""
    monkeypatch.setenv("WANDB_SILENT", "true")

    class Counting(Digits):
        def on_train_start(self):
            self.trainer.loggers[0].watch(self, log="all", log_freq=4, log_graph=False)

    def run(*callbacks):
        logger = WandbLogger(save_dir=tmp_path, offline=True)
        logged = []
        monkeypatch.setattr(logger.experiment, "log", wraps(logger.experiment.log, logged))
        monkeypatch.setattr(logger.experiment, "_log", wraps(logger.experiment._log, logged))
        model = fit(tmp_path, *callbacks, logger=logger, model=Counting)
        logger.experiment.unwatch(model)
        logger.experiment.finish()
        return [keys for keys in logged if not any(key.startswith("hessian") for key in keys)]

    def wraps(function, logged):
        def log(data, *args, **kwargs):
            logged.append(sorted(key.replace("graph_1", "") for key in data))  # a second watch in one process
            return function(data, *args, **kwargs)

        return log

    watched, alone = run(monitor()), run()
    assert any(key.startswith("gradients/") for keys in alone for key in keys)
    assert watched == alone


def test_a_step_that_logs_to_the_logger_itself(tmp_path):
    seen = []

    class Logging(Digits):
        def training_step(self, batch, batch_idx):
            self.logger.log_metrics({"mine": float(batch_idx)})
            seen.append(batch_idx)
            return super().training_step(batch, batch_idx)

    def rows(name, *callbacks):
        logger = CSVLogger(tmp_path, name=name)
        fit(tmp_path, *callbacks, logger=logger, model=Logging)
        with open(f"{logger.log_dir}/metrics.csv") as file:
            return [row["mine"] for row in csv.DictReader(file) if row["mine"]]

    assert rows("watched", monitor()) == rows("alone")
    assert set(seen) == set(range(8))


@pytest.mark.slow
def test_hooks_on_gradients_do_not_change_the_products(tmp_path):
    """A hook that scales gradients would also scale the eigenvalues."""

    class Hooked(Digits):
        def on_train_start(self):
            for parameter in self.parameters():
                parameter.register_hook(lambda g: 0.1 * g)

    watch, plain = monitor(at_start=True), monitor(at_start=True)
    hooked = fit(tmp_path, watch, model=Hooked)
    fit(tmp_path, plain)
    assert watch.history[0].lambda_max == plain.history[0].lambda_max
    assert_same(outcome(hooked), outcome(fit(tmp_path, model=Hooked)))
