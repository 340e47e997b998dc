"""Searches that are over, and those that are refused."""

import pytest
import torch
from edges import Given, nested, searched
from nets import train_loader, trainer, val_loader
from pytorch_lightning.callbacks import StochasticWeightAveraging
from pytorch_lightning.utilities.exceptions import MisconfigurationException


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
