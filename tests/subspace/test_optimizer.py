"""The module's own optimizer on w: every return value of configure_optimizers, schedulers, decay, and refusals."""

import pytest
import pytorch_lightning as pl
import torch
from nets import Classifier, train_loader, trainer, val_loader
from pytorch_lightning.callbacks import LearningRateMonitor
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from small_searches import made
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau

from lightning_sketch.subspace import SubspaceModule
from lightning_sketch.subspace._optimizer import INFO_CACHE


def fitted(configure, steps=8, callbacks=(), **options):
    class Model(Classifier):
        configure_optimizers = configure

    pl.seed_everything(0, verbose=False)
    sub = SubspaceModule(Model(), 16, **options)
    run = trainer(*callbacks, max_steps=steps)
    run.fit(sub, train_loader(), val_loader())
    return sub, run


def expected(configure_w, steps=8):
    """Return w after training by an optimizer that is made for w itself."""
    return fitted(lambda self: Adam(self.parameters()), steps, optimizer_fn=configure_w)[0].w.detach()


def constant(self):
    return Adam(self.parameters(), lr=3e-3)


def test_w_takes_the_place_of_the_weights():
    found, run = fitted(constant)
    assert torch.equal(found.w.detach(), expected(lambda params: Adam(params, lr=3e-3)))
    assert run.optimizers[0].param_groups[0]["lr"] == 3e-3
    assert [p is found.w for p in run.optimizers[0].param_groups[0]["params"]] == [True]


@pytest.mark.parametrize(
    ("of_module", "of_w"),
    [
        (
            lambda self: ([SGD(self.parameters(), lr=0.1, momentum=0.9)], []),
            lambda params: SGD(params, lr=0.1, momentum=0.9),
        ),
        (
            lambda self: Adam([{"params": self.net[0].parameters()}, {"params": self.net[2].parameters()}], lr=3e-3),
            lambda params: Adam(params, lr=3e-3),
        ),
        (
            lambda self: Adam(self.net.named_parameters(), lr=3e-3),
            lambda params: Adam(params, lr=3e-3),
        ),
        (
            lambda self: Adam([{"params": list(layer.named_parameters(str(layer)))} for layer in self.net[::2]], 3e-3),
            lambda params: Adam(params, lr=3e-3),
        ),
        (
            lambda self: Adam([p for p in self.parameters() if p.requires_grad], lr=3e-3),
            lambda params: Adam(params, lr=3e-3),
        ),
        (
            lambda self: AdamW(
                [{"params": [self.net[0].weight, self.net[2].weight], "weight_decay": 0.3},
                 {"params": [self.net[0].bias, self.net[2].bias], "weight_decay": 0.0}], lr=3e-3),
            lambda params: Adam(params, lr=3e-3),
        ),
    ],
    ids=["lists", "groups", "named", "named groups", "filtered", "decay"],
)  # fmt: skip
def test_any_form_is_reused(of_module, of_w):
    assert torch.equal(fitted(of_module)[0].w.detach(), expected(of_w))


def warm_up(optimizer):
    return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 4))


def one_cycle(optimizer):
    return OneCycleLR(optimizer, 3e-3, total_steps=8)


@pytest.mark.parametrize("schedule", [warm_up, one_cycle])
def test_schedulers_go_on(schedule):
    """Schedulers may set relative or absolute rates."""

    def configure(parameters):
        optimizer = Adam(parameters.parameters() if hasattr(parameters, "parameters") else parameters, lr=3e-3)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule(optimizer), "interval": "step"}}

    found, _ = fitted(lambda self: configure(self))
    assert torch.equal(found.w.detach(), expected(configure))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_an_optimizer_of_named_parameters_resumes(tmp_path):
    class Model(Classifier):
        def configure_optimizers(self):
            return torch.optim.Adam(self.named_parameters(), lr=3e-3)

    path = tmp_path / "a.ckpt"
    first, again = SubspaceModule(made(Model), 16), SubspaceModule(made(Model), 16)
    run = trainer(max_epochs=1, max_steps=-1)
    run.fit(first, train_loader())
    assert "param_names" not in run.optimizers[0].param_groups[0]
    run.save_checkpoint(path)
    trainer(max_epochs=1, max_steps=-1).fit(again, train_loader(), ckpt_path=path)
    assert torch.equal(first.w, again.w)


