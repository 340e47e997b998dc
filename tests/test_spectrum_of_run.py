"""The command finds a run's eigenvalues from its configuration and a checkpoint: those of dense algebra."""

import json
import re
from pathlib import Path

import forks
import pytest
import torch
import torch.nn.functional as F

import lightning_sketch
from lightning_sketch.callbacks.spectrum_monitor.spectrum_of_run import spectrum_of_run

pytest.importorskip("jsonargparse")
pytestmark = pytest.mark.slow

PROGRAM = """
import torch
import torch.nn.functional as F
from {lightning} import LightningDataModule, LightningModule
from {lightning}.cli import LightningCLI
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Model(LightningModule):
    def __init__(self, width: int = 3, lr: float = 0.1):
        super().__init__()
        self.save_hyperparameters()
        self.scale, self.scale_of_test = 1.0, 2.0
        self.net = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3))

    def setup(self, stage):
        if stage == "fit":
            self.scale = 2.0

    def training_step(self, batch, batch_idx):
        loss = self.scale * (1 + self.global_step) * F.cross_entropy(self.net(batch[0]), batch[1]) / self.scale_of_test
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)

    def validation_step(self, batch, batch_idx):
        raise RuntimeError("the batches of training are not those of validation")


class Data(LightningDataModule):
    def __init__(self, size: int = 32):
        super().__init__()
        self.size = size

    def setup(self, stage):
        if stage == "fit":
            draw = torch.Generator().manual_seed(0)
            x, y = torch.randn(self.size, 4, generator=draw), torch.randint(3, (self.size,), generator=draw)
            self.train = TensorDataset(x, y)

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=8)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return 2 * batch[0], batch[1]


if __name__ == "__main__":
    LightningCLI({classes})
"""


def run(folder, *arguments):
    return forks.run(*arguments, cwd=folder)


def trained(folder, lightning="pytorch_lightning", classes="Model, Data"):
    """A run of a user's program: its configuration and its checkpoint."""
    (folder / "program.py").write_text(PROGRAM.format(lightning=lightning, classes=classes))
    named = [] if classes else ["--model", "program.Model", "--data", "program.Data"]
    # the seed, the logger with its hyperparameters and a callback are in the configuration too
    done = run(folder, "program.py", "fit", *named, "--trainer.max_epochs", "2", "--trainer.accelerator", "cpu",
               "--seed_everything", "1", "--model.width" if classes else "--model.init_args.width", "5")  # fmt: skip
    assert done.returncode == 0, done.stderr
    (config,) = folder.rglob("config.yaml")
    (ckpt,) = folder.rglob("*.ckpt")
    return config, ckpt


def dense(ckpt, batches):
    """Eigenvalues of the Hessian of the mean loss over the first batches of 8, in float64."""
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(32, 4, generator=draw), torch.randint(3, (32,), generator=draw)
    state = torch.load(ckpt, weights_only=True)["state_dict"]
    x, y = 2 * x[: 8 * batches].double(), y[: 8 * batches]
    names, sizes = list(state), [tensor.numel() for tensor in state.values()]

    def loss(vector):
        parts = vector.split(sizes)
        w0, b0, w1, b1 = (part.view(state[name].shape) for name, part in zip(names, parts, strict=True))
        return 9 * F.cross_entropy(torch.tanh(x @ w0.T + b0) @ w1.T + b1, y)  # after 8 steps

    vector = torch.cat([tensor.double().flatten() for tensor in state.values()])
    return torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, vector)).flip(0)


def close(found, exact):
    """As near as a converged eigenvalue promises in float32, tol=1e-2 being far from reached."""
    top = torch.tensor(found["eigenvalues"][:3]).double()
    return torch.allclose(top, exact[:3], rtol=1e-3)


@pytest.mark.parametrize("lightning", ["pytorch_lightning", "lightning.pytorch"])
def test_a_program_with_its_own_classes(tmp_path, lightning):
    """Its configuration does not name them; the hooks of the data module are called; no log or weight is written."""
    pytest.importorskip(lightning)
    config, ckpt = trained(tmp_path, lightning)
    before = sorted(tmp_path.rglob("*"))
    command = ["-m", "lightning_sketch", "spectrum", "--config", config, "--json"]
    done = run(tmp_path, *command, "--ckpt", ckpt)
    assert done.returncode == 1
    assert "pass --model package.module.Class" in done.stderr
    command += ["--model", "program.Model", "--data", "program.Data"]
    done = run(tmp_path, *command, "--ckpt", ckpt, "--save", "found.safetensors")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert close(found, dense(ckpt, 4))
    assert found["parameters"] == 4 * 5 + 5 + 5 * 3 + 3
    saved = lightning_sketch.load_spectrum(tmp_path / "found.safetensors")
    assert saved.eigenvalues[:10].tolist() == found["eigenvalues"][:10]
    assert saved.eigenvalues[-3:].tolist() == found["eigenvalues"][10:]
    after = [p for p in tmp_path.rglob("*") if p.suffix != ".pyc" and p.name != "__pycache__"]
    assert set(after) - set(before) == {tmp_path / "found.safetensors"}
    fewer = json.loads(run(tmp_path, *command, "--ckpt", ckpt, "--num_batches", "1").stdout)
    assert close(fewer, dense(ckpt, 1))
    assert not close(fewer, dense(ckpt, 4))
    initial = json.loads(run(tmp_path, *command).stdout)
    assert initial["loss"] > found["loss"] / 9


