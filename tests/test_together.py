"""All recipes of the README in one Trainer, on a language model as people write one, in either namespace.

The monitor, a writer of steps and one of examples, a subspace and the search for its dimension run beside weight
averaging, a checkpoint that monitors an eigenvalue, a monitor of learning rates and three loggers. The module has no
`forward`, saves its hyperparameters, takes padded batches of Hugging Face's kind, and is trained in bf16 with a
schedule and accumulated gradients. One course is: fit, validate, resume in a new Trainer, fit again, validate.
"""

import csv
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import forks
import pytest
import torch
from marks import slow
from torch.utils.data import DataLoader

from lightning_sketch import (
    GradientSketchWriter,
    GradientStore,
    IndexedDataset,
    IntrinsicDimensionFinder,
    SpectrumMonitor,
    SubspaceModule,
)

transformers = pytest.importorskip("transformers")
for extra in ("wandb", "tensorboard", "matplotlib"):
    pytest.importorskip(extra)

KEY = "hessian/lambda_max"
PAD = 0
_DRAWS = torch.Generator().manual_seed(0)
DOCUMENTS = [torch.randint(1, 23, (4 + i % 9,), generator=_DRAWS) for i in range(24)]
STEPS = 3  # of an epoch: 24 documents in batches of 4, 2 of which are accumulated

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback, but loading a checkpoint outside"),
    pytest.mark.filterwarnings("ignore:.*have no .train_dataloader"),
    # which is so: Lightning begins the second fit of a Trainer with the next shuffling of its loader
    pytest.mark.filterwarnings("ignore:hessian. the first batches differ from those of the last fit"),
    # a subspace mixes the parameters of all layers, which these two say, with what it costs
    pytest.mark.filterwarnings("ignore:fallback='loop' covers . of . parameters"),
    pytest.mark.filterwarnings("ignore:from the first batch on, examples are differentiated one at a time"),
    pytest.mark.filterwarnings("ignore:the curvature is noisy"),  # of 24 examples
    pytest.mark.filterwarnings("ignore:Implicitly cleaning up <TemporaryDirectory:ResourceWarning"),  # of wandb
]


def language_model(namespace):
    """Return the class of a module as people write it, in a namespace."""

    class Model(import_module(namespace).LightningModule):
        def __init__(self, width: int = 16, lr: float = 3e-3):
            super().__init__()
            self.save_hyperparameters()
            ends = {"bos_token_id": None, "eos_token_id": None}
            config = transformers.GPT2Config(vocab_size=23, n_positions=16, n_embd=width, n_layer=1, n_head=2, **ends)
            self.gpt = transformers.GPT2LMHeadModel(config)  # with dropout, which draws from the global generator

        def training_step(self, batch, batch_idx):
            loss = self.gpt(**batch).loss
            self.log("loss", loss, prog_bar=True)
            return loss

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.gpt(**batch).loss)

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 4))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    return Model


def padded(documents):
    """Collate documents to a batch: padded, with a mask, and with labels that do not count the padding."""
    ids = torch.nn.utils.rnn.pad_sequence(documents, batch_first=True, padding_value=PAD)
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": ids.masked_fill(ids == PAD, -100)}


def loader(shuffle=False):
    """Return a loader whose first epoch has the same order each time."""
    order = torch.Generator().manual_seed(1)
    return DataLoader(IndexedDataset(DOCUMENTS), 4, shuffle=shuffle, collate_fn=padded, generator=order)


def averaging(callbacks):
    """Return Lightning's EMA, or the averaging that earlier versions have."""
    if hasattr(callbacks, "EMAWeightAveraging"):
        return callbacks.EMAWeightAveraging(decay=0.5)
    return callbacks.StochasticWeightAveraging(swa_lrs=1e-3)