class Counting(SGD):
    """An optimizer that stores a count in its param groups and halves its rate, as schedule-free optimizers do."""

    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
            group["lr"] = group["lr"] / 2
        return loss


def test_what_an_optimizer_writes_into_its_groups_stays():
    found, run = fitted(lambda self: Counting(self.parameters(), lr=0.1), steps=3)
    assert torch.equal(found.w.detach(), expected(lambda params: Counting(params, lr=0.1), steps=3))
    (group,) = run.optimizers[0].param_groups
    assert (group["k"], group["lr"]) == (3, pytest.approx(0.1 / 8))


def test_a_warm_up_in_the_modules_own_step():
    """A rate that is written into the param groups before the step is that of w."""

    class Model(Classifier):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            for group in optimizer.param_groups:
                group["lr"] = 3e-3 * min(1.0, (self.trainer.global_step + 1) / 4)
            optimizer.step(closure=optimizer_closure)

    pl.seed_everything(0, verbose=False)
    sub = SubspaceModule(Model(), 16)
    trainer().fit(sub, train_loader(), val_loader())

    def of_w(params):
        optimizer = Adam(params, lr=3e-3)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warm_up(optimizer), "interval": "step"}}

    assert torch.allclose(sub.w.detach(), expected(of_w), rtol=1e-4, atol=1e-6)


def test_a_plateau_is_seen():
    def configure(self):
        optimizer = Adam(self.parameters(), lr=3e-3)
        plateau = ReduceLROnPlateau(optimizer, patience=0, threshold=1e9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}

    _, run = fitted(configure, steps=24)
    assert run.optimizers[0].param_groups[0]["lr"] < 3e-3


def test_decay_of_w_is_off_unless_it_is_given(caplog):
    def configure(self):
        return SGD(self.parameters(), lr=0.1, weight_decay=0.5)

    INFO_CACHE.clear()
    with caplog.at_level("INFO"):
        plain, _ = fitted(configure)
        fitted(configure)
    assert caplog.text.count("weight decay on w") == 1
    caplog.clear()
    with caplog.at_level("INFO"):  # there is none, or it was given
        fitted(lambda self: SGD(self.parameters(), lr=0.1))
        fitted(configure, weight_decay=0.1)
    assert "decay" not in caplog.text
    assert torch.equal(plain.w, fitted(lambda self: SGD(self.parameters(), lr=0.1))[0].w)
    decayed, _ = fitted(configure, weight_decay=0.5)
    same = expected(lambda params: SGD(params, lr=0.1, weight_decay=0.5))
    assert torch.equal(decayed.w.detach(), same)
    assert decayed.w.norm() < plain.w.norm()


@pytest.mark.parametrize(
    ("configure", "said"),
    [
        (
            lambda self: Adam([{"params": self.net[0].parameters(), "lr": 1e-2}, {"params": self.net[2].parameters()}]),
            "differ in lr, .*optimizer_fn",
        ),
        (lambda self: [Adam(self.net[0].parameters()), Adam(self.net[2].parameters())], "2 optimizers.*optimizer_fn"),
        (lambda self: None, "0 optimizers.*optimizer_fn"),
        (
            lambda self: Adam(self.net[2].parameters()),
            r"w moves 2 parameters that .* does not train: net.0.weight, net.0.bias; .*parameters='...'",
        ),
    ],
)
def test_what_cannot_be_reused_asks_for_a_function(configure, said):
    with pytest.raises(MisconfigurationException, match=said):
        fitted(configure)