def test_a_program_whose_configuration_names_its_classes(tmp_path):
    config, ckpt = trained(tmp_path, classes="")
    done = run(tmp_path, "-m", "lightning_sketch", "spectrum", "--config", config, "--ckpt", ckpt)
    assert done.returncode == 0, done.stderr
    found = [float(value) for value, _ in re.findall(r"^ +(\S+) ± \S+( \?)?$", done.stdout, re.MULTILINE)]
    assert len(found) == 13
    assert close({"eigenvalues": found}, dense(ckpt, 4))
    assert "args parameter" not in done.stderr


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="has what the file names")
def test_a_file_that_was_made_for_another_accelerator_or_by_an_old_version(tmp_path):
    config, ckpt = trained(tmp_path, classes="")
    as_class = "accelerator:\n    class_path: pytorch_lightning.accelerators.CPUAccelerator"
    text = config.read_text()
    config.write_text(text.replace("accelerator: cpu", as_class))
    torch.save(torch.load(ckpt, weights_only=False), ckpt, _use_new_zipfile_serialization=False)
    done = run(tmp_path, "-m", "lightning_sketch", "spectrum", "--config", config, "--ckpt", ckpt, "--json")
    assert done.returncode == 0, done.stderr
    config.write_text(text.replace("accelerator: cpu", "accelerator: mps"))
    done = run(tmp_path, "-m", "lightning_sketch", "spectrum", "--config", config, "--ckpt", ckpt, "--json")
    assert done.returncode == 0, done.stderr
    assert "there is no mps here" in done.stderr
    assert close(json.loads(done.stdout), dense(ckpt, 4))


def test_a_program_whose_classes_are_its_own(tmp_path):
    """As `python program.py` names them, `__main__.Model`: the arguments say where they are."""
    config, ckpt = trained(tmp_path, classes="")
    config.write_text(config.read_text().replace("program.", "__main__."))
    command = ["-m", "lightning_sketch", "spectrum", "--config", config, "--ckpt", ckpt, "--json"]
    done = run(tmp_path, *command)
    assert "pass --model program.Model" in done.stderr
    done = run(tmp_path, *command, "--model", "program.Model", "--data", "program.Data")
    assert done.returncode == 0, done.stderr
    assert close(json.loads(done.stdout), dense(ckpt, 4))


def test_arguments_that_no_file_has_are_those_of_the_checkpoint_or_refused(tmp_path):
    """A linked argument is not in the configuration: with its default the model would be another one."""
    config, ckpt = trained(tmp_path)
    config.write_text(config.read_text().replace("lr: 0.1", "lr: 0.2"))
    command = ["-m", "lightning_sketch", "spectrum", "--config", config, "--ckpt", ckpt]
    done = run(tmp_path, *command, "--model", "program.Model", "--data", "program.Data")
    assert done.returncode == 1
    assert "made with lr=0.1 (file: 0.2)" in done.stderr


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--ckpt", "nowhere.ckpt"], "there is no checkpoint nowhere.ckpt"),
        (["--model", "program.Modell", "--data", "program.Data"], "cannot import the class program.Modell"),
        (["--model", "program.Model"], "neither `data` nor a model with a train_dataloader"),
    ],
    ids=["checkpoint", "class", "data"],
)
def test_what_is_wrong_is_said_without_a_traceback(tmp_path, change, words):
    (tmp_path / "program.py").write_text(PROGRAM.format(lightning="pytorch_lightning", classes="Model, Data"))
    (tmp_path / "run.yaml").write_text("trainer:\n  accelerator: cpu\nmodel:\n  width: 5\n")
    done = run(tmp_path, "-m", "lightning_sketch", "spectrum", "--config", "run.yaml", *change)
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not Path(tmp_path / "lightning_logs").exists()


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"run.yaml": "model: [1"}, "run.yaml is no YAML"),
        ({"run.yaml": "just words"}, "run.yaml is no configuration"),
        ({"run.yaml": "model: {}", "some.ckpt": "half a checkpoint"}, "some.ckpt is no checkpoint, or not a whole one"),
    ],
    ids=["yaml", "words", "checkpoint"],
)
def test_files_of_another_kind_are_said(tmp_path, files, words):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    ckpt = str(tmp_path / "some.ckpt") if "some.ckpt" in files else None
    with pytest.raises(ValueError, match=words):
        spectrum_of_run(tmp_path / "run.yaml", ckpt)