class Setting:
    """One namespace, one kind of module, one folder, with or without our callbacks.

    The search itself decides what is trained, so that it is in both arms of a comparison; it averages w itself, and
    refuses other averaging.
    """

    def __init__(self, namespace, kind, folder, ours=True):
        self.lightning, self.kind, self.folder, self.ours = import_module(namespace), kind, folder, ours
        self.namespace = namespace
        self.callbacks, self.loggers = (import_module(f"{namespace}.{name}") for name in ("callbacks", "loggers"))

    def module(self):
        self.lightning.seed_everything(0, verbose=False)
        module = language_model(self.namespace)()
        if self.kind == "weights":
            return module
        return SubspaceModule(module, *((32,) if self.kind == "subspace" else (8,)), scale=3, **self.more())

    def more(self):
        return {"max_dim": 32} if self.kind == "search" else {}

    def trainer(self, **options):
        """Return a Trainer with everything, as `trainer.ours` has it."""
        made = SimpleNamespace()
        callbacks = [self.callbacks.LearningRateMonitor("step")]
        if self.kind == "search":
            search = {"mode": "min", "delta": 10.0, "every_n_train_steps": 2}  # doubles at each validation
            callbacks.append(IntrinsicDimensionFinder("val_loss", 0.1, **search))
        else:
            callbacks.append(averaging(self.callbacks))
        loggers = [self.loggers.CSVLogger(self.folder, name="csv")]
        at_ends = {"filename": "{epoch}", "save_on_train_epoch_end": True}
        if self.ours:
            made.monitor = SpectrumMonitor(top_k=2, bottom_k=1, num_batches=1, num_matvecs=24, dim=48)
            made.steps = GradientSketchWriter(self.folder / "steps", dim=64)
            whole = {} if self.kind == "weights" else {"fallback": "loop"}
            made.examples = GradientSketchWriter(
                self.folder / "examples", dim=64, per="example", name="examples", **whole
            )
            callbacks += [made.monitor, made.steps, made.examples]
            made.best = self.callbacks.ModelCheckpoint(self.folder / "best", monitor=KEY, mode="min", **at_ends)
            callbacks.append(made.best)
            loggers.append(self.loggers.TensorBoardLogger(self.folder, name="tensorboard"))
            loggers.append(self.loggers.WandbLogger(save_dir=self.folder, project="together", offline=True))
        # after the best, whose state is in it
        callbacks.append(self.callbacks.ModelCheckpoint(self.folder / "all", save_top_k=-1, **at_ends))
        made.trainer = self.lightning.Trainer(
            accelerator="cpu",
            precision="bf16-mixed",
            accumulate_grad_batches=2,
            log_every_n_steps=1,
            callbacks=callbacks,
            logger=loggers,
            default_root_dir=self.folder,
            enable_progress_bar=False,
            enable_model_summary=False,
            **options,
        )
        return made

    def done(self, made):
        """End the run of W&B, which the next logger would go on with."""
        if self.ours:
            made.trainer.loggers[-1].experiment.finish()

    def course(self):
        """Return the weights after each stage, and what our callbacks had then."""
        seen = SimpleNamespace(weights=[], epochs=[], lambda_max=[])

        def look(made, module):
            tensors = [*module.named_parameters(), *module.named_buffers()]
            seen.weights.append({name: tensor.detach().clone() for name, tensor in tensors})
            if self.ours:
                seen.epochs.append([m.epoch for m in made.monitor.history])
                seen.lambda_max.append([m.lambda_max for m in made.monitor.history])

        first, module = self.trainer(max_epochs=2), self.module()
        first.trainer.fit(module, loader(shuffle=True), loader())
        look(first, module)
        first.trainer.validate(module, loader(), verbose=False)
        look(first, module)
        self.done(first)
        second, module = self.trainer(max_epochs=3), self.module()
        second.trainer.fit(module, loader(shuffle=True), loader(), ckpt_path=self.folder / "all" / "epoch=1.ckpt")
        look(second, module)
        second.trainer.fit_loop.max_epochs = 4
        second.trainer.fit(module, loader(shuffle=True), loader())
        second.trainer.validate(module, loader(), verbose=False)
        look(second, module)
        self.done(second)
        seen.first, seen.second, seen.module, seen.folder = first, second, module, self.folder
        return seen


