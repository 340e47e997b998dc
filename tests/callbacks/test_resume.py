"""The history of a monitor is in checkpoints, which load safely and contain nothing more of the parameters' size."""

import pytest
import torch
from forks import Started
from models import Digits, fit, loader, trainer
from pytorch_lightning.callbacks import ModelCheckpoint

from lightning_sketch import SpectrumMonitor

# Lightning warns that the resuming Trainers lack the ModelCheckpoint that made the checkpoints.
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")

RESUME = """
import sys
from models import fit, loader
from lightning_sketch import SpectrumMonitor

watch = SpectrumMonitor(num_batches=2)
fit(sys.argv[1], watch, data=loader(shuffle=False), max_epochs=4, ckpt_path=sys.argv[2])
print([m.step for m in watch.history], repr(watch.history[0].lambda_max))
"""


def saved_run(tmp_path, num_matvecs=96, **arguments):
    watch = SpectrumMonitor(num_batches=2, num_matvecs=num_matvecs)
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", save_top_k=-1, filename="{epoch}")
    fit(tmp_path, watch, checkpoint, data=loader(shuffle=False), enable_checkpointing=True, **arguments)
    return watch, sorted((tmp_path / "checkpoints").iterdir())


@pytest.mark.slow
def test_a_new_process_continues_the_history(tmp_path):
    watch, files = saved_run(tmp_path)
    assert len(files) == 2
    program = tmp_path / "resume.py"
    program.write_text(RESUME)
    process = Started(program, tmp_path, files[-1])
    output, errors = process.communicate()
    assert process.returncode == 0, errors[-2000:]
    assert output.strip().endswith(f"[8, 16, 24, 32] {watch.history[0].lambda_max!r}")


def test_measurements_after_an_older_checkpoint_are_repeated(tmp_path):
    watch, files = saved_run(tmp_path, num_matvecs=16, max_epochs=3)
    run = trainer(tmp_path, watch, max_epochs=2)
    run.fit(Digits(), loader(shuffle=False), ckpt_path=files[0])
    assert [m.step for m in watch.history] == [8, 16]


@pytest.mark.slow
def test_checkpoints_contain_nothing_of_the_parameters_size(tmp_path):
    _, files = saved_run(tmp_path)
    state = torch.load(files[-1], weights_only=True)
    (key,) = (key for key in state["callbacks"] if "SpectrumMonitor" in key)
    assert "hessian" in key
    sizes = [v.numel() for m in state["callbacks"][key]["history"] for v in m.values() if torch.is_tensor(v)]
    assert sizes
    assert max(sizes) <= 96 < sum(p.numel() for p in Digits().parameters())


@pytest.mark.slow
def test_other_batches_after_resuming_warn(tmp_path):
    _, files = saved_run(tmp_path)
    watch = SpectrumMonitor(num_batches=2)
    run = trainer(tmp_path, watch, max_epochs=3)
    with pytest.warns(UserWarning, match="the first batches differ from those before the checkpoint"):
        run.fit(Digits(), loader(shuffle=True), ckpt_path=files[-1])