def test_learning_rate_monitor(tmp_path):
    class Model(Classifier):
        pass

    logger = pl.loggers.CSVLogger(tmp_path)
    run = trainer(LearningRateMonitor("step"), logger=logger, log_every_n_steps=1)
    run.fit(SubspaceModule(Model(), 16), train_loader(), val_loader())
    assert "lr-Adam" in (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text()


def test_an_optimizer_that_trains_w_already_goes_on():
    class Same(Classifier):
        def __init__(self):
            super().__init__()
            self.optimizer = Adam(self.parameters(), lr=3e-3)

        def configure_optimizers(self):
            return self.optimizer

    sub = SubspaceModule(Same(), 16)
    trainer().fit(sub, train_loader())
    before = sub.w.detach().clone()
    trainer().fit(sub, train_loader())
    assert not torch.equal(sub.w, before)
    assert sub.module.optimizer.state[sub.w]["step"] == 16  # of both fits


def test_of_several_groups_the_first_holds_w_and_no_other():
    run = fitted(lambda self: Adam([{"params": layer.parameters()} for layer in (self.net[0], self.net[2])]), 1)[1]
    assert [[p.numel() for p in group["params"]] for group in run.optimizers[0].param_groups] == [[16], []]


class Halving(SGD):
    """An optimizer that halves its rate in each step."""

    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            group["lr"] = group["lr"] / 2
        return loss


def shared(self):
    """Configure one group of the first layer and the last bias, with weight decay, and one of the last matrix."""
    first, last = self.net[0], self.net[2]
    return Halving([{"params": [*first.parameters(), last.bias], "weight_decay": 0.3}, {"params": [last.weight]}], 0.1)


def test_w_has_its_own_decay_in_a_group_that_holds_others_too():
    """Its decay is off, that of the others stays; between steps there are as many groups as schedulers know."""
    own = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            own.append([[p.numel() for p in group["params"]] for group in trainer.optimizers[0].param_groups])

    options = {"steps": 2, "parameters": "net.0.*", "others": "full"}
    sub, run = fitted(shared, callbacks=[Watch()], **options)
    assert own == [[[16, 10], [160]]] * 2
    found = [(group["lr"], group["weight_decay"]) for group in run.optimizers[0].param_groups]
    assert found == [(pytest.approx(0.1 / 4), 0.3), (pytest.approx(0.1 / 4), 0.0)]
    same, _ = fitted(
        lambda self: None,
        optimizer_fn=lambda params: Halving(
            [{"params": [params[0]]}, {"params": [params[2]], "weight_decay": 0.3}, {"params": [params[1]]}], lr=0.1
        ),
        **options,
    )
    assert all(torch.equal(one, other) for one, other in zip(sub.parameters(), same.parameters(), strict=True))


@pytest.mark.parametrize("survives", [False, True])
def test_a_step_that_fails_leaves_the_groups_as_they_were(survives):
    class Fails(SGD):
        failed = False

        def step(self, closure=None):
            self.failed, failed = True, self.failed
            if not failed:
                raise RuntimeError("no step")
            return super().step(closure)

    class Model(Classifier):
        def configure_optimizers(self):
            self.optimizer = Fails(self.parameters(), lr=0.1, weight_decay=0.3)
            return self.optimizer

        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            try:
                optimizer.step(closure=optimizer_closure)
            except RuntimeError:
                if not survives:
                    raise
                optimizer_closure()

    sub, run = SubspaceModule(made(Model), 16, parameters="net.0.*", others="full"), trainer(max_steps=2)
    if survives:
        run.fit(sub, train_loader())
        assert sub.w.norm() > 0
    else:
        with pytest.raises(RuntimeError, match="no step"):
            run.fit(sub, train_loader())
    (group,) = sub.module.optimizer.param_groups
    assert ([p.numel() for p in group["params"]], group["weight_decay"]) == ([16, 160, 10], 0.3)