KINDS = ("weights", "subspace", "search")
NAMESPACES = ("pytorch_lightning", "lightning.pytorch")
FAST = {("pytorch_lightning", "weights"), ("lightning.pytorch", "subspace")}
CASES = [(namespace, kind) for kind in KINDS for namespace in NAMESPACES]


def cases(fast):
    return [(slow, pytest.param)[case in fast](case, id=", ".join(case)) for case in CASES]


@pytest.fixture(scope="module", params=cases(FAST))
def course(request, tmp_path_factory):
    namespace, kind = request.param
    pytest.importorskip(namespace)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_SILENT", "true")
        seen = Setting(namespace, kind, tmp_path_factory.mktemp("ours")).course()
    seen.setting = Setting(namespace, kind, tmp_path_factory.mktemp("theirs"), ours=False)
    return seen


def test_all_weights_are_those_of_training_without_our_callbacks(course):
    """To the bit, after the fit, the validation, the resumed fit and the next one; of the average, if there is one."""
    assert len(course.weights) == 4
    for ours, theirs in zip(course.weights, course.setting.course().weights, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not all(torch.equal(course.weights[0][name], course.weights[-1][name]) for name in course.weights[0])


def test_the_history_has_each_epoch_once_and_survives_validation_and_resuming(course):
    assert course.epochs == [[0, 1], [0, 1], [0, 1, 2], [0, 1, 2, 3]]
    longest = course.lambda_max[-1]
    assert all(values == longest[: len(values)] for values in course.lambda_max)
    assert [m.step for m in course.second.monitor.history] == [STEPS, 2 * STEPS, 3 * STEPS, 4 * STEPS]


def test_a_store_has_each_step_once(course):
    """Those of both Trainers, though the first rows of the second were written before its checkpoint was found."""
    rows = GradientStore.open(course.second.steps.dirpath).where(stage="fit").metadata()
    assert rows["step"].tolist() == list(range(1, 4 * STEPS + 1))


def test_a_store_has_each_example_once_in_each_epoch(course):
    rows = GradientStore.open(course.second.examples.dirpath).where(stage="fit").metadata()
    for epoch in range(4):
        ids = rows["example_id"][rows["epoch"] == epoch]
        assert sorted(ids.tolist()) == list(range(len(DOCUMENTS)))


@pytest.mark.parametrize("which", ["steps", "examples"])
def test_a_document_is_nearest_to_its_own_row_at_the_final_weights(course, which):
    """The rows of the validation are those of all documents; of a query that is one of them, its own has cosine 1."""
    store = GradientStore.open(getattr(course.second, which).dirpath).where(stage="validate")
    last = store.metadata()["step"] == 4 * STEPS
    assert sorted(store.metadata()["example_id"][last].tolist()) == list(range(len(DOCUMENTS)))
    asked = [7, 3]
    queries = store.sketch_gradients(course.module, [padded([DOCUMENTS[i] for i in asked])])
    nearest = store.top_k(queries, 1, method="cosine")
    assert nearest.example_ids[:, 0].tolist() == asked
    assert nearest.scores[:, 0].tolist() == pytest.approx([1, 1], abs=0.01)  # rows are in bfloat16, of 8 bits
    helped = store.top_k(queries, 2, method="influence", curvature="fisher")
    assert helped.example_ids[:, 0].tolist() == asked


def test_self_influence_ranks_all_examples(course):
    store = GradientStore.open(course.second.steps.dirpath).where(stage="validate", step=4 * STEPS)
    found = store.self_influence(method="influence", curvature="fisher")
    assert sorted(found.example_ids.tolist()) == list(range(len(DOCUMENTS)))
    assert (found.scores > 0).all()


def test_the_checkpoint_that_was_kept_is_of_the_flattest_epoch(course):
    """It monitors an eigenvalue that is measured at the end of the same epoch."""
    for made, epochs in ((course.first, 2), (course.second, 4)):
        measured = made.monitor.history if made is course.second else course.second.monitor.history[:2]
        flattest = min(measured, key=lambda m: m.lambda_max)
        assert len(measured) == epochs
        assert float(made.best.best_model_score) == pytest.approx(flattest.lambda_max)
        assert Path(made.best.best_model_path).name.startswith(f"epoch={flattest.epoch}")
    assert Path(course.second.best.best_model_path).exists()


WANTED = {KEY: 2, "hessian_eigenvalues/top_01": 2, "sketches/rows": 2, "examples/rows": 2}


def test_a_csv_file_has_our_keys(course):
    with open(course.folder / "csv" / "version_0" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert {key: sum(bool(row[key]) for row in rows) for key in WANTED} == WANTED
    found = [float(row[KEY]) for row in rows if row[KEY]]
    assert found == pytest.approx(course.lambda_max[0])
    assert "lr-AdamW" in rows[0]


def test_tensorboard_has_our_keys(course):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(course.folder / "tensorboard" / "version_0")).Reload()
    assert {key: len(found.Scalars(key)) for key in WANTED} == WANTED
    assert [event.value for event in found.Scalars(KEY)] == pytest.approx(course.lambda_max[0])
    assert [event.step for event in found.Scalars(KEY)] == [STEPS, 2 * STEPS]


def test_wandb_has_our_keys_and_a_picture_of_each_measurement(course):
    runs = sorted(course.folder.glob("wandb/offline-run-*/*.wandb"))
    assert len(runs) == 2  # a run for each Trainer
    pictures = course.folder.glob("wandb/offline-run-*/files/media/images/hessian/spectrum*.png")
    assert len(list(pictures)) == 4
    for run in runs:
        inspect = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(run)]
        text = subprocess.run(inspect, check=True, capture_output=True, text=True, timeout=3600).stdout
        history = [line for line in text.splitlines() if '"history"' in line]
        for key, count in WANTED.items():
            assert sum(f'"{key}"' in line for line in history) == count


