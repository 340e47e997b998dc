"""What we show is run: every script in examples/, and the code in the README."""

import importlib
import os
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from forks import run
from models import DigitsData, dataset, loader
from pytorch_lightning import LightningModule
from torch import nn

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_example(script, tmp_path):
    """In a process of its own, as a reader runs it; it says what it wrote and writes it."""
    if script.stem == "lora_subspace":
        pytest.importorskip("peft")
    quiet = {**os.environ, "WANDB_SILENT": "true", "MPLBACKEND": "agg", "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2"] if script.stem == "sharded_spectrum" else []
    done = run(*launcher, script, tmp_path, env=quiet)
    assert done.returncode == 0, done.stderr[-3000:]
    check, pictures = {
        "attribution": (influence_knows_who_taught_an_answer, 1),
        "intrinsic_dimension": (intrinsic_dimensions_differ, 1),
        "lora_subspace": (few_numbers_adapt_a_model_in_a_small_file, 0),
        "language_model": (documents_that_taught_a_sentence_are_missed, 0),
        "padded_language_model": (words_are_taught_by_their_documents, 0),
        "select_data": (what_is_selected_is_of_the_task, 0),
        "quickstart": (three_questions_are_answered, 1),
        "sharded_spectrum": (shards_have_a_spectrum, 0),
    }.get(script.stem, (None, 1))
    found = re.findall(r"^picture: (.+)$", done.stdout, re.MULTILINE)
    assert len(found) == pictures
    assert all(Path(picture).stat().st_size > 10_000 for picture in found)
    if check is not None:
        check(done.stdout)


def three_questions_are_answered(printed):
    """The largest eigenvalue grows twentyfold at least; images of a 2 taught a 2; a part of the numbers reads well."""
    largest = [float(value) for value in re.findall(r"^ +\d+ +\d\.\d+ +(\d+\.\d+) ", printed, re.MULTILINE)]
    assert len(largest) == 11
    assert max(largest) > 20 * largest[0]
    ((label, taught),) = re.findall(r"new image is a (\d)\? (.+)$", printed, re.MULTILINE)
    assert re.findall(r"(\d) \(image", taught).count(label) >= 4
    ((few, full),) = re.findall(r"256 of 3,778 read (\S+)% of new images; all of them (\S+)%$", printed, re.MULTILINE)
    assert 70 < float(few) < float(full)
    assert float(full) > 95


def few_numbers_adapt_a_model_in_a_small_file(printed):
    """More numbers are right more often, from a guess among five steps on; what is loaded is the model, bit for bit."""
    found = re.findall(r"^ *(\d+) +\d+\.\d+% +(\d+)% +(\d+)$", printed, re.MULTILINE)
    right = {int(dim): int(percent) for dim, percent, _ in found}
    assert list(right) == [1, 16, 64, 256]
    assert right[1] < 40 < 75 < right[256]
    assert int(found[0][2]) < 1024
    assert "not the same" not in printed


def documents_that_taught_a_sentence_are_missed(printed):
    """The loss rises more without them than without random ones, and by more than trainings differ (0.1)."""
    found = re.findall(r"^ +(-?\d\.\d+) ± \d\.\d+ .*documents: (.+)$", printed, re.MULTILINE)
    rise = {name: float(value) for value, name in found}
    assert rise.keys() == {"taught it", "looks like it", "random"}
    assert rise["taught it"] > rise["random"] + 0.2
    (known,) = re.findall(r"not sketched: (.+)$", printed, re.MULTILINE)
    assert 0.6 < float(known) < 0.95
    assert len(re.findall(r"^ +0\.\d\d  \S.{50}.* 0\.\d\d  \S", printed, re.MULTILINE)) == 15


def shards_have_a_spectrum(printed):
    """Two measurements, by one of both processes, of three eigenvalues whose error bars are below 1 %."""
    found = re.findall(r"^ +largest +(.+)$", printed, re.MULTILINE)
    assert len(found) == 2
    for line in found:
        pairs = [pair.split(" ± ") for pair in line.split(", ")]
        assert len(pairs) == 3
        assert all(float(error) < 0.01 * float(value) for value, error in pairs)


def what_is_selected_is_of_the_task(printed):
    """One image in four of the pool is of the task, and nearly all that are selected; they teach it better."""
    rows = re.findall(r"^\d +(\d+)% +(\d+\.\d)% +(\d+\.\d)%", printed, re.MULTILINE)
    assert len(rows) == 3
    for turned, selected, random in rows:
        assert int(turned) >= 95
        assert float(selected) > float(random) + 3


def words_are_taught_by_their_documents(printed):
    """Each word of a fact that is told in nine documents was taught by these; the rest of the output is noise."""
    found = dict(re.findall(r"^(largest|planet|Jupiter): (.+)$", printed, re.MULTILINE))
    assert len(found) == 3
    assert all("planet is Jupiter" in text for texts in found.values() for text in texts.split(" | "))


