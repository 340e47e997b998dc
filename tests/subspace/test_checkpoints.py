"""A checkpoint contains w, the buffers and a few integers; it resumes exactly, and is refused by other modules."""

import copy

import pytest
import pytorch_lightning as pl
import torch
from nets import Classifier, Convolutional, Tied, train_loader, trainer, val_loader
from pytorch_lightning.callbacks import ModelCheckpoint
from small_searches import made, nested, searched
from torch import nn

from lightning_sketch.subspace import IntrinsicDimensionFinder, SubspaceModule


def wrapped(kind=Convolutional, seed=0, dim=32, **options):
    pl.seed_everything(seed, verbose=False)
    return SubspaceModule(kind(), dim, **{"scale": 10, **options})


def saved(sub, folder, steps=8, **options):
    run = trainer(max_steps=steps, **options)
    run.fit(sub, train_loader())
    run.save_checkpoint(folder / "a.ckpt")
    return folder / "a.ckpt"


def test_what_is_in_it(tmp_path):
    sub = wrapped(dim=32)
    path = saved(sub, tmp_path)
    checkpoint = torch.load(path, weights_only=True)
    (note,) = (name for name in checkpoint["state_dict"] if " " in name)
    assert checkpoint["state_dict"][note].numel() == 0
    assert checkpoint["state_dict"].keys() - {note} == {
        "w",
        "_extra_state",
        "module.net.2.running_mean",
        "module.net.2.running_var",
        "module.net.2.num_batches_tracked",
    }
    assert checkpoint["state_dict"]["_extra_state"]["directions"] == {
        "kind": "block_srht",
        "n": sub.n,
        "dim": 32,
        "seed": 0,
        "rng": "v1",
        "nested": False,
    }
    largest = max(t.numel() for s in checkpoint["optimizer_states"] for g in s["state"].values() for t in g.values())
    assert largest == 32


def test_a_plain_module_says_how_to_load_it(tmp_path):
    """By `load_from_checkpoint` and by a resumed fit; what the message says to type gives the trained module."""
    sub = wrapped(dim=32)
    path = saved(sub, tmp_path)
    words = (
        r"of a SubspaceModule: call load_from_checkpoint\(path, module=YourModule\(\)\) of that class, and materialize"
    )
    with pytest.raises(RuntimeError, match=words):
        Convolutional.load_from_checkpoint(path)
    with pytest.raises(RuntimeError, match=words):
        trainer(max_steps=16).fit(Convolutional(), train_loader(), ckpt_path=path)
    pl.seed_everything(0, verbose=False)
    plain = SubspaceModule.load_from_checkpoint(path, module=Convolutional()).materialize()
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), sub.materialize().parameters(), strict=True))


