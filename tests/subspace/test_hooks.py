"""Hooks that read or change gradients of the weights count as they do in full training by a projected optimizer."""

import pytest
import pytorch_lightning as pl
import torch
from nets import trainer
from projected import Net, assert_same, batches, both, moved
from pytorch_lightning.plugins.precision import MixedPrecision
from pytorch_lightning.utilities import grad_norm
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch.nn.utils import clip_grad_norm_

from lightning_sketch.subspace import SubspaceModule


def clip(module):
    module.notes.append(float(clip_grad_norm_(module.parameters(), 0.05)))


def zero_of_a_layer(module):
    module.body.weight.grad.zero_()


def none_of_a_layer(module):
    module.body.bias.grad = None


def none_at_all(module):
    if module.trainer.global_step in (1, 2):
        module.zero_grad()


def noise(module):
    generator = torch.Generator().manual_seed(module.trainer.global_step)
    for p in module.parameters():
        p.grad += 0.1 * torch.randn(p.shape, dtype=torch.float64, generator=generator)


def signs(module):
    for p in module.parameters():
        p.grad = p.grad.sign() * 0.01


def norms(module):
    module.notes += [float(norm) for norm in grad_norm(module.body, 2).values()]


CHANGES = [clip, zero_of_a_layer, none_of_a_layer, none_at_all, noise, signs, norms]


def after_backward(change):
    return type("Changed", (Net,), {"on_after_backward": lambda self: change(self)})


def before_step(change):
    return type("Changed", (Net,), {"on_before_optimizer_step": lambda self, optimizer: change(self)})


def in_clipping(change):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        change(self)

    return type("Changed", (Net,), {"configure_gradient_clipping": configure_gradient_clipping})


def in_backward(change):
    def backward(self, loss):
        loss.backward()
        change(self)

    return type("Changed", (Net,), {"backward": backward})


def before_the_step(change):
    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        optimizer_closure()
        change(self)
        optimizer.step()

    return type("Changed", (Net,), {"optimizer_step": optimizer_step})


def in_a_closure(change):
    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        def closure():
            loss = optimizer_closure()
            change(self)
            return loss

        optimizer.step(closure=closure)

    return type("Changed", (Net,), {"optimizer_step": optimizer_step})


TIMES = [after_backward, before_step, in_clipping, in_backward, before_the_step, in_a_closure]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("when", TIMES, ids=lambda when: when.__name__)
def test_what_a_hook_of_the_module_does_to_gradients_of_the_weights_counts(when, change):
    sub, plain = both(when(change), scale=1.5)
    assert_same(sub, plain)
    assert moved(sub) > 1e-4


class Callback(pl.Callback):
    """Change gradients of the module inside, at one of three times."""

    def __init__(self, change):
        self.change = change

    def of(self, pl_module):
        self.change(getattr(pl_module, "module", pl_module))


class AfterBackward(Callback):
    def on_after_backward(self, trainer, pl_module):
        self.of(pl_module)


