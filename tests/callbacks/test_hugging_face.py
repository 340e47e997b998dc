"""Callbacks for the Trainer of Hugging Face: spectra of what it trains, rows of its steps, and training as without."""

import copy
import json
import math
import random
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from marks import slow
from torch.utils.data import ConcatDataset, Dataset, IterableDataset

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="the Trainer of transformers needs accelerate")
pytest.importorskip("transformers.trainer", reason="a peft that this transformers is too old for", exc_type=ImportError)

from transformers import (  # noqa: E402
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from lightning_sketch import GradientStore, sketch_gradients  # noqa: E402
from lightning_sketch.autodiff.fingerprint import module_fingerprint  # noqa: E402
from lightning_sketch.autodiff.layout import Layout  # noqa: E402
from lightning_sketch.callbacks.hugging_face import GradientSketchCallback, SpectrumCallback  # noqa: E402

LATER = tuple(map(int, transformers.__version__.split(".")[:2])) >= (4, 46)  # compute_loss_func, num_items_in_batch
SHORT = {"num_matvecs": 12, "dim": 64, "top_k": 2, "bottom_k": 1, "num_batches": 2}


class Tokens(Dataset):
    """Sequences of tokens, some of which are padding: their labels are -100."""

    def __init__(self, examples=24, noisy=False):
        draw = torch.Generator().manual_seed(1)
        self.rows = torch.randint(11, (examples, 6), generator=draw)
        self.lengths = torch.randint(3, 7, (examples,), generator=draw).tolist()
        self.noisy, self.own, self.calls = noisy, torch.Generator().manual_seed(2), 0

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, place):
        row = self.rows[place].clone()
        self.calls += 1
        if self.noisy:
            row[0] = int(torch.randint(11, (), generator=self.own))
            row[1] = (random.randrange(11) + np.random.randint(11) + int(torch.randint(11, ()))) % 11
        padded = torch.arange(6) >= self.lengths[place]
        return {"input_ids": row, "attention_mask": (~padded).long(), "labels": row.masked_fill(padded, -100)}


def language_model(dropout=0.0):
    torch.manual_seed(0)
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    own = {"bos_token_id": 0, "eos_token_id": 0, "attn_implementation": "eager", **drops}
    return GPT2LMHeadModel(GPT2Config(vocab_size=11, n_embd=4, n_layer=1, n_head=2, n_positions=6, **own))


def classifier():
    torch.manual_seed(0)
    sizes = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 6}
    own = {"attn_implementation": "eager", "max_position_embeddings": 6, "num_labels": 3}
    return BertForSequenceClassification(BertConfig(vocab_size=11, **sizes, **own))


