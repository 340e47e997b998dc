"""In half precision, with autocast or throughout, with a scaled loss or without, w takes the steps of float32."""

import pytest
import pytorch_lightning as pl
import torch
from marks import slow
from nets import Classifier, train_loader, trainer, val_loader
from pytorch_lightning.plugins.precision import MixedPrecision
from small_searches import made

from lightning_sketch.subspace import IntrinsicDimensionFinder, IntrinsicDimensionTuner, SubspaceModule

ROUNDING = {"16-mixed": 2**-11, "bf16-mixed": 2**-8, "bf16-true": 2**-8}


class Descends(Classifier):
    """A module trained by SGD, at a rate at which rounding errors do not grow."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Overflows(Descends):
    """A module whose loss is infinite in the batch of this number."""

    at, skips = 5, False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if batch_idx != self.at:
            return loss
        return None if self.skips else loss * float("inf")


class Skips(Overflows):
    skips = True


class Watch(pl.Callback):
    """Record the gradient before each step, and after it w, the weights, and the scale of the loss."""

    def __init__(self):
        self.gradients, self.w, self.theta, self.scale = [], [], [], []

    def on_train_start(self, trainer, pl_module):
        self.note(trainer, pl_module)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        gradients = [block.grad for block in pl_module.blocks if block.grad is not None]
        self.gradients.append(torch.cat([pl_module.blocks[0][:0], *gradients]).detach().float())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.note(trainer, pl_module)

    def note(self, trainer, pl_module):
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.scale.append(scaler and scaler.get_scale())
        self.w.append(pl_module.coordinates().detach().clone())
        self.theta.append(torch.cat([p.detach().flatten() for p in pl_module.weights.parameters()]))


def fitted(kind=Descends, precision="32-true", scale=2.0**10, callbacks=(), run_options=(), **options):
    """Train twenty steps; Lightning supports float16 on a CPU by a plugin only."""
    pl.seed_everything(0, verbose=False)
    sub, watch = SubspaceModule(kind(), **{"dim": 64, "lr_scale": 10, **options}), Watch()
    given = {"precision": precision}
    if precision == "16-mixed":
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
        given = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}
    run = trainer(watch, *callbacks, max_steps=20, **given, **dict(run_options))
    run.fit(sub, train_loader(), val_loader())
    return sub, watch, run


def start_of(sub):
    return torch.cat([tensor.flatten() for tensor in sub.theta0().values()])


@pytest.mark.parametrize("options", [{}, slow({"max_dim": 256}), slow({"sketch": "gaussian"})])
@pytest.mark.parametrize("precision", ROUNDING)
def test_gradients_and_steps_are_those_of_float32_to_a_few_roundings(precision, options):
    """Roundings of the network's type: 2 were measured and 4 are allowed, in the first gradient and at the end."""
    sub, watch, _ = fitted(**options)
    rounded, seen, run = fitted(precision=precision, **options)
    for one, other in ((watch.gradients[0], seen.gradients[0]), (sub.coordinates(), rounded.coordinates())):
        assert 0 < (one - other).norm() <= 4 * ROUNDING[precision] * one.norm()
    assert run.callback_metrics["val_loss"] < 0.98 * start_loss()


def start_loss():
    pl.seed_everything(0, verbose=False)
    return trainer().validate(Classifier(), val_loader(), verbose=False)[0]["val_loss"]


@pytest.mark.parametrize(
    ("options", "run_options"),
    [
        ({}, {}),
        ({"parameters": "net.0.*", "others": "full"}, {}),
        ({"optimizer_fn": lambda params: torch.optim.Adam(params, lr=0.01, fused=True)}, {}),
        ({}, {"accumulate_grad_batches": 2, "gradient_clip_val": 1.0}),
    ],
)
def test_a_scale_that_is_too_large_skips_steps_until_it_is_not(options, run_options):
    """Scaled by 2^30, a gradient of the logits is infinite in float16: the scale is halved, and no weight changes."""
    sub, watch, _ = fitted(precision="16-mixed", scale=2.0**30, run_options=run_options, **options)
    skipped = [after < before for before, after in zip(watch.scale, watch.scale[1:], strict=False)]
    still = [torch.equal(before, after) for before, after in zip(watch.w, watch.w[1:], strict=False)]
    rest = [torch.equal(before, after) for before, after in zip(watch.theta, watch.theta[1:], strict=False)]
    each = run_options.get("accumulate_grad_batches", 1)
    assert still[each - 1 :: each] == rest[each - 1 :: each] == skipped[each - 1 :: each]
    assert 5 < sum(skipped) < 15
    assert not skipped[-1]
    assert all(tensor.isfinite().all() for tensor in [*watch.w, *watch.theta])
    assert torch.allclose(watch.theta[-1], start_of(sub) + sub.directions.rmatvec(sub.w.detach()), atol=1e-5)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_step_with_infinite_gradients_is_skipped():
    """The result is as if `training_step` had returned no loss for that batch, up to four roundings.

    These come from half the scale, which changes the numbers that are rounded to zero.
    """
    sub, watch, _ = fitted(Overflows, "16-mixed")
    other, _, _ = fitted(Skips, "16-mixed")
    infinite = [not gradient.isfinite().all() for gradient in watch.gradients]
    assert [step for step, was in enumerate(infinite) if was] == [5, 13]
    assert torch.equal(watch.w[5], watch.w[6])
    assert watch.scale[-1] == 2.0**8
    assert (sub.w - other.w).norm() <= 4 * 2**-11 * other.w.norm()


