"""Steps, the module inside, and its optimizer: what is left where it was, and what is told."""

from dataclasses import replace

import pytest
import pytorch_lightning as pl
import torch
from edges import Given, Judged, descending, find, judged, made, nested, searched
from nets import Classifier, train_loader, trainer, val_loader
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from lightning_sketch.subspace import IntrinsicDimensionResult, SubspaceModule
from lightning_sketch.subspace._optimizer import SAID


@pytest.mark.parametrize("implicit", [False, True])
def test_the_gradient_is_of_the_loss_as_it_is_scaled(implicit):
    """Two halves of a batch, each at half its loss, are the batch."""
    ends = []
    for size, accumulate in ((64, 1), (32, 2)):
        sub = descending(implicit=implicit)
        trainer(max_steps=2, accumulate_grad_batches=accumulate).fit(sub, train_loader(batch_size=size))
        ends.append(sub.w.detach())
    assert torch.allclose(*ends, rtol=1e-4)


def test_the_weights_are_where_w_says_at_all_times():
    """After a step; before a copy is made, whoever wrote w; and nothing is moved that is there already."""

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            steps = pl_module.weights.layout.unflatten(pl_module.directions.rmatvec(pl_module.w.detach()))
            expected = [start + step for start, step in zip(pl_module.theta0().values(), steps, strict=True)]
            found = pl_module.weights.parameters()
            assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(found, expected, strict=True))

    sub = SubspaceModule(made(), 16, lr_scale=10)
    trainer(Watch()).fit(sub, train_loader())
    sub.w.data.zero_()
    assert all(
        torch.equal(one, start)
        for one, start in zip(sub.weights.layout.parameters(sub.materialize()), sub.theta0().values(), strict=True)
    )
    images, _ = next(iter(val_loader()))
    version, before = sub.net[0].weight._version, sub(images)
    assert sub.net[0].weight._version == version
    sub.w.data.add_(0.3)
    assert not torch.equal(sub(images), before)


def test_gradients_of_the_weights_are_let_go_of_and_former_ones_do_not_count():
    ends = []
    for sub in (descending(), descending()):
        if ends:
            for parameter in sub.weights.parameters():
                parameter.grad = torch.ones_like(parameter)
        trainer(max_steps=1).fit(sub, train_loader())
        assert all(parameter.grad is None for parameter in sub.weights.parameters())
        ends.append(sub.w.detach())
    assert torch.equal(*ends)


def test_what_is_materialized_in_the_middle_of_a_fit_logs_its_own_metrics():
    plains = []

    class Watch(pl.Callback):
        def on_validation_end(self, trainer, pl_module):
            plains.append(pl_module.materialize())

    sub = SubspaceModule(made(), 16, lr_scale=10)
    run = trainer(Watch())
    run.fit(sub, train_loader(), val_loader())
    found = trainer().validate(plains[-1], val_loader(), verbose=False)[0]["val_acc"]
    assert found == pytest.approx(float(run.callback_metrics["val_acc"]))


def test_w_is_of_32_bits_for_weights_of_16():
    sub = SubspaceModule(made().bfloat16(), 16)
    assert (sub.w.dtype, sub.theta0()["net.0.weight"].dtype) == (torch.float32, torch.bfloat16)


@pytest.mark.gpu
def test_w_and_theta0_are_where_the_weights_are():
    sub = SubspaceModule(made().cuda(), 16)
    assert sub.w.is_cuda
    back = SubspaceModule(made(), 16).cuda()
    assert all(tensor.is_cuda for tensor in back.theta0().values())


def test_the_condition_of_many_directions_is_told(caplog):
    """Where it may matter: from half of all on, and not of the weights themselves."""
    for dim, told in ((8, 0), (150, 1), (170, 0)):
        caplog.clear()
        with caplog.at_level("INFO"):
            sub = SubspaceModule(made(), dim, parameters="net.2.*", lr_scale=10)
            trainer(max_steps=1).fit(sub, train_loader())
        assert sub.n == 170
        assert caplog.text.count(f"{dim} random directions of 170: their condition number is ") == told


def test_what_is_trained_in_full_may_start_anywhere_and_what_is_frozen_may_not():
    """A checkpoint holds the former, of the latter a fingerprint."""

    def another(others):
        module = made()
        nn.init.zeros_(module.net[2].weight)
        return SubspaceModule(module, 8, parameters="net.0.*", others=others, lr_scale=10)

    for others in ("full", "frozen"):
        sub = SubspaceModule(made(), 8, parameters="net.0.*", others=others, lr_scale=10)
        trainer(max_steps=2).fit(sub, train_loader())
        if others == "frozen":
            with pytest.raises(ValueError, match="other initial weights"):
                another(others).load_state_dict(sub.state_dict())
        else:
            (loaded := another(others)).load_state_dict(sub.state_dict())
            assert torch.equal(loaded.net[2].weight, sub.net[2].weight)


