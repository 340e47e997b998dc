"""θ = θ₀ + Dᵀ w: the gradient of w, the steps that it takes, and the weights that follow it."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from nets import Classifier, Convolutional, Tied, train_loader, trainer, val_loader
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from small_searches import made
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_sketch.autodiff.layout import Layout
from lightning_sketch.operators.kinds import KINDS
from lightning_sketch.subspace import SubspaceModule


def flat(module, names):
    return torch.cat([dict(module.named_parameters())[name].detach().flatten() for name in names])


class Gradients(pl.Callback):
    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append(torch.cat([block.grad for block in pl_module.blocks]).clone())


def first_gradient(module):
    watch = Gradients()
    trainer(watch, max_steps=1).fit(SubspaceModule(module, 24, seed=5, scale=10), train_loader())
    return watch.seen[0]


@pytest.mark.parametrize("kind", [Classifier, Tied])
def test_the_gradient_of_w_is_that_of_the_loss(kind):
    """It is D ∇L(θ₀), computed with dense matrices in float32, in a fit and in a loop by hand."""
    module = made(kind)
    layout = Layout.of(module)
    sub = SubspaceModule(copy.deepcopy(module), 24, seed=5, scale=10)
    images, labels = next(iter(train_loader()))
    gradients = torch.autograd.grad(F.cross_entropy(module(images), labels), layout.parameters(module))
    expected = sub.directions.as_matrix() @ torch.cat([g.flatten() for g in gradients])
    F.cross_entropy(sub(images), labels).backward()
    for found in (first_gradient(module), sub.w.grad):
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6 * expected.norm())


@pytest.mark.parametrize("sketch", KINDS)
def test_weights_follow_w(sketch):
    """After eight steps of Adam, for every kind, θ = θ₀ + Dᵀ w."""
    sub = SubspaceModule(made(), 24, sketch=sketch, seed=1, scale=10)
    start = flat(sub.module, sub.weights.layout.names)
    trainer().fit(sub, train_loader())
    moved = flat(sub.module, sub.weights.layout.names) - start
    assert torch.allclose(moved, sub.directions.rmatvec(sub.w.detach()), atol=1e-5)
    assert sub.w.norm() > 0.02


def test_a_step_of_adam_has_one_length_for_all_dims():
    """After one step w = ± lr, and ‖Dᵀ w‖ = scale · lr √n within four times √(2 / dim), the spread over draws."""
    for dim in (32, 128, 512):
        sub = SubspaceModule(made(), dim, scale=10)
        trainer(max_steps=1).fit(sub, train_loader())
        moved = flat(sub.module, sub.weights.layout.names) - torch.cat([t.flatten() for t in sub.theta0().values()])
        assert moved.norm() == pytest.approx(0.03 * sub.n**0.5, rel=4 * (2 / dim) ** 0.5)


def test_dim_n_is_full_training():
    """Adam on w = θ - θ₀ takes the steps of Adam on θ."""
    module = made()
    plain = copy.deepcopy(module)
    trainer().fit(plain, train_loader())
    sub = SubspaceModule(module, Layout.of(module).n)
    trainer().fit(sub, train_loader())
    assert torch.allclose(flat(sub.module, sub.weights.layout.names), flat(plain, sub.weights.layout.names), atol=2e-5)


def test_evaluation_is_at_the_weights_that_w_says_whoever_wrote_it():
    sub = SubspaceModule(made(), 32, scale=10)
    before = trainer().validate(sub, val_loader(), verbose=False)[0]["val_loss"]
    sub.w.data.add_(0.3)  # this does not increase the tensor's version
    after = trainer().validate(sub, val_loader(), verbose=False)[0]["val_loss"]
    assert after != before
    plain = sub.materialize()
    assert trainer().validate(plain, val_loader(), verbose=False)[0]["val_loss"] == pytest.approx(after)


def start_and_moved(sub):
    """Return θ₀ + Dᵀ w, computed from the directions, and the parameters of the module."""
    steps = sub.weights.layout.unflatten(sub.directions.rmatvec(sub.w.detach()))
    return [start + step for start, step in zip(sub.theta0().values(), steps, strict=True)], sub.weights.parameters()


def test_the_weights_are_at_the_new_w_after_each_step():
    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            for expected, found in zip(*start_and_moved(pl_module), strict=True):
                assert torch.allclose(found, expected, atol=1e-6)

    sub = SubspaceModule(made(), 16, scale=10)
    trainer(Watch()).fit(sub, train_loader())
    assert sub.w.count_nonzero() == 16


def test_a_forward_pass_is_at_the_w_that_was_written_and_writes_no_weight_if_w_is_the_same():
    sub = SubspaceModule(made(), 16, scale=10)
    images, _ = next(iter(val_loader()))
    version, before = sub.net[0].weight._version, sub(images)
    assert sub.net[0].weight._version == version
    sub.w.data.add_(0.3)
    assert not torch.equal(sub(images), before)


def test_materialized_is_a_plain_module_that_trains_on():
    sub = SubspaceModule(made(Convolutional), 32, scale=10)
    trainer().fit(sub, train_loader())
    plain = sub.materialize()
    assert type(plain) is Convolutional
    assert all(p.requires_grad for p in plain.parameters())
    assert all(p.requires_grad for p in SubspaceModule(made(), 8, parameters="net.2.*").materialize().parameters())
    trainer(max_steps=2).fit(plain, train_loader())
    assert not torch.equal(plain.net[1].weight, sub.module.net[1].weight)
    trainer(max_steps=2).fit(sub, train_loader())  # and so does the former


def test_what_is_materialized_in_the_middle_of_a_fit_logs_its_own_metrics():
    plains = []

    class Watch(pl.Callback):
        def on_validation_end(self, trainer, pl_module):
            plains.append(pl_module.materialize())

    sub = SubspaceModule(made(), 16, scale=10)
    run = trainer(Watch())
    run.fit(sub, train_loader(), val_loader())
    found = trainer().validate(plains[-1], val_loader(), verbose=False)[0]["val_acc"]
    assert found == pytest.approx(float(run.callback_metrics["val_acc"]))


def test_what_the_user_froze_stays_frozen_in_the_materialized_module():
    module = made()
    module.net[0].weight.requires_grad_(False)
    sub = SubspaceModule(module, 16, scale=10)
    assert [name for name, p in sub.materialize().named_parameters() if not p.requires_grad] == ["net.0.weight"]


def test_tied_weights_stay_tied():
    sub = SubspaceModule(made(Tied), 32, scale=10)
    trainer().fit(sub, train_loader())
    assert sub.module.net[2].weight is sub.module.net[6].weight
    assert sub.n == sum(p.numel() for p in made(Tied).parameters())


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    class Checkpointed(Classifier):
        def forward(self, images):
            hidden = self.net[:2](images)
            return checkpoint(self.net[2], hidden, use_reentrant=reentrant)

    expected = first_gradient(made())
    assert torch.allclose(first_gradient(made(Checkpointed)), expected, rtol=1e-5, atol=1e-7)


def test_compiled_inside():
    class Compiled(Classifier):
        def network(self, width):
            return torch.compile(super().network(width), backend="eager")

    assert torch.allclose(first_gradient(made(Compiled)), first_gradient(made()), rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_compiled_as_a_whole():
    """It runs in a process of its own, since the type checker of the tests cannot be compiled."""
    folder = Path(__file__).parent
    done = subprocess.run([sys.executable, "compiled.py"], cwd=folder, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr[-3000:]
    plain, inside, outside = (torch.tensor(found) for found in json.loads(done.stdout.splitlines()[-1]))
    assert torch.allclose(inside, plain, rtol=1e-5, atol=1e-7)
    assert torch.allclose(outside, plain, rtol=1e-5, atol=1e-7)


def test_chosen_parameters_move_and_the_others_stay():
    module = made()
    names = [name for name, _ in module.named_parameters()]
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    sub = SubspaceModule(module, 10, parameters="net.2.*", scale=10)
    assert sub.n == 10 * 16 + 10
    trainer().fit(sub, train_loader())
    moved = {name for name in names if not torch.equal(before[name], dict(module.named_parameters())[name])}
    assert moved == {"net.2.weight", "net.2.bias"}


def test_a_copy_is_a_module_of_its_own():
    sub = SubspaceModule(made(), 16, scale=10)
    twin = copy.deepcopy(sub)
    run = trainer()
    run.fit(twin, train_loader(), val_loader())
    assert sub.w.norm() == 0
    assert twin.w.norm() > 0
    assert "val_acc" in run.callback_metrics


def test_a_step_that_fails_leaves_the_weights_frozen():
    class Model(Classifier):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("no loss")

    sub = SubspaceModule(made(Model), 16, scale=10)
    with pytest.raises(RuntimeError, match="no loss"):
        trainer(max_steps=1).fit(sub, train_loader())
    assert [name for name, parameter in sub.named_parameters() if parameter.requires_grad] == ["w"]


def test_the_condition_number_of_many_directions_is_logged(caplog):
    """Where it may matter: for more than half of n directions, but not for the weights themselves."""
    for dim, count in ((8, 0), (150, 1), (170, 0)):
        caplog.clear()
        with caplog.at_level("INFO"):
            sub = SubspaceModule(made(), dim, parameters="net.2.*", scale=10)
            trainer(max_steps=1).fit(sub, train_loader())
        assert sub.n == 170
        assert caplog.text.count(f"{dim} random directions of 170: their condition number is ") == count


def test_theta0_is_converted_with_the_weights():
    sub = SubspaceModule(made(), 8).double()
    assert {tensor.dtype for tensor in sub.theta0().values()} == {torch.float64}


@pytest.mark.gpu
def test_w_is_made_on_the_device_of_the_weights():
    assert SubspaceModule(made().cuda(), 16).w.is_cuda


@pytest.mark.gpu
def test_theta0_moves_to_another_device_with_the_weights():
    assert all(tensor.is_cuda for tensor in SubspaceModule(made(), 16).cuda().theta0().values())


def test_a_module_in_a_subspace_can_be_on_the_meta_device():
    assert SubspaceModule(made(), 16).to("meta").w.is_meta


class ByHand(Classifier):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class MayMakeLayers(Classifier):
    def configure_model(self):
        pass


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"dim": 0}, ValueError, "dim=0"),
        ({"dim": 10**6}, ValueError, r"dim=1000000; dim=n trains all"),
        ({"parameters": "head.*"}, ValueError, "no trainable parameter matches 'head.*'"),
        ({"sketch": "srht"}, ValueError, "unknown kind of sketch 'srht'"),
        ({"others": "half"}, ValueError, "others='half'"),
        ({"scale": 0}, ValueError, "need a scale > 0, got 0"),
        ({"lr_scale": 0}, ValueError, "give one of them, above 0; got 0"),
        ({"lr_scale": 2, "scale": 2}, ValueError, "give one of them"),
        ({"dim": "16"}, ValueError, r"dim is a whole number, got '16' \(str\)"),
        ({"seed": 0.5}, ValueError, r"seed is a whole number, got 0.5"),
        ({"max_dim": 8}, ValueError, "max_dim=8"),
        ({"module": ByHand}, MisconfigurationException, "manual optimization"),
        ({"module": lambda: nn.Linear(2, 2)}, TypeError, "wraps a LightningModule, got a Linear"),
        ({"module": lambda: SubspaceModule(Classifier(), 4)}, TypeError, "got a SubspaceModule; .*materialize"),
        ({"module": lambda: SubspaceModule(Classifier(), 4).module}, ValueError, "in a SubspaceModule .*deepcopy"),
        (
            {"module": lambda: SubspaceModule(MayMakeLayers(), 4).module},
            ValueError,
            "no trainable parameters.*deepcopy",
        ),
        ({"module": pl.LightningModule}, ValueError, "LightningModule has no trainable parameters.*setup is too late"),
    ],
)
def test_what_cannot_be_is_refused_when_it_is_made(untyped, options, error, said):
    module = options.get("module", Classifier)()
    with pytest.raises(error, match=said):
        SubspaceModule(module, **{"dim": 16, **{k: v for k, v in options.items() if k != "module"}})