@pytest.mark.slow
@pytest.mark.parametrize("per", ["step", "example"])
def test_the_recipe_of_a_language_model_makes_rows_that_are_right(per, tmp_path, monkeypatch):
    """Padded batches, a schedule, bf16, accumulation: weights are the numbers of labels, the rate is the last."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.setattr(sys, "argv", ["recipe", str(tmp_path)])
    recipe = importlib.import_module("padded_language_model")
    monkeypatch.setattr(recipe, "OUT", tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        store = recipe.main(per)
    assert len((ROOT / "examples" / "padded_language_model.py").read_text().splitlines()) < 70
    fit, rows = store.where(stage="fit").metadata(), store.where(stage="validate").metadata()
    assert rows["weight"][rows["example_id"].argsort()].tolist() == [len(text.split()) - 1 for text in recipe.TEXTS]
    assert rows["lr"].unique().tolist() == [fit["lr"][-1]]
    assert fit["lr"][-1] < fit["lr"][20]
    assert rows["scale_known"].all()
    assert fit["scale_known"].all()
    assert len(fit["step"]) == (80 if per == "step" else 20 * 27)


def intrinsic_dimensions_differ(printed):
    """The classifier needs a few hundred numbers, the language model most of its own; and it learns of contexts."""
    found = re.findall(r"^(\w+): d90 = (\d+) of (\d+)", printed, re.MULTILINE)
    d90 = {name: (int(dim), int(n)) for name, dim, n in found}
    (digits, n_digits), (text, n_text) = d90["digits"], d90["text"]
    assert digits in (64, 128, 256)
    assert digits / n_digits < 0.01
    assert text / n_text > 0.4
    (full,) = re.findall(r"^text: loss .+ start, (.+) after full", printed, re.MULTILINE)
    (by_last_letter,) = re.findall(r"by the last letter (.+)$", printed, re.MULTILINE)
    assert float(full) < float(by_last_letter) - 0.3


def influence_knows_who_taught_an_answer(printed):
    """Removing the most influential images costs more than any others; wrong labels the loss finds as well."""
    found = re.findall(r"^ +([a-z ]+?) +(-?\d\.\d+) ± (\d\.\d+)", printed, re.MULTILINE)
    rise = {name: (float(mean), float(error)) for name, mean, error in found}
    assert len(rise) == 7
    best, error = rise.pop("influence")
    assert best > max(mean for mean, _ in rise.values()) + error
    assert abs(rise["random"][0]) < 0.05
    by_influence, by_loss = (
        [int(s) for s in re.findall(r"(\d+)% of", line)] for line in re.findall(r"^ +by (?:self|loss).*", printed, re.M)
    )
    assert by_influence[0] == by_loss[0] == 100
    assert all(abs(a - b) <= 3 for a, b in zip(by_influence, by_loss, strict=True))


README = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


class Own(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=3e-3)


class WithValidation(DigitsData):
    def val_dataloader(self):
        return loader(shuffle=False)


def a_users_own():
    """What the README's blocks take from their reader: a module, data, and rows of earlier."""
    images = dataset()
    batch = [tensor[:8] for tensor in images.tensors]
    return {"model": Own(), "data": WithValidation(), "train_data": images, "test_batch": batch, "batch": batch}


@pytest.mark.filterwarnings("ignore:Your `val_dataloader`'s sampler has shuffling enabled")
@pytest.mark.parametrize(
    ("imported", "names"),
    [
        ("SpectrumMonitor", ["monitor"]),
        ("GradientSketchWriter", ["helped"]),
        ("SubspaceModule", ["plain"]),
        pytest.param("IntrinsicDimensionTuner", ["result", "bound"], marks=pytest.mark.slow),
        ("BlockSRHT", ["sketch"]),
        ("spectrum", ["found"]),
    ],
)
def test_the_readme(imported, names, tmp_path, monkeypatch):
    """Each block runs by itself, with a model and data of one's own: it has all imports that it needs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    torch.manual_seed(0)
    (block,) = (block for block in README if re.search(rf"lightning_sketch import .*\b{imported}\b", block))
    own = a_users_own()
    if imported == "IntrinsicDimensionTuner":
        own |= {"train_loader": own["data"].train_dataloader()}
    exec(
        block.replace("max_epochs=10", 'max_epochs=1, accelerator="cpu"').replace(
            '": 10', '": 1, "accelerator": "cpu"'
        ),
        own,
    )
    assert all(own[name] is not None for name in names)
    if imported == "SpectrumMonitor":
        own["trainer"].logger.experiment.finish()
        assert (tmp_path / "spectrum.png").exists()
    if imported == "GradientSketchWriter":
        assert own["helped"].example_ids.shape == (8, 5)
        assert len(own["store"]) == len(own["train_data"])
    if imported == "BlockSRHT":
        x, y, sketch = own["x"], own["y"], own["sketch"]
        assert abs(sketch.matvec(x) @ sketch.matvec(y) / (x @ y) - 1) < 5 * (2 / sketch.dim) ** 0.5


def test_all_blocks_of_the_readme_are_run():
    """Those above, and the one on engines, which `attribution/test_ray.py` runs."""
    assert len(README) == 7
