"""Searches that are over or refused, and what a step returns or raises."""

import pytest
import pytorch_lightning as pl
import torch
from edges import Given, find, judged, made, nested, searched
from nets import Classifier, Tied, train_loader, trainer, val_loader
from pytorch_lightning.callbacks import StochasticWeightAveraging
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lightning_sketch.subspace import SubspaceModule


def test_what_reaches_the_target_is_not_doubled_however_little_better_it_is():
    finder, sub, _ = searched([0.88, 0.91])
    assert sub.directions.dim == finder.suggestion() == 8


def test_a_fit_that_fails_after_a_search_was_over_leaves_w_alone():
    class Model(Given):
        values = (0.95,)

        def training_step(self, batch, batch_idx):
            if self.trainer.max_steps == 5:
                raise RuntimeError("no step")
            return super().training_step(batch, batch_idx)

    finder, sub, _ = searched([], sub=nested(Model))
    sub.blocks[0].data.fill_(0.5)
    with pytest.raises(RuntimeError, match="no step"):
        trainer(finder, max_steps=5).fit(sub, train_loader(), val_loader())
    assert torch.equal(sub.coordinates(), torch.full((8,), 0.5))


def test_averages_of_the_last_epochs_are_refused():
    with pytest.raises(MisconfigurationException, match="leave out the callback that averages"):
        searched([0.1], StochasticWeightAveraging(swa_lrs=0.01))


def test_means_go_from_the_smallest_dimension_on(tmp_path):
    """Though a search is verified at half of what it found, which comes after it."""
    assert list(find(judged(), tmp_path, method="doubling", baseline=1.0).means()) == [2, 4]


def test_a_frozen_weight_of_two_names_is_saved_under_neither():
    assert SubspaceModule(made(Tied), 16, parameters="net.0.*").state_dict().keys() == {"w", "_extra_state"}


class Returns(Classifier):
    """A dict."""

    returned = ("loss", "more")

    def training_step(self, batch, batch_idx):
        return {name: super(Returns, self).training_step(batch, batch_idx) for name in self.returned}


def test_what_a_step_returns_beside_its_loss_is_handed_on():
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(set(outputs))

    trainer(Watch(), max_steps=1).fit(SubspaceModule(made(Returns), 16, lr_scale=10), train_loader())
    assert seen == [{"loss", "more"}]


def test_a_dict_without_a_loss_is_lightnings_to_refuse():
    model = made(type("Model", (Returns,), {"returned": ("more",)}))
    with pytest.raises(MisconfigurationException, match="'loss' key needs to be present"):
        trainer(max_steps=1).fit(SubspaceModule(model, 16, lr_scale=10), train_loader())


def test_a_step_that_fails_leaves_the_weights_frozen():
    class Model(Classifier):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("no loss")

    sub = SubspaceModule(made(Model), 16, lr_scale=10)
    with pytest.raises(RuntimeError, match="no loss"):
        trainer(max_steps=1).fit(sub, train_loader())
    assert [name for name, parameter in sub.named_parameters() if parameter.requires_grad] == ["w"]