def test_an_infinite_step_spoils_no_search():
    """The mean of w and Adam's state stay finite through a doubling."""
    finder = IntrinsicDimensionFinder("val_acc", 0.99, every_n_train_steps=4)

    class Adam(Overflows):
        configure_optimizers = Classifier.configure_optimizers

    sub, watch, run = fitted(Adam, "16-mixed", callbacks=[finder], dim=8, max_dim=64)
    assert [entry["dim"] for entry in finder.history] == sorted(entry["dim"] for entry in finder.history)
    assert finder.history[-1]["dim"] > 8
    assert watch.scale[-1] == 2.0**8
    assert sub.coordinates().isfinite().all()
    assert all(v.isfinite().all() for state in run.optimizers[0].state.values() for v in state.values())
    moved = sub.directions.rmatvec(sub.coordinates().detach())
    assert torch.allclose(watch.theta[-1], start_of(sub) + moved, atol=1e-5)


def test_a_search_gives_each_run_a_scale_of_its_own(tmp_path):
    """It does not matter that an earlier run has lowered its scale."""

    def value_at_128(folder, dims):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=1000)
        quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
        arguments = {"max_steps": 20, "accelerator": "cpu", "default_root_dir": folder, **quiet}
        tuner = IntrinsicDimensionTuner({**arguments, "plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}, rates=10)
        pl.seed_everything(0, verbose=False)
        result = tuner.find(
            Classifier(), train_loader(), val_loader(), dims=dims, monitor="val_loss", mode="min", baseline=0.5
        )
        assert scaler.get_scale() == 2.0**24
        return result.results["value"][-1]

    assert value_at_128(tmp_path / "two", [32, 128]) == value_at_128(tmp_path / "one", [128])


@pytest.mark.slow
def test_w_keeps_small_steps_in_half_precision(tmp_path):
    """Six hundred steps of 1e-3, each below the rounding of the sum in bfloat16, end where float32 does."""

    class Slow(Classifier):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-4)

    ends = {}
    for precision in ("32-true", "bf16-true"):
        pl.seed_everything(0, verbose=False)
        sub = SubspaceModule(Slow(), 24, lr_scale=10)
        trainer(max_steps=600, precision=precision).fit(sub, train_loader())
        assert sub.w.dtype == torch.float32
        ends[precision] = sub.w.detach().clone()
    assert (ends["bf16-true"] - ends["32-true"]).norm() <= 0.02 * ends["32-true"].norm()
    sub.bfloat16()
    assert torch.equal(sub.w, ends["bf16-true"])


def test_w_is_of_32_bits_for_weights_of_16():
    sub = SubspaceModule(made().bfloat16(), 16)
    assert (sub.w.dtype, sub.theta0()["net.0.weight"].dtype) == (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("differentiable", [False, True])
def test_weights_in_half_precision_are_rounded_once(differentiable):
    """The sum θ₀ + Dᵀ w is computed in float32, for weights in bfloat16."""
    sub = SubspaceModule(made(), 8, max_dim=50).to(torch.bfloat16)
    for block in sub.blocks:
        block.data.normal_()
    w = sub.coordinates().detach()
    steps = sub.weights.layout.unflatten(sub.directions.rmatvec(w.float()))
    expected = [(start + step).bfloat16() for start, step in zip(sub.theta0().values(), steps, strict=True)]
    sub.ready()
    found = sub.weights.values_at(sub.directions, w) if differentiable else sub.weights.parameters()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_a_module_learns_in_half_precision(precision):
    """Gradients have 8 bits."""
    sub = SubspaceModule(made(), 64, lr_scale=10)
    run = trainer(precision=precision, max_steps=80)
    run.fit(sub, train_loader(), val_loader())
    assert run.callback_metrics["val_acc"] > 0.4
    assert sub.module.net[0].weight.dtype == (torch.float32 if precision == "bf16-mixed" else torch.bfloat16)