def test_a_checkpoint_holds_no_function(tmp_path):
    sub = SubspaceModule(made(), 8, optimizer_fn=lambda params: torch.optim.SGD(params, lr=0.1))
    run = trainer(max_steps=1)
    run.fit(sub, train_loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    assert "optimizer_fn" not in torch.load(tmp_path / "a.ckpt", weights_only=True)["hyper_parameters"]


def test_a_module_that_could_make_layers_and_has_them_is_wrapped_at_once():
    class Model(Classifier):
        def configure_model(self):
            pass

    assert SubspaceModule(made(Model), 8).n == 64 * 16 + 16 + 16 * 10 + 10


class Grouped(Classifier):
    """A group for each layer."""

    def configure_optimizers(self):
        return torch.optim.Adam([{"params": layer.parameters()} for layer in (self.net[0], self.net[2])], lr=3e-3)


def test_of_several_groups_the_first_holds_w_and_no_other():
    run = trainer(max_steps=1)
    run.fit(SubspaceModule(made(Grouped), 16, lr_scale=10), train_loader())
    assert [[p.numel() for p in group["params"]] for group in run.optimizers[0].param_groups] == [[16], []]


@pytest.mark.parametrize(("decay", "given"), [(0.0, None), (0.1, 0.1)])
def test_nothing_is_said_of_decay_or_rate_where_there_is_nothing_to_say(caplog, decay, given):
    """No decay to leave out, or one that is given; a small rate of an optimizer that is not Adam."""

    class Model(Classifier):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-4, weight_decay=decay)

    SAID.clear()
    with caplog.at_level("INFO"):
        trainer(max_steps=1).fit(SubspaceModule(made(Model), 16, weight_decay=given), train_loader())
    assert "decay" not in caplog.text


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_an_optimizer_of_named_parameters_resumes(tmp_path):
    class Model(Classifier):
        def configure_optimizers(self):
            return torch.optim.Adam(self.named_parameters(), lr=3e-3)

    path = tmp_path / "a.ckpt"
    first, again = SubspaceModule(made(Model), 16, lr_scale=10), SubspaceModule(made(Model), 16, lr_scale=10)
    run = trainer(max_epochs=1, max_steps=-1)
    run.fit(first, train_loader())
    assert "param_names" not in run.optimizers[0].param_groups[0]
    run.save_checkpoint(path)
    trainer(max_epochs=1, max_steps=-1).fit(again, train_loader(), ckpt_path=path)
    assert torch.equal(first.w, again.w)


def test_of_accumulated_batches_the_mean_is_over_steps():
    """Of the last half of every four steps, two batches each: the w after the third and after the fourth, once each."""
    seen, ws = [], {}

    class Model(Given):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            if batch_idx == 0 and not self.trainer.sanity_checking:
                seen.append(torch.cat([p.detach().flatten() for p in self.net.parameters()]))

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            ws[trainer.global_step] = pl_module.coordinates().detach().clone()

    _, sub, _ = searched([], Watch(), steps=8, sub=nested(Model), accumulate_grad_batches=2)
    theta0 = torch.cat([tensor.flatten() for tensor in sub.theta0().values()])
    for theta, last in zip(seen, (4, 8), strict=True):
        expected = theta0 + replace(sub.directions, dim=8).rmatvec((ws[last - 1] + ws[last]) / 2)
        assert torch.allclose(theta, expected, atol=1e-6)


def test_a_finder_leaves_the_rhythm_of_other_trainers_alone():
    finder, sub, _ = searched([0.1])
    other = trainer(finder, val_check_interval=3, check_val_every_n_epoch=None)
    other.validate(sub, val_loader(), verbose=False)
    assert (other.val_check_interval, other.check_val_every_n_epoch) == (3, None)


def test_the_validation_before_training_leaves_no_trace(tmp_path):
    """Neither in the model that is given nor in its copies."""
    starts = []

    class Model(Judged):
        def __init__(self):
            super().__init__()
            self.validated = 0

        def on_fit_start(self):
            starts.append(self.validated)

        def validation_step(self, batch, batch_idx):
            self.validated += 1
            super().validation_step(batch, batch_idx)

    model = made(Model)
    find(model, tmp_path)
    assert (starts, model.validated) == ([0, 0, 0], 0)


def test_the_target_itself_is_reached_in_both_modes(tmp_path):
    columns = {"kind": ["fit"], "dim": [8], "seed": [0], "steps": [1], "status": ["done"]}
    for mode, baseline, start in (("max", 1.0, 0.0), ("min", 0.0, 1.0)):
        result = IntrinsicDimensionResult({**columns, "value": [0.5]}, "value", mode, 0.5, 64, baseline, start)
        assert (result.target, result.suggestion()) == (0.5, 8)


def test_a_plot_may_leave_out_the_suggestion(tmp_path):
    result = find(judged(), tmp_path, dims=[4], baseline=1.0)
    for suggest in (True, False):
        legend = result.plot(suggest=suggest).axes[0].get_legend()
        assert any("suggestion" in text.get_text() for text in legend.get_texts()) == suggest


def test_rates_are_the_modules_own_right_after_a_step():
    """For what its own `optimizer_step` does then; what the next step has, times lr_scale, is told on demand.

    A rate that is small at first alone is not warned of.
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


def test_what_an_optimizer_writes_of_w_counts_for_a_group_that_holds_others_too():
    """Nothing else of the group is changed; and what it writes of another group is that one's, at its own rate."""

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


def test_groups_of_named_parameters_differ_in_names_alone():
    class Model(Classifier):
        def configure_optimizers(self):
            layers = self.net[0], self.net[2]
            return torch.optim.Adam([{"params": list(layer.named_parameters(str(layer)))} for layer in layers], lr=3e-3)

    sub = SubspaceModule(made(Model), 16, lr_scale=10)
    trainer(max_steps=1).fit(sub, train_loader())
    assert sub.w.count_nonzero() == 16
