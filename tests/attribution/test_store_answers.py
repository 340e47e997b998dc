"""The scores of a store, after real training, are those of the same rows in memory."""

import pytest
import torch
from models import Digits, dataset, trainer
from pytorch_lightning import seed_everything
from torch.utils.data import DataLoader, Subset

from lightning_sketch import GradientSketchWriter, GradientStore
from lightning_sketch.attribution import IndexedDataset, scores, self_influence, top_k


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two epochs on 256 digits, the validation examples' rows at each, and a row per training example at the end."""
    folder = tmp_path_factory.mktemp("trained")

    class Checked(Digits):
        def validation_step(self, batch, batch_idx):
            pass

    seed_everything(3, verbose=False)
    model, data = Checked(), DataLoader(IndexedDataset(dataset()), batch_size=32, shuffle=True)
    held_out = DataLoader(Subset(IndexedDataset(dataset(276)), range(256, 276)), batch_size=20)
    watch = GradientSketchWriter(folder / "store", dim=256, queries="val", dtype="float32")
    run = trainer(folder, watch)
    run.fit(model, data, held_out)
    run.validate(model, DataLoader(IndexedDataset(dataset()), batch_size=64))
    return GradientStore.open(watch.dirpath), model, held_out


def logits(module, batch):
    return module.net(batch[0])


@pytest.mark.filterwarnings("ignore:.*few examples")
@pytest.mark.parametrize("method", ["dot", "cosine", "influence"])
def test_at_the_final_weights(trained, method):
    """The rows of examples are scored, the rows of steps are not; with a curvature that is saved in the store."""
    store, model, held_out = trained
    queries = store.sketch_gradients(model, held_out)
    store.fit_curvature(model, held_out, model_fn=logits)
    assert len(store) == 16 + 256
    rows = store.where(stage="validate").read()
    options = {"method": method, "curvature": "fisher"}
    found = store.scores(queries, **options)
    torch.testing.assert_close(found, scores(queries, rows, **options))
    assert found.shape == (20, 256)
    best = store.top_k(queries, 5, **options)
    assert torch.equal(best.example_ids, top_k(queries, rows, 5, **options).example_ids)
    assert rows.example_id[found.argmax(1)].tolist() == best.example_ids[:, 0].tolist()
    if method == "influence":
        saved = store.scores(queries, method=method)  # "ggn", from the folder of the store
        assert saved.shape == found.shape
        assert not torch.equal(saved, found)


def test_other_weights_are_refused_and_tracin_needs_no_checkpoint_files(trained):
    store, _, held_out = trained
    stranger = Digits()
    queries = store.sketch_gradients(stranger, held_out)
    with pytest.raises(ValueError, match="weights"):
        store.scores(queries)
    fitted = store.where(stage="fit")
    assert list(store.queries()) == [8, 16]
    found = fitted.scores(store.queries(), method="tracin")
    assert found.shape == (20, 16)
    q, rows = store.queries(), fitted.read()
    expected = torch.cat(
        [q[8].sketches @ (rows.lr * rows.sketches.T)[:, :16]], 1
    )  # of steps 1..8 and, from 8 on, 9..16
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-8)


def test_training_on_an_example_lowers_its_own_loss(trained):
    store, _, _ = trained
    found = store.where(stage="validate").self_influence(method="dot")
    assert (found.scores > 0).all()
    assert sorted(found.example_ids.tolist()) == list(range(256))
    torch.testing.assert_close(found.scores, self_influence(store.where(stage="validate").read(), method="dot").scores)


def test_only_the_gauss_newton_matrix_needs_to_be_fitted(trained, untyped):
    store, model, held_out = trained
    with pytest.raises(ValueError, match="'margin' is made from the rows"):
        store.fit_curvature(model, held_out, curvature="margin")
