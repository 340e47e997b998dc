"""The param groups of the optimizer while it steps, while a step's closure runs, and between steps."""

import pytest
import torch
from nets import Classifier, train_loader, trainer, val_loader
from small_searches import made
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import LambdaLR

from lightning_sketch.subspace import SubspaceModule


class Grouped(Classifier):
    """A param group for each layer."""

    def configure_optimizers(self):
        return torch.optim.Adam([{"params": layer.parameters()} for layer in (self.net[0], self.net[2])], lr=3e-3)


def test_of_several_groups_the_first_holds_w_and_no_other():
    run = trainer(max_steps=1)
    run.fit(SubspaceModule(made(Grouped), 16, lr_scale=10), train_loader())
    assert [[p.numel() for p in group["params"]] for group in run.optimizers[0].param_groups] == [[16], []]


def test_rates_are_the_modules_own_right_after_a_step():
    """For what its own `optimizer_step` does then; `groups` gives the rate of the next step, times lr_scale.

    There is no warning of a rate that is small during warm-up only.
    """
    rates = []

    class Model(Classifier):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            warm_up = LambdaLR(optimizer, lambda step: (step + 1) / 16)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warm_up, "interval": "step"}}

        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            optimizer.step(closure=optimizer_closure)
            rates.append(optimizer.param_groups[0]["lr"])

    sub, run = SubspaceModule(made(Model), 16, lr_scale=10), trainer(max_steps=4)
    run.fit(sub, train_loader())
    assert rates == pytest.approx([3e-3 * step / 16 for step in (1, 2, 3, 4)])
    assert [group["lr"] for group in sub.groups(run.optimizers)] == [pytest.approx(3e-2 * 5 / 16)]


def test_a_rate_that_the_module_writes_while_it_trains_is_multiplied_too():
    """Both `training_step` and hooks run within the optimizer's step. After one step |w| is ten times the rate."""

    class InStep(Classifier):
        def training_step(self, batch, batch_idx):
            self.seen = [group["lr"] for group in self.optimizers().param_groups]
            for group in self.optimizers().param_groups:
                group["lr"] = 2e-3
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self):
            matrices, vectors = (
                [p for p in self.parameters() if p.ndim > 1],
                [p for p in self.parameters() if p.ndim < 2],
            )
            return AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], lr=1e-3)

    class InHook(Classifier):
        def on_before_optimizer_step(self, optimizer):
            self.seen = [group["lr"] for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["lr"] = 2e-3

    for kind in (InStep, InHook):
        sub, run = SubspaceModule(kind(), 16, lr_scale=10), trainer(max_steps=1)
        run.fit(sub, train_loader())
        assert torch.allclose(sub.w.detach().abs(), torch.full((16,), 2e-2), rtol=1e-3)
        assert sub.module.seen == ([1e-3, 1e-3] if kind is InStep else [3e-3])
        assert {group["lr"] for group in run.optimizers[0].param_groups} == {2e-3}


def test_what_an_optimizer_writes_of_w_counts_for_a_group_that_holds_others_too():
    """Its other options are not changed; what the optimizer writes into another group stays there, without lr_scale."""

    class Halving(torch.optim.SGD):
        def step(self, closure=None):
            loss = super().step(closure)
            for group in self.param_groups:
                group["size"], group["lr"] = sum(p.numel() for p in group["params"]), group["lr"] / 2
            return loss

    class Model(Classifier):
        def configure_optimizers(self):
            first, last = self.net[0], self.net[2]
            groups = [{"params": [*first.parameters(), last.bias], "weight_decay": 0.3}, {"params": [last.weight]}]
            return Halving(groups, lr=0.1)

    for steps in (1, 2):
        run = trainer(max_steps=steps)
        run.fit(SubspaceModule(made(Model), 16, parameters="net.0.*", others="full", lr_scale=10), train_loader())
        first, second = run.optimizers[0].param_groups
        assert [[p.numel() for p in group["params"]] for group in (first, second)] == [[16, 10], [160]]
        assert (first["size"], first["lr"], first["weight_decay"]) == (16, pytest.approx(0.1 / 2**steps), 0.3)
        assert (second["size"], second["lr"], second["weight_decay"]) == (160, pytest.approx(0.1 / 2**steps), 0.0)


def test_a_step_may_take_other_functions():
    class Asks(SGD):
        def step(self, closure=None, twice=None):
            assert twice(2) == 4
            return super().step(closure)

    class Model(Classifier):
        def configure_optimizers(self):
            return Asks(self.parameters(), lr=0.1)

        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            optimizer.step(closure=optimizer_closure, twice=lambda x: 2 * x)

    sub = SubspaceModule(Model(), 16, lr_scale=10)
    trainer().fit(sub, train_loader())
    assert sub.w.norm() > 0


def test_a_step_that_fails_leaves_the_groups_as_they_were():
    class Fails(Adam):
        def step(self, closure=None):
            raise RuntimeError("no step")

    class Model(Classifier):
        def configure_optimizers(self):
            self.optimizer = Fails(self.parameters(), lr=3e-3)
            return self.optimizer

    model = Model()
    with pytest.raises(RuntimeError, match="no step"):
        trainer().fit(SubspaceModule(model, 16, lr_scale=10), train_loader(), val_loader())
    assert [group["lr"] for group in model.optimizer.param_groups] == [3e-3]


def test_after_a_step_that_failed_and_was_survived_the_next_is_at_the_rate_of_w():
    rates = []

    class Fails(torch.optim.SGD):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            if len(rates) == 1:
                raise RuntimeError("no step")
            return super().step(closure)

    class Model(Classifier):
        def configure_optimizers(self):
            return Fails(self.parameters(), lr=0.1)

        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            try:
                optimizer.step(closure=optimizer_closure)
            except RuntimeError:
                optimizer_closure()

    trainer(max_steps=2).fit(SubspaceModule(made(Model), 16, lr_scale=10), train_loader())
    assert rates == [pytest.approx(1.0)] * 2