def trainer_of(path, model, data, kind=Trainer, *, own=None, **arguments):
    usual = {"per_device_train_batch_size": 4, "max_steps": 4, "learning_rate": 0.05, "lr_scheduler_type": "constant"}
    usual |= {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    return kind(model, TrainingArguments(str(path), **{**usual, **arguments}), train_dataset=data, **(own or {}))


def trained(trainer, *callbacks, **options):
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.train(**options)
    return trainer


def dense_hessian(module, loss):
    """Return the Hessian of a loss (a function of the module) at its parameters, in evaluation mode and float64."""
    module = copy.deepcopy(module).double().eval()
    names, shapes = zip(*((name, p.shape) for name, p in module.named_parameters()), strict=True)

    def of_vector(vector):
        parts = vector.split([shape.numel() for shape in shapes])
        values = {n: part.view(shape) for n, part, shape in zip(names, parts, shapes, strict=True)}
        return loss(lambda batch: torch.func.functional_call(module, values, kwargs=batch, tie_weights=True).logits)

    start = torch.cat([p.detach().reshape(-1) for p in module.parameters()])
    return torch.autograd.functional.hessian(of_vector, start)


def drawn(data, seed, number):
    """Return the examples that a callback draws, as one batch."""
    rows = [data[place] for place in random.Random(seed).sample(range(len(data)), number)]
    return {key: torch.stack([torch.as_tensor(row[key]) for row in rows]) for key in rows[0]}


def token_loss(batch, smoothing=0.0):
    """Return the mean over all labels of all examples, as one function of the logits."""

    def loss(logits_of):
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        logits, labels = logits_of(inputs)[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
        return F.cross_entropy(logits, labels, ignore_index=-100, label_smoothing=smoothing)

    return loss


def assert_eigenvalues(measured, dense):
    """Compare those that have converged: to their error bars, and float32 in which the loss of GPT-2 is computed."""
    values = torch.linalg.eigvalsh(dense).flip(0)
    found, error = measured.eigenvalues, measured.residuals + 2e-4 * values.abs().max()
    assert measured.converged[:3].all()
    assert ((found[:3] - values[:3]).abs() <= error[:3]).all()
    assert abs(found[-1] - values[-1]) <= error[-1]


@pytest.mark.slow
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_eigenvalues_are_those_of_the_mean_over_all_labels_of_the_drawn_examples(tmp_path, smoothing):
    """Batches of five examples differ in their numbers of labels."""
    model, data = language_model(dropout=0.5), Tokens()
    before = copy.deepcopy(model)
    trainer = trainer_of(
        tmp_path, model, data, per_device_train_batch_size=5, label_smoothing_factor=smoothing, max_steps=1
    )
    watch = SpectrumCallback(trainer, top_k=3, bottom_k=1, num_matvecs=96, num_batches=3, at_start=True, seed=4)
    trained(trainer, watch)
    first, last = watch.history
    assert (first.step, first.epoch, last.step, last.epoch) == (0, 0, 1, 0)
    batch = drawn(data, 4, 15)
    for measured, module in ((first, before), (last, model)):
        assert_eigenvalues(measured, dense_hessian(module, token_loss(batch, smoothing)))


@pytest.mark.slow
def test_a_classifier_weighs_examples_and_what_is_logged_is_what_was_measured(tmp_path):
    rows = Tokens().rows
    data = [{"input_ids": row, "labels": int(row[0]) % 3} for row in rows]
    trainer = trainer_of(tmp_path, classifier(), data, per_device_train_batch_size=8, optim="sgd", max_grad_norm=1e3)
    trainer.args.max_steps, batches = 6, [{"input_ids": rows[:7], "labels": rows[:7, 0] % 3}]
    batches.append({"input_ids": rows[7:9], "labels": rows[7:9, 0] % 3})
    watch = trained_watch = SpectrumCallback(
        trainer, top_k=3, bottom_k=2, num_matvecs=96, batches=iter(batches), every_n_train_steps=3
    )
    trained(trainer, trained_watch)

    def loss(logits_of):
        return F.cross_entropy(logits_of({"input_ids": rows[:9]}), rows[:9, 0] % 3)

    assert_eigenvalues(watch.history[-1], dense_hessian(trainer.model, loss))
    logged = [entry for entry in trainer.state.log_history if "hessian/lambda_max" in entry]
    assert [(entry["step"], entry["epoch"]) for entry in logged] == [(3, 1.0), (6, 2.0)]
    assert [(m.step, m.epoch) for m in watch.history] == [(3, 0), (6, 1)]
    for entry, m in zip(logged, watch.history, strict=True):
        assert entry["hessian/lambda_max"] == entry["hessian_eigenvalues/top_01"] == m.lambda_max
        assert entry["hessian/lambda_min"] == entry["hessian_eigenvalues/bottom_01"]
        assert entry["hessian/stability_ratio"] == pytest.approx(m.lambda_max * 0.05 / 2)  # SGD's edge is 2 / lr
        assert entry["hessian/trace"] == m.trace
        assert {"hessian/rneg", "hessian/num_outliers", "hessian_eigenvalues/top_03"} < entry.keys()
        assert math.isfinite(entry["hessian/critical_learning_rate"]) or m.critical.factor == 0
        assert "of the edge (SGD, lr 0.05)" in m.verdict
    assert watch.plot().axes


class Rescaled(Trainer):
    """A Trainer with a loss of its own, which logs, and changes its batch."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        labels = inputs.pop("labels")
        self.log({"own": 1.0})
        output = model(**inputs)
        return 3 * F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.parametrize("way", ["compute_loss", "compute_loss_func"])
def test_the_loss_is_the_trainers_own_and_logs_nothing_more(tmp_path, way):
    if way == "compute_loss_func" and not LATER:
        pytest.skip("later transformers have compute_loss_func")

    def thrice(outputs, labels, num_items_in_batch=None):
        return 3 * F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    data = Tokens(12)
    kind, own = (Rescaled, None) if way == "compute_loss" else (Trainer, {"compute_loss_func": thrice})
    trainer = trainer_of(tmp_path, language_model(), data, kind, own=own, max_steps=2, per_device_train_batch_size=12)
    watch = SpectrumCallback(trainer, **{**SHORT, "num_batches": 1}, at_start=True, every_n_train_steps=9)
    before = copy.deepcopy(trainer.model).eval()
    trained(trainer, watch)
    batch = drawn(data, 0, 12)
    assert watch.history[0].loss == pytest.approx(3 * before(**batch).loss.item(), rel=1e-5)
    assert sum("own" in entry for entry in trainer.state.log_history) == (2 if way == "compute_loss" else 0)


def outcome(trainer):
    """Return everything that a training changes."""
    ours = ("hessian", "gradient_sketches")
    logs = [
        {k: v for k, v in entry.items() if "second" not in k and "runtime" not in k}
        for entry in trainer.state.log_history
        if not any(key.startswith(ours) for key in entry)
    ]
    return {
        "weights": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict()["state"],
        "logs": logs,
        "random": (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()),
        "own": trainer.train_dataset.own.get_state(),
        "modes": [part.training for part in trainer.model.modules()],
    }


@pytest.mark.parametrize("cadence", [slow({"every_n_train_steps": 1, "at_start": True}), {}], ids=str)
def test_training_is_the_same_bit_for_bit(tmp_path, cadence, untyped):
    """Dropout, shuffling, and a data set that draws from the global generators and from one of its own.

    The checks of types draw from Python's own generator.
    """

    def run(path, *kinds):
        arguments = {"gradient_accumulation_steps": 2, "max_steps": -1, "num_train_epochs": 2, "logging_steps": 1}
        trainer = trainer_of(path, language_model(dropout=0.3), Tokens(noisy=True), **arguments)
        made = [kind(trainer) for kind in kinds]
        return outcome(trained(trainer, *made)), made

    alone, _ = run(tmp_path / "alone")
    watched, (watch, rows) = run(
        tmp_path / "watched", lambda t: SpectrumCallback(t, **SHORT, **cadence), GradientSketchCallback
    )
    assert len(watch.history) == (7 if cadence else 2)
    assert len(GradientStore.open(rows.dirpath)) == 6
    torch.testing.assert_close(watched, alone, rtol=0, atol=0)


class Augmented(Tokens):
    """Draws from a generator that an object inside has."""

    def __init__(self):
        super().__init__()
        self.noise = types.SimpleNamespace(draws=[np.random.default_rng(3)])

    def __getitem__(self, place):
        found = super().__getitem__(place)
        found["input_ids"][0] = int(self.noise.draws[0].integers(11))
        return found


class Warmup(Trainer):
    """Its loss counts and collects what it returns."""

    count, seen = 0, None

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.count += 1
        self.seen = {"train": []} if self.seen is None else self.seen
        loss = model(**inputs).loss
        self.seen["train"].append(self.count)
        return loss * min(1, self.count / 50) if model.training else loss


def test_a_loss_that_keeps_count_of_its_calls_is_trained_as_without(tmp_path, untyped):
    def run(path, *kinds):
        trainer = trainer_of(path, language_model(), Tokens(), Warmup, max_steps=2)
        trainer.log_calls, plain = [], trainer.log
        trainer.log = lambda logs, *args, **kwargs: (trainer.log_calls.append(sorted(logs)), plain(logs))[1]
        trained(trainer, *(kind(trainer) for kind in kinds))
        return {"weights": trainer.model.state_dict(), "count": trainer.count, "seen": trainer.seen}, trainer.log_calls

    watched, calls = run(tmp_path / "a", lambda t: SpectrumCallback(t, **SHORT, every_n_train_steps=1))
    alone, fewer = run(tmp_path / "b")
    torch.testing.assert_close(watched, alone, rtol=0, atol=0)
    assert alone["count"] == 2
    assert [keys for keys in calls if "loss" in keys] == [keys for keys in fewer if "loss" in keys]


class OwnLanguageModel(GPT2LMHeadModel):
    """Has a name that no list of transformers has."""


def test_a_class_of_ones_own_weighs_batches_as_the_one_that_it_inherits_from(tmp_path):
    """By the labels that are predicted, of which padded rows have different numbers."""

    def loss(path, kind):
        model = kind(language_model().config)
        model.load_state_dict(language_model().state_dict())
        trainer = trainer_of(path, model, Tokens(), per_device_train_batch_size=1, max_steps=1)
        watch = SpectrumCallback(trainer, **{**SHORT, "num_batches": 6}, at_start=True, every_n_train_steps=9)
        return trained(trainer, watch) and watch.history[0].loss

    assert loss(tmp_path / "a", OwnLanguageModel) == loss(tmp_path / "b", GPT2LMHeadModel)


def test_a_collate_function_may_take_examples_apart(tmp_path):
    def collate(examples):
        labels = torch.stack([example.pop("labels") for example in examples])
        return {"input_ids": torch.stack([example["input_ids"] for example in examples]), "labels": labels}

    data = [Tokens()[place] for place in range(24)]
    own = {"data_collator": collate}
    trainer = trainer_of(tmp_path, language_model(), data, own=own, max_steps=1, remove_unused_columns=False)
    trained(trainer, SpectrumCallback(trainer, **SHORT, every_n_train_steps=1))
    lost = sum("labels" not in example for example in data)
    assert lost in (4, 8)  # those of the Trainer's own batch, and of one that its loader fetches before


def test_generators_inside_of_data_sets_are_left_as_they_were(tmp_path, untyped):
    def weights(path, *kinds):
        data = ConcatDataset([Augmented(), Augmented()])
        trainer = trainer_of(path, language_model(), data, max_steps=2)
        return trained(trainer, *(kind(trainer) for kind in kinds)).model.state_dict()

    watched = weights(tmp_path / "a", lambda t: SpectrumCallback(t, **SHORT, every_n_train_steps=9))
    torch.testing.assert_close(watched, weights(tmp_path / "b"), rtol=0, atol=0)


@pytest.mark.slow
def test_examples_are_the_same_in_another_training_also_where_reading_them_draws_random_numbers(tmp_path, untyped):
    def losses(path, seed, torch_seed):
        trainer = trainer_of(path, language_model(), Tokens(noisy=True), max_steps=1)
        torch.manual_seed(torch_seed)
        random.seed(torch_seed)
        np.random.seed(torch_seed)
        watch = SpectrumCallback(trainer, **SHORT, at_start=True, every_n_train_steps=9, seed=seed)
        return trained(trainer, watch) and watch.history[0].loss

    assert losses(tmp_path / "a", 0, 1) == losses(tmp_path / "b", 0, 2) != losses(tmp_path / "c", 1, 1)


def test_a_measurement_ignores_the_autocast_of_training(tmp_path):
    """In bfloat16 the loss would be off by about 2^-9; float32 of this sum is exact to 1e-6."""
    data = Tokens(8)
    trainer = trainer_of(tmp_path, language_model(), data, bf16=True, per_device_train_batch_size=8, max_steps=1)
    watch = SpectrumCallback(trainer, **{**SHORT, "num_batches": 1}, at_start=True, every_n_train_steps=9)
    before = copy.deepcopy(trainer.model).eval()
    trained(trainer, watch)
    assert watch.history[0].loss == pytest.approx(before(**drawn(data, 0, 8)).loss.item(), rel=1e-5)
    assert "forward" in vars(trainer.model)  # and autocast is back


@pytest.mark.slow
def test_adam_has_an_edge_with_its_preconditioner_and_none_where_the_gradient_is_clipped(tmp_path):
    def verdict(path, **arguments):
        trainer = trainer_of(path, language_model(), Tokens(), max_steps=2, optim="adamw_torch", **arguments)
        watch = SpectrumCallback(trainer, **SHORT, every_n_train_steps=2, preconditioner="optimizer")
        trained(trainer, watch)
        assert sum("hessian_preconditioned/lambda_max" in entry for entry in trainer.state.log_history) == 1
        return watch.history[-1]

    assert verdict(tmp_path / "free", max_grad_norm=100.0).stable_below == pytest.approx(3.8 / 0.1 / 0.05)
    clipped = verdict(tmp_path / "clipped", max_grad_norm=1e-3)
    assert math.isnan(clipped.stable_below)
    assert "clipped" in clipped.verdict


class Weights(TrainerCallback):
    """Copy the weights around each step."""

    def __init__(self):
        self.vectors, self.fingerprints = [], []

    def on_step_begin(self, args, state, control, **objects):
        model = objects["model"]
        self.vectors.append(torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()]))
        self.fingerprints.append(module_fingerprint(model))

    on_train_end = on_step_begin

    def gradients(self, lr):
        """Return those of SGD's steps: (w_t - w_t+1) / lr."""
        return (torch.stack(self.vectors[:-1]) - torch.stack(self.vectors[1:])) / lr


def assert_rows(store, gradients, steps):
    """Compare with the sketch of each step's gradient, to the rounding of float32."""
    rows = store.where(stage="fit").read()
    assert rows.step.tolist() == steps
    expected = store.sketch.matvec(gradients[[step - 1 for step in steps]].float())
    assert ((rows.sketches - expected).norm(dim=1) <= 1e-5 * expected.norm(dim=1)).all()
    return rows


@pytest.mark.parametrize("every", [1, 2])
def test_rows_are_sketches_of_the_gradients_that_sgd_used(tmp_path, every):
    """Averaged over accumulated batches and clipped; weights are float64, so that their differences are exact."""
    arguments = {"optim": "sgd", "gradient_accumulation_steps": 2, "max_grad_norm": 0.3, "max_steps": 5}
    trainer = trainer_of(tmp_path, language_model(dropout=0.2).double(), Tokens(), **arguments)
    weights = Weights()
    callback = GradientSketchCallback(trainer, dim=32, dtype="float32", every_n_train_steps=every)
    trained(trainer, weights, callback)
    gradients = weights.gradients(0.05)
    assert gradients.norm(dim=1).max() <= 0.3 * (1 + 1e-5)  # else clipping was not tested
    steps = [step for step in range(1, 6) if step % every == 0]
    rows = assert_rows(GradientStore.open(callback.dirpath), gradients, steps)
    assert rows.columns["fingerprint"].tolist() == [weights.fingerprints[step - 1] for step in steps]
    assert rows.epoch.tolist() == [(step - 1) // 3 for step in steps]
    assert torch.allclose(rows.lr, torch.tensor(0.05, dtype=rows.lr.dtype))
    assert callback.dirpath == str(tmp_path / "gradient_sketches")


def test_queries_use_the_loss_that_is_trained_and_scores_are_products(tmp_path):
    data = Tokens()
    trainer = trainer_of(tmp_path, language_model(), data, label_smoothing_factor=0.2, optim="sgd")
    callback = GradientSketchCallback(trainer, dim=64, dtype="float32")
    trained(trainer, callback)
    store, batch = GradientStore.open(callback.dirpath), drawn(data, 0, 3)

    def smoothed(module, batch):
        logits, labels = module(batch["input_ids"], attention_mask=batch["attention_mask"]).logits, batch["labels"]
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=0.2)

    queries = store.sketch_gradients(trainer.model, [batch])
    expected = sketch_gradients(trainer.model, [batch], store.sketch, loss_fn=smoothed)
    torch.testing.assert_close(queries.sketches, expected.sketches, rtol=1e-4, atol=1e-6)
    found = store.top_k({4: queries}, 2, method="tracin")  # the checkpoint after step 4
    products = 0.05 * queries.sketches @ store.read().sketches.T
    torch.testing.assert_close(found.scores.double(), products.topk(2).values.double(), rtol=1e-4, atol=1e-6)
    assert batch.keys() == {"input_ids", "attention_mask", "labels"}


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch_fused"])
def test_rows_are_unscaled_where_a_grad_scaler_scales_the_loss(tmp_path, optim):
    """A fused optimizer unscales in its own step. The first mean of Adam is a tenth of its first gradient."""
    if not LATER:
        pytest.skip("earlier accelerate scales on a GPU only")
    trainer = trainer_of(tmp_path, language_model(), Tokens(), optim=optim, max_steps=1, max_grad_norm=0.0)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    weights, callback = Weights(), GradientSketchCallback(trainer, dim=32, dtype="float32")
    trained(trainer, weights, callback)
    gradients = weights.gradients(0.05)
    if optim != "sgd":
        means = [trainer.optimizer.state[p]["exp_avg"].reshape(-1) * 10 for p in trainer.model.parameters()]
        gradients = torch.cat(means)[None]
    rows, store = GradientStore.open(callback.dirpath).read(), GradientStore.open(callback.dirpath)
    expected = store.sketch.matvec(gradients)  # differences of float32 weights, over a small rate
    assert (rows.sketches - expected).norm() <= 1e-3 * expected.norm()


@pytest.mark.slow
def test_a_resumed_training_replaces_the_rows_after_its_checkpoint(tmp_path, monkeypatch):
    """Each step has one row, from the run that trained the weights of the end."""
    if not LATER:  # which loads the random state of NumPy as a pickle
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    arguments = {"optim": "sgd", "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    model = language_model(dropout=0.2).double()

    def begun(steps):
        trainer = trainer_of(tmp_path, copy.deepcopy(model), Tokens(), max_steps=steps, **arguments)
        weights, callback = Weights(), GradientSketchCallback(trainer, dim=32, dtype="float32")
        return trainer, weights, callback

    trainer, first, callback = begun(5)
    trained(trainer, first, callback)
    trainer, second, callback = begun(7)
    trained(trainer, second, callback, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    gradients = torch.cat([first.gradients(0.05)[:2], second.gradients(0.05)])
    store = GradientStore.open(callback.dirpath)
    rows = assert_rows(store, gradients, list(range(1, 8)))
    assert rows.attempt.tolist() == [1, 1, 2, 2, 2, 2, 2]
    assert len(GradientStore.open(callback.dirpath, lineage=1)) == 5
    # and once more, from the second run's checkpoint, with the rows of the first in between
    trainer, third, callback = begun(8)
    trained(trainer, third, callback, resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert GradientStore.open(callback.dirpath).metadata()["attempt"].tolist() == [1, 1, 2, 2, 2, 2, 3, 3]
    # a training from the start is another lineage, or, with overwrite, the only one
    trainer, _, callback = begun(2)
    with pytest.warns(UserWarning, match=r"rows of other fits, \[1, 2, 3\]"):
        trained(trainer, callback)
    assert len(GradientStore.open(callback.dirpath)) == 2
    shutil.rmtree(callback.dirpath)
    trainer, _, callback = begun(4)
    with pytest.warns(UserWarning, match="A new lineage begins at step 3"):
        trained(trainer, callback, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert GradientStore.open(callback.dirpath).metadata()["step"].tolist() == [3, 4]


def test_rows_are_on_the_disk_before_the_checkpoint_that_relies_on_them(tmp_path):
    seen = {}

    class Checked(Trainer):
        def _save_checkpoint(self, *args, **kwargs):
            seen[self.state.global_step] = len(GradientStore.open(tmp_path / "gradient_sketches"))
            return super()._save_checkpoint(*args, **kwargs)

    trainer = trainer_of(tmp_path, language_model(), Tokens(), Checked, save_strategy="steps", save_steps=2)
    trained(trainer, GradientSketchCallback(trainer))
    assert seen == {2: 2, 4: 4}


def test_a_training_that_fails_leaves_its_rows_to_the_next_one(tmp_path):
    class Failing(TrainerCallback):
        def on_step_end(self, args, state, control, **objects):
            if state.global_step == 2:
                raise KeyError("broken")

    trainer = trainer_of(tmp_path, language_model(), Tokens())
    callback = GradientSketchCallback(trainer)
    with pytest.raises(KeyError, match="broken"):
        trained(trainer, callback, Failing())
    trainer.remove_callback(Failing)
    with pytest.warns(UserWarning, match="rows of other fits"):
        trainer.train()
    assert len(GradientStore.open(callback.dirpath, lineage=1)) == 2
    assert GradientStore.open(callback.dirpath).metadata()["step"].tolist() == [1, 2, 3, 4]


class Stream(IterableDataset):
    def __iter__(self):
        yield from Tokens()


def test_what_cannot_work_is_refused_before_training(tmp_path, monkeypatch, untyped):
    def stays(trainer):
        assert trainer.state.global_step == 0

    trainer = trainer_of(tmp_path, language_model(), Stream())
    with pytest.raises(ValueError, match=r"got a .*, which is read in its own order only; pass batches="):
        trained(trainer, SpectrumCallback(trainer, **SHORT))
    stays(trainer)
    trainer = trainer_of(tmp_path, language_model(), Stream())
    trained(trainer, watch := SpectrumCallback(trainer, **SHORT, batches=[drawn(Tokens(), 0, 4)]))
    assert watch.history

    trainer = trainer_of(tmp_path, language_model(), Tokens())
    for kind in (SpectrumCallback, GradientSketchCallback):
        for flag, name in (("is_fsdp_enabled", "FSDP"), ("is_deepspeed_enabled", "DeepSpeed")):
            monkeypatch.setattr(trainer, flag, True)
            with pytest.raises(ValueError, match=f"{kind.__name__} needs whole .*{name}.* Train with DDP"):
                kind(trainer)
            monkeypatch.setattr(trainer, flag, False)
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        SpectrumCallback(trainer, matvecs=3)
    with pytest.raises(ValueError, match="set every_n_epochs or every_n_train_steps, got both"):
        SpectrumCallback(trainer, every_n_epochs=1, every_n_train_steps=1)
    with pytest.raises(ValueError, match="curvature='hesse' is not known"):
        SpectrumCallback(trainer, "hesse")
    with pytest.raises(ValueError, match="dim"):
        GradientSketchCallback(trainer, dim=0)

    def broken(module, batch):
        raise RuntimeError("this loss fails")

    with pytest.raises(RuntimeError, match="this loss fails"):
        trained(trainer, SpectrumCallback(trainer, **SHORT, loss_fn=broken))
    stays(trainer)
    if "lomo" in {kind.value for kind in transformers.training_args.OptimizerNames}:
        trainer = trainer_of(tmp_path, language_model(), Tokens(), optim="lomo")
        with pytest.raises(ValueError, match="got optim='lomo', which steps for each layer"):
            GradientSketchCallback(trainer)


def test_a_loss_that_needs_num_items_in_batch_says_what_to_pass(tmp_path):
    if not LATER:
        pytest.skip("later transformers have compute_loss_func")

    def summed(outputs, labels, num_items_in_batch=None):
        logits, labels = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return F.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch

    trainer = trainer_of(tmp_path, language_model(), Tokens(), own={"compute_loss_func": summed})
    with pytest.raises(TypeError, match=r"failed without num_items_in_batch: .* Pass loss_fn="):
        trained(trainer, SpectrumCallback(trainer, **SHORT))


def test_a_measurement_that_fails_during_training_is_nan_or_raised(tmp_path):
    calls = {"fail": False}

    class Later(TrainerCallback):
        def on_step_begin(self, args, state, control, **objects):
            calls["fail"] = state.global_step > 0

    def loss(module, batch):
        if calls["fail"]:
            raise ValueError("later")
        return module(**batch).loss

    trainer = trainer_of(tmp_path, language_model(), Tokens(), max_steps=2)
    watch = SpectrumCallback(trainer, **SHORT, loss_fn=loss, every_n_train_steps=1)
    with pytest.warns(UserWarning, match="hessian: no measurement at step 2: later"):
        trained(trainer, Later(), watch)
    assert [m.step for m in watch.history] == [1]
    assert math.isnan([e for e in trainer.state.log_history if "hessian/lambda_max" in e][-1]["hessian/lambda_max"])
    trainer = trainer_of(tmp_path, language_model(), Tokens(), max_steps=2)
    with pytest.raises(ValueError, match="later"):
        trained(
            trainer, Later(), SpectrumCallback(trainer, **SHORT, loss_fn=loss, every_n_train_steps=1, on_error="raise")
        )


@pytest.mark.slow
def test_two_ranks_measure_and_record_what_one_does_on_both_their_batches(tmp_path):
    """Equal weights of float64, so sums differ by rounding only; the loss of GPT-2 is computed in float32."""
    found = []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        program = Path(__file__).with_name("hugging_face_ddp.py")
        done = subprocess.run([*command, program, folder, str(ranks)], capture_output=True, text=True, timeout=3600)
        assert done.returncode == 0, done.stderr[-3000:]
        each = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]
        examples = [tuple(row) for rank in each for row in rank.pop("examples")]
        assert len(set(examples)) == len(examples) == 6
        assert each[0] == each[-1]
        found.append((each[0], GradientStore.open(folder / "gradient_sketches").read()))
    (alone, row), (both, rows) = found
    assert row.step.tolist() == rows.step.tolist() == [1, 2]
    torch.testing.assert_close(rows.sketches, row.sketches, rtol=1e-5, atol=1e-6)
    assert both["lambda_max"] == pytest.approx(alone["lambda_max"], rel=1e-4)
    assert both["loss"] == pytest.approx(alone["loss"], rel=1e-6)


@pytest.mark.slow
def test_wandb_gets_what_is_logged(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    trainer = trainer_of(tmp_path, language_model(), Tokens(), report_to=["wandb"], max_steps=2)
    watch = SpectrumCallback(trainer, **SHORT, every_n_train_steps=2)
    trained(trainer, watch)
    assert wandb.run.summary["train/hessian/lambda_max"] == watch.history[-1].lambda_max
    wandb.finish()


@pytest.mark.slow
def test_without_transformers_the_import_says_what_to_install():
    code = "import sys, lightning_sketch.callbacks; sys.modules['transformers'] = None\n"
    code += "import lightning_sketch.callbacks.hugging_face"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImportError" in done.stderr
    assert "pip install 'lightning-sketch[transformers]'" in done.stderr


def test_the_layout_is_that_of_the_pattern(tmp_path):
    trainer = trainer_of(tmp_path, language_model(), Tokens(), max_steps=1)
    callback = GradientSketchCallback(trainer, parameters="*ln_f*")
    trained(trainer, callback)
    assert GradientStore.open(callback.dirpath).spec.parameters == Layout.of(trainer.model, "*ln_f*")