class BeforeStep(Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.of(pl_module)


class AfterStep(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.of(pl_module)


def test_a_callback_reads_gradients_of_the_weights_after_the_step_too():
    """They stay until the next ones, as in full training."""
    sub, plain = both(Net, lambda: [AfterStep(norms)])
    assert_same(sub, plain)
    assert min(sub.module.notes) > 0


@pytest.mark.parametrize("change", [clip, none_at_all, noise], ids=lambda change: change.__name__)
@pytest.mark.parametrize("kind", [AfterBackward, BeforeStep])
def test_what_a_callback_does_to_gradients_of_the_weights_counts(kind, change):
    sub, plain = both(Net, lambda: [kind(change)])
    assert_same(sub, plain)


@pytest.mark.parametrize(
    "options",
    [
        {"max_dim": 28},
        {"parameters": "last.*", "others": "full"},
        {"head": "last.*"},
        {"run": {"accumulate_grad_batches": 3}},
        {"clip": 0.02, "scale": 3.0},
    ],
    ids=lambda options: "-".join(options),
)
def test_hooks_count_in_every_kind_of_run(options):
    """Blocks of w, other parameters that the optimizer trains, accumulation, and the Trainer's clipping of w."""
    assert_same(*both(before_step(noise), **options))
    assert_same(*both(Net, **options))


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("base", [Net, before_step(clip), after_backward(noise)])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_batches_without_a_loss(base, accumulate):
    """Among them are the last one of two that are accumulated, and both of the next two."""

    def step(self, batch, batch_idx):
        return None if batch_idx in (1, 2, 3) else Net.training_step(self, batch, batch_idx)

    skips = type("Skips", (base,), {"training_step": step})
    assert_same(*both(skips, run={"accumulate_grad_batches": accumulate, "max_epochs": 2, "max_steps": -1}))


def doubled(p):
    p.register_hook(lambda g: 2 * g)


def clamped(p):
    p.register_post_accumulate_grad_hook(lambda p: torch.nn.utils.clip_grad_value_(p, 0.01))


@pytest.mark.parametrize("register", [doubled, clamped])
@pytest.mark.parametrize("when", ["__init__", "on_fit_start"])
def test_hooks_of_parameters(register, when):
    def hooked(self):
        getattr(super(type(self), self), when)()
        for p in self.body.parameters():
            register(p)

    assert_same(*both(type("Hooked", (Net,), {when: hooked})))


class Watch(pl.Callback):
    """Read gradients by hooks of parameters, as W&B does."""

    def on_train_start(self, trainer, pl_module):
        module = getattr(pl_module, "module", pl_module)
        for _, p in module.named_parameters():
            p.register_hook(lambda g: module.notes.append(float(g.norm())))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_is_watched_is_watched_once_a_batch(accumulate):
    sub, plain = both(Net, lambda: [Watch()], run={"accumulate_grad_batches": accumulate})
    assert_same(sub, plain)
    assert len(sub.module.notes) == 4 * 8 * accumulate


class OwnClipping(Net):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.clip_gradients(optimizer, 0.02 if self.current_epoch else 0.01, "norm")


def test_clipping_by_the_trainer_in_a_hook_is_of_the_gradient_of_w():
    """In units of gradients of the weights, without the scale of D, as by the Trainer's own option."""
    sub, plain = both(Net, clip=0.01, scale=2.5)
    assert_same(sub, plain)
    own = both(OwnClipping, scale=2.5)[0]
    assert all(torch.equal(p, q) for p, q in zip(own.module.parameters(), sub.module.parameters(), strict=True))


class OfW(pl.Callback):
    """Clip what the Trainer's module has as parameters, which are w."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        clip_grad_norm_(pl_module.parameters(), 0.01)


def test_a_callback_may_clip_the_parameters_of_the_module_that_is_trained():
    sub, _ = both(Net, lambda: [OfW()])
    assert_same(sub, both(Net, clip=0.01)[1])


class Both(Net):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        clip_grad_norm_(self.parameters(), 0.02)
        self.clip_gradients(optimizer, 0.01, "norm")


@pytest.mark.parametrize(("kind", "callbacks"), [(Both, list), (before_step(clip), lambda: [OfW()])])
def test_changes_of_both_gradients_are_refused(kind, callbacks):
    with pytest.raises(MisconfigurationException, match="change gradients both of the weights and of w"):
        both(kind, callbacks)


class Quasi(Net):
    def inner(self, parameters):
        return torch.optim.LBFGS(parameters, lr=0.3, max_iter=4)


class SAM(torch.optim.SGD):
    """An optimizer that takes the gradient at weights that are a little way up the gradient."""

    def step(self, closure=None):
        with torch.enable_grad():
            closure()
        parameters = [p for group in self.param_groups for p in group["params"]]
        up = [0.05 * p.grad / p.grad.norm() for p in parameters]
        for p, step in zip(parameters, up, strict=True):
            p.data.add_(step)
        with torch.enable_grad():
            loss = closure()
        for p, step in zip(parameters, up, strict=True):
            p.data.sub_(step)
        return super().step(lambda: loss)


class Sharpness(Net):
    def inner(self, parameters):
        return SAM(parameters, lr=0.05)


@pytest.mark.parametrize("kind", [Quasi, Sharpness])
@pytest.mark.parametrize("change", [None, norms, noise])
def test_closures_that_are_called_several_times(kind, change):
    """LBFGS amplifies roundings: 1e-12 of the first step are up to 1e-7 at the end."""
    methods = {"on_before_optimizer_step": lambda self, optimizer: change(self)} if change else {}
    assert_same(*both(type("Changed", (kind,), methods), steps=4), rtol=1e-6)


class Single(Net):
    """A network of float32, whose hooks note norms of gradients and clip them."""

    def __init__(self):
        super().__init__()
        self.float()

    def training_step(self, batch, batch_idx):
        return super().training_step([part.float() for part in batch], batch_idx)

    def on_after_backward(self):
        norms(self)

    def on_before_optimizer_step(self, optimizer):
        clip(self)


class Fused(Single):
    """The same, with an optimizer that divides by the scale of the loss itself."""

    def inner(self, parameters):
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, fused=True)


@pytest.mark.parametrize("kind", [Single, Fused])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_hooks_see_gradients_without_the_scale_of_the_loss(kind, accumulate):
    """They see those of float32, and w takes its steps, to a rounding of float16: 0.75 was measured, 2 are allowed.

    The scale is doubled in every third step.
    """
    found = []
    for half in (False, True):
        pl.seed_everything(7, verbose=False)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
        plugins = [MixedPrecision("16-mixed", "cpu", scaler)] if half else []
        sub = SubspaceModule(kind(), 7)
        trainer(plugins=plugins, accumulate_grad_batches=accumulate).fit(sub, batches())
        found.append((sub.w.detach(), torch.tensor(sub.module.notes)))
    for exact, rounded in zip(*found, strict=True):
        assert 0 < (exact - rounded).norm() <= 2 * 2**-11 * exact.norm()