@pytest.mark.parametrize("case", cases({("pytorch_lightning", "subspace")}))
def test_fast_dev_run_runs_the_whole_script(tmp_path, case):
    """One batch of each stage; rows are there to be asked, and nothing is left in the folder of the store."""
    namespace, kind = case
    pytest.importorskip(namespace)
    made = Setting(namespace, kind, tmp_path).trainer(fast_dev_run=True)
    module = Setting(namespace, kind, tmp_path).module()
    made.trainer.fit(module, loader(shuffle=True), loader())
    made.trainer.validate(module, loader(), verbose=False)
    assert len(made.monitor.history) == 1
    for writer, rows in ((made.steps, 1), (made.examples, 8)):
        store = GradientStore.open(writer.dirpath)
        assert len(store.where(stage="fit")) <= rows
        assert store.where(stage="validate").metadata()["example_id"].tolist() == [0, 1, 2, 3]
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("namespace", ["pytorch_lightning", slow("lightning.pytorch")])
def test_a_search_says_that_it_averages_itself(tmp_path, namespace):
    lightning = pytest.importorskip(namespace)
    setting = Setting(namespace, "search", tmp_path)
    average = averaging(setting.callbacks)
    trainer = lightning.Trainer(
        max_epochs=1,
        logger=False,
        callbacks=[average, IntrinsicDimensionFinder("val_loss", 0.1)],
        default_root_dir=tmp_path,
    )
    with pytest.raises(Exception, match="leave out the callback that averages"):
        trainer.fit(setting.module(), loader(), loader())


PROGRAM = """
import sys
import torch
torch.set_num_threads(1)
from {namespace} import LightningDataModule
from {namespace}.cli import LightningCLI
from test_together import language_model, loader

Model = language_model("{namespace}")
Model.__module__, Model.__qualname__ = "__main__", "Model"


class Data(LightningDataModule):
    def train_dataloader(self):
        return loader(shuffle=True)

    def val_dataloader(self):
        return loader()


if __name__ == "__main__":
    LightningCLI(datamodule_class=Data, save_config_kwargs={{"overwrite": True}})
"""

