"""Threads do not affect each other: hooks, measurements, and the flags of torch that are global to the process."""

import threading
from concurrent.futures import ThreadPoolExecutor

import optuna
import pytest
import torch
import torch.nn.functional as F
from models import dataset, trainer
from pytorch_lightning import LightningModule
from torch import nn
from torch.utils.data import DataLoader

from lightning_sketch import Hessian, SpectrumMonitor
from lightning_sketch.autodiff import preserve_state
from lightning_sketch.autodiff.preserve_state import measurement_depth
from lightning_sketch.operators._precision import full_precision
from lightning_sketch.per_example import ExampleHooks

HOUR = 3600  # limit of waits, in seconds


class Beside:
    """Measure another module in a thread, for as long as the context lasts."""

    def __init__(self, module):
        self.module, self.inside, self.done = module, threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self.measure)

    def measure(self):
        with preserve_state(self.module):
            self.inside.set()
            self.ended = self.done.wait(HOUR)

    def __enter__(self):
        self.thread.start()
        assert self.inside.wait(HOUR)

    def __exit__(self, *_):
        self.done.set()
        self.thread.join()
        assert self.ended


class Squares:
    def __init__(self):
        self.total = 0.0

    def add(self, factor):
        self.total = self.total + factor.values.square().sum() if hasattr(factor, "values") else self.total


def rows(module, x, accumulator):
    """Run a backward pass under hooks, and return the supported parameters, and the reasons for the others."""
    hooks = ExampleHooks(module, dict(module.named_parameters()))
    with hooks.recording(accumulator, len(x)):
        loss = module(x).square().mean()
        hooks.before_backward(loss)
        loss.backward()
    return hooks.supported, hooks.reasons


def encoder():
    return nn.TransformerEncoderLayer(4, 2, 4, 0.0, batch_first=True)


@pytest.mark.parametrize("make", [lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), encoder])
def test_hooks_are_not_muted_by_a_measurement_of_another_module_in_another_thread(make):
    """The rows are the same up to rounding: attention uses plain operations during a measurement."""
    module, x = make(), torch.randn(5, 3, 4)
    alone, beside = Squares(), Squares()
    before = rows(module, x, alone)
    with Beside(nn.Linear(1, 1)):
        assert rows(module, x, beside) == before
    assert before == ({name for name, _ in module.named_parameters()}, {})
    assert float(alone.total) == pytest.approx(float(beside.total), rel=1e-5)
    assert alone.total > 0


def test_depth_is_counted_per_thread_and_module():
    module = nn.Sequential(nn.Linear(1, 1))
    with Beside(module):
        assert measurement_depth(module) == 0
    with preserve_state(module):
        assert (measurement_depth(module), measurement_depth(module[0])) == (1, 1)
        with preserve_state(module[0]):
            assert (measurement_depth(module), measurement_depth(module[0])) == (1, 2)
    assert (measurement_depth(module), measurement_depth(module[0])) == (0, 0)


def test_a_measurement_of_a_part_mutes_the_hooks_of_that_part_only():
    module, x = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)), torch.randn(4, 3)
    hooks, squares = ExampleHooks(module, dict(module.named_parameters())), Squares()
    with hooks.recording(squares, 4):
        loss = module(x).square().mean()
        with preserve_state(module[0]):
            module[0](x).square().mean()
        hooks.before_backward(loss)
        loss.backward()
    assert hooks.supported == {"0.weight", "0.bias", "1.weight", "1.bias"}


def test_attention_in_many_threads_records_its_own_products():
    """Each thread has the rows that it has alone, for sequences of different numbers and lengths."""
    plain = F.linear
    problems = [(encoder(), torch.randn(2 + i, 3 + i, 4)) for i in range(8)]

    def job(problem):
        found = Squares()
        return rows(*problem, found), float(found.total)

    alone = [job(problem) for problem in problems]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            assert list(pool.map(job, problems)) == alone
    assert F.linear is plain


def test_precision_is_restored_by_the_last_of_several_threads():
    flag, inside, leave, ended = torch.backends.cuda.matmul, threading.Event(), threading.Event(), []
    if not hasattr(flag, "fp32_precision"):
        pytest.skip("this PyTorch has the older switch only")
    before = flag.fp32_precision

    def other():
        with full_precision(torch.device("cpu")):
            inside.set()
            ended.append(leave.wait(HOUR))

    thread = threading.Thread(target=other)
    with full_precision(torch.device("cpu")):
        thread.start()
        assert inside.wait(HOUR)
    meanwhile = flag.fp32_precision
    leave.set()
    thread.join()
    assert ended == [True]
    assert meanwhile == "ieee"
    assert flag.fp32_precision == before


def test_only_one_thread_measures_at_a_time():
    """Otherwise one would restore attention's backends in the middle of the other's measurement."""
    flags = torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.mem_efficient_sdp_enabled
    before, order = [flag() for flag in flags], []

    def second():
        with preserve_state(nn.Linear(1, 1)):
            order.append("second")

    thread = threading.Thread(target=second)
    with preserve_state(nn.Linear(1, 1)):
        thread.start()
        thread.join(timeout=0.5)
        waits = thread.is_alive()
        order.append("first")
    thread.join()
    assert waits
    assert order == ["first", "second"]
    assert [flag() for flag in flags] == before


def test_products_in_many_threads_are_those_of_one():
    """The modules have attention, which the whole process computes by plain operations while one thread measures."""
    torch.manual_seed(0)
    modules = [nn.Sequential(encoder(), nn.Linear(4, 1)).double() for _ in range(6)]
    x = torch.randn(3, 5, 4, dtype=torch.float64)

    def top(module):
        h = Hessian(lambda module, batch: module(batch).square().mean(), module, [x])
        return h.matvec(torch.ones(h.shape[0], dtype=torch.float64))

    alone = [top(module) for module in modules]
    with ThreadPoolExecutor(3) as pool:
        for found, expected in zip(pool.map(top, modules), alone, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


class Classifier(LightningModule):
    """A classifier with weights by a formula, since all threads share the global random generator."""

    def __init__(self, lr):
        super().__init__()
        self.lr, self.net = lr, nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10))
        for i, p in enumerate(self.parameters()):
            p.data = torch.linspace(-1, 2, p.numel()).mul(37 + i).sin().mul(0.2).view_as(p)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


@pytest.mark.slow
def test_a_study_with_two_jobs_has_the_eigenvalues_of_one(tmp_path):
    """Optuna trains and measures in two threads at once; every measurement equals that of the trial alone."""
    rates = [0.01, 0.02, 0.05, 0.1]

    def eigenvalues(lr):
        monitor = SpectrumMonitor(top_k=3, bottom_k=1, num_batches=2)
        data = DataLoader(dataset(96), batch_size=32)
        trainer(tmp_path / str(lr), monitor, max_epochs=2).fit(Classifier(lr), data)
        return [m.top(3).tolist() for m in monitor.history]

    alone, found = {lr: eigenvalues(lr) for lr in rates}, {}

    def objective(trial):
        lr = trial.suggest_categorical("lr", rates)
        found[lr] = eigenvalues(lr)
        return found[lr][-1][0]

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.GridSampler({"lr": rates}, seed=0))
    study.optimize(objective, n_jobs=2)
    assert found == alone