def test_a_checkpoint_holds_no_function(tmp_path):
    sub = SubspaceModule(made(), 8, optimizer_fn=lambda params: torch.optim.SGD(params, lr=0.1))
    run = trainer(max_steps=1)
    run.fit(sub, train_loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    assert "optimizer_fn" not in torch.load(tmp_path / "a.ckpt", weights_only=True)["hyper_parameters"]


def test_what_the_module_saves_in_a_checkpoint_it_finds_there(tmp_path):
    class Model(Classifier):
        def on_save_checkpoint(self, checkpoint):
            checkpoint["own"] = 5

        def on_load_checkpoint(self, checkpoint):
            self.own = checkpoint["own"]

    run = trainer(max_steps=1)
    run.fit(SubspaceModule(made(Model), 16, scale=10), train_loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    sub = SubspaceModule(made(Model), 16, scale=10)
    trainer(max_steps=1).fit(sub, train_loader(), ckpt_path=tmp_path / "a.ckpt")
    assert sub.module.own == 5


class Settled(Convolutional):
    """A network without dropout, since checkpoints do not contain the random state."""

    def network(self, width):
        return nn.Sequential(*(part for part in super().network(width) if not isinstance(part, nn.Dropout)))


def in_one_go_and_resumed(folder, kind=Settled, callback=list, **options):
    """Train three epochs, and resume a new module after the first; return both modules and the checkpoint."""
    whole, resumed = wrapped(kind, **options), wrapped(kind, **options)
    keep = ModelCheckpoint(folder, every_n_epochs=1, save_top_k=-1)
    long = {"max_epochs": 3, "max_steps": -1}
    trainer(keep, *callback(), **long, enable_checkpointing=True).fit(whole, train_loader())
    path = folder / "epoch=0-step=8.ckpt"
    trainer(*callback(), **long).fit(resumed, train_loader(), ckpt_path=path)
    return whole, resumed, torch.load(path, weights_only=True)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("options", [{}, {"parameters": "net.1.*", "others": "full"}])
def test_resume_is_exact(tmp_path, options):
    """All parameters and buffers have the same bits."""
    whole, resumed, _ = in_one_go_and_resumed(tmp_path, **options)
    for (name, one), other in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert one == other if name == "_extra_state" else torch.equal(one, other), name
    for one, other in zip(whole.module.parameters(), resumed.module.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_resume_of_a_search_is_exact(tmp_path):
    """After doublings: the history, the mean of w, and the optimizer's averages and step counts."""

    def run(callbacks=(), path=None):
        finder = IntrinsicDimensionFinder("val_acc", 0.99, every_n_train_steps=6)
        sub = wrapped(Classifier, dim=8, max_dim=64)
        options = {"max_epochs": 5, "max_steps": -1, "enable_checkpointing": bool(callbacks)}
        trainer(finder, *callbacks, **options).fit(sub, train_loader(), val_loader(), ckpt_path=path)
        return sub, finder

    keep = ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1, save_on_train_epoch_end=True)
    whole, found = run([keep])
    resumed, again = run(path=tmp_path / "epoch=2-step=24.ckpt")
    assert found.history == again.history
    assert [entry["dim"] for entry in found.history if entry["step"] <= 24][-1] > 8
    assert len(found.history) == 6
    assert whole.directions == resumed.directions
    assert torch.equal(whole.coordinates(), resumed.coordinates())


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_search_resumes_in_the_middle_of_a_window(tmp_path):
    """At step 16 of a window that ends at 18: the w of that step is in the mean that is validated."""

    def run(callbacks=(), path=None):
        finder = IntrinsicDimensionFinder("val_loss", 0.0, mode="min", every_n_train_steps=6)
        sub = nested()
        options = {"max_epochs": 3, "max_steps": -1, "enable_checkpointing": bool(callbacks)}
        trainer(finder, *callbacks, **options).fit(sub, train_loader(), val_loader(), ckpt_path=path)
        return finder

    whole = run([ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1, save_on_train_epoch_end=True)])
    assert run(path=tmp_path / "epoch=1-step=16.ckpt").history == whole.history
    assert [entry["step"] for entry in whole.history] == [6, 12, 18, 24]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`", "ignore:You're resuming from a checkpoint")
@pytest.mark.parametrize("step", [8, 16])
def test_a_search_resumes_right_before_a_judgement(tmp_path, step):
    """A checkpoint of the very step after which validation runs, saved before it, at the end of an epoch."""

    def run(callbacks=(), path=None):
        finder = IntrinsicDimensionFinder("val_acc", 0.99, every_n_train_steps=8)
        sub = wrapped(Classifier, dim=8, max_dim=64)
        options = {"max_epochs": 4, "max_steps": -1, "enable_checkpointing": bool(callbacks)}
        trainer(finder, *callbacks, **options).fit(sub, train_loader(), val_loader(), ckpt_path=path)
        return sub, finder

    whole, found = run([ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=step, save_top_k=-1)])
    resumed, again = run(path=tmp_path / f"step={step}.ckpt")
    assert again.history == found.history
    assert found.history[0]["step"] == 8
    assert torch.equal(resumed.coordinates(), whole.coordinates())


def test_a_search_that_is_over_is_over_when_it_is_resumed(tmp_path):
    """A checkpoint contains the result."""
    finder, sub, run = searched([0.1, 0.95])
    run.save_checkpoint(tmp_path / "a.ckpt")
    again = IntrinsicDimensionFinder("value", 0.9, every_n_train_steps=4)
    trainer(again, max_steps=8).fit(
        nested(type(sub.module)), train_loader(), val_loader(), ckpt_path=tmp_path / "a.ckpt"
    )
    assert again.suggestion() == finder.suggestion() == 8
    assert again.history == finder.history


def test_load_from_checkpoint(tmp_path):
    sub = wrapped(dim=32, seed=0)
    path = saved(sub, tmp_path)
    pl.seed_everything(0, verbose=False)
    found = SubspaceModule.load_from_checkpoint(path, module=Convolutional())
    assert torch.equal(found.w, sub.w)
    assert torch.equal(found.module.net[1].weight, sub.module.net[1].weight)
    assert torch.equal(found.module.net[2].running_mean, sub.module.net[2].running_mean)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"seed": 1}, r"other initial weights(.|\n)*fingerprint(.|\n)*save_theta0"),
        ({"sketch": "qk"}, r"other directions(.|\n)*block_srht(.|\n)*qk"),
        ({"dim": 16}, r"other directions(.|\n)*'dim': 32(.|\n)*'dim': 16"),
        ({"parameters": "net.1.*", "dim": 32}, "other directions"),
    ],
)
def test_it_goes_into_no_other_module(tmp_path, options, said):
    path = saved(wrapped(), tmp_path)
    other = wrapped(**options)
    before = other.w.clone(), other.module.net[2].running_mean.clone()
    with pytest.raises(ValueError, match=said):
        trainer(max_steps=16).fit(other, train_loader(), ckpt_path=path)
    assert torch.equal(before[0], other.w)
    assert torch.equal(before[1], other.module.net[2].running_mean)


def test_a_plain_checkpoint_is_refused():
    with pytest.raises(ValueError, match="not a checkpoint of a SubspaceModule"):
        wrapped().load_state_dict(Convolutional().state_dict())


def test_with_theta0_it_is_whole(tmp_path):
    sub = wrapped(save_theta0=True, parameters="net.1.*")
    path = saved(sub, tmp_path)
    other = wrapped(seed=1, save_theta0=True, parameters="net.1.*")
    other.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    for one, same in zip(sub.module.parameters(), other.module.parameters(), strict=True):
        assert torch.equal(one, same)
    assert other.get_extra_state() == sub.get_extra_state()


def test_theta0_that_is_loaded_is_where_the_weights_are_though_w_is_the_same():
    """Neither module is trained, so w is zero in both."""
    sub, other = (SubspaceModule(made(seed=seed), 16, save_theta0=True) for seed in (0, 1))
    other.load_state_dict(sub.state_dict())
    assert all(torch.equal(one, same) for one, same in zip(sub.parameters(), other.parameters(), strict=True))


def test_weights_trained_in_full_are_kept(tmp_path):
    sub = wrapped(parameters="net.1.*", others="full")
    path = saved(sub, tmp_path)
    other = wrapped(parameters="net.1.*", others="full")
    other.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    assert torch.equal(sub.module.net[6].weight, other.module.net[6].weight)


def test_what_is_trained_in_full_is_saved_though_it_is_as_at_the_start():
    options = {"parameters": "net.0.*", "others": "full"}
    sub = SubspaceModule(made(), 8, **options)
    module = made()
    nn.init.zeros_(module.net[2].weight)
    (other := SubspaceModule(module, 8, **options)).load_state_dict(sub.state_dict())
    assert torch.equal(other.net[2].weight, sub.net[2].weight)


def test_frozen_weights_that_are_not_saved_must_be_the_same():
    options = {"parameters": "net.0.*", "scale": 10}
    sub = SubspaceModule(made(), 8, **options)
    trainer(max_steps=2).fit(sub, train_loader())
    module = made()
    nn.init.zeros_(module.net[2].weight)
    with pytest.raises(ValueError, match="other initial weights"):
        SubspaceModule(module, 8, **options).load_state_dict(sub.state_dict())


class Compiled(Classifier):
    """A module with a compiled part, whose parameters have a prefix in their names."""

    def network(self, width):
        return torch.compile(super().network(width), backend="eager")


@pytest.mark.parametrize("save_theta0", [False, True])
@pytest.mark.parametrize("kind", [Tied, Compiled])
def test_a_weight_that_w_determines_is_saved_under_none_of_its_names(kind, save_theta0):
    options = {"scale": 10, "save_theta0": save_theta0}
    sub, other = SubspaceModule(made(kind), 16, **options), SubspaceModule(made(kind), 16, **options)
    before = copy.deepcopy(sub.state_dict())
    trainer(max_steps=2).fit(sub, train_loader())
    assert {name for name in sub.state_dict() if not name.startswith("theta0.")} == {"w", "_extra_state"}
    for state, expected in ((sub.state_dict(), sub), (before, SubspaceModule(made(kind), 16))):
        other.load_state_dict(state)
        assert all(torch.equal(one, same) for one, same in zip(expected.parameters(), other.parameters(), strict=True))


def test_a_frozen_weight_of_two_names_is_saved_under_neither():
    assert SubspaceModule(made(Tied), 16, parameters="net.0.*").state_dict().keys() == {"w", "_extra_state"}


def test_model_checkpoint_and_best(tmp_path):
    keep = ModelCheckpoint(tmp_path, monitor="val_acc", mode="max")
    sub = wrapped(Classifier)
    run = trainer(keep, max_steps=24, enable_checkpointing=True)
    run.fit(sub, train_loader(), val_loader())
    found = run.validate(sub, val_loader(), ckpt_path="best", verbose=False)
    assert found[0]["val_acc"] == pytest.approx(float(keep.best_model_score))


def test_loading_into_a_copy_changes_only_the_copy():
    sub = wrapped(Classifier)
    trainer().fit(sub, train_loader())
    state = copy.deepcopy(sub.state_dict())
    other = wrapped(Classifier)
    other.load_state_dict(state)
    assert torch.equal(other.module.net[0].weight, sub.module.net[0].weight)
    other.w.data.zero_()
    other.ready()
    assert not torch.equal(other.module.net[0].weight, sub.module.net[0].weight)


class MeanTeacher(Classifier):
    """A module with a frozen network in its loss, which follows the trained one."""

    def __init__(self):
        super().__init__()
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)
        self.still = nn.Linear(4, 4).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + (self(batch[0]) - self.teacher(batch[0])).square().mean()

    @torch.no_grad()
    def on_train_batch_end(self, outputs, batch, batch_idx):
        for old, new in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
            old.lerp_(new, 0.1)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_frozen_weights_that_the_module_moves_are_kept(tmp_path):
    """Frozen weights that the module does not change are not saved; resuming is exact."""
    whole, resumed, checkpoint = in_one_go_and_resumed(tmp_path, MeanTeacher)
    assert {name.split(".")[1] for name in checkpoint["state_dict"] if "." in name} == {"teacher"}
    assert torch.equal(whole.w, resumed.w)
    assert torch.equal(whole.module.teacher[0].weight, resumed.module.teacher[0].weight)


def test_a_checkpoint_from_before_they_moved_goes_into_a_new_module_only():
    sub = wrapped(MeanTeacher)
    state = copy.deepcopy(sub.state_dict())
    trainer().fit(sub, train_loader())
    with pytest.raises(ValueError, match="into a new module"):
        sub.load_state_dict(state)
    wrapped(MeanTeacher).load_state_dict(state)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_what_holds_the_wrapper_can_load_it(tmp_path):
    """EMAWeightAveraging has the wrapper in a module of its own; other initial weights are refused there too."""
    averaging = pytest.importorskip("pytorch_lightning.callbacks.weight_averaging", reason="needs Lightning 2.6")
    whole, resumed, _ = in_one_go_and_resumed(tmp_path, callback=lambda: [averaging.EMAWeightAveraging(decay=0.9)])
    assert torch.equal(whole.w, resumed.w)
    assert torch.equal(whole.module.net[1].weight, resumed.module.net[1].weight)
    with pytest.raises(ValueError, match="other initial weights"):
        nn.ModuleList([wrapped(seed=1)]).load_state_dict(nn.ModuleList([whole]).state_dict())


@pytest.mark.parametrize("save_theta0", [False, True])
def test_what_holds_a_subspace_saves_and_loads_what_it_would_by_itself(save_theta0):
    options = {"parameters": "net.0.*", "save_theta0": save_theta0, "scale": 10}
    sub, other = SubspaceModule(made(), 16, **options), SubspaceModule(made(seed=int(save_theta0)), 16, **options)
    trainer(max_steps=2).fit(sub, train_loader())
    state = nn.ModuleDict({"a": sub}).state_dict()
    assert state.keys() == {f"a.{name}" for name in sub.state_dict()}
    assert any("theta0" in name for name in state) == save_theta0
    nn.ModuleDict({"a": other}).load_state_dict(state)
    assert all(torch.equal(one, same) for one, same in zip(sub.parameters(), other.parameters(), strict=True))


class Backbone(Classifier):
    def __init__(self):
        super().__init__()
        self.net[0].requires_grad_(False)


def test_frozen_weights_that_were_cast_have_not_been_changed(tmp_path):
    """They are not saved because of a cast, and an earlier checkpoint can be loaded."""
    sub = wrapped(Backbone)
    path = saved(sub, tmp_path)
    for _ in range(2):
        trainer(precision="bf16-true").validate(sub, val_loader(), ckpt_path=path, verbose=False)
    assert sub.state_dict().keys() == {"w", "_extra_state"}
    sub.double().load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    with torch.no_grad():
        sub.module.net[0].bias += 1
    sub.float()
    assert "module.net.0.bias" in sub.state_dict()