CONFIG = """
seed_everything: 0
trainer:
  max_epochs: 2
  accelerator: cpu
  precision: bf16-mixed
  accumulate_grad_batches: 2
  enable_progress_bar: false
  enable_model_summary: false
  default_root_dir: {folder}
  logger:
    - class_path: {namespace}.loggers.CSVLogger
      init_args:
        save_dir: {folder}
        name: csv
  callbacks:
    - class_path: lightning_sketch.SpectrumMonitor
      init_args:
        num_batches: 1
        top_k: 2
    - class_path: lightning_sketch.SpectrumMonitor  # the Gauss-Newton matrix beside it
      init_args:
        curvature: ggn
        num_batches: 1
        top_k: 2
    - class_path: lightning_sketch.GradientSketchWriter
      init_args:
        dirpath: {folder}/steps
        dim: 64
    - class_path: {namespace}.callbacks.ModelCheckpoint
      init_args:
        dirpath: {folder}/saved
        monitor: hessian/lambda_max
        save_last: true
"""
PLAIN = "model:\n  class_path: __main__.Model\n  init_args:\n    width: 8\n"
WRAPPED = """
model:
  class_path: lightning_sketch.SubspaceModule
  init_args:
    dim: 16
    module:
      class_path: __main__.Model
      init_args:
        width: 8
"""


def run(folder, *arguments):
    """Run the program with LightningCLI in a second process, and return what it prints."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "COLUMNS": "200"}
    done = forks.run(folder / "program.py", *arguments, cwd=folder, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("kind", ["weights", "subspace"])
def test_a_yaml_file_has_all_of_it(tmp_path, namespace, kind):
    """LightningCLI fits and resumes; inside a SubspaceModule, whose checkpoint it cannot resume, it fits."""
    pytest.importorskip(namespace)
    pytest.importorskip("jsonargparse")
    (tmp_path / "program.py").write_text(PROGRAM.format(namespace=namespace))
    config = tmp_path / "config.yaml"
    config.write_text(
        CONFIG.format(namespace=namespace, folder=tmp_path) + {"weights": PLAIN, "subspace": WRAPPED}[kind]
    )
    run(tmp_path, "fit", f"--config={config}")
    last = tmp_path / "saved" / "last.ckpt"
    assert last.exists()
    if kind == "weights":
        run(tmp_path, "fit", f"--config={config}", "--trainer.max_epochs=3", f"--ckpt_path={last}")
    with open(tmp_path / "csv" / "version_0" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert sum(bool(row[KEY]) for row in rows) == 2
    assert sum(bool(row["ggn/lambda_max"]) for row in rows) == 2
    store = GradientStore.open(tmp_path / "steps")
    epochs, n = (3, sum(p.numel() for p in language_model(namespace)(8).parameters())) if kind == "weights" else (2, 16)
    assert store.metadata()["step"].tolist() == list(range(1, epochs * STEPS + 1))
    assert store.spec.parameters.n == n


@pytest.mark.slow
@pytest.mark.parametrize("namespace", NAMESPACES)
def test_help_lists_our_arguments_and_choices(tmp_path, namespace):
    pytest.importorskip(namespace)
    pytest.importorskip("jsonargparse")
    (tmp_path / "program.py").write_text(PROGRAM.format(namespace=namespace))
    for name, wanted in {
        "SpectrumMonitor": ("curvature", "{hessian,ggn,fisher}", "num_batches", "every_n_epochs"),
        "GradientSketchWriter": ("per", "{step,example}", "overwrite", "columns_fn"),
    }.items():
        text = run(tmp_path, "fit", f"--trainer.callbacks.help=lightning_sketch.{name}")
        assert all(word in text for word in wanted)
    text = run(tmp_path, "fit", "--model.help=lightning_sketch.SubspaceModule")
    assert all(word in text for word in ("--model.dim DIM", "{frozen,full}", "scale", "max_dim"))
