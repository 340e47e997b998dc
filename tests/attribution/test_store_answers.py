"""The scores of a store, after real training, are those of the same rows in memory."""

import functools
import inspect

import pytest
import torch
import torch.nn.functional as F
from models import Digits, dataset, trainer
from pytorch_lightning import seed_everything
from torch.utils.data import DataLoader, Subset

from lightning_sketch import GradientSketchWriter, GradientStore
from lightning_sketch.attribution import IndexedDataset, fit_ggn, scores, self_influence, sketch_gradients, top_k


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
    with pytest.warns(UserWarning, match="trained by Adam: tracin ranks them, but its scale is that of steps of SGD"):
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


def test_a_curvature_that_no_row_can_use_is_said_before_it_is_computed(trained):
    """At the weights of a new model, as after a checkpoint that was not loaded."""
    store = trained[0]
    with pytest.warns(UserWarning, match=r"at which the store has no rows .*load the checkpoint"):
        with pytest.raises(RuntimeError, match="the first batch"):
            store.fit_curvature(Digits(), (_fails("the first batch") for _ in range(1)), model_fn=logits)


def _fails(what):
    raise RuntimeError(what)


FORWARDED = {
    "sketch_gradients": (sketch_gradients, {"sketch", "parameters"}),
    "fit_curvature": (fit_ggn, {"sketch", "layout"}),
    "scores": (scores, {"train"}),
    "top_k": (top_k, {"train", "approximate"}),
    "self_influence": (self_influence, {"train"}),
}


@pytest.mark.parametrize("name", FORWARDED)
def test_a_method_takes_what_its_function_takes(name):
    """All arguments with their defaults, but for those that the store knows itself."""
    function, known = FORWARDED[name]
    own = {"self", *(["curvature"] if name == "fit_curvature" else [])}
    parameters = inspect.signature(getattr(GradientStore, name)).parameters
    taken = {key: value.default for key, value in parameters.items() if key not in own}
    assert taken == {k: v.default for k, v in inspect.signature(function).parameters.items() if k not in known}


@pytest.mark.filterwarnings("ignore:.*few examples")
def test_an_argument_of_a_method_reaches_its_function(trained):
    """Each differs from its default, which gives another answer."""
    store, model, held_out = trained
    store = store.where(stage="validate")
    making = {"loss_fn": lambda m, b: 3 * F.cross_entropy(logits(m, b), b[1]), "engine": "loop", "index_key": "hash"}
    queries = store.sketch_gradients(model, held_out, **making)
    same = sketch_gradients(model, held_out, store.sketch, **making)
    torch.testing.assert_close(queries.sketches, same.sketches)
    assert torch.equal(queries.example_id, same.example_id)

    fitting = {"model_fn": logits, "max_classes": 2, "draws": 3, "seed": 5}
    layout = store.spec.parameters
    dense = fit_ggn(model, held_out, store.sketch, layout, **fitting).dense()
    torch.testing.assert_close(store.fit_curvature(model, held_out, **fitting).dense(), dense)

    asking = {"method": "influence", "curvature": "fisher", "damping": 0.37, "batch_rows": 7}
    summed = asking | {"group": "example_id"}
    torch.testing.assert_close(store.scores(queries, **summed), scores(queries, store, **summed))
    assert not torch.allclose(store.scores(queries, **asking), store.scores(queries, **asking | {"damping": "auto"}))
    found, true = (
        best(k=3, largest=False, group=None, **asking)
        for best in (functools.partial(store.top_k, queries), functools.partial(top_k, queries, store))
    )
    torch.testing.assert_close(found.scores, true.scores)
    assert torch.equal(found.example_ids, true.example_ids)
    torch.testing.assert_close(store.self_influence(**asking).scores, self_influence(store, **asking).scores)
    assert not torch.allclose(store.self_influence(**asking).scores, store.self_influence(method="dot").scores)
